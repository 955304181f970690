"""evaluate.py, scores.py and inception.py against torch-fidelity and closed forms.

Also the pool of images that a checkpoint is measured on, and the whole path to JSON and report.
"""
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import call, refuses
from PIL import Image
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

import disk
import evaluate
import runtime
import sample
from data import class_groups, load
from metrics import image_sets, inception, scores
from metrics.features import Features
from pages import report
from recognition import resnet
from runtime import UserError

# --------------------------------------------------------------------------------------------------
# Metrics on features


def gaussian_features(n, m, D=32, shift=0.2, scale=1.3):
    rng = np.random.RandomState(0)
    a = rng.randn(n, D).astype(np.float32)
    b = (rng.randn(m, D) * scale + shift).astype(np.float32)
    return a, b


def test_frechet_closed_form():
    mu_1, sigma_1 = np.array([1.0, 2.0]), np.diag([4.0, 9.0])
    mu_2, sigma_2 = np.array([0.0, 0.0]), np.diag([1.0, 16.0])
    d = scores.frechet_distance(mu_1, sigma_1, mu_2, sigma_2)
    assert d == pytest.approx(5 + (2 - 1) ** 2 + (3 - 4) ** 2)


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
    got = scores.precision_recall(a, b, k, block=64)
    assert got == pytest.approx(literal_precision_recall(a, b, k), abs=1e-12)
    theirs = metric_prc.prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b),
                                               prc_neighborhood=k, verbose=False)
    assert got == pytest.approx((theirs["precision"], theirs["recall"]), abs=2 / 350)
    assert 0.2 < got[0] < 1 and 0.2 < got[1] < 1
    assert scores.precision_recall(a, a, k) == (1, 1)


def test_the_floor_is_of_disjoint_halves():
    """Literally: the mean over ten divisions of the distance between one half and the other."""
    a = gaussian_features(101, 4, D=5)[0]
    rng = np.random.RandomState(0)
    orders = [rng.permutation(101) for _ in range(10)]
    expected = np.mean([scores.distance_of(a[o[::2]], a[o[1::2]]) for o in orders])
    assert scores.floor_of(a) == pytest.approx(expected, rel=1e-9) and expected > 0


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


def test_equal_distances_are_inside():
    same = np.zeros((6, 2), np.float32)
    assert scores.precision_recall(same, same) == (1, 1)


def test_a_collapsed_generator_has_precision_and_no_recall():
    real = gaussian_features(500, 500, D=8)[1]
    noise = np.random.RandomState(1).randn(500, 8).astype(np.float32)
    collapsed = np.repeat(real[:1], 500, 0) + noise * 1e-3
    precision, recall = scores.precision_recall(collapsed, real)
    assert precision == 1 and recall < 0.02


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


# --------------------------------------------------------------------------------------------------
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


def shapes(net):
    """The names and shapes in a network's state dict."""
    return {name: value.shape for name, value in net.state_dict().items()}


def test_the_weight_file_has_the_published_layout(weights):
    assert len(torch.load(weights, weights_only=True)) == 566
    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=weights)
    assert shapes(theirs) == shapes(inception.Inception())      # they load the file strictly


SIZES = [(8, 8), (32, 32), (64, 64), (299, 299), (40, 25), (600, 320)]


@pytest.mark.parametrize("size", SIZES)
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


class Pictures(torch.utils.data.Dataset):
    """What torch-fidelity takes: uint8 tensors 3 x H x W."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors)

    def __getitem__(self, i):
        return self.tensors[i]


def torch_fidelity_numbers(a, b, weights):
    """{our name: torch-fidelity's number} for images (N, 3, H, W), with this weight file."""
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(a), input2=Pictures(b), isc=True, fid=True, kid=True, prc=True,
        kid_subset_size=60, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=weights, cuda=False, cache=False, verbose=False,
        save_cpu_ram=True)
    names = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean",
             "kid_std": "kernel_inception_distance_std", "is": "inception_score_mean",
             "is_std": "inception_score_std", "precision": "precision", "recall": "recall"}
    return {ours: theirs[name] for ours, name in names.items()}


