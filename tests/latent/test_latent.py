"""stable_diffusion.py on a tiny random Stable Diffusion in diffusers' layout.

The cut network, its two low-rank parts, training, samples.
"""
import json
import os
import resource
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_losses, call, refuses, torchrun
from PIL import Image
from torch.testing import assert_close

import disk
import evaluate
import runtime
import sample as sample_py
from cm_layers import count, general_only, merge, reserved
from latent import stable_diffusion as sd
from losses import Objective, bind
from recognition import classify
from sets.readers import READERS

FLAGS = ("--dataset folder --ir 1 --resolution 16 --rank 6 --batch-size 8 --log-every 1 "
         "--sample-every 0 --device cpu --dtype float32").split()
CM_RANK = ["--cm-rank", 2]
NAMES = ["old_master", "pop", "realism"]
COUNTS = [12, 6, 3]
NEW_SETTINGS = ("sample_every", "keep_every", "checkpointing", "compile")     # not in older runs
CONFIG = {"prompt": "a {} painting", "rank": 6, "cm": True, "cm_rank": 2, "model": "tiny"}


# --------------------------------------------------------------------------------------------------
# A tiny Stable Diffusion, and images for it

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes of 12, 6 and 3 small images: of noise, each class in one colour."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.RandomState(0)
    for name, n, colour in zip(NAMES, COUNTS, np.eye(3) * 180):
        (folder / name).mkdir()
        for i in range(n):
            pixels = np.clip(rng.randint(0, 60, (16, 16, 3)) + colour, 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def model(tiny):
    return sd.Model(str(tiny), torch.device("cpu"))


@pytest.fixture
def net(model):
    """The tiny model's LatentUNet with CM, its low-rank parts untrained."""
    return model.network(NAMES, CONFIG)


# --------------------------------------------------------------------------------------------------
# The network

def test_the_cut_network_is_the_whole_one(model, tiny):
    """encode and decode are diffusers' forward, label by label, with its text encoder's states."""
    import diffusers
    whole = diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet").eval()
    net = model.network(NAMES, CONFIG).eval()
    x = torch.randn(4, 4, 8, 8)
    t = torch.tensor([0, 10, 500, 999])
    y = torch.tensor([0, 2, 1, -1])
    texts = ["a old master painting", "a realism painting", "a pop painting", ""]
    ids = model.tokenizer(texts, padding="max_length", max_length=20, return_tensors="pt").input_ids
    with torch.no_grad():
        assert_close(net(x, t, y), whole(x, t, model.text(ids)[0]).sample)


def test_what_is_trained(net):
    """W_0 is frozen; every attention projection has a LoRA, the decoder's a reserved part too."""
    layers = [name for name, _ in net.named_modules() if name.endswith(sd.PROJECTIONS)]
    in_decoder = [name for name in layers if name.startswith("decoder")]
    names = set(sd.adapters(net))
    assert {n for n, p in net.named_parameters() if p.requires_grad} == names
    assert sum(".0.A" in n for n in names) == len(layers)           # .0 is the LoRA
    assert all(n.startswith("decoder") for n in names if ".1.A" in n)       # .1 the reserved part
    assert len(list(reserved(net))) == len(in_decoder) > 0
    assert {p.rank for _, _, p in reserved(net)} == {2}


def test_theta_g_has_the_lora_and_not_the_reserved_part(net):
    layer = next(m for name, m in net.decoder.named_modules() if name.endswith("to_q"))
    for p in sd.adapters(net).values():
        torch.nn.init.normal_(p, std=0.1)
    lora, low_rank = layer.parametrizations.weight
    W_0 = layer.parametrizations.weight.original
    assert_close(layer.weight, W_0 + lora.B @ lora.A + low_rank.B @ low_rank.A)
    with general_only(net.decoder):
        assert_close(layer.weight, W_0 + lora.B @ lora.A)


def test_merging_theta_g_changes_nothing(net):
    """merge(net, "general") computes what general_only does; count tells the two parts apart."""
    for p in sd.adapters(net).values():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(2, 4, 8, 8)
    y = torch.tensor([0, -1])
    t = y + 5
    with torch.no_grad(), general_only(net):
        general = net(x, t, y)
    parts = [p for _, _, p in reserved(net)]
    assert count(net)["expert"] == sum(p.A.numel() + p.B.numel() for p in parts) > 0
    with torch.no_grad():
        assert_close(merge(net, "general")(x, t, y), general)
    assert not list(reserved(net))


@pytest.mark.parametrize("base", ["ddpm", "cbdm", "oc"])
def test_every_loss_trains_only_low_rank_parts(model, net, base):
    objective = Objective(net=net, base=bind(base), counts=COUNTS, alphas_bar=model.alphas_bar)
    x_0 = torch.randn(6, 4, 8, 8)
    y = torch.tensor([0, 0, 0, 1, 1, 2])
    total, _, _ = objective(objective.draw_batch(x_0, y, seed=0, step=1))
    total.backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert set(grads) == set(sd.adapters(net))
    moved = [name for name, grad in grads.items() if grad.abs().sum() > 0]
    assert moved
    assert all(name.endswith(".B") for name in moved)       # B = 0 as yet, so that A has none


def step_of(model, net):
    """(total, {name: gradient}) of a CM step in which every low-rank part counts."""
    torch.manual_seed(3)
    for p in sd.adapters(net).values():
        torch.nn.init.normal_(p, std=0.1)
    objective = Objective(net=net, base=bind("oc"), counts=COUNTS, alphas_bar=model.alphas_bar)
    g = torch.Generator().manual_seed(0)
    x_0, y = torch.randn(6, 4, 8, 8, generator=g), torch.tensor([0, 0, 0, 1, 1, 2])
    total, _, D = objective(objective.draw_batch(x_0, y, seed=0, step=1))
    assert D.min() > 1e-5                                   # theta^g's pass is another one
    total.backward()
    return total, {name: p.grad for name, p in sd.adapters(net).items()}


def test_checkpointing_gives_the_same_gradients_with_less_memory(tiny, cpu):
    """Those of theta^g's pass, too: --checkpointing reaches the blocks of both halves."""
    images = SimpleNamespace(images=np.zeros((1, 16, 16, 3)), class_names=NAMES)
    found, kept = [], []
    for more in ([], ["--checkpointing"]):
        args = sd.make_train_parser().parse_args(
            [*FLAGS, *CM_RANK, *more, "--model", tiny])
        model, net = sd.load_model(args, cpu, images, vars(args), None)
        saved = []

        def keep(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append(step_of(model, net))
        kept.append(sum(saved))
    (total, gradients), (other, others) = found
    assert_close(other, total)
    assert all(grad.abs().max() > 0 for grad in gradients.values())
    assert_close(others, gradients)
    assert kept[1] < 0.5 * kept[0], kept


def test_latents_round_trip(model):
    """encode, and decode in parts, are the autoencoder's own, times its scaling factor."""
    images = np.random.RandomState(0).randint(0, 256, (5, 16, 16, 3), np.uint8)
    moments = torch.from_numpy(model.encode(images))
    assert moments.shape == (5, 2, 4, 8, 8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    whole = model.vae.encode(x).latent_dist
    scaled = model.vae.config.scaling_factor * torch.stack([whole.mean, whole.std], 1)
    assert_close(moments, scaled, rtol=1e-4, atol=1e-5)
    decoded = model.vae.decode(whole.mean).sample
    assert_close(model.decode(moments[:, 0], batch_size=2), decoded, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Training

@pytest.fixture(scope="module")
def run_of(tmp_path_factory, tiny, pictures):
    """Train for some epochs: (name, flags) -> the folder of the run."""
    root = tmp_path_factory.mktemp("latent")

    def train(name, *more):
        reserved_rank = [] if "--no-cm" in more else CM_RANK
        call(sd.main, "train", *FLAGS, *reserved_rank, "--model", tiny, "--data-dir", pictures,
             "--pack-dir", root / "pack", "--out", root / name, *more)
        return root / name
    return train


@pytest.fixture(scope="module")
def whole(run_of):
    """A CM run of three epochs without a break."""
    return run_of("whole", "--epochs", 3, "--lr", 0.01)


@pytest.fixture(scope="module")
def plain(run_of):
    """A run without CM, of one epoch."""
    return run_of("plain", "--no-cm", "--base", "ddpm", "--epochs", 1)


def test_train_and_resume(run_of, whole, capsys):
    for epochs in (1, 3):
        parts = run_of("parts", "--epochs", epochs, "--lr", 0.01)
    a = disk.load(whole / "ckpt.pt", ["latent"])
    b = disk.load(parts / "ckpt.pt", ["latent"])
    assert a["step"] == b["step"] == 8                                  # ceil(3 x 21 / 8)
    assert a["adapters"].keys() == a["ema"].keys()
    for key in ("adapters", "ema"):
        assert all(torch.equal(value, b[key][name]) for name, value in a[key].items())
    log = [json.loads(line) for line in (whole / "log.jsonl").open()]
    assert [record["step"] for record in log] == list(range(1, 9))
    assert {"base", "con", "div", "D_Many", "D_Few"} <= set(log[-1])
    assert (whole / "ckpt.pt").stat().st_size < 1 << 20     # the low-rank parts, not the model
    capsys.readouterr()
    run_of("parts", "--epochs", 3, "--lr", 0.01)
    assert "finished, step 8 of 8" in capsys.readouterr().out


def test_grids_are_decoded_ema_samples(run_of, whole, tmp_path, monkeypatch):
    """As the command sample makes them; they move no weight, and a killed run's is made up."""
    monkeypatch.setitem(sample_py.STEPS, "ddim", 6)
    run = run_of("grids", "--epochs", 3, "--lr", 0.01, "--sample-every", 4, "--keep-every", 4)
    a = disk.load(whole / "ckpt.pt", ["latent"])
    b = disk.load(run / "ckpt.pt", ["latent"])
    for key in ("adapters", "ema"):
        assert all(torch.equal(value, b[key][name]) for name, value in a[key].items())
    assert sorted(path.name for path in run.glob("*-0*")) == [
        "ckpt-0000004.pt", "ckpt-0000008.pt", "grid-0000004.png", "grid-0000008.png"]
    for step in (4, 8):
        grid = run / f"grid-{step:07d}.png"
        call(sd.main, "sample", "--ckpt", run / f"ckpt-{step:07d}.pt", "--num", 30,
             "--out", tmp_path / str(step), "--device", "cpu", "--batch-size", 25)
        assert difference(grid, tmp_path / str(step) / "grid.png") <= 1
        whole_grid = grid.read_bytes()
        grid.unlink()
        run_of("grids", "--epochs", 3, "--lr", 0.01, "--sample-every", 4)
        assert grid.exists() == (step == 8)
        assert step == 4 or grid.read_bytes() == whole_grid
    assert difference(tmp_path / "4/grid.png", tmp_path / "8/grid.png") > 10


def difference(a, b):
    """The largest difference of two pictures, in grey levels."""
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (a, b))
    return np.abs(a - b).max()


def test_a_run_may_go_on_with_checkpointing_or_compiled(run_of, whole, capsys, monkeypatch):
    """Both are the same run; --compile runs what torch.compile returns."""
    compiled = []

    def compile(module, mode):
        compiled.append(torch._dynamo.optimize("eager")(module))
        return compiled[-1]
    monkeypatch.setattr(torch, "compile", compile)
    run_of("either", "--epochs", 1, "--lr", 0.01)
    run_of("either", "--epochs", 2, "--lr", 0.01, "--checkpointing")
    assert not compiled
    capsys.readouterr()
    run = run_of("either", "--epochs", 3, "--lr", 0.01, "--compile")
    assert compiled and ", compiled" in capsys.readouterr().out
    assert_same_losses(whole, run)


def test_the_defaults_are_those_of_sec_4_1():
    args = vars(sd.resolve(sd.make_train_parser().parse_args([]), ()))
    expected = {"model": "lambdalabs/miniSD-diffusers", "prompt": "a {} painting", "rank": 128,
                "cm_rank": 8, "lr": 3e-4, "weight_decay": 1e-6, "epochs": 100, "batch_size": 64,
                "label_drop": 0.1, "base": "oc", "cm": True, "ir": 100, "dataset": "artbench10",
                "resolution": 256}
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("dataset, ir, resolution", [
    ("folder", 1, 256), ("artbench10", 100, 256), ("cub200", 10, 256), ("cifar10", 100, None)])
def test_the_defaults_of_data_sets(dataset, ir, resolution):
    """A folder is taken as it is; image files have the model's size, arrays their own."""
    parser = sd.make_train_parser()
    args = sd.resolve(parser.parse_args(["--dataset", dataset]), parser.given)
    assert (args.ir, args.resolution) == (ir, resolution)


def test_the_weight_decay_is_adamws(run_of, monkeypatch):
    """Without a gradient a step takes lr x weight decay off a parameter, and nothing else."""
    found = []
    monkeypatch.setattr(sd, "loop", lambda training, *_: found.append(training))
    run_of("decay", "--epochs", 1, "--lr", 0.1, "--weight-decay", 0.5)
    training = found[0]
    params = list(training.params.values())
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    training.update()
    for p, old in zip(params, before):
        assert_close(p.detach(), 0.95 * old)


def test_an_older_run_is_resumed(run_of, whole):
    """Older checkpoints say split_seed for tail_seed, and do not name the model's content."""
    run = run_of("older", "--epochs", 1, "--lr", 0.01)
    old = torch.load(run / "ckpt.pt", weights_only=True)
    old["config"]["split_seed"] = old["config"].pop("tail_seed")
    del old["config"]["revision"], old["model_sha256"]
    for name in NEW_SETTINGS:
        del old["config"][name]
    torch.save(old, run / "ckpt.pt")
    run_of("older", "--epochs", 3, "--lr", 0.01)
    a = disk.load(whole / "ckpt.pt", ["latent"])
    b = disk.load(run / "ckpt.pt", ["latent"])
    assert a["config"] == b["config"]
    assert all(torch.equal(value, b["ema"][name]) for name, value in a["ema"].items())


@pytest.fixture
def older_folder_run(tiny, tmp_path, monkeypatch):
    """(The command, the folder) of a run that began when 100 and the set's own size, here 16, were
    the defaults of --ir and --resolution."""
    monkeypatch.setitem(READERS, "folder", replace(READERS["folder"], resolution=16))
    for name in ("few", "many"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(100):
            image = Image.fromarray(np.full((16, 16, 3), i, np.uint8))
            image.save(tmp_path / "images" / name / f"{i}.png")
    command = ["train", "--dataset", "folder", "--data-dir", tmp_path / "images", "--model", tiny,
               "--pack-dir", tmp_path / "pack", "--out", tmp_path / "run", "--rank", 6, *CM_RANK,
               "--batch-size", 32, "--device", "cpu", "--dtype", "float32"]
    call(sd.main, *command, "--ir", 100, "--resolution", 16, "--epochs", 1)
    old = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    for name in NEW_SETTINGS:
        del old["config"][name]
    old["config"]["resolution"] = None
    torch.save(old, tmp_path / "run/ckpt.pt")
    for path in (tmp_path / "run").glob("grid*"):
        path.unlink()
    return command, tmp_path / "run"


def test_an_older_run_keeps_the_defaults_of_its_time(older_folder_run, capsys):
    """--ir 100, the set's own size and no grids, where the command does not say them; each time."""
    command, run = older_folder_run
    for epochs in (1, 2, 3):
        call(sd.main, *command, "--epochs", epochs)
        ckpt = disk.load(run / "ckpt.pt", ["latent"])
        assert ckpt["step"] == -(-epochs * 101 // 32)
        assert ckpt["data"]["class_counts"] == [100, 1] and ckpt["data"]["resolution"] == 16
    assert not list(run.glob("grid*"))
    for more in (["--ir", 1], ["--resolution", 32]):
        refuses(capsys, sd.main, *command, "--epochs", 4, *more, says=more[:1])


def test_two_processes_and_two_passes_are_the_same_run(run_of, tmp_path, tiny, pictures):
    one = run_of("one", "--epochs", 2)
    passes = run_of("passes", "--epochs", 2, "--accumulate", 2)
    two = tmp_path / "two"
    p = torchrun("-m", "latent.stable_diffusion", "train", *FLAGS, *CM_RANK, "--epochs", 2,
                 "--model", tiny,
                 "--data-dir", pictures, "--pack-dir", tmp_path / "pack", "--out", two)
    text = p.communicate(timeout=120)[0]
    assert p.returncode == 0, text
    assert_same_losses(one, two)
    assert_same_losses(one, passes)
    kept = [next(folder.glob("*-latents-*.npy")) for folder in (one.parent / "pack",
                                                                tmp_path / "pack")]
    assert np.array_equal(*map(np.load, kept))              # two processes encode the same


# --------------------------------------------------------------------------------------------------
# Samples

def sample(ckpt, out, *more):
    """Generate six images in few steps: int (6, H, W, 3)."""
    call(sd.main, "sample", "--ckpt", ckpt, "--num", 6, "--steps", 3, "--out", out,
         "--device", "cpu", *more)
    return np.load(out / "samples.npz")["arr_0"].astype(int)


def test_sample(whole, tmp_path, capsys):
    """The batch size changes nothing but the last digit; theta^g alone gives other images."""
    ckpt = whole / "ckpt.pt"
    full = sample(ckpt, tmp_path / "full", "--batch-size", 5, "--png")
    small_batches = sample(ckpt, tmp_path / "small", "--batch-size", 2, "--png")
    general = sample(ckpt, tmp_path / "general", "--batch-size", 5, "--png", "--branch", "general")
    for name in ("full", "small", "general"):
        assert len(list((tmp_path / name / "png").rglob("*.png"))) == 6
    assert full.shape == (6, 16, 16, 3)
    assert np.abs(full - small_batches).max() <= 1
    assert (full != general).any()
    capsys.readouterr()
    sample(ckpt, tmp_path / "full", "--batch-size", 5, "--if-needed")
    assert "up to date" in capsys.readouterr().out


def test_sample_of_some_classes(whole, tmp_path, capsys):
    """By number or name; image i has its own noise, whatever the classes."""
    everything = sample(whole / "ckpt.pt", tmp_path / "all")
    some = sample(whole / "ckpt.pt", tmp_path / "some", "--classes", "2,old_master")
    assert np.load(tmp_path / "some/samples.npz")["arr_1"].tolist() == [2, 0, 2, 0, 2, 0]
    assert disk.read_json(tmp_path / "some/samples.json")["settings"]["classes"] == [2, 0]
    assert np.abs(some[3] - everything[3]).max() <= 1       # both of class 0
    assert (some[0] != everything[0]).any()
    refuses(capsys, sd.main, "sample", "--ckpt", whole / "ckpt.pt", "--classes", "3",
            says=["--classes 3", "0 to 2"])


def test_evaluate_finds_its_reference(plain, tmp_path, pictures):
    """samples.json says which data the samples belong to."""
    data = ("--data-dir", pictures, "--pack-dir", tmp_path / "pack", "--device", "cpu")
    call(classify.main, "--dataset", "folder", *data, "--resolution", 16, "--epochs", 1,
         "--width", 8, "--out", tmp_path / "c")
    call(sd.main, "sample", "--ckpt", plain / "ckpt.pt", "--num", 9, "--steps", 2,
         "--device", "cpu")
    call(evaluate.main, "--samples", plain / "samples/samples.npz", *data,
         "--features", tmp_path / "c/ckpt.pt")
    result = disk.read_json(plain / "samples/eval.json")
    assert result["num"] == 9
    assert result["settings"]["steps"] == 2
    assert len(result["groups"]) == 3


# --------------------------------------------------------------------------------------------------
# Latents on disk

def test_latents_are_encoded_once(run_of, tiny, pictures, tmp_path, capsys, monkeypatch):
    """Another run reads them; not with another autoencoder, size of image or draw."""
    flags = ("--epochs", 1, "--pack-dir", tmp_path / "pack")
    encoded = []
    encode = sd.Model.encode

    def counted(self, images):
        encoded.append(len(images))
        return encode(self, images)
    monkeypatch.setattr(sd.Model, "encode", counted)

    def train(name, *more):
        encoded.clear()
        run_of(name, *flags, *more)
        return sum(encoded)
    assert train("first") == sum(COUNTS)
    assert train("second", "--lr", 0.01, "--rank", 3) == 0
    assert train("small", "--resolution", 8) == sum(COUNTS)
    assert train("tail", "--ir", 4) == 7 + 3 + 1
    assert train("another tail", "--ir", 4, "--tail-seed", 1) == 7 + 3 + 1
    other = changed_model(tiny, tmp_path / "other", "vae")
    assert train("other", "--model", other) == sum(COUNTS)
    assert train("first", "--epochs", 2) == 0


# --------------------------------------------------------------------------------------------------
# Export

@pytest.fixture(scope="module")
def wide(run_of):
    """The checkpoint of a CM run in which the LoRA has rank 24, but in the narrow layers 16."""
    run = run_of("wide", "--epochs", 2, "--lr", 0.05, "--rank", 24)
    shapes = {p.shape[0] for name, p in disk.load(run / "ckpt.pt", ["latent"])["ema"].items()
              if name.endswith(".0.A")}
    assert shapes == {16, 24}
    return run / "ckpt.pt"


def pipeline_of(folder):
    """A StableDiffusionPipeline of a folder with its parts, as diffusers loads them."""
    import diffusers
    import transformers
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    schedule = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    return diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, unet, schedule, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


@torch.no_grad()
def predictions(unet, model):
    """What diffusers' U-Net predicts of four latents, with the texts of the classes and Null."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 8, 8, generator=g)
    text = model.prompts(NAMES, CONFIG["prompt"])
    return unet(x, torch.tensor([0, 10, 500, 999]), text).sample


@torch.no_grad()
def ours(model, ckpt, general=1.0, minority=1.0, weights="ema"):
    """The same of stable_diffusion.py's network, with its two parts scaled."""
    ckpt = disk.load(ckpt, ["latent"])
    net = sd.load_network(model, ckpt, weights)
    for name, p in sd.adapters(net).items():
        if name.endswith(".B"):
            p.mul_(general if name.endswith(".0.B") else minority)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 8, 8, generator=g)
    return net(x, torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, -1]))


def fresh(tiny):
    """The tiny model anew: a network cuts its U-Net."""
    return sd.Model(str(tiny), torch.device("cpu"))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_lora_files_are_our_parts_in_diffusers(wide, tiny, tmp_path, weights):
    """With both, with general alone, and with a half of minority; the parts are not nothing."""
    folder = tmp_path / "lora"
    call(sd.main, "export", "--ckpt", wide, "--lora", folder, "--weights", weights)
    pipe = pipeline_of(tiny)
    for part in ("general", "minority"):
        pipe.load_lora_weights(folder, weight_name=f"{part}.safetensors", adapter_name=part)
    found = {}
    for parts in ({"general": 1.0, "minority": 1.0}, {"general": 1.0},
                  {"general": 1.0, "minority": 0.5}, {"general": 0.5, "minority": 2.0}):
        pipe.set_adapters(list(parts), list(parts.values()))
        theirs = predictions(pipe.unet, fresh(tiny))
        expected = ours(fresh(tiny), wide, **{"minority": 0.0, **parts}, weights=weights)
        assert_close(theirs, expected, rtol=0, atol=1e-5)
        found[tuple(parts.values())] = expected
    base = predictions(pipeline_of(tiny).unet, fresh(tiny))
    different = [base, *found.values()]
    assert all((a - b).abs().max() > 1e-3 for k, a in enumerate(different) for b in different[:k])
    assert disk.read_json(folder / "export.json")["settings"]["weights"] == weights


def test_lora_files_have_one_rank_and_no_minority_without_cm(wide, plain, tmp_path):
    from safetensors.torch import load_file
    call(sd.main, "export", "--ckpt", wide, "--lora", tmp_path / "a")
    call(sd.main, "export", "--ckpt", plain / "ckpt.pt", "--lora", tmp_path / "b")
    ranks = {part: {p.shape[0] for name, p in load_file(tmp_path / f"a/{part}.safetensors").items()
                    if ".lora_A." in name} for part in ("general", "minority")}
    assert ranks == {"general": {24}, "minority": {2}}
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "export.json", "general.safetensors"]


@pytest.mark.parametrize("branch", ["full", "general"])
def test_the_pipeline_is_our_sampling(wide, tiny, tmp_path, branch):
    """diffusers' pipeline gives the images of `stable_diffusion.py sample`, from the same noise."""
    import diffusers
    call(sd.main, "export", "--ckpt", wide, "--pipeline", tmp_path / "sd", "--branch", branch)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    expected = ours(fresh(tiny), wide, minority=float(branch == "full"))
    assert_close(predictions(pipe.unet, fresh(tiny)), expected, rtol=0, atol=1e-5)
    assert not any("parametrizations" in name for name in pipe.unet.state_dict())

    images = sample(wide, tmp_path / "samples", "--branch", branch)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, steps_offset=0, set_alpha_to_one=True)
    noise = [torch.randn(4, 8, 8, generator=runtime.generator("cpu", 0, "image", i))
             for i in range(3)]
    texts = ["a old master painting", "a pop painting", "a realism painting"]
    theirs = pipe(texts, latents=torch.stack(noise), height=16, width=16, num_inference_steps=3,
                  guidance_scale=2.5, output_type="np").images
    assert np.abs(np.round(255 * theirs) - images[:3]).max() <= 1
    assert images.std() > 1


