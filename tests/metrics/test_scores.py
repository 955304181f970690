"""scores.py and inception.py: equal to torch-fidelity's, and to their definitions."""
import numpy as np
import pytest
import pytorch_fid.inception
import torch
import torch_fidelity
from conftest import refuses
from PIL import Image
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

import disk
import evaluate
from metrics import inception, scores
from metrics.features import Extractor


def gaussian_features(n, m, D=32, shift=0.2, scale=1.3):
    rng = np.random.RandomState(0)
    a = rng.randn(n, D).astype(np.float32)
    b = (rng.randn(m, D) * scale + shift).astype(np.float32)
    return a, b


# 20 samples of 64 dimensions: singular covariances
@pytest.mark.parametrize("n, D", [(1500, 32), (20, 64)])
def test_frechet_equals_torch_fidelitys(n, D):
    a, b = gaussian_features(n, n + 5, D)
    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert scores.distance_of(a, b) == pytest.approx(theirs, rel=1e-4)
    assert abs(scores.distance_of(a, a)) < 1e-3


def test_fid_and_kid_of_tensors_are_those_of_arrays():
    """On a GPU the features are tensors; both are computed in float64."""
    a, b = gaussian_features(700, 600)
    tensors = [torch.from_numpy(x) for x in (a, b)]
    assert scores.distance_of(*tensors) == pytest.approx(scores.distance_of(a, b), rel=1e-9)
    theirs = scores.kernel_distance(a, b, 5, 300)
    assert scores.kernel_distance(*tensors, 5, 300) == pytest.approx(theirs, rel=1e-5)
    assert scores.floor_of(tensors[0], 2) == pytest.approx(scores.floor_of(a, 2), rel=1e-9)
    assert scores.placed(a, "cpu") is a
    assert scores.placed(a, "meta").device.type == "meta"


def test_classes_of_a_reference_count_equally():
    """The weighted mean, covariance and recall; no weights where sizes differ by 1.5 at most."""
    fake, real = gaussian_features(60, 60, 4)
    labels = np.repeat([7, 3], [50, 10])
    w = np.repeat([0.01, 0.05], [50, 10])
    assert np.allclose(scores.weights_of(labels), w)
    assert scores.weights_of(np.repeat([0, 1], [15, 10])) is None
    mean, covariance = scores.statistics(real, w)
    assert np.allclose(mean, (real[:50].mean(0) + real[50:].mean(0)) / 2, atol=1e-6)
    assert np.allclose(covariance, np.cov(real.T, aweights=w))
    assert np.allclose(scores.statistics(torch.from_numpy(real), w)[1], covariance)
    for ours, usual in zip(scores.statistics(real, np.full(60, 1 / 60)), scores.statistics(real)):
        assert np.allclose(ours, usual)
    real[:50] += 100                                    # no sample is near the larger class
    plain, weighted = (scores.neighbour_metrics(fake, real, 3, 3, weights=x) for x in (None, w))
    for share in ("recall", "coverage"):
        covered = round(60 * plain[share])
        assert covered and weighted[share] == pytest.approx(0.05 * covered)
    # Halves of a class of 20 and one of 4, which are alike in each class, and so alike
    real = np.concatenate([np.zeros((20, 2)), np.ones((4, 2))]).astype(np.float32)
    assert scores.floor_of(real, 2, np.repeat([0, 1], [20, 4])) < 1e-6


def test_kernel_distance_equals_torch_fidelitys():
    a, b = gaussian_features(1500, 1300)
    theirs = metric_kid.kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b),
                                               kid_subsets=20, kid_subset_size=500, verbose=False)
    expected = [theirs[f"kernel_inception_distance_{what}"] for what in ("mean", "std")]
    mean, std, size = scores.kernel_distance(a, b, 20, 500)
    assert size == 500
    assert [mean, std] == pytest.approx(expected, rel=1e-3)
    assert scores.kernel_distance(a[:300], b, 3)[2] == 300


def literal_precision_recall(fake, real, k):
    """Kynkaanniemi et al., word by word, in float64."""
    def d(x, y):
        return np.sqrt(((x[:, None].astype(float) - y[None]) ** 2).sum(2))

    def radius(x):
        return np.sort(d(x, x), axis=1)[:, k]               # column 0 is the point itself
    cross = d(fake, real)
    precision = (cross <= radius(real)[None]).any(1).mean()
    recall = (cross <= radius(fake)[:, None]).any(0).mean()
    return precision, recall


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall(k):
    a, b = gaussian_features(400, 350, D=6, shift=0.5)

    def both(*sides):
        found = scores.neighbour_metrics(*sides, k, block=64)
        return found["precision"], found["recall"]
    got = both(a, b)
    assert got == pytest.approx(literal_precision_recall(a, b, k), abs=1e-12)
    theirs = metric_prc.prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b),
                                               prc_neighborhood=k, verbose=False)
    assert got == pytest.approx((theirs["precision"], theirs["recall"]), abs=2 / 350)
    assert 0.2 < got[0] < 1 and 0.2 < got[1] < 1
    assert both(a, a) == (1, 1)