def test_whole_metrics_equal_torch_fidelitys(weights, tmp_path, capsys):
    """From images on disk to numbers, ours and theirs: FID, KID, IS, precision, recall."""
    images = {"a": random_images(60, 24, 24, seed=1), "b": random_images(70, 24, 24, seed=2)}
    for name, value in images.items():
        np.savez(tmp_path / f"{name}.npz", value)
    inception_flags = ("--features", "inception", "--inception-weights", weights,
                       "--trust-weights", "--device", "cpu")
    stats = tmp_path / "b.stats.npz"
    call(evaluate.main, "--samples", tmp_path / "a.npz", "--reference", tmp_path / "b.npz",
         *inception_flags, "--save-stats", stats)
    ours = disk.read_json(tmp_path / "eval.json")
    tensors = [torch.from_numpy(images[name]).permute(0, 3, 1, 2) for name in "ab"]
    for name, value in torch_fidelity_numbers(*tensors, weights).items():
        share = name in ("precision", "recall")
        close = {"abs": 2 / 60} if share else {"rel": 1e-3, "abs": 1e-9}
        assert ours[name] == pytest.approx(value, **close), name
    text = capsys.readouterr().out
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert "FID (60)" in text and "about" in text
    assert "warning: overall: fewer than 2,048" in text
    assert "note: no KID of overall" in text and "KID (60)" not in text and "kid" in ours
    settings = ours["settings"]
    assert settings["features_sha256"] == disk.sha256(weights)
    assert settings["k"] == 3 and settings["kid_subsets"] == 100
    assert ours["num"] == 60 and ours["num_real"] == 70
    assert {"torch", "numpy", "scipy"} == set(ours["versions"])

    # the same again from saved features, from a folder, and with another batch size
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, image in enumerate(images["a"]):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    for samples, *more in ((tmp_path / "a.npz", "--features-batch-size", 7), (folder,)):
        call(evaluate.main, "--samples", samples, *more, "--reference", stats, *inception_flags,
             "--out-json", tmp_path / "again.json")
        again = disk.read_json(tmp_path / "again.json")
        for name in ("fid", "kid", "precision", "recall", "is"):
            assert again[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# The protocol

def test_pool_is_the_papers():
    for C, many, few in ((100, 607, 589), (10, 6667, 5000)):
        groups = class_groups(np.arange(C, 0, -1))
        sizes = image_sets.pool_sizes(50_000, 20_000, groups, C)
        assert set(sizes[groups["Many"]]) == set(sizes[groups["Medium"]]) == {many}
        assert set(sizes[groups["Few"]]) == {few}
    labels, numbers = image_sets.pool_of(np.array([2, 1, 3]))
    assert list(zip(labels, numbers)) == [(0, 0), (1, 1), (2, 2), (0, 3), (2, 5), (2, 8)]


def test_groups_are_measured_on_their_own_images(capsys):
    """Overall: num images, the first ones of each class. A group and a class: all images that there
    are, against their own real images.
    """
    rng = np.random.RandomState(0)
    labels = np.repeat(np.arange(6), [30, 30, 20, 20, 20, 20])
    features = rng.randn(140, 4).astype(np.float32)
    real = rng.randn(120, 4).astype(np.float32)
    order, real_labels = rng.permutation(140), np.arange(120) % 6
    features, labels = features[order], labels[order]
    sides = (Features(features, features, labels),
             Features(real, rng.randn(120, 4).astype(np.float32), real_labels))
    result = evaluate.measure_all(*sides, 120, {"Many": [0, 1], "Few": [4, 5]}, {"c3": 3},
                                  evaluate.Metrics(inception=True))
    first = np.concatenate([np.flatnonzero(labels == c)[:20] for c in range(6)])
    assert result["num"] == 120
    assert result["fid"] == pytest.approx(scores.distance_of(features[first], real))
    many = result["groups"]["Many"]
    assert many["num"] == 60 and many["num_real"] == 40 and "is" not in many and "is" in result
    expected = scores.distance_of(features[labels < 2], real[real_labels < 2])
    assert many["fid"] == pytest.approx(expected)
    recall = scores.precision_recall(features[labels == 3], real[real_labels == 3])[1]
    assert result["classes"]["c3"]["recall"] == recall

    # More neighbours than there are images: said, not only done
    assert "k" not in many
    result = evaluate.measure_all(*sides, 120, {"Few": [4, 5]}, {"c3": 3}, evaluate.Metrics(k=25))
    assert result["classes"]["c3"]["k"] == 19 and "k" not in result["groups"]["Few"]
    evaluate.print_result(result, 25)
    assert "warning: c3: precision and recall with fewer than 25" in capsys.readouterr().out

    # a number that the number of classes does not divide
    uneven = evaluate.measure_all(*sides, 117, {}, {}, evaluate.Metrics(inception=True))
    chosen = np.concatenate([np.flatnonzero(labels == c)[:19] for c in range(6)])
    twentieth = sorted(np.flatnonzero(labels == c)[19] for c in range(6))
    chosen = np.concatenate([chosen, twentieth[:3]])
    assert uneven["num"] == 117
    assert uneven["fid"] == pytest.approx(scores.distance_of(features[chosen], real))


def test_checkpoint_samples_and_report_agree(cm_run, classifier, data_dir, tmp_path, capsys):
    in_float32 = ("--device", "cpu", "--dtype", "float32")
    source = ("--ckpt", cm_run / "ckpt.pt", "--num", 60, "--steps", 3, *in_float32)
    common = ("--features", classifier, "--data-dir", data_dir, "--device", "cpu", "--floor", 2)
    call(evaluate.main, *source, "--features", classifier, "--per-class",
         "--out-json", tmp_path / "direct.json")
    text = capsys.readouterr().out
    assert "60 images of" in text and "FD (60)" in text and "FID" not in text
    assert "full training set" in text
    rows = []
    for branch in ("full", "general"):
        call(sample.main, *source, "--branch", branch, "--out", tmp_path / branch)
        call(evaluate.main, "--samples", tmp_path / branch / "samples.npz", *common)
        rows += ["--row", f"{branch}={tmp_path / branch / 'eval.json'}"]
    direct = disk.read_json(tmp_path / "direct.json")
    saved = disk.read_json(tmp_path / "full/eval.json")
    assert saved["fd"] == pytest.approx(direct["fd"], rel=1e-3)
    assert saved["groups"].keys() == {"Many", "Medium", "Few"}
    assert len(direct["classes"]) == 10 and direct["classes"]["7"]["num"] == 6
    assert {"ckpt_sha256", "features_sha256", "guidance", "steps", "reference", "branch", "weights",
            "grid"} <= set(saved["settings"])
    assert saved["floor"] < saved["fd"]                 # thirty steps do not learn digits
    call(report.main, *rows, "--out", tmp_path / "page/report.md",
         "--pair", tmp_path / "general/samples.npz", tmp_path / "full/samples.npz")
    page = (tmp_path / "page/report.md").read_text()
    assert f"| full | 1.5 | {saved['fd']:.2f} |" in page
    assert (tmp_path / "page/report-theta_g_theta.png").exists()

    # from the folders of --png, whose class names carry numbers
    call(sample.main, *source, "--png", "--out", tmp_path / "png")
    call(evaluate.main, "--samples", tmp_path / "png/png", "--reference", "digits", *common,
         "--out-json", tmp_path / "png.json")
    few = disk.read_json(tmp_path / "png.json")["groups"]["Few"]["fd"]
    assert few == pytest.approx(saved["groups"]["Few"]["fd"], rel=1e-3)


def test_an_older_result_is_up_to_date(cm_run, classifier, data_dir, tmp_path, capsys):
    """Older files say "splits" and "num_split"; the older flag --num-split is accepted as well."""
    path = tmp_path / "eval.json"
    flags = ("--ckpt", cm_run / "ckpt.pt", "--num", 20, "--steps", 2, "--features", classifier,
             "--data-dir", data_dir, "--device", "cpu", "--out-json", path, "--if-needed")
    call(evaluate.main, *flags, "--num-group", 9)
    result = disk.read_json(path)
    result["splits"] = result.pop("groups")
    result["settings"]["num_split"] = result["settings"].pop("num_group")
    disk.write_json(path, result)
    before = path.read_bytes()
    for flag in ("--num-group", "--num-split"):
        capsys.readouterr()
        call(evaluate.main, *flags, flag, 9)
        assert "up to date" in capsys.readouterr().out and path.read_bytes() == before
    call(evaluate.main, *flags, "--num-group", 8)
    assert "groups" in disk.read_json(path) and (tmp_path / "eval-1.json").exists()


def test_real_images_score_well(classifier, data_dir, tmp_path, cm_run):
    """The held-out digits as samples, by the data set's name: most are classified correctly, and
    they are near the training set.
    """
    common = ("--samples", "digits:test", "--reference", "digits", "--features", classifier,
              "--data-dir", data_dir, "--device", "cpu")
    call(evaluate.main, *common, "--reference-split", "test", "--out-json", tmp_path / "test.json")
    result = disk.read_json(tmp_path / "test.json")
    assert abs(result["fd"]) < 1e-3 and result["accuracy"] > 0.9
    assert (result["num"], result["recall"], result["precision"]) == (300, 1, 1)
    call(evaluate.main, *common, "--out-json", tmp_path / "train.json")
    against_train = disk.read_json(tmp_path / "train.json")
    assert (against_train["num"], against_train["num_real"]) == (300, 1497)
    assert against_train["fd"] > 0.1


def test_accuracy_knows_the_classifiers_own_order_of_classes(classifier, data_dir, tmp_path):
    """Samples whose class 0 is "9" and so on; for the classifier, class 0 is "0"."""
    test = load("digits", data_dir, "test", class_order="9,8,7,6,5,4,3,2,1,0")
    np.savez(tmp_path / "samples.npz", np.repeat(test.images, 3, 3), test.labels)
    data = {"dataset": "digits", "class_names": test.class_names}
    disk.write_json(tmp_path / "samples.json", {
        "settings": {}, "data": data, "npz_sha256": disk.sha256(tmp_path / "samples.npz")})
    call(evaluate.main, "--samples", tmp_path / "samples.npz", "--features", classifier,
         "--data-dir", data_dir, "--device", "cpu", "--per-class")
    result = disk.read_json(tmp_path / "eval.json")
    nine = result["classes"]["9"]
    assert result["accuracy"] > 0.9 and nine["accuracy"] > 0.7 and nine["num_real"] == 150


def test_a_group_of_one_image_is_left_out(classifier, data_dir, tmp_path):
    test = load("digits", data_dir, "test")
    first_three = np.flatnonzero(test.labels == 3)[0]
    rows = np.flatnonzero((test.labels != 3) | (np.arange(300) == first_three))
    np.savez(tmp_path / "x.npz", np.repeat(test.images[rows], 3, 3), test.labels[rows])
    call(evaluate.main, "--samples", tmp_path / "x.npz", "--reference", "digits",
         "--features", classifier, "--data-dir", data_dir, "--device", "cpu", "--per-class",
         "--out-json", tmp_path / "eval.json")
    result = disk.read_json(tmp_path / "eval.json")
    assert len(result["classes"]) == 9 and "3" not in result["classes"] and result["num"] == 271


def write_colour_classifier(classifier, path):
    """Write a copy of the digits' classifier that takes colour images."""
    ckpt = torch.load(classifier, weights_only=True)
    net = resnet.load_classifier(classifier, "cpu")[0]
    net.conv1 = torch.nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
    network = {**ckpt["network"], "channels": 3}
    torch.save({**ckpt, "network": network, "model": net.state_dict()}, path)


def test_folder_data_set_gets_a_balanced_reference(tmp_path, classifier, cm_run):
    """A checkpoint of a run on a folder: the folder, its resolution and a balanced reference are
    found without flags.
    """
    import train
    rng, root = np.random.RandomState(0), tmp_path / "set"
    for c, n in enumerate((30, 16, 12)):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(n):
            grey = rng.randint(0, 256, (9, 9, 1), np.uint8)
            Image.fromarray(np.repeat(grey, 3, 2)).save(root / f"c{c}/{i}.png")
    folders = ("--data-dir", root, "--pack-dir", tmp_path / "packed")
    call(train.main, "--dataset", "folder", *folders, "--resolution", 8, "--ch", 16,
         "--ch-mult", 1, 2, "--num-res-blocks", 1, "--batch-size", 8, "--steps", 2,
         "--device", "cpu", "--sample-every", 0, "--out", tmp_path / "run")
    features = ("--features", tmp_path / "colour.pt", "--device", "cpu")
    write_colour_classifier(classifier, tmp_path / "colour.pt")
    call(evaluate.main, "--ckpt", tmp_path / "run/ckpt.pt", *features, "--num", 30,
         "--num-group", 0, "--steps", 2)
    result = disk.read_json(tmp_path / "run/eval.json")
    reference = result["settings"]["reference"]
    assert reference == "folder, training set, 12 images of each class"
    assert result["num_real"] == 36

    # samples without a .json: the reference is read at their size, 8 pixels
    theirs = np.random.RandomState(0).randint(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "theirs.npz", theirs)
    call(evaluate.main, "--samples", tmp_path / "theirs.npz", "--reference", "folder", *folders,
         *features)
    assert disk.read_json(tmp_path / "eval.json")["num_real"] == 36


# --------------------------------------------------------------------------------------------------
# Nothing is silently wrong

@pytest.fixture
def samples(data_dir, tmp_path):
    """A file of the held-out digits, with their labels, without the JSON of sample.py."""
    test = load("digits", data_dir, "test")
    path = tmp_path / "x.npz"
    np.savez(path, np.repeat(test.images, 3, 3), test.labels)
    return path


def rewrite(path, labels=None, images=None):
    """Replace arrays of an .npz of images."""
    with np.load(path) as f:
        old = f["arr_0"], f["arr_1"]
    np.savez(path, old[0] if images is None else images, old[1] if labels is None else labels)


def test_if_needed_notices_what_changed(against_digits, samples, data_dir, tmp_path, capsys):
    def measured(*flags):
        capsys.readouterr()
        call(evaluate.main, *flags, "--if-needed", "--out-json", tmp_path / "e.json")
        return "up to date" not in capsys.readouterr().out
    flags = ("--samples", samples, *against_digits)
    assert measured(*flags) and not measured(*flags)
    with np.load(samples) as f:
        images, labels = f["arr_0"], f["arr_1"]
    rewrite(samples, images=255 - images)
    assert measured(*flags) and not measured(*flags)

    reference = tmp_path / "reference.npz"
    np.savez(reference, images, labels)
    flags = ("--samples", samples, "--reference", reference, *against_digits[2:])
    assert measured(*flags) and not measured(*flags)
    np.savez(reference, images[::-1], labels[::-1])
    assert measured(*flags) and not measured(*flags)

    folder = tmp_path / "flat"
    folder.mkdir()
    for i, image in enumerate(images[:9]):
        Image.fromarray(image).save(folder / f"{i}.png")
    flags = ("--samples", folder, *against_digits)
    assert measured(*flags) and not measured(*flags)
    first = (folder / "0.png").stat()
    Image.fromarray(255 - images[0]).save(folder / "0.png", compress_level=0)
    assert measured(*flags) and not measured(*flags)

    # other images of the same size and time of change
    for level in (0, 255):
        Image.fromarray(images[0] * 0 + level).save(folder / "0.png", compress_level=0)
        os.utime(folder / "0.png", ns=(first.st_atime_ns, first.st_mtime_ns))
        assert measured(*flags) and not measured(*flags)

    # --save-stats: a file of another reference is not what this call would write
    flags = ("--samples", samples, *against_digits, "--save-stats", tmp_path / "s.npz")
    assert measured(*flags) and not measured(*flags)
    call(evaluate.main, "--samples", samples, "--reference", reference, *against_digits[2:],
         "--save-stats", tmp_path / "s.npz", "--out-json", tmp_path / "other.json")
    assert measured(*flags)


def test_a_record_that_is_not_of_these_samples(samples, against_digits, capsys):
    record = {"settings": {}, "data": {"class_names": list("9876543210")}, "npz_sha256": "0"}
    disk.write_json(samples.with_suffix(".json"), record)
    refuses(capsys, evaluate.main, "--samples", samples, *against_digits,
            says=["--samples", "x.json", "does not belong"])


def test_labels_without_names_are_said_and_recorded(samples, against_digits, tmp_path, capsys):
    call(evaluate.main, "--samples", samples, *against_digits)
    assert "in the order of the reference's" in capsys.readouterr().out
    assert "order of the reference's" in disk.read_json(
        tmp_path / "eval.json")["settings"]["labels"]


def test_classes_that_the_samples_lack_are_said(samples, against_digits, data_dir, tmp_path,
                                                capsys):
    with np.load(samples) as f:
        rows = f["arr_1"] < 4
        images, labels = f["arr_0"][rows], f["arr_1"][rows]
    np.savez(samples, images, labels)
    call(evaluate.main, "--samples", samples, *against_digits)
    n = disk.read_json(tmp_path / "eval.json")["num_real"]
    assert n == int((load("digits", data_dir).labels < 4).sum())
    assert f"overall against its {n:,} images" in capsys.readouterr().out


def test_sizes_that_a_classifier_does_not_take(samples, against_digits, tmp_path, capsys):
    with np.load(samples) as f:
        images = f["arr_0"]
    wide = np.concatenate([images, images], 2)
    np.savez(tmp_path / "wide.npz", wide)
    refuses(capsys, evaluate.main, "--samples", tmp_path / "wide.npz", *against_digits,
            says=["--features", "8 pixels", "--samples have 16 x 8"])
    # older classifiers do not say their size
    ckpt = torch.load(against_digits[5], weights_only=True)
    ckpt["data"].pop("resolution")
    torch.save(ckpt, tmp_path / "old.pt")
    refuses(capsys, evaluate.main, "--samples", tmp_path / "wide.npz", *against_digits[:4],
            "--features", tmp_path / "old.pt", "--device", "cpu",
            says=["--features", "one size", "--samples 16 x 8", "--reference 8 x 8"])


@pytest.mark.parametrize("flag, value", [
    ("--sampler", "ddim"), ("--steps", 9), ("--grid", "quad"), ("--eta", 1), ("--guidance", 1),
    ("--branch", "general"), ("--weights", "raw"), ("--batch-size", 9), ("--num-group", 5),
    ("--dtype", "bfloat16")])
def test_sampling_flags_with_samples(samples, against_digits, capsys, flag, value):
    refuses(capsys, evaluate.main, "--samples", samples, *against_digits, flag, value,
            says=[flag, "leave it out"])


def test_too_few_images(samples, against_digits, tmp_path, capsys):
    with np.load(samples) as f:
        images, labels = f["arr_0"], f["arr_1"]
    for n in (0, 1):
        np.savez(tmp_path / "few.npz", images[:n], labels[:n])
        refuses(capsys, evaluate.main, "--samples", samples, "--reference", tmp_path / "few.npz",
                *against_digits[2:], says=["--reference", "fewer than two"])
        refuses(capsys, evaluate.main, "--samples", tmp_path / "few.npz", *against_digits,
                says=["--samples", "fewer than two"])
    np.savez(tmp_path / "zeros.npz", images, labels * 0)
    np.savez(tmp_path / "ones.npz", images, labels * 0 + 1)
    refuses(capsys, evaluate.main, "--samples", tmp_path / "zeros.npz", "--reference",
            tmp_path / "ones.npz", *against_digits[2:],
            says=["--reference", "of the samples' classes"])
    rewrite(samples, labels=labels - 1)
    refuses(capsys, evaluate.main, "--samples", samples, *against_digits,
            says=["--samples", "label -1"])


@pytest.fixture
def before_the_work(monkeypatch):
    """No features are extracted: what is refused is refused before the work."""
    def work(*_):
        raise AssertionError("the work has begun")
    monkeypatch.setattr(evaluate, "extract_both", work)
    monkeypatch.setattr(evaluate, "announce", work)


def test_outputs_are_checked_before_the_work(before_the_work, samples, against_digits, tmp_path,
                                             capsys):
    reference = tmp_path / "reference.npz"
    reference.write_bytes(samples.read_bytes())
    (tmp_path / "ckpt.pt").write_bytes(b"weights")
    disk.write_json(tmp_path / "samples.json", {"settings": {}, "data": {}})
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def check(flag, path, *says):
        refuses(capsys, evaluate.main, "--samples", samples, "--reference", reference,
                *against_digits[2:], flag, path, says=[flag, *says])
    for name in ("ckpt.pt", "reference.npz", "samples.json"):
        check("--out-json", tmp_path / name, "not a result")
    for name in ("ckpt.pt", "reference.npz", "x.npz"):
        check("--save-stats", tmp_path / name, "not a file of --save-stats")
    for flag in ("--out-json", "--save-stats"):
        check(flag, tmp_path / "ckpt.pt/x", "cannot write")
    # the record of the samples is looked for under this name
    check("--out-json", tmp_path / "x.json", "another name")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()
            and path.name != "eval.json"} == kept


