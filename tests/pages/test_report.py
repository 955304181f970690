"""report.py's pages, the paper's numbers, and whole tables of run_all.sh at demo scale."""
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, call, refuses
from PIL import Image
from scipy import stats

import disk
import evaluate
import sample
from pages import report

CONTENT = disk.read_json(ROOT / "pages/paper_results.json")
PAPER = CONTENT["tables"]


@pytest.mark.parametrize("table, setting, row, column, number", [
    ("table1", "cifar100-ir100", "CBDM (LoRA)", "fid", 11.424),
    ("table2", "cifar10-ir50", "+ADA", "is", [9.28, 0.21]),
    ("table3", "cifar100-ir100", "CM", "Few fid", [18.729, 0.141]),
    ("table4", "celebahq-ir100", "OC", "Male fid", [13.962, 0.221]),
    ("table5", "inat2018-64", "CM", "kid", 0.0020),
    ("table7-left", "cifar100-ir100", "CM (theta_g)", "Few fid", [29.357, 0.318]),
    ("table7-right", "cifar100-ir100", "CM w/o L_Con", "recall", [0.50, 0.01]),
    ("tableG10", "cifar100-ir100", "CM", "fid", 8.033),
])
def test_cells_read_off_the_paper_by_hand(table, setting, row, column, number):
    found = PAPER[table]["settings"][setting]
    assert found["rows"][row][found["columns"].index(column)] == number


def test_the_papers_rows_are_whole():
    """Each as long as its columns; the votes of the user study add up."""
    assert len(PAPER) == 19 and list(CONTENT["not_measured_here"]) == ["tableG7"]
    for table in [*PAPER.values(), *CONTENT["not_measured_here"].values()]:
        assert table["settings"]
        for setting in table["settings"].values():
            assert all(len(row) == len(setting["columns"]) for row in setting["rows"].values())
    rows = CONTENT["not_measured_here"]["tableG7"]["settings"]["artbench10-ir100"]["rows"]
    assert [(sum(each), overall) for *each, overall in rows.values()] == [(63, 63), (151, 151)]


def fake_result(fid, seed, settings=None, **changes):
    """What evaluate.py writes, with this FID overall and higher ones in the groups."""
    def numbers(fid):
        return {"fid": fid, "kid": fid / 1000, "recall": 0.5, "is": 9.0, "num": 20, "num_real": 30}
    groups = {"Many": fid + 3, "Medium": fid + 4, "Few": fid + 5}
    return {
        **numbers(fid), "groups": {name: numbers(value) for name, value in groups.items()},
        "classes": {}, "command": f"python evaluate.py --seed {seed}",
        "settings": {
            "dataset": "cifar100", "step": 9, "sampler": "ddim", "steps": 50, "guidance": 1.5,
            "clip": True, "weights": "ema", "branch": "full", "reference": "r", "seed": seed,
            "features": "inception", "reference_sha256": "a",
            "config": {"seed": seed, "lr": 2e-4, "save_every": seed},
            "command": f"python train.py --seed {seed}", **(settings or {})},
        **changes}


def write_row(folder, name, *results):
    """Write results; the value of --row that names them."""
    for k, result in enumerate(results):
        disk.write_json(folder / f"{name}-{k}.json", result)
    return f"{name}={folder}/{name}-*.json"


def make_page(path, *rows, paper=(), more=()):
    """Make a page of these values of --row; returns its text."""
    flags = [flag for row in rows for flag in ("--row", row)]
    words = ["--paper", paper[0], "--setting", paper[1]] if paper else []
    call(report.main, *words, *flags, *more, "--out", path)
    return path.read_text()


@pytest.fixture
def three_rows(tmp_path):
    """The values of --row for three methods with three seeds each."""
    fids = {"DDPM": [10, 11, 12], "OC": [9, 9, 9], "CM": [8, 8.5, 9]}
    return [write_row(tmp_path, name, *(fake_result(fid, k) for k, fid in enumerate(values)))
            for name, values in fids.items()]


