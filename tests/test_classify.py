"""classify.py: the losses against literal versions and their limits, CM on ResNet stages, resume, extra images, results."""
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, call
from test_mistakes import refuses
from torch.nn import functional as F
from torch.testing import assert_close

import classify
import runtime
from cm_layers import general_only, merge, reserve, reserved
from data import load

COUNTS = [148, 106, 76, 54, 39, 28, 20, 14, 10, 7]
FAST = ("--width", 4, "--epochs", 4, "--device", "cpu", "--dtype", "float32", "--ir", 20)


def small(loss="ce", counts=COUNTS, stages=(), **options):
    """An objective on a narrow ResNet with random low-rank parts, and a batch of 16."""
    torch.manual_seed(0)
    net = classify.make_resnet(1, 10, 8, loss == "ldam")
    for stage in stages:
        reserve(getattr(net, stage))
    for _, _, part in reserved(net):
        torch.nn.init.normal_(part.B, std=1.0)
    return classify.Objective(net, loss, counts, reserved=stages, **options), torch.randn(16, 1, 8, 8), torch.arange(16) % 10


# ----------------------------------------------------------------------------------------------------------------------
# Losses

def literal(loss, z, y, counts, tau=1.0):
    """Each loss word by word, in Python floats."""
    total, largest = [], max(n ** -0.25 for n in counts)
    for row, c in zip(z.tolist(), y.tolist()):
        if loss == "ldam":
            row = [v - (30 * 0.5 * counts[k] ** -0.25 / largest if k == c else 0) for k, v in enumerate(row)]
        if loss == "la":
            row = [v + tau * math.log(counts[k] / sum(counts)) for k, v in enumerate(row)]
        total.append(-math.log(math.exp(row[c]) / sum(map(math.exp, row))))
    return sum(total) / len(total)


@pytest.mark.parametrize("loss", ["ce", "ldam", "la"])
def test_losses_are_the_papers(loss):
    o, x, y = small(loss, tau=1.3)
    z = o.eval().net(x)
    assert o(x, y)[0].item() == pytest.approx(literal(loss, z, y, COUNTS, 1.3), rel=1e-4)
    assert loss == "ce" or abs(o(x, y)[0].item() - F.cross_entropy(z, y).item()) > 0.01


def test_their_limits():
    balanced = [50] * 10
    o, x, y = small("la", balanced)
    assert_close(o.eval()(x, y)[0], F.cross_entropy(o.net(x), y))           # equal priors: cross-entropy
    o, x, y = small("ldam")
    o.margins.zero_()
    assert_close(o.eval()(x, y)[0], F.cross_entropy(o.net(x), y))           # no margin: that of 30 cos
    features, logits = classify.features_and_logits(o.net, x)
    cosine = F.cosine_similarity(features[:, None], o.net.fc.weight[None], dim=2)
    assert_close(logits, 30 * cosine, atol=1e-4, rtol=1e-4)
    assert_close(classify.ldam_margins(torch.tensor(balanced)), torch.full((10,), 0.5))
    margins = classify.ldam_margins(torch.tensor(COUNTS))
    assert margins.max() == 0.5 and margins.argmax() == 9 and margins[0] == pytest.approx(0.5 * (7 / 148) ** 0.25)


def test_deferred_reweighting():
    o, x, y = small()
    each = F.cross_entropy(o.eval().net(x), y, reduction="none")
    effective = [(1 - 0.9999 ** n) / (1 - 0.9999) for n in COUNTS]
    w = torch.tensor([1 / e for e in effective])[y]
    assert_close(o(x, y, True)[0], (w * each).sum() / w.sum(), atol=1e-5, rtol=1e-4)
    assert_close(o(x, y, False)[0], each.mean())
    assert_close(classify.effective_number_weights(torch.tensor([9, 9, 9])), torch.ones(3))


# ----------------------------------------------------------------------------------------------------------------------
# CM

