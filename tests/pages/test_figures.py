"""figures.py: which images stand where, what the line below says, what is refused."""
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY_FLAGS, call, refuses
from PIL import Image

import disk
import sample
import train
from pages import figures
from pages.figures import Samples
from runtime import UserError

NAMES = [f"class {c}" for c in range(10)]
COUNTS = list(range(20, 10, -1))


def written(path, *args, **options):
    """The picture that figures.write writes, as an array."""
    figures.write(*args, path, **options)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def flat(labels, values):
    """Images 8 x 8 of one value each."""
    return np.tile(np.array(values, np.uint8)[:, None, None, None], (1, 8, 8, 3)), labels


@pytest.fixture
def two_columns():
    """Two columns: all ten classes four times; three of them only."""
    labels = np.arange(40) % 10
    return (Samples("A", *flat(labels, 100 + np.arange(40))),
            Samples("B", *flat(labels[:12] % 3, 200 + np.arange(12))))


def test_classes_that_all_columns_have(two_columns, tmp_path):
    """A row each, the name once, at the left; four images each."""
    both = written(tmp_path / "two.png", two_columns, NAMES, COUNTS)
    one = written(tmp_path / "one.png", two_columns[:1], NAMES, COUNTS)
    assert both.shape[0] == figures.TITLE + 3 * 60 and one.shape[0] == figures.TITLE + 10 * 60
    assert both.shape[1] == one.shape[1] + 4 * 60 - 4 + figures.BETWEEN


def test_every_pixel_is_where_it_belongs(two_columns, tmp_path):
    """Down each class its images in the order of the file, each pixel a square, none blurred."""
    picture = written(tmp_path / "p.png", two_columns[:1], NAMES, None, classes=[7, 2], across=3,
                      down=2)
    left = picture.shape[1] - 8 - (3 * 60 - 4)
    images = {7: [107, 117, 127, 137], 2: [102, 112, 122, 132]}
    for r, c in enumerate([7, 2]):
        for k in range(6):
            y, x = figures.TITLE + r * 120 + k // 3 * 60, left + k % 3 * 60
            square = picture[y:y + 56, x:x + 56]
            expected = images[c][k] if k < 4 else 255
            assert (square == expected).all()
            assert (picture[y:y + 56, x + 57:x + 59] == 255).all()      # the gap


def test_images_are_enlarged_by_a_whole_factor(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (1, 8, 8, 3), np.uint8)
    column = Samples("A", images, np.array([0]))
    picture = written(tmp_path / "p.png", [column], ["a"], None, across=1)
    left = picture.shape[1] - 8 - 56
    expected = np.kron(images[0], np.ones((7, 7, 1)))
    assert np.array_equal(picture[figures.TITLE:, left:left + 56][:56], expected)


def test_a_long_caption_is_wrapped_and_not_cut(two_columns, tmp_path):
    """Its words are in the picture: as wide as the images or 60 letters, lines below each other."""
    plain = written(tmp_path / "p.png", two_columns[:1], NAMES, None)
    settings = {**SETTINGS, "sampler": "a long name " * 18}
    long = [two_columns[0]._replace(settings=settings)]
    longer = written(tmp_path / "l.png", long, NAMES, None, with_caption=True)
    assert longer.shape[0] - plain.shape[0] == 5 * figures.LINE + 6
    below = longer[plain.shape[0]:]
    assert (below[:, :-8] < 128).any() and (below[:, -8:] > 250).all()


def test_rows_go_from_frequent_to_rare(two_columns, tmp_path):
    counts = COUNTS[::-1]
    picture = written(tmp_path / "p.png", two_columns[:1], NAMES, counts, classes=[2, 7])
    x = picture.shape[1] - 8 - 100
    assert picture[figures.TITLE + 20, x - 130, 0] == 107           # 7 has more images than 2
    assert picture[figures.TITLE + 80, x - 130, 0] == 102


SETTINGS = {"seed": 0, "sampler": "ddim", "steps": 50, "guidance": 1.5, "clip": True, "num": 9,
            "ckpt": "a", "step": 3000, "branch": "full", "weights": "ema", "command": "x"}
USUAL = "step 3,000, ddim, 50 steps, guidance 1.5, x_0 clipped"
SAME, OTHER = "; the same noise in each column", "; the columns' noise differs"


def column(name="A", labels=(0, 1), **changes):
    """A column with these settings; its images do not matter."""
    return Samples(name, None, np.array(labels), {**SETTINGS, **changes})


