"""features.py: a network of torchvision as the extractor; a classifier that knows little."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import call, refuses
from torchvision.transforms import functional as tv

import disk
import evaluate
from metrics.features import Extractor, Features, Pretrained
from runtime import UserError


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
    x = tv.normalize(tv.resize(x, [224, 224], antialias=True), [0.485, 0.456, 0.406],
                     [0.229, 0.224, 0.225])
    with torch.no_grad():
        assert np.allclose(extractor.batch(large)[1], published.net(x).numpy(), atol=1e-3)
    assert not extractor.net.training


@pytest.mark.parametrize("crop", [[8], [8, 8]])
def test_images_are_stretched_to_the_size_of_the_weights(crop):
    """What the last Linear gets, and its logits; transforms give one number, or two."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2))
    whole = Pretrained(net, SimpleNamespace(crop_size=crop, mean=[0.5] * 3, std=[0.25] * 3))
    features, logits = whole(torch.full((1, 3, 20, 12), 255, dtype=torch.uint8))
    assert torch.allclose(features, torch.full((1, 192), 2.0)) and logits.shape == (1, 2)


def test_an_extractor_takes_its_share_and_what_it_was_made_for(cpu):
    """No image is no batch; a classifier of grey images refuses colours."""
    extractor = Extractor.__new__(Extractor)
    extractor.rt, extractor.batch_size, extractor.channels, asked = cpu, 2, 1, []
    extractor.batch = lambda images: (images[:, :1, 0, 0], images[:, :2, 0, 0])
    images = np.arange(5 * 48, dtype=np.uint8).reshape(5, 4, 4, 3)

    def at(rows):
        asked.append(len(rows))
        return images[rows]
    features, logits = extractor.extract(at, 5, "")
    assert np.array_equal(features, images[:, :1, 0, 0]) and logits.shape == (5, 2)
    assert asked == [2, 2, 1]
    extractor.rt = SimpleNamespace(world=1, rank=0, gather=lambda parts: parts)
    assert extractor.extract(None, 0, "") == ([], [])
    with pytest.raises(UserError, match="--features"):
        Extractor.batch(extractor, images)


def test_its_distance_is_called_fd(hub, tmp_path):
    rng = np.random.RandomState(1)
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", rng.randint(0, 256, (6, 8, 8, 3), np.uint8))
    call(evaluate.main, "--samples", tmp_path / "a.npz", "--reference", tmp_path / "b.npz",
         "--features", "torchvision:resnet18", "--device", "cpu")
    result = disk.read_json(tmp_path / "eval.json")
    assert "fd" in result and "fid" not in result and "is" not in result
    assert result["settings"]["features"] == "torchvision:resnet18"


@pytest.mark.parametrize("name", ["resnet18", "resnet17", "squeezenet1_0"])
def test_offline_and_unknown(hub, name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    refuses(capsys, evaluate.main, "--samples", "digits", "--features", f"torchvision:{name}",
            "--data-dir", tmp_path, "--device", "cpu", says=["--features"])


def test_a_file_cut_short(hub, published, tmp_path, capsys, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / published.file.name).write_bytes(b"half")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    refuses(capsys, evaluate.main, "--samples", "digits", "--features", "torchvision:resnet18",
            "--data-dir", tmp_path, "--device", "cpu", says=["--features"])


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


def test_the_warning_is_printed_and_kept(cm_run, classifier, data_dir, tmp_path, capsys,
                                         monkeypatch):
    monkeypatch.setattr(evaluate, "warnings_of", lambda *_: ["warning: of 7"])
    call(evaluate.main, "--ckpt", cm_run / "ckpt.pt", "--num", 20, "--steps", 1, "--features",
         classifier, "--data-dir", data_dir, "--device", "cpu", "--out-json", tmp_path / "e.json")
    assert "warning: of 7\n" in capsys.readouterr().out
    assert disk.read_json(tmp_path / "e.json")["warnings"] == ["warning: of 7"]
