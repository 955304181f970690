"""What the scripts would otherwise each repeat: errors, flags, devices, processes, seeds.

Every script's last line is `run(main)`: a user's mistake (UserError) becomes one line on stderr
and exit code 2. Before it, the Python files that --plugin names are imported: they add entries to
the tables losses.BASES, data.READERS and networks.NETWORKS.
"""
import argparse
import hashlib
import importlib.util
import math
import os
import shlex
import signal
import sys
import traceback
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

DTYPES = ("float32", "tf32", "bfloat16", "float16")
# How long processes wait for each other: in a step on GPUs, where nothing else says that one has
# ended, and where rank 0 packs 437,513 images or computes metrics
STEP_WAIT = timedelta(minutes=20)
LONG_WAIT = timedelta(hours=12)


# --------------------------------------------------------------------------------------------------
# Errors and the command line

class UserError(Exception):
    """A mistake that the user can fix: the message names the flag and the fix. No traceback."""


def run(main):
    """Import the plugins, call main(); a UserError becomes one line and exit code 2.

    Under torchrun every process that fails says why, with its rank, and leaves at once.
    """
    if Plugins.importing:       # a plugin whose last line starts it as a script
        return
    code = 0
    try:
        import_plugins(sys.argv[1:])
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except SystemExit as e:
        code = e.code or 0
    except Exception as e:
        line = error_line(e)
        if line is None and not dist.is_initialized():
            raise
        code = 1 if line is None else 2
        print(f"error: {rank_words()}{line or traceback.format_exc()}", file=sys.stderr)
    if dist.is_initialized():
        if not code:
            # Not after a failure: NCCL would wait for processes that wait for this one
            dist.destroy_process_group()
        # Without shutting the interpreter down: a gloo thread that still needs it would abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


class Plugins:
    """What --plugin named: "NAME HASH" of every file that has been imported."""
    importing = False
    found = []


def import_plugins(words):
    """Import each FILE of "--plugin FILE" or "--plugin=FILE" on a command line. Raises UserError.

    Before the flags are read, since a plugin may add some.
    """
    after = [file for flag, file in zip(words, words[1:]) if flag == "--plugin"]
    after += [word.partition("=")[2] for word in words if word.startswith("--plugin=")]
    for path in map(Path, after):
        if not path.is_file():
            raise UserError(f"--plugin {path}: there is no such file")
        known = path.stem.isidentifier() and importlib.util.find_spec(path.stem)
        other = known and (not known.origin or Path(known.origin).resolve() != path.resolve())
        if path.suffix != ".py" or not path.stem.isidentifier() or other:
            raise UserError(f"--plugin {path}: must be a .py file with a name of its own, which no "
                            "module has; rename it")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.parent))
        Plugins.importing = True
        try:
            spec.loader.exec_module(module)
        finally:
            Plugins.importing = False
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        Plugins.found.append(f"{path.name} {digest[:16]}")


def rank_words():
    """Prefix "rank 3: " among several processes of torchrun, else empty."""
    return f"rank {os.environ['RANK']}: " if find_rank()[1] > 1 else ""


def error_line(error):
    """What to tell the user of an exception, in one line; None for a mistake of the program."""
    first = next(iter(str(error).splitlines()), "")
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    if isinstance(error, UserError):
        return " ".join(str(error).splitlines())
    if isinstance(error, torch.OutOfMemoryError):
        return ("out of memory on the device; take a smaller --batch-size, or in train.py a "
                f"larger --accumulate ({first})")
    if dist.is_initialized() and (isinstance(error, dist.DistError)
                                  or any(words in str(error) for words in gone)):
        return ("an exchange with the other processes failed; where one of them has ended, its "
                f"own line says why ({first[:120]})")
    return None


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviations, and the flags that every script has."""

    def __init__(self, doc):
        super().__init__(description=doc, usage="%(prog)s [flags]", allow_abbrev=False,
                         formatter_class=partial(argparse.RawDescriptionHelpFormatter,
                                                 max_help_position=27))
        self.add_argument("--plugin", action="append", metavar="FILE", default=[],
                          help="a Python file of yours, imported first: losses, data sets, "
                          "networks")

    def error(self, message):
        raise UserError(message)

    def format_help(self):
        """As argparse's, in fewer lines: a value has a short name, and choices are in the text."""
        for action in self._actions:
            if action.nargs != 0 and action.metavar is None:
                action.metavar = getattr(action.type, "metavar", "NAME")
                if action.choices:
                    action.help = f"{', '.join(map(str, action.choices))}: {action.help}"
        return super().format_help()

    def parse_args(self, args=None, namespace=None):
        """As argparse's; `given` then has the names of the flags that the command line names."""
        words = [str(w) for w in (sys.argv[1:] if args is None else args)]
        flags = [self._option_string_actions.get(w.partition("=")[0]) for w in words]
        self.given = {action.dest for action in flags if action}
        return super().parse_args(words, namespace)

    def add_common(self, out):
        """--device --dtype --seed --out; `out` is the help text of --out."""
        g = self.add_argument_group("every script")
        g.add_argument("--device", default="auto",
                       help="auto (cuda where there is one, else cpu), or a torch device")
        g.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                       help="of the network's products; auto: the checkpoint's, else bfloat16 "
                       "where the device has it; tf32: on CUDA; float16: for older GPUs")
        g.add_argument("--seed", type=integer(0), default=0,
                       help="everything random follows from it (default: 0)")
        g.add_argument("--out", help=out)