@pytest.mark.parametrize("other, line", [
    (column("B", ckpt="b", command="y", num=20), USUAL + SAME),
    (column("B", (0, 1, 0, 1), num=20), USUAL + SAME),      # more images, which are not shown
    (column("B", seed=1), USUAL + OTHER),
    (column("B", (1, 0)), USUAL + OTHER),
    (column("B", model="sd"), USUAL + OTHER),
    (column("B", guidance=0.0),
     f"A: {USUAL}; B: step 3,000, ddim, 50 steps, guidance 0, x_0 clipped{SAME}"),
    (column("B", step=4, eta=0.5, grid="quad", weights="raw", branch="general"),
     f"A: {USUAL}; B: step 4, ddim, 50 steps, guidance 1.5, x_0 clipped, eta 0.5, grid quad, "
     f"weights raw, branch general{SAME}"),
    (column("B", sampler="dpm", steps=15, order=2, clip=False),
     f"A: {USUAL}; B: step 3,000, dpm, 15 steps, guidance 1.5, x_0 not clipped, order 2{SAME}"),
    (column("B", sampler="consistency", steps=2, guidance=0, clip=False),
     f"A: {USUAL}; B: step 3,000, consistency, 2 steps, guidance 0{SAME}")])
def test_the_line_below_says_how_columns_were_made(other, line):
    real = Samples("training images", None, np.array([0, 1]))
    assert figures.caption_of([real, column(), other], [0, 1], 1) == line


def test_noise_without_a_seed_is_not_known_to_be_the_same():
    columns = [Samples(name, None, np.array([0]), {"ckpt": name}) for name in "AB"]
    assert figures.caption_of(columns, [0], 1) == "; it is not known whether from the same noise"


def test_one_column_has_no_noise_to_share():
    assert figures.caption_of([column()], [0], 1) == USUAL
    assert figures.caption_of([Samples("training images", None, None)], [0], 1) == ""


def test_there_is_no_room_for_images_that_are_not_there(two_columns, tmp_path):
    """Four of a class, at most: as wide and high as four."""
    four = written(tmp_path / "a.png", two_columns[:1], NAMES, COUNTS)
    wide = written(tmp_path / "b.png", two_columns[:1], NAMES, COUNTS, across=9, down=7)
    assert wide.shape == four.shape


def test_titles_do_not_overlap(two_columns, tmp_path):
    """A column is as wide as its title."""
    named = [c._replace(title="a long title of a column") for c in two_columns]
    picture = written(tmp_path / "p.png", named, NAMES, COUNTS, across=1)
    ink = (picture[:figures.TITLE - 4] < 128).any((0, 2))
    gaps = [len(gap) for gap in "".join(".#"[int(x)] for x in ink).split("#") if gap]
    assert sorted(gaps)[-2] >= figures.BETWEEN                  # the widest is at the left
    assert ink.any() and not ink[-2:].any()


@pytest.fixture(scope="module")
def sampled(cm_run, tmp_path_factory):
    """Folders of samples: both branches, and the rarest class alone."""
    folder = tmp_path_factory.mktemp("sampled")
    flags = {"full": [], "general": ["--branch", "general"], "tail": ["--classes", "rarest"],
             "high": ["--classes", "0-4"]}
    for name, more in flags.items():
        call(sample.main, "--ckpt", cm_run / "ckpt.pt", "--num", 20, "--steps", 1, *more,
             "--device", "cpu", "--out", folder / name)
    return folder


def test_real_images_and_methods(sampled, digits, data_dir, tmp_path):
    """Training images first; PNG and PDF; a folder means its samples.npz."""
    columns = ["--column", f"theta_g={sampled}/general", "--column",
               f"theta={sampled}/full/samples.npz", "--data-dir", data_dir]
    call(figures.main, *columns, "--out", tmp_path / "a.png")
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape[0] == figures.TITLE + 10 * 60 + 2 * figures.LINE + 6
    real = digits.images[digits.labels == 0][0, ..., 0]
    left = picture.shape[1] - 8 - 3 * 236 - 2 * figures.BETWEEN
    top = figures.TITLE
    assert np.array_equal(picture[top:top + 56, left:left + 56, 0], np.kron(real, np.ones((7, 7))))
    theta, labels, _ = figures.read_samples(sampled / "full/samples.npz")
    expected = np.kron(theta[labels == 0][0, ..., 0], np.ones((7, 7)))
    right = picture.shape[1] - 8 - 236
    assert np.array_equal(picture[top:top + 56, right:right + 56, 0], expected)
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_the_rarest_class(sampled, digits, tmp_path):
    """Without training images; --down rows of --across images."""
    _, labels, record = figures.read_samples(sampled / "tail/samples.npz")
    assert set(labels) == {int(np.argmin(digits.counts))}
    call(figures.main, "--column", f"CM={sampled}/tail", "--no-real", "--across", 5, "--down", 3,
         "--out", tmp_path / "tail.png")
    assert Image.open(tmp_path / "tail.png").height == figures.TITLE + 3 * 60 + figures.LINE + 6


