"""evaluate.py: the pool of images that a checkpoint is measured on; from images to eval.json."""
import json

import numpy as np
import pytest
import torch
from conftest import (assert_noted, call, ckpt_of, make_folder, picture, refuses,
                      write_colour_classifier)

import disk
import evaluate
import sample
import train
from data import class_groups, load
from metrics import image_sets, scores
from metrics.features import Features


def test_pool_is_the_papers():
    for C, many, few in ((100, 607, 589), (10, 6667, 5000)):
        groups = class_groups(np.arange(C, 0, -1))
        sizes = image_sets.pool_sizes(50_000, 20_000, groups, C)
        assert set(sizes[groups["Many"]]) == set(sizes[groups["Medium"]]) == {many}
        assert set(sizes[groups["Few"]]) == {few}
    labels, numbers = image_sets.pool_of(np.array([2, 1, 3]))
    assert list(zip(labels, numbers)) == [(0, 0), (1, 1), (2, 2), (0, 3), (2, 5), (2, 8)]


def test_groups_are_measured_on_their_own_images():
    """Overall the first images of each class; a group: all that there are, against its own."""
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
    alone = scores.neighbour_metrics(features[labels == 3], real[real_labels == 3])
    assert alone.items() <= result["classes"]["c3"].items()

    # More neighbours than there are images: said, not only done
    assert many["k"] == 3 and many["density_k"] == 5
    result = evaluate.measure_all(*sides, 120, {"Few": [4, 5]}, {"c3": 3}, evaluate.Metrics(k=25))
    assert result["classes"]["c3"]["k"] == 19 and result["groups"]["Few"]["k"] == 25

    # a number that the number of classes does not divide
    uneven = evaluate.measure_all(*sides, 117, {}, {}, evaluate.Metrics(inception=True))
    chosen = np.concatenate([np.flatnonzero(labels == c)[:19] for c in range(6)])
    twentieth = sorted(np.flatnonzero(labels == c)[19] for c in range(6))
    chosen = np.concatenate([chosen, twentieth[:3]])
    assert uneven["num"] == 117
    assert uneven["fid"] == pytest.approx(scores.distance_of(features[chosen], real))


def test_a_checkpoint_and_its_samples_agree(from_run, classifier, data_dir, tmp_path, measured):
    source = (*from_run, "--num", 60, "--steps", 3, "--dtype", "float32")
    common = ("--features", classifier, "--data-dir", data_dir, "--floor", 2)
    direct = measured(*source, "--features", classifier, "--per-class")
    call(sample.main, *source, "--png", "--out", tmp_path)
    saved = measured("--samples", tmp_path / "samples.npz", *common)
    assert saved["fd"] == pytest.approx(direct["fd"], rel=1e-3)
    assert saved["groups"].keys() == {"Many", "Medium", "Few"}
    assert len(direct["classes"]) == 10 and direct["classes"]["7"]["num"] == 6
    assert {"ckpt_sha256", "features_sha256", "guidance", "steps", "reference", "branch", "weights",
            "grid", "dtype"} <= set(saved["settings"])
    assert saved["settings"]["trained_on"] == "502 images, 148 to 7 of a class"
    assert saved["floor"] < saved["fd"]                 # thirty steps do not learn digits

    # from the folders of --png, whose class names carry numbers
    pngs = measured("--samples", tmp_path / "png", "--reference", "digits", *common)
    assert pngs["groups"]["Few"]["fd"] == pytest.approx(saved["groups"]["Few"]["fd"], rel=1e-3)


def test_an_export_is_measured_as_what_it_was_made_of(from_run, classifier, data_dir, tmp_path):
    path = tmp_path / "general.pt"
    call(sample.main, *from_run, "--export", path, "--weights", "raw", "--branch", "general")
    call(evaluate.main, "--ckpt", path, "--num", 20, "--steps", 2, "--features", classifier,
         "--data-dir", data_dir, "--device", "cpu")
    settings = disk.read_json(tmp_path / "eval.json")["settings"]
    assert (settings["weights"], settings["branch"]) == ("raw", "general")


