"""The human study: what the page hides, what tally counts and refuses; one study in a browser."""
import base64
import io
import itertools
import json
import re
import shutil
import time
from collections import Counter

import numpy as np
import pytest
from conftest import call, refuses
from PIL import Image

import disk
from data import load
from pages import study
from sets.samples import read_samples

NAMES = ["cat", "dog", "frog", "ship", "tern", "yew"]       # the last two are Few
GROUPS = 6
CHROMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome")
BROWSER = next(filter(None, map(shutil.which, CHROMES)), None)
DRIVER = shutil.which("chromedriver")


def write_samples(folder, seed, names=NAMES, size=8, counts=(60, 50, 40, 30, 20, 10), each=9,
                  **settings):
    """A samples.npz with the JSON of sample.py: `each` images of noise of every class."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(names)), each)
    images = rng.integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8)
    disk.write_npz(folder / "samples.npz", arr_0=images, arr_1=labels)
    data = {"class_names": names, "class_counts": list(counts), "resolution": size}
    disk.write_json(folder / "samples.json", {
        "settings": {"seed": seed, **settings}, "data": data,
        "npz_sha256": disk.sha256(folder / "samples.npz")})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with samples a and b, and real images of another size, one folder per class."""
    root = tmp_path_factory.mktemp("study-inputs")
    write_samples(root / "a", 0, guidance=0.0, config={"lr": 1e-3})
    write_samples(root / "b", 1, guidance=1.5, config={"lr": 2e-3})
    rng = np.random.default_rng(2)
    for name in NAMES:
        (root / "real" / name).mkdir(parents=True)
        for i in range(14):
            pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "real" / name / f"{i}.png")
    return root


def make(inputs, out, *more):
    """Make a small study; its folder."""
    call(study.main, "make", "--a", f"DDPM={inputs / 'a'}", "--b", f"CM={inputs}/b/samples.npz",
         "--real", inputs / "real", "--pack-dir", inputs / "packed", "--groups", GROUPS, "--catch",
         3, "--out", out, *more)
    return out


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    """The folder of a small study."""
    return make(inputs, tmp_path_factory.mktemp("study") / "study")


