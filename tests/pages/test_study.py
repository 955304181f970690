"""The human study: what the page hides, what serve keeps, what tally counts and refuses."""
import base64
import http.client
import io
import itertools
import json
import re
import shutil
import threading
from collections import Counter

import numpy as np
import pytest
from conftest import call, refuses
from PIL import Image
from scipy.stats import beta, bootstrap

import disk
from pages import page, study
from runtime import UserError

NAMES = ["cat", "dog", "frog", "ship", "tern", "yew"]       # the last two are Few
GROUPS = 6


def write_samples(folder, seed, names=NAMES, size=8, counts=(60, 50, 40, 30, 20, 10), each=9):
    """A samples.npz with the JSON of sample.py: `each` images of noise of every class."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(names)), each)
    images = rng.integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8)
    disk.write_npz(folder / "samples.npz", arr_0=images, arr_1=labels)
    data = {"class_names": names, "class_counts": list(counts), "resolution": size}
    disk.write_json(folder / "samples.json", {
        "settings": {"seed": seed}, "data": data,
        "npz_sha256": disk.sha256(folder / "samples.npz")})
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with samples a and b, and real images of another size, one folder per class."""
    root = tmp_path_factory.mktemp("study-inputs")
    write_samples(root / "a", 0)
    write_samples(root / "b", 1)
    rng = np.random.default_rng(2)
    for name in NAMES:
        (root / "real" / name).mkdir(parents=True)
        for i in range(14):
            pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "real" / name / f"{i}.png")
    return root


def flags(inputs, out):
    """The flags of a small study."""
    return ["--a", f"DDPM={inputs / 'a'}", "--b", f"CM={inputs / 'b' / 'samples.npz'}",
            "--real", inputs / "real", "--groups", GROUPS, "--catch", 3, "--out", out]


def make(*argv):
    """study.py make, with these flags."""
    study.main_make([str(word) for word in argv])


@pytest.fixture(scope="session")
def made(inputs, tmp_path_factory):
    """The folder of a small study."""
    out = tmp_path_factory.mktemp("study") / "study"
    make(*flags(inputs, out))
    return out


