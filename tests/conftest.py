"""Shared by all tests: `pytest -n 2` from the project's folder, on the CPU.

No network, and no data but scikit-learn's digits.
"""
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

if "PYTEST_XDIST_WORKER" in os.environ:     # several threads of several workers only wait
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

os.environ["CUDA_VISIBLE_DEVICES"] = ""
# What run_all.sh calls is this Python, also where its environment is not activated
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import disk
import evaluate
import runtime
import train
from cm_layers import reserved
from data import load, long_tail, to_float
from recognition import classify, resnet
from losses import BASES, Objective, bind, options_of
from model import make_alphas_bar
from networks import build

TINY = {"channels": 1, "num_classes": 10, "ch": 16, "ch_mult": [1, 2], "attn": [1],
        "num_res_blocks": 1, "dropout": 0.1}
COUNTS = [148, 106, 76, 54, 39, 28, 20, 14, 10, 7]      # of the long-tailed digits, IR 20
TINY_FLAGS = ["--dataset", "digits", "--ch", "16", "--batch-size", "16", "--log-every", "1",
              "--sample-every", "0", "--device", "cpu"]


def call(main, *argv):
    """Run a script's main() in this process with these flags, as `run` would; errors are raised."""
    with patch.object(sys, "argv", ["script", *map(str, argv)]):
        main()


def resolved(*flags):
    """The settings of train.py that these flags mean."""
    parser = train.make_parser()
    return train.resolve(parser.parse_args([str(flag) for flag in flags]), parser.given)


def parse_only(monkeypatch, module, flags):
    """Call a script's main until it has parsed its flags: it must understand each of them."""
    class Parsed(Exception):
        pass

    def parse_and_stop(self, *args):
        parse_args(self, *args)
        raise Parsed

    main, parse_args = importlib.import_module(module).main, runtime.Parser.parse_args
    with monkeypatch.context() as m, pytest.raises(Parsed):
        m.setattr(runtime.Parser, "parse_args", parse_and_stop)
        call(main, *flags)


def randomize(net, seed=0, scale=0.05):
    """Give every parameter a normal value, so that no part of the network is almost off."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale)
    return net


def tiny_net(rank_ratio=0.1, **changes):
    """A small random UNet for digits; rank_ratio None leaves it plain."""
    return randomize(build({**TINY, **changes}, rank_ratio))


def a_step(digits, base="ddpm", *, rank_ratio=0.1, dropout=0.0, cm=None, label_drop=0.1,
           **options):
    """An objective on a random tiny network, and a batch of 12 digits. options: the base's own."""
    assert set(options) <= set(options_of(BASES[base]))
    objective = Objective(net=tiny_net(rank_ratio, dropout=dropout), base=bind(base, options),
                          counts=COUNTS, alphas_bar=make_alphas_bar(), cm=cm,
                          label_drop=label_drop)
    rows = np.linspace(0, len(digits.labels) - 1, 12).astype(int)
    x_0 = to_float(torch.from_numpy(digits.images[rows]))
    y = torch.from_numpy(digits.labels[rows])
    return objective, objective.draw_batch(x_0, y, seed=0, step=3)


def gradient_of(value, net):
    """The gradient of a scalar in all parameters of a network, as one vector."""
    grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def refuses(capsys, main, *flags, says):
    """Run a script as its command line would; it must exit with code 2 after one error line.

    says: words that the line must hold, each of them.
    """
    with pytest.raises(SystemExit) as e:
        runtime.run(lambda: call(main, *flags))
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert e.value.code == 2 and len(lines) == 1 and "Traceback" not in text
    for word in says:
        assert word in lines[0], lines[0]


@contextmanager
def interrupted(monkeypatch, owner, name, number, which=signal.SIGTERM):
    """Send this process a signal before call `number` of a method; what runs here must exit so."""
    method, calls, handler = getattr(owner, name), [], signal.getsignal(which)

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), which)
        return method(*args, **kwargs)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
        m.setattr(owner, name, counted)
        yield calls
    assert e.value.code == 128 + which
    assert signal.getsignal(which) == handler       # the next signal ends what called the training


