"""latent_cache.py: what is encoded once is read later; each process encodes its share."""
import errno
import json
import os
import shutil

import numpy as np
import pytest
from conftest import torchrun

import disk
from latent import latent_cache

SHAPE = (40, 2, 4, 3, 3)
MADE_FROM = {"images": "a hash", "rows": None, "resolution": 6, "scale": 0.18, "encoder": "b"}
MOMENTS = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) / 7
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import disk, runtime
from latent import latent_cache
from test_latent_cache import MADE_FROM, MOMENTS, SHAPE
rt = runtime.setup("cpu")
encoded = []
def encode(rows):
    encoded.append([rows.start, rows.stop])
    return MOMENTS[rows.start:rows.stop]
folder = Path(sys.argv[1])
found = latent_cache.kept(folder / "set", MADE_FROM, SHAPE, encode, rt)
same = bool((found == MOMENTS).all()) and isinstance(found, np.memmap)
disk.write_json(folder / f"rank{rt.rank}.json", [encoded, same])
runtime.run(lambda: None)
"""


class Encoder:
    """Gives the rows of MOMENTS, and counts them."""

    def __init__(self):
        self.rows = []

    def __call__(self, rows):
        self.rows += rows
        return MOMENTS[rows.start:rows.stop]


def encoded(folder, cpu, made_from=MADE_FROM):
    """The rows that were encoded for the moments, which are as they should be."""
    encoder = Encoder()
    found = latent_cache.kept(folder / "set", made_from, SHAPE, encoder, cpu)
    assert isinstance(found, np.memmap) and found.dtype == np.float32
    assert np.array_equal(found, MOMENTS)
    return encoder.rows


def files(folder):
    """The names in a folder, but for locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_encoded_once(tmp_path, cpu):
    assert encoded(tmp_path, cpu) == list(range(40))
    assert encoded(tmp_path, cpu) == []
    assert [name.partition(".")[2] for name in files(tmp_path)] == ["json", "npy"]


@pytest.mark.parametrize("what", MADE_FROM)
def test_the_name_says_what_it_was_made_from(what, tmp_path, cpu):
    """Other content has a file of its own, and the first one stays."""
    encoded(tmp_path, cpu)
    assert encoded(tmp_path, cpu, {**MADE_FROM, what: "another"}) == list(range(40))
    assert len(files(tmp_path)) == 4
    assert encoded(tmp_path, cpu) == []


def a_bit(path, record):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def its_end(path, record):
    path.write_bytes(path.read_bytes()[:-4])


def all_of_it(path, record):
    path.write_bytes(b"")


def its_record(path, record):
    record.unlink()


def the_record_of_others(path, record):
    record.write_text(json.dumps({**json.loads(record.read_text()), "provenance": "others"}))


def its_type(path, record):
    np.save(path, np.load(path).view(np.int32))


@pytest.mark.parametrize("damage", [a_bit, its_end, all_of_it, its_record, the_record_of_others,
                                    its_type])
def test_what_is_damaged_is_made_again(damage, tmp_path, cpu, capsys):
    encoded(tmp_path, cpu)
    path = next(tmp_path.glob("*.npy"))
    damage(path, path.with_suffix(".json"))
    assert encoded(tmp_path, cpu) == list(range(40))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{path}: damaged or not whole; the images are encoded again"]
    assert encoded(tmp_path, cpu) == []


def test_a_copy_is_as_good(tmp_path, cpu):
    """Copied to another disk, its times are others, and its content is what it was."""
    encoded(tmp_path, cpu)
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert encoded(tmp_path / "copy", cpu) == []


def test_stopped_while_encoding(tmp_path, cpu):
    """Nothing is left that a later call would take for whole; a killed process's file goes."""
    class Stopped(Exception):
        pass

    def stop(rows):
        if rows.start:
            raise Stopped
        return MOMENTS[rows.start:rows.stop]
    with pytest.raises(Stopped):
        latent_cache.kept(tmp_path / "set", MADE_FROM, SHAPE, stop, cpu)
    assert files(tmp_path) == []
    name = latent_cache.path_of(tmp_path / "set", MADE_FROM).name
    (tmp_path / f"{name}.npy.0123abcd.partial").touch()
    encoded(tmp_path, cpu)
    assert len(files(tmp_path)) == 2


def test_another_process_encoded_them_meanwhile(tmp_path, cpu, monkeypatch):
    """This one waits for the lock, and looks again."""
    lock = latent_cache.lock

    def meanwhile(path):
        monkeypatch.setattr(latent_cache, "lock", lock)
        encoded(tmp_path, cpu)
        return lock(path)
    monkeypatch.setattr(latent_cache, "lock", meanwhile)
    assert encoded(tmp_path, cpu) == []


def test_a_full_disk(tmp_path, cpu, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(latent_cache.UserError, match="--pack-dir: cannot write .*No space left"):
        encoded(tmp_path, cpu)
    assert files(tmp_path) == []


def test_each_process_encodes_its_share(tmp_path):
    """Batches in turn, so that they are one process's; both have all of it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    p = torchrun(tmp_path / "script.py", tmp_path)
    text = p.communicate(timeout=120)[0]
    assert p.returncode == 0, text
    results = [disk.read_json(tmp_path / f"rank{rank}.json") for rank in (0, 1)]
    assert results == [[[[0, 16], [32, 40]], True], [[[16, 32]], True]]
    again = torchrun(tmp_path / "script.py", tmp_path)
    assert again.wait(120) == 0
    assert [disk.read_json(tmp_path / f"rank{r}.json") for r in (0, 1)] == [[[], True]] * 2