@pytest.mark.parametrize("flags, says", [
    (["--reference", "x.npz", "--reference-split", "test"], ["--reference-split", "no data set"]),
    (["--reference", "digits:train", "--reference-split", "test"],
     ["--reference-split test", "digits:train", "another split"]),
    (["--inception-weights", "w.pth"], ["--inception-weights", "classifier", "leave it out"]),
    (["--trust-weights"], ["--trust-weights", "classifier", "leave it out"]),
    (["--num", 301], ["--num 301", "only 300 images"])], ids=str)
def test_flags_that_do_nothing(before_the_work, samples, against_digits, capsys, monkeypatch,
                               flags, says):
    monkeypatch.chdir(samples.parent)
    refuses(capsys, evaluate.main, "--samples", samples, *against_digits, *flags, says=says)


def test_features_are_in_float32(samples, against_digits, tmp_path, capsys, monkeypatch):
    """Also on a machine whose networks compute in bfloat16: the result is up to date on both."""
    call(evaluate.main, "--samples", samples, *against_digits)
    assert ", float32; about" in capsys.readouterr().out
    assert disk.read_json(tmp_path / "eval.json")["settings"]["dtype"] == "torch.float32"
    monkeypatch.setattr(runtime, "computes_bfloat16", lambda device: True)
    call(evaluate.main, "--samples", samples, *against_digits, "--if-needed")
    assert "up to date" in capsys.readouterr().out


