"""Consistency models (Song et al., 2023) trained from scratch, with and without CM: Table G.9.

    python train.py --base consistency --no-cm          # the baseline; --cm adds CM
    python sample.py --ckpt out/NAME/ckpt.pt --steps 1  # one network call per image; --steps 2: two

The network learns f_theta(x_t, t, y), which maps every point of a noise trajectory to the
trajectory's beginning. The paper names the model and gives no details, and the original's metric
needs another network's weights (LPIPS). This is the improved training of Song and Dhariwal (2024),
iCT, on DDPM's own timesteps: a pseudo-Huber distance, a teacher without averaging, timesteps drawn
by noise level, and a number of intervals that doubles. By default it doubles to 80, which on digits
(one seed) was better than 160 and 640; the original ends at 150, iCT at 1,280.

It differs from iCT in its timesteps, in equal parts of t unless --ct-grid karras is given; in the
network's input, which is x_t and not x / sqrt(sigma^2 + 0.25); and in the rest of the run, which is
train.py's (Adam, --lr, --dropout 0.1, --ema), where iCT takes RAdam at 1e-4, dropout 0.3 and an EMA
of 0.99993 on CIFAR-10.

The network's output is F of f = c_skip x_t / sqrt(ab_t) + c_out F, in place of eps. That is also
what Eq. (2) compares: like eps it is of the order of 1 at every t.
"""
import torch
from torch import Tensor

from model import distance, extract, q_sample
from runtime import UserError

SIGMA_DATA = 0.5                    # EDM's standard deviation of an image's pixels
HUBER = 0.00054                     # iCT's constant, for the root of a mean over elements
FIRST_INTERVALS = 10                # between t = 0 and t = T - 1, at the start of training
MOST_INTERVALS = 640


# --------------------------------------------------------------------------------------------------
# The function f

def sigmas(alphas_bar: Tensor) -> Tensor:
    """Noise level of x_t / sqrt(ab_t), sigma_t = sqrt((1 - ab_t) / ab_t), (T,).

    0.01 ... 157 for the linear schedule.
    """
    return ((1 - alphas_bar) / alphas_bar).sqrt()


