"""Every target of run_all.sh, with programs that only record how they are called.

Each script's parser must accept the flags that run_all.sh gives to it.
"""
import importlib
import os
import re
import subprocess

import pytest
from conftest import ROOT, call

import classify
import runtime
import train

TARGETS = re.findall(r"^  (\w+)\)$", (ROOT / "run_all.sh").read_text(), re.M)
SCRIPTS = {"train.py", "evaluate.py", "classify.py", "sample.py", "report.py", "prune_probe.py",
           "theory_sim.py", "capacity_probe.py"}
ENVIRONMENTS = {
    "demo": {"SCALE": "demo"},
    "paper": {"NGPU": "2", "DATA_DIR": "my data", "SEEDS": "3,5", "CLASS_ORDER": "b c,a"},
    "inat2018": {"DATASET": "inat2018", "IR": "50"},
    "budget": {"ROOT": "my own", "STEPS": "7", "FLAGS": "--ch 64 --lr 5e-4",
               "CM_FLAGS": "--w-div 0.2", "NUM": "99", "FEATURES": "c.pt", "DATASET": "folder"},
}

RECORDER = """#!/bin/sh
printf '%s\\t' {name} "$@" >> "{calls}"
echo >> "{calls}"
"""


class Parsed(Exception):
    """The flags were understood."""


def record(target, env, folder):
    """Run a target with recorders for programs: its exit code and the lists of words called."""
    calls = folder / "calls"
    calls.write_text("")
    for name in ("python", "torchrun"):
        (folder / name).write_text(RECORDER.format(name=name, calls=calls))
        (folder / name).chmod(0o755)
    env = {**os.environ, **env, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / "run_all.sh", target], env=env)
    return done.returncode, [line.split("\t")[:-1] for line in calls.read_text().splitlines()]


def record_all(env, folder):
    """The calls of all targets, in order."""
    calls = []
    for target in TARGETS:
        code, more = record(target, env, folder)
        demo_of_sd = target == "table6" and env.get("SCALE") == "demo"
        assert code == (2 if demo_of_sd else 0), target         # 2: there is no demo of it
        calls += more
    return calls


def parse(monkeypatch, script, args):
    """Call a script's main until it has parsed its flags; returns the script's module."""
    module = importlib.import_module(script.removesuffix(".py"))
    parse_args = runtime.Parser.parse_args

    def parse_and_stop(self, *args):
        parse_args(self, *args)
        raise Parsed
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Parser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            call(module.main, *args)
    return module


def test_targets():
    assert len(TARGETS) == 22 and len(set(TARGETS)) == 22
    assert {"table2", "tableG8", "fig4d", "gain"} <= set(TARGETS)
    head = (ROOT / "run_all.sh").read_text().split("\nset -euo")[0]
    assert set(TARGETS) <= set(head.split())


@pytest.mark.parametrize("env", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_every_command_is_understood(tmp_path, monkeypatch, env):
    calls = {tuple(words) for words in record_all(env, tmp_path)}
    scripts = set()
    for words in calls:
        if words[0] == "torchrun":
            assert words[1:3] == ("--nproc_per_node=2", "--")
            script, *args = words[3:]
        else:
            script, *args = words[1:]
        module = parse(monkeypatch, script, args)
        if module in (train, classify):
            module.resolve(module.make_parser().parse_args(args))
            if "--data-dir" in args:
                assert args[args.index("--data-dir") + 1] == env.get("DATA_DIR", "data")
        scripts.add(script)
    assert SCRIPTS <= scripts
    assert "latent.py" in scripts or env.get("SCALE") == "demo"


def test_a_budget_reaches_every_run(tmp_path):
    """A budget of one's own, with runs and pages in a folder of their own."""
    for words in record_all(ENVIRONMENTS["budget"], tmp_path):
        line = " ".join(words)
        if words[1] == "train.py":
            assert "--steps 7 --ch 64 --lr 5e-4" in line and "--ir 1 " in line
            assert ("--w-div 0.2" in line) == ("--cm" in words)
        if words[1] == "evaluate.py":
            assert "--num 99 --features c.pt" in line
        if words[1] in ("train.py", "report.py"):
            assert any(word.startswith("my own/") for word in words)


def test_the_demo_is_on_digits():
    env = {**os.environ, "SCALE": "demo", "DATASET": "folder"}
    done = subprocess.run(["bash", ROOT / "run_all.sh", "table2"], env=env, capture_output=True,
                          text=True)
    assert done.returncode == 2 and "STEPS" in done.stderr and not done.stdout
