"""classify.py: losses against literal versions, CM on ResNet stages, resuming, extra images."""
import copy
import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (COUNTS, ROOT, by_two_processes, call, fill_reserved, interrupted,
                      make_folder, refuses)
from torch.nn import functional as F
from torch.testing import assert_close

import disk
import runtime
import train
from cm_layers import general_only, merge, reserve, reserved
from data import load, long_tail_counts
from losses import CMConfig
from recognition import classify, resnet

FAST = ("--width", 8, "--epochs", 4, "--device", "cpu", "--dtype", "float32", "--ir", 20)


def small(loss="ce", counts=COUNTS, stages=(), **options):
    """(a ClassifierLoss on a narrow ResNet with random low-rank parts, Images: a batch of 16)."""
    torch.manual_seed(0)
    net = resnet.make_resnet(1, 10, 8, loss == "ldam")
    for stage in stages:
        reserve(getattr(net, stage))
    fill_reserved(net)
    obj = resnet.ClassifierLoss(net=net, loss=loss, counts=counts, reserved=stages, **options)
    return obj, resnet.Images(torch.randn(16, 1, 8, 8), torch.arange(16) % 10)


def resolved(*flags):
    """The settings that these flags mean."""
    return classify.resolve(classify.make_parser().parse_args([*flags]))


def literal(loss, z, y, counts, tau=1.0):
    """Each loss word by word, in Python floats."""
    total = []
    largest = max(n ** -0.25 for n in counts)
    for row, c in zip(z.tolist(), y.tolist()):
        if loss == "ldam":
            row[c] -= 30 * 0.5 * counts[c] ** -0.25 / largest
        if loss == "la":
            row = [v + tau * math.log(counts[k] / sum(counts)) for k, v in enumerate(row)]
        total.append(-math.log(math.exp(row[c]) / sum(map(math.exp, row))))
    return sum(total) / len(total)


@pytest.mark.parametrize("loss", ["ce", "ldam", "la"])
def test_losses_are_the_papers(loss):
    obj, batch = small(loss, tau=1.3)
    z = obj.eval().net(batch.x)
    total = obj(batch)[0].item()
    assert total == pytest.approx(literal(loss, z, batch.y, COUNTS, 1.3), rel=1e-4)
    assert loss == "ce" or abs(total - F.cross_entropy(z, batch.y).item()) > 0.01


def test_deferred_reweighting():
    obj, batch = small()
    errors = F.cross_entropy(obj.eval().net(batch.x), batch.y, reduction="none")
    effective = [(1 - 0.9999 ** n) / (1 - 0.9999) for n in COUNTS]
    w = torch.tensor([1 / e for e in effective])[batch.y]
    reweighed = obj(batch._replace(reweigh=True))[0]
    assert_close(reweighed, (w * errors).sum() / w.sum(), atol=1e-5, rtol=1e-4)
    assert_close(obj(batch)[0], errors.mean())
    obj.drw_from = 8                    # of ten steps
    drawn = [obj.draw_batch(batch.x, batch.y, seed=0, step=step).reweigh for step in (7, 8)]
    assert drawn == [False, True]
    equal = resnet.effective_number_weights(torch.tensor([9, 9, 9]))
    assert_close(equal, torch.ones(3))


