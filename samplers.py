"""Samplers, and the record of how images are generated, `Sampling`.

A sampler is a function of SAMPLERS:

    sampler(predict, x_T, alphas_bar, timesteps, noise, limit) -> x_0

    predict(x_t, t) -> eps      the network with its labels and guidance; t is an int
    x_T                         (N, C, H, W) standard normal
    timesteps                   descending, see make_timesteps
    noise()                     fresh standard normal noise of x_T's shape
    limit(x_0) -> x_0           bounds the predicted x_0 of every step; None leaves it as it is
"""
import math
from dataclasses import asdict, dataclass

import numpy as np

from model import make_alphas_bar
from runtime import UserError, flag_of
from variants import consistency


def make_timesteps(alphas_bar, steps: int, grid: str = "uniform") -> list[int]:
    """A descending list of `steps` timesteps in [0, T), for alphas_bar (T,); the last is 0.

    "uniform": floor(i T / steps), so 980, 960 ... 0 for T = 1000 and 50 steps. "quad": (i / (steps
    - 1))^2 0.8 T, the CIFAR-10 grid of Song et al. (2021a). "logsnr": nearest to equal parts of
    log_snr from T - 1 to 0 (Lu et al., 2022a). Raises UserError where there are no `steps`
    different ones.
    """
    T = len(alphas_bar)
    if grid == "uniform":
        grid_t = [i * T // steps for i in range(steps)]
    elif grid == "quad":
        grid_t = spread_out(int(t) for t in np.linspace(0, np.sqrt(0.8 * T), steps) ** 2)
    else:
        every = np.array([log_snr(float(ab)) for ab in alphas_bar])
        parts = np.linspace(every[0], every[-1], steps)
        grid_t = spread_out(int(np.abs(every - part).argmin()) for part in parts)
    if len(set(grid_t)) < steps or grid_t[-1] >= T:
        raise UserError(f"--steps {steps}: the {grid} grid of {T} timesteps has no {steps} "
                        "different ones; take fewer")
    return grid_t[::-1]


def spread_out(timesteps):
    """Ascending timesteps, some of which may be equal, as different ones: later ones are raised."""
    found = []
    for t in timesteps:
        found.append(max(t, found[-1] + 1 if found else 0))
    return found


def log_snr(ab):
    """log(alpha / sigma), half the logarithm of the signal-to-noise ratio, for 0 < ab < 1."""
    return 0.5 * math.log(ab / (1 - ab))


def pairs(alphas_bar, timesteps):
    """Yield (t, alphas_bar_t, the next timestep's alphas_bar) as floats; after the last comes 1."""
    nexts = [float(alphas_bar[t]) for t in timesteps[1:]] + [1.0]
    for t, ab_next in zip(timesteps, nexts):
        yield t, float(alphas_bar[t]), ab_next


def to_range(x_0):
    """x_0 clipped to [-1, 1], the range of images."""
    return x_0.clamp(-1, 1)


def predict_x_0(predict, x, t, ab, limit):
    """(x_0, eps) that the network predicts at x_t, which is sqrt(ab) x_0 + sqrt(1 - ab) eps.

    A limited x_0 has an eps of its own, so that x_t stays what it is: Dhariwal and Nichol's way.
    """
    eps = predict(x, t)
    x_0 = (x - (1 - ab) ** 0.5 * eps) / ab ** 0.5
    if limit is not None:
        x_0 = limit(x_0)
        eps = (x - ab ** 0.5 * x_0) / (1 - ab) ** 0.5
    return x_0, eps


def ddim(predict, x, alphas_bar, timesteps, noise, limit=None, eta=0.0, last_step="x_0"):
    """DDIM (Song et al., 2021a, Eq. 12); x (N, C, H, W) standard normal.

    eta = 0 is deterministic, eta = 1 ancestral with the posterior variance. last_step "identity",
    the authors' release: from t = 0 to t = 0, with coefficients 1 of x and 0 of eps, so the network
    is not called, and noise of standard deviation 0.01 stays.
    """
    for t, ab, ab_next in pairs(alphas_bar, timesteps):
        if ab_next == 1 and last_step == "identity":
            return x
        x_0, eps = predict_x_0(predict, x, t, ab, limit)
        sigma = eta * ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)) ** 0.5
        x = ab_next ** 0.5 * x_0 + (1 - ab_next - sigma ** 2) ** 0.5 * eps
        if sigma:
            x = x + sigma * noise()
    return x


