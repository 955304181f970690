"""text_to_image.py: captions, the text-conditioned transformer, training and sampling offline."""
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (assert_same_losses, by_two_processes, call, cub200, flowers102, pixels,
                      randomize, read_log, write_text_encoder)
from torch.testing import assert_close

import disk
from cm_layers import is_reserved, reserve
from data import load, reference_images
from latent import text_to_image
from latent.captions import (LENGTH, PAD, UNKNOWN, FrozenCLIP, Table, Texts, Words, captions_of,
                             vocabulary_of)
from losses import Objective, bind
from model import make_alphas_bar
from runtime import UserError
from variants.dit import CrossAttention, DiT

NAMES = ["old_master", "pop", "realism"]
DATA = "--dataset folder --ir 1 --resolution 16 --device cpu --dtype float32 --log-every 1".split()
SMALL = [*DATA, "--batch-size", 4, "--warmup", 0]
NET = ["--ch", 16, "--depth", 2, "--patch", 2, "--text-encoder", "words"]
SAMPLE = ["--num", 6, "--steps", 3, "--device", "cpu", "--batch-size", 4]


def write_captions(folder, images):
    """Reed et al.'s layout: FOLDER/text_c10/CLASS/NAME.txt, ten lines for each image."""
    for path in images:
        lines = [f"caption {k} of {path.stem}" for k in range(10)]
        disk.write_text(folder / "text_c10" / path.parent.name / f"{path.stem}.txt",
                        "\n".join(lines) + "\n\n")


def data_args(name, folder, **changes):
    return Namespace(**{"dataset": name, "data_dir": str(folder), "pack_dir": None,
                        "prompt": None, **changes})


@pytest.mark.parametrize("name, build, where", [
    ("cub200", cub200, "CUB_200_2011/images"), ("flowers102", flowers102, "jpg")])
def test_released_captions_follow_their_images(tmp_path, name, build, where):
    build(tmp_path)
    write_captions(tmp_path / "cvpr2016", sorted((tmp_path / where).rglob("*.jpg")))
    images = load(name, tmp_path, resolution=8)
    args = data_args(name, tmp_path)
    captions = captions_of(images, args, "train")
    assert all(len(texts) == 10 for texts in captions) and len(captions) == len(images.labels)
    if name == "cub200":            # an image's name ends in its class, from 0
        stems = [texts[3].split()[-1] for texts in captions]
        assert [int(stem.rsplit("_", 1)[1]) for stem in stems] == images.labels.tolist()
        assert [stem.split("_")[-2] for stem in stems] == ["0000", "0001", "0002"] * 3
    else:                           # 4, 5 and 6 are held out
        held_out = captions_of(load(name, tmp_path, "test", 8), args, "test")
        assert [texts[0][-5:] for texts in held_out] == ["00004", "00005", "00006"]
        assert captions[3][9] == "caption 9 of image_00007"
    rows = np.array([1, 4])
    assert captions_of(images.take(rows), args, "train") == [captions[1], captions[4]]
    min((tmp_path / "cvpr2016").rglob("*.txt")).unlink()
    with pytest.raises(UserError, match="--data-dir"):      # of one image
        captions_of(images, args, "train")
    of_prompt = captions_of(images, data_args(name, tmp_path, prompt="the {}!"), "train")
    assert of_prompt[0] == [f"the {images.class_names[0].replace('_', ' ')}!"]


def test_captions_beside_images(pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "p")
    images = load("folder", folder, resolution=16, pack_dir=tmp_path)
    args = data_args("folder", folder, pack_dir=tmp_path)
    texts = captions_of(images, args, "train")
    assert texts[0] == ["a photo of a old master"] and texts[-1] == ["a photo of a realism"]
    for path in folder.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"{path.stem} one\n{path.stem} two\n")
    assert captions_of(images, args, "train")[1] == ["1 one", "1 two"]
    path.with_suffix(".txt").unlink()
    with pytest.raises(UserError, match="--prompt"):
        captions_of(images, args, "train")


