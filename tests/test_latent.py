"""latent.py on a tiny random Stable Diffusion in diffusers' layout: the cut network, the two low-rank parts, training, samples."""
import json

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from test_mistakes import refuses
from test_processes import assert_same_losses, torchrun
from torch.testing import assert_close

import evaluate
import latent
import runtime
from cm_layers import count, general_only, merge, reserved
from losses import Objective, draw

FLAGS = "--dataset folder --ir 1 --resolution 16 --rank 6 --cm-rank 2 --batch-size 8 --log-every 1 --device cpu --dtype float32".split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a Stable Diffusion with 8 x 8 latents, its parts drawn at random."""
    import diffusers
    import transformers
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2).save_pretrained(folder / "vae")
    diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"model_max_length": 20, "tokenizer_class": "CLIPTokenizer"}))
    transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=20, eos_token_id=1, bos_token_id=0)).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes of 12, 6 and 3 small pictures."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.RandomState(0)
    for c, (name, n) in enumerate((("old_master", 12), ("pop", 6), ("realism", 3))):
        (folder / name).mkdir()
        for i in range(n):
            pixels = np.clip(rng.randint(0, 60, (16, 16, 3)) + np.eye(3)[c] * 180, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def model(tiny):
    return latent.Model(str(tiny), torch.device("cpu"))


NAMES = ["old_master", "pop", "realism"]
CONFIG = {"prompt": "a {} painting", "rank": 6, "cm": True, "cm_rank": 2, "model": "tiny"}


def test_the_cut_network_is_the_whole_one(model, tiny):
    """encode and decode are diffusers' forward, label by label, with the texts that diffusers' own encoder gives."""
    import diffusers
    whole = diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet").eval()
    net = model.network(NAMES, CONFIG).eval()
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 2, 1, -1])
    texts = ["a old master painting", "a realism painting", "a pop painting", ""]
    ids = model.tokenizer(texts, padding="max_length", max_length=20, return_tensors="pt").input_ids
    with torch.no_grad():
        assert_close(net(x, t, y), whole(x, t, model.text(ids)[0]).sample)


def test_what_is_trained(model):
    """W_0 is frozen; a LoRA on every attention projection; a reserved part on those of the up-sampling half."""
    net = model.network(NAMES, CONFIG)
    layers = [n for n, m in net.named_modules() if n.endswith(latent.PROJECTIONS)]
    names = set(latent.adapters(net))
    assert {n for n, p in net.named_parameters() if p.requires_grad} == names
    assert sum(".0.A" in n for n in names) == len(layers) and all(n.startswith("decoder") for n in names if ".1.A" in n)
    assert len(list(reserved(net))) == sum(n.startswith("decoder") for n in layers) > 0
    assert {p.rank for _, _, p in reserved(net)} == {2}


def test_theta_g_has_the_lora_and_not_the_reserved_part(model):
    net = model.network(NAMES, CONFIG)
    layer = next(m for n, m in net.decoder.named_modules() if n.endswith("to_q"))
    for p in latent.adapters(net).values():
        torch.nn.init.normal_(p, std=0.1)
    lora, low_rank = layer.parametrizations.weight
    W_0 = layer.parametrizations.weight.original
    assert_close(layer.weight, W_0 + lora.B @ lora.A + low_rank.B @ low_rank.A)
    with general_only(net.decoder):
        assert_close(layer.weight, W_0 + lora.B @ lora.A)
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([0, -1])
    with torch.no_grad(), general_only(net):
        general = net(x, y + 5, y)
    expert = count(net)["expert"]
    assert expert == sum(p.A.numel() + p.B.numel() for _, _, p in reserved(net)) > 0
    with torch.no_grad():
        assert_close(merge(net, "general")(x, y + 5, y), general)
    assert not list(reserved(net))


@pytest.mark.parametrize("base", ["ddpm", "cbdm", "oc"])
def test_every_loss_trains_only_low_rank_parts(model, base):
    net = model.network(NAMES, CONFIG)
    o = Objective(net, base, [12, 6, 3], model.alphas_bar)
    b = draw(torch.randn(6, 4, 8, 8), torch.tensor([0, 0, 0, 1, 1, 2]), o, seed=0, step=1)
    o(b)[0].backward()
    grads = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert grads and all(n.endswith(".B") for n in grads)               # B = 0 as yet, so that A has none
    assert {n for n, p in net.named_parameters() if p.grad is not None} == set(latent.adapters(net))


def test_latents_round_trip(model):
    images, rt = np.random.RandomState(0).randint(0, 256, (5, 16, 16, 3), np.uint8), runtime.Runtime(torch.device("cpu"), torch.float32)
    moments = model.encode(images, rt, batch_size=2)
    law = model.vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    assert moments.shape == (5, 2, 4, 8, 8)
    assert_close(moments, model.vae.config.scaling_factor * torch.stack([law.mean, law.std], 1), rtol=1e-4, atol=1e-5)
    assert_close(model.decode(moments[:, 0], batch_size=2), model.vae.decode(law.mean).sample, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, tiny, pictures):
    """Train for some epochs: (flags) -> the folder of the run."""
    root = tmp_path_factory.mktemp("latent")

    def train(name, *more):
        call(latent.main, "train", *FLAGS, "--model", tiny, "--data-dir", pictures, "--pack-dir", root / "pack", "--out", root / name, *more)
        return root / name
    return train


def test_train_resume_sample_measure(run_of, tmp_path, pictures, classifier, capsys):
    whole = run_of("whole", "--epochs", 3, "--lr", 0.01)
    for epochs in (1, 3):
        parts = run_of("parts", "--epochs", epochs, "--lr", 0.01)
    a, b = (runtime.load(f / "ckpt.pt", ["latent"]) for f in (whole, parts))
    assert a["step"] == b["step"] == 8                                  # ceil(3 x 21 / 8)
    assert all(torch.equal(a[k][n], b[k][n]) for k in ("adapters", "ema") for n in a["ema"])
    log = [json.loads(line) for line in (whole / "log.jsonl").open()]
    assert [r["step"] for r in log] == list(range(1, 9)) and {"base", "con", "div", "D_Many", "D_Few"} <= set(log[-1])
    assert (whole / "ckpt.pt").stat().st_size < 1 << 20                 # the low-rank parts, not the model
    run_of("parts", "--epochs", 3, "--lr", 0.01)
    assert "finished, step 8 of 8" in capsys.readouterr().out

    made = {}
    for branch, batch in (("full", 5), ("full", 2), ("general", 5)):
        out = tmp_path / f"{branch}{batch}"
        call(latent.main, "sample", "--ckpt", whole / "ckpt.pt", "--num", 6, "--steps", 3, "--branch", branch, "--batch-size", batch, "--out", out,
             "--device", "cpu", "--png")
        made[branch, batch] = np.load(out / "samples.npz")["arr_0"].astype(int)
        assert len(list((out / "png").rglob("*.png"))) == 6
    assert made["full", 5].shape == (6, 16, 16, 3) and np.abs(made["full", 5] - made["full", 2]).max() <= 1
    assert (made["full", 5] != made["general", 5]).any()
    capsys.readouterr()
    call(latent.main, "sample", "--ckpt", whole / "ckpt.pt", "--num", 6, "--steps", 3, "--batch-size", 5, "--out", tmp_path / "full5", "--if-needed", "--device", "cpu")
    assert "up to date" in capsys.readouterr().out


def test_two_processes_and_two_passes_are_the_same_run(run_of, tmp_path, tiny, pictures):
    one, passes = run_of("one", "--epochs", 2), run_of("passes", "--epochs", 2, "--accumulate", 2)
    p = torchrun("latent.py", "train", *FLAGS, "--epochs", 2, "--model", tiny, "--data-dir", pictures, "--pack-dir", tmp_path / "pack", "--out", tmp_path / "two")
    text = p.communicate(timeout=120)[0]
    assert p.returncode == 0, text
    assert_same_losses(one, tmp_path / "two")
    assert_same_losses(one, passes)


def test_evaluate_finds_its_reference(run_of, tmp_path, pictures, capsys):
    """samples.json says which data the samples belong to."""
    import classify
    call(classify.main, "--dataset", "folder", "--data-dir", pictures, "--pack-dir", tmp_path / "pack", "--resolution", 16, "--epochs", 1, "--width", 8,
         "--out", tmp_path / "c", "--device", "cpu")
    run = run_of("plain", "--no-cm", "--base", "ddpm", "--epochs", 1)
    call(latent.main, "sample", "--ckpt", run / "ckpt.pt", "--num", 9, "--steps", 2, "--device", "cpu")
    call(evaluate.main, "--samples", run / "samples/samples.npz", "--data-dir", pictures, "--pack-dir", tmp_path / "pack", "--features", tmp_path / "c/ckpt.pt",
         "--device", "cpu")
    result = runtime.read_json(run / "samples/eval.json")
    assert result["num"] == 9 and result["settings"]["steps"] == 2 and len(result["splits"]) == 3


def test_mistakes(run_of, tmp_path, tiny, pictures, cm_run, capsys):
    run = run_of("mistakes", "--no-cm", "--epochs", 1)
    common = (*FLAGS, "--data-dir", pictures, "--pack-dir", tmp_path / "pack")
    refuses(capsys, latent.main, "train", *common, "--model", tiny, "--out", run, says=["--cm", "--out"])
    refuses(capsys, latent.main, "train", *common, "--model", tmp_path / "nothing", "--out", tmp_path / "x", says=["--model", "diffusers"])
    refuses(capsys, latent.main, "train", *common, "--model", tiny, "--accumulate", 3, "--out", tmp_path / "x", says=["--batch-size 8", "--accumulate"])
    refuses(capsys, latent.main, "sample", "--ckpt", run / "ckpt.pt", "--branch", "general", says=["--branch general", "--no-cm"])
    refuses(capsys, latent.main, "sample", "--ckpt", cm_run / "ckpt.pt", says=["--ckpt", "not a latent"])
    refuses(capsys, latent.main, "paint", says=["train or sample"])
    config = json.loads((tiny / "scheduler/scheduler_config.json").read_text())
    velocity = tmp_path / "v"
    velocity.mkdir()
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        (velocity / part).symlink_to(tiny / part)
    (velocity / "scheduler").mkdir()
    (velocity / "scheduler/scheduler_config.json").write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    refuses(capsys, latent.main, "train", *common, "--model", velocity, "--out", tmp_path / "x", says=["--model", "v_prediction", "epsilon"])
