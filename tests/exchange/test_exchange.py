"""diffusers_unet.py: what diffusers computes from an export is what we compute, and it comes back
whole; what one of both cannot compute is refused with the reason."""
import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import call, refuses
from diffusers import DDIMPipeline

import disk
import sample
import samplers
from exchange import diffusers_unet, peers
from model import UNet, UNetConfig
from networks import build
from runtime import UserError

NETWORK = {"channels": 1, "num_classes": 10, "ch": 128, "ch_mult": [1, 2], "attn": [1],
           "num_res_blocks": 1, "dropout": 0.1, "augment_dim": 0}
Y = torch.tensor([0, 3, 9, -1])


def fill(net, seed=0):
    """Random values in every parameter, at which all parts of the network matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "label" in name or "class_embedding" in name:
                p.copy_(noise)
            elif p.dim() > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.1 * noise + ("norm" in name and "weight" in name))
    return net


def two_inputs():
    """x_t and t, of four images."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, 8, 8, generator=g), torch.tensor([0, 7, 500, 999])


def checkpoint(path, data, rank_ratio=0.1, **network):
    """A checkpoint of a run, with random weights."""
    network = {**NETWORK, **network}
    state = [fill(build(network, rank_ratio), seed).state_dict() for seed in (0, 1)]
    disk.save(path, {
        "kind": "diffusion", "step": 7, "command": "python train.py", "data": data,
        "config": {"dataset": "digits", "dtype": "float32", "ir": 20.0}, "network": network,
        "rank_ratio": rank_ratio, "experts": None, "model": state[0], "ema": state[1],
        "optimizer": {}})
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory, digits):
    """The path of a checkpoint of a CM run."""
    return checkpoint(tmp_path_factory.mktemp("run") / "ckpt.pt", digits.record())


def to_diffusers(ckpt, path, *flags):
    """sample.py --export --format diffusers."""
    call(sample.main, "--ckpt", ckpt, "--export", path, "--format", "diffusers", "--device", "cpu",
         *flags)
    return path


@pytest.fixture(scope="module")
def exported(ckpt):
    """The folder that sample.py wrote of it for diffusers."""
    return to_diffusers(ckpt, ckpt.with_name("exported"))