def test_a_classifier_with_other_class_names_than_outputs(before_the_work, samples, against_digits,
                                                          tmp_path, capsys):
    ckpt = torch.load(against_digits[5], weights_only=True)
    ckpt["data"]["class_names"] = ckpt["data"]["class_names"][:8]
    torch.save(ckpt, tmp_path / "eight.pt")
    refuses(capsys, evaluate.main, "--samples", samples, *against_digits[:5],
            tmp_path / "eight.pt", "--device", "cpu", says=["--features", "8 class names", "10"])


@pytest.mark.parametrize("about", ["{}", "[1]", "x", '{"class_names": null}'])
def test_features_with_another_about(before_the_work, samples, against_digits, tmp_path, capsys,
                                     about):
    rows = np.zeros((9, 64), np.float32)
    stats = tmp_path / "s.npz"
    np.savez(stats, features=rows, logits=rows, about=np.array(about))
    refuses(capsys, evaluate.main, "--samples", stats, *against_digits,
            says=["--samples", "--save-stats"])
    refuses(capsys, evaluate.main, "--samples", samples, "--reference", stats, *against_digits[2:],
            says=["--reference", "--save-stats"])
    refuses(capsys, evaluate.main, "--samples", samples, *against_digits, "--save-stats", stats,
            says=["--save-stats", "not a file of --save-stats"])