def test_table_has_means_deviations_and_the_papers_numbers(tmp_path, three_rows):
    """And differences paired by seed; as HTML the same, with the picture inside."""
    three_rows[1] = f"OC={tmp_path}/OC-0.json,{tmp_path}/OC-[12].json,"     # as of run_all.sh
    text = make_page(tmp_path / "page/report.md", *three_rows, paper=("table3", "cifar100-ir100"))
    lines = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
    assert "| CM | 3 | **11.500 ± 0.500** | 11.713 ± 0.247 |" in lines["CM"]
    assert "**8.500 ± 0.500** | 7.519 ± 0.132" in lines["CM"]
    assert "*9.000 ± 0.000* | 8.309 ± 0.233" in lines["OC"]
    assert "| 11.000 ± 1.000 | 10.163" in lines["DDPM"]
    # OC - CM is 1, 0.5 and 0, with deviation 0.5; t quantile of two degrees of freedom
    half = 4.302653 * 0.5 / 3 ** 0.5
    assert f"-0.500 ({-0.5 - half:+.3f} to {-0.5 + half:+.3f}) |" in lines["CM against OC"]
    assert "python train.py --seed 0    # CM\npython evaluate.py --seed 0    # CM" in text
    assert "Differs" not in text
    assert (tmp_path / "page/report.pdf").exists() and (tmp_path / "page/report.png").exists()
    html = (tmp_path / "page/report.html").read_text()
    assert "<strong>8.500 ± 0.500</strong>" in html and "<em>9.000 ± 0.000</em>" in html
    assert 'src="data:image/png;base64,' in html and "report.png" not in html


def test_the_summary_says_what_the_numbers_say(tmp_path, capsys):
    """FID of Many is that overall + 3, of Few + 5, in fake_result."""
    disk.write_png(tmp_path / "p.png", Image.new("RGB", (2, 2)))

    def said(*fids):
        rows = [write_row(tmp_path, name, fake_result(fid, 0, {"branch": branch}))
                for name, fid, branch in zip("abc", fids, ["full", "full", "general"])]
        return make_page(tmp_path / "page.md", *rows,
                         more=["--summary", "--picture", f"mine={tmp_path}/p.png"])
    text = said(20, 5, 45)
    assert "FID 10.0 with CM, 25.0 without: 60% lower" in text and "![mine](p.png)" in text
    assert "5.0 times as large on Few and 6.0 times on Many: that part does not hold" in text
    assert "FID 25.0 with CM, 10.0 without: 150% higher, which is worse" in said(5, 20, 20)
    assert "FID 11.0 with CM, 10.0 without: a single run cannot show" in said(5, 6, 9)
    refuses(capsys, report.main, "--row", f"a={tmp_path}/a-0.json", "--picture", "mine=none.png",
            "--out", tmp_path / "page.md", says=["--picture"])


def verdict_of(tmp_path, seeds, more=()):
    """The page of DDPM, CM on it (better on Few alone) and DDPM trained for as long."""
    rows = []
    for name, few, speed in (("DDPM", 9, 640), ("CM on DDPM", 5, 320), ("DDPM, as long", 4, 640)):
        results = []
        for seed in range(seeds):
            ckpt = tmp_path / f"{name}-{seed}/ckpt.pt"
            config = {"seed": seed, "batch_size": 64}
            result = fake_result(10 + seed % 2, seed, {"ckpt": str(ckpt), "config": config})
            result["groups"]["Few"]["fid"] = few + seed / 10
            ckpt.parent.mkdir(parents=True)
            ckpt.with_name("log.jsonl").write_text(f'{{"step": 1, "images_per_s": {speed}}}\n')
            results.append(result)
        row = write_row(tmp_path, f"row{len(rows)}", *results)      # its files: no comma
        rows.append(f"{name}={row.split('=')[1]}")
    return make_page(tmp_path / "page.md", *rows, more=["--summary", *more])


