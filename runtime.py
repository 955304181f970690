"""What the scripts would otherwise each repeat: errors, devices, processes, seeds, files, resuming.

Every script's last line is `run(main)`: a user's mistake (UserError) becomes one line on stderr
and exit code 2.
"""
import argparse
import hashlib
import json
import math
import os
import pickle
import shlex
import signal
import sys
import warnings
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

FORMAT = "capacity-manipulation/1"      # the first thing in every file that torch.save writes here
RENAMED = {     # settings in older checkpoints and results: what they are called now
    "split_seed": "tail_seed", "split_rule": "group_rule", "num_split": "num_group"}


# --------------------------------------------------------------------------------------------------
# Errors and the command line

class UserError(Exception):
    """A mistake that the user can fix: the message names the flag and the fix. No traceback."""


def run(main):
    """Call main(); a UserError becomes one line (from rank 0) and exit code 2."""
    code = 0
    try:
        main()
    except UserError as e:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {e}", file=sys.stderr, flush=True)
        code = 2
    except torch.OutOfMemoryError as e:
        why = str(e).splitlines()[0]
        print("error: out of memory on the device; take a smaller --batch-size, or in train.py a "
              f"larger --accumulate ({why})", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    except SystemExit as e:
        code = e.code or 0
    finally:
        distributed = dist.is_initialized()
        if distributed:
            dist.destroy_process_group()
    if distributed:
        # Without shutting the interpreter down: a gloo thread that still needs it would abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviations, and the flags that every script has."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(message)

    def add_common(self, out):
        """--device --dtype --seed --out; `out` is the help text of --out."""
        g = self.add_argument_group("every script")
        g.add_argument("--device", default="auto",
                       help="auto (cuda where there is one, else cpu), or a torch device")
        g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                       help="what the network computes in; weights stay float32. auto: what the "
                       "checkpoint was trained in, else bfloat16 where the device has it")
        g.add_argument("--seed", type=integer(0), default=0,
                       help="everything random follows from it (default: 0)")
        g.add_argument("--out", help=out)


def integer(low, high=None):
    """An argparse type: an int in [low, high]."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if value < low or (high is not None and value > high):
            most = "" if high is None else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"must be at least {low}{most}, not {value}")
        return value
    return parse


def number(low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite float in [low, high] and greater than `above`."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
        if not (math.isfinite(value) and low <= value <= high and value > above):
            least = f"greater than {above:g}" if above > low else f"at least {low:g}"
            most = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"must be {least}{most}, not {text}")
        return value
    return parse


def command_line(script):
    """The command of this process as one would type it: "python SCRIPT --flag value ..."."""
    return shlex.join(["python", script, *sys.argv[1:]])


def progress(iterable=None, **kwargs):
    """A tqdm bar: updated often on a terminal, one line every ten seconds in a log file."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(iterable, mininterval=interval, dynamic_ncols=True, **kwargs)


# --------------------------------------------------------------------------------------------------
# Device, dtype, processes

@dataclass
class Runtime:
    """Where a script runs: its device, the dtype it computes in, its rank among the processes."""
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    def print(self, *words):
        """Print, from rank 0 only."""
        if self.rank == 0:
            print(*words, flush=True)

    def autocast(self):
        """The context in which networks are called: bfloat16 autocast, or nothing for float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def processes(self):
        """ "1 process" or "8 processes"."""
        return "1 process" if self.world == 1 else f"{self.world} processes"

    @contextmanager
    def rank_0_first(self):
        """Within, rank 0 runs while the others wait, then they run: for a file that all read."""
        if self.rank > 0:
            self.maximum(0)
        yield
        if self.rank == 0:
            self.maximum(0)

    def gather(self, arrays):
        """Every rank's list of arrays, concatenated in order of rank, on rank 0; None elsewhere."""
        if self.world == 1:
            return np.concatenate(arrays)
        shares = [None] * self.world if self.rank == 0 else None
        dist.gather_object(arrays, shares)
        if self.rank > 0:
            return None
        return np.concatenate([a for share in shares for a in share])

    def parallel(self, module, broadcast_buffers=False):
        """The module under DistributedDataParallel where there are several processes.

        broadcast_buffers: send rank 0's buffers (batch norm's statistics) to the others each step.
        """
        if self.world == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.14 renames broadcast_buffers; earlier versions know no other name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(module, devices, broadcast_buffers=broadcast_buffers,
                                           gradient_as_bucket_view=True)

    def agree(self, step, out):
        """Raise UserError where ranks found different steps in `out`, as without a shared disk."""
        if self.maximum(step) != -self.maximum(-step):
            raise UserError(f"--out {out}: the processes find different checkpoints there; "
                            "all nodes must share this folder")

    def maximum(self, value):
        """The largest of every rank's `value` (an int), without waiting for the device."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)      # a CPU tensor: gloo
        return int(tensor)


def dtype_name(dtype):
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def find_device(name):
    """The torch.device that --device asks for. Raises UserError where it cannot be used."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        # The noise schedule is kept in float64, which not every device has
        torch.zeros(1, device=device, dtype=torch.float64)
    except (RuntimeError, AssertionError, TypeError) as e:
        why = str(e).splitlines()[0]
        raise UserError(f"--device {name}: this machine cannot use it ({why})") from e
    return device