@pytest.mark.parametrize("stages", [("layer4",), ("layer2",), resnet.STAGES], ids="+".join)
@pytest.mark.parametrize("loss, distance", [("ce", "probs"), ("ce", "logits"), ("la", "kl")])
def test_cm_on_any_stages(stages, loss, distance):
    """L_CM literally, from the two whole networks; and the trunk runs once."""
    cm = CMConfig(lam=0.7, w_con=0.5, w_div=2.0, div_bound=0.0)
    obj, batch = small(loss, stages=stages, distance=distance, cm=cm, tau=1.3)
    x, y, *_ = batch
    obj.eval()
    with general_only(obj.net):
        z_g = obj.net(x)
    z = obj.net(x)
    if distance == "probs":
        D = (z.softmax(1) - z_g.softmax(1)).square().sum(1)
    elif distance == "logits":
        D = (z - z_g).square().mean(1)
    else:           # the release's: C mean_i((p w_con - q w_div) mean_k KL), theta adjusted with LA
        prior = torch.tensor(COUNTS) / sum(COUNTS)
        p = F.softmax((z + 1.3 * prior.log() * (loss == "la")) / 1.5, dim=1)
        D = (p * (p / F.softmax(z_g / 1.5, dim=1)).log()).sum(1) / 10
    n = torch.tensor(COUNTS, dtype=torch.float64)
    w_con = 10 * n / n.sum()
    w_div = 10 / (n * (1 / n).sum())
    con = (w_con[y] * D).mean()
    div = -(w_div[y] * D).mean()
    base = literal(loss, z, y, COUNTS, 1.3)
    expected = base + 0.7 * (0.5 * con + 2 * div)
    calls = []
    obj.net.conv1.register_forward_hook(lambda *_: calls.append(1))
    total, terms, _ = obj(batch)
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert len(calls) == (2 if "conv1" in stages else 1) and D.max() > 1e-6
    assert terms["con"].item() == pytest.approx(con.item(), rel=1e-3, abs=1e-8)


def test_by_default_all_convolutions_are_reserved():
    """Sec. G.11: "the convolutional layers"; the stem and the 1 x 1 ones are among them."""
    args = resolved("--cm")
    net = resnet.make_reserved({"channels": 1, "num_classes": 10, "width": 8}, args.reserve, 0.1)
    owners = {owner for owner, _, _ in reserved(net)}
    convolutions = {m for m in net.modules() if isinstance(m, torch.nn.Conv2d)}
    assert owners == convolutions and len(owners) == 20
    some = resolved("--cm", "--reserve", "layer4")
    assert some.reserve == ["layer4"] and some.out != args.out
    assert (args.distance, args.rank_ratio, args.scale, args.norms) == ("kl", 0.15, 0.8, "apart")
    release = resolved("--cm", "--recipe", "release", "--dataset", "cifar100")
    assert release.reserve == [*resnet.STAGES, "fc"] and release.schedule == "tenths"
    assert (release.distance, release.weight_decay, release.w_div) == ("kl", 5e-4, 1)
    assert release.out == "out/classifier-cifar100-cmTrue-reciperelease"


def test_the_factor_of_ba():
    obj, (x, *_) = small(stages=resnet.STAGES)
    net = resnet.make_reserved({"channels": 1, "num_classes": 10, "width": 8}, resnet.STAGES, 0.1,
                               scale=0.8)
    for _, _, part in reserved(obj.net):
        part.B.data *= 0.8
    want = obj.eval().net(x)
    for _, _, part in reserved(obj.net):
        part.B.data /= 0.8
    net.load_state_dict(obj.net.state_dict())
    assert_close(net.eval()(x), want, rtol=1e-4, atol=1e-4)
    assert_close(merge(net)(x), want, rtol=1e-4, atol=1e-4)
    assert (obj.net(x) - want).abs().max() > 1e-2


def test_batch_norms_of_each_branch():
    """theta^g has its own, with statistics of its own, and theta's are as without it."""
    network = {"channels": 1, "num_classes": 10, "width": 8, "normed": True}
    stages = ("layer3", "fc")
    net = resnet.make_reserved(network, stages, 0.5, norms="apart").train()
    fill_reserved(net)
    torch.manual_seed(1)
    two = [m for m in net.modules() if isinstance(m, resnet.TwoNorms)]
    assert len(two) == 10                   # of layer3 and layer4: theta^g passes no other
    for norm in two:
        torch.nn.init.normal_(norm.general.weight)
    theta = copy.deepcopy(net)
    obj = resnet.ClassifierLoss(net=net, loss="la", counts=COUNTS, reserved=stages, distance="kl")
    batch = resnet.Images(torch.randn(16, 1, 8, 8), torch.arange(16) % 10)
    theta_g = copy.deepcopy(net)
    for m in theta_g.modules():
        if isinstance(m, resnet.TwoNorms):
            m.general_only = True
    z = theta(batch.x)
    with general_only(theta_g):
        z_g = theta_g(batch.x)
    total, terms, _ = obj(batch)
    D = resnet.kl(z, z_g, obj)
    assert terms["con"].item() == pytest.approx((obj.w_con_y[batch.y] * D).mean().item(), rel=1e-3)
    total.backward()
    assert all(p.grad is not None for p in net.parameters())        # as processes in parallel need
    a, b, g = (dict(n.named_buffers()) for n in (net, theta, theta_g))
    for name in a:
        assert_close(a[name], (g if ".general." in name else b)[name], msg=name)
    assert (a["layer3.0.bn1.general.running_mean"] - a["layer3.0.bn1.running_mean"]).norm() > 0.01