def torchrun(*argv, processes=2):
    """Start torchrun; stdout and stderr go to one pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env)


def by_two_processes(*argv):
    """Run a script under torchrun to its end."""
    process = torchrun(*argv)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text


def fill_reserved(module, std=1.0, A=None):
    """Give every B of the low-rank parts normal values, as after training; A: of std A, too."""
    g = torch.Generator().manual_seed(1)
    for _, _, part in reserved(module):
        torch.nn.init.normal_(part.B, std=std, generator=g)
        if A is not None:
            torch.nn.init.normal_(part.A, std=A, generator=g)


def assert_same_losses(a, b):
    """Two runs logged the same numbers at the same steps, to 1e-4."""
    a, b = read_log(a), read_log(b)
    assert len(a) == len(b) > 0
    assert [r.keys() for r in a] == [r.keys() for r in b]
    for r, s in zip(a, b):
        assert r == pytest.approx(s, rel=1e-4, abs=1e-9)


def assert_equal(a, b):
    """Two {name: tensor} are equal to the bit."""
    torch.testing.assert_close(dict(a), dict(b), rtol=0, atol=0)


def ckpt_of(out):
    """The checkpoint of a run in `out`."""
    return disk.load(out / "ckpt.pt", ["diffusion", "consistency"])


def assert_noted(capsys, word):
    """One note, with this word, was printed since the last look; or none, where it is empty."""
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(found) == bool(word) and all(word in line for line in found)


def pixels(folder):
    """arr_0 of a folder's samples as whole numbers that may be subtracted."""
    with np.load(folder / "samples.npz") as f:
        return f["arr_0"].astype(int)


def read_log(out):
    """The logged numbers of a run but for its speed: a list of dicts."""
    records = [json.loads(line) for line in (out / "log.jsonl").open()]
    return [{k: v for k, v in record.items() if k != "images_per_s"} for record in records]


def wait_for(path, process):
    """Wait until a file exists; the process that writes it must be running."""
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def picture(path, seed, mode="RGB", size=(14, 12)):
    """Write a random image file; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, quality=95)
    return path


def make_folder(root, sizes):
    """A folder with a sub-folder of small images for each of {class name: number of images}."""
    for c, (name, n) in enumerate(sizes.items()):
        for i in range(n):
            picture(root / name / f"{i:03d}.png", 100 * c + i)
    return root


def write_colour_classifier(classifier, path, resolution=8):
    """Write a copy of the digits' classifier that takes colour images of this size."""
    ckpt = torch.load(classifier, weights_only=True)
    net = resnet.load_classifier(classifier, "cpu")[0]
    net.conv1 = torch.nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
    network = {**ckpt["network"], "channels": 3}
    data = {**ckpt["data"], "resolution": resolution}
    torch.save({**ckpt, "network": network, "data": data, "model": net.state_dict()}, path)


def cub200(root):
    top = root / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    rows = [(c, i) for c in range(3) for i in range(5)]
    files = [f"{names[c]}/{names[c][4:]}_{i:04d}_{c}.jpg" for c, i in rows]
    for k, f in enumerate(files):
        picture(top / "images" / f, k, mode="L" if k == 3 else "RGB")

    def write(name, values):
        (top / name).write_text("".join(f"{k + 1} {v}\n" for k, v in enumerate(values)))

    write("images.txt", files)
    write("classes.txt", names)
    write("image_class_labels.txt", [c + 1 for c, _ in rows])
    write("train_test_split.txt", [int(i < 3) for _, i in rows])
    return top / "images" / files[5]


