"""README.md and docs/RESULTS.md: "Hack it" works as its text says, in a fresh copy of the
checkout; the file map is whole; every printed command is one that the scripts understand."""
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_FLAGS, call

import disk
import runtime
import sample
import train
from data import long_tail_counts
from latent import stable_diffusion
from model import UNet, UNetConfig
from recognition import classify, resnet

TEXT = (ROOT / "README.md").read_text()
HACK_IT = TEXT.split("## Hack it")[1].split("\n## ")[0]
RESULTS = (ROOT / "docs/RESULTS.md").read_text()
MORE = RESULTS.split("## More to hack")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", HACK_IT + MORE, re.S)
COMMANDS = re.findall(r"`python ([^`]*my_run\.py[^`]*)`", HACK_IT + MORE)
DIFFERENCES = (ROOT / "docs/DIFFERENCES.md").read_text()
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


def run_snippet(checkout, number, *more):
    """Do what the text above snippet `number` says; return what was printed."""
    assert not (checkout / "my_run.py").exists()
    (checkout / "my_run.py").write_text(BLOCKS[number])
    command = [sys.executable, *shlex.split(COMMANDS[number]), *map(str, more)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_file_map():
    top, wings = TEXT.split("**At the top**")[1].split("\n## ")[0].split("**In wings**")
    for path in [*ROOT.glob("*.py"), ROOT / "run_all.sh"]:
        assert f"`{path.name}`" in top or path.name == "budget.py", path.name
    for path in ROOT.glob("*/__init__.py"):
        assert f"- `{path.parent.name}/`: " in wings


def test_size():
    lines = TEXT.splitlines()
    assert len(lines) <= 200
    assert all(len(line) <= 100 for line in lines if not line.startswith("|"))


def test_pictures_and_links():
    for folder, text in ((ROOT, TEXT), (ROOT / "docs", RESULTS), (ROOT / "docs", DIFFERENCES)):
        targets = re.findall(r"\]\(([^)#]+)", text)
        assert targets
        for target in targets:
            assert (folder / target).exists(), target


# --------------------------------------------------------------------------------------------------
# docs/DIFFERENCES.md says what the code does

def choice(name):
    """What the row `name` says of the paper and of this code."""
    row = next(line for line in DIFFERENCES.splitlines() if line.startswith(f"| {name} |"))
    return row.removeprefix(f"| {name} |")


def test_the_choices_in_training():
    args = train.resolve(train.make_parser().parse_args(["--dataset", "cifar100"]))
    digits = train.resolve(train.make_parser().parse_args(["--dataset", "digits"]))
    assert f"norm {args.grad_clip} " in choice("Gradient clipping")
    assert f"decay {args.ema}, " in choice("Averaged weights (EMA)")
    assert f"digits {digits.ema};" in choice("Averaged weights (EMA)")
    assert f"probability {args.label_drop} " in choice("Label drop")
    assert (args.cbdm_tau, args.cbdm_gamma, args.cbdm_y) == (1e-3, 1 / 4, "uniform")
    assert "tau = 1e-3" in choice("CBDM") and "gamma = 1/4" in choice("CBDM")
    assert f"rank ratio {args.rank_ratio}" in choice("CBDM (LoRA), Table 1")
    assert args.attn == [1] and "16 x 16 of 32" in choice("Attention")
    assert args.ch == 128 and args.num_res_blocks == 2 and "128 channels" in choice("Width, blocks")


def test_the_choice_of_the_first_attention_output():
    net = UNet(UNetConfig(ch=32, ch_mult=[1, 2], num_res_blocks=1))
    outputs = [m.weight for name, m in net.named_modules() if name.endswith("attention.proj")]
    assert len(outputs) >= 3 and all(0 < w.abs().max() < 1e-5 for w in outputs)
    assert "gain 1e-5" in choice("First attention output")


def test_the_choices_of_data_and_stable_diffusion():
    assert long_tail_counts([18_943, 11_057], 100).tolist() == [15_000, 150]
    assert "15,000 Female and 150 Male" in choice("CelebA-HQ")
    parser = stable_diffusion.make_train_parser()
    args = parser.parse_args([])
    assert (args.lr, args.warmup) == (3e-4, 0) and "constant, no warm-up" in choice(
        'Learning rate | "initial" 3e-4')
    assert f"decay {args.ema} " in choice("Averaged weights, clipping")
    assert f"norm {args.grad_clip};" in choice("Averaged weights, clipping")
    assert sample.DEFAULTS["latent"] == {"sampler": "ddim", "guidance": 1.5, "clip": False}
    assert " 1.5," in choice("Guidance")


def test_the_choices_of_recognition():
    norms = resnet.NormedLinear(512, 100).weight.norm(dim=1)
    assert abs(norms.mean().item() - 0.58) < 0.01 and "norm 0.58" in choice("LDAM")
    args = classify.resolve(classify.make_parser().parse_args(["--dataset", "cifar100", "--cm"]))
    assert args.reserve == list(resnet.STAGES) and "all 20 with the stem" in choice("CM")
    assert not args.drw and "without deferred re-weighting" in choice("LDAM")
    assert f"{args.epochs} epochs" in choice("Recipe")


@pytest.mark.parametrize("name, words", [
    ("Flips", "mirrored"), ("Group experts, Table E.2", "third"), ("+Focal", "no gradient"),
    ("CBDM", "one y'"), ("OC", "move no chance"), ("ArtBench-10's order", "is not known"),
    ("DDIM's end", "alphas_bar = 1"), ("CBDM (LoRA), Table 1", "another full run")])
def test_other_choices_are_named(name, words):
    assert words in choice(name)


# --------------------------------------------------------------------------------------------------

def printed_commands(text):
    """[(script, [its flags])] of the commands of a Markdown text that start a script of ours."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`((?:python|torchrun) [^`]*)`", prose)
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        scripts = [word for word in words if word.endswith(".py") and (ROOT / word).exists()]
        if not scripts or scripts[0].startswith("tests/") or words[-1] == "...":
            continue
        if "--plugin" in words:
            continue                    # those are run, below
        found.append((scripts[0], words[words.index(scripts[0]) + 1:]))
    return found


@pytest.mark.parametrize("name", ["README.md", "docs/RESULTS.md"])
def test_every_command_is_understood(monkeypatch, name):
    class Understood(Exception):
        pass

    parse = runtime.Parser.parse_args

    def parse_and_stop(self, *args):
        parse(self, *args)
        raise Understood

    monkeypatch.setattr(runtime.Parser, "parse_args", parse_and_stop)
    commands = printed_commands((ROOT / name).read_text())
    assert len(commands) > 10
    for script, flags in commands:
        module = importlib.import_module(script.removesuffix(".py"))
        with pytest.raises(Understood):
            call(module.main, *flags)


def test_the_text_says_how():
    assert len(BLOCKS) == len(COMMANDS) == 4
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("cm", ["--cm", "--no-cm"])
def test_a_loss_of_your_own(checkout, data_dir, cm):
    run_snippet(checkout, 0, *FEW_STEPS, cm, "--data-dir", data_dir)
    ckpt = disk.load(checkout / "run/ckpt.pt", ["diffusion"])
    assert ckpt["step"] == 2
    assert ckpt["config"]["base"] == "huber"
    assert ckpt["config"]["huber_delta"] == 2
    assert ckpt["rank_ratio"] == (0.1 if cm == "--cm" else None)


def test_a_network_of_your_own(checkout, data_dir):
    """It trains with CM, and is sampled where its file is named."""
    run_snippet(checkout, 1, *FEW_STEPS, "--data-dir", data_dir)
    ckpt = disk.load(checkout / "run/ckpt.pt", ["diffusion"])
    assert ckpt["network"] == {"network": "mine", "channels": 1, "num_classes": 10, "ch": 16}
    assert ckpt["rank_ratio"] == 0.1
    words = [sys.executable, "sample.py", "--ckpt", "run/ckpt.pt", "--num", "3", "--steps", "1",
             "--device", "cpu"]
    for plugin, code in (([], 2), (["--plugin", "my_run.py"], 0)):
        done = subprocess.run([*words, *plugin], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == code and ("--plugin" in done.stderr) == (code == 2)


def test_a_data_set_of_your_own(checkout):
    run_snippet(checkout, 2, *FEW_STEPS, "--num-res-blocks", 1, "--ir", 10)
    record = disk.load(checkout / "run/ckpt.pt", ["diffusion"])["data"]
    assert record["class_names"] == ["top", "middle", "bottom"]
    assert record["class_counts"] == [100, 31, 10]


def test_cm_on_your_own_network(checkout):
    assert run_snippet(checkout, 3).split() == ["True"]     # B = 0: nothing has been trained