def test_the_releases_recipe(tmp_path, data_dir):
    """It learns; what is written is theta merged, with its own batch norm and last layer."""
    call(classify.main, *FAST, "--recipe", "release", "--cm", "--loss", "la", "--epochs", 16,
         "--data-dir", data_dir, "--out", tmp_path)
    net, ckpt = resnet.load_classifier(tmp_path / "ckpt.pt", "cpu")
    assert isinstance(net.fc, resnet.NormedLinear) and "bn1.general.weight" in ckpt["reserved"]
    assert disk.read_json(tmp_path / "result.json")["accuracy"] > 25
    args = resolved("--recipe", "release", "--cm")
    own = resnet.make_reserved(ckpt["network"], **classify.low_rank_of(args)).eval()
    own.load_state_dict(ckpt["reserved"])
    x = torch.randn(4, 1, 8, 8)
    assert_close(net(x), own(x), rtol=1e-3, atol=1e-3)


def test_groups_are_those_of_the_papers_table():
    """The paper's "Overall" is the mean of its groups with the numbers of classes of our rule."""
    tables = json.loads((ROOT / "pages/paper_results.json").read_text())["tables"]
    paper = tables["tableG13"]["settings"]
    for ir, sizes in ((200, [30, 31, 39]), (100, [35, 35, 30])):
        counts = long_tail_counts([500] * 100, ir)
        groups = classify.recognition_groups(counts)
        assert [len(groups[name]) for name in ("Many", "Medium", "Few")] == sizes
        for *accuracies, overall in paper[f"cifar100-ir{ir}"]["rows"].values():
            assert np.dot(accuracies, sizes) / 100 == pytest.approx(overall, abs=0.012)


def test_the_general_pass_leaves_batch_norm_alone():
    obj, batch = small("ce", stages=("layer4",))
    twin = copy.deepcopy(obj.net).train()
    obj.train()
    obj(batch)
    twin(batch.x)
    for (name, a), b in zip(obj.net.named_buffers(), twin.buffers()):
        assert_close(a, b, msg=name)


def test_merged_is_a_plain_resnet(tmp_path, data_dir):
    flags = ("--cm", "--loss", "la", "--data-dir", data_dir, "--out", tmp_path)
    call(classify.main, *FAST, *flags)
    ckpt = disk.load(tmp_path / "ckpt.pt", ["classifier"])
    plain = resnet.make_resnet(1, 10, 8)
    plain.load_state_dict(ckpt["model"], strict=True)
    assert not list(reserved(plain))
    net, _ = resnet.load_classifier(tmp_path / "ckpt.pt", "cpu")
    test = load("digits", data_dir, "test")
    rt = runtime.Runtime(torch.device("cpu"), torch.float32)
    accuracy = 100 * float((classify.predict(net, test, rt) == test.labels).mean())
    result = disk.read_json(tmp_path / "result.json")
    assert result["accuracy"] == pytest.approx(accuracy) == pytest.approx(result["recall"])


def test_resume_is_exact(tmp_path, data_dir, monkeypatch):
    """Interrupted with SIGINT in step 7 and started again: the weights of one run."""
    flags = [*FAST, "--cm", "--data-dir", data_dir, "--out"]
    call(classify.main, *flags, tmp_path / "a")
    with interrupted(monkeypatch, classify.ClassifierTraining, "update", 7, signal.SIGINT):
        call(classify.main, *flags, tmp_path / "b")
    call(classify.main, *flags, tmp_path / "b")
    a, b = (disk.load(tmp_path / f / "ckpt.pt", ["classifier"])["model"] for f in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_scores():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 0, 0, 1, 1, 1, 1, 0])
    result = classify.scores(predicted, labels, {"Many": [0], "Few": [1, 2]}, ["a", "b", "c"])
    assert result["accuracy"] == pytest.approx(100 * 5 / 8)
    assert result["classes"]["a"]["accuracy"] == 75
    assert result["precision"] == pytest.approx(100 * (3 / 4 + 2 / 4 + 0) / 3)
    assert result["recall"] == pytest.approx(100 * (3 / 4 + 1 + 0) / 3)
    assert result["groups"]["Few"]["accuracy"] == pytest.approx(50)


