"""The metrics, from features to numbers, as torch-fidelity computes them: Frechet and kernel distance, precision and recall, IS.

    frechet_distance(*statistics(fake), *statistics(real))      # FID of Inception features (N, D) and (M, D)
    kernel_distance(fake, real)                                 # KID: mean, standard deviation, subset size
    precision_recall(fake, real, k=3)
    inception_score(logits)                                     # IS: mean, standard deviation

Features are NumPy float32, of the generated images first and of the real ones second; tests/test_evaluate.py lays each
beside torch-fidelity's, and beside a literal version of its definition.
"""
import numpy as np
import torch

KID_SUBSETS, KID_SIZE, IS_SPLITS, METRIC_SEED = 100, 1000, 10, 2020      # torch-fidelity's


def statistics(features):
    """Mean (D,) and covariance (D, D), with N - 1, of features (N, D): float64."""
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    features = features - mean
    return mean, features.T @ features / (len(features) - 1)


def frechet_distance(mu_1, sigma_1, mu_2, sigma_2):
    """||mu_1 - mu_2||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^{1/2}) between two Gaussians (Heusel et al., 2017).

    tr (S_1 S_2)^{1/2} is the sum of the roots of the eigenvalues of S_1^{1/2} S_2 S_1^{1/2}, which is symmetric and
    non-negative: no imaginary part can appear, also with fewer samples than dimensions.
    """
    values, vectors = np.linalg.eigh(sigma_1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma_2 @ root).clip(0)).sum()
    return float(((mu_1 - mu_2) ** 2).sum() + np.trace(sigma_1) + np.trace(sigma_2) - 2 * cross)


def distance_of(a, b):
    """Frechet distance between two sets of features (N, D) and (M, D)."""
    return frechet_distance(*statistics(a), *statistics(b))


def kernel_distance(fake, real, subsets=KID_SUBSETS, size=KID_SIZE, seed=METRIC_SEED):
    """KID (Binkowski et al., 2018): (mean, standard deviation, subset size) of the unbiased MMD^2 over random subsets.

    Kernel (x . y / D + 1)^3, the products in float32, its sums in float64. The size is reduced to the smaller set's. One RandomState draws from the
    generated and then from the real images each time, as torch-fidelity does: the same subsets.
    """
    size, rng, values = min(size, len(fake), len(real)), np.random.RandomState(seed), []

    def kernel(a, b):
        base = (a @ b.T).astype(np.float64) / a.shape[1] + 1
        return base * base * base
    for _ in range(subsets):
        x = fake[rng.choice(len(fake), size, replace=False)]
        y = real[rng.choice(len(real), size, replace=False)]
        xx, yy = kernel(x, x), kernel(y, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append(within - 2 * kernel(x, y).mean())
    return float(np.mean(values)), float(np.std(values)), size


def squared_distances(a, b):
    """Squared Euclidean distances (N, M) between rows of a (N, D) and b (M, D)."""
    return torch.addmm(b.square().sum(1)[None], a, b.T, alpha=-2).add_(a.square().sum(1)[:, None])


def radii(x, k, block):
    """Squared distance from each row of x (N, D) to its k-th nearest other row: (N,). Each pair of blocks is looked at once."""
    parts = x.split(block)
    nearest = [part.new_full((len(part), 0), 0) for part in parts]         # the k + 1 smallest so far, the row itself included

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


def precision_recall(fake, real, k=3, block=2048, device="cpu"):
    """Improved precision and recall (Kynkaanniemi et al., 2019) of features (N, D) and (M, D), in [0, 1].

    Precision: the share of generated images that lie within the k-th neighbour's distance of some real image;
    recall: the reverse. Blocks of rows keep memory at block x max(N, M) numbers.
    """
    center = real.mean(0)       # distances are the same, and float32 keeps more of their digits
    fake, real = (torch.from_numpy(np.ascontiguousarray(f - center)).to(device) for f in (fake, real))
    fake_radii, real_radii = radii(fake, k, block), radii(real, k, block)
    inside, covered = [], torch.zeros(len(real), dtype=torch.bool, device=device)
    for part, part_radii in zip(fake.split(block), fake_radii.split(block)):
        d = squared_distances(part, real)
        inside.append((d <= real_radii).any(1))
        covered |= (d <= part_radii[:, None]).any(0)
    return float(torch.cat(inside).double().mean()), float(covered.double().mean())


def inception_score(logits, count=IS_SPLITS, seed=METRIC_SEED):
    """IS (Salimans et al., 2016) of logits (N, K): mean and standard deviation of exp E KL(p(y|x) || p(y)) over ten splits.

    The images are shuffled first, as torch-fidelity does: samples come sorted by class.
    """
    logits, N, scores = logits[np.random.RandomState(seed).permutation(len(logits))], len(logits), []
    for i in range(count):
        log_p = torch.from_numpy(logits[i * N // count:(i + 1) * N // count]).double().log_softmax(1)
        p = log_p.exp()
        scores.append(float((p * (log_p - p.mean(0).log())).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def floor_of(features, rounds=10):
    """Mean distance between the halves of real features, over `rounds` random halvings: how near real is to real."""
    rng, total = np.random.RandomState(0), 0.0
    for _ in range(rounds):
        order = rng.permutation(len(features))
        total += distance_of(features[order[::2]], features[order[1::2]])
    return total / rounds
