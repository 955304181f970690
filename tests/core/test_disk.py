"""disk.py: files are whole or not there, folders have one writer, results name what made them."""
import errno
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, refuses

import disk
import train
from runtime import UserError

def test_a_full_disk_leaves_the_old_checkpoint(capsys, tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    disk.save(run / "ckpt.pt", {"kind": "diffusion", "step": 1})
    before = (run / "ckpt.pt").read_bytes()

    def full_disk(value, f):
        f.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="--out"):
        disk.save(run / "ckpt.pt", {"kind": "diffusion", "step": 2})
    assert (run / "ckpt.pt").read_bytes() == before and len(list(run.iterdir())) == 1
    (tmp_path / "file").write_text("in the way")
    refuses(capsys, train.main, *tiny, "--steps", 2, "--out", tmp_path / "file/run", says=["--out"])


def test_a_checkpoint_is_plain_types(tmp_path):
    """weights_only=True: nothing in a file is run."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)
    disk.save(tmp_path / "x.pt", {"kind": "text", "step": 3})
    ckpt = disk.load(tmp_path / "x.pt", ["diffusion", "text"])
    assert ckpt["step"] == 3 and ckpt.sha256 == disk.sha256(tmp_path / "x.pt")
    with pytest.raises(UserError, match="--ckpt"):                      # of another kind
        disk.load(tmp_path / "x.pt", ["diffusion"])
    disk.save(tmp_path / "x.pt", {"kind": "diffusion", "model": Evil()})
    with pytest.raises(UserError, match="--ckpt"):
        disk.load(tmp_path / "x.pt", ["diffusion"])
    assert not (tmp_path / "made").exists()


def test_one_process_writes_to_a_folder(tmp_path):
    code = ("import sys, disk\n"
            "with disk.lock(sys.argv[1]): print('has it', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == "has it\n"
    with pytest.raises(UserError, match="--out"), disk.lock(tmp_path):
        pass
    with disk.lock(tmp_path, name=".other"):
        pass
    other.kill()                                # a killed process holds nothing
    other.wait()
    with disk.lock(tmp_path):
        pass


def test_a_folder_is_replaced_where_it_is_an_earlier_one(tmp_path):
    folder = tmp_path / "export"

    def write(text):
        def fill(path):
            (path / "deep").mkdir()
            (path / "deep/x.txt").write_text(text)
        disk.write_folder(folder, fill, "lora", "--lora", settings={"step": 1})
    write("one")
    write("two")
    assert (folder / "deep/x.txt").read_text() == "two"
    record = disk.read_json(folder / "export.json")
    assert record["kind"] == "lora" and record["settings"] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    # Half of it is not written; what another program or the user put there is not replaced
    def half(path):
        (path / "deep").mkdir()
        raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(UserError, match="--lora"):
        disk.write_folder(folder, half, "lora", "--lora")
    with pytest.raises(UserError, match="--pipeline"):
        disk.write_folder(folder, lambda path: None, "pipeline", "--pipeline")
    (folder / "mine.txt").write_text("notes")
    with pytest.raises(UserError, match="--lora"):
        write("three")
    assert (folder / "deep/x.txt").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_temporary_file_is_a_new_one(tmp_path):
    """Where a link has its name, the file behind the link stays as it is."""
    (tmp_path / "other").write_text("of somebody else")
    temporary = tmp_path / f".x.json.{os.getpid()}.tmp"
    temporary.symlink_to(tmp_path / "other")
    disk.write_json(tmp_path / "x.json", 1)
    assert (tmp_path / "other").read_text() == "of somebody else"
    assert disk.read_json(tmp_path / "x.json") == 1 and not temporary.is_symlink()