def test_learning_rate_in_steps():
    args = resolved("--dataset", "cifar100")
    assert (args.epochs, args.lr, args.weight_decay) == (200, 0.1, 2e-4)
    assert (args.width, args.schedule, args.nesterov) == (64, "steps", False)
    args.steps, args.steps_per_epoch = 200 * 84, 84
    run = SimpleNamespace(args=args)

    def rate(epoch):
        return classify.ClassifierTraining.learning_rate(run, epoch * 84)
    assert rate(0) == pytest.approx(0.1 / 420) and rate(5) == rate(159) == 0.1
    assert rate(160) == pytest.approx(1e-3) and rate(179) == pytest.approx(1e-3)
    assert rate(180) == pytest.approx(1e-5)
    args.schedule = "tenths"                            # the authors' release's
    assert rate(0) == pytest.approx(0.1 / 420) and rate(119) == 0.1
    assert rate(120) == rate(159) == pytest.approx(1e-2) and rate(160) == pytest.approx(1e-3)


def test_learning_rate_in_one_cycle():
    run = SimpleNamespace(args=resolved("--steps", "350"))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=351,
                                                 cycle_momentum=False)
    for step in range(350):
        expected = optimizer.param_groups[0]["lr"]
        rate = classify.ClassifierTraining.learning_rate(run, step)
        assert rate == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        theirs.step()


@pytest.mark.slow
def test_two_processes_train(tmp_path, data_dir):
    by_two_processes("-m", "recognition.classify", *FAST, "--cm", "--epochs", 16, "--width", 8,
                     "--data-dir", data_dir, "--out", tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] > 25


@pytest.fixture(scope="module")
def extra(tmp_path_factory, data_dir):
    """(x.npz, its images and labels): the digits' test set, as if generated, three channels."""
    path = tmp_path_factory.mktemp("extra") / "x.npz"
    test = load("digits", data_dir, "test")
    images = np.repeat(test.images, 3, 3)
    np.savez(path, images, test.labels.astype(np.uint64))       # as some programs write them
    return path, images, test.labels


def test_extra_images_are_added(extra, digits):
    """And it is said which classes still have fewer than the largest one."""
    joined = classify.with_extra(digits, extra[0])
    assert joined.labels.dtype == np.int64
    assert joined.counts.tolist() == [n + 30 for n in COUNTS]
    assert joined.images.shape[1:] == (8, 8, 1)
    assert np.array_equal(joined.images[:502], digits.images)
    text = classify.lacking_in_words(joined.counts, digits.class_names)
    assert "by: 9 141, 8 138, 7 134" in text and "--fill-to 178" in text
    assert classify.lacking_in_words(np.full(10, 150), digits.class_names) == ""


def test_extra_classes_are_matched_by_name(extra, digits, data_dir, tmp_path, capsys):
    path, images, labels = extra
    names = [str(c) for c in range(10)]
    np.savez(tmp_path / "reversed.npz", images, 9 - labels)
    backwards = {"data": {"class_names": names[::-1]},      # of a run with another --class-order
                 "settings": {}, "npz_sha256": disk.sha256(tmp_path / "reversed.npz")}
    disk.write_json(tmp_path / "reversed.json", backwards)
    joined = classify.with_extra(digits, tmp_path / "reversed.npz")
    again = classify.with_extra(digits, path)
    assert np.array_equal(joined.labels, again.labels)
    assert np.array_equal(joined.images, again.images)
    np.savez(tmp_path / "others.npz", images, labels)
    disk.write_json(tmp_path / "others.json", backwards)            # of other samples
    refuses(capsys, classify.main, *FAST, "--extra", tmp_path / "others.npz",
            "--data-dir", data_dir, "--out", tmp_path / "y", says=["--extra"])