@pytest.mark.parametrize("stages", [("layer4",), ("layer3", "layer4"), ("layer2",), ("layer1", "layer2", "layer3", "layer4")], ids="+".join)
@pytest.mark.parametrize("distance", ["probs", "logits"])
def test_cm_on_any_stages(stages, distance):
    """L_CM literally, from the two whole networks; and the trunk runs once."""
    o, x, y = small("ce", stages=stages, distance=distance, lam=0.7, w_con=0.5, w_div=2.0)
    o.eval()
    with general_only(o.net):
        z_g = o.net(x)
    z = o.net(x)
    D = (z.softmax(1) - z_g.softmax(1)).square().sum(1) if distance == "probs" else (z - z_g).square().mean(1)
    n = torch.tensor(COUNTS, dtype=torch.float64)
    w_con, w_div = 10 * n / n.sum(), 10 / (n * (1 / n).sum())
    con, div = (w_con[y] * D).mean(), -(w_div[y] * D).mean()
    expected = F.cross_entropy(z, y) + 0.7 * (0.5 * con + 2 * div)
    calls = []
    o.net.conv1.register_forward_hook(lambda *_: calls.append(1))
    total, terms = o(x, y)
    assert total.item() == pytest.approx(expected.item(), rel=1e-4) and len(calls) == 1 and D.max() > 1e-6
    assert terms["con"].item() == pytest.approx(con.item(), rel=1e-3)