def test_the_verdict_on_cm(tmp_path):
    """Per group: better where seeds agree; what a step costs, by the logs."""
    text = verdict_of(tmp_path, seeds=3)
    assert ("- CM on DDPM against DDPM, as many steps, 3 seeds: better: Few FID -4.000 "
            "(-4.000 to -4.000); no difference shown: Many FID +0.000" in text)
    assert "a step takes 0.2 s with CM and 0.1 s without, 2.00 times as long" in text
    assert "3 seeds: worse: Few FID +1.000" in text
    text = verdict_of(tmp_path / "one", seeds=1)
    assert "one seed, which decides nothing: no difference shown: Many FID +0.000, " in text
    assert "better" not in text.split("\n\n")[1]


def test_the_verdict_is_corrected_for_the_number_of_differences(tmp_path):
    """p is 0.027 for Few, one of four differences: no reason to say "better"."""
    gains = [[0, 0, 0], [0.711, 1, 1.289]]
    assert report.p_value(report.difference(*(
        report.Row("", [{"fid": value} for value in values], []) for values in gains), "fid"), 3) \
        == pytest.approx(stats.ttest_rel(*gains).pvalue)
    rows = []
    for name, gain in zip(("DDPM", "CM on DDPM"), gains):
        results = [fake_result(10, seed) for seed in range(3)]
        for result, better in zip(results, gain):
            result["groups"]["Few"]["fid"] = 9 - better
            result["left_out"] = {"Medium": "no image of a class in the reference", "cat": "few"}
        rows.append(write_row(tmp_path, name, *results))
    text = make_page(tmp_path / "page.md", *rows, more=["--summary"])
    assert "Few FID -1.000 (-1.718 to -0.282)" in text
    assert "better:" not in text
    assert "\n- Not measured: Medium (no image of a class in the reference).\n" in text


def test_a_verdict_on_two_classes(tmp_path):
    """They have no groups; a name may have a space."""
    rows = []
    for name, fid in (("DDPM", 9), ("CM on DDPM", 5)):
        results = [fake_result(9, s, groups={}, classes={"big one": {"fid": 5}, "b": {"fid": fid}})
                   for s in range(2)]
        rows.append(write_row(tmp_path, name, *results))
    text = make_page(tmp_path / "page.md", *rows, more=["--summary"])
    assert "better: b FID -4.000" in text and "shown: big one FID +0.000" in text
    assert "| big one FID | b FID | FID |" in text


@pytest.mark.parametrize("share, says", [(0.9, "more"), (0.55, "not more")])
def test_copies_are_compared_with_unseen_images(tmp_path, share, says):
    real, samples = {"all": 0.5, "Few": 0.5}, {"all": 0.1, "Few": share}
    disk.write_json(tmp_path / "copies.json", {"rows": {
        "real, not in the training set": {"num": {"all": 900, "Few": 40}, "features": real},
        str(tmp_path / "DDPM-0/samples/samples.npz"):
            {"num": {"all": 300, "Few": 100}, "features": samples}}})
    text = verdict_of(tmp_path, 2, ["--copies", tmp_path / "copies.json"])
    assert f"{share:.0%} of 100 samples of DDPM, {says}; expected are 50%, as of 40 real" in text


def test_the_verdict_on_generated_images(tmp_path):
    """Each classifier is compared with the one that saw none."""
    rows = []
    for name, gain in (("No augmentation", 0), ("DDPM", -2), ("CM on DDPM", 3)):
        results = [{"accuracy": 50.0 + gain + s, "recall": 40.0 + s, "precision": 40.0,
                    "groups": {"Few": {"accuracy": 20.0 + gain + s}}, "classes": {}, "num": 9,
                    "num_real": 8, "command": "", "settings": {
                        "dataset": "folder", "ir": 1.0, "epochs": None, "steps": 7, "seed": s,
                        "group_rule": "counts"}} for s in range(2)]
        rows.append(write_row(tmp_path, name, *results))
    text = make_page(tmp_path / "page.md", *rows, more=["--summary"])
    assert "| Few accuracy | recall | precision | accuracy |\n" in text
    assert "folder, every image, 7 steps" in text
    assert "\n| DDPM | 2 | 18.50 ± 0.71 | 40.50 ± 0.71 | 40.00 ± 0.00 | 48.50 ± 0.71 |\n" in text
    assert ("- CM on DDPM against No augmentation, 2 seeds: better: Few accuracy +3.00 "
            "(+3.00 to +3.00); no difference shown: recall" in text)
    assert "- CM on DDPM against DDPM, 2 seeds: better: Few accuracy +5.00" in text
    assert "- DDPM against No augmentation, 2 seeds: worse: Few accuracy -2.00" in text


