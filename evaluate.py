"""Measure samples against real images: Frechet distance and accuracy, overall and per Many / Medium / Few split.

    python evaluate.py --ckpt out/NAME/ckpt.pt                  # draws what it needs, then measures
    python evaluate.py --samples out/NAME/samples/samples.npz   # measures a file that sample.py wrote

Reference: the balanced training set (Sec. 4.1), never its long-tailed draw. Features: the classifier that
`python classify.py --dataset digits` trained, or --features FILE; the distance is then named FD, never FID.
Stages, each usable alone: images -> features -> (mean, covariance) -> number.
"""
import time
from pathlib import Path

import numpy as np
import torch

import runtime
from classify import features_and_logits, load_classifier
from data import load, splits, to_float
from runtime import Parser, UserError, integer, run
from sample import add_sampling_flags, describe, generate, load_network, sampling_settings

PROTOCOL = {"paper": {"num": 50_000, "num_split": 20_000}, "digits": {"num": 2000, "num_split": 0}}


# ----------------------------------------------------------------------------------------------------------------------
# Features -> statistics -> distance

def statistics(features):
    """Mean (D,) and covariance (D, D), with N - 1, of features (N, D): float64."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


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


def floor_of(features, rounds=10):
    """Mean distance between the halves of real features, over `rounds` random halvings: how near real is to real."""
    rng, total = np.random.RandomState(0), 0.0
    for _ in range(rounds):
        order = rng.permutation(len(features))
        total += distance_of(features[order[::2]], features[order[1::2]])
    return total / rounds


@torch.no_grad()
def extract(net, images, rt, batch_size=500, title="features"):
    """Features (N, D) float32 and predicted classes (N,) of uint8 images (N, H, W, C), by a classifier in eval mode."""
    features, predicted = [], []
    batches = np.array_split(np.arange(len(images)), max(1, -(-len(images) // batch_size)))
    for rows in runtime.progress(batches, desc=title, unit="batch", disable=rt.rank > 0):
        x = to_float(torch.from_numpy(np.ascontiguousarray(images[rows])).to(rt.device))
        f, logits = features_and_logits(net, x)
        features.append(f.float().cpu().numpy())
        predicted.append(logits.argmax(1).cpu().numpy())
    return np.concatenate(features), np.concatenate(predicted)


# ----------------------------------------------------------------------------------------------------------------------
# Which images are measured

def pool_sizes(num, num_split, groups, C):
    """Images a class, (C,), so that all classes together give `num` and every split at least `num_split`, balanced.

    The overall number is measured on the first num / C of each class. Paper, CIFAR-100: 607 a class in Many and
    Medium (33 classes), 589 in Few (34).
    """
    sizes = np.full(C, -(-num // C))
    for classes in groups.values():
        sizes[classes] = np.maximum(sizes[classes], -(-num_split // len(classes)))
    return sizes


def pool_of(sizes):
    """(labels, image numbers) of a pool: the j-th image of class c is number j C + c, whatever the other sizes."""
    C = len(sizes)
    members = [(c, j * C + c) for j in range(max(sizes)) for c in range(C) if j < sizes[c]]
    return [c for c, _ in members], [i for _, i in members]


def read_samples(path):
    """Images (N, H, W, 3) uint8, labels (N,) and the JSON beside an .npz of sample.py. Raises UserError."""
    record = runtime.read_json(Path(path).with_suffix(".json"))
    try:
        with np.load(path) as f:
            images, labels = f["arr_0"], f["arr_1"]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"--samples {path}: not an .npz with arr_0 (images) and arr_1 (labels): {e}")
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
        raise UserError(f"--samples {path}: arr_0 must be N x H x W x 3 uint8 with N labels in arr_1")
    if record is None:
        raise UserError(f"--samples {path}: samples.json, which sample.py writes beside it, is missing")
    return images, labels, record


def as_channels(images, channels):
    """Images (N, H, W, 3) with the number of channels that a network takes: 1 keeps the first, where all are equal."""
    if channels == 1 and images.shape[3] == 3:
        if (images != images[..., :1]).any():
            raise UserError("--features: it takes grey images, and the samples are in colour")
        return images[..., :1]
    return images


def measure(fake, predicted, labels, real, real_labels, num, groups):
    """The numbers: {"fd", "accuracy", "num", "splits": {name: the same}, "floor": {"fd", "splits"}}.

    fake (N, D), predicted and labels (N,): the samples; real (M, D), real_labels (M,): the reference. Overall it
    takes the first num / C samples of each class, per split all that the split has.
    """
    labels, C = np.asarray(labels), len(np.unique(labels))
    rank_in_class = np.zeros(len(labels), int)
    for c in np.unique(labels):
        rank_in_class[labels == c] = np.arange((labels == c).sum())

    def numbers(mine, reals):
        return {"fd": distance_of(fake[mine], real[reals]), "accuracy": float((predicted == labels)[mine].mean()),
                "num": int(mine.sum()), "num_real": int(reals.sum())}
    result = numbers(rank_in_class < -(-num // C), np.isin(real_labels, labels))
    result["splits"] = {name: numbers(np.isin(labels, c), np.isin(real_labels, c)) for name, c in groups.items()
                        if np.isin(c, labels).all()}
    result["floor"] = {"fd": floor_of(real), "splits": {k: floor_of(real[np.isin(real_labels, c)]) for k, c in groups.items()}}
    return result


def draw_pool(args, ckpt, settings, groups, num, num_split, rt):
    """Draw the images that the protocol needs: uint8 images (on rank 0) and their labels."""
    sizes = pool_sizes(num, num_split, groups, len(ckpt["data"]["class_names"]))
    labels, indices = pool_of(sizes)
    net = load_network(ckpt, args.weights, args.branch, rt.device)
    shape = (ckpt["network"]["channels"],) + (ckpt["data"]["resolution"],) * 2
    return generate(net, labels, indices, shape, rt, args.batch_size, **settings), labels


def main():
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", help="a checkpoint: draw the images that the protocol needs")
    source.add_argument("--samples", help="a samples.npz of sample.py")
    g = parser.add_argument_group("protocol")
    g.add_argument("--reference", help="a data set's name (default: the one that was trained on)")
    g.add_argument("--data-dir", default="data", help="where data sets are (default: data)")
    g.add_argument("--features", help="a checkpoint of classify.py (default: out/classifier-DATASET/ckpt.pt)")
    g.add_argument("--num", type=integer(1), help="class-balanced images overall (default: 50,000; digits: 2,000)")
    g.add_argument("--num-split", type=integer(0), help="images a split, at least (default: 20,000; digits: what --num gives)")
    add_sampling_flags(parser)
    parser.add_argument("--out-json", help="the numbers and every setting that moves them (default: eval.json in --out)")
    parser.add_argument("--if-needed", action="store_true", help="do nothing where --out-json was made with these settings")
    parser.add_common("folder of eval.json (default: beside --ckpt or --samples)")
    args = parser.parse_args()
    rt = runtime.setup(args.device, args.dtype)

    # What is measured, against what, by what
    if args.ckpt:
        ckpt = runtime.load(args.ckpt, "diffusion")
        data, settings = ckpt["data"], sampling_settings(args)
        made = describe(args, ckpt, settings)
    else:
        images, labels, record = read_samples(args.samples)
        data = record["data"]
        made = {**record["settings"], "samples": args.samples, "samples_sha256": runtime.sha256(args.samples)}
    dataset = args.reference or data["dataset"]
    protocol = PROTOCOL.get(dataset, PROTOCOL["paper"])
    num = args.num or (protocol["num"] if args.ckpt else len(labels))
    num_split = protocol["num_split"] if args.num_split is None else args.num_split
    features = args.features or f"out/classifier-{dataset}/ckpt.pt"
    if not Path(features).exists():
        raise UserError(f"--features {features}: there is no such file; make it with: python classify.py --dataset {dataset}")
    settings_all = {**made, "reference": dataset, "reference_split": "train", "num": num, "num_split": num_split,
                    "features": str(features), "features_sha256": runtime.sha256(features), "dtype": str(rt.dtype)}
    out_json = Path(args.out_json or Path(args.out or Path(args.ckpt or args.samples).parent) / "eval.json")
    if args.if_needed and runtime.up_to_date(out_json, settings_all):
        return rt.print(f"{out_json}: up to date")

    # Measure
    start, groups = time.time(), splits(data["class_counts"])
    if args.ckpt:
        images, labels = draw_pool(args, ckpt, settings, groups, num, num_split, rt)
    if rt.rank > 0:
        return
    net, classifier = load_classifier(features, rt.device)
    with rt.rank_0_first():
        reference = load(dataset, args.data_dir)
    if sorted(reference.class_names) != sorted(data["class_names"]):
        raise UserError(f"--reference {dataset}: its classes are not those of the samples")
    position = np.array([data["class_names"].index(name) for name in reference.class_names])
    channels = classifier["network"]["channels"]
    real, _ = extract(net, as_channels(reference.images, channels), rt, title="features of the reference")
    fake, predicted = extract(net, as_channels(images, channels), rt, title="features of the samples")
    result = measure(fake, predicted, labels, real, position[reference.labels], num, groups)
    runtime.write_json(out_json, {**result, "settings": settings_all, "seconds": round(time.time() - start, 1),
                                  "versions": {"torch": torch.__version__, "numpy": np.__version__}})
    for name, row in {"overall": result, **result["splits"]}.items():
        print(f"{name:<8} FD (classifier, {row['num']:,} images) {row['fd']:8.3f}   accuracy {row['accuracy']:.1%}")
    print(f"wrote {out_json}")


if __name__ == "__main__":
    run(main)