@pytest.mark.parametrize("flags, says", [
    (["--out", "a.pdf"], ["--out a.pdf", ".png"]),
    (["--column", "nothing.npz"], ["--column nothing.npz", "NAME=FILE"]),
    (["--column", "CM=x.npz"], ["two columns are called CM"]),
    (["--column", "B=none.npz"], ["--column none.npz"]),
    (["--classes", "3"], ["--classes", "CM has no images of 3"]),
    (["--column", "B=high"], ["--column", "no class of which every column"]),
    (["--no-real", "--data-dir", "x"], ["--data-dir", "--real"])])
def test_refuses(sampled, tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.chdir(sampled)
    out = [] if "--out" in flags else ["--out", tmp_path / "p.png"]
    refuses(capsys, figures.main, "--column", "CM=tail", *flags, *out, says=says)
    assert not list(tmp_path.iterdir())


def changed(folder, out, change):
    """A copy of a folder of samples, with its record changed: what --column names."""
    out.mkdir()
    (out / "samples.npz").write_bytes((folder / "samples.npz").read_bytes())
    record = disk.read_json(folder / "samples.json")
    change(record)
    disk.write_json(out / "samples.json", record)
    return f"B={out}"


@pytest.mark.parametrize("change, says", [
    (lambda r: r["data"].update(class_counts=[1] * 10), "trained on other images"),
    (lambda r: r["data"].update(sha256="f"), "trained on other images"),
    (lambda r: r.pop("data"), "run sample.py again")])
def test_columns_of_other_data_are_refused(sampled, tmp_path, capsys, change, says):
    other = changed(sampled / "full", tmp_path / "b", change)
    refuses(capsys, figures.main, "--column", f"A={sampled}/full", "--column", other,
            "--out", tmp_path / "p.png", says=["--column B=", says])


def test_training_images_are_those_of_every_column(sampled, cm_run, data_dir, tmp_path, capsys):
    """Another draw, a checkpoint that has gone on, one that is not there: no first column."""
    call(train.main, *TINY_FLAGS, "--steps", 1, "--tail-seed", 1, "--data-dir", data_dir,
         "--out", tmp_path / "run")
    call(sample.main, "--ckpt", tmp_path / "run/ckpt.pt", "--num", 20, "--steps", 1,
         "--device", "cpu", "--out", tmp_path / "other")
    first = ["--column", f"A={sampled}/full"]
    both = [*first, "--column", f"B={tmp_path}/other", "--out", tmp_path / "p.png"]
    refuses(capsys, figures.main, *both, says=["--column B", "tail_seed 1, not 0", "--no-real"])
    call(figures.main, *both, "--no-real")
    later = changed(sampled / "full", tmp_path / "a", lambda r: r["settings"].update(
        ckpt_sha256="of an earlier step"))
    refuses(capsys, figures.main, "--column", later, "--out", tmp_path / "q.png",
            says=["--column B", "trained since"])
    gone = changed(sampled / "full", tmp_path / "c", lambda r: r["settings"].update(ckpt="no.pt"))
    refuses(capsys, figures.main, "--column", gone, "--out", tmp_path / "q.png",
            says=["--real", "no.pt", "--no-real"])
    assert not (tmp_path / "q.png").exists()


def test_other_files_are_not_replaced(sampled, tmp_path, capsys):
    (tmp_path / "p.pdf").write_bytes(b"%PDF of another program")
    refuses(capsys, figures.main, "--column", f"A={sampled}/full", "--out", tmp_path / "p.png",
            says=["--out", "p.pdf"])
    assert not (tmp_path / "p.png").exists()
    for _ in range(2):          # its own are
        call(figures.main, "--column", f"A={sampled}/full", "--no-real", "--out",
             tmp_path / "own.png")


def test_the_rarest_class_of_unknown_counts(tmp_path):
    args = SimpleNamespace(classes="rarest")
    assert sample.chosen_classes(args, {"class_names": ["a", "b"], "class_counts": [1, 5]}) == [0]
    assert sample.chosen_classes(args, {"class_names": ["a", "rarest"]}) == [1]
    with pytest.raises(UserError, match="--classes rarest.*name the class"):
        sample.chosen_classes(args, {"class_names": ["a", "b"]})
