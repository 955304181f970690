"""README.md and docs/: snippets run as printed, in a fresh copy of the checkout; every printed
command is one that the scripts understand; links and pictures exist."""
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
from conftest import ROOT, TINY_FLAGS, parse_only

import disk
import loop

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.name: path.read_text() for path in PAGES}
# {"import losses": (the snippet, its command)}: "# my_run.py, for: COMMAND" is the first line
SNIPPETS = {code.split("\n")[0]: (code, command) for text in TEXT.values() for command, code
            in re.findall(r"```python\n# my_run.py, for: python (.*?)\n(.*?)```", text, re.S)}
FEW_STEPS = [*TINY_FLAGS[2:], "--steps", "2", "--out", "run"]      # without --dataset digits


@pytest.fixture
def checkout(tmp_path):
    """A fresh copy of the checkout: the files that git tracks, or would."""
    copy = tmp_path / "copy"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:                   # a downloaded archive, without .git
        skipped = shutil.ignore_patterns("out", "data", "__pycache__", ".*")
        return shutil.copytree(ROOT, copy, ignore=skipped)
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():          # else it is being deleted
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def run_snippet(checkout, first_line, *more):
    """Do what the snippet that begins with `first_line` says; return what was printed."""
    code, command = SNIPPETS[first_line]
    (checkout / "my_run.py").write_text(code)
    words = [sys.executable, *shlex.split(command), *map(str, more)]
    done = subprocess.run(words, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_snippets_are_run_here():
    assert sorted(SNIPPETS) == ["import data, numpy as np", "import losses", "import networks",
                                "import torch, torchvision"]


def test_a_loss_of_your_own(checkout, data_dir):
    run_snippet(checkout, "import losses", *FEW_STEPS, "--data-dir", data_dir)
    ckpt = disk.load(checkout / "run/ckpt.pt", ["diffusion"])
    assert ckpt["step"] == 2 and ckpt["rank_ratio"] == 0.1
    assert ckpt["config"]["base"] == "min_snr" and ckpt["config"]["snr_gamma"] == 5


def test_a_network_of_your_own(checkout, data_dir):
    """It trains with CM."""
    run_snippet(checkout, "import networks", *FEW_STEPS, "--data-dir", data_dir)
    ckpt = disk.load(checkout / "run/ckpt.pt", ["diffusion"])
    assert ckpt["network"] == {"network": "mine", "channels": 1, "num_classes": 10, "ch": 16}
    assert ckpt["rank_ratio"] == 0.1


def test_a_data_set_of_your_own(checkout):
    run_snippet(checkout, "import data, numpy as np", *FEW_STEPS, "--num-res-blocks", 1, "--ir", 10)
    record = disk.load(checkout / "run/ckpt.pt", ["diffusion"])["data"]
    assert record["class_names"] == ["top", "middle", "bottom"]
    assert record["class_counts"] == [100, 31, 10]


def test_cm_on_your_own_network(checkout):
    printed = run_snippet(checkout, "import torch, torchvision")
    assert printed.split() == ["True"]          # B = 0: nothing has been trained


def printed_commands(text):
    """[(module, [its flags])] of the commands of a Markdown text that start a script of ours."""
    text = re.sub(r"```python\n.*?```", "", text, flags=re.S)       # those are run, above
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`((?:python|torchrun) [^`]*)`", prose)
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if "..." in words or not words or words[0] not in ("python", "torchrun"):
            continue
        for k, word in enumerate(words):
            path = word if word.endswith(".py") else word.replace(".", "/") + ".py"
            if (ROOT / path).exists():
                found.append((path.removesuffix(".py").replace("/", "."), words[k + 1:]))
                break
    return [(module, flags) for module, flags in found if not module.startswith("tests.")]


@pytest.mark.parametrize("name", TEXT)
def test_every_command_is_understood(monkeypatch, name):
    commands = printed_commands(TEXT[name])
    assert len(commands) >= 3 or name == "DIFFERENCES.md"
    for module, flags in commands:
        parse_only(monkeypatch, module, flags)


@pytest.mark.parametrize("kind", loop.NEXT)
def test_the_next_command_is_understood(monkeypatch, capsys, kind):
    """Rank 0 alone prints it, and not under run_all.sh."""
    args = Namespace(out="a run", dataset="folder", data_dir="my images")
    monkeypatch.delenv("RUN_ALL", raising=False)        # bash run_all.sh tests
    loop.print_next_of(kind, args)
    line = capsys.readouterr().out.removeprefix("Next: ")
    [(module, flags)] = printed_commands(f"```bash\n{line}```")
    assert "a run/ckpt.pt" in flags
    parse_only(monkeypatch, module, flags)
    for variable in ("RUN_ALL", "RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            loop.print_next_of(kind, args)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_exist(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target