def test_a_reference_without_a_class_of_the_samples(before_the_work, samples, against_digits,
                                                    cm_run, tmp_path, capsys):
    with np.load(samples) as f:
        rows = f["arr_1"] < 9
        np.savez(tmp_path / "ref9.npz", f["arr_0"][rows], f["arr_1"][rows])
    for source in (("--samples", samples), ("--ckpt", cm_run / "ckpt.pt")):
        refuses(capsys, evaluate.main, *source, "--reference", tmp_path / "ref9.npz",
                *against_digits[2:], says=["--reference", "no image", "classes (9)"])


def test_rows_and_real_images_of_the_overall_numbers():
    """Without labels the first ones; the real ones are those of the samples' classes."""
    assert evaluate.balanced_rows(None, 9, 4) == slice(0, 4)
    sides = [Features(np.zeros((n, 2)), np.zeros((n, 2)), labels)
             for n, labels in ((3, np.array([0, 2, 2])), (4, np.array([0, 1, 2, 1])))]
    parts, _ = evaluate.parts_of(*sides, 3, {}, {})
    assert parts[0].real.tolist() == [True, False, True, False]


def test_only_a_long_tailed_reference_is_refused():
    def check(labels, counts):
        image_sets.refuse_long_tailed(SimpleNamespace(labels=np.array(labels), name="x"), counts)
    with pytest.raises(UserError, match="long-tailed set"):
        check([0, 0, 1], [2, 1])
    check([0, 0, 0, 1, 1], [3, 2])                  # hardly a tail
    check([0, 0, 1], [3, 1])
    check([0, 0, 1], None)


