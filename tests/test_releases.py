"""The paper's other data sets, each from a miniature in exactly its official layout, official quirks included."""
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
from conftest import ROOT, call
from PIL import Image

import data
import readers
from data import load, load_reference, read_image
from runtime import UserError


def picture(path, seed, mode="RGB", size=(14, 12)):
    """A random image file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, quality=95)
    return path


def celebahq(root, n=12):
    top = root / "CelebAMask-HQ"
    for i in range(n):
        picture(top / "CelebA-HQ-img" / f"{i}.jpg", i)
    names = "5_o_Clock_Shadow Male Young"
    rows = [f"{i}.jpg  -1 {1 if i % 3 == 0 else -1:2d}  1" for i in range(n)]
    (top / "CelebAMask-HQ-attribute-anno.txt").write_text("\n".join([str(n), names + " ", *rows, ""]))
    return top / "CelebA-HQ-img" / "4.jpg"


def imagenet_lt(root):
    wnids, lines = ["n01440764", "n01443537", "n01484850"], []
    for c, wnid in enumerate(wnids):
        for i in range(6 - 2 * c):
            name = f"train/{wnid}/{wnid}_{i}.JPEG"
            picture(root / name, 10 * c + i, mode=["RGB", "L", "CMYK"][i % 3])
            lines.append(f"{name} {c}")
        for i in range(2):
            picture(root / "val" / wnid / f"ILSVRC2012_val_{10 * c + i:08d}.JPEG", 50 + i)
    picture(root / "train" / wnids[0] / "not_in_the_list.JPEG", 99)
    (root / "ImageNet_LT_train.txt").write_text("\n".join(lines[::-1]) + "\n")
    return root / "train/n01443537/n01443537_0.JPEG"


def inat2018(root):
    categories = [{"id": i, "name": f"Género {i}", "supercategory": "Plantae"} for i in range(4)]
    for split, per_class in (("train", [5, 3, 2, 1]), ("val", [2, 2, 2, 2])):
        images, annotations = [], []
        for c, n in enumerate(per_class):
            for i in range(n):
                name = f"train_val2018/Plantae/{c}/größe_{split}_{i}.jpg"
                picture(root / name, 7 * c + i)
                images.append({"id": 1000 * (split == "val") + 10 * c + i, "file_name": name, "license": 3, "rights_holder": "who",
                               "width": 800, "height": 600})
                annotations.append({"id": len(annotations), "image_id": images[-1]["id"], "category_id": c})
        content = {"info": {"year": 2018}, "images": images[::-1], "licenses": [{"id": 3, "url": "u", "name": "n"}],
                   "annotations": annotations, "categories": categories[::-1]}
        (root / f"{split}2018.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return root / "train_val2018/Plantae/1/größe_train_1.jpg"


def artbench10(root):
    for c, style in enumerate(["art_nouveau", "baroque", "ukiyo_e"]):
        for i in range(4):
            picture(root / style / f"some-artist_título-{i}.jpg", 10 * c + i)
    return root / "baroque/some-artist_título-1.jpg"


def cub200(root):
    top = root / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    rows = [(c, i) for c in range(3) for i in range(5)]
    files = [f"{names[c]}/{names[c][4:]}_{i:04d}_{c}.jpg" for c, i in rows]
    for k, f in enumerate(files):
        picture(top / "images" / f, k, mode="L" if k == 3 else "RGB")
    write = lambda name, values: (top / name).write_text("".join(f"{k + 1} {v}\n" for k, v in enumerate(values)))
    write("images.txt", files), write("classes.txt", names)
    write("image_class_labels.txt", [c + 1 for c, _ in rows]), write("train_test_split.txt", [int(i < 3) for _, i in rows])
    return top / "images" / files[5]


def flowers102(root):
    for k in range(1, 13):
        picture(root / "jpg" / f"image_{k:05d}.jpg", k)
    scipy.io.savemat(root / "imagelabels.mat", {"labels": np.array([[1 + (k % 3) for k in range(12)]], np.uint8)})
    scipy.io.savemat(root / "setid.mat", {"trnid": np.arange(1, 4)[None], "valid": np.array([[4, 5, 6]]), "tstid": np.arange(7, 13)[None]})
    return root / "jpg/image_00002.jpg"


CASES = {       # name: (builder, counts of train, reference's counts, its words, class names)
    "celebahq": (celebahq, [8, 4], [4, 4], "training set, 4 images of each class", ["Female", "Male"]),
    "imagenet-lt": (imagenet_lt, [6, 4, 2], [2, 2, 2], "full test set", ["n01440764", "n01443537", "n01484850"]),
    "inat2018": (inat2018, [5, 3, 2, 1], [2, 2, 2, 2], "full test set", [f"Género {i}" for i in range(4)]),
    "artbench10": (artbench10, [4, 4, 4], [4, 4, 4], "full training set", ["art_nouveau", "baroque", "ukiyo_e"]),
    "cub200": (cub200, [3, 3, 3], [3, 3, 3], "full training set", ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]),
    "flowers102": (flowers102, [3, 3, 3], [3, 3, 3], "full training set", ["1", "2", "3"]),
}


@pytest.mark.parametrize("name", CASES)
def test_release(name, tmp_path):
    build, counts, reference_counts, words, names = CASES[name]
    one = build(tmp_path)
    images = load(name, tmp_path, resolution=8)
    assert images.counts.tolist() == counts and images.class_names == names and images.images.shape[1:] == (8, 8, 3)
    expected = read_image(one, 8)
    rows = [r for r in range(len(images.labels)) if np.array_equal(images.images[r], expected)]
    assert len(rows) == 1 and images.labels[rows[0]] == {"celebahq": 0, "flowers102": 1}.get(name, 1)
    reference, said = load_reference(name, tmp_path, resolution=8)
    assert reference.counts.tolist() == reference_counts and said == words
    one.unlink()
    if name == "artbench10":            # which has no list: another set of files is another pack
        assert load(name, tmp_path, resolution=8).counts.tolist() == [4, 3, 4]
    else:
        assert np.array_equal(load(name, tmp_path, resolution=8).images, images.images)     # packed: no longer needed
        with pytest.raises(UserError, match="--data-dir.* 1 of .* are missing, the first is .*" + one.name.replace("(", "")):
            load(name, tmp_path, resolution=16)


def test_artbench10_in_its_two_releases(tmp_path):
    """Beside other folders, whole and divided: the divided one has a test set."""
    artbench10(tmp_path / "artbench-10-imagefolder")
    picture(tmp_path / "elsewhere/other.jpg", 1)
    assert load("artbench10", tmp_path, resolution=8).counts.tolist() == [4, 4, 4]
    for split in ("train", "test"):
        artbench10(tmp_path / "artbench-10-imagefolder-split" / split)
    (tmp_path / "artbench-10-imagefolder-split/test/baroque/some-artist_título-1.jpg").unlink()
    assert load("artbench10", tmp_path, resolution=8).class_names == ["art_nouveau", "baroque", "ukiyo_e"]
    assert load("artbench10", tmp_path, "test", resolution=8).counts.tolist() == [4, 3, 4]


def test_packing_needs_the_memory_of_a_block(tmp_path):
    """Eight times the images, the same peak: the pack is mapped block by block."""
    code = """
