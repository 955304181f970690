"""packing.py: anyone's image files, and packs that are current and whole; readers of one's own."""
import os

import numpy as np
import pytest
import torch
from conftest import make_folder, picture
from PIL import Image
from torchvision import transforms

import data
import disk
from data import load
from runtime import UserError
from sets import packing, readers
from sets.packing import open_image, read_image


KINDS = {       # the suffix of each kind of file
    "png": "png", "jpeg": "jpg", "cmyk": "jpg", "exif": "jpg", "palette": "png", "gif": "gif",
    "rgba": "png", "grey": "png", "grey16": "png"}
LOSSLESS = ("png", "grey", "grey16")


def gradient(w, h):
    """A colour image whose red grows to the right, green downwards."""
    x = np.zeros((h, w, 3), np.uint8)
    x[..., 0] = np.linspace(0, 255, w)[None]
    x[..., 1] = np.linspace(0, 255, h)[:, None]
    x[..., 2] = 90
    return Image.fromarray(x)


def save_as(folder, kind, image):
    """Write an image in one of the ways in which people's files come; returns its path."""
    path = folder / f"{kind}.{KINDS[kind]}"
    options = {"quality": 95} if KINDS[kind] == "jpg" else {}
    if kind == "cmyk":
        image = image.convert("CMYK")
    elif kind == "exif":                                # stored on its side, as a telephone does
        exif = Image.Exif()
        exif[0x0112] = 6                                # to be turned by 90 degrees clockwise
        image = image.transpose(Image.ROTATE_90)
        options["exif"] = exif
    elif kind in ("palette", "gif"):
        image = image.quantize(256)
    elif kind == "rgba":                                # its lower half is transparent
        alpha = np.zeros((image.height, image.width), np.uint8)
        alpha[:image.height // 2] = 255
        image = image.convert("RGBA")
        image.putalpha(Image.fromarray(alpha))
    elif kind == "grey":
        image = image.convert("L")
    elif kind == "grey16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image.save(path, **options)
    return path


def by_torchvision(image, R):
    """An independent resize and crop, with antialiasing: (R, R, 3) float."""
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    resized = transforms.functional.resize(whole, R, antialias=True)
    cropped = transforms.functional.center_crop(resized, [R, R])
    return cropped.permute(1, 2, 0).numpy().astype(float)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (40, 200), (7, 5)])
def test_every_kind_and_size_of_image(tmp_path, kind, size):
    image = gradient(*size)
    R = 16
    got = read_image(save_as(tmp_path, kind, image), R).astype(float)
    assert got.shape == (R, R, 3)
    if kind.startswith("grey"):
        image = image.convert("L").convert("RGB")
    error = np.abs(got - by_torchvision(image, R))
    scale = max(1, R / min(size))                       # enlarged images ring
    if kind == "rgba":
        assert (got[-2:] == 255).all() and error[:R // 2 - 3].max() < 14 * scale
        return
    tolerance = (8 if kind in LOSSLESS else 16) * scale
    assert error.mean() < tolerance / 4 and error.max() < 3 * tolerance


def test_a_broken_image_is_named(tmp_path):
    """Half of one, a text, pixels of floats or of 32 bits."""
    gradient(9, 9).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("not an image")
    for kind in (np.float32, np.int32):
        Image.fromarray(np.full((9, 9), 200, kind)).save(tmp_path / f"{kind.__name__}.tiff")
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=f"--samples.*{path}"):
            open_image(path, "--samples")


def load_folder(root, pack_dir):
    """The set of a folder, at 8 pixels."""
    return load("folder", root, resolution=8, pack_dir=pack_dir)


@pytest.fixture
def root(tmp_path):
    """A folder of two classes."""
    return make_folder(tmp_path / "set", {"a": 3, "b": 2})


def pack_of(tmp_path):
    """The .npy of the only pack in tmp_path/packs."""
    (npy,) = (tmp_path / "packs").glob("*.npy")
    return npy