def test_a_class_that_is_mostly_known_is_not_weak():
    logits = np.eye(2)[[0, 0, 1, 1, 0]]
    real = Features(np.zeros((5, 2)), logits, np.array([0, 0, 0, 1, 1]))
    assert evaluate.weak_classes(real, evaluate.Metrics(output_classes=np.arange(2)), "ab") == {}


@pytest.mark.parametrize("where, name", [
    ("args", "per_class"), ("args", "k"), ("args", "floor"), ("comparison", "num"),
    ("comparison", "num_group"), ("comparison", "assumed"), ("reference", "sha256"),
    ("reference", "words"), ("subject", "made"), ("extractor", "name"), ("extractor", "sha256"),
    ("rt", "dtype")])
def test_whatever_moves_a_number_is_among_the_settings(where, name):
    def settings(changed):
        parts = {
            "args": {"per_class": 0, "k": 0, "floor": 0}, "rt": {"dtype": 0},
            "comparison": {"num": 0, "num_group": 0, "assumed": {}},
            "reference": {"sha256": 0, "words": 0}, "subject": {"made": {}, "data": {}},
            "extractor": {"name": 0, "sha256": 0}}
        if changed:
            parts[where][name] = {"x": 1} if parts[where][name] == {} else 1
        made = {key: SimpleNamespace(**values) for key, values in parts.items()}
        made["comparison"].reference = made.pop("reference")
        made["comparison"].subject = made.pop("subject")
        made["rt"].precision = lambda: str(made["rt"].dtype)
        return evaluate.settings_of(**made)
    assert settings(True) != settings(False)


