"""What the scripts would otherwise each repeat: errors in one line, device, dtype, processes, seeds, files.

Every script's last line is `run(main)`: a user's mistake (UserError) becomes one line on stderr and exit code 2.
"""
import argparse
import hashlib
import json
import math
import os
import pickle
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


# ----------------------------------------------------------------------------------------------------------------------
# Errors and the command line

class UserError(Exception):
    """A mistake that the user can mend: the message names the flag and the fix. No traceback is shown."""


def run(main):
    """Call main(); a UserError becomes one line (from rank 0) and exit code 2."""
    code, distributed = 0, False
    try:
        main()
    except UserError as e:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {e}", file=sys.stderr, flush=True)
        code = 2
    except torch.OutOfMemoryError as e:
        print(f"error: out of memory on the device; take a smaller --batch-size, or in train.py a larger --accumulate ({str(e).splitlines()[0]})",
              file=sys.stderr, flush=True)
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
    if distributed:         # without taking the interpreter down: a thread of gloo's that still wants it then aborts
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that --help can follow, no abbreviations, and the flags every script has."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(message)

    def add_common(self, out):
        """--device --dtype --seed --out; `out` is the help text of --out."""
        g = self.add_argument_group("every script")
        g.add_argument("--device", default="auto", help="auto (cuda where there is one, else cpu), or a torch device")
        g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="what the network computes in; "
                       "weights stay float32. auto: what the checkpoint was trained in, else bfloat16 where the device has it")
        g.add_argument("--seed", type=integer(0), default=0, help="everything random follows from it (default: 0)")
        g.add_argument("--out", help=out)


def integer(low, high=None):
    """An argparse type: an int in [low, high]."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be at least {low}" + (f" and at most {high}" if high is not None else "")
                                             + f", not {value}")
        return value
    return parse


def number(low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite float in [low, high] and greater than `above`."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}")
        if not (math.isfinite(value) and low <= value <= high and value > above):
            least = f"greater than {above:g}" if above > low else f"at least {low:g}"
            most = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"must be {least}{most}, not {text}")
        return value
    return parse


def progress(iterable=None, **kwargs):
    """A tqdm bar: lively on a terminal, one line every ten seconds in a log file."""
    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 10, dynamic_ncols=True, **kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# Device, dtype, processes

@dataclass
class Runtime:
    """Where a script runs: its device, the dtype it computes in, its rank among `world` processes."""
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
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    @contextmanager
    def rank_0_first(self):
        """Within, rank 0 runs while the others wait, then they run: for work that leaves a file which all read."""
        if self.rank > 0:
            self.maximum(0)
        yield
        if self.rank == 0:
            self.maximum(0)

    def gather(self, arrays):
        """Every rank's list of arrays, concatenated in the order of ranks, on rank 0; None elsewhere."""
        if self.world == 1:
            return np.concatenate(arrays)
        shares = [None] * self.world if self.rank == 0 else None
        dist.gather_object(arrays, shares)
        return np.concatenate([a for share in shares for a in share]) if self.rank == 0 else None

    def parallel(self, module):
        """The module under DistributedDataParallel where there are several processes; its buffers are not sent around."""
        if self.world == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():         # torch 2.14 renames broadcast_buffers; earlier ones know no other name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(module, devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def agree(self, step, out):
        """Raise UserError where ranks found runs at different steps in `out`, as nodes without a shared disk do."""
        if self.maximum(step) != -self.maximum(-step):
            raise UserError(f"--out {out}: the processes find different checkpoints there; all nodes must share this folder")

    def maximum(self, value):
        """The largest of every rank's `value` (an int): how ranks agree, without waiting for the device."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)      # a CPU tensor: gloo
        return int(tensor)


def setup(device="auto", dtype="auto"):
    """Join torchrun's processes if there are any, choose the device and the dtype; return a Runtime."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device, dtype=torch.float64)      # which the noise schedule is kept in, and not every device has
    except (RuntimeError, AssertionError, TypeError) as e:
        raise UserError(f"--device {device}: this machine cannot use it ({str(e).splitlines()[0]})")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False     # float32 is float32, in every script
    if "RANK" in os.environ and not dist.is_initialized():
        # Hours, because the others wait where rank 0 packs a data set of 437,513 images or computes the metrics
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    native = dtype == "auto" and computes_bfloat16(device)
    return Runtime(device, torch.bfloat16 if native or dtype == "bfloat16" else torch.float32, rank, world)