def coefficients(alphas_bar: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of every timestep, (T,) each (Song et al., 2023, App. C).

    c_skip = s^2 / ((sigma_t - sigma_0)^2 + s^2), c_out = s (sigma_t - sigma_0) / sqrt(sigma_t^2 +
    s^2), with s = 0.5.
    """
    sigma = sigmas(alphas_bar)
    s = SIGMA_DATA
    c_skip = s ** 2 / ((sigma - sigma[0]) ** 2 + s ** 2)
    c_out = s * (sigma - sigma[0]) / (sigma ** 2 + s ** 2).sqrt()
    return c_skip, c_out


def constants(alphas_bar: Tensor) -> dict[str, Tensor]:
    """What `to_x_0` takes, computed in float64: {"x_t_factor", "F_factor"}, (T,) each."""
    c_skip, c_out = coefficients(alphas_bar)
    return {"x_t_factor": c_skip / alphas_bar.sqrt(), "F_factor": c_out}


def to_x_0(F: Tensor, x_t: Tensor, t: Tensor, x_t_factor: Tensor, F_factor: Tensor) -> Tensor:
    """f_theta from the network's output F: c_skip x_t / sqrt(ab_t) + c_out F.

    F, x_t: (N, C, H, W). t: (N,). The factors: (T,) float32, of `constants`. At t = 0, the
    trajectory's beginning, f is x_t / sqrt(ab_t) = x_0 + 0.01 eps, whatever F is.
    """
    return extract(x_t_factor, t, x_t) * x_t + extract(F_factor, t, x_t) * F


# --------------------------------------------------------------------------------------------------
# Training: an entry of losses.BASES

def make_grid(sigma: Tensor, N: int, kind: str) -> Tensor:
    """The N + 1 timesteps between which pairs are drawn, ascending from 0 to T - 1: int64.

    sigma: (T,), of every timestep. kind "uniform": j (T - 1) // N for j = 0 ... N. "karras": the
    nearest to equal parts of sigma^(1/7) (Karras et al., 2022, Eq. 5), which is iCT's grid; where N
    is above 40 some of them are equal.
    """
    parts = torch.arange(N + 1, device=sigma.device)
    if kind == "uniform":
        return parts * (len(sigma) - 1) // N
    root = sigma ** (1 / 7)
    return (root - (root[0] + (root[-1] - root[0]) * parts / N)[:, None]).abs().argmin(1)


def draw_pairs(alphas_bar, n, step, generator, *, ct_double=1, ct_grid="uniform"):
    """Neighbouring timesteps and the weights of such pairs: (t, (t_below, weight)), (n,) each.

    They are neighbours on make_grid's grid of N intervals: 10 at first, doubled every ct_double
    steps, up to 640. An interval is drawn with the probability that a log-normal sigma falls into
    it, of mean -1.1 and deviation 2.0 (iCT). Its weight is iCT's 1 / (sigma_t - sigma_t'), divided
    by the mean of c_out / (sigma_t - sigma_t') over that distribution: else the gradient in F would
    grow 40 times with N, out of proportion to --grad-clip and to L_CM.
    """
    N = min(FIRST_INTERVALS * 2 ** (step // ct_double), MOST_INTERVALS)
    sigma = sigmas(alphas_bar)
    c_out = coefficients(alphas_bar)[1]
    grid = make_grid(sigma, N, ct_grid)
    probability = torch.special.ndtr((sigma[grid].log() + 1.1) / 2.0).diff()
    width = sigma[grid].diff()
    weight = torch.where(width > 0, 1 / width, 0)           # an empty interval is never drawn
    mean_effect = (probability * c_out[grid[1:]] * weight).sum() / probability.sum()
    grid, weight, probability = (values.to(generator.device) for values in (
        grid, weight / mean_effect, probability))
    j = torch.multinomial(probability, n, replacement=True, generator=generator)
    return grid[j + 1], (grid[j], weight[j].float())


def loss(pred, batch, obj):
    """Consistency training: E w d(f(x_t, t, y), sg f(x_t', t', y)), t' the timestep below t.

    Both points have the same image, noise, label and dropout masks; w is `draw_pairs`'s weight, and
    d(u, v) = sqrt(||u - v||^2 + c^2) - c. sg: no gradient.
    """
    t_below, weight = batch.pair
    factors = obj.x_t_factor, obj.F_factor
    x_below = q_sample(batch.x_0, t_below, batch.eps, obj.signal, obj.sigma)
    with torch.no_grad():
        encoded = obj.net.encode(x_below, t_below, batch.y_cond, batch.masks.encode,
                                 batch.augmentation)
        F_below = obj.net.decode(*encoded, batch.masks.decode).float()
        target = to_x_0(F_below, x_below, t_below, *factors)
    error = distance(to_x_0(pred.eps, pred.x_t, batch.t, *factors), target)
    base = (weight * ((error + HUBER ** 2).sqrt() - HUBER)).mean()
    return base, {"base": base}


# --------------------------------------------------------------------------------------------------
# Sampling: an entry of samplers.SAMPLERS

def make_timesteps(T: int, steps: int) -> list[int]:
    """Descending timesteps of the multistep sampler, (T - 1) (i / steps)^2.

    999 for one step, 999 and 249 for two. Raises UserError where the last would be 0.
    """
    timesteps = [(T - 1) * i * i // steps ** 2 for i in range(steps, 0, -1)]
    if timesteps[-1] == 0:
        raise UserError(f"--steps {steps}: a consistency model's last timestep would be 0, where "
                        "it changes nothing; take fewer (1 or 2 are usual)")
    return timesteps


def sample(predict, x, alphas_bar, timesteps, noise, limit=None):
    """Song et al.'s Algorithm 1: x_0 = f(x_T, T), then noise it to each further t and call f again.

    predict(x_t, t) -> F. x: (N, C, H, W) standard normal. noise() gives fresh standard normal noise
    of x's shape. f's result contains sigma_0's noise already, so sqrt(sigma_t^2 - sigma_0^2) is
    added. There is no `limit`.
    """
    sigma = sigmas(alphas_bar).tolist()
    factors = [value.float().to(x.device) for value in constants(alphas_bar).values()]
    for t, t_next in zip(timesteps, [*timesteps[1:], None]):
        t_all = torch.full((len(x),), t, device=x.device)
        x_0 = to_x_0(predict(x, t), x, t_all, *factors)
        if t_next is not None:
            added = (sigma[t_next] ** 2 - sigma[0] ** 2) ** 0.5
            x = float(alphas_bar[t_next]) ** 0.5 * (x_0 + added * noise())
    return x_0