@pytest.mark.parametrize("label_drop, flags, said", [
    (0, [], "--guidance"), (0, ["--guidance", 0], ""), (1, [], "--label-drop"),
    (0.1, ["--steps", 1], "--steps"), (0.1, [], ""), (1, ["--classes", "null"], "")])
def test_samples_that_cannot_be_what_was_asked_for(label_drop, flags, said, cm_run, tmp_path,
                                                   capsys):
    ckpt = ckpt_of(cm_run)
    ckpt["config"]["label_drop"] = label_drop
    disk.save(tmp_path / "ckpt.pt", ckpt)
    call(sample.main, "--ckpt", tmp_path / "ckpt.pt", "--num", 10, "--steps", 2, *flags,
         "--device", "cpu")
    assert_noted(capsys, said)


def test_real_images_score_well(classifier, data_dir, measured):
    """The held-out digits as samples, by the data set's name: most are classified correctly, and
    they are near the training set.
    """
    common = ("--samples", "digits:test", "--reference", "digits", "--features", classifier,
              "--data-dir", data_dir)
    result = measured(*common, "--reference-split", "test")
    assert abs(result["fd"]) < 1e-3 and result["accuracy"] > 0.9
    assert (result["num"], result["recall"], result["precision"]) == (300, 1, 1)
    against_train = measured(*common)
    assert (against_train["num"], against_train["num_real"]) == (300, 1497)
    assert against_train["fd"] > 0.1


def test_accuracy_knows_the_classifiers_own_order_of_classes(classifier, data_dir, tmp_path,
                                                             measured):
    """Samples whose class 0 is "9" and so on; for the classifier, class 0 is "0"."""
    test = load("digits", data_dir, "test", class_order="9,8,7,6,5,4,3,2,1,0")
    np.savez(tmp_path / "samples.npz", np.repeat(test.images, 3, 3), test.labels)
    data = {"dataset": "digits", "class_names": test.class_names}
    disk.write_json(tmp_path / "samples.json", {
        "settings": {}, "data": data, "npz_sha256": disk.sha256(tmp_path / "samples.npz")})
    result = measured("--samples", tmp_path / "samples.npz", "--features", classifier,
                      "--data-dir", data_dir, "--per-class")
    nine = result["classes"]["9"]
    assert result["accuracy"] > 0.9 and nine["accuracy"] > 0.7 and nine["num_real"] == 150


def test_a_folder_is_its_own_reference(tmp_path, classifier, cpu, capsys, monkeypatch, measured):
    """A run on a long-tailed folder is measured against all of its images, each class with equal
    weight, beside the floor; the folder and its resolution are found without flags.
    """
    root = make_folder(tmp_path / "set", {"c0": 30, "c1": 16, "c2": 12})
    folders = ("--data-dir", root, "--pack-dir", tmp_path / "packed")
    call(train.main, "--dataset", "folder", *folders, "--resolution", 8, "--ch", 16,
         "--ch-mult", 1, 2, "--num-res-blocks", 1, "--batch-size", 8, "--steps", 2,
         "--device", "cpu", "--sample-every", 0, "--out", tmp_path / "run")
    run = ("--ckpt", tmp_path / "run/ckpt.pt", "--num", 30, "--steps", 2, "--device", "cpu")
    features = ("--features", tmp_path / "colour.pt", "--device", "cpu")
    write_colour_classifier(classifier, tmp_path / "colour.pt")
    result = measured(*run, *features, "--num-group", 0)
    assert result["num_real"] == 58 and result["kid_subset_size"] == 30
    assert result["reference"] == {"pixels": [8, 8], "images_per_class": [12, 30]}
    assert all(part["floor"] > 0 for part in (result, *result["groups"].values()))

    # Named in two ways, and as samples of the run: the same images, weights and numbers
    call(sample.main, *run, "--dtype", "float32", "--out", tmp_path / "samples")
    monkeypatch.chdir(tmp_path)
    found = []
    for reference in ([], ["--reference", "folder", *folders], ["--reference", root]):
        result = measured("--samples", "samples", *reference, *features)
        found.append([result[key] for key in ("fd", "kd", "recall", "floor", "reference",
                                              "groups")])
    assert found[0] == found[1] == found[2]
    extractor = evaluate.Extractor(str(features[1]), cpu)
    ours = np.load("samples/samples.npz")["arr_0"]
    real = load("folder", root, resolution=8, pack_dir=folders[3]).images
    (ours, _), (real, _) = (extractor.extract(x.__getitem__, len(x), "x") for x in (ours, real))
    weights = np.repeat(1 / (3 * np.array([30, 16, 12])), [30, 16, 12])
    assert result["fd"] == pytest.approx(scores.distance_of(ours, real, weights), rel=1e-5)

    # Images without a .json: the reference is read at their size, 8 pixels
    np.savez("theirs.npz", np.random.RandomState(0).randint(0, 256, (30, 8, 8, 3), np.uint8))
    theirs = measured("--samples", "theirs.npz", "--reference", "folder", *folders, *features)
    assert theirs["num_real"] == 58

    # Other images in its place; for --ckpt see test_mistakes.py
    picture(root / "c0/0.png", 5, size=(9, 9))
    refuses(capsys, evaluate.main, "--samples", "samples", *features, says=["--data-dir"])


