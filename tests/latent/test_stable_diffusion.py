"""stable_diffusion.py on a tiny random Stable Diffusion in diffusers' layout.

The cut network, its two low-rank parts, training, samples.
"""
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_same_losses, by_two_processes, call, pixels, read_log, refuses
from PIL import Image
from torch.testing import assert_close

import disk
import losses
import runtime
import sample as sample_py
from cm_layers import general_only, reserved
from latent import stable_diffusion as sd
from pages import figures

FLAGS = ("--dataset folder --ir 1 --resolution 16 --rank 6 --batch-size 8 --log-every 1 "
         "--sample-every 0 --device cpu --dtype float32").split()
CM_RANK = ["--cm-rank", 2]
NAMES = ["old_master", "pop", "realism"]
COUNTS = [12, 6, 3]
CONFIG = {"prompt": "a {} painting", "rank": 6, "cm": True, "cm_rank": 2}
X = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0, 10, 500, 999])


def fresh(folder):
    """The tiny model anew: a network cuts its U-Net."""
    return sd.Model(str(folder), torch.device("cpu"))


@pytest.fixture
def model(tiny_sd):
    return fresh(tiny_sd)


def test_the_cut_network_is_the_whole_one(model, tiny_sd):
    """encode and decode are diffusers' forward, label by label, with its text encoder's states."""
    import diffusers
    whole = diffusers.UNet2DConditionModel.from_pretrained(tiny_sd / "unet").eval()
    net = model.network(NAMES, CONFIG).eval()
    y = torch.tensor([0, 2, 1, -1])
    texts = ["a old master painting", "a realism painting", "a pop painting", ""]
    ids = model.text.tokenizer(texts, padding="max_length", max_length=20, return_tensors="pt")
    with torch.no_grad():
        assert_close(net(X, T, y), whole(X, T, model.text.clip(ids.input_ids)[0]).sample)