def computes_bfloat16(device):
    """Whether the device multiplies bfloat16 in hardware, so that it is faster than float32 there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return False


def compile_or_not(module, loss_of, rt):
    """torch.compile(module) once loss_of(compiled) has run forwards and backwards, or the module as it is, with a line.

    The trial leaves no trace: gradients are dropped, and buffers, such as batch norm's statistics, are what they were.
    """
    compiled, before = torch.compile(module), [b.clone() for b in module.buffers()]
    try:
        with rt.autocast():
            loss = loss_of(compiled)
        loss.backward()
        return compiled
    except torch.OutOfMemoryError:
        raise
    except Exception as e:          # whatever a missing or broken compiler raises; training goes on without it
        why = next(iter(str(e).strip().splitlines()), "")[:160]
        rt.print(f"--compile: cannot compile here ({type(e).__name__}: {why}), going on without")
        return module
    finally:
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for b, value in zip(module.buffers(), before):
                b.copy_(value)


class StopSignal:
    """Turns SIGTERM and SIGINT into a number to look at: 0, or the signal; a second signal ends the process at once."""

    def __init__(self):
        self.number = 0
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, self.catch)

    def catch(self, number, frame):
        """The handler: remember the signal, and restore the default action for the next one."""
        self.number = number
        signal.signal(number, signal.SIG_DFL)


# ----------------------------------------------------------------------------------------------------------------------
# Seeds: everything random is a pure function of (seed, what, which)

def seed_of(*parts):
    """A 63-bit seed from integers and strings, the same on every machine: seed_of(seed, "step", 12)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device, *parts):
    """A torch.Generator on `device`, seeded by seed_of(*parts)."""
    return torch.Generator(device=device).manual_seed(seed_of(*parts))


# ----------------------------------------------------------------------------------------------------------------------
# Files: written under a temporary name and renamed, so that what stands under the real name is whole

def write_atomic(path, write, flag="--out"):
    """Call write(temporary path), then rename it to `path`; on failure the old file stands. Raises UserError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, flag):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()              # what is left where writing failed or was interrupted


@contextmanager
def writing(path, flag="--out"):
    """Within, a failure to write becomes a UserError that names the file and the flag."""
    try:
        yield
    except (OSError, RuntimeError) as e:        # torch.save reports a full disk as a RuntimeError
        raise UserError(f"{flag}: cannot write {path} ({e}); free some space or choose another folder with {flag}")


def write_json(path, value, flag="--out"):
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"), flag)


def read_json(path):
    """The value in a JSON file, or None where there is no such file or it is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None


def read_record(npz):
    """What sample.py wrote in the JSON beside an .npz: its "settings" and "data", dicts; {} where it wrote none."""
    record = read_json(Path(npz).with_suffix(".json"))
    return {k: record[k] for k in ("settings", "data") if isinstance(record.get(k), dict)} if isinstance(record, dict) else {}


def refuse_changes(old, new, out, defaults):
    """Raise UserError for the first of a run's new settings that is not the one in its checkpoint.

    defaults: what a flag was that did not exist when the checkpoint was made.
    """
    for key, value in new.items():
        was = old.get(key, defaults.get(key))
        if was != value:
            flag = "--" + key.removesuffix("_sha256").replace("_", "-")
            raise UserError(f"{flag} {value}: the run in {out} was started with {was}; repeat that to resume it, "
                            f"or choose another folder with --out")


def save(path, value):
    """torch.save a dict of tensors and plain types, marked as ours, atomically."""
    write_atomic(path, lambda p: torch.save({"format": FORMAT, **value}, p))


def load(path, kinds, flag="--ckpt"):
    """Read what `save` wrote, on the CPU, with weights_only=True. Raises UserError that names `flag`.

    kinds: what may stand under "kind" in the file, some of "diffusion", "consistency", "latent" and "classifier".
    """
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: " + ("a folder; name the ckpt.pt in it" if Path(path).is_dir() else "there is no such file"))
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise UserError(f"{flag} {path}: not a whole checkpoint (cut short, damaged or of another program)")
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("kind") not in kinds:
        raise UserError(f"{flag} {path}: not a {' or '.join(kinds)} checkpoint of this project")
    return value


def sha256(path):
    """The SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def up_to_date(record, settings):
    """Whether the JSON file `record` says under "settings" that its output was made with exactly `settings`."""
    return (read_json(record) or {}).get("settings") == json.loads(json.dumps(settings))
