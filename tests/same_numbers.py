"""Whether two checkouts compute the same to the last bit, for a change that must move no number.

    git worktree add ../before origin/main              # or another commit: what the change is to
    python tests/same_numbers.py ../before .            # be compared with; three minutes
    python tests/same_numbers.py --write tests/numbers.json .                   # what one gives

Each checkout trains every base loss with and without CM for ten steps, samples, evaluates,
classifies and probes, on digits, in float32, on one thread. Then both go on from the first one's
checkpoints: old runs must load and resume. The second form writes down what a checkout gives, after
a change that may move numbers; test_numbers.py compares with that.
"""
import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

SMALL = "--dataset digits --batch-size 16 --log-every 1 --sample-every 0 --device cpu".split()
TRAIN = [*SMALL, "--ch", "16", "--save-every", "10", "--dtype", "float32"]
BASES = ("ddpm", "cbdm", "oc", "focal", "rop", "consistency")
VARIANTS = {        # name: flags of train.py beyond the defaults
    **{f"{base}-{cm}": ["--base", base, f"--{cm}"] for base in BASES for cm in ("no-cm", "cm")},
    "release": "--w-div 0.2 --div-bound 0 --independent-dropout".split(),
    "reserved only": ["--lam", "0"],
    "experts": "--base ddpm --no-cm --experts group".split(),
    "augmented": "--ada 0.12 --resample 0.5".split(),
    "mirrored": "--resample 0.5 --flip".split(),
    "two passes": "--accumulate 2 --rank-ratio 0.3 --seed 3".split(),
    "cbdm by frequency": "--base cbdm --cbdm-y train --cbdm-tau 0.002 --cbdm-gamma 0.5".split(),
    "other constants": ["--base", "rop", "--no-cm", "--rop-weight", "0.5", "--rop-margin", "0.3",
                        "--label-drop", "0.4"],
    "focal 1": "--base focal --no-cm --focal-gamma 1 --dropout 0 --ema 0.5 --lr 0.003".split(),
    "curriculum": "--base consistency --no-cm --ct-double 2 --warmup 0 --grad-clip 0.1".split(),
    "another draw": "--tail-seed 4 --ir 5 --class-order 9,8,7,6,5,4,3,2,1,0".split(),
}
SAMPLES = {         # name: (run, flags of sample.py)
    "ddim": ("oc-cm", []),
    "ddim eta": ("oc-cm", "--eta 0.5 --guidance 0 --grid quad --steps 20".split()),
    "general": ("oc-cm", "--branch general --weights raw --steps 10".split()),
    "ddpm": ("ddpm-no-cm", "--sampler ddpm --steps 20 --classes 3-5".split()),
    "dpm++": ("cbdm-cm", "--sampler dpm++".split()),
    "consistency": ("consistency-cm", []),
    "experts": ("experts", "--steps 5".split()),
}
CM = "--cm --rank-ratio 0.1 --scale 1 --norms shared"
CLASSIFIERS = {     # name: flags of classify.py
    "features": [],
    "ldam": f"--ir 20 --loss ldam --drw {CM} --distance probs --reserve layer3 layer4".split(),
    "la": "--ir 20 --loss la --tau 0.5 --schedule steps --no-nesterov".split(),
    "logits": f"--ir 20 {CM} --distance logits --reserve layer4 --div-bound 0.1".split(),
}


# --------------------------------------------------------------------------------------------------
# What one checkout gives: run inside a process that imports that checkout's files

def call(script, *flags):
    """Run a script's main in this process."""
    sys.argv = [script + ".py", *map(str, flags)]
    importlib.import_module(script).main()


def digest(tensors):
    """A hash of named tensors or arrays."""
    h = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        h.update(name.encode() + str(value.shape).encode())
        h.update(bytes(value.cpu().contiguous().numpy() if hasattr(value, "cpu") else value))
    return h.hexdigest()[:16]