def number(low=-math.inf, high=math.inf, above=-math.inf, kind=float):
    """An argparse type: a finite number in [low, high] and greater than `above`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and above < value < math.inf):
            what = "a whole number" if kind is int else "a number"
            least = f"greater than {above:g}" if above > low else f"of at least {low:g}"
            most = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"must be {what} {least}{most}, not {text!r}")
        return value
    parse.metavar = "N" if kind is int else "X"
    return parse


def integer(low, high=math.inf):
    """An argparse type: an int in [low, high]."""
    return number(low, high, kind=int)


def one_of(*words):
    """An argparse type: one of these words."""
    def parse(text):
        if text not in words:
            raise argparse.ArgumentTypeError(f"must be {' or '.join(words)}, not {text!r}")
        return text
    return parse


def main_of(script, text, commands):
    """Do what the first word of the command line says; --help prints `text` and these words.

    script: its file's name. commands: {word: main, which takes the words that follow}. Raises
    UserError for another word.
    """
    what = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if what in commands:
        return commands[what](sys.argv[2:])
    if what not in ("-h", "--help"):
        raise UserError(f"{script} {what}: say {', '.join(commands)} first")
    print(f"{text}\nThe flags of each command ({', '.join(commands)}):\n")
    for word in commands:
        print(f"    python {script} {word} --help")


def add_with_defaults(group, defaults, flags):
    """Add flags, {name: (type, help)}; defaults: {name: default}, which --help then says."""
    for name, (kind, words) in flags.items():
        default = defaults.get(name)
        if default is not None:
            words += f" (default: {default if isinstance(default, str) else f'{default:,g}'})"
        group.add_argument(flag_of(name), type=kind, default=default, help=words)


def flag_of(name):
    """The flag of a setting: --num-group for num_group."""
    return "--" + name.replace("_", "-")


def refuse_unused(given, unused):
    """Raise UserError for the first flag that was given and does nothing.

    given: Parser.given. unused: {flag's name: why it does nothing}.
    """
    for name, why in unused.items():
        if name in given:
            raise UserError(f"{flag_of(name)}: {why}; leave it out")


def command_line(script):
    """The command of this process as one would type it: "python SCRIPT --flag value ..."."""
    return shlex.join(["python", *script.split(), *sys.argv[1:]])


def print_next(*words):
    """Print what most people run next, from rank 0; not under run_all.sh, which goes on itself."""
    if find_rank()[0] == 0 and "RUN_ALL" not in os.environ:
        print("Next:", shlex.join(["python", *map(str, words)]), flush=True)


def progress(iterable=None, **kwargs):
    """A tqdm bar: updated often on a terminal, one line every ten seconds in a log file."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(iterable, mininterval=interval, dynamic_ncols=True, **kwargs)


# --------------------------------------------------------------------------------------------------
# Device, dtype, processes

@dataclass
class Runtime:
    """Where a script runs: its device, the dtype it computes in, its rank among the processes.

    patient: a gloo group of all processes that waits LONG_WAIT, where there are several. tf32:
    whether float32 products of the network are TF32's.
    """
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    patient: object = None
    tf32: bool = False

    def print(self, *words):
        """Print, from rank 0 only."""
        if self.rank == 0:
            with tqdm.external_write_mode(sys.stdout):      # above a progress bar, not into it
                print(*words, flush=True)

    def dtype_name(self):
        """The --dtype that this is: "float32", "tf32", "bfloat16" or "float16"."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    def autocast(self):
        """The context in which networks are called: 16-bit autocast, or nothing for float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @contextmanager
    def rank_0_first(self):
        """A block that rank 0 runs while the others wait, then they: for a file that all read.

        Where rank 0 fails, it says why, and the others leave with exit code 2.
        """
        if self.rank > 0 and self.maximum(0, self.patient):
            sys.exit(2)
        try:
            yield
        except BaseException:
            if self.rank == 0:
                with suppress(RuntimeError):        # of processes that have ended already
                    self.maximum(1, self.patient)
            raise
        if self.rank == 0:
            self.maximum(0, self.patient)

    def on_rank_0(self, work):
        """work() on rank 0; where it fails, the others leave with exit code 2."""
        with self.rank_0_first():
            if self.rank == 0:
                work()

    def gather(self, arrays):
        """Every rank's list of arrays, concatenated in order of rank, on rank 0; None elsewhere."""
        if self.world == 1:
            return np.concatenate(arrays)
        shares = [None] * self.world if self.rank == 0 else None
        dist.gather_object(arrays, shares, group=self.patient)
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

    def maximum(self, value, group=None):
        """The largest of every rank's `value` (an int), without waiting for the device.

        group: `patient` where another rank may be hours late; None: all, as in a step.
        """
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group)       # a CPU tensor: gloo
        return int(tensor)