def data_of(folder):
    """What the page's script reads."""
    text = (folder / "study.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def pixels_of(uri):
    """The image of a data URI, after a look at the PNG: pixels only, no metadata."""
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG" and not image.info
    assert set(re.findall(rb"(IHDR|IDAT|IEND|tEXt|iTXt|zTXt|eXIf|tIME|pHYs)", content)) == {
        b"IHDR", b"IDAT", b"IEND"}
    return np.asarray(image)


# --------------------------------------------------------------------------------------------------
# make

def test_the_key_says_what_is_which(made, inputs):
    """Every image of the page is the one that the key names; real ones resized as for training."""
    key = disk.read_json(made / "key.json")
    data = data_of(made)
    images = {which: np.load(inputs / which / "samples.npz") for which in "ab"}
    files = [p for name in NAMES for p in sorted((inputs / "real" / name).iterdir())]
    assert data["id"] == key["study"] and data["size"] == 8
    assert [q["id"] for q in data["questions"]] == list(key["questions"])

    def real(row):
        image = Image.open(files[row]).resize((10, 8), Image.LANCZOS, reducing_gap=3.0)
        return np.asarray(image.crop((1, 0, 9, 8)))
    for q in data["questions"]:
        said = key["questions"][q["id"]]
        assert q["class"] == said["class"]
        for side in study.SIDES:
            row = said["rows"][side]
            which = said[side]
            expected = real(row) if which == "real" else images[which]["arr_0"][row]
            np.testing.assert_array_equal(pixels_of(q[side]), expected)
            if which != "real":
                assert NAMES[images[which]["arr_1"][row]] == q["class"]
        assert len(q["real"]) == 10 == len(set(q["real"]))
        for uri, row in zip(q["real"], said["rows"]["real"]):
            np.testing.assert_array_equal(pixels_of(uri), real(row))
            assert files[row].parent.name == q["class"]


def test_what_is_compared(made):
    """Classes of Few in turn, sides in balance, no image to choose twice, catch trials of both."""
    key = disk.read_json(made / "key.json")
    questions = list(key["questions"].values())
    pairs = [frozenset((q["left"], q["right"])) for q in questions]
    assert Counter(pairs)[frozenset("ab")] == GROUPS and len(pairs) == GROUPS + 3
    assert {frozenset(("a", "real")), frozenset(("b", "real"))} < set(pairs)
    assert Counter(q["class"] for q in questions) == {"tern": 5, "yew": 4}
    compared = [q for q, pair in zip(questions, pairs) if pair == frozenset("ab")]
    assert sum(q["left"] == "a" for q in compared) == GROUPS // 2
    chosen = [(q[side], q["rows"][side]) for q in questions for side in study.SIDES]
    assert len(set(chosen)) == len(chosen)


def test_the_page_does_not_say_what_is_which(made, inputs):
    text = (made / "study.html").read_text()
    data = data_of(made)
    without = re.sub("data:image/png;base64,[^\"]*", "", text)
    key = (made / "key.json").read_text()
    for secret in ("DDPM", "CM", "samples", str(inputs), *re.findall("[0-9a-f]{64}", key)):
        assert secret not in without
    assert all(set(q) == {"id", "class", "real", "left", "right"} for q in data["questions"])
    shown = [uri for q in data["questions"] for uri in q["real"]]
    assert not {q[side] for q in data["questions"] for side in study.SIDES} & set(shown)
    assert "http" not in without.replace("location.protocol.startsWith(\"http\")", "").replace(
        'http-equiv="Content-Security-Policy"', "")


def test_the_order_is_of_the_seed_and_says_nothing(inputs, made, tmp_path):
    """The same flags give the same study; the sides and ids follow nothing that the page has."""
    make(*flags(inputs, tmp_path / "same"))
    for name in ("study.html",):
        assert (tmp_path / "same" / name).read_bytes() == (made / name).read_bytes()
    make(*flags(inputs, tmp_path / "other"), "--seed", 1)
    same, other = (disk.read_json(folder / "key.json") for folder in (made, tmp_path / "other"))
    assert same["study"] != other["study"]
    # Over many seeds: where a catch trial stands, and on which side the real image, is even
    places, sides = [], []
    for seed in range(40):
        folder = tmp_path / "many" / str(seed)
        make(*flags(inputs, folder), "--catch", 1, "--num-real", 1, "--groups", 4, "--seed", seed)
        asked = list(disk.read_json(folder / "key.json")["questions"].values())
        k = next(i for i, q in enumerate(asked) if "real" in (q["left"], q["right"]))
        places.append(k)
        sides.append(asked[k]["left"] == "real")
    assert set(places) == set(range(5)) and 10 <= sum(sides) <= 30


def test_models_with_classes_in_another_order(inputs, tmp_path):
    """Labels of b are renumbered by name."""
    write_samples(tmp_path / "b", 1, NAMES[::-1], counts=(10, 20, 30, 40, 50, 60))
    words = [f if f != f"CM={inputs / 'b' / 'samples.npz'}" else f"CM={tmp_path / 'b'}"
             for f in map(str, flags(inputs, tmp_path / "out"))]
    make(*words)
    labels = np.load(tmp_path / "b" / "samples.npz")["arr_1"]
    for q in disk.read_json(tmp_path / "out" / "key.json")["questions"].values():
        for side in study.SIDES:
            if q[side] == "b":
                assert NAMES[::-1][labels[q["rows"][side]]] == q["class"]


def test_real_images_of_a_data_set(data_dir, tmp_path):
    """--real digits: labels by name, grey images as RGB."""
    names = [str(c) for c in range(10)]
    counts = range(100, 0, -10)
    for k, which in enumerate("ab"):
        write_samples(tmp_path / which, k, names, counts=counts)
    make("--a", tmp_path / "a", "--b", tmp_path / "b", "--real", "digits", "--data-dir", data_dir,
         "--groups", 4, "--catch", 2, "--out", tmp_path / "out")
    data = data_of(tmp_path / "out")
    assert {q["class"] for q in data["questions"]} == set("6789")
    grey = pixels_of(data["questions"][0]["real"][0])
    assert grey.shape == (8, 8, 3) and (grey == grey[:, :, :1]).all()
    key = disk.read_json(tmp_path / "out" / "key.json")
    assert (key["a"]["name"], key["b"]["name"]) == ("a", "b")


MAKE = {        # changed flags -> what the line must say
    "no samples": (["--a", "missing"], ["--a", "missing"]),
    "the same images": (["--b", "CM=a"], ["--b", "the very images of --a"]),
    "the same name": (["--b", "DDPM=b"], ["--b", "both are called DDPM"]),
    "other sizes": (["--b", "CM=large"], ["--b", "16 x 16", "8 x 8"]),
    "other classes": (["--b", "CM=others"], ["--b", "class"]),
    "other training images": (["--b", "CM=fewer"], ["--b", "images per class"]),
    "no real images": (["--real", "nowhere"], ["--real nowhere", "folder"]),
    "real images without classes": (["--real", "real/cat"], ["--real real/cat", "sub-folder"]),
    "too few real ones": (["--num-real", 14], ["--real real", "14 images", "class"]),
    "too many groups": (["--groups", 40], ["--a DDPM=a", "9 images", "--groups"]),
    "unknown class": (["--classes", "cow"], ["--classes cow"]),
    "data dir of a folder": (["--data-dir", "data"], ["--data-dir", "leave it out"]),
    "another study there": (["--out", "taken"], ["--out taken", "another study"]),
}


@pytest.mark.parametrize("case", MAKE)
def test_make_refuses(case, inputs, tmp_path, monkeypatch, capsys):
    changed, says = MAKE[case]
    for name in ("a", "b", "real"):
        shutil.copytree(inputs / name, tmp_path / name)
    write_samples(tmp_path / "large", 1, size=16)
    write_samples(tmp_path / "fewer", 1, counts=(60, 50, 40, 30, 20, 9))
    write_samples(tmp_path / "others", 1, ["cat", "dog", "frog", "ship", "tern", "oak"])
    disk.write_json(tmp_path / "taken" / "key.json", {"study": "0123"})
    monkeypatch.chdir(tmp_path)
    refuses(capsys, study.main, "make", "--a", "DDPM=a", "--b", "CM=b", "--real", "real",
            "--groups", GROUPS, *changed, says=says)
    assert not (tmp_path / "out").exists()
    assert disk.read_json(tmp_path / "taken" / "key.json") == {"study": "0123"}


# --------------------------------------------------------------------------------------------------
# Answers as the page writes them

def answers_of(key, who, choose, name=""):
    """Whole answers: choose(question's number, question) -> "left" or "right"."""
    each = [{"question": q, "side": choose(i, said), "seconds": 1.5 + i, "at": "2026-01-01"}
            for i, (q, said) in enumerate(key["questions"].items())]
    return {"format": disk.FORMAT, "kind": "study answers", "study": key["study"],
            "evaluator": {"id": f"{who:016x}", "name": name}, "begun": "", "ended": "",
            "answers": each[::-1]}


def side_of(which):
    """A choose() that takes the real image, else that of model `which`, else the left one."""
    def choose(_, said):
        wanted = {said[side]: side for side in study.SIDES}
        return wanted.get("real") or wanted.get(which, "left")
    return choose


def careless(_, said):
    """A choose() that never takes a real image, and always the left one of the others."""
    return "right" if said["left"] == "real" else "left"


# --------------------------------------------------------------------------------------------------
# serve

@pytest.fixture
def server(made, tmp_path):
    """A server of a copy of the study on a free port of this machine, in a thread."""
    shutil.copytree(made, tmp_path / "study")
    served = study.make_server(tmp_path / "study", "127.0.0.1", 0)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def ask(server, method, path, body=None, **headers):
    """(status, content) of a request."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, reply.read()


def post(server, answers, kind="application/json"):
    """The status of posted answers."""
    return ask(server, "POST", "/answers", json.dumps(answers), Content_Type=kind)[0]


def test_serve_gives_the_page_and_nothing_else(server, made):
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "GET", "/") == (200, (made / "study.html").read_bytes())
    for path in ("/key.json", "/../key.json", "/answers/", "//key.json", "/%2e%2e/key.json"):
        status, content = ask(server, "GET", path)
        assert status == 404 and b"left" not in content


def test_serve_keeps_whole_answers_once(server, capsys):
    mine = answers_of(server.key, 1, side_of("b"), "Ana\x1b[31m")
    assert post(server, mine) == 200
    assert disk.read_json(server.folder / f"{1:016x}.json") == mine
    assert "Ana [31m" in capsys.readouterr().out            # nothing that moves a terminal's cursor
    assert post(server, mine) == 200            # sent again, as after a lost reply
    changed = answers_of(server.key, 1, side_of("a"), "Ana")
    assert post(server, changed) == 409
    assert disk.read_json(server.folder / f"{1:016x}.json") == mine


def test_serve_refuses_what_is_not_whole(server):
    good = answers_of(server.key, 1, side_of("b"))
    half = {**good, "answers": good["answers"][:4]}
    other = {**good, "study": "0" * 16}
    path = {**good, "evaluator": {"id": "../../../../tmp", "name": ""}}
    for bad in (half, other, path, [], {"a": 1}):
        assert post(server, bad) == 400
    assert ask(server, "POST", "/answers", "{", Content_Type="application/json")[0] == 400
    assert ask(server, "POST", "/answers", "[" * 100_000,
               Content_Type="application/json")[0] == 400
    assert post(server, good, "text/plain") == 404      # what a form of another site can send
    assert ask(server, "POST", "/", "{}", Content_Type="application/json")[0] == 404
    assert ask(server, "POST", "/answers", "", Content_Type="application/json",
               Content_Length=str(study.LONGEST_POST + 1))[0] == 413
    assert not server.folder.exists()


def test_serve_refuses_a_study_that_is_not_whole(made, tmp_path, capsys, server):
    refuses(capsys, study.main, "serve", "--study", tmp_path, says=["--study", "no such file"])
    port = server.server_address[1]
    refuses(capsys, study.main, "serve", "--study", made, "--port", port, says=[f"--port {port}"])
    with open(tmp_path / "study" / "study.html", "a") as f:
        f.write(" ")
    refuses(capsys, study.main, "serve", "--study", tmp_path / "study",
            says=["--study", "not that of key.json"])


# --------------------------------------------------------------------------------------------------
# tally: the numbers, against slow versions

def test_exact_interval_is_clopper_and_pearsons():
    """Quantiles of two beta distributions."""
    for k, n in ((151, 214), (3, 7), (0, 9), (9, 9)):
        low = beta.ppf(0.025, k, n - k + 1) if k else 0
        high = beta.ppf(0.975, k + 1, n - k) if k < n else 1
        np.testing.assert_allclose(study.exact_interval(k, n), (low, high), atol=1e-9)


def test_the_papers_study():
    """63 against 151: 70.56 %, and what its evaluators' counts say of the interval."""
    ddpm, cm = study.paper_study().values()
    assert (sum(ddpm), sum(cm)) == (63, 151)
    totals = [a + b for a, b in zip(ddpm, cm)]
    share = study.share_of(cm, totals)
    assert f"{share['share']:.4f}" == "0.7056" and share["evaluators"] == 8
    theirs = bootstrap((np.array(cm), np.array(totals)), lambda b, n, axis: b.sum(axis)
                       / n.sum(axis), paired=True, vectorized=True, method="percentile",
                       rng=np.random.default_rng(0)).confidence_interval
    np.testing.assert_allclose(share["over_evaluators"], theirs, atol=0.005)


def test_an_interval_over_evaluators_is_wider_where_they_differ():
    alike = study.interval_over([15] * 8, [20] * 8)
    apart = study.interval_over([20, 10] * 4, [20] * 8)
    assert alike == (0.75, 0.75) and apart[0] < 0.65 and apart[1] > 0.85
    assert study.interval_over([3], [4]) is None


def slow_agreement(chosen):
    """Fleiss' kappa from pairs of evaluators, one by one; chosen: a dict for each."""
    n = len(chosen)
    same = [chosen[i][q] == chosen[k][q] for q in chosen[0]
            for i, k in itertools.combinations(range(n), 2)]
    every = [which for mine in chosen for which in mine.values()]
    P_e = sum((count / len(every)) ** 2 for count in Counter(every).values())
    P = np.mean(same)
    return P, (P - P_e) / (1 - P_e)


def test_agreement_is_fleiss_kappa():
    rng = np.random.default_rng(0)
    chosen = [{q: "ab"[int(rng.random() < 0.3 + 0.5 * (q % 2))] for q in range(30)}
              for _ in range(5)]
    evaluators = [study.Evaluator("", mine, 0, 0, 0, 0.0) for mine in chosen]
    np.testing.assert_allclose(study.agreement(evaluators), slow_agreement(chosen))
    assert study.agreement(evaluators[:1]) is None
    one = [study.Evaluator("", {0: "b", 1: "b"}, 0, 0, 0, 0.0)] * 2
    assert study.agreement(one) == (1.0, None)


# --------------------------------------------------------------------------------------------------
# tally: files

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


def tally_of(folder, *argv):
    """What tally writes for the answers in a study's folder."""
    study.main_tally([*map(str, sorted((folder / "answers").glob("*.json"))), *map(str, argv)])
    return disk.read_json(folder / "tally.json"), (folder / "tally.md").read_text()


def test_a_whole_tally(tallied, capsys):
    folder, _ = tallied
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
    assert result["left"]["share"] == pytest.approx(12 / 18)
    assert result["left"]["exact"] == pytest.approx(study.exact_interval(12, 18))
    assert ana["seconds"] == 1.5 + 4
    lines = text.splitlines()
    assert "| DDPM | 0 | 6 | 3 |  |  |  |  |  | 9 |" in lines
    assert "| CM | 6 | 0 | 3 |  |  |  |  |  | 9 |" in lines
    assert "| the paper's DDPM | 10 | 10 | 4 | 4 | 6 | 3 | 14 | 12 | 63 |" in lines
    assert "70.56 % (64.0 to 76.6)" in text and "Bo \\| &lt;i&gt;" in text
    assert "0 of 3, **careless**" in text and capsys.readouterr().out.startswith("# Human study")


def test_the_threshold_of_catch_trials_and_the_seed(tallied):
    folder, _ = tallied
    everyone, _ = tally_of(folder, "--min-catch", 0)
    assert everyone["careful"] == everyone["all"]
    again, _ = tally_of(folder, "--min-catch", 0, "--seed", 1)
    assert again["all"]["exact"] == everyone["all"]["exact"]
    assert again["seed"] == 1


def test_without_careful_evaluators_nothing_is_counted_twice(tallied):
    folder, key = tallied
    for path in (folder / "answers").iterdir():
        path.unlink()
    disk.write_json(folder / "answers" / "0.json", answers_of(key, 7, careless))
    result, text = tally_of(folder)
    assert result["careful"] is None and result["agreement"] is None
    assert f"Eval. 1: {7:016x}"[:15] in text and "it needs two evaluators" in text


def test_all_json_files_of_the_study_may_be_named(tallied):
    """`tally study/*.json` finds the key among them, and leaves its own result out."""
    folder, _ = tallied
    for path in list((folder / "answers").iterdir()):
        path.rename(folder / path.name)
    for _ in range(2):
        study.main_tally([str(path) for path in sorted(folder.glob("*.json"))])
    assert disk.read_json(folder / "tally.json")["all"]["trials"] == 18


def broken_answers(key):
    """{what is wrong: (the text of a file, words of the refusal)}."""
    good = answers_of(key, 9, side_of("b"), "Di")
    each = good["answers"]
    strange = [{**each[0], "question": "feed"}, *each[1:]]
    upwards = [{**each[0], "side": "up"}, *each[1:]]
    values = {
        "another study": ({**good, "study": "0" * 16}, ["study 0000"]),
        "half": ({**good, "answers": each[:4]}, ["not finished", f"4 of {GROUPS + 3}"]),
        "a double answer": ({**good, "answers": [*each, each[0]]}, ["answered twice"]),
        "another question": ({**good, "answers": strange}, ["does not have"]),
        "another side": ({**good, "answers": upwards}, ["not whole answers"]),
        "without an evaluator": ({**good, "evaluator": {}}, ["not whole answers"]),
        "the same evaluator": (answers_of(key, 0, side_of("a")), ["same evaluator as"]),
        "the same name": (answers_of(key, 9, side_of("a"), " ana "), ["of ana, as is", "0.json"]),
        "another program's": ({"answers": 3}, ["not whole answers"]),
    }
    found = {what: (json.dumps(value), says) for what, (value, says) in values.items()}
    text = json.dumps(good)
    for cut in (10, len(text) // 2, len(text) - 1):
        found[f"cut at {cut}"] = text[:cut], ["not whole answers"]
    return found


def test_tally_refuses(tallied, capsys):
    folder, key = tallied
    for what, (text, says) in broken_answers(key).items():
        (folder / "answers" / "9.json").write_text(text)
        files = sorted((folder / "answers").glob("*.json"))
        refuses(capsys, study.main, "tally", *files, says=["tally ", "9.json", *says])
        assert not (folder / "tally.md").exists(), what


def test_tally_refuses_missing_files_and_keys(tallied, capsys, tmp_path):
    folder, _ = tallied
    refuses(capsys, study.main, "tally", "none.json", "--key", folder / "key.json",
            says=["none.json", "no such file"])
    refuses(capsys, study.main, "tally", folder / "key.json", says=["no answers"])
    shutil.copy(folder / "answers" / "0.json", tmp_path / "0.json")
    lonely = tmp_path / "x" / "y"
    lonely.mkdir(parents=True)
    shutil.copy(folder / "answers" / "0.json", lonely)
    refuses(capsys, study.main, "tally", lonely / "0.json", says=["--key", "key.json"])
    refuses(capsys, study.main, "tally", lonely / "0.json", "--key", folder / "answers" / "1.json",
            says=["--key", "not a whole key.json"])


def test_the_first_word(capsys):
    call(study.main)
    text = capsys.readouterr().out
    assert "--num-real" in text and "--port" in text and "--min-catch" in text
    refuses(capsys, study.main, "count", says=["study.py count", "make, serve, tally"])


# --------------------------------------------------------------------------------------------------

def test_a_page_escapes_and_allows_only_itself():
    text = page.html("a < b", "<p>x</p>", "p { color: red }", "let x = 1;", {"n": "</script><b>"})
    assert "<title>a &lt; b</title>" in text and "</script><b>" not in text
    assert json.loads(re.search('id="data">(.*?)</script>', text)[1]) == {"n": "</script><b>"}
    policy = re.search('Policy" content="(.*?)"', text)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        inside = re.search(f"<{tag}>(.*?)</{tag}>", text, re.S)[1]
        assert f"{tag}-src {page.allowed(inside)}" in policy


def test_user_errors_name_a_pool(inputs):
    pool = study.Pool([1, 2, 3], "--a x: too few", np.random.default_rng(0))
    assert sorted(pool.take(2) + pool.take(1)) == [1, 2, 3]
    with pytest.raises(UserError, match="--a x: too few"):
        pool.take(1)
