"""The metrics, from features to numbers, computed as torch-fidelity computes them.

    frechet_distance(*statistics(fake), *statistics(real))      # FID of features (N, D) and (M, D)
    kernel_distance(fake, real)             # KID: mean, standard deviation, subset size
    neighbour_metrics(fake, real, k=3)      # precision, recall, density, coverage
    inception_score(logits)                 # IS: mean, standard deviation

Features are NumPy arrays, float32; FID and KID take tensors as well, and compute where these are
(`placed`). Those of the generated images come first, those of the real images second.
tests/metrics/test_scores.py compares each metric with torch-fidelity's, and with its definition.
"""
import numpy as np
import torch

from data import is_balanced

# The settings of torch-fidelity
KID_SUBSETS = 100
KID_SIZE = 1000
IS_SPLITS = 10
METRIC_SEED = 2020

DENSITY_K = 5           # neighbours in density and coverage, as in their paper
FLOOR_IMAGES = 4        # floor_of: a covariance needs two images in each half
LEAST_REAL = 10         # of fewer, a number says which images they are, and not what the class is

Array = np.ndarray | torch.Tensor


def placed(features: np.ndarray, device: torch.device | str) -> Array:
    """Features as they are for the CPU, where NumPy computes; else a tensor on the device."""
    if torch.device(device).type == "cpu":
        return features
    return torch.from_numpy(features).to(device)


def double(x: Array) -> Array:
    """An array or a tensor in float64."""
    return x.double() if isinstance(x, torch.Tensor) else np.asarray(x, np.float64)


# --------------------------------------------------------------------------------------------------
# Frechet distance

def equal_weights(labels: np.ndarray) -> np.ndarray:
    """Weights (N,) with which C classes count equally: w_i = 1 / (C N_c) for image i of class c."""
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1 / (len(counts) * counts[numbers])


def weights_of(labels: np.ndarray | None) -> np.ndarray | None:
    """equal_weights of a reference; None where it is balanced, or without labels."""
    if labels is None or is_balanced(np.unique(labels, return_counts=True)[1]):
        return None
    return equal_weights(labels)


def statistics(features: Array, weights: np.ndarray | None = None) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D) of features x_i (N, D): float64.

    mu = sum_i w_i x_i and S = sum_i w_i (x_i - mu) (x_i - mu)^T / (1 - sum_i w_i^2), for weights
    w (N,) with sum 1. Without weights w_i = 1 / N, which makes S the usual one, divided by N - 1.
    """
    features = double(features)
    if weights is None:
        mean = features.mean(0)
        features = features - mean
        return mean, features.T @ features / (len(features) - 1)
    if isinstance(features, torch.Tensor):
        weights = torch.from_numpy(weights).to(features.device)
    mean = weights @ features
    features = features - mean
    return mean, (features.T * weights) @ features / (1 - (weights ** 2).sum())


def frechet_distance(mu_1: Array, sigma_1: Array, mu_2: Array, sigma_2: Array) -> float:
    """||mu_1 - mu_2||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^{1/2}) of two Gaussians (Heusel et al., 2017).

    tr (S_1 S_2)^{1/2} is the sum of the square roots of the eigenvalues of S_1^{1/2} S_2 S_1^{1/2}.
    This matrix is symmetric and non-negative, so no imaginary part can appear, even with fewer
    samples than dimensions. Means (D,) and covariances (D, D) are arrays, or tensors.
    """
    linalg = torch.linalg if isinstance(sigma_1, torch.Tensor) else np.linalg
    values, vectors = linalg.eigh(sigma_1)
    root = vectors * values.clip(0) ** 0.5 @ vectors.T
    cross = (linalg.eigvalsh(root @ sigma_2 @ root).clip(0) ** 0.5).sum()
    distance = ((mu_1 - mu_2) ** 2).sum() + sigma_1.trace() + sigma_2.trace() - 2 * cross
    return float(distance)


def distance_of(a: Array, b: Array, weights: np.ndarray | None = None) -> float:
    """Frechet distance between two sets of features (N, D) and (M, D); weights (M,): of b's."""
    return frechet_distance(*statistics(a), *statistics(b, weights))


def floor_of(features: Array, rounds: int = 10, labels: np.ndarray | None = None) -> float:
    """Mean Frechet distance between two random halves of real features, over `rounds` divisions.

    It says how small the distance of perfect samples would be, with half as many images. labels
    (N,): each class is halved, and in both halves classes count as they do in the whole; None: one
    class.
    """
    weighted = weights_of(labels) is not None

    def half(rows):
        return statistics(features[rows], equal_weights(labels[rows]) if weighted else None)
    rng = np.random.RandomState(0)
    labels = np.zeros(len(features)) if labels is None else labels
    total = 0.0
    for _ in range(rounds):
        order = rng.permutation(len(features))
        order = order[np.argsort(labels[order], kind="stable")]     # class by class
        total += frechet_distance(*half(order[::2]), *half(order[1::2]))
    return total / rounds


# --------------------------------------------------------------------------------------------------
# Kernel distance

def polynomial_kernel(a: Array, b: Array) -> Array:
    """(x . y / D + 1)^3 of all rows x of a and y of b: the products in float32, then float64."""
    base = double(a @ b.T) / a.shape[1] + 1
    return base * base * base