def test_rows_without_files_are_shown_as_failed(tmp_path, three_rows, capsys):
    """And so are seeds without one: the page has what there is."""
    rows = [f"CBDM={tmp_path}/failed,", *three_rows[:2], f"{three_rows[2]},{tmp_path}/failed"]
    page = tmp_path / "report.md"
    refuses(capsys, report.main, *(word for row in rows for word in ("--row", row)), "--paper",
            "table2", "--setting", "cifar100-ir100", "--out", page, says=["--row CBDM, CM"])
    text = page.read_text()
    assert "| CBDM | 1 failed | - |" in text and "| DDPM | 3 | 11.000 ± 1.000 |" in text
    assert "| CM | 3, 1 failed | **8.500 ± 0.500** |" in text


def test_a_dash_where_the_paper_has_no_number(tmp_path):
    row = write_row(tmp_path, "+RS", *(fake_result(fid, k) for k, fid in enumerate([10, 11, 12])))
    text = make_page(tmp_path / "p.md", row, paper=("fig4a", "cifar100-ir100"))
    assert "| +RS | 3 | 14.000 ± 1.000 | - |" in text
    assert "| 11.000 ± 1.000 | 11.432 ± 0.287 |" in text
    text = make_page(tmp_path / "p.md", row, paper=("table2", "cifar10-ir7"))   # not the paper's
    assert "paper" not in text.split("\n")[4]


def test_settings_in_which_rows_differ_are_shown(tmp_path):
    """Of training and of sampling; not seeds, commands and hashes, nor what training may change."""
    first = write_row(tmp_path, "A", fake_result(9, 0, {"ckpt_sha256": "x"}), fake_result(9, 1))
    other = write_row(tmp_path, "B", fake_result(8, 3, {
        "step": 300_000, "branch": "general", "config": {"seed": 3, "lr": 1e-3, "ch": 64}}))
    foreign = fake_result(7, 0)
    for key in ("config", "sampler", "steps"):
        del foreign["settings"][key]
    text = make_page(tmp_path / "p.md", first, other, write_row(tmp_path, "C", foreign))
    assert ("Differs: B (lr 0.001, ch 64, step 300000, branch general); C (without sampler, steps)."
            in text)


@pytest.mark.parametrize("settings, changes, says", [
    ({"config": {"seed": 1, "lr": 2e-4, "tail_seed": 1}}, {}, "tail_seed"),
    ({"config": {"seed": 1, "lr": 2e-4, "init_from": "a.pt"}}, {}, "init_from"),
    ({"guidance": 0.0}, {}, "guidance"), ({"steps": 20}, {}, "steps"), ({}, {"num": 10}, "num")])
def test_other_experiments_are_no_seeds(tmp_path, capsys, settings, changes, says):
    row = write_row(tmp_path, "CM", fake_result(9, 0), fake_result(8, 1, settings, **changes))
    refuses(capsys, report.main, "--row", row, "--out", tmp_path / "p.md", says=["--row CM", says])


def test_seeds_may_differ_in_paths(tmp_path):
    results = [fake_result(9, k, {"config": {
        "seed": k, "init_from": f"{k}.pt", "data_dir": f"{k}"}}) for k in range(2)]
    assert "| A | 2 |" in make_page(tmp_path / "p.md", write_row(tmp_path, "A", *results))