def test_parts_that_are_left_out_are_said(capsys):
    """A group lacks a class on either side, or images; and few images give no IS and no floor."""
    rng = np.random.RandomState(0)

    def side(*labels):
        features = rng.randn(len(labels), 4).astype(np.float32)
        return Features(features, features, np.array(labels))
    fake, real = side(0, 0, 1, 1, 2, 3, 3), side(0, 0, 1, 1, 1, 2, 2, 4)
    groups = {"Many": [0, 1], "Medium": [1, 3], "Few": [2, 4]}
    settings = evaluate.Metrics(inception=True, floor=2)
    result = evaluate.measure_all(fake, real, 7, groups, {"a": 0, "b": 1, "c": 2}, settings)
    assert list(result["groups"]) == ["Many"] and list(result["classes"]) == ["a", "b"]
    evaluate.print_result(result, 3, floor=2)
    text = capsys.readouterr().out
    assert ("left out: Medium (no image of a class in the reference); "
            "Few (no image of a class in the samples); "
            "c (fewer than two images in the samples)") in text
    assert "is" not in result and "note: no IS" in text
    assert result["floor"] > 0 and result["groups"]["Many"]["floor"] > 0
    assert "floor" not in result["classes"]["b"] and "note: --floor: none for a, b;" in text
    assert "NaN" not in json.dumps(result)


def test_the_numbers_are_printed_before_they_are_written(samples, against_digits, monkeypatch,
                                                         capsys):
    def full(*_, **__):
        raise UserError("--out-json: cannot write")
    monkeypatch.setattr(evaluate, "write_result", full)
    with pytest.raises(UserError):
        call(evaluate.main, "--samples", samples, *against_digits)
    assert "FD (300)" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["conv1.weight", "fc.bias"])
def test_features_that_are_not_finite(samples, against_digits, tmp_path, capsys, what):
    ckpt = torch.load(against_digits[5], weights_only=True)
    ckpt["model"][what].fill_(float("nan"))
    torch.save(ckpt, tmp_path / "nan.pt")
    refuses(capsys, evaluate.main, "--samples", samples, *against_digits[:4], "--features",
            tmp_path / "nan.pt", "--device", "cpu", says=["--features", "not finite"])


def test_folders_whose_names_differ_only_in_their_numbers():
    assert image_sets.without_numbers(["0000-a", "0001-b"]) == ["a", "b"]
    assert image_sets.without_numbers(["0000-a", "0001-a"]) == ["0000-a", "0001-a"]
    assert image_sets.without_numbers(["a", "0001-b"]) == ["a", "0001-b"]


def test_names_lose_their_numbers_only_where_they_then_fit():
    own, short = ["0001-cat", "0002-dog"], ["cat", "dog"]
    for ours, theirs, fitted in [
            (own, own, (own, own)), (own, short, (short, short)), (short, own, (short, short)),
            (["0002-dog"], own, (["0002-dog"], own)), (["0005-dog"], own, (["dog"], short)),
            (["0000-0001-cat", "0001-0002-dog"], own, (own, own)),
            (own, None, (own, None)), (None, own, (None, own)), (own, ["x"], (own, ["x"]))]:
        assert image_sets.fit_names(ours, theirs) == fitted


def test_users_classes_with_numbers(before_the_work, classifier, tmp_path):
    """A folder of classes called 0001-cat, as samples and as a data set."""
    for name in ("0001-cat", "0002-dog", "0003-x"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / "set" / name / f"{i}.png")
    with pytest.raises(AssertionError, match="the work has begun"):
        call(evaluate.main, "--samples", tmp_path / "set", "--reference", "folder", "--data-dir",
             tmp_path / "set", "--pack-dir", tmp_path / "packed", "--features", classifier,
             "--device", "cpu", "--out", tmp_path)


# --------------------------------------------------------------------------------------------------
# Mistakes

@pytest.fixture
def against_digits(data_dir, classifier):
    """The flags that compare --samples with digits."""
    return ("--reference", "digits", "--data-dir", data_dir, "--features", classifier,
            "--device", "cpu")