def numbers_of(value, path=""):
    """{path: number} of all numbers in nested dicts and lists, without settings and times."""
    if isinstance(value, dict):
        items = {k: v for k, v in value.items()
                 if k not in ("settings", "pruned_of", "seconds", "images_per_s", "versions")}
    elif isinstance(value, list):
        items = dict(enumerate(value))
    else:
        return {path: value} if isinstance(value, (int, float)) else {}
    return {k: v for name, part in items.items()
            for k, v in numbers_of(part, f"{path}/{name}").items()}


def log_of(folder):
    """The last numbers of log.jsonl, and a hash of all."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    every = json.dumps(numbers_of(lines), sort_keys=True).encode()
    return {**numbers_of(lines[-1]), "all lines": hashlib.sha256(every).hexdigest()[:16]}


def weights_of(folder):
    """Hashes of what a checkpoint holds."""
    import torch
    ckpt = torch.load(folder / "ckpt.pt", weights_only=True)
    return {kind: digest(ckpt[kind]) for kind in ("model", "ema") if kind in ckpt}


def train_all(out, data, steps):
    """Train every variant, from nothing or from where it stopped: {name: {hashes and numbers}}."""
    result = {}
    for name, flags in VARIANTS.items():
        call("train", *TRAIN, *flags, "--steps", steps, "--data-dir", data, "--out", out / name)
        result[f"train {name}"] = {**weights_of(out / name), **log_of(out / name)}
    start = Path("lora-from.pt")
    if not start.exists():              # a run goes on from the file that it began with
        shutil.copy("cbdm-no-cm/ckpt.pt", start)
    call("train", *TRAIN, "--base", "cbdm", "--init-from", start, "--lora",
         "--steps", steps, "--data-dir", data, "--out", out / "lora")
    result["train lora"] = {**weights_of(out / "lora"), **log_of(out / "lora")}
    return result


def measure_all(runs, out, data):
    """Samples, metrics, classifiers and probes of the runs in a folder: {name: {...}}."""
    import numpy as np
    result = {}
    for name, (run, flags) in SAMPLES.items():
        call("sample", "--ckpt", runs / run / "ckpt.pt", "--num", 20, "--seed", 5, *flags,
             "--no-clip", "--device", "cpu", "--out", out / name)
        with np.load(out / name / "samples.npz") as f:
            result[f"sample {name}"] = {"arrays": digest(dict(f))}
    for name, flags in CLASSIFIERS.items():
        call("recognition.classify", "--dataset", "digits", "--width", 8, "--epochs", 2,
             "--device", "cpu", *flags, "--data-dir", data, "--out", out / name)
        numbers = numbers_of(json.loads((out / name / "result.json").read_text()))
        result[f"classify {name}"] = {**weights_of(out / name), **numbers}
    measure = ["--features", out / "features/ckpt.pt", "--data-dir", data, "--device", "cpu"]
    call("evaluate", "--ckpt", runs / "oc-cm/ckpt.pt", "--num", 40, "--num-group", 24, "--steps", 5,
         "--no-clip", "--per-class", "--floor", 2, *measure, "--out-json", out / "drawn.json")
    call("evaluate", "--samples", out / "ddim/samples.npz", *measure, "--k", 2,
         "--out-json", out / "given.json", "--save-stats", out / "stats.npz")
    call("evaluate", "--samples", out / "dpm++/samples.npz", "--reference", out / "stats.npz",
         *measure, "--out-json", out / "kept.json")
    probe = ["--data-dir", data, "--device", "cpu"]
    call("prune_probe", "--ckpt", runs / "ddpm-no-cm/ckpt.pt", runs / "oc-cm/ckpt.pt", *probe,
         "--images", "balanced", "--fractions", "0.1,0.3", "--repeats", 1, "--out", out / "prune")
    probe += ["--ckpt", runs / "oc-cm/ckpt.pt", "--out", out]
    call("probes.capacity", "allocation", *probe)
    call("probes.capacity", "dominance", *probe, "--repeats", 1)
    call("theory_sim", "--trials", 200, "--out", out)
    for name in ("drawn", "given", "kept", "prune/probe", "allocation", "dominance", "theory"):
        result[name] = numbers_of(json.loads((out / f"{name}.json").read_text()))
    return result


def record(code, runs, out, steps):
    """Write all that the checkout `code` gives, trained in `runs`, to out/result.json."""
    sys.path.insert(0, str(code))
    import torch
    torch.set_num_threads(1)
    data = out / "data"
    runs.mkdir(parents=True, exist_ok=True)
    os.chdir(runs)              # a checkpoint keeps the name of what it was started from
    result = {**train_all(runs, data, steps), **measure_all(runs, out, data)}
    (out / "result.json").write_text(json.dumps(result))


def machine():
    """What the last bits depend on: {"torch": its version, "cpu": what the processor can do}."""
    import torch
    can = torch.cpu.get_capabilities()
    return {"torch": torch.__version__, "cpu": sorted(name for name in can if can[name] is True)}


# --------------------------------------------------------------------------------------------------
# Two checkouts side by side

def run(code, runs, out, steps=10):
    """`record` in a process of its own: the checkout's files must not meet another's."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "record", code, runs, out, str(steps)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with open(out / "log.txt", "w") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{code}: failed\n" + (out / "log.txt").read_text()[-3000:])
    return json.loads((out / "result.json").read_text())