@pytest.mark.parametrize("k", [3, 5])
def test_density_and_coverage_equal_prdcs(k):
    import prdc
    fake, real = gaussian_features(400, 350, D=6, shift=0.5)
    theirs = prdc.compute_prdc(real, fake, nearest_k=k)
    got = scores.neighbour_metrics(fake, real, density_k=k, block=64)
    for name in ("density", "coverage"):
        assert got[name] == pytest.approx(theirs[name], abs=1e-6)
    assert 0.2 < got["coverage"] < 1
    # Of nine real images, as Few may have, each has eight neighbours
    few = scores.neighbour_metrics(fake, real[:9], density_k=20)
    assert few == scores.neighbour_metrics(fake, real[:9], density_k=8)


def test_an_image_on_the_edge_of_a_ball():
    """It is precise, as in torch-fidelity, and adds nothing to density or coverage, as in prdc."""
    real, fake = (np.array(x, np.float32)[:, None] for x in ([0, 1, 3, 7], [-1, 11]))
    found = scores.neighbour_metrics(fake, real, k=1, density_k=1)
    assert (found["precision"], found["density"], found["coverage"]) == (1, 0, 0)


def test_the_floor_halves_each_class():
    """Halves of perfect samples have as many images of each class, and so are nearer."""
    a = np.concatenate([x + 4 * k for k, x in enumerate(gaussian_features(40, 40, D=3))])
    labels = np.repeat([0, 1], 40)
    shuffled = np.random.RandomState(1).permutation(80)
    rng = np.random.RandomState(0)
    values = []
    for _ in range(10):
        order = rng.permutation(80)
        halves = [order[labels[shuffled][order] == c] for c in (0, 1)]
        one, other = (a[shuffled][np.concatenate([h[k::2] for h in halves])] for k in (0, 1))
        values.append(scores.distance_of(one, other))
    got = scores.floor_of(a[shuffled], labels=labels[shuffled])
    assert got == pytest.approx(np.mean(values), rel=1e-9)
    assert got < scores.floor_of(a[shuffled])


def test_the_settings_are_torch_fidelitys():
    from torch_fidelity.defaults import DEFAULTS
    ours = (scores.KID_SUBSETS, scores.KID_SIZE, scores.IS_SPLITS, scores.METRIC_SEED)
    names = ("kid_subsets", "kid_subset_size", "isc_splits", "rng_seed")
    assert ours == tuple(DEFAULTS[name] for name in names)


def test_inception_score():
    logits = np.random.RandomState(0).randn(1000, 20).astype(np.float32) * 3
    theirs = metric_isc.isc_features_to_metric(torch.from_numpy(logits))
    expected = (theirs["inception_score_mean"], theirs["inception_score_std"])
    got = scores.inception_score(logits)
    assert got == pytest.approx(expected, rel=1e-4)
    by_class = logits[np.argsort(logits.argmax(1), kind="stable")]
    assert scores.inception_score(by_class)[0] == pytest.approx(got[0], rel=0.02)
    # Ten classes, certain and equally frequent
    certain = np.eye(10, dtype=np.float32)[np.arange(1000) % 10] * 100
    assert scores.inception_score(certain, count=1)[0] == pytest.approx(10)


# The extractor, with one random weight file in torch-fidelity's network and in ours
@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A weight file in the published layout; activations keep their size from layer to layer."""
    torch.manual_seed(0)
    net = inception.Inception()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            elif isinstance(m, torch.nn.BatchNorm2d):
                m.weight.uniform_(0.8, 1.2)
                m.bias.normal_(0, 0.2)
                m.running_mean.normal_(0, 0.2)
                m.running_var.uniform_(0.8, 1.2)
        net.fc.weight.normal_(0, 0.2)
    path = tmp_path_factory.mktemp("weights") / inception.FILE
    torch.save(net.state_dict(), path)
    return path


def random_images(n, h, w, seed=0):
    """Smooth random colour images (n, h, w, 3) uint8, each different."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic") * 0.8
    x = (smooth + 0.2 * torch.rand(n, 3, h, w, generator=g)).clamp(0, 1)
    return (x * 255).byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (299, 299), (600, 320)])