def test_the_pipeline_is_a_model_to_train_on(wide, tmp_path, pictures):
    """It has the layout that --model takes."""
    call(sd.main, "export", "--ckpt", wide, "--pipeline", tmp_path / "sd")
    call(sd.main, "train", *FLAGS, *CM_RANK, "--model", tmp_path / "sd", "--epochs", 1,
         "--data-dir", pictures, "--pack-dir", tmp_path / "p", "--out", tmp_path / "run")
    ckpt = disk.load(tmp_path / "run/ckpt.pt", ["latent"])
    assert ckpt["step"] > 0 and ckpt["config"]["model"] == str(tmp_path / "sd")


def test_an_export_replaces_its_like_only(wide, plain, tmp_path, capsys):
    """Files of others are refused before any work, and stay."""
    lora = ("export", "--ckpt", wide, "--lora", tmp_path / "lora")
    (tmp_path / "lora").mkdir()
    call(sd.main, *lora)                                # an empty folder is fine
    call(sd.main, "export", "--ckpt", plain / "ckpt.pt", "--lora", tmp_path / "lora")
    names = {path.name for path in (tmp_path / "lora").iterdir()}
    assert names == {"export.json", "general.safetensors"}      # no minority part of before
    for what in (tmp_path / "lora", plain):
        refuses(capsys, sd.main, "export", "--ckpt", wide, "--pipeline", what,
                says=["--pipeline", "another folder"])
    (tmp_path / "lora/mine.txt").write_text("mine")
    refuses(capsys, sd.main, *lora, says=["--lora", "mine.txt", "another folder"])
    assert (tmp_path / "lora/mine.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "lora")
    refuses(capsys, sd.main, "export", "--ckpt", wide, "--lora", tmp_path / "link",
            says=["--lora", "link"])
    assert (plain / "ckpt.pt").exists()


def test_an_export_that_fails_leaves_the_one_before(wide, tmp_path, capsys, monkeypatch):
    call(sd.main, "export", "--ckpt", wide, "--lora", tmp_path / "lora")
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}

    def half(parts, folder):
        folder.mkdir()
        (folder / "general.safetensors").write_text("a half")
        raise OSError("No space left on device")
    replace_path = os.replace

    def not_the_new_one(source, target):
        if target == tmp_path / "lora" and ".old." not in source.name:
            raise OSError("Permission denied")
        replace_path(source, target)
    for what, name, fails in ((sd.latent_export, "write_lora", half),
                              (os, "replace", not_the_new_one)):
        with monkeypatch.context() as m:
            m.setattr(what, name, fails)
            refuses(capsys, sd.main, "export", "--ckpt", wide, "--lora", tmp_path / "lora",
                    says=["--lora", "cannot write"])
        assert {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()} == before
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for flag, name in (("--lora", "lora"), ("--pipeline", "sd")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))        # safetensors' own error
        try:
            refuses(capsys, sd.main, "export", "--ckpt", wide, flag, tmp_path / name,
                    says=[flag, "cannot write"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()} == before
    (tmp_path / ".lora.999999.tmp").mkdir()                 # of a killed process
    call(sd.main, "export", "--ckpt", wide, "--lora", tmp_path / "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_export_refuses(wide, plain, tiny, cm_run, tmp_path, capsys, monkeypatch):
    def check(ckpt, *more, says):
        refuses(capsys, sd.main, "export", "--ckpt", ckpt, *more, says=says)
    lora, pipeline = ("--lora", tmp_path / "l"), ("--pipeline", tmp_path / "p")
    check(wide, says=["--lora", "--pipeline", "required"])
    check(wide, *lora, *pipeline, says=["--lora", "--pipeline", "not allowed"])
    check(wide, *lora, "--branch", "general", says=["--branch", "both parts"])
    check(wide, *lora, "--model", tiny, says=["--model", "leave it out"])
    check(plain / "ckpt.pt", *pipeline, "--branch", "general", says=["--branch general", "--no-cm"])
    check(cm_run / "ckpt.pt", *lora, says=["--ckpt", "not a latent"])
    other = changed_model(tiny, tmp_path / "other", "unet")
    check(wide, *pipeline, "--model", other, says=["--model", "not those that"])
    damaged = torch.load(wide, weights_only=True)
    damaged["ema"] = {"decoder.up_blocks.0.weight": torch.zeros(1)}
    torch.save(damaged, tmp_path / "damaged.pt")
    check(tmp_path / "damaged.pt", *lora, says=["--ckpt", "decoder.up_blocks.0.weight"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    check(wide, *lora, says=["python -m latent.stable_diffusion export", "without torchrun"])
    assert not (tmp_path / "l").exists() and not (tmp_path / "p").exists()


# --------------------------------------------------------------------------------------------------
# Help

def test_the_help_has_the_flags_of_all_commands(capsys):
    call(sd.main, "--help")
    text = capsys.readouterr().out
    for command, (_, make) in sd.COMMANDS.items():
        assert f"usage: stable_diffusion.py {command} " in text
        flags = [flag for action in make()._actions for flag in action.option_strings]
        own = text.split(f"usage: stable_diffusion.py {command} ")[1].split("\nusage: ")[0]
        assert all(flag in own for flag in flags)
    assert text.count("As in Sec. 4.1") == 1


def test_what_diffusers_scripts_call_otherwise(capsys):
    flags = {flag for action in sd.make_train_parser()._actions
             for flag in action.option_strings}
    for theirs, words in sd.DIFFUSERS.items():
        named = {word.strip(",") for word in words.split() if word.startswith("--")}
        assert theirs not in flags and named <= flags
    for words in (["--train_batch_size", 16], ["--train_batch_size=16"]):
        refuses(capsys, sd.main, "train", *words, says=["--train_batch_size", "--batch-size"])


# --------------------------------------------------------------------------------------------------
# Mistakes

def test_train_refuses(plain, tmp_path, tiny, pictures, capsys):
    def check(model, out, *more, says):
        refuses(capsys, sd.main, "train", *FLAGS, "--data-dir", pictures,
                "--pack-dir", tmp_path / "pack", "--model", model, "--out", out, *more, says=says)
    new = tmp_path / "new"
    check(tiny, plain, "--base", "ddpm", says=["--cm", "--out"])
    check(tmp_path / "nothing", new, says=["--model", "diffusers"])
    check(tiny, new, "--accumulate", 3, says=["--batch-size 8", "--accumulate"])
    check(tiny, new, "--revision", "main", says=["--revision", "folder"])
    check(tiny, new, "--resolution", 18, says=["--resolution 18", "multiple of 4"])
    for prompt in ("a painting", "a {name}", "{} {"):
        check(tiny, new, "--prompt", prompt, says=["--prompt", "must hold {}"])
    check(tiny, new, "--prompt", "a word for each of twenty tokens {}", says=["--prompt", "same"])
    check(tiny, new, "--no-cm", "--w-div", 1, says=["--w-div", "--cm only"])
    check(tiny, new, "--no-cm", *CM_RANK, says=["--cm-rank", "--cm only"])
    check(velocity_model(tiny, tmp_path / "v"), new, says=["--model", "v_prediction", "epsilon"])


def test_fewer_epochs_than_were_trained(run_of, capsys):
    run = run_of("fewer", "--epochs", 2)
    before = (run / "ckpt.pt").read_bytes()
    with pytest.raises(runtime.UserError, match="--epochs 1: 3 steps, .* at step 6 already"):
        run_of("fewer", "--epochs", 1)
    assert (run / "ckpt.pt").read_bytes() == before


def test_the_folder_of_a_run(tmp_path, tiny, pictures, cpu, capsys, monkeypatch):
    """Of one process at a time, and one that can be written: before the images are encoded."""
    monkeypatch.setattr(sd.Model, "encode", None)
    flags = ("train", *FLAGS, "--model", tiny, "--data-dir", pictures, "--pack-dir", tmp_path / "p")
    with disk.claim(tmp_path / "run", cpu):
        refuses(capsys, sd.main, *flags, "--out", tmp_path / "run",
                says=["--out", "another process"])
    (tmp_path / "file").touch()
    refuses(capsys, sd.main, *flags, "--out", tmp_path / "file/run", says=["cannot write"])


def test_a_run_that_finished_meanwhile_is_not_overwritten(plain, tmp_path, tiny, pictures, capsys,
                                                          monkeypatch):
    """Another process trains to its end while this one loads its images."""
    read = sd.load_long_tailed

    def meanwhile(*args):
        shutil.copy(plain / "ckpt.pt", tmp_path)
        return read(*args)
    monkeypatch.setattr(sd, "load_long_tailed", meanwhile)
    refuses(capsys, sd.main, "train", *FLAGS, "--model", tiny, "--data-dir", pictures,
            "--pack-dir", tmp_path / "p", "--out", tmp_path, says=["--out", "meanwhile"])
    assert (tmp_path / "ckpt.pt").read_bytes() == (plain / "ckpt.pt").read_bytes()


def changed_model(tiny, folder, part, **changes):
    """A copy of the tiny model; one part is made anew, with these changes to its settings."""
    import diffusers
    shutil.copytree(tiny, folder)
    kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
    torch.manual_seed(1)
    kind.from_config({**kind.load_config(tiny / part), **changes}).save_pretrained(folder / part)
    return folder


@pytest.mark.parametrize("changes, says", [
    ({}, "not those that the checkpoint was trained on"),
    ({"block_out_channels": [16, 24]}, "not those that the checkpoint was trained on"),
    ({"addition_embed_type": "text", "addition_embed_type_num_heads": 4}, "add_embedding"),
    ({"in_channels": 9}, "9 input channels")],
    ids=["other weights", "other shapes", "another kind", "inpainting"])
def test_other_models_are_refused(plain, tiny, tmp_path, capsys, changes, says):
    other = changed_model(tiny, tmp_path / "other", "unet", **changes)
    refuses(capsys, sd.main, "sample", "--ckpt", plain / "ckpt.pt", "--model", other,
            "--device", "cpu", "--out", tmp_path / "out", says=["--model", says])
    assert not (tmp_path / "out/samples.npz").exists()


def test_low_rank_parts_of_other_shapes(plain, tiny, tmp_path, capsys):
    """Of an older checkpoint, which does not name the model's content."""
    old = torch.load(plain / "ckpt.pt", weights_only=True)
    del old["model_sha256"]
    torch.save(old, tmp_path / "older.pt")
    other = changed_model(tiny, tmp_path / "other", "unet", block_out_channels=[16, 24])
    refuses(capsys, sd.main, "sample", "--ckpt", tmp_path / "older.pt", "--model", other,
            "--device", "cpu", "--out", tmp_path / "out", says=["--model", "here and"])


def test_a_run_goes_on_with_its_model_only(tiny, pictures, tmp_path, capsys):
    """The folder of --model may have changed."""
    model = shutil.copytree(tiny, tmp_path / "sd")
    flags = ("train", *FLAGS, "--model", model, "--data-dir", pictures, "--pack-dir",
             tmp_path / "p", "--out", tmp_path / "run")
    call(sd.main, *flags, "--epochs", 1)
    assert disk.load(tmp_path / "run/ckpt.pt", ["latent"])["config"]["revision"] is None
    shutil.rmtree(model)
    changed_model(tiny, model, "unet")
    refuses(capsys, sd.main, *flags, "--epochs", 2, says=["--model", "was trained on"])


def test_a_model_that_lacks_weights(tiny, tmp_path):
    """They would be random numbers, with a warning only."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(tiny, tmp_path / "sd")
    path = tmp_path / "sd/vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["decoder.conv_out.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(runtime.UserError, match="vae lacks decoder.conv_out.weight"):
        sd.Model(str(tmp_path / "sd"), torch.device("cpu"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(runtime.UserError, match="cannot be loaded"):
        sd.Model(str(tmp_path / "sd"), torch.device("cpu"))


def test_the_revision_reaches_the_hub(tiny, monkeypatch):
    import diffusers
    import transformers
    asked = []
    kinds = (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.DDIMScheduler,
             transformers.CLIPTextModel, transformers.CLIPTokenizer)
    for kind in kinds:
        def from_the_hub(name, subfolder, revision, load=kind.from_pretrained, **options):
            asked.append((name, revision))
            return load(tiny, subfolder=subfolder, **options)
        monkeypatch.setattr(kind, "from_pretrained", from_the_hub)
    sd.Model("someone/sd", torch.device("cpu"), "v2")
    assert asked == [("someone/sd", "v2")] * 5


def test_numbers_that_are_not_finite(model):
    model.vae.decoder.conv_out.bias[0] = torch.nan
    with pytest.raises(runtime.UserError, match="--model: its autoencoder cannot decode"):
        model.decode(torch.zeros(1, 4, 8, 8))
    model.vae.encoder.conv_in.bias[0] = torch.inf
    with pytest.raises(runtime.UserError, match="--model: its autoencoder cannot encode"):
        model.encode(np.zeros((1, 16, 16, 3), np.uint8))


def test_default_folders_of_image_folders(tmp_path):
    parser = sd.make_train_parser()
    folders = [parser.parse_args(["--dataset", "folder", "--data-dir", f"{c}/images", "--ir", "1"])
               for c in "ab"]
    names = [sd.run_name(args) for args in folders]
    assert names[0] != names[1] and names[0].startswith("latent-images-")


def test_pngs_are_of_this_call(plain, tmp_path, capsys):
    """--png --if-needed after a call without; and a folder that holds files of another program."""
    sample(plain / "ckpt.pt", tmp_path)
    sample(plain / "ckpt.pt", tmp_path, "--png", "--if-needed")
    assert len(list((tmp_path / "png").rglob("*.png"))) == 6
    (tmp_path / "png/mine.txt").touch()
    refuses(capsys, sd.main, "sample", "--ckpt", plain / "ckpt.pt", "--png", "--device", "cpu",
            "--out", tmp_path, says=["--png", "mine.txt"])


def velocity_model(tiny, folder):
    """The tiny Stable Diffusion, described as one that predicts the velocity."""
    folder.mkdir()
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(tiny / part)
    config = disk.read_json(tiny / "scheduler/scheduler_config.json")
    disk.write_json(folder / "scheduler/scheduler_config.json",
                       {**config, "prediction_type": "v_prediction"})
    return folder


def test_sample_refuses(plain, cm_run, capsys):
    refuses(capsys, sd.main, "sample", "--ckpt", plain / "ckpt.pt", "--branch", "general",
            says=["--branch general", "--no-cm"])
    refuses(capsys, sd.main, "sample", "--ckpt", cm_run / "ckpt.pt",
            says=["--ckpt", "not a latent"])
    refuses(capsys, sd.main, "paint", says=["train, sample, export"])