def test_bad_arrays(capsys, tmp_path, data_dir, against_digits):
    good = np.repeat(load("digits", data_dir, "test").images, 3, 3)
    path = tmp_path / "x.npz"

    def check(*says, **arrays):
        np.savez(path, **arrays)
        refuses(capsys, evaluate.main, "--samples", path, *against_digits,
                says=["--samples", *says])
    check("arr_0 is float64", arr_0=good / 255)
    check("shape [300, 8, 8]", arr_0=good[..., 0])
    check("no arr_0", images=good)
    check("arr_1 must hold 300", arr_0=good, arr_1=np.arange(7))
    check("labels run from 0 to 299", "10 classes", arr_0=good, arr_1=np.arange(300))


def test_bad_images(capsys, tmp_path, data_dir, against_digits):
    good = np.repeat(load("digits", data_dir, "test").images, 3, 3)

    def check(path, *says):
        refuses(capsys, evaluate.main, "--samples", path, *against_digits, says=says)
    np.savez(tmp_path / "large.npz", good.repeat(2, 1).repeat(2, 2))
    check(tmp_path / "large.npz", "--features", "8 pixels", "16 x 16")
    folder = tmp_path / "mixed"
    folder.mkdir()
    for n in (8, 9):
        Image.new("RGB", (n, n)).save(folder / f"{n}.png")
    check(folder, "--samples", "9.png has 9 x 9", "one size")
    (folder / "9.png").unlink()
    os.mkfifo(folder / "9.png")
    check(folder, "--samples", "9.png cannot be read", "not a regular file")
    check(tmp_path / "nothing", "--samples", "neither a file or folder nor a data set")
    np.savez(tmp_path / "x.npz", good)
    refuses(capsys, evaluate.main, "--samples", tmp_path / "x.npz", "--device", "cpu",
            says=["--reference", "name what"])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:5000])
    check(tmp_path / "cut.npz", "--samples", "cannot be read")


def test_the_long_tailed_set_is_no_reference(capsys, tmp_path, classifier, digits, cm_run):
    np.savez(tmp_path / "train.npz", np.repeat(digits.images, 3, 3), digits.labels)
    refuses(capsys, evaluate.main, "--ckpt", cm_run / "ckpt.pt",
            "--reference", tmp_path / "train.npz", "--features", classifier, "--device", "cpu",
            says=["--reference", "long-tailed set that the model was trained on"])


def test_inception_weights(capsys, tmp_path, weights, cm_run, monkeypatch):
    def check(*flags, says):
        refuses(capsys, evaluate.main, "--ckpt", cm_run / "ckpt.pt", "--features", "inception",
                "--device", "cpu", *flags, says=["--inception-weights", *says])
    check("--inception-weights", weights, says=["SHA-256", "--trust-weights"])
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:10_000])
    without_fc = {k: v for k, v in inception.Inception().state_dict().items() if "fc" not in k}
    torch.save(without_fc, tmp_path / "other.pth")
    for name in ("cut", "other"):
        check("--inception-weights", tmp_path / f"{name}.pth", "--trust-weights",
              says=["not the weights of the 2015 Inception graph"])
    check("--inception-weights", tmp_path / "none.pth", says=["no such file", "https://"])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_, **__):
        raise OSError("network is unreachable")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    check(says=[inception.FILE, str(tmp_path / "hub/checkpoints")])
    (tmp_path / "hub/checkpoints" / inception.FILE).write_bytes(b"x")
    with pytest.raises(UserError, match="SHA-256"):
        inception.load_inception()


def test_numbers_that_cannot_be_printed_are_written(cm_run, classifier, data_dir, tmp_path,
                                                    monkeypatch):
    def fails(*_):
        raise UnicodeEncodeError("latin-1", "x", 0, 1, "no such letter")
    monkeypatch.setattr(evaluate, "print_result", fails)
    with pytest.raises(UnicodeEncodeError):
        call(evaluate.main, "--ckpt", cm_run / "ckpt.pt", "--num", 20, "--steps", 1, "--features",
             classifier, "--data-dir", data_dir, "--device", "cpu",
             "--out-json", tmp_path / "e.json")
    assert disk.read_json(tmp_path / "e.json")["num"] == 20


def test_a_result_says_the_dtype_and_the_plugins_of_its_samples(cm_run, classifier, data_dir,
                                                                tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.Plugins, "found", ["mine.py 1"])
    call(sample.main, "--ckpt", cm_run / "ckpt.pt", "--num", 20, "--steps", 1, "--device", "cpu",
         "--dtype", "bfloat16", "--out", tmp_path)
    monkeypatch.setattr(runtime.Plugins, "found", ["other.py 2"])
    call(evaluate.main, "--samples", tmp_path / "samples.npz", "--features", classifier,
         "--data-dir", data_dir, "--device", "cpu")
    settings = disk.read_json(tmp_path / "eval.json")["settings"]
    assert settings["dtype"] == "torch.bfloat16"
    assert settings["plugin"] == ["mine.py 1", "other.py 2"]
    assert settings["trained_on"] == "502 images, 148 to 7 of a class"
