"""Consistency models (Song et al., 2023) trained from scratch, with and without CM: Table G.9.

    python train.py --base consistency --no-cm          # the baseline; with --cm, capacity manipulation on top of it
    python sample.py --ckpt out/NAME/ckpt.pt --steps 1  # one call of the network an image; --steps 2: two

The network learns f_theta(x_t, t, y), which sends every point of a noise trajectory to the trajectory's beginning. The
paper names the model and gives no details, and the original's metric needs another network's weights (LPIPS). This is the
improved training of Song and Dhariwal (2024), iCT, on DDPM's own timesteps: a pseudo-Huber distance, a teacher without
averaging, timesteps drawn by noise level, and a number of intervals that doubles. By default it doubles to 80, which on
digits (one seed) did better than 160 and 640; the original ends at 150, iCT at 1,280.

In place of eps the network's output is F of f = c_skip x_t / sqrt(ab_t) + c_out F. That is also what Eq. (2) compares:
like eps it is of the order of 1 at every t.
"""
import torch

from losses import BASES, TIMESTEPS, distance
from model import per_image, q_sample
from runtime import UserError

SIGMA_DATA = 0.5                    # EDM's standard deviation of an image's pixels
HUBER = 0.00054                     # iCT's constant, for the root of a mean over elements
FIRST, MOST = 10, 640               # intervals between t = 0 and t = T - 1


def sigmas(alphas_bar):
    """Noise of x_t / sqrt(ab_t), sigma_t = sqrt((1 - ab_t) / ab_t): 0.01 ... 157 for the linear schedule; (T,)."""
    return ((1 - alphas_bar) / alphas_bar).sqrt()


def coefficients(alphas_bar):
    """c_skip and c_out of every timestep, (T,) each."""
    sigma, s = sigmas(alphas_bar), SIGMA_DATA
    return s ** 2 / ((sigma - sigma[0]) ** 2 + s ** 2), s * (sigma - sigma[0]) / (sigma ** 2 + s ** 2).sqrt()


def to_x_0(F, x_t, t, alphas_bar):
    """f_theta of the network's output F at x_t (N, C, H, W) and t (N,): c_skip x_t / sqrt(ab_t) + c_out F.

    c_skip = s^2 / ((sigma_t - sigma_0)^2 + s^2), c_out = s (sigma_t - sigma_0) / sqrt(sigma_t^2 + s^2), s = 0.5 (Song et
    al., 2023, App. C): at t = 0, the trajectory's beginning, f is x_t / sqrt(ab_t) = x_0 + 0.01 eps, whatever F is.
    """
    c_skip, c_out = coefficients(alphas_bar)
    return per_image(c_skip / alphas_bar.sqrt(), t, x_t) * x_t + per_image(c_out, t, x_t) * F


def intervals(step, double_every):
    """How many intervals the timesteps are cut into at a step: 10, doubled every `double_every` steps, 640 at most."""
    return min(FIRST * 2 ** (step // double_every), MOST)


def draw_pairs(o, G, step, g):
    """Neighbouring timesteps (t, t_below), (G,) int64 each, t = j (T - 1) // N for j = 0 ... N, N = `intervals`; weights (G,).

    The interval is drawn with the probability that a log-normal sigma falls into it, of mean -1.1 and deviation 2.0 (iCT).
    Its weight is iCT's 1 / (sigma_t - sigma_t'), divided by the mean of c_out / (sigma_t - sigma_t') over that law: else
    the gradient in F would grow 40 times with N, out of proportion to --grad-clip and to L_CM.
    """
    N, T, sigma = intervals(step, o.ct_double), len(o.alphas_bar), sigmas(o.alphas_bar)
    grid = torch.arange(N + 1, device=g.device) * (T - 1) // N
    law = torch.special.ndtr((sigma[grid].log() + 1.1) / 2.0).diff()
    weight = 1 / sigma[grid].diff()
    weight = weight / ((law * coefficients(o.alphas_bar)[1][grid[1:]] * weight).sum() / law.sum())
    j = torch.multinomial(law, G, replacement=True, generator=g)
    return grid[j + 1], grid[j], weight[j].float()


def consistency(p, b, o):
    """Consistency training: E w d(f(x_t, t, y), sg f(x_t', t', y)), t' the timestep below and w its weight (`draw_pairs`).

    Both points carry the same image, noise, label and dropout masks; d(u, v) = sqrt(||u - v||^2 + c^2) - c.
    """
    x_below = q_sample(b.x_0, b.t_below, b.eps, o.alphas_bar)
    with torch.no_grad():
        encoded = o.net.encode(x_below, b.t_below, b.y_in, b.masks_encode, b.a)
        target = to_x_0(o.net.decode(*encoded, b.masks_decode).float(), x_below, b.t_below, o.alphas_bar)
    error = distance(to_x_0(p.eps, p.x_t, b.t, o.alphas_bar), target)
    return {"base": (b.weight * ((error + HUBER ** 2).sqrt() - HUBER)).mean()}


BASES["consistency"], TIMESTEPS["consistency"] = consistency, draw_pairs


# ----------------------------------------------------------------------------------------------------------------------

def make_timesteps(T, steps):
    """Descending timesteps of the multistep sampler, (T - 1) (i / steps)^2: 999 for one step, 999 and 249 for two."""
    timesteps = [(T - 1) * i * i // steps ** 2 for i in range(steps, 0, -1)]
    if timesteps[-1] == 0:
        raise UserError(f"--steps {steps}: a consistency model's last timestep would be 0, where it changes nothing; take fewer (1 or 2 are usual)")
    return timesteps


def sample(predict, x, alphas_bar, timesteps, noise):
    """Song et al.'s Algorithm 1: x_0 = f(x_T, T), then noise it to each further timestep and call f again.

    predict(x_t, t) -> F; x (N, C, H, W) standard normal; noise() gives fresh standard normal noise of x's shape. What f
    gives carries sigma_0 already, so that sqrt(sigma_t^2 - sigma_0^2) is added.
    """
    sigma = sigmas(alphas_bar).tolist()
    for k, t in enumerate(timesteps):
        t_all = torch.full((len(x),), t, device=x.device)
        if k:
            x = float(alphas_bar[t]) ** 0.5 * (x_0 + (sigma[t] ** 2 - sigma[0] ** 2) ** 0.5 * noise())
        x_0 = to_x_0(predict(x, t), x, t_all, alphas_bar)
    return x_0
