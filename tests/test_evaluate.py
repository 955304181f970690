"""evaluate.py, metrics.py and inception.py against torch-fidelity and closed forms; the pool; the whole path to JSON and report."""
import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import call
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

import evaluate
import inception
import metrics
import report
import runtime
import sample
from data import load, splits
from runtime import UserError
from test_mistakes import refuses

# ----------------------------------------------------------------------------------------------------------------------
# Metrics on features


def gaussian_features(n, m, D=32, shift=0.2, scale=1.3):
    rng = np.random.RandomState(0)
    return rng.randn(n, D).astype(np.float32), (rng.randn(m, D) * scale + shift).astype(np.float32)


def test_frechet_closed_form():
    d = metrics.frechet_distance(np.array([1.0, 2.0]), np.diag([4.0, 9.0]), np.array([0.0, 0.0]), np.diag([1.0, 16.0]))
    assert d == pytest.approx(5 + (2 - 1) ** 2 + (3 - 4) ** 2)


@pytest.mark.parametrize("n, D", [(1500, 32), (20, 64)])        # 20 samples of 64 dimensions: singular covariances
def test_frechet_equals_torch_fidelitys(n, D):
    a, b = gaussian_features(n, n + 5, D)
    theirs = metric_fid.fid_statistics_to_metric(*(metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), False)
    assert metrics.distance_of(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert abs(metrics.distance_of(a, a)) < 1e-3


def test_kernel_distance_equals_torch_fidelitys():
    a, b = gaussian_features(1500, 1300)
    theirs = metric_kid.kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subsets=20, kid_subset_size=500, verbose=False)
    mean, std, size = metrics.kernel_distance(a, b, 20, 500)
    assert size == 500
    assert (mean, std) == pytest.approx((theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]), rel=1e-3)
    assert metrics.kernel_distance(a[:300], b, 3)[2] == 300


def literal_precision_recall(fake, real, k):
    """Kynkaanniemi et al., word by word, in float64."""
    def d(x, y):
        return np.sqrt(((x[:, None].astype(float) - y[None]) ** 2).sum(2))
    radius = lambda x: np.sort(d(x, x), axis=1)[:, k]               # column 0 is the point itself
    cross = d(fake, real)
    return (cross <= radius(real)[None]).any(1).mean(), (cross <= radius(fake)[:, None]).any(0).mean()


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall(k):
    a, b = gaussian_features(400, 350, D=6, shift=0.5)
    got = metrics.precision_recall(a, b, k, block=64)
    assert got == pytest.approx(literal_precision_recall(a, b, k), abs=1e-12)
    theirs = metric_prc.prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), prc_neighborhood=k, verbose=False)
    assert got == pytest.approx((theirs["precision"], theirs["recall"]), abs=2 / 350)
    assert 0.2 < got[0] < 1 and 0.2 < got[1] < 1
    assert metrics.precision_recall(a, a, k) == (1, 1)


def test_a_collapsed_generator_is_precise_and_recalls_nothing():
    real = gaussian_features(500, 500, D=8)[1]
    collapsed = np.repeat(real[:1], 500, 0) + np.random.RandomState(1).randn(500, 8).astype(np.float32) * 1e-3
    precision, recall = metrics.precision_recall(collapsed, real)
    assert precision == 1 and recall < 0.02


def test_inception_score():
    logits = np.random.RandomState(0).randn(1000, 20).astype(np.float32) * 3
    theirs = metric_isc.isc_features_to_metric(torch.from_numpy(logits))
    got = metrics.inception_score(logits)
    assert got == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-4)
    by_class = logits[np.argsort(logits.argmax(1), kind="stable")]
    assert metrics.inception_score(by_class)[0] == pytest.approx(got[0], rel=0.02)
    sure = np.eye(10, dtype=np.float32)[np.arange(1000) % 10] * 100             # ten classes, certain and equally frequent
    assert metrics.inception_score(sure, count=1)[0] == pytest.approx(10)


# ----------------------------------------------------------------------------------------------------------------------
# The extractor, with one random weight file in torch-fidelity's and in ours

@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A weight file in the published one's layout; its activations keep their size from layer to layer."""
    torch.manual_seed(0)
    net = inception.Inception()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            elif isinstance(m, torch.nn.BatchNorm2d):
                m.weight.uniform_(0.8, 1.2), m.bias.normal_(0, 0.2), m.running_mean.normal_(0, 0.2), m.running_var.uniform_(0.8, 1.2)
        net.fc.weight.normal_(0, 0.2)
    path = tmp_path_factory.mktemp("weights") / inception.FILE
    torch.save(net.state_dict(), path)
    return path