def find_device(name):
    """The torch.device that --device asks for. Raises UserError where it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: this machine cannot use it ({e})") from e
    return device


def setup(device="auto", dtype="auto"):
    """Join torchrun's processes if there are any, choose device and dtype; return a Runtime."""
    rank, world = find_rank()
    device = find_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True       # batches have one size
    if dtype == "tf32" and device.type != "cuda":
        raise UserError(f"--dtype tf32: for CUDA devices, and this is {device.type}; take float32")
    if dtype == "float16" and device.type not in ("cuda", "cpu"):
        raise UserError(f"--dtype float16: not for {device.type}; take float32")
    allow_tf32(dtype == "tf32")         # float32 is float32, in every script
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=STEP_WAIT)
        else:
            dist.init_process_group("gloo", timeout=LONG_WAIT)
    patient = dist.new_group(backend="gloo", timeout=LONG_WAIT) if world > 1 else None
    if dtype == "auto":
        dtype = "bfloat16" if computes_bfloat16(device) else "float32"
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    return Runtime(device, kind, rank, world, patient, dtype == "tf32")


def allow_tf32(on):
    """Whether CUDA may round the factors of float32 products to TF32's 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


@contextmanager
def without_tf32():
    """A block in which float32 is float32: for features, which must not depend on --dtype."""
    before = torch.backends.cuda.matmul.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        allow_tf32(before)


def find_rank():
    """(RANK, WORLD_SIZE) of torchrun, or (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def computes_bfloat16(device):
    """Whether the device multiplies bfloat16 in hardware, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return False


def add_compile_flag(group):
    """--compile, the same in the scripts that train."""
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                       help="torch.compile (default: on CUDA only)")


def wants_compile(args, rt):
    """--compile or --no-compile; where neither is given, whether the device is CUDA.

    Not with --recompute, whose blocks change state that compiled code cannot see.
    """
    if args.compile is None:
        return rt.device.type == "cuda" and not getattr(args, "recompute", False)
    return args.compile


def compile_or_not(module, loss_of, rt):
    """(torch.compile(module), None), or (the module itself, a warning) where that fails.

    loss_of(compiled) is run once as a trial, forwards, and backwards where it has gradients. It
    leaves no trace: gradients are dropped, and buffers, such as batch norm's statistics, are what
    they were. Every rank prints its warning.
    """
    compiled = torch.compile(module)
    before = [b.clone() for b in module.buffers()]
    try:
        with rt.autocast():
            loss = loss_of(compiled)
        if loss.requires_grad:
            loss.backward()
        return compiled, None
    except torch.OutOfMemoryError:
        raise
    except Exception as e:      # whatever a missing or broken compiler raises; training goes on
        why = next(iter(str(e).strip().splitlines()), "")[:160]
        warning = f"cannot compile here ({type(e).__name__}: {why}), going on without: slower"
        print(f"WARNING: {rank_words()}{warning}", file=sys.stderr, flush=True)
        return module, warning
    finally:
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for b, value in zip(module.buffers(), before):
                b.copy_(value)


class StopSignal:
    """A block in which SIGTERM, SIGINT and SIGHUP become `number`: 0, or the signal.

    A second one ends the process.
    """

    def __enter__(self):
        self.number = 0
        signals = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)           # under nohup it is ignored
        self.before = {s: signal.signal(s, self.catch) for s in signals}
        return self

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)

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
