"""Files: written whole or not at all, read without surprises.

    disk.write_json(path, value)            # under a temporary name, then renamed
    ckpt = disk.load(path, ["diffusion"])   # tensors and plain types only
    with disk.lock(out, rt=rt): ...         # no other process writes to this folder

A file under its real name is whole.
"""
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from runtime import UserError

try:
    import fcntl
except ImportError:         # Windows: no locks there
    fcntl = None

FORMAT = "capacity-manipulation/1"      # the first thing in every file that torch.save writes here


# --------------------------------------------------------------------------------------------------
# Writing: under a temporary name, then renamed

def write_atomic(path, write, flag="--out"):
    """Call write(file), a binary file of a temporary name, then rename it to `path`.

    On failure the old file remains. Raises UserError that names `flag`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)       # of a killed process with this number
        try:
            with open(temporary, "xb") as f:    # a new file, never another one through a link
                write(f)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path, flag="--out"):
    """Turns a failure to write `path` into a UserError that names the file and the flag."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        # torch.save raises a RuntimeError while it handles the disk's own error
        why = e if isinstance(e, OSError) else e.__context__
        if not isinstance(why, OSError):
            raise
        raise UserError(f"{flag}: cannot write {path} ({why}); free some space or choose another "
                        f"folder with {flag}") from e


def write_text(path, text, flag="--out"):
    """Write a text file, atomically."""
    write_atomic(path, lambda f: f.write(text.encode()), flag)


def write_json(path, value, flag="--out"):
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n", flag)


def write_npz(path, flag="--out", **arrays):
    """Write named arrays as an .npz, atomically."""
    write_atomic(path, lambda f: np.savez(f, **arrays), flag)


def write_png(path, picture):
    """Write a PIL image as a PNG, atomically."""
    write_atomic(path, partial(picture.save, format="png"))


def pyplot():
    """matplotlib.pyplot, for figures that go to files only."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def save_figure(fig, path, suffixes=("png",)):
    """Write a matplotlib figure beside `path` once per suffix, atomically, and close it."""
    for suffix in suffixes:
        write_atomic(Path(path).with_suffix("." + suffix),
                     partial(fig.savefig, dpi=120, format=suffix))
    pyplot().close(fig)


def write_folder(folder, write, kind, flag="--out", **record):
    """Make a whole folder: write(path) fills an empty one beside it, which is then renamed.

    Its export.json says the kind, the names of its files and `record`. Where write fails, the
    folder that it would replace remains. Raises UserError as refuse_other_folder.
    """
    folder = Path(os.path.abspath(folder))
    refuse_other_folder(folder, kind, flag)
    new = folder.with_name(f".{folder.name}.new")
    with writing(folder, flag):
        shutil.rmtree(new, ignore_errors=True)      # of a process that was killed
        new.mkdir(parents=True)
        try:
            write(new)
            write_json(new / "export.json", {"format": FORMAT, "kind": kind, **record,
                                             "files": files_in(new)}, flag)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def refuse_other_folder(folder, kind, flag="--out"):
    """Raise UserError where write_folder would destroy what it has not written itself."""
    made = read_json(Path(folder) / "export.json")
    ours = isinstance(made, dict) and made.get("kind") == kind
    known = {"export.json", *made["files"]} if ours else set()
    if Path(folder).is_file() or set(files_in(folder)) - known:
        raise UserError(f"{flag} {folder}: holds something else than an earlier call with {flag} "
                        "wrote; choose another name, or move it")


def files_in(folder):
    """The names of all files in a folder, however deep, sorted."""
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*")
                  if not p.is_dir())


# --------------------------------------------------------------------------------------------------
# Before a write: is the place free, and whose is it?

@contextmanager
def lock(folder, flag="--out", rt=None, name=".lock", wait=False):
    """This process alone writes to `folder` meanwhile; the lock of one that has ended is free.

    Where another process has it: UserError, or with `wait` a line and patience. rt: the Runtime of
    several processes that write together; rank 0 takes the lock, and all leave where it cannot.
    """
    def take():
        """Create the folder and its lock file, and lock that."""
        with writing(folder, flag):
            Path(folder).mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(Path(folder) / name, "a"))
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if not wait:
                raise UserError(f"{flag} {folder}: another process is writing there; wait for it, "
                                "or choose another folder") from e
            print(f"waiting for another process that writes to {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
    with ExitStack() as held:
        rt.on_rank_0(take) if rt else take()
        yield


def check_writable(path, flag="--out"):
    """Raise UserError where no file can be written at `path`: before the work, not after it."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag} {path}: a folder; name a file")
    trial = path.with_name(f".{path.name}.try")
    write_atomic(trial, lambda f: None, flag)
    trial.unlink()