import resource, sys, numpy as np, data
from pathlib import Path
n, image = int(sys.argv[2]), np.zeros((64, 64, 3), np.uint8)
data.read_image = lambda path, resolution: image
data.pack_files(Path(sys.argv[1]) / f"{n}.npy", ["x"] * n, [n, 64, 64, 3], {}, block=512)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = [int(subprocess.run([sys.executable, "-c", code, tmp_path, str(n)], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
             for n in (1024, 8192)]
    assert peaks[1] - peaks[0] < 30_000, peaks              # KiB; the larger pack has 98,304


def test_class_order(tmp_path):
    artbench10(tmp_path)
    images = load("artbench10", tmp_path, resolution=8, class_order="ukiyo_e,art_nouveau,baroque")
    assert images.class_names == ["ukiyo_e", "art_nouveau", "baroque"]
    assert np.array_equal(images.images[images.labels == 0][0], read_image(tmp_path / "ukiyo_e/some-artist_título-0.jpg", 8))


def test_what_is_not_there(tmp_path):
    for name, word in (("celebahq", "CelebAMask-HQ-attribute-anno.txt"), ("imagenet-lt", "ImageNet_LT_train.txt"), ("inat2018", "train2018.json"),
                       ("cub200", "image_class_labels.txt"), ("flowers102", "imagelabels.mat")):
        with pytest.raises(UserError, match=f"--data-dir .*{word} is not there"):
            load(name, tmp_path, resolution=8)
    imagenet_lt(tmp_path)
    (tmp_path / "val/n01443537").rename(tmp_path / "val/elsewhere")
    with pytest.raises(UserError, match="no folder n01443537; sort"):
        load("imagenet-lt", tmp_path, "test", 8)


def test_packing_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Stopped in the third block, it reads only what was missing; the result is that of one run."""
    artbench10(tmp_path)
    files, labels, names = readers.read_folder(tmp_path, "train")
    whole = [read_image(f, 8) for f in files]
    read, shape, provenance = [], [12, 8, 8, 3], {"dataset": "x"}

    def stopped(path, resolution):
        if len(read) == 9:
            raise KeyboardInterrupt
        read.append(path)
        return read_image(path, resolution)
    monkeypatch.setattr(data.os, "cpu_count", lambda: 1)           # one thread: files in their order
    with monkeypatch.context() as m:
        m.setattr(data, "read_image", stopped)
        with pytest.raises(KeyboardInterrupt):
            data.pack_files(tmp_path / "p/x.npy", files, shape, provenance, block=4)
    assert not (tmp_path / "p/x.npy").exists()
    again = []
    monkeypatch.setattr(data, "read_image", lambda p, r: again.append(p) or read_image(p, r))
    data.pack_files(tmp_path / "p/x.npy", files, shape, provenance, block=4)
    assert again == files[8:] and np.array_equal(np.load(tmp_path / "p/x.npy"), whole)
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["x.npy"]


def test_data_py_prints_the_summary(tmp_path, capsys):
    imagenet_lt(tmp_path)
    call(data.main, "--dataset", "imagenet-lt", "--data-dir", tmp_path, "--resolution", 8)
    text = capsys.readouterr().out
    assert "imagenet-lt: 12 images, 3 classes, IR 3, class sizes 6 4 2" in text and "Few: 1 classes, 2 images" in text


def test_thousands_of_classes_take_no_loop_a_step_and_one_line(monkeypatch):
    """8,142 classes, as iNaturalist has: a window of logs, its line, the draw and the splits stay vectorised and short."""
    import time

    import torch
    import train
    counts = np.maximum(1, (1000 * 500.0 ** (-np.arange(8142) / 8141)).astype(int))
    names = [f"species {c}" for c in range(8142)]
    start = time.time()
    window = train.Window(counts, names, torch.device("cpu"))
    assert time.time() - start < 2 and len(window.groups) == 3
    y = torch.randint(8142, (64,))
    start = time.time()
    for _ in range(100):
        window.add_D(torch.rand(64), y)
    assert time.time() - start < 0.5
    window.add({"base": torch.tensor(1.0), "grad_norm": torch.tensor(1.0)})
    window.steps = 1
    args = train.resolve(train.make_parser().parse_args([]))
    line = train.format_line(5, args, window.means(train.runtime.Runtime(torch.device("cpu"), torch.float32)), 1e-3, 10, 5)
    assert "\n" not in line and len(line) < 200
    summary = data.ImageSet("x", np.zeros((1, 8, 8, 3)), np.repeat(np.arange(8142), counts), names).summary()
    assert "\n" not in summary and len(summary) < 200


def test_a_class_that_the_reference_lacks(tmp_path):
    for path in ("train/a/0.png", "train/b/0.png", "test/a/0.png"):
        picture(tmp_path / path, 0)
    with pytest.raises(UserError, match="--data-dir.* class b has no image in the test set"):
        load_reference("folder", tmp_path, resolution=8, pack_dir=tmp_path / "packed")
