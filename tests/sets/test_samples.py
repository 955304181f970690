"""samples.py: images and labels in an .npz, and the record beside it."""
import numpy as np
import pytest

import disk
from runtime import UserError
from sets.samples import images_of_npz, open_npz, read_samples


def noise(n=4, channels=3):
    """n images of random pixels, 8 x 8."""
    return np.random.RandomState(0).randint(0, 256, (n, 8, 8, channels), np.uint8)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut", "changed", "objects", "npy"])
def test_open_npz_refuses(tmp_path, kind):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=noise())
    whole = path.read_bytes()
    path.unlink()
    if kind == "objects":
        np.savez(path, arr_0=np.array([{"not": "a number"}], dtype=object))
    elif kind == "npy":
        with open(path, "wb") as f:
            np.save(f, noise())
    elif kind != "missing":
        content = {"empty": b"", "text": b"hello", "cut": whole[:len(whole) // 2],
                   "changed": whole[:500] + b"damaged" + whole[507:]}
        path.write_bytes(content[kind])
    with pytest.raises(UserError, match="--extra"):
        open_npz(path, "--extra")


def test_images_of_npz(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=noise(channels=1), arr_1=np.array([3, 0, 1, 1], np.int16))
    got, labels = images_of_npz(open_npz(tmp_path / "a.npz", "--samples"), "a.npz", "--samples")
    assert np.array_equal(got, noise(channels=1)) and labels.tolist() == [3, 0, 1, 1]
    for content in ({"images": noise()}, {"arr_0": noise().astype(np.float32)},
                    {"arr_0": noise()[..., 0]}, {"arr_0": noise().transpose(0, 3, 1, 2)},
                    {"arr_0": noise(), "arr_1": np.arange(3)},
                    {"arr_0": noise(), "arr_1": np.zeros(4)}):
        with pytest.raises(UserError, match="--extra"):
            images_of_npz(content, "a.npz", "--extra")


def test_read_samples(tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=noise(channels=1), arr_1=np.array([0, 1, 0, 1]))
    record = {"settings": {"seed": 0}, "data": {"class_names": ["a", "b"]}}
    content = {**record, "seconds": 1.5, "npz_sha256": disk.sha256(path)}
    disk.write_json(tmp_path / "samples.json", content)
    got, labels, read = read_samples(path)
    assert np.array_equal(got, noise(channels=1).repeat(3, 3))
    assert labels.tolist() == [0, 1, 0, 1] and read == record


def test_samples_whose_record_is_missing_or_of_others(tmp_path):
    """The .npz was replaced, or a label is no class: -1 would be shown as the last one."""
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=noise())
    own = {"settings": {}, "data": {"class_names": ["a", "b"]}}
    for record in (None, [1, 2], {**own, "npz_sha256": "0123"}):
        disk.write_json(tmp_path / "samples.json", record)
        with pytest.raises(UserError, match="--pair"):
            read_samples(path, "--pair")
    for labels in ([0, 1, 2, 0], [0, -1, 1, 0]):
        np.savez(path, arr_0=noise(), arr_1=np.array(labels))
        disk.write_json(tmp_path / "samples.json", {**own, "npz_sha256": disk.sha256(path)})
        with pytest.raises(UserError, match="--pair"):
            read_samples(path, "--pair")