def flowers102(root):
    for k in range(1, 13):
        picture(root / "jpg" / f"image_{k:05d}.jpg", k)
    labels = np.array([[1 + (k % 3) for k in range(12)]], np.uint8)
    splits = {
        "trnid": np.arange(1, 4)[None],
        "valid": np.array([[4, 5, 6]]),
        "tstid": np.arange(7, 13)[None],
    }
    scipy.io.savemat(root / "imagelabels.mat", {"labels": labels})
    scipy.io.savemat(root / "setid.mat", splits)
    return root / "jpg/image_00002.jpg"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder in which the digits are packed once for all tests."""
    folder = tmp_path_factory.mktemp("data")
    load("digits", folder)
    return folder


@pytest.fixture(scope="session")
def tiny(data_dir):
    """Flags of a tiny run on the packed digits, but for --out and the steps."""
    return (*TINY_FLAGS, "--data-dir", data_dir)


@pytest.fixture(scope="session")
def digits(data_dir):
    """The long-tailed digits, IR 20."""
    images = load("digits", data_dir)
    return images.take(long_tail(images.labels, 20))


@pytest.fixture(scope="session")
def cm_run(tmp_path_factory, tiny):
    """The folder of a small CM run with its checkpoint.

    30 steps are enough to be different from its initial weights.
    """
    out = tmp_path_factory.mktemp("run") / "cm"
    call(train.main, *tiny, "--steps", 30, "--out", out)
    return out


@pytest.fixture(scope="session")
def from_run(cm_run):
    """Flags that name the checkpoint of that run, and the CPU."""
    return ("--ckpt", cm_run / "ckpt.pt", "--device", "cpu")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, data_dir):
    """A quickly trained classifier of digits: its checkpoint's path."""
    out = tmp_path_factory.mktemp("classifier")
    call(classify.main, "--epochs", 6, "--width", 8, "--data-dir", data_dir, "--out", out,
         "--device", "cpu")
    return out / "ckpt.pt"


@pytest.fixture
def measured(tmp_path):
    """measured(*flags): the numbers that evaluate.py writes with these flags, on the CPU."""
    def measure(*flags):
        call(evaluate.main, *flags, "--device", "cpu", "--out-json", tmp_path / "measured.json")
        return disk.read_json(tmp_path / "measured.json")
    return measure


@pytest.fixture
def cpu():
    """A Runtime on the CPU in float32."""
    return runtime.Runtime(torch.device("cpu"), torch.float32)


# --------------------------------------------------------------------------------------------------
# A tiny Stable Diffusion, and images for it

@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """The folder of a Stable Diffusion with 8 x 8 latents, its weights drawn at random."""
    import diffusers
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    unet.save_pretrained(folder / "unet")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae.save_pretrained(folder / "vae")
    schedule = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012,
                                       beta_schedule="scaled_linear")
    schedule.save_pretrained(folder / "scheduler")
    write_text_encoder(folder)
    return folder


def write_text_encoder(folder):
    """A tokenizer of single letters, and a text encoder of one layer."""
    import transformers
    letters = [chr(c) for c in range(33, 127)]
    ends = [letter + "</w>" for letter in letters]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *ends]
    settings = {"model_max_length": 20, "tokenizer_class": "CLIPTokenizer"}
    disk.write_json(folder / "tokenizer/vocab.json", {w: i for i, w in enumerate(vocabulary)})
    disk.write_json(folder / "tokenizer/tokenizer_config.json", settings)
    disk.write_text(folder / "tokenizer/merges.txt", "#version: 0.2\n")
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=20, eos_token_id=1, bos_token_id=0)
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Three classes of 12, 6 and 3 small images: of noise, each class in one colour."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.RandomState(0)
    for name, n, colour in zip(["old_master", "pop", "realism"], [12, 6, 3], np.eye(3) * 180):
        (folder / name).mkdir()
        for i in range(n):
            pixels = np.clip(rng.randint(0, 60, (16, 16, 3)) + colour, 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def autoencoder(pictures, tmp_path_factory):
    """A checkpoint of an autoencoder trained on `pictures`, factor 2, and the folder of packs."""
    from latent import text_to_image
    folder = tmp_path_factory.mktemp("ae")
    call(text_to_image.main, "autoencoder", "--dataset", "folder", "--data-dir", pictures,
         "--resolution", 16, "--pack-dir", folder / "packs", "--ch", 8, "--factor", 2, "--lr", 3e-3,
         "--warmup", 0, "--batch-size", 4, "--steps", 60, "--ema", 0.9, "--sample-every", 60,
         "--log-every", 1, "--dtype", "float32", "--device", "cpu", "--out", folder / "run")
    return folder / "run/ckpt.pt", folder / "packs"