def test_the_table_draws_captions_of_images_and_classes():
    captions = [["a0", "a1"], ["b0"], ["a2", "a3", "a4"], ["c0"]]
    table = Table(captions, [0, 1, 0, 2])
    rows = torch.tensor([2] * 600 + [0] * 400 + [3])
    drawn = [table.texts[k] for k in table.of_images(rows, torch.rand(1001, dtype=torch.float64))]
    assert set(drawn[:600]) == {"a2", "a3", "a4"} and set(drawn[600:1000]) == {"a0", "a1"}
    assert abs(drawn[:600].count("a3") - 200) < 60 and drawn[1000] == "c0"
    u = torch.rand(1000, dtype=torch.float64)
    of_class = [table.texts[k] for k in table.of_classes(torch.zeros(1000, dtype=int), u)]
    assert set(of_class) == {"a0", "a1", "a2", "a3", "a4"}
    numbers = table.condition(np.array([1, 3, 2]), seed=0, step=5)
    own, other = numbers(torch.tensor([0, 1, 2]))
    assert [table.texts[k][0] for k in own] == ["b", "c", "a"]
    assert [table.texts[k][0] for k in other] == ["a", "b", "c"]
    again = table.condition(np.array([1, 3, 2]), seed=0, step=5)(torch.tensor([0, 1, 2]))
    assert_close(torch.stack(again), torch.stack([own, other]))


TEXTS = ["a red bird", "a blue bird with a long beak", "a red fox"]


def text_net():
    words = Words(vocabulary_of(TEXTS))
    encoder, text_ch = words.encoder(16)
    net = DiT(4, 0, size=4, ch=16, depth=4, patch=1, dropout=0.0,
              texts=Texts(encoder, words.ids(TEXTS)), text_ch=text_ch)
    reserve(net.decoder)
    return randomize(net, scale=0.1)


def test_words():
    words = Words(vocabulary_of(["A red_bird, flying.", "a RED fox"]))
    assert words.vocabulary == ["a", "bird", "flying", "fox", "red"]
    ids = words.ids(["Red bird!", "a green fox", "a " * 99])
    assert ids.shape == (4, LENGTH) and words.encoder(8)[0].words.num_embeddings == 7
    assert ids[0, :3].tolist() == [6, 3, PAD] and ids[1, :4].tolist() == [2, UNKNOWN, 5, PAD]
    assert (ids[2] == 2).all() and (ids[3] == PAD).all()


def test_cross_attention_is_softmax_of_the_text():
    layer = randomize(CrossAttention(128, 2, 24), scale=0.2)
    x, text = torch.randn(2, 5, 128), torch.randn(2, 7, 24)
    q = layer.q(torch.nn.functional.layer_norm(x, (128,), eps=1e-6))
    k, v = layer.kv(text).chunk(2, dim=2)
    heads = []
    for h in range(2):
        part = slice(64 * h, 64 * (h + 1))
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 8).softmax(2)
        heads.append(weights @ v[..., part])
    assert_close(layer(x, text), layer.proj(torch.cat(heads, 2)))


def test_the_text_and_nothing_else_of_y_reaches_the_prediction():
    """By cross-attention, in whose second half capacity is reserved."""
    net = text_net()
    assert [is_reserved(block.cross) for block in net.decoder.blocks] == [True, True]
    x, t = torch.randn(1, 4, 4, 4).expand(4, -1, -1, -1), torch.full((4,), 500)
    eps = net(x, t, torch.tensor([0, 1, 2, -1]))
    assert (eps[:3] - eps[3:]).abs().flatten(1).amax(1).min() > 1e-3
    net.encoder.texts.ids = net.encoder.texts.ids[[2, 2, 0, 3]]
    moved = net(x, t, torch.tensor([2, 2, 0, -1]))
    assert_close(moved, eps[[0, 0, 2, 3]])


@pytest.mark.parametrize("base", ["cbdm", "oc", "consistency"])
def test_every_base_loss_takes_texts(base):
    """What the network gets are numbers of texts; Eq. (3) and y' != y look at classes."""
    net = text_net()
    obj = Objective(net=net, base=bind(base), counts=[9, 1], alphas_bar=make_alphas_bar(),
                    label_drop=0.5)
    table = Table([["a red bird"], ["a blue bird with a long beak"], ["a red fox"]], [0, 0, 1])
    rows = np.array([2, 0, 1, 2, 2, 1, 0, 0])
    y = torch.tensor([0, 0, 1])[rows]
    x_0 = torch.randn(8, 4, 4, 4)
    batch = obj.draw_batch(x_0, y, seed=0, step=1, condition=table.condition(rows, 0, 1))
    plain = obj.draw_batch(x_0, y, seed=0, step=1)
    kept = batch.y_cond >= 0
    assert 0 < kept.sum() < 8 and batch.y_cond[kept].tolist() == rows[kept].tolist()
    assert_close(batch.y, plain.y)
    assert_close(batch.y_other, plain.y_other)
    assert torch.equal(batch.y_other_cond == 2, batch.y_other == 1)
    halves = [obj.draw_batch(x_0, y, seed=0, step=1, part=k, parts=2,
                         condition=table.condition(rows, 0, 1)) for k in range(2)]
    for name in ("y_cond", "y_other_cond"):
        assert_close(torch.cat([getattr(h, name) for h in halves]), getattr(batch, name))
    total, terms, D = obj(batch)
    total.backward()
    assert total.isfinite() and D.min() > 0 and {"base", "con", "div"} <= set(terms)
    assert all(p.grad is not None for p in net.parameters())


