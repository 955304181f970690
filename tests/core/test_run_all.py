"""Every target of run_all.sh, with programs that only record how they are called.

Each script's parser must accept the flags that run_all.sh gives to it.
"""
import importlib
import json
import os
import re
import subprocess
from functools import cache

import pytest
from conftest import ROOT, call

import runtime
import train
from pages import report
from recognition import classify
from sets.readers import READERS

TARGETS = re.findall(r"^  (\w+)\)$", (ROOT / "run_all.sh").read_text(), re.M)
SCRIPTS = {"train.py", "evaluate.py", "classify.py", "sample.py", "report.py", "prune_probe.py",
           "theory_sim.py", "capacity.py", "text_to_image.py", "figures.py"}
ENVIRONMENTS = {
    "demo": {"SCALE": "demo", "DATA_DIR": "my data"},
    "paper": {"NGPU": "2", "DATA_DIR": "my data", "SEEDS": "3,5", "CLASS_ORDER": "b c,a"},
    "inat2018": {"DATASET": "inat2018", "IR": "50"},
    "budget": {"ROOT": "my own", "STEPS": "7", "FLAGS": "--ch 64 --lr 5e-4",
               "CM_FLAGS": "--w-div 0.2", "NUM": "99", "FEATURES": "c.pt", "DATASET": "folder",
               "SEEDS": "4"},
    "tiny": {"PRESET": "tiny", "DATASET": "folder", "DATA_DIR": "my data", "SEEDS": "4"},
}

# A function of bash's in place of a program, as `export -f` hands it on
RECORDER = """() {{ {{ printf '%s\\t' {name} "$@"; echo; }} >> "$CALLS"
}}"""


class Parsed(Exception):
    """The flags were understood."""


def record(target, env, folder):
    """Run a target with recorders for programs: its exit code and the lists of words called."""
    calls = folder / "calls"
    calls.write_text("")
    recorders = {f"BASH_FUNC_{name}%%": RECORDER.format(name=name)
                 for name in ("python", "torchrun")}
    env = {**os.environ, **env, **recorders, "CALLS": str(calls)}
    done = subprocess.run(["bash", ROOT / "run_all.sh", target], env=env)
    return done.returncode, [by_file(line.split("\t")[:-1])
                             for line in calls.read_text().splitlines()]


def by_file(words):
    """The words of a call with "classify.py" in place of "-m recognition.classify"."""
    if "-m" not in words[:3]:
        return words
    words.remove("-m")
    k = 2 if words[0] == "torchrun" else 0
    words[k + 1] = words[k + 1].rpartition(".")[2] + ".py"
    return words


@pytest.fixture(scope="module")
def calls_of(tmp_path_factory):
    """calls_of(name): what record_all gives for one of ENVIRONMENTS, found out once."""
    folder = tmp_path_factory.mktemp("calls")
    return cache(lambda name: record_all(ENVIRONMENTS[name], folder))


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
    (path,) = [*ROOT.glob(script), *ROOT.glob(f"*/{script}")]
    name = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    module = importlib.import_module(name)
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
    assert len(TARGETS) == 25 and len(set(TARGETS)) == 25
    assert {"table2", "tableG8", "fig4d", "gain"} <= set(TARGETS)
    head = (ROOT / "run_all.sh").read_text().split("\nset -euo")[0]
    assert set(TARGETS) <= set(head.split())


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_command_is_understood(calls_of, monkeypatch, name):
    env = ENVIRONMENTS[name]
    calls = {tuple(words) for words in calls_of(name)}
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
    assert "stable_diffusion.py" in scripts or env.get("SCALE") == "demo"


def test_a_budget_reaches_every_run(calls_of):
    """A budget of one's own, with runs and pages in a folder of their own."""
    for words in calls_of("budget"):
        line = " ".join(words)
        if words[1] == "train.py":
            assert "--steps 7 --ch 64 --lr 5e-4" in line and "--ir 1 " in line
            assert ("--w-div 0.2" in line) == ("--cm" in words)
        if words[1] == "evaluate.py":
            assert "--num 99 --features c.pt" in line
        if words[1] in ("train.py", "report.py"):
            assert any(word.startswith("my own/") for word in words)


def setting_of(words):
    """What a call of report.py says the setting is."""
    return words[words.index("--setting") + 1]


