"""sets/splits.py: a folder of images divided into train/ and test/."""
import os
import shutil

import numpy as np
import pytest
from conftest import call, make_folder, refuses

import data
from data import load
from runtime import UserError
from sets.readers import files_by_class
from sets.splits import choose_test

SIZES = {"many": 40, "some": 12, "few": 5}


def divide(folder, *flags):
    """{side: {class: the names of its files}} after `data.py split`."""
    call(data.main, "split", "--data-dir", folder, *flags)
    return {side: {name: {os.path.basename(path) for path in paths}
                   for name, paths in files_by_class(f"{folder}-split/{side}").items()}
            for side in ("train", "test")}


def test_a_share_at_least_n_at_most_half(tmp_path):
    """Every file is on one side, as a link; the same command again changes nothing."""
    folder = make_folder(tmp_path / "my images", SIZES)
    sides = divide(folder, "--least", 4)
    assert {name: len(files) for name, files in sides["test"].items()} == {
        "many": 8, "some": 4, "few": 2}
    for name, n in SIZES.items():
        assert not sides["train"][name] & sides["test"][name]
        assert len(sides["train"][name] | sides["test"][name]) == n
    some = next(iter(sides["test"]["some"]))
    assert os.path.samefile(folder / "some" / some, f"{folder}-split/test/some/{some}")
    assert divide(folder, "--least", 4) == sides
    test = load("folder", f"{folder}-split", "test", 8, pack_dir=tmp_path / "packed")
    assert sorted(zip(test.class_names, test.counts)) == [("few", 2), ("many", 8), ("some", 4)]


@pytest.mark.parametrize("kind", ["regular expression", "csv"])
def test_a_group_is_on_one_side(tmp_path, kind):
    """Also where it has images of several classes: here 000 to 009 of each are one film."""
    folder = make_folder(tmp_path / "images", SIZES)
    text = r"/(\d\d)"
    if kind == "csv":
        text = tmp_path / "groups.csv"
        lines = [f"{name}/{i:03d}.png,{i // 10}" for name, n in SIZES.items() for i in range(n)]
        text.write_text("\n".join(["file,group", *lines]))
    with pytest.raises(UserError, match="class few would have no test image"):
        divide(folder, "--groups", text)
    shutil.rmtree(folder / "few")
    sides = divide(folder, "--groups", text)
    films = {side: {file[:2] for files in classes.values() for file in files}
             for side, classes in sides.items()}
    assert not films["train"] & films["test"] and films["train"] | films["test"] >= {"00", "03"}


def test_equal_files_are_one_group(tmp_path):
    folder = make_folder(tmp_path / "images", {"a": 6, "b": 6})
    for i in range(6):
        shutil.copy(folder / f"a/{i:03d}.png", folder / f"b/copy{i}.png")
    sides = divide(folder)
    assert {f"copy{file[2]}.png" for file in sides["test"]["a"]} <= sides["test"]["b"]
    assert sides["test"]["a"]


def test_no_class_loses_more_than_half():
    rng = np.random.default_rng(0)
    for seed in range(20):
        labels = rng.integers(0, 4, 200)
        groups = rng.integers(0, 30, 200).astype(str)
        test = choose_test(labels, groups, 0.2, 10, seed)
        assert not set(groups[test]) & set(groups[~test])
        for c in range(4):
            assert 0 < (test & (labels == c)).sum() <= (labels == c).sum() // 2


def test_mistakes(tmp_path, capsys):
    folder = make_folder(tmp_path / "images", SIZES)
    divide(folder)
    kept = divide(folder)
    refuses(capsys, data.main, "split", "--data-dir", folder, "--seed", 1,
            says=["--out", "images-split", "another split"])
    for text in ("x(", "patient", tmp_path / "none.csv"):
        refuses(capsys, data.main, "split", "--data-dir", folder, "--groups", text,
                says=["--groups"])
    assert divide(folder) == kept