def test_a_side_of_few_images(tmp_path):
    """A KID of smaller subsets than the protocol's is not shown, without --paper either; a note."""
    result = fake_result(9, 0, kid_subset_size=100)
    for group in result["groups"].values():
        group["kid_subset_size"] = 30
    text = make_page(tmp_path / "p.md", write_row(tmp_path, "A", result))
    assert "| Many FID | Medium FID | Few FID | FID | IS | recall |" in text and "KID" not in text
    assert "Inception scores too low" in text


@pytest.mark.parametrize("settings, numbers", [
    ({"features": "c.pt"}, {}), ({"features_sha256": "f"}, {}), ({"reference": "other"}, {}),
    ({"reference_sha256": "b"}, {}), ({}, {"num_real": 31})])
def test_rows_of_other_features_or_references_are_refused(tmp_path, capsys, settings, numbers):
    rows = [write_row(tmp_path, "DDPM", fake_result(9, 0)),
            write_row(tmp_path, "CM", fake_result(8, 0, settings, **numbers))]
    refuses(capsys, report.main, "--row", rows[0], "--row", rows[1], "--out", tmp_path / "p.md",
            says=["--row CM"])
    assert not (tmp_path / "p.md").exists()


@pytest.mark.parametrize("flags, says", [
    (["--row", "x.json"], "--row x.json"), (["--row", "CM=x-*.json"], "--row CM"),
    (["--row", "CM=ours.json,seed1.json"], "--row CM"), (["--row", "CM=foreign.json"], "--row CM"),
    (["--row", "CM=ours.json", "--paper", "table99"], "--paper table99"),
    (["--row", "CM=ours.json", "--setting", "cifar100-ir100"], "--setting")])