def test_the_table_of_texts_is_of_both_sets(tmp_path):
    """At 256 pixels, three seeds, with and without CM, beside the paper's numbers."""
    _, calls = record("tableG11", {"MODEL": "my SD", "CM_FLAGS": "--w-div 0.2"}, tmp_path)
    pages = [setting_of(words) for words in calls if words[1] == "report.py"]
    paper = json.loads((ROOT / "pages/paper_results.json").read_text())["tables"]
    paper = paper["tableG11"]["settings"]
    assert pages == list(paper) == ["cub200-ir10", "flowers102-ir10"]
    trained = [words for words in calls if words[1:3] == ["text_to_image.py", "train"]]
    assert len(trained) == 2 * 2 * 3
    for words in trained:
        line = " ".join(words)
        assert "--resolution" not in line and "--autoencoder my SD --text-encoder my SD" in line
        assert ("--w-div 0.2" in line) == ("--cm" in words)
    rows = [words for words in calls if words[1] == "report.py"][0]
    names = [rows[k + 1].split("=")[0] for k, word in enumerate(rows) if word == "--row"]
    assert names == list(paper["cub200-ir10"]["rows"])
    env = {"DATASET": "cub200", "RESOLUTION": "64", "SEEDS": "0"}       # 64 is train.py's default
    _, calls = record("tableG11", env, tmp_path)
    trained = [" ".join(words) for words in calls if words[1:3] == ["text_to_image.py", "train"]]
    assert len(trained) == 2 and all("--resolution 64" in line for line in trained)
    assert setting_of(calls[-1]) == "cub200-ir10-64"


@pytest.mark.parametrize("dataset", READERS)
def test_the_sets_own_resolution_is_the_default(tmp_path, dataset):
    """RESOLUTION=64 of CelebA-HQ: the same runs, and the page with the paper's column."""
    env = {"DATASET": dataset, "SEEDS": "0", "STEPS": "5"}
    size = READERS[dataset].resolution
    _, default = record("tableG9", env, tmp_path)
    _, named = record("tableG9", {**env, "RESOLUTION": str(size)}, tmp_path)
    assert named == default
    _, other = record("tableG9", {**env, "RESOLUTION": str(2 * size)}, tmp_path)
    assert any(f"-{2 * size}" in words[words.index("--setting") + 1] for words in other
               if "--setting" in words)


def test_a_presets_resolution_is_not_the_sets_own(tmp_path):
    """Where a small preset has another one, RESOLUTION=64 reaches train.py."""
    env = {"DATASET": "folder", "SEEDS": "0", "PRESET": "tiny", "RESOLUTION": "64"}
    _, calls = record("tableG9", env, tmp_path)
    trained = [words for words in calls if words[1] == "train.py"]
    assert trained and all(words[words.index("--resolution") + 1] == "64" for words in trained)


REFUSED = {     # target, variables, and what the message names
    "another scale": ("table2", {"SCALE": "Paper"}, "SCALE='Paper'"),
    "demo of SD": ("table6", {"SCALE": "demo"}, "SCALE=demo"),
    "demo of texts without a folder": ("tableG11", {"SCALE": "demo"}, "DATA_DIR"),
    "demo of texts on digits": (
        "tableG11", {"SCALE": "demo", "DATA_DIR": "x", "DATASET": "digits"}, "without DATASET"),
    "demo of a folder": ("table2", {"SCALE": "demo", "DATASET": "folder"}, "STEPS"),
    "no such target": ("table99", {"SCALE": "demo"}, "'table99'"),
    "a pattern for a target": ("table.", {}, "'table.'"),
    "a target of two lines": ("foo)\n  table2", {}, "'foo)   table2'"),
    "a seed in FLAGS": ("table2", {"FLAGS": "--ch 64 --seed 5"}, "--seed is set"),
    "a folder in FLAGS": ("table2", {"FLAGS": "--out=x"}, "--out is set"),
    "a loss in CM_FLAGS": ("table2", {"CM_FLAGS": "--base ddpm"}, "--base is set"),
    "steps in FLAGS of the demo": ("table2", {"SCALE": "demo", "FLAGS": "--steps 9"}, "--steps"),
    "no GPU": ("table2", {"NGPU": "0"}, "NGPU='0'"),
    "negative GPUs": ("table2", {"NGPU": "-1"}, "NGPU='-1'"),
    "half a GPU": ("table2", {"NGPU": "1.5"}, "NGPU='1.5'"),
    "a variable for GPUs": ("table2", {"NGPU": "SEEDS"}, "NGPU='SEEDS'"),
    "too many GPUs": ("table2", {"NGPU": "9" * 30}, "NGPU="),
    "empty seeds": ("table2", {"SEEDS": ""}, "SEEDS=''"),
    "blank seeds": ("table2", {"SEEDS": " "}, "SEEDS=' '"),
    "a seed twice": ("table2", {"SEEDS": "3,5,3"}, "3 is there twice"),
    "a seed of zeros": ("table2", {"SEEDS": "1,01"}, "SEEDS='1,01'"),
    "words for seeds": ("table2", {"SEEDS": "one,two"}, "SEEDS='one,two'"),
    "a negative seed": ("table2", {"SEEDS": "-1"}, "SEEDS='-1'"),
    "seeds that end in a comma": ("table2", {"SEEDS": "1,"}, "SEEDS='1,'"),
    "= in a path": ("table2", {"ROOT": "lr=1"}, "ROOT='lr=1'"),
    "a comma in a path": ("table2", {"ROOT": "a,b"}, "ROOT='a,b'"),
    "a line end in a path": ("table2", {"ROOT": "a\nb"}, "ROOT='a b'"),
    "@SEED in a path": ("table2", {"ROOT": "a@SEED"}, "ROOT='a@SEED'"),
}