def differences(a, b):
    """Lines that say where two results differ, and what only one of them has."""
    lines = [f"only in one: {name}" for name in sorted(set(a) ^ set(b))]
    for name in sorted(set(a) & set(b)):
        both = [k for k in a[name] if k in b[name]]
        keys = [k for k in both if a[name][k] != b[name][k]]
        if keys:
            k = keys[0]
            lines.append(f"{name}: {len(keys)} of {len(both)} differ, the first is {k}: "
                         f"{a[name][k]} and {b[name][k]}")
        if alone := sorted(set(a[name]) ^ set(b[name])):
            lines.append(f"{name}: only in one: {', '.join(alone)}")
    return lines


def compare(before, after, out):
    """Compare two checkouts on runs of their own, then on continuing the first one's runs."""
    shutil.rmtree(out, ignore_errors=True)
    old = run(before, out / "before", out / "before-results")
    new = run(after, out / "after", out / "after-results")
    shutil.copytree(out / "before", out / "resumed")
    going_on = run(before, out / "before", out / "before-going-on", 15)
    resumed = run(after, out / "resumed", out / "resumed-results", 15)
    lines = [f"fresh: {line}" for line in differences(old, new)]
    lines += [f"resumed: {line}" for line in differences(going_on, resumed)]
    total = sum(map(len, old.values())) + sum(map(len, going_on.values()))
    print("\n".join(lines) or f"the same to the last bit: {total:,} numbers and hashes")
    return 1 if lines else 0


def main():
    """One checkout written down, or two compared; or what `run` asks for."""
    if sys.argv[1:2] == ["record"]:
        return record(*map(Path, sys.argv[2:5]), int(sys.argv[5]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("code", nargs="*", type=Path, help="one checkout (with --write), or two")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write down what one gives")
    parser.add_argument("--out", type=Path, default=Path("out/same"), help="default: out/same")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.write:
        shutil.rmtree(out, ignore_errors=True)
        numbers = run(args.code[0].resolve(), out / "runs", out / "results")
        content = {"machine": machine(), "results": numbers}
        args.write.write_text(json.dumps(content, indent=0) + "\n")
    elif len(args.code) == 2:
        sys.exit(compare(*(c.resolve() for c in args.code), out))
    else:
        parser.error("name two checkouts, or --write FILE and one")


if __name__ == "__main__":
    main()