def refuse_overwriting(path, is_same_kind, flag, kind):
    """Raise UserError where `path` holds a file of another kind, which writing would destroy.

    is_same_kind(path) -> bool. kind: what the flag writes, in words.
    """
    if Path(path).exists() and not (Path(path).is_file() and is_same_kind(path)):
        raise UserError(f"{flag} {path}: there is a file that is not {kind}; choose another name, "
                        "or remove it")


# --------------------------------------------------------------------------------------------------
# Reading, and what says whether a thing is still the same

def read_json(path):
    """The value in a JSON file, or None where there is no such file or it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_pairs(path, flag):
    """{first: second} of the lines FIRST,SECOND of a CSV file. Raises UserError with `flag`."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            return {row[0].strip(): row[1].strip() for row in csv.reader(f) if len(row) > 1}
    except (OSError, ValueError) as e:
        raise UserError(f"{flag} {path}: cannot be read ({e})") from e


def up_to_date(path, settings):
    """Whether a JSON file says under "settings" that its output was made with just `settings`."""
    result = read_json(path)
    made_with = result.get("settings") if isinstance(result, dict) else None
    return made_with == json.loads(json.dumps(settings))


def settings_replaced(path, settings):
    """The "settings" of a JSON file that are others here, as words with its values."""
    old = (read_json(path) or {}).get("settings", settings)
    words = {name: f"{name} {old.get(name)}" for name, value in settings.items()
             if old.get(name) != json.loads(json.dumps(value))}
    return [text if len(text) < 50 else name for name, text in words.items()]


def settings_id(settings):
    """A name of 16 letters and digits for settings: others have another one."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def git_commit():
    """The commit of this checkout, with -dirty where files differ, or None: for readers only."""
    root = Path(__file__).parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    words = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    found = subprocess.run(words, cwd=root, capture_output=True, text=True)
    return found.stdout.strip() or None


def sha256(path):
    """The SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(paths, root):
    """A hash of the names, sizes and times of change of files: the identity of a folder's content.

    Both times: a program can set the first one back, not the second.
    """
    digest = hashlib.sha256()
    for path in paths:
        stat = os.stat(path)
        name = os.path.relpath(path, root)
        digest.update(os.fsencode(f"{name} {stat.st_size} {stat.st_mtime_ns} "
                                  f"{stat.st_ctime_ns}\n"))
    return digest.hexdigest()


def path_id(path):
    """A name such as images-1a2b3c4d for a path that ends in images: other folders differ."""
    path = Path(path).resolve()
    return f"{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


# --------------------------------------------------------------------------------------------------
# Checkpoints

class Checkpoint(dict):
    """What `load` returns: the content of a file, and `sha256`, the file's hash."""
    sha256: str


def save(path, value, flag="--out"):
    """torch.save a dict of tensors and plain types, marked as ours, atomically."""
    write_atomic(path, lambda f: torch.save({"format": FORMAT, **value}, f), flag)


def load(path, kinds, flag="--ckpt"):
    """Read what `save` wrote, on the CPU, with weights_only=True: a Checkpoint.

    kinds: what may stand under "kind" in the file, such as ["diffusion", "consistency"]. Raises
    UserError with `flag`.
    """
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: there is no such file; name the ckpt.pt of a run")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:      # of many kinds: torch passes on what it meets in the file
        raise UserError(f"{flag} {path}: not a whole checkpoint (cut short, damaged or of another "
                        "program)") from e
    ours = isinstance(value, dict) and value.get("format") == FORMAT
    if not ours or value.get("kind") not in kinds:
        raise UserError(f"{flag} {path}: not a {' or '.join(kinds)} checkpoint of this project")
    ckpt = Checkpoint(value)
    ckpt.sha256 = sha256(path)
    return ckpt