def random_images(n, h, w, seed=0):
    """Smooth random colour images (n, h, w, 3) uint8, each its own."""
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.rand(n, 3, 5, 5, generator=g), (h, w), mode="bicubic") * 0.8
    return ((x + 0.2 * torch.rand(n, 3, h, w, generator=g)).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()


def test_the_weight_file_has_the_published_layout(weights):
    assert len(torch.load(weights, weights_only=True)) == 566
    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=weights)     # loads strictly
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in inception.Inception().state_dict().items()}


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 64), (299, 299), (40, 25), (600, 320)])
def test_resize_features_and_logits_equal_torch_fidelitys(weights, size):
    images = torch.from_numpy(random_images(2, *size)).permute(0, 3, 1, 2).contiguous()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images.float(), (299, 299), align_corners=False)
    assert (inception.resize(images.float()) - theirs).abs().max() < 1e-4 * 255
    expected = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)(images)
    net, digest = inception.load_inception(weights, trust=True)
    got = net(images)
    assert digest == runtime.sha256(weights) and got[0].shape == (2, 2048) and got[1].shape == (2, 1008)
    for a, b in zip(got, expected):
        assert (a - b).abs().max() < 1e-4 * b.abs().max() and b.std() > 0.01
    assert (net(images[:1])[0] - got[0][:1]).abs().max() < 1e-5 * got[0].abs().max()        # the batch size does not matter