def same(got, expected):
    """Whether two predictions are equal to 1e-4."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def predictions(net, unet):
    """(ours, theirs) of labels and Null at several timesteps."""
    x, t = two_inputs()
    return net(x, t, Y), unet(x, t, Y % 11).sample


@pytest.mark.parametrize("options", [
    {}, {"branch": "general"}, {"weights": "raw"}, {"augment_dim": 9}])
def test_it_predicts_what_ours_does(ckpt, digits, tmp_path, options):
    """The weights of augmentation are left out."""
    flags = [word for key, value in options.items() for word in (f"--{key}", value)]
    if "augment_dim" in options:
        ckpt, flags = checkpoint(tmp_path / "ckpt.pt", digits.record(), None, **options), []
    unet = DDIMPipeline.from_pretrained(to_diffusers(ckpt, tmp_path / "d", *flags)).unet
    net = sample.load_merged(disk.load(ckpt, ["diffusion"]), options.get("weights", "ema"),
                              options.get("branch", "full"))
    got, expected = predictions(net, unet)
    same(expected, got)
    assert got.std() > 0.1
    other = net(*two_inputs(), torch.full((4,), 5))
    assert ((other - got).flatten(1).abs().amax(1) > 0.01).all()        # the labels matter


@pytest.mark.parametrize("recipe", ["ours", "release"])
def test_the_lines_of_the_docstring_generate_our_images(ckpt, cpu, recipe, tmp_path):
    """Guided DDIM in five steps; --recipe release: never clipped, its last step is the identity."""
    whole = disk.load(ckpt, ["diffusion"])
    whole["config"]["recipe"] = recipe
    disk.save(tmp_path / "ckpt.pt", whole)
    exported = to_diffusers(tmp_path / "ckpt.pt", tmp_path / "exported")
    lines = re.search(r"    pipe = .*?\n\n", diffusers_unet.__doc__, re.S)[0]
    lines = "\n".join(line[4:] for line in lines.splitlines())
    assert len(lines.splitlines()) == 5
    settings = samplers.Sampling.of("diffusion", recipe, seed=3, steps=5)
    net = sample.load_merged(whole)
    y = torch.tensor([0, 4, 9])
    expected = sample.sample_batch(net, y, range(3), (1, 8, 8), cpu, settings)
    noise = [torch.randn(1, 8, 8, generator=sample.runtime.generator("cpu", 3, "image", i))
             for i in range(3)]
    names = {"DDIMPipeline": DDIMPipeline, "x": torch.stack(noise), "y": y,
             "null": torch.full_like(y, 10)}
    with torch.no_grad():
        exec(lines.replace('"DIR"', repr(str(exported))).replace("(50)", "(5)"), names)
    size = expected.abs().max()                 # of random weights, not clipped: about 50
    same(names["x"] / size, expected / size)
    for change in ({"clip": recipe == "release"},
                   {"last_step": "x_0" if recipe == "release" else "identity"}):
        other = sample.sample_batch(net, y, range(3), (1, 8, 8), cpu, replace(settings, **change))
        assert (other - expected).abs().max() > 1e-3


def test_other_shapes(tmp_path):
    """Three levels, attention at two, three channels, two blocks."""
    net = fill(UNet(UNetConfig(3, 4, 128, (1, 1, 3), (0, 2), 2, 0.0)))
    unet = diffusers_unet.their_network(net, 8).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 800])
    with torch.no_grad():
        same(unet(x, t, torch.tensor([2, 4])).sample, net(x, t, torch.tensor([2, -1])))
    state = diffusers_unet.to_ours(unet.state_dict(), net)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_it_comes_back_bit_for_bit(ckpt, exported, tmp_path):
    """As the plain export of the same checkpoint."""
    call(peers.main, "--from-diffusers", exported, "--to", tmp_path / "back.pt")
    back = disk.load(tmp_path / "back.pt", ["diffusion"])
    call(sample.main, "--ckpt", ckpt, "--export", tmp_path / "plain.pt", "--device", "cpu")
    plain = disk.load(tmp_path / "plain.pt", ["diffusion"])
    for weights in ("model", "ema"):
        a, b = back.pop(weights), plain.pop(weights)
        assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
    assert back == plain


def test_it_comes_back_after_training_there(exported, tmp_path):
    """Their Null is then no zero."""
    folder = shutil.copytree(exported, tmp_path / "trained")
    pipe = DDIMPipeline.from_pretrained(folder)
    fill(pipe.unet, seed=5)
    assert pipe.unet.class_embedding.weight[-1].abs().max() > 1
    pipe.save_pretrained(folder)
    call(peers.main, "--from-diffusers", folder, "--to", tmp_path / "ours.pt")
    found = disk.load(tmp_path / "ours.pt", ["diffusion"])
    same(*predictions(sample.load_merged(found), pipe.unet.eval()))


@pytest.mark.parametrize("network, kind", [
    (NETWORK, "consistency"),
    ({"network": "dit", "channels": 1, "num_classes": 10, "size": 8}, "diffusion"),
    ({**NETWORK, "ch_mult": [2, 2]}, "diffusion"),
    ({**NETWORK, "ch": 32}, "diffusion"),
], ids=str)
def test_networks_that_theirs_is_not(network, kind):
    with pytest.raises(UserError, match="--format diffusers"):
        diffusers_unet.refuse_network({"kind": kind}, build(network))
    diffusers_unet.refuse_network({"kind": "diffusion"}, build(NETWORK))


def test_a_folder_that_is_not_an_export(tmp_path, capsys):
    refuses(capsys, peers.main, "--from-diffusers", tmp_path / "none", "--to", tmp_path / "o.pt",
            says=["--from-diffusers"])
    assert not (tmp_path / "o.pt").exists()
