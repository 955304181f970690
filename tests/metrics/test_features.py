"""features.py: networks of torchvision and transformers; a classifier that knows little."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import randomize, refuses
from PIL import Image
from torch_fidelity import feature_extractor_clip
from torchvision.transforms import functional as tv

import disk
import evaluate
from metrics import features
from metrics.features import Extractor, Features, VisionTransformer
from runtime import UserError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of torch.hub with random weights of a ResNet-18, their URL, and the network."""
    hub = tmp_path_factory.mktemp("hub")
    (hub / "checkpoints").mkdir()
    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval()
    torch.save(net.state_dict(), hub / "x.pth")
    name = f"resnet18-{disk.sha256(hub / 'x.pth')[:8]}.pth"
    (hub / "x.pth").rename(hub / "checkpoints" / name)
    return SimpleNamespace(hub=hub, file=hub / "checkpoints" / name, net=net,
                           url=f"https://download.pytorch.org/models/{name}")


@pytest.fixture
def hub(published, monkeypatch):
    """torchvision publishes just those weights, and there is no network."""
    def offline(*_, **__):
        raise OSError("network is unreachable")
    weights = SimpleNamespace(url=published.url, transforms=(
        torchvision.models.ResNet18_Weights.DEFAULT.transforms))
    monkeypatch.setattr(torchvision.models, "get_model_weights",
                        lambda name: SimpleNamespace(DEFAULT=weights))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(published.hub))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)


def test_it_is_torchvisions_network(hub, published, cpu):
    """On images of its own size: logits as torchvision's preprocessing and network give them."""
    extractor = Extractor("torchvision:resnet18", cpu)
    assert extractor.sha256 == disk.sha256(published.file)
    images = np.random.RandomState(0).randint(0, 256, (2, 224, 224, 3), np.uint8)
    ours, logits = extractor.batch(images)
    x = torchvision.models.ResNet18_Weights.DEFAULT.transforms(resize_size=224)(
        torch.from_numpy(images).permute(0, 3, 1, 2))
    with torch.no_grad():
        expected = published.net(x).numpy()
    assert ours.shape == (2, 512) and np.allclose(logits, expected, atol=1e-3)
    assert not np.allclose(logits[0], logits[1], atol=1e-3)
    small, _ = extractor.batch(images[:, ::7, ::7])        # resized
    assert small.shape == (2, 512)
    # A larger one is stretched to the network's size, without aliasing, and nothing is cut off
    large = np.random.RandomState(1).randint(0, 256, (1, 448, 300, 3), np.uint8)
    x = torch.from_numpy(large).permute(0, 3, 1, 2) / 255
    x = tv.normalize(tv.resize(x, [224, 224], antialias=True), MEAN, STD)
    with torch.no_grad():
        assert np.allclose(extractor.batch(large)[1], published.net(x).numpy(), atol=1e-3)
    assert not extractor.net.training


def test_an_extractor_takes_no_image_and_what_it_was_made_for():
    """No image is no batch, as in a process without a share; one of grey images refuses colours."""
    extractor = Extractor.__new__(Extractor)
    extractor.rt = SimpleNamespace(world=1, rank=0, gather=lambda parts: parts)
    extractor.batch_size, extractor.channels = 2, 1
    assert extractor.extract(None, 0, "") == ([], [])
    with pytest.raises(UserError, match="--features"):
        extractor.batch(np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3))


@pytest.mark.parametrize("name", ["resnet18", "cut short", "resnet17", "squeezenet1_0"])
def test_offline_and_unknown(hub, published, name, tmp_path, capsys, monkeypatch):
    if name == "cut short":
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / published.file.name).write_bytes(b"half")
        name = "resnet18"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    own = ("--features", f"torchvision:{name}")
    refuses(capsys, features.main, *own, says=["--features"])       # before the training
    refuses(capsys, evaluate.main, "--samples", "digits", *own, "--data-dir", tmp_path,
            "--device", "cpu", says=["--features"])