def test_whole_metrics_equal_torch_fidelitys(weights, tmp_path, capsys):
    """From images on disk to numbers, ours and theirs: FID, KID, IS, precision, recall."""
    for name, seed, n in (("a", 1, 60), ("b", 2, 70)):
        np.savez(tmp_path / f"{name}.npz", random_images(n, 24, 24, seed))
    call(evaluate.main, "--samples", tmp_path / "a.npz", "--reference", tmp_path / "b.npz", "--features", "inception",
         "--inception-weights", weights, "--trust-weights", "--device", "cpu", "--save-stats", tmp_path / "b.stats.npz")
    ours = runtime.read_json(tmp_path / "eval.json")
    tensors = [torch.from_numpy(np.load(tmp_path / f"{n}.npz")["arr_0"]).permute(0, 3, 1, 2) for n in "ab"]
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(tensors[0]), input2=Pictures(tensors[1]), isc=True, fid=True, kid=True, prc=True, kid_subset_size=60,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=weights, cuda=False, cache=False,
        verbose=False, save_cpu_ram=True)
    for mine, key in (("fid", "frechet_inception_distance"), ("kid", "kernel_inception_distance_mean"),
                      ("kid_std", "kernel_inception_distance_std"), ("is", "inception_score_mean"), ("is_std", "inception_score_std")):
        assert ours[mine] == pytest.approx(theirs[key], rel=1e-3, abs=1e-9), mine
    for key in ("precision", "recall"):
        assert ours[key] == pytest.approx(theirs[key], abs=2 / 60)
    text = capsys.readouterr().out
    assert not (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    assert "FID (60)" in text and "warning: overall: fewer than 2,048" in text and "subsets are of 60" in text and "about" in text
    settings = ours["settings"]
    assert settings["features_sha256"] == runtime.sha256(weights) and settings["k"] == 3 and settings["kid_subsets"] == 100
    assert ours["num"] == 60 and ours["num_real"] == 70 and {"torch", "numpy", "scipy"} == set(ours["versions"])

    # the same again from saved statistics, from a folder, and with another batch size
    common = ("--features", "inception", "--inception-weights", weights, "--trust-weights", "--device", "cpu", "--out-json", tmp_path / "again.json")
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, image in enumerate(tensors[0].permute(0, 2, 3, 1).numpy()):
        sample.Image.fromarray(image).save(folder / f"{i:03d}.png")
    for more in (("--samples", tmp_path / "a.npz", "--reference", tmp_path / "b.stats.npz", "--features-batch-size", 7),
                 ("--samples", folder, "--reference", tmp_path / "b.stats.npz")):
        call(evaluate.main, *more, *common)
        again = runtime.read_json(tmp_path / "again.json")
        assert all(again[k] == pytest.approx(ours[k], rel=1e-4, abs=1e-6) for k in ("fid", "kid", "precision", "recall", "is"))


class Pictures(torch.utils.data.Dataset):
    """What torch-fidelity takes: uint8 tensors 3 x H x W."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors)

    def __getitem__(self, i):
        return self.tensors[i]


# ----------------------------------------------------------------------------------------------------------------------
# The protocol

def test_pool_is_the_papers():
    for C, many, few in ((100, 607, 589), (10, 6667, 5000)):
        groups = splits(np.arange(C, 0, -1))
        sizes = evaluate.pool_sizes(50_000, 20_000, groups, C)
        assert set(sizes[groups["Many"]]) == set(sizes[groups["Medium"]]) == {many} and set(sizes[groups["Few"]]) == {few}
    labels, numbers = evaluate.pool_of(np.array([2, 1, 3]))
    assert list(zip(labels, numbers)) == [(0, 0), (1, 1), (2, 2), (0, 3), (2, 5), (2, 8)]


def test_groups_are_measured_on_their_own_images():
    """Overall: num images, the first of each class; a split and a class: all that there are, against their own real images."""
    rng, labels = np.random.RandomState(0), np.repeat(np.arange(6), [30, 30, 20, 20, 20, 20])
    features, real = rng.randn(140, 4).astype(np.float32), rng.randn(120, 4).astype(np.float32)
    order, real_labels = rng.permutation(140), np.arange(120) % 6
    features, labels = features[order], labels[order]
    fake, logits = (features, features, labels), rng.randn(120, 4).astype(np.float32)
    result = evaluate.measure_all(fake, (real, logits, real_labels), {"Many": [0, 1], "Few": [4, 5]}, {"c3": 3}, 120, True, 3, "cpu", 0)
    first = np.concatenate([np.flatnonzero(labels == c)[:20] for c in range(6)])
    assert result["num"] == 120 and result["fid"] == pytest.approx(metrics.distance_of(features[first], real))
    uneven = evaluate.measure_all(fake, (real, logits, real_labels), {}, {}, 117, True, 3, "cpu", 0)      # not divisible by the classes
    chosen = np.concatenate([np.flatnonzero(labels == c)[:19] for c in range(6)])
    chosen = np.concatenate([chosen, sorted(np.flatnonzero(labels == c)[19] for c in range(6))[:3]])
    assert uneven["num"] == 117 and uneven["fid"] == pytest.approx(metrics.distance_of(features[chosen], real))
    many = result["splits"]["Many"]
    assert many["num"] == 60 and many["num_real"] == 40 and "is" not in many and "is" in result
    assert many["fid"] == pytest.approx(metrics.distance_of(features[labels < 2], real[real_labels < 2]))
    assert result["classes"]["c3"]["recall"] == metrics.precision_recall(features[labels == 3], real[real_labels == 3])[1]


def test_checkpoint_samples_and_report_agree(cm_run, classifier, data_dir, tmp_path, capsys):
    draw = ("--ckpt", cm_run / "ckpt.pt", "--num", 60, "--steps", 3, "--device", "cpu", "--dtype", "float32")
    common = ("--features", classifier, "--data-dir", data_dir, "--device", "cpu", "--dtype", "float32", "--floor", 2)
    call(evaluate.main, *draw, "--features", classifier, "--per-class", "--out-json", tmp_path / "direct.json")
    text = capsys.readouterr().out
    assert "60 images of" in text and "FD (60)" in text and "FID" not in text and "full training set" in text
    rows = []
    for branch in ("full", "general"):
        call(sample.main, *draw, "--branch", branch, "--out", tmp_path / branch)
        call(evaluate.main, "--samples", tmp_path / branch / "samples.npz", *common)
        rows += ["--row", f"{branch}={tmp_path / branch / 'eval.json'}"]
    direct, saved = runtime.read_json(tmp_path / "direct.json"), runtime.read_json(tmp_path / "full/eval.json")
    assert saved["fd"] == pytest.approx(direct["fd"], rel=1e-3) and saved["splits"].keys() == {"Many", "Medium", "Few"}
    assert len(direct["classes"]) == 10 and direct["classes"]["7"]["num"] == 6
    assert {"ckpt_sha256", "features_sha256", "guidance", "steps", "reference", "branch", "weights", "grid"} <= set(saved["settings"])
    assert saved["floor"] < saved["fd"]                 # thirty steps do not draw digits
    call(report.main, *rows, "--out", tmp_path / "page/report.md", "--pair", tmp_path / "general/samples.npz",
         tmp_path / "full/samples.npz")
    page = (tmp_path / "page/report.md").read_text()
    assert f"| full | 1.5 | {saved['fd']:.2f} |" in page and (tmp_path / "page/theta_g_theta.png").exists()
    call(sample.main, *draw, "--png", "--out", tmp_path / "png")
    call(evaluate.main, "--samples", tmp_path / "png/png", "--reference", "digits", *common, "--out-json", tmp_path / "png.json")
    assert runtime.read_json(tmp_path / "png.json")["splits"]["Few"]["fd"] == pytest.approx(saved["splits"]["Few"]["fd"], rel=1e-3)


def test_real_images_score_well(classifier, data_dir, tmp_path, cm_run):
    """The held-out digits as samples, by the data set's name: nearly all of their own class, and near the training set."""
    call(evaluate.main, "--samples", "digits:test", "--reference", "digits", "--reference-split", "test", "--features", classifier,
         "--data-dir", data_dir, "--device", "cpu", "--out-json", tmp_path / "test.json")
    result = runtime.read_json(tmp_path / "test.json")
    assert abs(result["fd"]) < 1e-3 and (result["num"], result["recall"], result["precision"]) == (300, 1, 1) and result["accuracy"] > 0.9
    call(evaluate.main, "--samples", "digits:test", "--reference", "digits", "--features", classifier, "--data-dir", data_dir,
         "--device", "cpu", "--out-json", tmp_path / "train.json")
    against_train = runtime.read_json(tmp_path / "train.json")
    assert (against_train["num"], against_train["num_real"]) == (300, 1497) and against_train["fd"] > 0.1


def test_accuracy_knows_the_classifiers_own_order_of_classes(classifier, data_dir, tmp_path):
    """Samples whose class 0 is "9" and so on, judged by a classifier whose class 0 is "0"."""
    test = load("digits", data_dir, "test", class_order="9,8,7,6,5,4,3,2,1,0")
    np.savez(tmp_path / "samples.npz", np.repeat(test.images, 3, 3), test.labels)
    runtime.write_json(tmp_path / "samples.json", {"settings": {}, "data": {"dataset": "digits", "class_names": test.class_names}})
    call(evaluate.main, "--samples", tmp_path / "samples.npz", "--features", classifier, "--data-dir", data_dir, "--device", "cpu", "--per-class")
    result = runtime.read_json(tmp_path / "eval.json")
    assert result["accuracy"] > 0.9 and result["classes"]["9"]["accuracy"] > 0.7 and result["classes"]["9"]["num_real"] == 150


def test_a_group_of_one_image_is_left_out(classifier, data_dir, tmp_path):
    test = load("digits", data_dir, "test")
    rows = np.flatnonzero((test.labels != 3) | (np.arange(300) == np.flatnonzero(test.labels == 3)[0]))
    np.savez(tmp_path / "x.npz", np.repeat(test.images[rows], 3, 3), test.labels[rows])
    call(evaluate.main, "--samples", tmp_path / "x.npz", "--reference", "digits", "--features", classifier, "--data-dir", data_dir,
         "--device", "cpu", "--per-class", "--out-json", tmp_path / "x.json")
    result = runtime.read_json(tmp_path / "x.json")
    assert len(result["classes"]) == 9 and "3" not in result["classes"] and result["num"] == 271


def test_folder_data_set_gets_a_balanced_reference(tmp_path, classifier, cm_run):
    """The checkpoint of a run on a folder: evaluate finds the folder, its resolution and a balanced reference by itself."""
    import train
    rng, root = np.random.RandomState(0), tmp_path / "set"
    for c, n in enumerate((30, 16, 12)):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(n):
            sample.Image.fromarray(np.repeat(rng.randint(0, 256, (9, 9, 1), np.uint8), 3, 2)).save(root / f"c{c}/{i}.png")
    call(train.main, "--dataset", "folder", "--data-dir", root, "--pack-dir", tmp_path / "packed", "--resolution", 8, "--ch", 16, "--ch-mult",
         1, 2, "--num-res-blocks", 1, "--batch-size", 8, "--steps", 2, "--device", "cpu", "--sample-every", 0, "--out", tmp_path / "run")
    weights_of = torch.load(classifier, weights_only=True)
    net = evaluate.load_classifier(classifier, "cpu")[0]
    net.conv1 = torch.nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)         # a classifier of colour images
    torch.save({**weights_of, "network": {**weights_of["network"], "channels": 3}, "model": net.state_dict()}, tmp_path / "colour.pt")
    call(evaluate.main, "--ckpt", tmp_path / "run/ckpt.pt", "--features", tmp_path / "colour.pt", "--num", 30, "--num-split", 0,
         "--steps", 2, "--device", "cpu")
    result = runtime.read_json(tmp_path / "run/eval.json")
    assert result["settings"]["reference"] == "folder, training set, 12 images of each class" and result["num_real"] == 36
    np.savez(tmp_path / "theirs.npz", np.random.RandomState(0).randint(0, 256, (30, 8, 8, 3), np.uint8))      # no .json: 8 pixels, as they are
    call(evaluate.main, "--samples", tmp_path / "theirs.npz", "--reference", "folder", "--data-dir", root, "--pack-dir", tmp_path / "packed",
         "--features", tmp_path / "colour.pt", "--device", "cpu")
    assert runtime.read_json(tmp_path / "eval.json")["num_real"] == 36


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes

def test_bad_images(capsys, tmp_path, classifier, data_dir):
    flags = ("--reference", "digits", "--data-dir", data_dir, "--features", classifier, "--device", "cpu")
    good = np.repeat(load("digits", data_dir, "test").images, 3, 3)

    def check(*says, **arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        refuses(capsys, evaluate.main, "--samples", tmp_path / "x.npz", *flags, says=["--samples", *says])
    check("arr_0 is float64", arr_0=good / 255)
    np.savez(tmp_path / "large.npz", good.repeat(2, 1).repeat(2, 2))
    refuses(capsys, evaluate.main, "--samples", tmp_path / "large.npz", *flags, says=["--features", "8 pixels", "16"])
    check("shape [300, 8, 8]", arr_0=good[..., 0])
    check("no arr_0", images=good)
    check("arr_1 must hold 300", arr_0=good, arr_1=np.arange(7))
    check("labels run from 0 to 299", "10 classes", arr_0=good, arr_1=np.arange(300))
    folder = tmp_path / "mixed"
    folder.mkdir()
    for n in (8, 9):
        sample.Image.new("RGB", (n, n)).save(folder / f"{n}.png")
    refuses(capsys, evaluate.main, "--samples", folder, *flags, says=["--samples", "9.png has 9 x 9", "one size"])
    refuses(capsys, evaluate.main, "--samples", tmp_path / "nothing", *flags, says=["--samples", "neither a file or folder nor a data set"])
    np.savez(tmp_path / "x.npz", good)
    refuses(capsys, evaluate.main, "--samples", tmp_path / "x.npz", "--device", "cpu", says=["--reference", "name what"])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:5000])
    refuses(capsys, evaluate.main, "--samples", tmp_path / "cut.npz", *flags, says=["--samples", "cannot be read"])