def kernel_distance(fake: Array, real: Array, subsets: int = KID_SUBSETS,
                    size: int = KID_SIZE) -> tuple[float, float, int]:
    """KID (Binkowski et al., 2018): the unbiased MMD^2 over random subsets.

    Returns the mean, the standard deviation and the subset size, which is at most the size of the
    smaller set. One RandomState chooses from the generated images and then from the real ones, in
    each round. This is the order of torch-fidelity, so the subsets are the same.
    """
    size = min(size, len(fake), len(real))
    rng = np.random.RandomState(METRIC_SEED)
    values = []
    for _ in range(subsets):
        x = fake[rng.choice(len(fake), size, replace=False)]
        y = real[rng.choice(len(real), size, replace=False)]
        xx = polynomial_kernel(x, x)
        yy = polynomial_kernel(y, y)
        pairs = size * (size - 1)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / pairs
        values.append(float(within - 2 * polynomial_kernel(x, y).mean()))
    return float(np.mean(values)), float(np.std(values)), size


# --------------------------------------------------------------------------------------------------
# Precision and recall, density and coverage

def squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances (N, M) between the rows of a (N, D) and of b (M, D)."""
    a_norms = a.square().sum(1)[:, None]
    b_norms = b.square().sum(1)[None]
    return torch.addmm(b_norms, a, b.T, alpha=-2).add_(a_norms)


def radii(x: torch.Tensor, k: int, block: int) -> torch.Tensor:
    """Squared distance from each row of x (N, D) to its k-th nearest other row: (N,).

    Each pair of blocks of rows is computed once.
    """
    parts = x.split(block)
    # For each row the k + 1 smallest distances so far, that to the row itself included
    nearest = [part.new_full((len(part), 0), 0) for part in parts]

    def keep(i, d):
        d = torch.cat([nearest[i], d], 1)
        nearest[i] = d.topk(min(k + 1, d.shape[1]), largest=False).values

    for i, part in enumerate(parts):
        for j in range(i, len(parts)):
            d = squared_distances(part, parts[j])
            keep(i, d)
            if j > i:
                keep(j, d.T)
    return torch.cat([n[:, -1] for n in nearest])


def neighbour_metrics(fake: np.ndarray, real: np.ndarray, k: int = 3, density_k: int = DENSITY_K,
                      block: int = 2048, device: torch.device | str = "cpu",
                      weights: np.ndarray | None = None) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al., 2019), density and coverage (Naeem et al., 2020).

    Around each image lies a ball, as wide as its k-th nearest neighbour in its own set is far.
    Precision: the share of generated images in the ball of some real image. Recall: the share of
    real images in the ball of some generated image. The other two take density_k for k. Density: in
    how many balls of real images a generated image lies, divided by k, on average; so it may be
    above 1. Coverage: the share of real images whose ball holds a generated one; of as many perfect
    samples it is about 1 - 2^-k.
    weights (M,), with sum 1, make recall and coverage the weight of these real images in place of
    their share. "k" and "density_k" of the result are smaller where there are no more neighbours.
    fake (N, D) and real (M, D) are compared in blocks of rows, so memory holds at most
    block x max(N, M) distances.
    """
    center = real.mean(0)       # no distance changes, and float32 keeps more digits near zero
    fake, real = (torch.from_numpy(np.ascontiguousarray(x - center)).to(device)
                  for x in (fake, real))
    others = len(real) - 1
    density_k = min(density_k, others)
    fake_radii, real_radii = radii(fake, k, block), radii(real, k, block)
    density_radii = radii(real, density_k, block)
    precise = []                                                            # per generated image
    recalled = torch.zeros(len(real), dtype=torch.bool, device=device)      # per real image
    covered = torch.zeros_like(recalled)
    count = 0
    for part, part_radii in zip(fake.split(block), fake_radii.split(block)):
        d = squared_distances(part, real)
        precise.append((d <= real_radii).any(1))
        recalled |= (d <= part_radii[:, None]).any(0)
        inside = d < density_radii
        count += int(inside.sum())
        covered |= inside.any(0)

    def share(found):
        return float(found.double().mean() if weights is None else weights @ found.cpu().numpy())
    return {"precision": float(torch.cat(precise).double().mean()), "recall": share(recalled),
            "k": min(k, len(fake) - 1, others), "density": count / (density_k * len(fake)),
            "coverage": share(covered), "density_k": density_k}


# --------------------------------------------------------------------------------------------------
# Inception score

def inception_score(logits: np.ndarray, count: int = IS_SPLITS) -> tuple[float, float]:
    """IS (Salimans et al., 2016) of logits (N, K): exp E KL(p(y|x) || p(y)).

    Returns its mean and standard deviation over `count` parts of the images. The images are
    shuffled first, as torch-fidelity does, because samples come sorted by class.
    """
    N = len(logits)
    logits = logits[np.random.RandomState(METRIC_SEED).permutation(N)]
    scores = []
    for i in range(count):
        part = torch.from_numpy(logits[i * N // count:(i + 1) * N // count])
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        kl = (p * (log_p - p.mean(0).log())).sum(1)
        scores.append(float(kl.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
