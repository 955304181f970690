"""Every target of run_all.sh, with programs that only record how they are called.

Each script's parser must accept the flags that run_all.sh gives to it.
"""
import importlib
import json
import os
import re
import subprocess

import pytest
from conftest import ROOT, call

import runtime

TARGETS = ["demo", *re.findall(r"^  (\w+)\)  ", (ROOT / "run_all.sh").read_text(), re.M)]
ENVIRONMENTS = {
    "demo": {"SCALE": "demo", "DATA_DIR": "my data"},
    "paper": {"NGPU": "2", "DATA_DIR": "my data", "SEEDS": "3,5", "CLASS_ORDER": "b c,a"},
    "inat2018": {"DATASET": "inat2018", "RESOLUTION": "32"},
    "budget": {"ROOT": "my own", "STEPS": "7", "FLAGS": "--ch 64 --lr 5e-4",
               "CM_FLAGS": "--w-div 0.2", "NUM": "99", "FEATURES": "c.pt", "DATASET": "folder",
               "SEEDS": "4", "MODEL": "my SD"},
    "tiny": {"PRESET": "tiny", "DATASET": "folder", "SEEDS": "4"},
}

# A function of bash's in place of a program, as `export -f` hands it on
RECORDER = """() {{ {{ printf '%s\\t' {name} "$@"; echo; }} >> "$CALLS"
}}"""


def recorded(target, env, folder):
    """Run a target with recorders for programs: [(script or module, its flags)] in order."""
    calls = folder / "calls"
    calls.write_text("")
    recorders = {f"BASH_FUNC_{name}%%": RECORDER.format(name=name)
                 for name in ("python", "torchrun")}
    env = {**os.environ, **env, **recorders, "CALLS": str(calls)}
    subprocess.run(["bash", ROOT / "run_all.sh", target], env=env, check=True)
    found = []
    for line in calls.read_text().splitlines():
        words = line.split("\t")[1:-1]
        while words[0].startswith("-"):         # --nproc_per_node, -m, --
            del words[0]
        found.append((words[0].removesuffix(".py"), words[1:]))
    return found


def parse(monkeypatch, name, flags):
    """Call a script's main until it has parsed its flags."""
    class Parsed(Exception):
        pass

    def parse_and_stop(self, *args):
        parse_args(self, *args)
        raise Parsed

    module = importlib.import_module(name)
    parse_args = runtime.Parser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Parser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            call(module.main, *flags)


def test_targets():
    head = (ROOT / "run_all.sh").read_text().split("\nset -euo")[0]
    assert len(TARGETS) == len(set(TARGETS)) and set(TARGETS) - {"demo"} <= set(head.split())
    assert {"table2", "tableG8", "fig4d", "gain", "pictures"} <= set(TARGETS)
    done = subprocess.run(["bash", ROOT / "run_all.sh", "table99"], capture_output=True)
    assert done.returncode == 2


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_command_is_understood(tmp_path, monkeypatch, name):
    calls = {(script, tuple(flags)) for target in TARGETS
             for script, flags in recorded(target, ENVIRONMENTS[name], tmp_path)}
    assert len({script for script, _ in calls}) >= 11
    for script, flags in calls:
        parse(monkeypatch, script, flags)
        line = " ".join(flags)
        if name == "budget" and script == "train" and "--steps 2000" not in line:   # the demo's
            assert "--ch 64 --lr 5e-4" in line and "--out my own/folder-ir1/" in line
            assert ("--w-div 0.2" in line) == ("--cm" in flags)
        if name == "budget" and script == "evaluate" and "out/demo" not in line:
            assert "--num 99 --features c.pt" in line


def test_the_table_of_texts_is_of_both_sets(tmp_path):
    """Three seeds, with and without CM, beside the paper's numbers."""
    calls = recorded("tableG11", {"MODEL": "my SD"}, tmp_path)
    pages = [flags for script, flags in calls if script == "pages.report"]
    paper = json.loads((ROOT / "pages/paper_results.json").read_text())["tables"]["tableG11"]
    settings = [flags[flags.index("--setting") + 1] for flags in pages]
    assert settings == list(paper["settings"]) == ["cub200-ir10", "flowers102-ir10"]
    names = [word.split("=")[0] for flag, word in zip(pages[0], pages[0][1:]) if flag == "--row"]
    assert names == list(paper["settings"]["cub200-ir10"]["rows"])
    trained = [flags for script, flags in calls
               if script == "latent.text_to_image" and flags[0] == "train"]
    assert len(trained) == 2 * 2 * 3
    for flags in trained:
        assert "--autoencoder my SD --text-encoder my SD" in " ".join(flags)


def test_figures_have_the_same_labels_and_noise_in_each_column(tmp_path):
    env = {"CLASSES": "cat,7", "TAIL": "orchid", "SEEDS": "3,5"}
    calls = recorded("figures", env, tmp_path)
    sampled = [" ".join(flags) for script, flags in calls if script == "sample"]
    assert len(sampled) == 8
    for line in sampled:
        few = "--num 25" in line
        assert ("--classes orchid" if few else "--num 400 --classes cat,7") in line
    methods = next(flags for script, flags in calls if script == "pages.figures")
    columns = [word.split("=")[0] for flag, word in zip(methods, methods[1:]) if flag == "--column"]
    assert columns == ["DDPM", "CBDM", "OC", "CM"]