def test_the_long_tailed_set_is_no_reference(capsys, tmp_path, classifier, data_dir, digits, cm_run):
    np.savez(tmp_path / "train.npz", np.repeat(digits.images, 3, 3), digits.labels)
    refuses(capsys, evaluate.main, "--ckpt", cm_run / "ckpt.pt", "--reference", tmp_path / "train.npz", "--features", classifier,
            "--device", "cpu", says=["--reference", "long-tailed set that the model was trained on"])


def test_inception_weights(capsys, tmp_path, weights, cm_run, monkeypatch):
    flags = ("--ckpt", cm_run / "ckpt.pt", "--features", "inception", "--device", "cpu")
    refuses(capsys, evaluate.main, *flags, "--inception-weights", weights, says=["--inception-weights", "SHA-256", "--trust-weights"])
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:10_000])
    torch.save({k: v for k, v in inception.Inception().state_dict().items() if "fc" not in k}, tmp_path / "other.pth")
    for name in ("cut", "other"):
        refuses(capsys, evaluate.main, *flags, "--inception-weights", tmp_path / f"{name}.pth", "--trust-weights",
                says=["--inception-weights", "not the weights of the 2015 Inception graph"])
    refuses(capsys, evaluate.main, *flags, "--inception-weights", tmp_path / "none.pth", says=["--inception-weights", "no such file", "https://"])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_, **__):
        raise OSError("network is unreachable")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    refuses(capsys, evaluate.main, *flags, says=["--inception-weights", inception.FILE, str(tmp_path / "hub/checkpoints")])
    with pytest.raises(UserError, match="SHA-256"):
        (tmp_path / "hub/checkpoints" / inception.FILE).write_bytes(b"x")
        inception.load_inception()