def ddpm(predict, x, alphas_bar, timesteps, noise, limit=None):
    """Ancestral sampling, Algorithm C.1, with sigma_t^2 = beta_t; no noise after the last step.

    On a grid with gaps, alpha_t is the ratio of neighbouring alphas_bar, so that every number of
    steps is consistent. The mean is that of the posterior q(x_{t-1} | x_t, x_0).
    """
    for t, ab, ab_next in pairs(alphas_bar, timesteps):
        alpha = ab / ab_next
        beta = 1 - alpha
        _, eps = predict_x_0(predict, x, t, ab, limit)
        x = (x - beta / (1 - ab) ** 0.5 * eps) / alpha ** 0.5
        if ab_next < 1:
            x = x + beta ** 0.5 * noise()
    return x


def dpm_orders(steps, order):
    """The orders of DPM-Solver's steps, of `steps` network calls in all; the last is 1.

    As in its authors' code, but where theirs ends with an order of 2: order 3 and 17, 20, 23 ...
    calls, order 2 and an even number. The way to alphas_bar = 1 is too far to extrapolate.
    """
    full, rest = divmod(steps - 1, order)
    return [order] * full + [rest] * (rest > 0) + [1]


def dpm(predict, x, alphas_bar, timesteps, noise, limit=None, order=3):
    """Singlestep DPM-Solver of order 1, 2 or 3 (Lu et al., 2022a, Algorithms 1 and 2).

    Deterministic. A step of order n calls the network at n neighbouring timesteps and goes on from
    the first of them; on the "logsnr" grid these are the paper's r = 1/2, or 1/3 and 2/3. The last
    step is of order 1, which is DDIM, and goes to alphas_bar = 1: the authors' code ends at t = 0,
    and so leaves noise of standard deviation 0.01.
    """
    calls = list(pairs(alphas_bar, timesteps))
    for n in dpm_orders(len(calls), order):
        x = dpm_step(predict, x, calls[:n], limit)
        calls = calls[n:]
    return x


def dpm_step(predict, x, calls, limit):
    """One step of order len(calls), from x at the first of these calls; calls: part of `pairs`."""
    t, ab, ab_next = calls[0]
    x_0, eps = predict_x_0(predict, x, t, ab, limit)
    if ab_next == 1:
        return x_0

    def x_at(ab_k, slope):
        """x where alphas_bar is ab_k, for an eps that changes by `slope` per unit of log_snr."""
        h = log_snr(ab_k) - log_snr(ab)
        weight = math.expm1(h) * h / 2 if len(calls) == 2 else math.expm1(h) - h
        change = math.expm1(h) * eps + weight * slope
        return (ab_k / ab) ** 0.5 * x - (1 - ab_k) ** 0.5 * change
    slope = 0.0
    for t_k, ab_k, _ in calls[1:]:
        _, eps_k = predict_x_0(predict, x_at(ab_k, slope), t_k, ab_k, limit)
        slope = (eps_k - eps) / (log_snr(ab_k) - log_snr(ab))
    return x_at(calls[-1][2], slope)


def dpmpp(predict, x, alphas_bar, timesteps, noise, limit=None):
    """DPM-Solver++ (2M) (Lu et al., 2022b): second-order multistep in log(alpha / sigma).

    Deterministic. Of first order, which is DDIM, are the first step, the last, to alphas_bar = 1,
    and one to t = 0: on a grid of 15 the step to t = 0 is more than four times as wide as the one
    before it, too wide to extrapolate over.
    """
    previous = None                                         # x_0 and the width of the step before
    for t, ab, ab_next in pairs(alphas_bar, timesteps):
        x_0, _ = predict_x_0(predict, x, t, ab, limit)
        if ab_next == 1:
            return x_0
        h = log_snr(ab_next) - log_snr(ab)
        D = x_0
        if previous is not None and ab_next != float(alphas_bar[0]):
            x_0_before, h_before = previous
            D = x_0 + h / (2 * h_before) * (x_0 - x_0_before)
        x = ((1 - ab_next) / (1 - ab)) ** 0.5 * x - ab_next ** 0.5 * math.expm1(-h) * D
        previous = x_0, h


