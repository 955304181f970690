"""Files: written whole or not at all, read without surprises; results that name what made them.

    disk.write_json(path, value)            # under a temporary name, then renamed
    ckpt = disk.load(path, ["diffusion"])   # tensors and plain types only
    with disk.claim(out, rt): ...           # no other process writes to this folder

A file under its real name is whole. What is reused says what it was made from: `up_to_date`.
"""
import ast
import hashlib
import json
import os
import pickle
import re
import secrets
import shutil
import sys
import zipfile
import zlib
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch

from runtime import UserError, code_of, flag_of, setup

try:
    import fcntl
except ImportError:         # Windows: no locks there
    fcntl = None

FORMAT = "capacity-manipulation/1"      # the first thing in every file that torch.save writes here
REQUIRED = {    # what a file of each kind must hold
    "diffusion": {"network", "rank_ratio", "experts", "model", "ema", "config", "data", "step"},
    "latent": {"adapters", "ema", "config", "data", "step"},
    "autoencoder": {"network", "model", "ema", "config", "data", "step", "scale"},
    "text": {"network", "rank_ratio", "model", "ema", "config", "data", "step"},
    "classifier": {"network", "model", "config", "data"},
}
REQUIRED["consistency"] = REQUIRED["diffusion"]
TYPES = {       # of what is there; class names and dtype every script needs
    "network": dict, "model": dict, "ema": dict, "adapters": dict, "config": dict, "data": dict,
    "step": int, "command": str}
RENAMED = {     # settings in older checkpoints and results: what they are called now
    "split_seed": "tail_seed", "split_rule": "group_rule", "num_split": "num_group"}


# --------------------------------------------------------------------------------------------------
# Files: written under a temporary name and renamed, so that a file under its real name is whole

def write_atomic(path, write, flag="--out"):
    """Call write(temporary path), then rename it to `path`; on failure the old file remains.

    Raises UserError that names `flag`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, flag):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()              # what is left where writing failed


@contextmanager
def writing(path, flag="--out"):
    """Within, a failure to write becomes a UserError that names the file and the flag."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        # torch.save raises a RuntimeError while it handles the disk's own error
        why = e.__context__ if isinstance(e.__context__, OSError) else e
        raise UserError(f"{flag}: cannot write {path} ({why}); free some space or choose another "
                        f"folder with {flag}") from e


def check_writable(path, flag="--out"):
    """Raise UserError where no file can be written at `path`: before the work, not after it.

    Leaves nothing behind: what is refused later has made no folder.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag} {path}: a folder; name a file")
    if path.exists() and not path.is_file():        # a pipe would be waited for, /dev/null replaced
        raise UserError(f"{flag} {path}: not a regular file; choose another name")
    new = [folder for folder in path.parents if not folder.exists()]    # the deepest one first
    trial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.try")
    try:
        write_atomic(trial, lambda p: p.touch(), flag)
        trial.unlink()
    finally:
        with suppress(OSError):         # another process may have put a file there
            for folder in new:
                folder.rmdir()


def refuse_overwriting(path, is_same_kind, flag, kind):
    """Raise UserError where `path` holds a file of another kind, which writing would destroy.

    is_same_kind(path) -> bool. kind: what the flag writes, in words.
    """
    if Path(path).exists() and not (Path(path).is_file() and is_same_kind(path)):
        raise UserError(f"{flag} {path}: there is a file that is not {kind}; choose another name, "
                        "or remove it")


@contextmanager
def lock(path, busy=None):
    """Within, this process alone holds the lock file `path`; an ended process holds none.

    busy: the UserError where another process holds it; None waits for it, and says so.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        if fcntl:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                if busy:
                    raise UserError(busy) from e
                print(f"waiting for the process that holds {path}", file=sys.stderr, flush=True)
                fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextmanager
def claim(out, rt, flag="--out"):
    """Within, this run alone writes to the folder `out`; what killed runs left half-written goes.

    Raises UserError, on every rank, where another process has the folder.
    """
    out = Path(out)
    held = None

    def take():
        nonlocal held
        busy = f"{flag} {out}: another process is writing there; wait for it, or choose another"
        with writing(out, flag):
            held = lock(out / ".lock", busy)
            held.__enter__()
        for path in filter(is_left_over, out.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    rt.on_rank_0(take)
    try:
        yield
    finally:
        if held:
            held.__exit__(None, None, None)


@contextmanager
def claim_run(out, rt, old):
    """`claim`, for a run that goes on from `old`, what `resume` found in `out` earlier.

    Raises UserError where another process has written another checkpoint there since then.
    """
    path = Path(out) / "ckpt.pt"

    def refuse_other():
        now = sha256(path) if path.exists() else None
        if now != (old.sha256 if old else None):
            raise UserError(f"--out {out}: another process has written there meanwhile; start "
                            "again, or choose another folder")
    with claim(out, rt):
        rt.on_rank_0(refuse_other)
        yield


def is_left_over(path):
    """Whether a path is a temporary one of this project, and of no other process that runs."""
    name = re.fullmatch(r"\..+\.(\d{1,7})\.tmp", path.name, re.ASCII)
    if not name or path.is_symlink():
        return False
    pid = int(name[1])
    return pid == os.getpid() or not is_alive(pid)


def is_alive(pid):
    """Whether there is a process of this number; on Windows, which cannot be asked, always."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True             # it is another user's
    return True


def write_text(path, text, flag="--out"):
    """Write a text file, atomically."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"), flag)


def write_json(path, value, flag="--out"):
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n", flag)


def write_npz(path, flag="--out", **arrays):
    """Write named arrays as an .npz, atomically."""
    def write(temporary):
        with open(temporary, "wb") as f:
            np.savez(f, **arrays)
    write_atomic(path, write, flag)


def write_png(path, picture):
    """Write a PIL image as a PNG, atomically."""
    write_atomic(path, lambda p: picture.save(p, format="png"))


def pyplot():
    """matplotlib.pyplot, for figures that go to files only."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def in_figure(text):
    """A name for matplotlib: dollars enclose no formula, a leading "_" hides no legend entry.

    "_" stands for what cannot be printed: names that are not UTF-8 would end in a TypeError.
    """
    text = "".join(c if c.isprintable() else "_" for c in " ".join(text.split()))
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def save_figure(fig, path, suffixes=("png",), dpi=120):
    """Write a matplotlib figure beside `path` once per suffix, atomically, and close it."""
    for suffix in suffixes:
        def write(temporary, suffix=suffix):
            fig.savefig(temporary, dpi=dpi, format=suffix)
        write_atomic(Path(path).with_suffix("." + suffix), write)
    pyplot().close(fig)


def read_json(path):
    """The value in a JSON file, or None where there is no such file or it is not JSON."""
    if not Path(path).is_file():        # a pipe would be waited for
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def renamed(settings):
    """A dict of settings with today's names, from one with names of any age."""
    return {RENAMED.get(key, key): value for key, value in settings.items()}


def read_result(path):
    """The JSON that evaluate.py, classify.py or prune_probe.py wrote, with today's names; or None.

    Older files call the groups Many, Medium and Few "splits".
    """
    result = read_json(path)
    if not isinstance(result, dict):
        return None
    if "splits" in result:
        result = {"groups" if key == "splits" else key: value for key, value in result.items()}
    if isinstance(result.get("settings"), dict):
        result["settings"] = renamed(result["settings"])
    return result


def same_settings(a, b):
    """Whether two dicts of settings are equal, as JSON and under today's names."""
    def plain(settings):
        return json.loads(json.dumps(renamed(settings)))
    return plain(a) == plain(b)


def up_to_date(path, settings):
    """Whether a JSON file says under "settings" that its output was made with just `settings`."""
    result = read_json(path)
    made_with = result.get("settings") if isinstance(result, dict) else None
    return isinstance(made_with, dict) and same_settings(made_with, settings)


@cache
def code_hash(script):
    """A hash of the code of a script and of all files of the project that it imports.

    Of what Python reads: comments, docstrings and line breaks do not move it.
    """
    digest = hashlib.sha256()
    for name, tree in sorted(code_of(script, Path(__file__).parent).items()):
        for node in ast.walk(tree):
            if getattr(node, "body", None) and is_docstring(node):
                node.body = node.body[1:]
        digest.update(f"{name} {ast.dump(tree)}".encode())
    return digest.hexdigest()


def is_docstring(node):
    """Whether the body of a part of a syntax tree begins with a text that nothing uses."""
    first = node.body[0] if isinstance(node.body, list) else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and (
        isinstance(first.value.value, str))


def fingerprint(paths, root):
    """A hash of the names, sizes and times of change of files: the identity of a folder's content.

    Both times: a program can set the first one back, not the second. Raises UserError for a file
    that is not there.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror}); fix or remove it") from e
        name = os.path.relpath(path, root)
        digest.update(os.fsencode(f"{name} {stat.st_size} {stat.st_mtime_ns} "
                                  f"{stat.st_ctime_ns}\n"))
    return digest.hexdigest()


def path_id(path):
    """ "images-1a2b3c4d" for a path that ends in images: other folders of this name differ."""
    path = Path(path).resolve()
    return f"{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def short_name(name):
    """A folder's name from any text: without "/", and no longer than a file system takes."""
    name = name.replace("/", "_")
    if len(name.encode()) > 200:        # as with --class-order; the limit is 255 bytes
        start = name.encode()[:190].decode(errors="ignore")
        name = f"{start}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def sha256(path):
    """The SHA-256 of a file, as hex."""
    with open(path, "rb") as f:
        return sha256_of(f)


