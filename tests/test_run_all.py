"""Every target of run_all.sh, with programs that write down how they are called: each script's parser takes what it is given."""
import importlib
import os
import re
import subprocess

import pytest
from conftest import ROOT, call

import classify
import runtime
import train

TARGETS = re.findall(r"^  (\w+)\) ", (ROOT / "run_all.sh").read_text(), re.M)


class Parsed(Exception):
    """The flags were understood."""


@pytest.mark.parametrize("env", [{"SCALE": "demo"}, {"NGPU": "2", "DATA_DIR": "my data", "SEEDS": "3,5", "CLASS_ORDER": "b c,a"}, {"DATASET": "inat2018", "IR": "50"},
                                 {"ROOT": "my own", "STEPS": "7", "FLAGS": "--ch 64 --lr 5e-4", "CM_FLAGS": "--w-div 0.2", "NUM": "99", "FEATURES": "c.pt",
                                  "DATASET": "folder"}],
                         ids=["demo", "paper", "inat2018", "budget"])
def test_every_command_is_understood(tmp_path, monkeypatch, env):
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '%s\\t' {name} \"$@\" >> {tmp_path}/calls\necho >> {tmp_path}/calls\n")
        (tmp_path / name).chmod(0o755)
    assert len(TARGETS) > 18 and {"table2", "tableG8", "fig4d", "gain"} <= set(TARGETS)
    for target in TARGETS:
        demo_of_sd = target == "table6" and env.get("SCALE") == "demo"         # the one target without a demo says so
        done = subprocess.run(["bash", ROOT / "run_all.sh", target], env={**os.environ, **env, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
        assert done.returncode == (2 if demo_of_sd else 0)
    if "ROOT" in env:                       # a budget of one's own reaches every run, in a folder of its own
        lines = (tmp_path / "calls").read_text().splitlines()
        assert all("--steps\t7\t--ch\t64\t--lr\t5e-4" in line for line in lines if "train.py" in line)
        assert all("--num\t99\t--features\tc.pt" in line for line in lines if "evaluate.py" in line)
        assert all("\tmy own/" in line for line in lines if "train.py" in line or "report.py" in line)
        assert all(("--w-div\t0.2" in line) == ("\t--cm\t" in line) and "--ir\t1\t" in line for line in lines if "train.py" in line)
    calls = {line.rstrip("\t") for line in (tmp_path / "calls").read_text().splitlines()}
    parse, seen = runtime.Parser.parse_args, set()

    def parse_and_stop(self, *args):
        parse(self, *args)
        raise Parsed
    for words in (line.split("\t") for line in calls):
        if words[0] == "torchrun":
            assert words[1:3] == ["--nproc_per_node=2", "--"]
            words = words[2:]
        script, *args = words[1:]
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(runtime.Parser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            call(module.main, *args)
        monkeypatch.setattr(runtime.Parser, "parse_args", parse)
        if module in (train, classify):
            module.resolve(module.make_parser().parse_args(args))
            assert "--data-dir" not in args or args[args.index("--data-dir") + 1] == env.get("DATA_DIR", "data")
        seen.add(script)
    assert {"train.py", "evaluate.py", "classify.py", "sample.py", "report.py", "prune_probe.py", "theory_sim.py", "capacity_probe.py"} <= seen
    assert "latent.py" in seen or env.get("SCALE") == "demo"


def test_the_demo_is_on_digits(tmp_path):
    done = subprocess.run(["bash", ROOT / "run_all.sh", "table2"], env={**os.environ, "SCALE": "demo", "DATASET": "folder"}, capture_output=True, text=True)
    assert done.returncode == 2 and "STEPS" in done.stderr and not done.stdout