SAMPLERS = {
    "ddim": ddim, "ddpm": ddpm, "dpm": dpm, "dpm++": dpmpp, "consistency": consistency.sample}
# The paper's, but for the last
STEPS = {"ddim": 50, "ddpm": 1000, "dpm": 15, "dpm++": 15, "consistency": 2}
DEFAULTS = {        # per kind of model, where they are not Sampling's; latents have no range
    "diffusion": {"clip": True}, "consistency": {"sampler": "consistency", "guidance": 0.0},
    "latent diffusion": {}, "latent": {}, "text": {}}
RECIPES = {         # per --recipe of train.py, where they are others yet
    "release": {"clip": False, "last_step": "identity"}}
LAST_STEPS = ("x_0", "identity")


@dataclass(frozen=True)
class Sampling:
    """How images are generated: everything but the network, the labels and the images' numbers."""
    sampler: str = "ddim"
    steps: int = 50             # calls of the network, or pairs of them with guidance
    grid: str = "uniform"       # of the timesteps, see make_timesteps
    order: int = 3              # of dpm
    eta: float = 0.0            # of ddim, and so is
    last_step: str = "x_0"      # to alphas_bar = 1, or none
    guidance: float = 1.5       # omega in eps + omega (eps - eps_null); 0: no second call
    clip: bool = False          # the predicted x_0 of every step to [-1, 1]
    seed: int = 0

    @classmethod
    def of(cls, kind, recipe=None, **given):
        """The defaults for a kind of model (a key of DEFAULTS), but for what is given.

        recipe: that of its training, or None. None counts as not given. Raises UserError for
        settings that this kind of model, or the sampler, has no use for, and where there are not as
        many timesteps.
        """
        given = {name: value for name, value in given.items() if value is not None}
        values = {"sampler": cls.sampler, **DEFAULTS[kind], **RECIPES.get(recipe, {}), **given}
        if values["sampler"] != "ddim" and "last_step" not in given:
            values["last_step"] = cls.last_step
        sampling = cls(**{"steps": STEPS[values["sampler"]], **values})
        sampler, of_consistency = sampling.sampler, sampling.sampler == "consistency"
        unfit = {"sampler": of_consistency != (kind == "consistency"),
                 "guidance": of_consistency and sampling.guidance,
                 "clip": sampling.clip and kind != "diffusion",
                 "grid": sampling.grid != "uniform" and of_consistency
                         or sampling.grid == "quad" and sampler != "ddim",
                 "order": "order" in given and sampler != "dpm",
                 "eta": sampling.eta and sampler != "ddim",
                 "last_step": sampling.last_step != "x_0" and sampler != "ddim"}
        for name, wrong in unfit.items():
            if wrong:
                value = getattr(sampling, name)
                raise UserError(f"{flag_of(name)} {value}: not for a {kind} model sampled by "
                                f"{sampler}; leave it out")
        sampling.timesteps(make_alphas_bar())
        return sampling

    def timesteps(self, alphas_bar):
        """The descending timesteps in [0, T), for alphas_bar (T,). Raises UserError.

        DPM-Solver's do not reach 0, where its authors' code ends and calls the network no more.
        """
        T = len(alphas_bar)
        if self.sampler == "consistency":
            return consistency.make_timesteps(T, self.steps)
        if self.sampler == "dpm":
            if self.steps >= T:
                raise UserError(f"--steps {self.steps}: dpm takes {T - 1} at most; take fewer")
            return make_timesteps(alphas_bar, self.steps + 1, self.grid)[:-1]
        return make_timesteps(alphas_bar, self.steps, self.grid)

    def record(self):
        """What results keep of it: a dict, with the order where the sampler has one.

        And with the last step where it is not the usual one.
        """
        settings = asdict(self)
        if self.sampler != "dpm":
            del settings["order"]
        if self.last_step == "x_0":
            del settings["last_step"]
        return settings