def test_flags_that_are_refused(tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    disk.write_json(tmp_path / "ours.json", fake_result(9, 0))
    disk.write_json(tmp_path / "foreign.json", [1])
    refuses(capsys, report.main, *flags, says=[says])


def test_rows_are_paired_by_seeds_noise_and_guidance():
    def row(name, values, train, noise=(0, 0, 0), guidance=None):
        return report.Row(name, [{"accuracy": value, "settings": {
            "sampler": "ddim", "guidance": guidance, "seed": n, "config": {"seed": k}}}
            for value, k, n in zip(values, train, noise)], [])
    text = report.paired_differences([
        row("CE", [10, 20, 30], [0, 1, 2]), row("CE + CM", [12, 21, 33], [0, 1, 2]),
        row("CE, as long", [11, 20, 32], [0, 1, 2]),
        row("LDAM", [1, 2, 3], [0, 1, 2]), row("LDAM + CM", [1, 2, 3], [1, 2, 3]),
        row("LA", [1, 2, 3], [0, 1, 2]), row("LA + CM", [1, 2, 3], [0, 1, 2], [0, 1, 2]),
        row("X", [1], [0]), row("X + CM", [1], [0]),
        row("OC", [1, 2], [0, 1], guidance=0.0), row("CM", [3, 4], [0, 1], guidance=0.0),
        row("OC", [1, 2], [0, 1], guidance=1.5), row("CM", [2, 3], [0, 1], guidance=1.5)],
        ["accuracy"])
    half = 4.302653 * 1.0 / 3 ** 0.5
    assert text.splitlines()[2:] == [
        f"| CE + CM against CE | +2.00 ({2 - half:+.2f} to {2 + half:+.2f}) |",
        "| CE + CM against CE, as long | +1.00 (+1.00 to +1.00) |",
        "| CM against OC, guidance 0 | +2.00 (+2.00 to +2.00) |",
        "| CM against OC, guidance 1.5 | +1.00 (+1.00 to +1.00) |"]


def test_the_number_of_a_row():
    results = [{"fid": fid} for fid in (1.0, 2.0, 6.0)]
    assert report.over_seeds(results, "fid") == (3.0, pytest.approx(7 ** 0.5))
    assert report.over_seeds(results[:1], "fid") == (1.0, None)
    assert report.over_seeds([*results, {"kid": 1.0}], "fid") is None      # one lacks it
    number = report.Number(1.23456, 0.5)
    assert [report.show(number, column) for column in ("Few fid", "kid", "is")] == [
        "1.235 ± 0.500", "1.2346 ± 0.5000", "1.23 ± 0.50"]
    rows = [report.Row(name, [{"recall": value, "groups": {}, "classes": {}, "settings": {}}], [])
            for name, value in zip("ABC", (0.2, 0.4, 0.3))]
    lines = report.results_table(rows, ["recall"], None)
    assert re.findall(r"\*+[\d.]+\*+", lines) == ["**0.40**", "*0.30*"]      # higher is better
    same_name = {"fid": 1, "groups": {"Few": {"fid": 2}}, "classes": {"Few": {"fid": 3}}}
    assert report.value_of(same_name, "Few fid") == 2               # the group, not a class


def test_samples_side_by_side(cm_run, classifier, data_dir, tmp_path, capsys):
    """A picture per guidance strength, of the files that were measured; theta_g beside theta."""
    rows = []
    for name in ("full", "general"):
        out = tmp_path / name
        call(sample.main, "--ckpt", cm_run / "ckpt.pt", "--branch", name, "--num", 20, "--steps", 1,
             "--device", "cpu", "--out", out)
        call(evaluate.main, "--samples", out / "samples.npz", "--features", classifier,
             "--data-dir", data_dir, "--floor", 2, "--device", "cpu")
        rows.append(f"{name}={out}/eval.json")
    pair = [f"{tmp_path}/{name}/samples.npz" for name in ("general", "full")]
    text = make_page(tmp_path / "p.md", *rows, more=["--pair", *pair])
    for file in ("p-pair.png", "p-samples-1.5.png"):
        assert f"({file})" in text and Image.open(tmp_path / file).height == 30 + 10 * 60
    assert "Not shown" not in text
    result = disk.read_json(tmp_path / "full/eval.json")
    assert f"{result['groups']['Many']['fd']:.3f}" in text and f"{result['fd']:.3f}" in text

    # Named, not shown: gone, made again since
    for name, change in (("gone", {"samples": "no.npz"}), ("stale", {"samples_sha256": "x"})):
        settings = {**result["settings"], **change}
        rows.append(write_row(tmp_path, name, {**result, "settings": settings}))
    assert "Not shown: gone, stale (" in make_page(tmp_path / "p.md", *rows)
    for wrong in (pair[::-1], pair[:1] * 2):
        refuses(capsys, report.main, "--row", rows[0], "--pair", *wrong, "--out",
                tmp_path / "q.md", says=["--pair"])


@pytest.mark.slow
@pytest.mark.parametrize("target, pages", [
    # The Inception score is Inception's: a classifier has none; and no KD of so few images
    ("table7", {"theta_g": (["DDPM", "CM (theta_g)", "CM"], 0),
                "report": (["DDPM", "OC", "CM", "CM w/o L_Con", "CM w/o L_Div"], 2)}),
    ("tableE2", {"report": (["DDPM", "Group-Expert LoRA", "CM"], 0)}),
    ("tableG8", {"report": (["No augmentation", "DDPM", "CM"], 0)})])
def test_run_all_makes_a_table(tmp_path, target, pages):
    """One of the paper's tables of digits, with a number in every cell; again: all is done."""
    for path in ROOT.iterdir():     # the script works in its own folder
        if path.name not in (".git", "out", "data", "run_all.sh"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    env = {**os.environ, "SCALE": "demo", "STEPS": "4", "NUM": "30", "EXTRA": "20",
           **({"EPOCHS": "2"} if target == "tableG8" else {}), "CUDA_VISIBLE_DEVICES": "",
           "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    command = ["bash", tmp_path / "run_all.sh", target]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    for name, (rows, empty) in pages.items():
        text = (tmp_path / f"out/{target}/digits-ir20/{name}.md").read_text()
        for row in rows:
            line = next(line for line in text.splitlines() if line.startswith(f"| {row} | 1 | "))
            assert line.count(" - |") == empty
    if target == "tableE2":
        again = subprocess.run(command, capture_output=True, text=True, env=env)
        assert again.returncode == 0 and "img/s" not in again.stdout