def test_resize_features_and_logits_equal_torch_fidelitys(weights, size):
    images = torch.from_numpy(random_images(2, *size)).permute(0, 3, 1, 2).contiguous()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images.float(), (299, 299),
                                                       align_corners=False)
    assert (inception.resize(images.float()) - theirs).abs().max() < 1e-4 * 255
    extractor = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"],
                                            feature_extractor_weights_path=weights)
    expected = extractor(images)
    net, digest = inception.load_inception(weights, trust=True)
    got = net(images)
    assert digest == disk.sha256(weights)
    assert got[0].shape == (2, 2048) and got[1].shape == (2, 1008)
    for a, b in zip(got, expected):
        assert (a - b).abs().max() < 1e-4 * b.abs().max() and b.std() > 0.01
    alone = net(images[:1])[0]              # the batch size does not matter
    assert (alone - got[0][:1]).abs().max() < 1e-5 * got[0].abs().max()


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (600, 320)])
def test_features_with_pytorch_fids_resize_equal_pytorch_fids(weights, size, monkeypatch, cpu):
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url",
                        lambda *_, **__: torch.load(weights, weights_only=True))
    images = random_images(2, *size)
    extractor = Extractor("inception:pytorch-fid", cpu, 64, weights, True)
    assert extractor.inception and extractor.name == "inception-2015-12-05:pytorch-fid"
    got, _ = extractor.batch(images)
    with torch.no_grad():
        theirs = pytorch_fid.inception.InceptionV3([3]).eval()(
            torch.from_numpy(images).permute(0, 3, 1, 2) / 255)[0].squeeze().numpy()
    assert np.abs(got - theirs).max() < 1e-4 * np.abs(theirs).max() and theirs.std() > 0.01
    usual = Extractor("inception", cpu, 64, weights, True)
    assert usual.name == "inception-2015-12-05"
    assert np.abs(usual.batch(images)[0] - theirs).max() > 1e-3 * np.abs(theirs).max()


def test_kept_features_go_with_their_resize(weights, tmp_path, measured):
    """--save-stats writes it down: what is compared with them later is resized as they were."""
    for seed, name in enumerate("ab"):
        np.savez(tmp_path / f"{name}.npz", random_images(8, 16, 16, seed))
    own = ("--samples", tmp_path / "a.npz", "--inception-weights", weights, "--trust-weights")
    first = measured(*own, "--reference", tmp_path / "b.npz", "--features",
                     "inception:pytorch-fid", "--save-stats", tmp_path / "stats.npz")
    again = measured(*own, "--reference", tmp_path / "stats.npz")
    assert again["fid"] == pytest.approx(first["fid"], rel=1e-4)
    assert again["settings"]["features"] == "inception-2015-12-05:pytorch-fid"


class Pictures(torch.utils.data.TensorDataset):
    """What torch-fidelity takes: uint8 tensors 3 x H x W."""

    def __getitem__(self, i):
        return self.tensors[0][i]


def torch_fidelity_numbers(a, b, weights):
    """{our name: torch-fidelity's number} for images (N, 3, H, W), with this weight file."""
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(a), input2=Pictures(b), isc=True, fid=True, kid=True, prc=True,
        kid_subset_size=30, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=weights, cuda=False, cache=False, verbose=False,
        save_cpu_ram=True)
    names = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean",
             "kid_std": "kernel_inception_distance_std", "is": "inception_score_mean",
             "is_std": "inception_score_std", "precision": "precision", "recall": "recall"}
    return {ours: theirs[name] for ours, name in names.items()}


@pytest.mark.slow
def test_whole_metrics_equal_torch_fidelitys(weights, tmp_path, measured):
    """From images on disk to numbers, ours and theirs: FID, KID, IS, precision, recall."""
    images = {"a": random_images(30, 24, 24, seed=1), "b": random_images(35, 24, 24, seed=2)}
    for name, value in images.items():
        np.savez(tmp_path / f"{name}.npz", value)
    own = ("--features", "inception", "--inception-weights", weights, "--trust-weights")
    stats = tmp_path / "b.stats.npz"
    ours = measured("--samples", tmp_path / "a.npz", "--reference", tmp_path / "b.npz", *own,
                    "--save-stats", stats)
    tensors = [torch.from_numpy(images[name]).permute(0, 3, 1, 2) for name in "ab"]
    for name, value in torch_fidelity_numbers(*tensors, weights).items():
        share = name in ("precision", "recall")
        close = {"abs": 2 / 30} if share else {"rel": 1e-3, "abs": 1e-9}
        assert ours[name] == pytest.approx(value, **close), name
    assert ours["settings"]["features_sha256"] == disk.sha256(weights)
    assert ours["num"] == 30 and ours["num_real"] == 35

    # the same again from saved features, from a folder, and with another batch size
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, image in enumerate(images["a"]):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    again = measured("--samples", folder, "--features-batch-size", 7, "--reference", stats, *own)
    for name in ("fid", "kid", "precision", "recall", "is"):
        assert again[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6)


def test_inception_weights(capsys, tmp_path, weights, monkeypatch):
    """Another hash, no such file, no network, a file cut short in torch.hub's cache."""
    np.savez(tmp_path / "x.npz", random_images(3, 8, 8))

    def check(*flags):
        refuses(capsys, evaluate.main, "--samples", tmp_path / "x.npz", "--reference",
                tmp_path / "x.npz", "--features", "inception", "--device", "cpu", *flags,
                says=["--inception-weights"])
    check("--inception-weights", weights)
    check("--inception-weights", tmp_path / "none.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_, **__):
        raise OSError("network is unreachable")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    check()
    (tmp_path / "hub/checkpoints" / inception.FILE).write_bytes(b"x")
    check()