def sha256_of(f):
    """The SHA-256 of what an open binary file holds from here on, as hex."""
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Checkpoints, and runs that go on

class Checkpoint(dict):
    """What `load` returns: the content of a file, and `sha256`, the hash of just that content."""
    sha256: str


def save(path, value, flag="--out"):
    """torch.save a dict of tensors and plain types, marked as ours, atomically."""
    def write(temporary):
        with open(temporary, "wb") as f:        # given a name, torch hides the disk's own error
            torch.save({"format": FORMAT, **value}, f)
    write_atomic(path, write, flag)


def load(path, kinds, flag="--ckpt"):
    """Read what `save` wrote, on the CPU, with weights_only=True: a Checkpoint.

    kinds: what may stand under "kind" in the file, some of REQUIRED's. Its "config" has
    today's names of the settings. Raises UserError with `flag`.
    """
    if Path(path).is_dir():
        fix = "remove it" if flag == "--out" else "name the ckpt.pt in it"
        raise UserError(f"{flag}: {path} is a folder; {fix}")
    if not Path(path).is_file():
        what = "a link that leads nowhere" if Path(path).is_symlink() else "there is no such file"
        raise UserError(f"{flag} {path}: {what}")
    try:
        # One open file for both: another process may rename a newer one to this path in between
        with open(path, "rb") as f:
            digest = sha256_of(f)
            with zipfile.ZipFile(f) as parts:       # torch does not look at its checksums
                damaged = parts.testzip()
            if damaged:
                raise zipfile.BadZipFile(damaged)
            f.seek(0)
            value = torch.load(f, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError,
            zipfile.BadZipFile, zlib.error, NotImplementedError) as e:
        raise UserError(f"{flag} {path}: not a whole checkpoint (cut short, damaged or of another "
                        "program)") from e
    ours = isinstance(value, dict) and value.get("format") == FORMAT
    if not ours or value.get("kind") not in kinds:
        raise UserError(f"{flag} {path}: not a {' or '.join(kinds)} checkpoint of this project")
    missing = what_is_missing(value)
    if missing:
        raise UserError(f"{flag} {path}: not a whole checkpoint (it lacks {missing[0]!r}, or has "
                        "another kind of it)")
    value["config"] = renamed(value["config"])
    ckpt = Checkpoint(value)
    ckpt.sha256 = digest
    return ckpt


def what_is_missing(value):
    """The names of what a checkpoint of ours should hold and does not, or in another kind."""
    missing = sorted(REQUIRED[value["kind"]] - set(value))
    missing += [key for key, kind in TYPES.items() if not isinstance(value.get(key, kind()), kind)]
    if missing:
        return missing
    needed = {"class_names": (value["data"], list), "dtype": (value["config"], str)}
    return [key for key, (part, kind) in needed.items() if not isinstance(part.get(key), kind)]


def resume(args, kinds):
    """(the checkpoint in args.out or None, a Runtime): a run goes on in the dtype it began with.

    args.dtype becomes what "auto" came to, so that the run keeps it on any device.
    """
    path = Path(args.out) / "ckpt.pt"
    # A link that leads nowhere is a run on a disk that is not there, not a new one
    old = load(path, kinds, "--out") if os.path.lexists(path) else None
    keeps = old is not None and args.dtype == "auto"
    rt = setup(args.device, old["config"]["dtype"] if keeps else args.dtype)
    args.dtype = rt.dtype_name()
    return old, rt


def refuse_changes(old, config, out, defaults, resumable):
    """Raise UserError for the first setting that is not the one of the run in `out`.

    old, config: settings of the checkpoint and of this command. resumable: names of those that may
    change. defaults: what a flag was that did not exist when the checkpoint was made.
    """
    for key, value in config.items():
        was = old.get(key, defaults.get(key))
        if key not in resumable and was != value:
            name = key.removesuffix("_sha256")
            flag = flag_of(name)
            if name != key:
                raise UserError(f"{flag} {config.get(name)}: not the file that the run in {out} "
                                "was started with; put that one back, or choose another folder "
                                "with --out")
            raise UserError(f"{flag} {value}: the run in {out} was started with {was}; repeat that "
                            "to resume it, or choose another folder with --out")