OPENAI_NAMES = {"class_embedding": "embeddings.class_embedding",
                "conv1": "embeddings.patch_embedding", "ln_pre": "pre_layrnorm",
                "positional_embedding": "embeddings.position_embedding.weight",
                "ln_post": "post_layernorm", "transformer.resblocks": "encoder.layers",
                "attn": "self_attn", "ln_": "layer_norm", "c_fc": "fc1", "c_proj": "fc2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: (folder, network)}: tiny ones; as the hub has it, CLIP's file has texts' weights."""
    import transformers
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "patch_size": 14}
    seen = {**small, "image_size": 42, "intermediate_size": 256}
    nets = {
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**small, image_size=70)),
        "registers": transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**small, image_size=70)),
        "clip": transformers.CLIPModel(transformers.CLIPConfig(vision_config=seen, text_config={
            "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}))}
    root = tmp_path_factory.mktemp("transformers")
    for name, net in nets.items():
        randomize(net.eval(), scale=0.5).save_pretrained(root / name)
    return {name: (root / name, net) for name, net in nets.items()}


def normalised(images, mean, std):
    """uint8 (n, H, W, 3) -> float32 (n, 3, H, W), as a network gets them."""
    return torch.from_numpy((images / 255 - mean) / std).float().permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(32, 32), (48, 60), (300, 500)])
def test_vision_transformers_get_pillows_bicubic_resize(size):
    """To one grey level: Pillow's weights are whole numbers."""
    images = np.random.RandomState(0).randint(0, 256, (2, *size, 3), np.uint8)
    small = [np.array(Image.fromarray(x).resize((224, 224), Image.BICUBIC)) for x in images]
    extractor = VisionTransformer(lambda x: SimpleNamespace(pooler_output=x), 224, MEAN, STD)
    got, _ = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
    levels = (got - normalised(np.stack(small), MEAN, STD)).abs() * 255 * max(STD)
    assert levels.max() < 1.1 and (levels > 0.1).float().mean() < 0.01


def test_dinov2_is_the_class_token_at_the_authors_positions(folders, cpu):
    """Positions of 5 x 5 patches are read at (i + 0.5) 5 / 16.1 - 0.5 for i = 0 ... 15."""
    folder, net = folders["dinov2"]
    images = np.random.RandomState(0).randint(0, 256, (2, 224, 224, 3), np.uint8)
    got, logits = Extractor(f"dinov2:{folder}", cpu).batch(images)
    table = net.embeddings.position_embeddings.detach()
    at = 2 * (torch.arange(16) + 0.5) / 16.1 - 1
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), 2)[None]
    patches = torch.nn.functional.grid_sample(
        table[:, 1:].reshape(1, 5, 5, 64).permute(0, 3, 1, 2), grid, "bicubic", "border", False)
    expected = Extractor(f"dinov2:{folder}", cpu).net.net
    expected.embeddings.position_embeddings = torch.nn.Parameter(
        torch.cat([table[:, :1], patches.reshape(1, 64, 256).permute(0, 2, 1)], 1))
    with torch.no_grad():
        token = expected(normalised(images, MEAN, STD)).last_hidden_state[:, 0].numpy()
        transformers_own = net(normalised(images, MEAN, STD)).last_hidden_state[:, 0].numpy()
    assert got.shape == (2, 64) and logits.shape == (2, 0)
    assert np.abs(got - token).max() < 1e-4 < np.abs(got - transformers_own).max()


def test_clip_is_torch_fidelitys_without_the_projection(folders, cpu):
    folder, net = folders["clip"]
    state = net.vision_model.state_dict()
    for part in (f"encoder.layers.{i}.self_attn." for i in range(2)):
        for what in ("weight", "bias"):
            state[f"{part}in_proj_{what}"] = torch.cat(
                [state.pop(f"{part}{x}_proj.{what}") for x in "qkv"])
    for new, old in OPENAI_NAMES.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    theirs = feature_extractor_clip.VisionTransformer(42, 14, 64, 2, 1, 8)
    theirs.proj = None
    theirs.load_state_dict(state)
    images = np.random.RandomState(0).randint(0, 256, (2, 42, 42, 3), np.uint8)
    got, _ = Extractor(f"clip:{folder}", cpu).batch(images)
    with torch.no_grad():
        expected = theirs(normalised(images, CLIP_MEAN, CLIP_STD)).numpy()
    assert got.shape == (2, 64) and np.abs(got - expected).max() < 1e-4 < expected.std()


def test_fd_in_features_of_transformers(folders, tmp_path, measured):
    """Also from features that --save-stats kept."""
    rng = np.random.RandomState(1)
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", rng.randint(0, 256, (12, 8, 8, 3), np.uint8))
    clip = f"clip:{folders['clip'][0]}"
    samples = ("--samples", tmp_path / "a.npz")
    result = measured(*samples, "--reference", tmp_path / "b.npz", "--features", clip,
                      "--save-stats", tmp_path / "stats.npz")
    assert {"fd", "kd", "density", "coverage"} < set(result) and "is" not in result
    assert result["settings"]["features"] == clip
    again = measured(*samples, "--reference", tmp_path / "stats.npz")
    assert again["fd"] == pytest.approx(result["fd"], rel=1e-6)


def test_transformers_that_cannot_be_loaded(folders, tmp_path, capsys, monkeypatch):
    """No such folder, others' weights, registers that would be left out, no package."""
    def check(where, says):
        refuses(capsys, evaluate.main, "--samples", "digits", "--features", f"dinov2:{where}",
                "--data-dir", tmp_path, "--device", "cpu", says=["--features", says])
    check(tmp_path / "none", "recognition.classify")
    check(folders["clip"][0], "recognition.classify")
    check(folders["registers"][0], "recognition.classify")
    monkeypatch.setitem(sys.modules, "transformers", None)
    check(folders["dinov2"][0], "pip install transformers")


def test_classes_that_the_classifier_does_not_know():
    """It calls everything "a" or "b": of class 1 it knows a third, of class 2 nothing."""
    labels = np.array([0, 0, 1, 1, 1, 2, 2])
    metrics = evaluate.Metrics(output_classes=np.arange(3))

    def lines(outputs, metrics=metrics):
        real = Features(np.zeros((7, 2)), np.eye(3)[outputs], labels)
        return evaluate.warnings_of(real, metrics, "abc", SimpleNamespace(name="x.pt"))
    line, = lines([0, 0, 0, 0, 1, 0, 1])
    assert "b 33%, c 0%" in line and "x.pt" in line
    assert lines(labels) == [] and lines([0, 0, 1, 1, 0, 2, 2]) == []
    assert lines([0] * 7, evaluate.Metrics()) == []