def test_a_run_with_extra_images(extra, data_dir, tmp_path, capsys):
    flags = ("--extra", extra[0], "--data-dir", data_dir, "--out", tmp_path)
    call(classify.main, *FAST, *flags)
    assert "0 is 0, ... 9 is 9" in capsys.readouterr().out          # no .json has their names
    result = disk.read_json(tmp_path / "result.json")
    assert result["num"] == 802
    assert set(result["groups"]) == {"Many", "Medium", "Few"}       # by the real images' numbers
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert disk.load(tmp_path / "ckpt.pt", ["classifier"])["data"]["class_counts"] == COUNTS
    refuses(capsys, classify.main, *FAST, "--lr", 0.05, *flags, says=["--lr"])
    assert (tmp_path / "ckpt.pt").read_bytes() == before            # finished: not overwritten


def test_the_test_set_has_the_training_sets_order(tmp_path, cpu):
    """Of a folder, too, whose classes are ordered by size: by that of the training set."""
    make_folder(tmp_path / "set/train", {"a": 3, "b": 9, "c": 6})
    make_folder(tmp_path / "set/test", {"a": 3, "b": 1, "c": 2})
    args = classify.make_parser().parse_args([
        "--dataset", "folder", "--data-dir", str(tmp_path / "set"), "--resolution", "8",
        "--pack-dir", str(tmp_path / "packed")])
    sets = classify.load_sets(args, cpu)
    assert sets.real.class_names == sets.test.class_names == ["b", "c", "a"]
    assert sets.test.counts.tolist() == [1, 2, 3]


# --------------------------------------------------------------------------------------------------
# A folder of images

def test_a_folder_without_test_images(tmp_path, capsys):
    """On a CPU it has the preset tiny; it is said first that nothing will be tested."""
    folder = make_folder(tmp_path / "images", {"a": 6, "b": 3})
    flags = ("--dataset", "folder", "--data-dir", folder, "--pack-dir", tmp_path, "--device", "cpu")
    call(classify.main, *flags, "--width", 8, "--steps", 2, "--out", tmp_path / "run")
    text = capsys.readouterr().out
    assert text.index("data.py split") < text.index("step 1/2")
    config = disk.load(tmp_path / "run/ckpt.pt", ["classifier"])["config"]
    assert (config["preset"], config["resolution"], config["epochs"]) == ("tiny", 16, None)
    refuses(capsys, classify.main, *flags, "--epochs", 2, "--steps", 2, says=["--steps"])


@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_a_classifier_reads_what_the_generator_makes(preset):
    assert classify.PRESETS[preset]["resolution"] == train.PRESETS[preset]["resolution"]


# --------------------------------------------------------------------------------------------------
# Nothing silently wrong, nothing lost

def test_a_finished_run_is_not_trained_again(tmp_path, data_dir, capsys, monkeypatch):
    """Its result stays; one that is missing, or of other data, is measured without training."""
    flags = [*FAST, "--epochs", 2, "--data-dir", data_dir, "--out", tmp_path]
    call(classify.main, *flags)
    ckpt, result = tmp_path / "ckpt.pt", tmp_path / "result.json"
    before = ckpt.read_bytes(), result.read_bytes()
    monkeypatch.setattr(classify, "loop", None)
    call(classify.main, *flags)
    assert (ckpt.read_bytes(), result.read_bytes()) == before
    result.unlink()
    call(classify.main, *flags)
    assert (ckpt.read_bytes(), result.read_bytes()) == before


def test_weights_that_are_not_finite_are_not_saved(tmp_path, data_dir, capsys, monkeypatch):
    """Running statistics among them."""
    update = classify.ClassifierTraining.update

    def poisoned(training):
        norm = update(training)
        training.net.layer1[0].bn1.running_var[0] = math.nan
        return norm
    monkeypatch.setattr(classify.ClassifierTraining, "update", poisoned)
    refuses(capsys, classify.main, *FAST, "--data-dir", data_dir, "--out", tmp_path, says=["--lr"])
    assert not (tmp_path / "ckpt.pt").exists()