def test_the_general_pass_leaves_batch_norm_alone():
    o, x, y = small("ce", stages=("layer4",))
    twin = copy.deepcopy(o.net).train()
    o.train()
    o(x, y)
    twin(x)
    for (name, a), b in zip(o.net.named_buffers(), twin.buffers()):
        assert_close(a, b, msg=name)
    assert all(m.track_running_stats for m in o.net.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_merging_changes_no_logit():
    o, x, _ = small(stages=("layer3", "layer4"))
    o.eval()
    plain = classify.make_resnet(1, 10, 8).eval()
    plain.load_state_dict(merge(copy.deepcopy(o.net)).state_dict(), strict=True)
    assert_close(plain(x), o.net(x), rtol=1e-4, atol=1e-4)
    with general_only(o.net):
        assert (plain(x) - o.net(x)).abs().max() > 1e-2


def test_merged_is_a_plain_resnet(tmp_path, data_dir):
    call(classify.main, *FAST, "--cm", "--loss", "la", "--data-dir", data_dir, "--out", tmp_path)
    ckpt = runtime.load(tmp_path / "ckpt.pt", ["classifier"])
    plain = classify.make_resnet(1, 10, 4)
    plain.load_state_dict(ckpt["model"], strict=True)
    assert not list(reserved(plain))
    net, _ = classify.load_classifier(tmp_path / "ckpt.pt", "cpu")
    test = load("digits", data_dir, "test")
    rt = runtime.Runtime(torch.device("cpu"), torch.float32)
    accuracy = 100 * float((classify.predict(net, test, rt) == test.labels).mean())
    result = runtime.read_json(tmp_path / "result.json")
    assert result["accuracy"] == pytest.approx(accuracy) == pytest.approx(result["recall"]) and (tmp_path / "confusion.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Runs

def test_every_loss_learns(tmp_path, data_dir):
    for loss in ("ce", "ldam", "la"):
        for more in ((), ("--cm",), ("--drw",)):
            out = tmp_path / (loss + "".join(more))
            call(classify.main, *FAST, "--loss", loss, *more, "--data-dir", data_dir, "--out", out, "--width", 8, "--epochs", 16)
            result = runtime.read_json(out / "result.json")
            assert result["accuracy"] > 25 and set(result["splits"]) == {"Many", "Medium", "Few"}


def test_resume_is_exact(tmp_path, data_dir):
    """Interrupted with SIGINT and started again: the weights of one run."""
    command = [sys.executable, ROOT / "classify.py", "--width", 4, "--epochs", 40, "--device", "cpu", "--dtype", "float32", "--ir", 20, "--cm",
               "--data-dir", data_dir, "--save-every", 1]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = lambda out: subprocess.Popen([str(c) for c in [*command, "--out", out]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)
    assert start(tmp_path / "a").wait() == 0
    p = start(tmp_path / "b")
    while not (tmp_path / "b/ckpt.pt").exists():
        assert p.poll() is None
        time.sleep(0.01)
    p.send_signal(signal.SIGINT)
    assert p.wait() == 130
    assert start(tmp_path / "b").wait() == 0
    a, b = (runtime.load(tmp_path / f / "ckpt.pt", ["classifier"])["model"] for f in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_scores():
    labels, predicted = np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 1, 1, 0])
    result, matrix = classify.scores(predicted, labels, {"Many": [0], "Few": [1, 2]}, 3)
    assert result["accuracy"] == pytest.approx(100 * 5 / 8) and matrix.tolist() == [[3, 1, 0], [0, 2, 0], [1, 1, 0]]
    assert result["precision"] == pytest.approx(100 * (3 / 4 + 2 / 4 + 0) / 3) and result["recall"] == pytest.approx(100 * (3 / 4 + 1 + 0) / 3)
    assert result["splits"]["Few"]["accuracy"] == pytest.approx(50)
    assert classify.groups_of(COUNTS, "counts") == {"Many": [0, 1], "Medium": [2, 3, 4, 5, 6], "Few": [7, 8, 9]}
    assert classify.groups_of(COUNTS, "thirds")["Few"] == [6, 7, 8, 9]


def test_learning_rates():
    args = classify.resolve(classify.make_parser().parse_args(["--dataset", "cifar100"]))
    assert (args.epochs, args.lr, args.weight_decay, args.width, args.schedule, args.nesterov) == (200, 0.1, 2e-4, 64, "steps", False)
    rate = lambda epoch: classify.learning_rate(epoch * 84, 200 * 84, 84, args)
    assert rate(0) == pytest.approx(0.1 / 420) and rate(5) == rate(159) == 0.1
    assert rate(160) == pytest.approx(1e-3) and rate(179) == pytest.approx(1e-3) and rate(180) == pytest.approx(1e-5)
    digits = classify.resolve(classify.make_parser().parse_args([]))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=351, cycle_momentum=False)
    for step in range(350):
        assert classify.learning_rate(step, 350, 11, digits) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step(), theirs.step()


def test_extra_images(tmp_path, data_dir, digits, capsys):
    extra = np.repeat(load("digits", data_dir, "test").images, 3, 3)
    labels = load("digits", data_dir, "test").labels
    np.savez(tmp_path / "x.npz", extra, labels)
    for how, expected in (("all", [n + 30 for n in COUNTS]), ("5", [n + 5 for n in COUNTS]),
                          ("balance", [n + min(30, 148 - n) for n in COUNTS])):
        joined = classify.with_extra(digits, tmp_path / "x.npz", how, 0)
        assert joined.counts.tolist() == expected and joined.images.shape[1:] == (8, 8, 1)
        assert np.array_equal(joined.images[:502], digits.images)
    backwards = {"data": {"class_names": [str(c) for c in range(10)][::-1]}}           # as of a run with another --class-order
    runtime.write_json(tmp_path / "reversed.json", backwards)
    np.savez(tmp_path / "reversed.npz", extra, 9 - labels)
    joined = classify.with_extra(digits, tmp_path / "reversed.npz", "all", 0)
    again = classify.with_extra(digits, tmp_path / "x.npz", "all", 0)
    assert np.array_equal(joined.labels, again.labels) and np.array_equal(joined.images, again.images)
    runtime.write_json(tmp_path / "reversed.json", [backwards])                       # someone else's .json says nothing
    assert np.array_equal(classify.with_extra(digits, tmp_path / "reversed.npz", "all", 0).labels[502:], np.sort(9 - labels))
    runtime.write_json(tmp_path / "others.json", {"data": {"class_names": ["cat"] * 10}})
    np.savez(tmp_path / "others.npz", extra, labels)
    refuses(capsys, classify.main, *FAST, "--extra", tmp_path / "others.npz", "--data-dir", data_dir, "--out", tmp_path / "y",
            says=["--extra", "class cat", "10"])
    call(classify.main, *FAST, "--extra", tmp_path / "x.npz", "--data-dir", data_dir, "--out", tmp_path / "run")
    result = runtime.read_json(tmp_path / "run/result.json")
    assert result["num"] == 802 and set(result["splits"]) == {"Many", "Medium", "Few"}          # by the real images' numbers
    before = (tmp_path / "run/ckpt.pt").read_bytes()
    refuses(capsys, classify.main, *FAST, "--lr", 0.05, "--extra", tmp_path / "x.npz", "--data-dir", data_dir, "--out", tmp_path / "run",
            says=["--lr", "started with 0.1", "--out"])
    assert (tmp_path / "run/ckpt.pt").read_bytes() == before            # a finished run is not written over
    np.savez(tmp_path / "size.npz", extra[:, :4], labels)
    np.savez(tmp_path / "label.npz", extra, labels + 5)
    np.savez(tmp_path / "float.npz", extra, labels + 0.5)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:1000])
    for name, words in (("size", "of shape [300, 4, 8, 3]"), ("float", "whole numbers"), ("cut", "not an .npz"), ("label", "labels run from 5 to 14"), ("none", "not an .npz")):
        refuses(capsys, classify.main, *FAST, "--extra", tmp_path / f"{name}.npz", "--data-dir", data_dir, "--out", tmp_path / "y",
                says=["--extra", words])
    refuses(capsys, classify.main, "--loss", "ce", "--tau", 2, says=["--tau", "--loss la"])
    refuses(capsys, classify.main, "--lam", 2, says=["--lam", "--cm"])
    refuses(capsys, classify.main, "--reserve", "layer4", says=["--reserve", "--cm"])
    refuses(capsys, classify.main, "--extra-per-class", 5, says=["--extra-per-class", "--extra"])
    names = [classify.resolve(classify.make_parser().parse_args(words.split())).out for words in
             ("", "--tau 2 --loss la", "--loss la", "--cm", "--cm --lam 2", "--epochs 7", f"--extra {tmp_path}/x.npz", f"--extra {tmp_path}/size.npz")]
    assert names[0] == "out/classifier-digits" and len(set(names)) == len(names)       # no run of other settings in a run's folder
    refuses(capsys, classify.main, "--extra-per-class", "some", says=["--extra-per-class"])
    refuses(capsys, classify.main, "--loss", "hinge", says=["--loss", "ldam"])


def test_a_class_without_test_images(tmp_path, capsys):
    from PIL import Image
    for name in ("train/a/1", "train/b/1", "train/c/1", "test/a/1", "test/c/1"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    flags = ("--dataset", "folder", "--data-dir", tmp_path, "--pack-dir", tmp_path / "p", "--resolution", 8, "--out", tmp_path / "o", "--device", "cpu")
    refuses(capsys, classify.main, *flags, says=["class b has no test image"])
    assert load("folder", tmp_path, "test", 8, pack_dir=tmp_path / "p").counts.tolist() == [1, 0, 1]       # the classes of train/
    (tmp_path / "test/d").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "test/d/1.png")
    refuses(capsys, classify.main, *flags, says=["--data-dir", "class d is not one of those"])


def test_two_processes_train(tmp_path, data_dir):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "classify.py", *FAST, "--cm",
               "--epochs", 16, "--width", 8, "--data-dir", data_dir, "--out", tmp_path]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] > 25