def test_what_is_trained(model):
    """W_0 is frozen; every attention projection has a LoRA, the decoder's a reserved part too.

    theta^g has the LoRA, and not the reserved part.
    """
    net = model.network(NAMES, CONFIG)
    layers = [name for name, _ in net.named_modules() if name.endswith(sd.PROJECTIONS)]
    in_decoder = [name for name in layers if name.startswith("decoder")]
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert all(name.endswith((".A", ".B")) for name in trained)
    assert sum(".0.A" in name for name in trained) == len(layers)       # .0 is the LoRA
    assert all(name.startswith("decoder") for name in trained if ".1.A" in name)    # .1 is BA
    assert len(list(reserved(net))) == len(in_decoder) > 0
    assert {p.rank for _, _, p in reserved(net)} == {2}
    layer = next(m for name, m in net.decoder.named_modules() if name.endswith("to_q"))
    for p in trained.values():
        torch.nn.init.normal_(p, std=0.1)
    lora, low_rank = layer.parametrizations.weight
    W_0 = layer.parametrizations.weight.original
    assert_close(layer.weight, W_0 + lora.B @ lora.A + low_rank.B @ low_rank.A)
    with general_only(net.decoder):
        assert_close(layer.weight, W_0 + lora.B @ lora.A)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, tiny_sd, pictures):
    """Train for some epochs: (name, flags) -> the folder of the run."""
    root = tmp_path_factory.mktemp("latent")

    def train(name, *more):
        reserved_rank = [] if "--no-cm" in more else CM_RANK
        call(sd.main, "train", *FLAGS, *reserved_rank, "--model", tiny_sd, "--data-dir", pictures,
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


def test_checkpointing_gives_the_same_gradients_with_less_memory(run_of, monkeypatch):
    """Those of theta^g's pass, too: --checkpointing reaches the blocks of both halves."""
    trainings, found, kept = [], [], [0, 0]
    monkeypatch.setattr(sd, "loop", lambda training, *_: trainings.append(training))
    for k, more in enumerate(([], ["--checkpointing"])):
        run_of("checkpointing", "--epochs", 1, *more)
        params = trainings[k].params
        torch.manual_seed(3)
        for p in params.values():           # so that every low-rank part counts
            torch.nn.init.normal_(p, std=0.1)

        def keep(tensor, k=k):
            kept[k] += tensor.numel()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total, _, D = trainings[k].objective(trainings[k].batch())
            total.backward()
        assert D.min() > 1e-5               # theta^g's pass is another one
        found.append((total, {name: p.grad for name, p in params.items()}))
    assert all(grad.abs().max() > 0 for grad in found[0][1].values())
    assert_close(found[1], found[0])
    assert kept[1] < 0.5 * kept[0], kept


def test_train_and_resume(run_of, whole):
    for epochs in (1, 3):
        parts = run_of("parts", "--epochs", epochs, "--lr", 0.01)
    a, b = (disk.load(run / "ckpt.pt", ["latent"]) for run in (whole, parts))
    assert a["step"] == b["step"] == 8                                  # ceil(3 x 21 / 8)
    assert a["model"].keys() == a["ema"].keys()
    for key in ("model", "ema"):
        assert_close(b[key], a[key], rtol=0, atol=0)
    log = read_log(whole)
    assert [record["step"] for record in log] == list(range(1, 9))
    assert {"base", "con", "div", "D_Many", "D_Few"} <= set(log[-1])
    assert (whole / "ckpt.pt").stat().st_size < 1 << 20     # the low-rank parts, not the model


def test_grids_are_decoded_ema_samples(run_of, whole, tmp_path, monkeypatch):
    """As the command sample makes them; they move no weight."""
    monkeypatch.setitem(sample_py.STEPS, "ddim", 6)
    run = run_of("grids", "--epochs", 3, "--lr", 0.01, "--sample-every", 4, "--keep-every", 4)
    a, b = (disk.load(folder / "ckpt.pt", ["latent"])["model"] for folder in (whole, run))
    assert_close(b, a, rtol=0, atol=0)
    assert sorted(path.name for path in run.glob("*-0*")) == [
        "ckpt-0000004.pt", "ckpt-0000008.pt", "grid-0000004.png", "grid-0000008.png"]
    call(sd.main, "sample", "--ckpt", run / "ckpt-0000004.pt", "--num", 30,
         "--out", tmp_path, "--device", "cpu", "--batch-size", 25)
    again, *grids = (np.asarray(Image.open(path)).astype(int) for path in (
        tmp_path / "grid.png", run / "grid-0000004.png", run / "grid-0000008.png"))
    assert np.abs(again - grids[0]).max() <= 1 and np.abs(again - grids[1]).max() > 10


def test_prompts(run_of, tmp_path, capsys):
    """Photographs of a folder's classes; with a file each class has its text, in the checkpoint."""
    ckpt = disk.load(run_of("photos", "--steps", 2) / "ckpt.pt", ["latent"])
    assert ckpt["step"] == 2 and ckpt["config"]["prompt"] == "a photo of a {}"
    assert '"a photo of a old master"' in capsys.readouterr().out
    file = tmp_path / "texts.csv"
    disk.write_text(file, 'pop,"loud, in colour"\nrealism,a {} of life\nold_master,dark\n')
    texts = {"pop": "loud, in colour", "realism": "a {} of life", "old_master": "dark"}
    ckpt = disk.load(run_of("texts", "--steps", 1, "--prompt", file) / "ckpt.pt", ["latent"])
    assert ckpt["config"]["prompt"] == texts
    assert sd.texts_of(texts, NAMES) == ["dark", "loud, in colour", "a {} of life"]


def test_the_defaults_are_those_of_sec_4_2():
    args = vars(sd.resolve(sd.make_train_parser().parse_args([]), (), "latent"))
    expected = {"model": "lambdalabs/miniSD-diffusers", "prompt": "a {} painting", "rank": 128,
                "cm_rank": 8, "lr": 3e-4, "weight_decay": 1e-6, "epochs": 100, "batch_size": 64,
                "label_drop": 0.1, "base": "oc", "cm": True, "ir": 100, "dataset": "artbench10",
                "resolution": 256}
    assert {name: args[name] for name in expected} == expected


def test_what_is_trained_how(run_of, monkeypatch, model):
    """The flags reach the loss and AdamW: without a gradient a step takes lr x weight decay off."""
    found = []
    monkeypatch.setattr(sd, "loop", lambda training, *_: found.append(training))
    run_of("decay", "--epochs", 1, "--lr", 0.1, "--weight-decay", 0.5, "--label-drop", 0.3,
           "--base", "cbdm", "--w-div", 0.5, "--seed", 7)
    training = found[0]
    objective = training.objective
    assert (objective.label_drop, objective.cm.w_div, training.batches.seed) == (0.3, 0.5, 7)
    assert objective.base.loss.func is losses.cbdm and objective.counts.tolist() == COUNTS
    assert_close(objective.alphas_bar, model.alphas_bar)
    params = list(training.params.values())
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    training.update()
    for p, old in zip(params, before):
        assert_close(p.detach(), 0.95 * old)


@pytest.mark.slow
def test_two_processes_are_the_same_run(run_of, tmp_path, tiny_sd, pictures):
    one = run_of("one", "--epochs", 2)
    two = tmp_path / "two"
    by_two_processes("-m", "latent.stable_diffusion", "train", *FLAGS, *CM_RANK, "--epochs", 2,
                     "--model", tiny_sd, "--data-dir", pictures, "--pack-dir", tmp_path / "pack",
                     "--out", two)
    assert_same_losses(one, two)
    kept = [next(folder.glob("*-latents-*.npy")) for folder in (one.parent / "pack",
                                                                tmp_path / "pack")]
    assert np.array_equal(*map(np.load, kept))              # two processes encode the same


def sample(ckpt, out, *more):
    """Generate six images in few steps: int (6, H, W, 3)."""
    call(sd.main, "sample", "--ckpt", ckpt, "--num", 6, "--steps", 3, "--out", out,
         "--device", "cpu", *more)
    return pixels(out)


def test_sample(whole, tmp_path):
    """The batch size changes nothing but the last digit; theta^g alone gives other images."""
    full = sample(whole / "ckpt.pt", tmp_path / "full", "--batch-size", 5)
    small_batches = sample(whole / "ckpt.pt", tmp_path / "small", "--batch-size", 2)
    general = sample(whole / "ckpt.pt", tmp_path / "general", "--branch", "general")
    assert full.shape == (6, 16, 16, 3)
    assert np.abs(full - small_batches).max() <= 1
    assert (full != general).any()
    null = sample(whole / "ckpt.pt", tmp_path / "null", "--classes", "null")
    assert (full != null).any() and np.load(tmp_path / "null/samples.npz").files == ["arr_0"]
    call(figures.main, "--column", f"CM={tmp_path}/full", "--out", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()           # with the training images


@pytest.fixture(scope="module")
def wide(run_of):
    """The checkpoint of a CM run in which the LoRA has a higher rank than the narrow layers."""
    return run_of("wide", "--epochs", 2, "--lr", 0.05, "--rank", 24) / "ckpt.pt"


@torch.no_grad()
def predictions(unet, model):
    """What diffusers' U-Net predicts of four latents, with the texts of the classes and Null."""
    ids = model.text.ids(["a photo of a old master", "a photo of a pop", "a photo of a realism"])
    return unet(X, T, model.text(ids)).sample


@torch.no_grad()
def ours(model, ckpt, general=1.0, minority=1.0, weights="ema"):
    """The same of stable_diffusion.py's network, with its two parts scaled."""
    ckpt = disk.load(ckpt, ["latent"])
    net = model.network(NAMES, ckpt["config"], ckpt[weights])
    for name, p in net.named_parameters():
        if name.endswith(".B"):
            p.mul_(general if name.endswith(".0.B") else minority)
    return net(X, T, torch.tensor([0, 1, 2, -1]))


def test_lora_files_are_our_parts_in_diffusers(wide, tiny_sd, tmp_path):
    """With both, with general alone, and with a half of minority; the parts are not nothing."""
    import diffusers
    folder, model = tmp_path / "lora", fresh(tiny_sd)
    call(sd.main, "export", "--ckpt", wide, "--lora", folder, "--weights", "raw")
    pipe = diffusers.StableDiffusionPipeline(
        model.vae, model.text.clip, model.text.tokenizer, model.unet, model.schedule,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    for part in ("general", "minority"):
        pipe.load_lora_weights(folder, weight_name=f"{part}.safetensors", adapter_name=part)
    found = {}
    for parts in ({"general": 1.0, "minority": 1.0}, {"general": 1.0},
                  {"general": 1.0, "minority": 0.5}, {"general": 0.5, "minority": 2.0}):
        pipe.set_adapters(list(parts), list(parts.values()))
        theirs = predictions(pipe.unet, model)
        expected = ours(fresh(tiny_sd), wide, **{"minority": 0.0, **parts}, weights="model")
        assert_close(theirs, expected, rtol=0, atol=1e-5)
        found[tuple(parts.values())] = expected
    different = [predictions(fresh(tiny_sd).unet, model), *found.values()]
    assert all((a - b).abs().max() > 1e-3 for k, a in enumerate(different) for b in different[:k])


@pytest.mark.parametrize("branch", ["full", "general"])
def test_the_pipeline_is_our_sampling(wide, tiny_sd, tmp_path, branch):
    """diffusers' pipeline gives the images of `stable_diffusion.py sample`, from the same noise."""
    import diffusers
    call(sd.main, "export", "--ckpt", wide, "--pipeline", tmp_path / "sd", "--branch", branch)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    expected = ours(fresh(tiny_sd), wide, minority=float(branch == "full"))
    assert_close(predictions(pipe.unet, fresh(tiny_sd)), expected, rtol=0, atol=1e-5)
    assert not any("parametrizations" in name for name in pipe.unet.state_dict())

    images = sample(wide, tmp_path / "samples", "--branch", branch)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, steps_offset=0, set_alpha_to_one=True)
    noise = [torch.randn(4, 8, 8, generator=runtime.generator("cpu", 0, "image", i))
             for i in range(3)]
    texts = [f"a photo of a {name}" for name in ("old master", "pop", "realism")]
    theirs = pipe(texts, latents=torch.stack(noise), height=16, width=16, num_inference_steps=3,
                  guidance_scale=2.5, output_type="np").images
    assert np.abs(np.round(255 * theirs) - images[:3]).max() <= 1
    assert images.std() > 1


def test_export_and_sample_refuse(wide, plain, tmp_path, capsys):
    def check(command, ckpt, *more, says):
        refuses(capsys, sd.main, command, "--ckpt", ckpt, *more, says=[says])
    lora, general = ("--lora", tmp_path / "l"), ("--branch", "general")
    check("export", wide, "--lora", plain, says="--lora")           # another program's files stay
    check("export", wide, *lora, *general, says="--branch")
    check("export", plain / "ckpt.pt", "--pipeline", tmp_path / "p", *general, says="--branch")
    check("sample", plain / "ckpt.pt", *general, "--out", tmp_path / "s", says="--branch")
    assert not list(tmp_path.iterdir())


def test_train_refuses(plain, tmp_path, tiny_sd, pictures, capsys):
    def check(says, model, *more, out=tmp_path / "new"):
        refuses(capsys, sd.main, "train", *FLAGS, "--data-dir", pictures,
                "--pack-dir", tmp_path / "pack", "--model", model, "--out", out, *more, says=[says])
    check("--cm", tiny_sd, "--base", "ddpm", out=plain)         # another run's folder
    check("--model", tmp_path / "nothing")
    check("--resolution", tiny_sd, "--resolution", 18)
    check("--prompt", tiny_sd, "--prompt", "a painting")
    disk.write_text(tmp_path / "texts.csv", "pop,art\nrealism,life\n")
    check("old_master", tiny_sd, "--prompt", tmp_path / "texts.csv")
    check("--epochs", tiny_sd, "--epochs", 1, "--steps", 1)
    check("--cm-rank", tiny_sd, "--no-cm", *CM_RANK)
    config = disk.read_json(tiny_sd / "scheduler/scheduler_config.json")
    velocity = shutil.copytree(tiny_sd, tmp_path / "v")
    disk.write_json(velocity / "scheduler/scheduler_config.json",
                    {**config, "prediction_type": "v_prediction"})
    check("--model", velocity)


def test_another_model_is_refused(plain, model, tiny_sd, pictures, tmp_path, capsys):
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    torch.nn.init.ones_(model.unet.conv_out.bias)
    model.unet.save_pretrained(other / "unet")
    refuses(capsys, sd.main, "sample", "--ckpt", plain / "ckpt.pt", "--model", other,
            "--device", "cpu", "--out", tmp_path / "out", says=["--model"])
    refuses(capsys, sd.main, "train", *FLAGS, "--no-cm", "--base", "ddpm", "--epochs", 2,
            "--model", other, "--data-dir", pictures, "--pack-dir", tmp_path / "pack",
            "--out", shutil.copytree(plain, tmp_path / "run"), says=["--model"])
    assert not (tmp_path / "out/samples.npz").exists()


def test_a_model_that_lacks_weights(tiny_sd, tmp_path):
    """They would be random numbers, with a warning only."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(tiny_sd, tmp_path / "sd")
    path = tmp_path / "sd/vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["decoder.conv_out.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(runtime.UserError, match="--model"):
        fresh(tmp_path / "sd")