@pytest.mark.parametrize("target, env, words", REFUSED.values(), ids=REFUSED)
def test_wrong_variables_are_refused_before_any_work(tmp_path, capfd, target, env, words):
    code, calls = record(target, env, tmp_path)
    error = capfd.readouterr().err
    assert code == 2 and not calls
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_two_targets_are_refused(capfd):
    done = subprocess.run(["bash", ROOT / "run_all.sh", "table2", "table3"])
    error = capfd.readouterr().err
    assert done.returncode == 2 and "'table3'" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["NGPU", "SEEDS", "SCALE", "IR", "STEPS", "NUM", "ROOT"])
def test_no_variable_is_evaluated_by_the_shell(tmp_path, name):
    """Bash evaluates what it takes for arithmetic, and in it the commands of an index."""
    touched = tmp_path / "touched"
    record("table2", {name: f"a[$(touch {touched})]"}, tmp_path)
    assert not touched.exists()


ODD = "100% [a] *b* ?c  d"       # a folder's name


def test_odd_folders_reach_the_scripts_unchanged(tmp_path):
    """Also where the current folder has a file that a pattern would match."""
    root = tmp_path / ODD
    env = {"DATA_DIR": f"/data/{ODD}, x=1", "ROOT": str(root), "NUM": "[r]*"}
    code, calls = record("table1", env, tmp_path)
    assert code == 0
    for words in calls:
        if words[1] == "train.py":
            assert words[words.index("--data-dir") + 1] == env["DATA_DIR"]
            assert words[words.index("--out") + 1].startswith(f"{root}/")
        if words[1] == "evaluate.py":
            assert words[words.index("--num") + 1] == env["NUM"]
    lora = next(words for words in calls if "--init-from" in words)
    source = lora[lora.index("--init-from") + 1]
    assert source == f"{root}/cifar100-ir100/cbdm-seed0/ckpt.pt"


def test_rows_of_odd_folders_are_the_files_of_their_own_seeds(tmp_path):
    """What report.py reads of a --row: wildcards in a folder's name are no wildcards."""
    root = tmp_path / ODD
    similar = tmp_path / ODD.replace("*b*", "xbx")
    for folder in (root, similar):
        for seed in (3, 5):
            path = folder / f"cifar100-ir100/ddpm-seed{seed}/eval-plain.json"
            path.parent.mkdir(parents=True)
            value = {"num_real": seed, "root": folder.name, "num": 9, "fd": 1.0, "groups": {},
                     "classes": {}, "settings": {"reference": "digits"}}
            path.write_text(json.dumps(value))
    code, calls = record("table2", {"ROOT": str(root), "SEEDS": "3,5"}, tmp_path)
    words = next(words for words in calls if words[1] == "report.py")
    name, results = report.read_row(words[words.index("--row") + 1])
    assert code == 0 and name == "DDPM"
    assert [(r["num_real"], r["root"]) for r in results] == [(3, root.name), (5, root.name)]


def test_figures_of_named_classes(tmp_path):
    """The methods' columns have the same labels, noise and settings; TAIL is the rare class."""
    env = {"CLASSES": "cat,7", "TAIL": "orchid", "SEEDS": "3,5"}
    _, calls = record("figures", env, tmp_path)
    by_script = {name: [" ".join(words[2:]) for words in calls if words[1] == name]
                 for name in ("train.py", "sample.py", "figures.py")}
    assert len(by_script["train.py"]) == 4
    assert all("--seed 3 " in line for line in by_script["train.py"])
    assert len(by_script["sample.py"]) == 8
    for line in by_script["sample.py"]:
        few = "--num 25" in line
        assert ("--classes orchid" if few else "--num 400 --classes cat,7") in line
    assert sum("--branch general" in line for line in by_script["sample.py"]) == 1
    methods, theta_g, tail = by_script["figures.py"]
    assert [methods.count(f"{name}=") for name in ("DDPM", "CBDM", "OC", "CM")] == [1] * 4
    assert "--classes cat,7" in methods and "--classes cat,7" in theta_g
    assert "--across 5 --down 5" in tail and "--classes" not in tail


def test_cm_flags_are_for_runs_with_cm_only(tmp_path):
    """Not for a run whose folder's name has the word."""
    env = {"ROOT": "my --cm runs", "CM_FLAGS": "--w-div 0.2"}
    _, calls = record("table1", env, tmp_path)
    for words in calls:
        if words[1] == "train.py":
            assert ("--w-div" in words) == ("--cm" in words)