def main(*words):
    call(text_to_image.main, *words)


def train_flags(pictures, autoencoder, out, steps, *more):
    length = ["--steps", steps] if steps else []
    return ["train", *SMALL, *NET, "--data-dir", pictures, "--pack-dir", autoencoder[1],
            "--autoencoder", autoencoder[0], *length, "--lr", 3e-3, "--out", out, *more]


@pytest.fixture(scope="module")
def run(pictures, autoencoder, tmp_path_factory):
    """A run of 40 steps with CM."""
    out = tmp_path_factory.mktemp("run") / "cm"
    main(*train_flags(pictures, autoencoder, out, 40, "--sample-every", 40, "--ema", 0.9))
    return out


def test_both_trainings_lower_the_loss(autoencoder, run):
    log = read_log(autoencoder[0].parent)
    assert log[-1]["base"] < 0.3 * log[0]["base"]
    assert (autoencoder[0].parent / "grid-0000060.png").exists()
    log = read_log(run)
    first, last = ([r["base"] for r in log][k] for k in (slice(10), slice(-10, None)))
    assert np.mean(last) < 0.8 * np.mean(first)
    assert all("con" in r for r in log) and max(r.get("D_Many", 0) for r in log) > 0
    assert (run / "grid-0000040.png").exists()
    ckpt = disk.load(run / "ckpt.pt", ["text"])
    assert ckpt["network"]["vocabulary"][:3] == ["a", "master", "of"] and ckpt["rank_ratio"] == 0.1
    assert ckpt["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.96)     # VQ-Diffusion's


def weights_of(out):
    ckpt = disk.load(out / "ckpt.pt", ["text", "autoencoder"])
    return {**ckpt["model"], **{f"ema {k}": v for k, v in ckpt["ema"].items()}}


def test_a_resumed_run_is_the_uninterrupted_one(pictures, autoencoder, tmp_path):
    quiet = ("--sample-every", 0)
    main(*train_flags(pictures, autoencoder, tmp_path / "whole", 4, *quiet))
    for steps in (2, 4):
        main(*train_flags(pictures, autoencoder, tmp_path / "parts", steps, *quiet))
    assert_close(weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole"), rtol=0, atol=0)
    with pytest.raises(UserError, match="--ch"):
        main(*train_flags(pictures, autoencoder, tmp_path / "parts", 6, *quiet, "--ch", 32))
    by_epochs = train_flags(pictures, autoencoder, tmp_path / "epochs", None, *quiet, "--lr-decay")
    for _ in range(2):
        main(*by_epochs, "--epochs", 1)
    assert read_log(tmp_path / "epochs")[-1]["step"] == 6       # ceil(21 / 4)
    for out, steps in (("whole ae", 4), ("ae", 2), ("ae", 4)):
        main("autoencoder", *SMALL, "--data-dir", pictures, "--pack-dir", autoencoder[1], "--ch",
             8, "--factor", 2, "--steps", steps, *quiet, "--out", tmp_path / out)
    assert_close(weights_of(tmp_path / "ae"), weights_of(tmp_path / "whole ae"), rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_train_the_same_run(pictures, autoencoder, tmp_path):
    """The network, which sampled gives the same images."""
    one, two = (train_flags(pictures, autoencoder, tmp_path / name, 2, "--sample-every", 0)
                for name in ("one", "two"))
    main(*one)
    by_two_processes("-m", "latent.text_to_image", *two)
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    sample = ["sample", "--ckpt", tmp_path / "one/ckpt.pt", *SAMPLE, "--out"]
    by_two_processes("-m", "--", "latent.text_to_image", *sample, tmp_path / "samples two")
    main(*sample, tmp_path / "samples one")
    gap = pixels(tmp_path / "samples two") - pixels(tmp_path / "samples one")
    assert np.abs(gap).max() <= 1


def test_samples(run, tmp_path):
    """Of both branches, class after class; images are those of the captions, at any batch size."""
    for name, more in (("full", []), ("again", ["--batch-size", 6]),
                       ("general", ["--branch", "general"])):
        main("sample", "--ckpt", run / "ckpt.pt", *SAMPLE, *more, "--out", tmp_path / name)
    with np.load(tmp_path / "full/samples.npz") as f:
        assert f["arr_0"].shape == (6, 16, 16, 3) and f["arr_1"].tolist() == [0, 1, 2] * 2
    full, again, general = (pixels(tmp_path / name) for name in ("full", "again", "general"))
    assert np.abs(again - full).max() <= 1 and (general != full).any()


def test_sampled_captions_are_those_of_the_reference(run, pictures, tmp_path):
    """Class after class; within a class image after image, each with one of its own captions."""
    folder = shutil.copytree(pictures, tmp_path / "p")
    for path in folder.rglob("*.png"):
        name = f"{path.parent.name} {path.stem}"
        path.with_suffix(".txt").write_text(f"{name} one\n{name} two\n")
    load("folder", folder, resolution=16, pack_dir=tmp_path)
    ckpt = disk.load(run / "ckpt.pt", ["text"])
    ckpt["config"]["pack_dir"] = tmp_path
    ckpt["data"]["sha256"] = None
    args = Namespace(data_dir=folder, num=60, seed=0)
    texts, labels = text_to_image.reference_captions(ckpt, args)
    assert labels == [0, 1, 2] * 20
    names, numbers, which = zip(*(text.split() for text in texts))
    assert list(names) == [NAMES[c] for c in labels]
    images = reference_images(ckpt, folder)[0]
    assert images.counts.tolist() == [3, 3, 3]
    for c in range(3):          # three images of each class take turns
        own = numbers[c::3]
        assert len(set(own[:3])) == 3 and list(own) == (list(own[:3]) * 7)[:20]
    assert 15 < which.count("one") < 45


def test_a_frozen_clip_is_what_the_network_sees(pictures, autoencoder, tmp_path):
    """Its hidden states, which are not trained and not kept; another one is refused."""
    torch.manual_seed(0)
    write_text_encoder(tmp_path / "sd")
    flags = train_flags(pictures, autoencoder, tmp_path / "run", 2, "--sample-every", 0,
                        "--text-encoder", tmp_path / "sd")
    main(*flags)
    ckpt = disk.load(tmp_path / "run/ckpt.pt", ["text"])
    assert not any("clip" in name for name in ckpt["model"]) and ckpt["text_encoder_sha256"]
    text = FrozenCLIP("--text-encoder", str(tmp_path / "sd"))
    net = text_to_image.load_merged(ckpt, text, ["a red fox"])
    ids = text.tokenizer(["a red fox", ""], padding="max_length", max_length=20,
                         return_tensors="pt").input_ids
    with torch.no_grad():
        states = text.clip(ids).last_hidden_state
    assert_close(net.encoder.texts(torch.tensor([0, -1])), states)
    main("sample", "--ckpt", tmp_path / "run/ckpt.pt", *SAMPLE, "--out", tmp_path / "samples")
    write_text_encoder(tmp_path / "other")
    with pytest.raises(UserError, match="--text-encoder"):
        main("sample", "--ckpt", tmp_path / "run/ckpt.pt", *SAMPLE, "--out", tmp_path / "x",
             "--text-encoder", tmp_path / "other")


@pytest.mark.parametrize("more, flag", [
    (["--autoencoder", "no/folder/here"], "--autoencoder"),
    (["--no-cm", "--rank-ratio", "0.2"], "--rank-ratio"), (["--patch", "3"], "--patch"),
    (["--ch", "100"], "--ch")])
def test_mistakes_are_named(pictures, autoencoder, tmp_path, more, flag):
    with pytest.raises(UserError, match=flag):
        main(*train_flags(pictures, autoencoder, tmp_path / "run", 2, *more))
    assert not (tmp_path / "run/ckpt.pt").exists()


def test_the_defaults_are_vq_diffusions():
    args = text_to_image.resolve(text_to_image.make_train_parser().parse_args([]), (), "text")
    assert (args.depth, args.ch, args.patch, args.resolution) == (18, 192, 1, 256)
    assert (args.lr, args.warmup, args.weight_decay) == (4.5e-4, 5000, 0.045)
    assert args.base == "ddpm" and args.cm
    assert (args.steps, args.batch_size, args.ema) == (100_000, 64, 0.9996)
    assert args.ir == 10 and args.rank_ratio == 0.1 and args.label_drop == 0.1
