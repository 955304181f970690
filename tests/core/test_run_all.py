"""Every target of run_all.sh, with programs that only record how they are called.

Each script's parser must accept the flags that run_all.sh gives to it.
"""
import json
import os
import re
import subprocess

import pytest
from conftest import ROOT, parse_only

from train import PRESETS

LABELS = re.findall(r"^  (\w[\w |]*)\)  ", (ROOT / "run_all.sh").read_text().split(
    "one block per target")[1], re.M)
TARGETS = ["demo", *" | ".join(LABELS).split(" | ")]
ENVIRONMENTS = {
    "demo": {"SCALE": "demo", "DATA_DIR": "my data"},
    "paper": {"NGPU": "2", "DATA_DIR": "my data", "SEEDS": "3,5", "CLASS_ORDER": "b c,a"},
    "inat2018": {"DATASET": "inat2018", "RESOLUTION": "32"},
    "budget": {"ROOT": "my own", "STEPS": "7", "EPOCHS": "7", "FLAGS": "--lr 5e-4",
               "CM_FLAGS": "--w-div 0.2", "NUM": "99", "FEATURES": "c.pt", "DATASET": "folder",
               "SEEDS": "4", "MODEL": "my SD"},
    "tiny": {"PRESET": "tiny", "DATASET": "folder", "SEEDS": "4"},
}
PAPER = json.loads((ROOT / "pages/paper_results.json").read_text())["tables"]
# Which of these variables a target has use for
TRAINED_BY = {"table6": "EPOCHS MODEL", "tableG7": "EPOCHS MODEL", "tableG8": "STEPS PRESET EPOCHS",
              "tableG11": "STEPS MODEL", "tableG13": "EPOCHS"}
NO_DIGITS = ("table6", "tableG7")       # fine-tuned Stable Diffusion: in no demo

# A function of bash's in place of a program, as `export -f` hands it on; a call that holds $FAIL
# fails, and one that holds $STOP sends the script a signal
RECORDER = """() {{ {{ printf '%s\\t' {name} "$@"; echo; }} >> "$CALLS"
if [[ -n ${{STOP:-}} && "$*" == *"$STOP"* ]]; then kill -TERM $$; fi
[[ -z ${{FAIL:-}} || "$*" != *"$FAIL"* ]]
}}"""


def useful(env, target):
    """The variables of an environment without those that a target refuses."""
    used = TRAINED_BY.get(target, "STEPS PRESET").split()
    return {name: value for name, value in env.items()
            if name in used or name not in ("STEPS", "PRESET", "EPOCHS", "MODEL")}


def recorded(target, env, folder, code=0):
    """Run a target with recorders for programs: [(script or module, its flags)] in order."""
    calls = folder / "calls"
    calls.write_text("")
    recorders = {f"BASH_FUNC_{name}%%": RECORDER.format(name=name)
                 for name in ("python", "torchrun")}
    env = {**os.environ, **env, **recorders, "CALLS": str(calls)}
    done = subprocess.run(["bash", ROOT / "run_all.sh", target], env=env)
    assert done.returncode == code
    found = []
    for line in calls.read_text().splitlines():
        words = line.split("\t")[1:-1]
        while words[0].startswith("-"):         # --nproc_per_node, -m, --
            del words[0]
        found.append((words[0].removesuffix(".py"), words[1:]))
    return found


def trained(calls, script="train"):
    """Of the runs that a script trained, the flags in one line each."""
    return [" ".join(flags) for name, flags in calls
            if name == script and (flags[0] == "train" or "latent" not in script)]


def test_targets():
    assert {"table2", "fig4d", "gain", "pictures", *TRAINED_BY} <= set(TARGETS)
    done = subprocess.run(["bash", ROOT / "run_all.sh", "table99"], capture_output=True)
    assert done.returncode == 2


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_command_is_understood(tmp_path, monkeypatch, name):
    calls = {(script, tuple(flags)) for target in TARGETS
             if not (name == "demo" and target in NO_DIGITS)
             for script, flags in recorded(target, useful(ENVIRONMENTS[name], target), tmp_path)}
    assert len({script for script, _ in calls}) >= 10
    for script, flags in calls:
        parse_only(monkeypatch, script, flags)
        line = " ".join(flags)
        if name == "budget" and script == "evaluate" and "out/demo" not in line:
            assert "--num 99 --features c.pt" in line


@pytest.mark.parametrize("target, script, own", [
    ("table2", "train", "--preset paper --steps 7"),
    ("table6", "latent.stable_diffusion", "--model my SD --epochs 7"),
    ("tableG11", "latent.text_to_image", "--autoencoder my SD --text-encoder my SD --steps 7"),
    ("tableG13", "recognition.classify", "--epochs 7")])
def test_variables_reach_what_a_target_trains(tmp_path, target, script, own):
    lines = trained(recorded(target, useful(ENVIRONMENTS["budget"], target), tmp_path), script)
    assert lines and all(own in line and "--lr 5e-4" in line and "--out my own/folder-ir1/" in line
                         for line in lines)
    assert {("--w-div 0.2" in line) == ("--cm" in line.split()) for line in lines} == {True}
    assert any("--w-div 0.2" in line for line in lines)


@pytest.mark.parametrize("preset", ["paper", "small", "tiny"])
def test_one_of_the_widths_is_table2s(tmp_path, preset):
    """Which one is the preset's."""
    width = " ".join(map(str, {**PRESETS["paper"], **PRESETS[preset]}["ch_mult"]))
    lines = trained(recorded("fig4d", {"PRESET": preset, "SEEDS": "0"}, tmp_path))
    (shared,) = [line for line in lines if line.endswith("/oc-seed0")]
    assert f"--ch-mult {width} --seed" in shared