@pytest.fixture
def samples(data_dir, tmp_path):
    """A file of the held-out digits, with their labels, without the JSON of sample.py."""
    test = load("digits", data_dir, "test")
    path = tmp_path / "x.npz"
    np.savez(path, np.repeat(test.images, 3, 3), test.labels)
    return path


@pytest.fixture
def against_digits(data_dir, classifier):
    """The flags that compare --samples with digits."""
    return ("--reference", "digits", "--data-dir", data_dir, "--features", classifier,
            "--device", "cpu")


def test_if_needed_notices_what_changed(against_digits, samples, tmp_path, capsys):
    def check(*flags, change):
        """Measured once; again only after the change."""
        for expected in (True, False, True, False):
            capsys.readouterr()
            call(evaluate.main, *flags, "--if-needed", "--out-json", tmp_path / "e.json")
            assert ("up to date" not in capsys.readouterr().out) == expected
            if not expected and change:
                change()
                change = None
    with np.load(samples) as f:
        images, labels = f["arr_0"][:40], f["arr_1"][:40]
    folder, reference, rest = tmp_path / "flat", tmp_path / "r.npz", against_digits[2:]
    for i in range(9):
        picture(folder / f"{i}.png", 9 + i, "L", (8, 8))
    np.savez(samples, images, labels)
    np.savez(reference, images, labels)
    flags = ("--samples", samples, "--reference", reference, *rest)
    check(*flags, change=lambda: np.savez(samples, 255 - images, labels))
    assert (tmp_path / "e-1.json").exists()             # the earlier numbers are kept
    check(*flags, "--k", 4, change=lambda: np.savez(reference, images[::-1], labels[::-1]))
    check("--samples", folder, "--reference", reference, *rest,
          change=lambda: picture(folder / "0.png", 7, "L", (8, 8)))


def test_images_that_the_classes_share_unequally(samples, against_digits, from_run, measured,
                                                 capsys):
    """Fewer images than classes are refused; few of a class, and unequal numbers, are said."""
    for subject in (from_run, ("--samples", samples)):
        refuses(capsys, evaluate.main, *subject, *against_digits, "--num", 9, says=["--num"])
    with np.load(samples) as f:
        images, labels = f["arr_0"], f["arr_1"]
    of_class = [np.flatnonzero(labels == c) for c in range(10)]
    for chosen, said in ((of_class, ""), ([rows[:3] for rows in of_class], "3 of a class"),
                         ([of_class[0][:15], *of_class[1:]], "0 15, ")):
        rows = np.concatenate(chosen)
        np.savez(samples, images[rows], labels[rows])
        measured("--samples", samples, *against_digits)
        assert_noted(capsys, said)


def test_a_balanced_training_set_has_no_many_and_few(samples, against_digits, digits, measured):
    for counts, groups in (([100] * 10, 0), (digits.counts.tolist(), 3)):
        record = {"class_names": digits.class_names, "class_counts": counts}
        disk.write_json(samples.with_suffix(".json"), {
            "settings": {}, "data": record, "npz_sha256": disk.sha256(samples)})
        result = measured("--samples", samples, *against_digits)
        assert len(result["groups"]) == groups and not result["classes"]