def data_of(folder):
    """What the page's script reads."""
    text = (folder / "study.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def pixels_of(uri):
    """The image of a data URI, after a look at the PNG: pixels only, no metadata."""
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG" and not image.info
    assert not re.findall(rb"tEXt|iTXt|zTXt|eXIf|tIME|pHYs", content)
    return np.asarray(image)


def test_the_key_says_what_is_which(made, inputs):
    """Every image of the page is the one that the key names; real ones resized as for training."""
    key, data = disk.read_json(made / "key.json"), data_of(made)
    found = {which: read_samples(inputs / which / "samples.npz")[:2] for which in "ab"}
    real = load("folder", inputs / "real", resolution=8, pack_dir=inputs / "packed")
    found["real"] = real.images, real.labels
    assert data["id"] == key["study"] and data["size"] == 8
    assert [q["id"] for q in data["questions"]] == list(key["questions"])
    for q in data["questions"]:
        said = key["questions"][q["id"]]
        shown = [(said[side], said["rows"][side], q[side]) for side in study.SIDES]
        shown += [("real", row, uri) for row, uri in zip(said["rows"]["real"], q["real"])]
        assert len(set(q["real"])) == 10 and q["class"] == said["class"]
        for which, row, uri in shown:
            images, labels = found[which]
            np.testing.assert_array_equal(pixels_of(uri), images[row])
            assert NAMES[labels[row]] == q["class"]


def test_what_is_compared(made):
    """Classes of Few in turn, sides in balance, no image to choose twice, catch trials of both."""
    questions = list(disk.read_json(made / "key.json")["questions"].values())
    pairs = [frozenset((q["left"], q["right"])) for q in questions]
    assert Counter(pairs)[frozenset("ab")] == GROUPS and len(pairs) == GROUPS + 3
    assert {frozenset(("a", "real")), frozenset(("b", "real"))} < set(pairs)
    assert Counter(q["class"] for q in questions) == {"tern": 5, "yew": 4}
    compared = [q for q, pair in zip(questions, pairs) if pair == frozenset("ab")]
    assert sum(q["left"] == "a" for q in compared) == GROUPS // 2
    chosen = [(q[side], q["rows"][side]) for q in questions for side in study.SIDES]
    assert len(set(chosen)) == len(chosen)


def test_the_page_does_not_say_what_is_which(made, inputs):
    data = data_of(made)
    text = re.sub("data:image/png;base64,[^\"]*", "", (made / "study.html").read_text())
    hashes = re.findall("[0-9a-f]{64}", (made / "key.json").read_text())
    for secret in ("DDPM", "CM", "samples", str(inputs), *hashes, "http"):
        assert secret not in text
    assert all(set(q) == {"id", "class", "real", "left", "right"} for q in data["questions"])
    shown = {uri for q in data["questions"] for uri in q["real"]}
    assert not {q[side] for q in data["questions"] for side in study.SIDES} & shown


def test_the_order_is_of_the_seed_and_says_nothing(inputs, made, tmp_path):
    """The same flags give the same study; the sides and places follow nothing that the page has."""
    make(inputs, tmp_path / "same")
    assert (tmp_path / "same/study.html").read_bytes() == (made / "study.html").read_bytes()
    places, sides = [], []
    for seed in range(40):
        folder = make(inputs, tmp_path / str(seed), "--catch", 1, "--num-real", 1, "--groups", 4,
                      "--seed", seed)
        asked = list(disk.read_json(folder / "key.json")["questions"].values())
        k = next(i for i, q in enumerate(asked) if "real" in (q["left"], q["right"]))
        places.append(k)
        sides.append(asked[k]["left"] == "real")
    assert set(places) == set(range(5)) and 10 <= sum(sides) <= 30


@pytest.mark.parametrize("flags, says", [
    (["--a", "A=missing"], "--a"), (["--a", "a"], "--a"), (["--b", "CM=large"], "--b"),
    (["--b", "CM=fewer"], "--b"), (["--real", "nowhere"], "nowhere"),
    (["--num-real", 14], "--real"),
    (["--groups", 40], "--a"), (["--classes", "cow"], "--classes"), (["--out", "taken"], "--out")])
def test_make_refuses(flags, says, inputs, tmp_path, monkeypatch, capsys):
    for name in ("a", "b", "real"):
        (tmp_path / name).symlink_to(inputs / name)
    write_samples(tmp_path / "large", 1, size=16)
    write_samples(tmp_path / "fewer", 1, counts=(60, 50, 40, 30, 20, 9))
    disk.write_json(tmp_path / "taken" / "key.json", {"study": "0123"})
    monkeypatch.chdir(tmp_path)
    refuses(capsys, study.main, "make", "--a", "DDPM=a", "--b", "CM=b", "--real", "real",
            "--groups", GROUPS, *flags, says=[says])
    assert not (tmp_path / "out").exists()
    assert disk.read_json(tmp_path / "taken" / "key.json") == {"study": "0123"}


def test_an_interval_over_evaluators():
    """Wider where evaluators differ; none of one."""
    alike = study.interval_over([15] * 8, [20] * 8)
    apart = study.interval_over([20, 10] * 4, [20] * 8)
    assert alike == (0.75, 0.75) and apart[0] < 0.65 and apart[1] > 0.85
    assert study.interval_over([3], [4]) is None


def test_agreement_is_fleiss_kappa():
    """Against pairs of evaluators, one by one."""
    rng = np.random.default_rng(0)
    chosen = [{q: "ab"[int(rng.random() < 0.3 + 0.5 * (q % 2))] for q in range(30)}
              for _ in range(5)]
    P = np.mean([chosen[i][q] == chosen[k][q] for q in range(30)
                 for i, k in itertools.combinations(range(5), 2)])
    every = [which for mine in chosen for which in mine.values()]
    P_e = sum((count / len(every)) ** 2 for count in Counter(every).values())
    expected = {"pairs": P, "fleiss_kappa": (P - P_e) / (1 - P_e)}
    assert study.agreement(chosen) == pytest.approx(expected)
    assert study.agreement(chosen[:1]) is None
    alike = study.agreement([{0: "b", 1: "b"}] * 2)
    assert alike == {"pairs": 1.0, "fleiss_kappa": None}


def answers_of(key, who, choose, name=""):
    """Whole answers: choose(question) -> "left" or "right"."""
    each = [{"question": q, "side": choose(said), "seconds": 1.5 + i, "at": "2026-01-01"}
            for i, (q, said) in enumerate(key["questions"].items())]
    return {"kind": "study answers", "study": key["study"],
            "evaluator": {"id": f"{who:016x}", "name": name}, "answers": each[::-1]}


def side_of(which):
    """A choose() that takes the real image, else that of model `which`, else the left one."""
    def choose(said):
        wanted = {said[side]: side for side in study.SIDES}
        return wanted.get("real") or wanted.get(which, "left")
    return choose


def careless(said):
    """A choose() that never takes a real image, and always the left one of the others."""
    return "right" if said["left"] == "real" else "left"


@pytest.fixture
def tallied(made, tmp_path):
    """(a copy of the study with the answers of three people, its key)."""
    folder = tmp_path / "study"
    shutil.copytree(made, folder)
    key = disk.read_json(folder / "key.json")
    choices = {"Ana": side_of("b"), "Bo | <i>": side_of("a"), "Cy": careless}
    for k, (name, choose) in enumerate(choices.items()):
        disk.write_json(folder / "answers" / f"{k}.json", answers_of(key, k, choose, name))
    return folder, key


def tally_of(folder, *more):
    """What tally writes for the answers in a study's folder."""
    call(study.main, "tally", *sorted((folder / "answers").glob("*.json")), "--key",
         folder / "key.json", *more)
    return disk.read_json(folder / "tally.json"), (folder / "tally.md").read_text()


def test_a_whole_tally(tallied):
    folder, key = tallied
    result, text = tally_of(folder)
    ana, bo, cy = result["evaluators"]
    assert (ana["a"], ana["b"], ana["passed"]) == (0, GROUPS, 3)
    assert (bo["a"], bo["b"], bo["passed"]) == (GROUPS, 0, 3)
    # Each stands at the left in half of the questions: who always takes the left one chooses both
    assert (cy["a"], cy["b"], cy["passed"]) == (GROUPS // 2, GROUPS // 2, 0)
    assert [e["careful"] for e in (ana, bo, cy)] == [True, True, False]
    assert [e["left"] for e in (ana, bo, cy)] == [GROUPS // 2, GROUPS // 2, GROUPS]
    assert (result["all"]["b"], result["all"]["trials"]) == (9, 18)
    assert (result["careful"]["b"], result["careful"]["trials"]) == (6, 12)
    assert result["left"]["share"] == pytest.approx(12 / 18) and ana["seconds"] == 1.5 + 4
    assert "| CM | 6 | 0 | 3 |  |  |  |  |  | 9 |" in text.splitlines()
    assert "| the paper's DDPM | 10 | 10 | 4 | 4 | 6 | 3 | 14 | 12 | 63 |" in text.splitlines()
    assert "70.56 % (64.0 to 76.6)" in text and "Bo \\| &lt;i&gt;" in text
    assert result["differ"] == {"lr": [0.001, 0.002], "guidance": [0.0, 1.5]}
    everyone, _ = tally_of(folder, "--min-catch", 0)
    assert everyone["careful"] == everyone["all"]

    for path in (folder / "answers").iterdir():
        path.unlink()
    disk.write_json(folder / "answers" / "0.json", answers_of(key, 7, careless))
    result, _ = tally_of(folder)
    assert result["careful"] is None and result["agreement"] is None


def test_tally_refuses(tallied, capsys):
    """Answers of another study, not whole, of another program, of one evaluator twice."""
    folder, key = tallied
    good = answers_of(key, 9, side_of("b"))
    for wrong in ({**good, "study": "0" * 16}, {**good, "answers": good["answers"][:4]}, [1],
                  answers_of(key, 0, side_of("a"))):
        disk.write_json(folder / "answers/9.json", wrong)
        files = sorted((folder / "answers").glob("*.json"))
        refuses(capsys, study.main, "tally", *files, "--key", folder / "key.json", says=["9.json"])
    refuses(capsys, study.main, "tally", files[0], "--key", files[0], says=["--key"])
    refuses(capsys, study.main, "count", says=["count"])
    assert not (folder / "tally.md").exists()


# The page in a browser: `apt-get install chromium chromium-driver`
@pytest.mark.slow
@pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium or no chromedriver on the path")
def test_a_whole_study_in_a_browser(made, tmp_path):
    """By clicks and keys, with a way back and a reload half-way; saved, and tallied."""
    from selenium import webdriver
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                 "--window-size=1000,900", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(word)
    downloads = tmp_path / "downloads"
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    key, data = disk.read_json(made / "key.json"), data_of(made)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def part(name):
        return driver.find_element("id", name)

    def click(name):
        time.sleep(0.27)                # a choice that comes at once is none
        part(name).click()
    try:
        driver.get((made / "study.html").as_uri())
        part("name").send_keys("Ana")
        driver.find_element("css selector", "#begin button").click()
        chosen = {}
        for i in range(GROUPS + 3):
            assert int(part("count").text.split()[0]) == i + 1
            source = part("left").find_element("tag name", "img").get_attribute("src")
            question = next(q for q in data["questions"] if q["left"] == source)
            assert len(driver.find_elements("css selector", "#real img")) == 10
            side = chosen[question["id"]] = side_of("b")(key["questions"][question["id"]])
            if i % 2:
                time.sleep(0.27)
                key_of = {"left": Keys.ARROW_LEFT, "right": Keys.ARROW_RIGHT}
                ActionChains(driver).send_keys(key_of[side]).perform()
            else:
                click(side)
            if i == 2:                  # back, another choice, back again, and put right
                for step in ("back", study.SIDES[side == "left"], "back", side):
                    click(step)
            if i == 4:
                driver.refresh()
        part("save").click()
        end = time.time() + 10
        while not list(downloads.glob("*.json")) and time.time() < end:
            time.sleep(0.05)
        part("another").click()         # another id, and the questions in another order
        orders = driver.execute_script("return [state.id, state.order]")
        assert not [e for e in driver.get_log("browser") if e["level"] == "SEVERE"]
    finally:
        driver.quit()
    file, = downloads.glob("*.json")
    answers = disk.read_json(file)
    assert {a["question"]: a["side"] for a in answers["answers"]} == chosen
    assert orders[0] != answers["evaluator"]["id"]
    assert orders[1] != [a["question"] for a in answers["answers"]]
    assert all(0.25 <= a["seconds"] < 30 for a in answers["answers"])
    call(study.main, "tally", file, "--key", made / "key.json", "--out", tmp_path / "tally")
    ana, = disk.read_json(tmp_path / "tally" / "tally.json")["evaluators"]
    assert (ana["a"], ana["b"], ana["passed"], ana["name"]) == (0, GROUPS, 3, "Ana")