def setup(device="auto", dtype="auto"):
    """Join torchrun's processes if there are any, choose device and dtype; return a Runtime."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # float32 is float32, in every script
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # Hours: the others wait while rank 0 packs 437,513 images or computes the metrics
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    bfloat16 = dtype == "bfloat16" or (dtype == "auto" and computes_bfloat16(device))
    return Runtime(device, torch.bfloat16 if bfloat16 else torch.float32, rank, world)


def computes_bfloat16(device):
    """Whether the device multiplies bfloat16 in hardware, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return False


def wants_compile(args, rt):
    """--compile or --no-compile; where neither is given, whether the device is CUDA."""
    return rt.device.type == "cuda" if args.compile is None else args.compile


def compile_or_not(module, loss_of, rt):
    """torch.compile(module), or the module itself, with a line, where that fails.

    loss_of(compiled) is run forwards and backwards once, as a trial. It leaves no trace: gradients
    are dropped, and buffers, such as batch norm's statistics, are what they were.
    """
    compiled = torch.compile(module)
    before = [b.clone() for b in module.buffers()]
    try:
        with rt.autocast():
            loss = loss_of(compiled)
        loss.backward()
        return compiled
    except torch.OutOfMemoryError:
        raise
    except Exception as e:      # whatever a missing or broken compiler raises; training goes on
        why = next(iter(str(e).strip().splitlines()), "")[:160]
        rt.print(f"--compile: cannot compile here ({type(e).__name__}: {why}), going on without")
        return module
    finally:
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for b, value in zip(module.buffers(), before):
                b.copy_(value)


class StopSignal:
    """Turns SIGTERM and SIGINT into `number`: 0, or the signal. A second one ends the process."""

    def __init__(self):
        self.number = 0
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, self.catch)

    def catch(self, number, frame):
        """The handler: remember the signal, and restore the default action for the next one."""
        self.number = number
        signal.signal(number, signal.SIG_DFL)


# --------------------------------------------------------------------------------------------------
# Seeds: everything random is a pure function of (seed, what, which)

def seed_of(*parts):
    """A 63-bit seed from integers and strings, the same everywhere: seed_of(seed, "step", 12)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device, *parts):
    """A torch.Generator on `device`, seeded by seed_of(*parts)."""
    return torch.Generator(device=device).manual_seed(seed_of(*parts))


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
    except (OSError, RuntimeError) as e:        # torch.save reports a full disk as a RuntimeError
        raise UserError(f"{flag}: cannot write {path} ({e}); free some space or choose another "
                        f"folder with {flag}") from e


def write_text(path, text, flag="--out"):
    """Write a text file, atomically."""
    write_atomic(path, lambda p: p.write_text(text), flag)


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


def save_figure(fig, path, suffixes=("png",), dpi=120):
    """Write a matplotlib figure beside `path` once per suffix, atomically, and close it."""
    for suffix in suffixes:
        def write(temporary, suffix=suffix):
            fig.savefig(temporary, dpi=dpi, format=suffix)
        write_atomic(Path(path).with_suffix("." + suffix), write)
    pyplot().close(fig)


def read_json(path):
    """The value in a JSON file, or None where there is no such file or it is not JSON."""
    try:
        return json.loads(Path(path).read_text())
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


def sha256(path):
    """The SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Checkpoints, and runs that go on

def save(path, value):
    """torch.save a dict of tensors and plain types, marked as ours, atomically."""
    write_atomic(path, lambda p: torch.save({"format": FORMAT, **value}, p))


def load(path, kinds, flag="--ckpt"):
    """Read what `save` wrote, on the CPU, with weights_only=True. Raises UserError with `flag`.

    kinds: what may stand under "kind" in the file, some of "diffusion", "consistency", "latent"
    and "classifier". Its "config" has today's names of the settings.
    """
    if Path(path).is_dir():
        raise UserError(f"{flag} {path}: a folder; name the ckpt.pt in it")
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: there is no such file")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError,
            zipfile.BadZipFile) as e:
        raise UserError(f"{flag} {path}: not a whole checkpoint (cut short, damaged or of another "
                        "program)") from e
    ours = isinstance(value, dict) and value.get("format") == FORMAT
    if not ours or value.get("kind") not in kinds:
        raise UserError(f"{flag} {path}: not a {' or '.join(kinds)} checkpoint of this project")
    if "config" in value:
        value["config"] = renamed(value["config"])
    return value


def resume(args, kinds):
    """(the checkpoint in args.out or None, a Runtime): a run goes on in the dtype it began with.

    args.dtype becomes what "auto" came to, so that the run keeps it on any device.
    """
    path = Path(args.out) / "ckpt.pt"
    old = load(path, kinds, "--out") if path.exists() else None
    keeps = old is not None and args.dtype == "auto"
    rt = setup(args.device, old["config"]["dtype"] if keeps else args.dtype)
    args.dtype = dtype_name(rt.dtype)
    return old, rt


def refuse_changes(old, config, out, defaults, resumable):
    """Raise UserError for the first setting that is not the one of the run in `out`.

    old, config: settings of the checkpoint and of this command. resumable: names of those that may
    change. defaults: what a flag was that did not exist when the checkpoint was made.
    """
    for key, value in config.items():
        was = old.get(key, defaults.get(key))
        if key not in resumable and was != value:
            flag = "--" + key.removesuffix("_sha256").replace("_", "-")
            raise UserError(f"{flag} {value}: the run in {out} was started with {was}; repeat that "
                            "to resume it, or choose another folder with --out")