def test_packed_once_and_anew_where_a_file_has_changed(root, tmp_path):
    images = load_folder(root, tmp_path / "packs")
    before = pack_of(tmp_path).stat().st_mtime_ns
    assert np.array_equal(load_folder(root, tmp_path / "packs").images, images.images)
    assert pack_of(tmp_path).stat().st_mtime_ns == before
    # Another file of the same name, size and time
    path = root / "a/new.bmp"
    hashes = []
    for grey in (0, 255):
        stat = path.stat() if path.exists() else None
        Image.new("RGB", (9, 9), (grey,) * 3).save(path)
        if stat:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        images = load_folder(root, tmp_path / "packs")
        assert (images.images[images.labels == 0] == grey).all((1, 2, 3)).any()
        hashes.append(images.sha256)
    assert hashes[0] != hashes[1]
    os.utime(path)                      # touched: packed anew, and the content is what it was
    assert load_folder(root, tmp_path / "packs").sha256 == hashes[1]
    path.unlink()
    assert load_folder(root, tmp_path / "packs").counts.tolist() == [3, 2]


def test_a_damaged_pack_is_made_again(root, tmp_path):
    """Empty, half of it, without its header, other pixels, half of its record."""
    def whole():
        return np.array(load_folder(root, tmp_path / "packs").images)
    before = whole()
    npy = pack_of(tmp_path)
    content = npy.read_bytes()
    for damaged in (b"", content[:len(content) // 2], content[:10] + b" " * 118 + content[128:]):
        npy.write_bytes(damaged)
        assert np.array_equal(whole(), before)
    np.save(npy, 255 - before)
    assert np.array_equal(whole(), before)
    os.truncate(npy.with_suffix(".json"), 100)
    assert np.array_equal(whole(), before)


def test_a_pack_that_was_moved_is_taken(root, tmp_path, monkeypatch):
    """Its file has other times, and the content that was written down."""
    before = load_folder(root, tmp_path / "packs")
    os.utime(pack_of(tmp_path))
    monkeypatch.setattr(packing, "write_pack", None)
    assert load_folder(root, tmp_path / "packs").sha256 == before.sha256


PACKED = (np.zeros((2, 4, 4, 3), np.uint8), [0, 1], ["a", "b"])     # images, labels, class names


def test_a_pack_counts_for_its_own_provenance_and_stamp(tmp_path):
    base = tmp_path / "x"
    packing.write_pack(base, *PACKED, {"split": "train"}, stamp=1)
    assert packing.read_pack(base, {"split": "train"}, 1) is not None
    assert packing.read_pack(base, {"split": "test"}, 1) is None
    assert packing.read_pack(base, {"split": "train"}, 2) is None
    with pytest.raises(TypeError):          # killed while it is packed anew: the old JSON is gone
        packing.write_pack(base, None, [], [], {})
    assert packing.read_pack(base, {"split": "train"}, 1) is None


def test_the_hashes_are_of_all_of_a_set(tmp_path):
    images, labels, names = PACKED
    hashes = {packing.content_hash(*changed) for changed in (
        PACKED, (images + 1, labels, names), (images, [1, 0], names), (images, labels, ["a", "c"]),
        (images.reshape(2, 2, 8, 3), labels, names))}
    assert len(hashes) == 5
    hashes = set()
    for name, content in (("a", "x"), ("b", "x"), ("a", "xy")):
        (tmp_path / name).write_text(content)
        hashes.add(packing.names_and_sizes([tmp_path / name], tmp_path))
    assert len(hashes) == 3


def test_packing_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Stopped in the third block, it reads only what was missing; the result is that of one run."""
    files = [picture(tmp_path / f"{i:02d}.png", i) for i in range(12)]
    pack = tmp_path / "p/x.npy"
    read = []

    def reads(path, resolution):
        if len(read) == stop:
            raise KeyboardInterrupt
        read.append(path)
        return read_image(path, resolution)
    monkeypatch.setattr(packing.os, "cpu_count", lambda: 1)     # one thread: files in their order
    monkeypatch.setattr(packing, "read_image", reads)
    stop = 9
    with pytest.raises(KeyboardInterrupt):
        packing.pack_files(pack, files, [12, 8, 8, 3], {"dataset": "x"}, block=4)
    assert not pack.exists()
    read.clear()
    stop = None
    packing.pack_files(pack, files, [12, 8, 8, 3], {"dataset": "x"}, block=4)
    assert read == files[8:]
    assert np.array_equal(np.load(pack), [read_image(f, 8) for f in files])
    assert [p.name for p in pack.parent.iterdir()] == ["x.npy"]


@pytest.mark.parametrize("shape, source", [([3, 8, 8, 3], "y"), ([2, 8, 8, 3], "x")])
def test_another_set_does_not_go_on_with_what_was_packed(shape, source, tmp_path):
    files = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    pack = tmp_path / "x.npy"
    packing.new_array(tmp_path / "x.npy.partial", [3, 8, 8, 3], np.uint8)
    disk.write_json(tmp_path / "x.npy.mark", {"shape": [3, 8, 8, 3], "source": "x", "done": 2})
    packing.pack_files(pack, files[:shape[0]], shape, source)
    assert np.array_equal(np.load(pack), [read_image(f, 8) for f in files[:shape[0]]])


def test_all_broken_images_are_named_at_once(tmp_path):
    """Those of all blocks, ten by name; none is taken for read in the next call, nor a pack."""
    files = [picture(tmp_path / f"{i:02d}.png", i) for i in range(16)]
    for file in files[3:]:
        file.write_text("not an image")
    for _ in range(2):
        with pytest.raises(UserError, match="--data-dir.*13 files.*03.png.*12.png and 3 more"):
            packing.pack_files(tmp_path / "p/x.npy", files, [16, 8, 8, 3], {"dataset": "x"}, 4)
    assert not (tmp_path / "p/x.npy").exists()


def use_reader(monkeypatch, read):
    """Make `read` the reader of the set "own"."""
    monkeypatch.setitem(readers.READERS, "own", data.Source(read, resolution=8, flip=False))


@pytest.mark.parametrize("images, labels, names", [
    (np.zeros((4, 8, 8, 3)), [0, 1, 0, 1], "ab"),
    (np.full((4, 8, 8, 3), np.nan), [0, 1, 0, 1], "ab"),
    (np.zeros((4, 8, 6, 3), np.uint8), [0, 1, 0, 1], "ab"),
    (["a.png"] * 4, [0, 1, 0, 1], "ab"),
    (np.zeros((4, 8, 8, 3), np.uint8), [1, 2, 1, 2], "ab"),
    (np.zeros((4, 8, 8, 3), np.uint8), [0, -1, 1, 0], "ab"),
    (np.zeros((4, 8, 8, 3), np.uint8), [0.5, 1, 0, 1], "ab"),
    (np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0], "ab"),
    (np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1], "aa"),
    (np.zeros((0, 8, 8, 3), np.uint8), [], "ab"),
])
def test_what_a_reader_gives_is_checked(monkeypatch, tmp_path, images, labels, names):
    """Not pixels from 0 to 255, or not a class for each image."""
    use_reader(monkeypatch, lambda data_dir, split: (images, np.array(labels), list(names)))
    with pytest.raises(UserError, match="--dataset"):
        load("own", tmp_path)
    assert not list(tmp_path.rglob("*.npy"))


def test_what_a_reader_of_ones_own_gives_now_is_what_is_packed(tmp_path, monkeypatch):
    """Also where a file or a helper of it has changed, and its own code has not."""
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    labels = np.array([0, 0, 1, 1])
    names = ["a", "b"]
    use_reader(monkeypatch, lambda *_: (pixels.copy(), labels.copy(), list(names)))

    def read():
        images = load("own", tmp_path, pack_dir=tmp_path / "packs")
        return images.images[0, 0, 0, 0], images.labels.tolist(), images.class_names
    assert read() == (0, [0, 0, 1, 1], ["a", "b"])
    before = pack_of(tmp_path).stat().st_mtime_ns
    assert read()[0] == 0 and pack_of(tmp_path).stat().st_mtime_ns == before    # packed once
    pixels += 7
    assert read()[0] == 7
    labels[1] = 1
    assert read()[1] == [0, 1, 1, 1]
    names[1] = "c"
    assert read()[2] == ["a", "c"]