def test_the_verdict_on_a_folder(tmp_path):
    """CM on DDPM against DDPM, as many steps and as long; its samples; whether they are copies."""
    calls = recorded("gain", {"DATASET": "folder", "PRESET": "tiny", "SEEDS": "0,1", "NUM": "9",
                              "FEATURES": "clip"}, tmp_path)
    assert calls[0] == ("metrics.features", ["--features", "clip"])     # before hours of training
    assert not [line for line in trained(calls) if "--base ddpm" not in line]
    assert len({line.split()[-1] for line in trained(calls)}) == 3 * 2
    pages = [" ".join(flags) for script, flags in calls if script == "pages.report"]
    assert len(pages) == 2
    for omega, page in zip(("0", "1.5"), pages):
        assert f"--copies out/gain/folder-ir1-tiny/copies-{omega}/copies.json" in page
        assert "--summary" in page
    assert [script for script, _ in calls].count("probes.copies") == 2


def test_a_better_classifier_for_a_folder(tmp_path):
    """It is divided first; generator and classifier have images of one size; classes are filled."""
    calls = recorded("tableG8", {"DATASET": "folder", "DATA_DIR": "my data/", "PRESET": "tiny",
                                 "FILL": "50", "SEEDS": "0"}, tmp_path)
    assert calls[0] == ("data", ["split", "--data-dir", "my data/"])
    runs = [" ".join(flags) for script, flags in calls if script in ("train",
                                                                     "recognition.classify")]
    assert len(runs) == 5
    assert all("--data-dir my data-split" in line and "--preset tiny" in line for line in runs)
    filled = [flags for script, flags in calls if script == "sample"]
    assert len(filled) == 2 and all("--fill-to 50" in " ".join(flags) for flags in filled)


@pytest.mark.parametrize("target", [name for name, table in PAPER.items()
                                    if len(table["settings"]) > 1])
def test_all_settings(tmp_path, target):
    """DATASET=all makes a page for each setting that the paper has."""
    calls = recorded(target, {"DATASET": "all", "SEEDS": "0"}, tmp_path)
    pages = [flags for script, flags in calls if script == "pages.report"]
    settings = [flags[flags.index("--setting") + 1] for flags in pages]
    assert sorted(settings) == sorted(PAPER[target]["settings"])


def test_a_failed_row_does_not_stop_a_target(tmp_path):
    """Its file is one that report.py does not find; what needs its checkpoint fails with it."""
    env = {"SEEDS": "0,1", "FAIL": "/cbdm-seed1"}
    calls = recorded("table1", env, tmp_path, code=1)
    runs = [line.rsplit("/", 1)[1] for line in trained(calls)]
    assert runs == [f"{run}-seed{seed}" for run in ("ddpm", "cbdm", "cbdm-low-rank", "cbdm-lora",
                                                    "cm") for seed in "01"][:7] + [
        "cm-seed0", "cm-seed1"]
    (flags,) = [flags for script, flags in calls if script == "pages.report"]
    rows = dict(word.split("=", 1) for flag, word in zip(flags, flags[1:]) if flag == "--row")
    folder = "out/paper/cifar100-ir100"
    assert rows["CBDM"] == f"{folder}/cbdm-seed0/eval-plain.json,{folder}/cbdm-seed1/failed,"
    assert rows["CBDM (LoRA)"].endswith("cbdm-lora-seed1/failed,")
    assert "failed" not in rows["DDPM"] + rows["CM"]


@pytest.mark.parametrize("target", ["figures", "pictures", "fig1b", "dominance", "allocation",
                                    "curves", "tableG7", "tableG8"])
def test_nothing_looks_at_a_failed_run(tmp_path, target):
    """Its checkpoint may be that of an earlier step."""
    calls = recorded(target, {"SEEDS": "0", "FAIL": "--cm "}, tmp_path, code=1)
    lines = [" ".join([script, *flags]) for script, flags in calls]
    broken = [line.rsplit("/", 1)[1] for line in lines if "--cm " in line]
    assert broken
    for run in broken:
        assert not [line for line in lines if f"{run}/" in line and "pages.report" not in line]


def test_a_signal_ends_the_script(tmp_path):
    calls = recorded("table2", {"SEEDS": "0", "STOP": "/ada-seed0"}, tmp_path, code=143)
    assert len(calls) == 3 and calls[-1][0] == "train"      # DDPM is trained and measured, ADA


def test_figures_have_the_same_labels_and_noise_in_each_column(tmp_path):
    env = {"CLASSES": "cat,7", "TAIL": "orchid", "SEEDS": "3,5"}
    calls = recorded("figures", env, tmp_path)
    sampled = [" ".join(flags) for script, flags in calls if script == "sample"]
    assert len(sampled) == 8
    for line in sampled:
        few = "--num 25" in line
        assert ("--classes orchid" if few else "--num 400 --classes cat,7") in line


def test_the_study_is_of_table6s_samples(tmp_path):
    env = {"SEEDS": "0", "NUM": "99"}
    calls = recorded("tableG7", env, tmp_path)
    of_table6 = recorded("table6", env, tmp_path)
    assert all(call in of_table6 for call in calls[:-1])
    script, flags = calls[-1]
    folder = "out/paper/artbench10-ir100/stable_diffusion"
    assert script == "pages.study" and flags[:5] == [
        "make", "--a", f"DDPM={folder}-ddpm-seed0/samples", "--b",
        f"CM={folder}-cm-seed0/samples"]