def test_classes_that_the_samples_lack(samples, against_digits, data_dir, measured):
    """The overall numbers are against the real images of the samples' classes."""
    with np.load(samples) as f:
        images, labels = f["arr_0"], f["arr_1"]
    np.savez(samples, images[labels < 4], labels[labels < 4])
    real = load("digits", data_dir).labels
    assert measured("--samples", samples, *against_digits)["num_real"] == (real < 4).sum()


def test_what_cannot_be_compared_is_refused(samples, against_digits, tmp_path, capsys):
    """Wrong flags; too few or other images; labels, classes and features that do not fit."""
    reference, rest = against_digits[:2], against_digits[2:]
    with np.load(samples) as f:
        images, labels = f["arr_0"], f["arr_1"]
    other = tmp_path / "other.npz"

    def check(flag, *flags, samples=("--samples", samples), reference=reference, **arrays):
        if arrays:
            np.savez(other, **arrays)
        refuses(capsys, evaluate.main, *samples, *reference, *rest, *flags, says=[flag])
    check("--steps", "--steps", 9)                      # of sampling, with --samples
    check("--num", "--num", 301)                        # more than there are
    check("--trust-weights", "--trust-weights")         # of Inception, with a classifier
    check("--reference", reference=())
    for n in (8, 9):                                    # of several sizes
        picture(tmp_path / f"mixed/{n}.png", n, size=(n, n))
    check("--samples", samples=("--samples", tmp_path / "mixed"))

    theirs = ("--samples", other)
    check("--samples", samples=theirs, arr_0=images[:1])                # fewer than two
    check("--samples", samples=theirs, arr_0=images / 255)              # no uint8
    check("--samples", samples=theirs, arr_0=images, arr_1=labels - 1)
    check("--samples", samples=theirs, arr_0=images, arr_1=np.arange(300))      # of ten classes
    check("--features", samples=theirs, arr_0=np.concatenate([images, images], 2))  # 8 x 16

    ours = ("--reference", other)
    check("--reference", reference=ours, arr_0=images[labels < 9], arr_1=labels[labels < 9])
    call(evaluate.main, "--samples", samples, *against_digits, "--save-stats", tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as f:
        about = json.loads(str(f["about"]))
        about["features_sha256"] = "0"                                  # of another classifier
        check("--reference", reference=ours, **{**f, "about": np.array(json.dumps(about))})


def test_parts_that_are_left_out_are_said():
    """A group lacks a class on either side, or images; and few images give no IS and no floor."""
    rng = np.random.RandomState(0)

    def side(*labels):
        features = rng.randn(len(labels), 4).astype(np.float32)
        return Features(features, features, np.array(labels))
    fake, real = side(0, 0, 1, 1, 2, 3, 3), side(*[0, 1] * 10, *[2] * 9, 4)
    groups = {"Many": [0, 1], "Medium": [1, 3], "Few": [2, 4]}
    settings = evaluate.Metrics(inception=True, floor=2)
    result = evaluate.measure_all(fake, real, 7, groups, {"a": 0, "b": 1, "c": 2}, settings)
    assert list(result["groups"]) == ["Many"] and list(result["classes"]) == ["a", "b"]
    assert list(result["left_out"]) == ["Medium", "Few", "c"]
    assert "is" not in result and result["floor"] > 0 and result["groups"]["Many"]["floor"] > 0
    assert "NaN" not in json.dumps(result)
    # Ten images of each class would be needed, and one class has a single one
    rare = evaluate.measure_all(fake, side(*[0] * 20, 1, 2, 3, 3), 7, {}, {}, settings)
    assert "kid" not in rare and "floor" not in rare and rare["fid"] > 0
    evaluate.print_result(rare, floor=2)


def test_features_that_are_not_finite(samples, against_digits, tmp_path, capsys):
    ckpt = torch.load(against_digits[5], weights_only=True)
    ckpt["model"]["conv1.weight"].fill_(float("nan"))
    torch.save(ckpt, tmp_path / "nan.pt")
    refuses(capsys, evaluate.main, "--samples", samples, *against_digits[:4], "--features",
            tmp_path / "nan.pt", "--device", "cpu", says=["--features"])
