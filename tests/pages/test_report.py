"""report.py's pages, the paper's numbers, and run_all.sh from beginning to end at demo scale."""
import base64
import importlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, call, refuses
from matplotlib.figure import Figure
from PIL import Image
from test_run_all import record

import disk
import sample
from pages import page, report

CONTENT = disk.read_json(ROOT / "pages/paper_results.json")
PAPER = CONTENT["tables"]


# --------------------------------------------------------------------------------------------------
# The paper's numbers

def paper_cell(table, setting, row, column):
    """A number in paper_results.json."""
    setting = PAPER[table]["settings"][setting]
    return setting["rows"][row][setting["columns"].index(column)]


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
    assert paper_cell(table, setting, row, column) == number


def test_every_row_is_as_long_as_its_columns():
    assert len(PAPER) == 19 and list(CONTENT["not_measured_here"]) == ["tableG7"]
    for table in [*PAPER.values(), *CONTENT["not_measured_here"].values()]:
        assert table["settings"]
        for setting in table["settings"].values():
            assert all(len(row) == len(setting["columns"]) for row in setting["rows"].values())


def test_the_user_study_adds_up():
    rows = CONTENT["not_measured_here"]["tableG7"]["settings"]["artbench10-ir100"]["rows"]
    for *each, overall in rows.values():
        assert len(each) == 8 and sum(each) == overall
    ddpm, cm = (row[-1] for row in rows.values())
    assert (ddpm, cm) == (63, 151) and round(100 * cm / (ddpm + cm), 2) == 70.56


@pytest.mark.parametrize("setting, said, is_", [("cifar10-ir100", "2.725", "2.970"),
                                                ("cifar100-ir50", "2.571", "2.631")])
def test_where_the_papers_text_and_table_disagree(setting, said, is_, tmp_path, three_rows):
    gain = (paper_cell("table2", setting, "DDPM", "fid")[0]
            - paper_cell("table2", setting, "CM", "fid")[0])
    assert f"{gain:.3f}" == is_
    as_of(tmp_path, setting.partition("-")[0])
    page = make_page(tmp_path / "page.md", "table2", setting, *three_rows)
    assert said in page and f"= {is_}" in page
    as_of(tmp_path, "cifar10")
    other = make_page(tmp_path / "other.md", "table2", "cifar10-ir50", *three_rows)
    assert "paper's text" not in other


def as_of(folder, dataset):
    """Make the results in a folder those of another data set."""
    for path in folder.glob("*-?.json"):
        disk.write_json(path, changed(disk.read_json(path), {"dataset": dataset}))


@pytest.mark.parametrize("figure", ["fig4a", "fig4b", "fig4c", "fig4d"])
def test_figures_have_the_numbers_of_the_same_runs_in_the_tables(figure):
    """The paper's figures print no numbers of their own."""
    for name, setting in PAPER[figure]["settings"].items():
        for row, values in setting["rows"].items():
            run = row.removesuffix(", 1 2 2 2")
            assert values[-1] == paper_cell("table2", name, run, "fid")
            if values[0] is not None and len(values) > 1:
                assert values[2] == paper_cell("table3", name, run, "Few fid")


# --------------------------------------------------------------------------------------------------
# Paper tables

def fake_numbers(fid):
    """The numbers of one set of images."""
    return {"fid": fid, "kid": fid / 1000, "recall": 0.5, "is": 9.0, "num": 20, "num_real": 30}


def fake_result(fid, seed):
    """What evaluate.py writes, with this FID overall and higher ones in the groups."""
    groups = {"Many": fid + 3, "Medium": fid + 4, "Few": fid + 5}
    settings = {
        "dataset": "cifar100", "step": 9, "sampler": "ddim", "steps": 50, "guidance": 1.5,
        "weights": "ema", "reference": "r", "command": f"python train.py --seed {seed}"}
    return {
        **fake_numbers(fid),
        "groups": {name: fake_numbers(value) for name, value in groups.items()},
        "classes": {},
        "command": f"python evaluate.py --seed {seed}",
        "settings": settings}


def make_page(path, table, setting, *rows):
    """Make a page of --paper; returns its text."""
    flags = [flag for row in rows for flag in ("--row", row)]
    call(report.main, "--paper", table, "--setting", setting, *flags, "--out", path)
    return path.read_text()


@pytest.fixture
def three_rows(tmp_path):
    """The values of --row for three methods with three seeds each."""
    fids = {"ddpm": [10, 11, 12], "oc": [9, 9, 9], "cm": [8, 8.5, 9]}
    for name, values in fids.items():
        for seed, fid in enumerate(values):
            disk.write_json(tmp_path / f"{name}-{seed}.json", fake_result(fid, seed))
    return [
        f"DDPM={tmp_path}/ddpm-*.json",
        f"OC={tmp_path}/oc-0.json,{tmp_path}/oc-[12].json,",
        f"CM={tmp_path}/cm-*.json"]


def test_table_has_means_deviations_and_the_papers_numbers(tmp_path, three_rows):
    page = make_page(tmp_path / "page/report.md", "table3", "cifar100-ir100", *three_rows)
    lines = {line.split(" | ")[0][2:]: line for line in page.splitlines() if line.startswith("| ")}
    assert "| CM | 3 | **11.500 ± 0.500** | 11.713 ± 0.247 |" in lines["CM"]
    assert "**8.500 ± 0.500** | 7.519 ± 0.132" in lines["CM"]
    assert "*9.000 ± 0.000* | 8.309 ± 0.233" in lines["OC"]
    assert "| 11.000 ± 1.000 | 10.163" in lines["DDPM"]
    assert "python train.py --seed 0    # CM\npython evaluate.py --seed 0    # CM" in page
    assert (tmp_path / "page/report.pdf").exists()
    assert (tmp_path / "page/report.png").exists()


def test_the_better_of_two_rows_is_in_bold(tmp_path, three_rows):
    ddpm, _, cm = three_rows
    page = make_page(tmp_path / "two.md", "tableG10", "cifar10-ir7", ddpm, cm)
    assert "| CM | 3 | **8.500 ± 0.500**" in page


def test_a_dash_where_the_paper_has_no_number(tmp_path):
    for seed, fid in enumerate([10, 11, 12]):
        disk.write_json(tmp_path / f"rs-{seed}.json", fake_result(fid, seed))
    row = f"+RS={tmp_path}/rs-*.json"
    page = make_page(tmp_path / "figure.md", "fig4a", "cifar100-ir100", row)
    assert "| +RS | 3 | 14.000 ± 1.000 | - |" in page
    assert "| 11.000 ± 1.000 | 11.432 ± 0.287 |" in page


def test_a_setting_that_the_paper_does_not_have(tmp_path, three_rows):
    page = make_page(tmp_path / "other.md", "table2", "cifar10-ir7", *three_rows)
    head_of_table = page.split("##")[0].split("\n")[4]
    assert "seeds" in head_of_table and "paper" not in head_of_table


def test_a_table_that_the_paper_does_not_have(tmp_path, three_rows, capsys):
    refuses(capsys, report.main, "--paper", "table99", "--row", three_rows[0],
            "--out", tmp_path / "x.md", says=["--paper table99", "table2"])


def test_rows_of_different_budgets_are_called_so(tmp_path):
    short = fake_result(9, 0)
    long = fake_result(8, 0)
    long["settings"]["step"] = 300_000
    disk.write_json(tmp_path / "short.json", short)
    disk.write_json(tmp_path / "long.json", long)
    rows = [f"{name}={tmp_path}/{name}.json" for name in ("short", "long")]
    page = make_page(tmp_path / "p.md", "table2", "cifar10-ir7", *rows)
    assert "Different budgets: the rows' checkpoints are at steps 9, 300,000." in page
    page = make_page(tmp_path / "p.md", "table2", "cifar10-ir7", rows[0])
    assert "Different budgets" not in page


def test_a_row_of_images_that_are_not_ours(tmp_path):
    """What evaluate.py measured on images that sample.py did not generate: no sampler, no step."""
    settings = {"samples": "peer.npz", "reference": "cifar100, full training set"}
    disk.write_json(tmp_path / "peer.json", {**fake_result(7.5, 0), "settings": settings})
    row = f"Peer={tmp_path / 'peer.json'}"
    page = make_page(tmp_path / "p.md", "table3", "cifar100-ir100", row)
    assert "20 samples against 30 real images (cifar100" in page


def test_files_from_before_groups_were_called_groups(tmp_path):
    """Older files have "splits": they give the same page."""
    result = fake_result(9, 0)
    disk.write_json(tmp_path / "row.json", result)
    row = f"CM={tmp_path}/row.json"
    page = make_page(tmp_path / "p.md", "table3", "cifar100-ir100", row)
    result["splits"] = result.pop("groups")
    disk.write_json(tmp_path / "row.json", result)
    assert make_page(tmp_path / "p.md", "table3", "cifar100-ir100", row) == page
    assert "| 14.000 | 18.729 ± 0.141 |" in page            # Few


def test_paired_differences():
    def results(values, first_seed=0):
        return [{"fid": 0, "accuracy": value,
                 "settings": {"command": f"python train.py --seed {first_seed + k}"}}
                for k, value in enumerate(values)]
    rows = [
        ("CE", results([10, 20, 30])),
        ("CE + CM", results([12, 21, 33])),
        ("CE, as long", results([11, 20, 32])),
        ("LA", results([1])),
        ("LDAM", results([1, 2, 3])),
        ("LDAM + CM", results([1, 2, 3], first_seed=1))]        # other seeds: not paired
    text = report.paired_differences(rows, ["accuracy"])
    # The differences are 2, 1 and 3, with deviation 1; t quantile of two degrees of freedom
    half = 4.302653 * 1.0 / 3 ** 0.5
    assert f"| CE + CM against CE | +2.00 ({2 - half:+.2f} to {2 + half:+.2f}) |" in text
    assert "| CE + CM against CE, as long | +1.00 (+1.00 to +1.00) |" in text
    assert "LA" not in text and "LDAM" not in text


def test_one_seed_has_no_interval_and_a_classifiers_seed_is_its_own():
    def row(*seeds):
        return [{"accuracy": 1.0, "settings": {}, "command": f"python classify --seed {seed}"}
                for seed in seeds]
    assert report.seeds_of(row(3, 0)) == [3, 0]
    assert report.paired_differences([("CE", row(0)), ("CE + CM", row(0))], ["accuracy"]) == ""
    rows = [("CE", row(1, 2)), ("CE + CM", row(1, 3))]
    assert report.paired_differences(rows, ["accuracy"]) == ""
    rows[1] = ("CE + CM", row(1, 2))
    assert "CE + CM against CE" in report.paired_differences(rows, ["accuracy"])


def test_the_number_of_a_row():
    results = [{"fid": fid} for fid in (1.0, 2.0, 6.0)]
    assert report.over_seeds(results, "fid") == (3.0, pytest.approx(7 ** 0.5))
    assert report.over_seeds(results[:1], "fid") == (1.0, None)
    assert report.over_seeds([*results, {"kid": 1.0}], "fid") is None      # one lacks it
    number = report.Number(1.23456, 0.5)
    assert [report.show(number, column) for column in ("Few fid", "kid", "is")] == [
        "1.235 ± 0.500", "1.2346 ± 0.5000", "1.23 ± 0.50"]


@pytest.mark.parametrize("column, best", [
    ("fid", 1), ("Few fid", 1), ("kid", 1), ("recall", 3), ("precision", 3), ("is", 3),
    ("Few accuracy", 3)])
def test_which_number_is_the_best(column, best):
    means = report.different_means([report.Number(2), None, report.Number(1), report.Number(3)],
                                   column)
    assert [report.emphasis(mean, means) for mean in (best, 2, 4 - best)] == ["**", "*", ""]
    assert [report.emphasis(mean, means[:2]) for mean in means[:2]] == ["**", ""]
    assert report.emphasis(2, [2]) == ""


@pytest.mark.parametrize("name, without", [
    ("CM on +ADA", "+ADA"), ("CE + CM", "CE"), ("CM", "OC"), ("CM, 1 2 2", "OC, 1 2 2"),
    ("CM (theta_g)", None), ("CM w/o L_Div", None), ("OC", None), ("OC, as long", None)])
def test_which_row_lacks_only_cm(name, without):
    assert report.without_cm(name) == ([without, f"{without}, as long"] if without else [])


# --------------------------------------------------------------------------------------------------
# The demo's page. With real samples and --pair: test_evaluate.py

def demo_result(fd):
    """What evaluate.py writes with a classifier's features and --floor."""
    result = fake_result(fd, 0)
    del result["fid"]
    for part in (result, *result["groups"].values()):
        part.update({"fd": fd, "accuracy": 0.625, "floor": 0.5})
    return result


def test_demo_page(tmp_path):
    for name, fd in (("ddpm", 9.0), ("cm", 8.0)):
        disk.write_json(tmp_path / f"{name}.json", demo_result(fd))
    call(report.main, "--row", f"DDPM={tmp_path}/ddpm.json", "--row", f"CM={tmp_path}/cm.json",
         "--out", tmp_path / "page/report.md")
    page = (tmp_path / "page/report.md").read_text()
    assert page.startswith("# Samples per group\n") and "guidance 1.5" in page
    assert "| real against real |  | 0.50 | 0.50 | 0.50 | 0.50 |  |" in page
    assert "| CM | 1.5 | 8.00 | 8.00 | 8.00 | 8.00 | 62.5% |" in page
    assert "(groups.png)" in page and (tmp_path / "page/groups.png").exists()


def test_labels_of_bars_have_no_exponent():
    groups = {name: {"fd": fd} for name, fd in (("Many", 13156.2), ("Medium", 999.7), ("Few", 9.1))}
    ax = Figure().add_subplot()
    report.draw_groups(ax, [("DDPM", {"groups": groups})], {"Many": 1.0, "Medium": 1.0, "Few": 1.0})
    assert [text.get_text() for text in ax.texts] == ["13156", "1000", "9.1"]


def test_rows_without_the_demos_numbers_have_a_table_of_what_they_have(tmp_path):
    """FID, images of another program, several seeds: all their columns, no paper's."""
    row, = write_rows(tmp_path, CM=fake_result(9, 0))
    call(report.main, "--row", row, "--out", tmp_path / "p.md")
    page = (tmp_path / "p.md").read_text()
    assert page.startswith("# Results\n") and "paper" not in page.lower()
    assert "|  | seeds | Many FID | Medium FID | Few FID | FID | KID | IS | recall |\n" in page
    assert "\n| CM | 1 | 12.000 | 13.000 | 14.000 | 9.000 | 0.0090 | 9.00 | 0.50 |\n" in page
    others = demo_result(9.0)
    del others["settings"]["guidance"], others["settings"]["sampler"]
    row, = write_rows(tmp_path, other=others)
    call(report.main, "--row", row, "--out", tmp_path / "p.md")
    assert "| other | 1 | 9.000 | 9.000 | 9.000 | 9.000 |" in (tmp_path / "p.md").read_text()
    for seed, fd in enumerate((8.0, 9.0)):
        result = demo_result(fd)
        result["settings"]["command"] = f"python train.py --seed {seed}"
        disk.write_json(tmp_path / f"seed{seed}.json", result)
    call(report.main, "--row", f"CM={tmp_path}/seed?.json", "--out", tmp_path / "p.md")
    assert "| CM | 2 | 8.500 ± 0.707 |" in (tmp_path / "p.md").read_text()


@pytest.mark.parametrize("change, flags, says", [
    ({}, ["--setting", "cifar100-ir100"], "--setting"), ({"fid": None}, [], "no metric")])
def test_a_table_of_ones_own_refuses(tmp_path, capsys, change, flags, says):
    keys = "fid", "kid", "recall", "is"
    result = {k: v for k, v in fake_result(9, 0).items() if not (change and k in keys)}
    row, = write_rows(tmp_path, CM=result)
    refuses(capsys, report.main, "--row", row, *flags, "--out", tmp_path / "p.md", says=[says])


def test_a_table_of_ones_own_has_what_any_row_has(tmp_path):
    """Not only what the first one has; groups in the metric that they have; no KID of few."""
    first, second = fake_result(9, 0), fake_result(8, 0)
    for part in (first, *first["groups"].values()):
        del part["recall"]
    del first["groups"]["Few"]
    second["kid_subset_size"] = 20
    rows = write_rows(tmp_path, A=first, B=second)
    call(report.main, *[w for row in rows for w in ("--row", row)], "--out", tmp_path / "p.md")
    page = (tmp_path / "p.md").read_text()
    assert "|  | seeds | Many FID | Medium FID | Few FID | FID | IS | recall |\n" in page
    assert "\n| A | 1 | 12.000 | 13.000 | - | 9.000 | 9.00 | - |\n" in page
    classifier = changed(CLASSIFIER, accuracy=90.0, recall=80.0,
                         groups={"Many": {"accuracy": 95.0}, "Few": {"accuracy": 70.0}})
    row, = write_rows(tmp_path, CE=classifier)
    call(report.main, "--row", row, "--out", tmp_path / "p.md")
    page = (tmp_path / "p.md").read_text()
    assert "| Many accuracy | Few accuracy | recall | accuracy |\n" in page
    assert "\n| CE | 1 | 95.00 | 70.00 | 80.00 | 90.00 |\n" in page


def test_what_was_not_measured_has_no_bar():
    ax = Figure().add_subplot()
    rows = [("A", [FIRST]), ("B", [FIRST])]
    report.draw_panel(ax, rows, "fid", [report.Number(3.0), None], None)
    assert [text.get_text() for text in ax.texts] == ["3", ""]
    assert not np.isfinite(ax.patches[1].get_height())


def test_one_name_twice_in_the_demos_table_is_refused(tmp_path, capsys):
    """At one guidance strength; at two it is a row each."""
    rows = write_rows(tmp_path, a=demo_result(9.0), b=demo_result(8.0),
                      c=changed(demo_result(8.0), {"guidance": 0.0}))
    flags = ["--row", rows[0].replace("a=", "CM=", 1), "--out", tmp_path / "p.md"]
    refuses(capsys, report.main, *flags, "--row", rows[1].replace("b=", "CM=", 1),
            says=["two rows are called CM"])
    call(report.main, *flags, "--row", rows[2].replace("c=", "CM=", 1))


# --------------------------------------------------------------------------------------------------
# Rows that do not belong into one table

def write_rows(folder, **results):
    """Write results; the values of --row that name them."""
    for name, result in results.items():
        disk.write_json(folder / f"{name}.json", result)
    return [f"{name}={folder}/{name}.json" for name in results]


def changed(result, settings=None, **numbers):
    """A result with other settings and numbers."""
    return {**result, **numbers, "settings": {**result["settings"], **(settings or {})}}


FIRST = changed(fake_result(9, 0), {
    "features": "inception", "features_sha256": "e", "reference_sha256": "a", "k": 3,
    "classes": "5-9"}, class_order=[0, 1, 2])
OTHERS = {      # what the line must say -> a result that cannot stand beside FIRST
    "distance is FD": {**{k: v for k, v in FIRST.items() if k != "fid"}, "fd": 9.0},
    "features are c.pt": changed(FIRST, {"features": "c.pt"}),
    "features' hash is f": changed(FIRST, {"features_sha256": "f"}),
    "reference is other": changed(FIRST, {"reference": "other"}),
    "reference's hash is b": changed(FIRST, {"reference_sha256": "b"}),
    "--k is 5": changed(FIRST, {"k": 5}),
    "--classes are 0-4": changed(FIRST, {"classes": "0-4"}),
    "classes by size are 2 1 0": changed(FIRST, class_order=[2, 1, 0]),
    "number of images is 21": changed(FIRST, num=21),
    "number of real images is 31": changed(FIRST, num_real=31),
}


@pytest.mark.parametrize("says", OTHERS)
def test_rows_measured_otherwise_are_refused(tmp_path, capsys, says):
    flags = []
    for row in write_rows(tmp_path, DDPM=FIRST, CM=OTHERS[says]):
        flags += ["--row", row]
    refuses(capsys, report.main, "--paper", "table2", *flags, "--out", tmp_path / "p.md",
            says=["--row CM", says, "DDPM"])
    assert not (tmp_path / "p.md").exists()


def test_one_run_twice_in_a_row_is_refused(tmp_path, capsys):
    same = changed(FIRST, {"ckpt_sha256": "c"})
    write_rows(tmp_path, a=same, b=same)

    def check(files, what):
        refuses(capsys, report.main, "--paper", "table2", "--row", f"CM={files}",
                "--out", tmp_path / "p.md", says=["--row CM", f"same {what} twice"])
    check(f"{tmp_path}/a.json,{tmp_path}/a.*", "file")
    check(f"{tmp_path}/a.json,{tmp_path}/b.json", "checkpoint")


@pytest.mark.parametrize("settings, says", [
    ({"sampler": "ddpm"}, "sampler ddpm"), ({"steps": 7}, "steps 7"), ({"eta": 1.0}, "eta 1"),
    ({"grid": "quad"}, "grid quad"), ({"guidance": 4.0}, "guidance 4"), ({"clip": True}, "clipped"),
    ({"weights": "raw"}, "weights raw"), ({"branch": "general"}, "branch general"),
    ({"step": 8}, "training step 8"), ({"dtype": "b"}, "dtype b"),
    ({"trained_on": "9 images"}, "training set of 9 images")])
def test_a_rows_files_differ_in_their_seeds_only(tmp_path, capsys, settings, says):
    first = changed(FIRST, {"eta": 0.0, "grid": "uniform", "branch": "full", "seed": 0,
                            "dtype": "a", "trained_on": "8 images"})
    write_rows(tmp_path, a=first, b=changed(first, settings))
    refuses(capsys, report.main, "--paper", "table2", "--row", f"CM={tmp_path}/[ab].json",
            "--out", tmp_path / "p.md", says=["--row CM", says])


def test_noise_is_one_for_all_seeds_or_each_seeds_own(tmp_path, capsys):
    def write(name, *sampling_seeds):
        for k, seed in enumerate(sampling_seeds):
            result = fake_result(9.0 + k + len(name), k)
            disk.write_json(tmp_path / f"{name}{k}.json", changed(result, {"seed": seed}))
        return f"{name}={tmp_path}/{name}*.json"
    own, same = write("OC", 0, 1, 2), write("DDPM", 0, 0, 0)
    page = make_page(tmp_path / "p.md", "table3", "cifar100-ir100", own, write("CM", 0, 1, 2))
    assert "over seeds of training and of sampling;" in page and "CM against OC" in page
    page = make_page(tmp_path / "p.md", "table3", "cifar100-ir100", same)
    assert "over seeds of training; the noise that is sampled is the same for all;" in page
    # Two rows of which one has another noise are not paired
    page = make_page(tmp_path / "p.md", "table3", "cifar100-ir100", own, write("CM", 0, 0, 0))
    assert "CM against OC" not in page and "Mean ± standard deviation over seeds;" in page
    refuses(capsys, report.main, "--paper", "table3", "--row", write("CBDM", 0, 0, 1), "--out",
            tmp_path / "p.md", says=["--row CBDM", "same sampling seed", "--seed"])


def test_the_papers_numbers_are_of_the_rows_data_set(tmp_path, capsys, three_rows):
    for setting in ("cifar10-ir100", "celebahq-ir100"):
        table = {"cifar10-ir100": "table3", "celebahq-ir100": "table4"}[setting]
        refuses(capsys, report.main, "--paper", table, "--setting", setting, "--row",
                three_rows[0], "--out", tmp_path / "p.md", says=["--setting", "cifar100"])


def test_a_page_replaces_pages_only(tmp_path, capsys, three_rows):
    """A title alone makes no page of ours."""
    page = tmp_path / "p.md"
    make_page(page, "table3", "cifar100-ir100", *three_rows)
    make_page(page, "table3", "cifar100-ir100", *three_rows)
    page.write_text("# My thesis\n")
    refuses(capsys, report.main, "--row", three_rows[0], "--out", page, says=["--out", "a page"])
    assert page.read_text() == "# My thesis\n"


def test_a_kernel_distance_of_small_subsets_is_not_shown(tmp_path, three_rows):
    """It is another number than the protocol's, which is over subsets of 1,000 images."""
    page = make_page(tmp_path / "p.md", "table2", "cifar100-ir100", *three_rows)
    assert "0.0085 ± 0.0005" in page
    for path in tmp_path.glob("*-?.json"):
        disk.write_json(path, {**disk.read_json(path), "kid_subset_size": 999})
    page = make_page(tmp_path / "p.md", "table2", "cifar100-ir100", *three_rows)
    assert "0.0085" not in page


def test_the_page_says_how_rows_were_generated_otherwise(tmp_path):
    other = {"sampler": "ddpm", "steps": 7, "guidance": 4.0, "weights": "raw", "branch": "general"}
    a, b = write_rows(tmp_path, A=changed(FIRST, {"branch": "full"}), B=changed(FIRST, other))
    page = make_page(tmp_path / "p.md", "table2", "cifar10-ir7", a, b)
    assert "The first row: cifar100" in page and "ddim with 50 steps, guidance 1.5" in page
    assert ("Rows that differ from it: B has sampler ddpm, steps 7, guidance 4, weights raw, "
            "branch general." in page)
    page = make_page(tmp_path / "p.md", "table2", "cifar10-ir7", b)
    assert "raw weights, theta_g alone;" in page and "The first row" not in page


def test_the_demo_page_lists_branches_and_not_guidance(tmp_path):
    first = changed(demo_result(9.0), {"branch": "full"})
    rows = write_rows(tmp_path, CM=first, CM_g=changed(first, {"branch": "general"}),
                      CM_4=changed(first, {"guidance": 4.0}))
    call(report.main, *(word for row in rows for word in ("--row", row)),
         "--out", tmp_path / "page/p.md")
    page = (tmp_path / "page/p.md").read_text()
    assert "Rows that differ from it: CM_g has branch general.\n" in page


CLASSIFIER = {      # what classify.py writes
    "accuracy": 90.0, "num": 9, "num_real": 30, "groups": {}, "classes": {},
    "weights_sha256": "w", "settings": {"dataset": "digits", "ir": 10.0, "epochs": 1, "seed": 0,
                                        "group_rule": "counts"}}


@pytest.mark.parametrize("settings, says", [
    ({"ir": 40.0}, "--ir is 40"), ({"epochs": 2}, "--epochs is 2"),
    ({"group_rule": "thirds"}, "--group-rule is thirds")])
def test_classifiers_of_other_conditions_are_refused(tmp_path, capsys, settings, says):
    rows = write_rows(tmp_path, CE=CLASSIFIER, LA=changed(CLASSIFIER, settings))
    refuses(capsys, report.main, "--paper", "tableG13", "--row", rows[0], "--row", rows[1],
            "--out", tmp_path / "p.md", says=["--row LA", says])


def test_one_classifier_twice_in_a_row_is_refused(tmp_path, capsys):
    write_rows(tmp_path, a=CLASSIFIER, b=CLASSIFIER)
    refuses(capsys, report.main, "--paper", "tableG13", "--row", f"CE={tmp_path}/[ab].json",
            "--out", tmp_path / "p.md", says=["--row CE", "same checkpoint twice"])


@pytest.mark.parametrize("content", [
    "", "[1]", "{", '{"num_real": 3}', '{"num": 3, "num_real": 3, "groups": {}, "settings": {}}',
    '{"num": 3, "num_real": 3, "groups": {}, "classes": {}, "fid": NaN, '
    '"settings": {"reference": "r"}}'])
def test_a_foreign_or_damaged_file_is_no_row(tmp_path, capsys, content):
    (tmp_path / "x.json").write_text(content)
    refuses(capsys, report.main, "--paper", "table2", "--row", f"CM={tmp_path}/x.json",
            "--out", tmp_path / "p.md", says=["--row CM", "x.json", "not a whole result"])


def test_a_seed_that_is_missing_is_not_left_out_silently(tmp_path, capsys):
    row, = write_rows(tmp_path, CM=FIRST)
    refuses(capsys, report.main, "--paper", "table2", "--row", f"{row},{tmp_path}/seed1.json",
            "--out", tmp_path / "p.md", says=["--row CM", "no file", "seed1.json"])


def test_names_are_shown_as_they_are(tmp_path):
    folder = tmp_path / "with [brackets]"
    disk.write_json(folder / "x.json", FIRST)
    page = make_page(tmp_path / "p.md", "table2", "cifar10-ir7", f"a|b\n<i> $x={folder}/x.json")
    assert "\n| a\\|b &lt;i&gt; $x | 1 |" in page and "# a|b <i> $x\n" in page


def test_odd_names_in_the_figures(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(disk, "save_figure", lambda fig, *_: figures.append(fig))
    odd = [r"$\foo$", "_hidden"]
    result = demo_result(9.0)
    result["groups"] = {name: result["groups"]["Few"] for name in odd}
    report.demo_figure([(name, result) for name in odd], tmp_path)
    report.paper_figure([(name, [FIRST]) for name in odd], ["fid"], None, "a title", tmp_path)
    for figure in figures:
        figure.canvas.draw()
    entries = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert [entry.strip() for entry in entries] == ["real against real", r"\$\foo\$", "_hidden"]


def test_a_group_is_not_a_class_of_its_name():
    result = {"fid": 1, "groups": {"Few": {"fid": 2}}, "classes": {"Few": {"fid": 3}}}
    assert report.value_of(result, "Few fid") == 2


def test_grids_of_other_samples_than_those_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples.npz").write_bytes(b"new")
    made = {"samples": f"{tmp_path}/samples.npz", "samples_sha256": "of the old ones"}
    row, = write_rows(tmp_path, CM=changed(demo_result(9.0), made))
    refuses(capsys, report.main, "--row", row, "--out", tmp_path / "page/p.md",
            says=["--row CM", "samples.npz", "run evaluate.py again"])
    # a result of --ckpt names no samples: a grid.png that lies here is not theirs
    row, = write_rows(tmp_path, CM=demo_result(9.0))
    call(report.main, "--row", row, "--out", tmp_path / "page/p.md")
    assert "samples-" not in (tmp_path / "page/p.md").read_text()


def test_pages_show_methods_side_by_side(cm_run, tmp_path, capsys):
    """One picture per guidance strength, of the files that were measured."""
    rows = []
    for name in ("full", "general"):
        call(sample.main, "--ckpt", cm_run / "ckpt.pt", "--branch", name, "--num", 20, "--steps", 1,
             "--device", "cpu", "--out", tmp_path / name)
        rows += write_rows(tmp_path, **{name: changed(demo_result(9.0), {
            "samples": f"{tmp_path}/{name}/samples.npz"})})
    call(report.main, *[w for row in rows for w in ("--row", row)], "--out", tmp_path / "p.md")
    assert "![one class per row](samples-1.5.png)" in (tmp_path / "p.md").read_text()
    assert Image.open(tmp_path / "samples-1.5.png").height == 10 * 60 + 30
    # Samples that are not there, or are of other training images, are named
    record = disk.read_json(tmp_path / "full/samples.json")
    record["data"]["class_counts"][0] += 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other/samples.npz").write_bytes((tmp_path / "full/samples.npz").read_bytes())
    disk.write_json(tmp_path / "other/samples.json", record)
    more = write_rows(tmp_path, **{name: changed(demo_result(9.0), {
        "samples": f"{tmp_path}/{name}/samples.npz"}) for name in ("gone", "other")})
    call(report.main, *[w for row in [*rows, *more] for w in ("--row", row)],
         "--out", tmp_path / "p.md")
    assert "Not shown: gone, other (no samples here" in (tmp_path / "p.md").read_text()
    # On a table's page too, with theta_g and theta from the same noise
    pair = [f"{tmp_path}/{name}/samples.npz" for name in ("general", "full")]
    call(report.main, "--paper", "table7-left", *[w for row in rows for w in ("--row", row)],
         "--pair", *pair, "--out", tmp_path / "table.md")
    assert "Not shown" not in (tmp_path / "table.md").read_text()
    row = rows[0].partition("=")[2]
    disk.write_json(tmp_path / "other.json", changed(disk.read_json(row), {"ckpt_sha256": "x"}))
    refuses(capsys, report.main, "--row", f"CM={tmp_path}/other.json", "--pair", *pair, "--out",
            tmp_path / "q.md", says=["--pair", "checkpoint that no row has"])
    for wrong in (pair[::-1], pair[:1] * 2):
        refuses(capsys, report.main, "--row", rows[0], "--pair", *wrong, "--out",
                tmp_path / "q.md", says=["--pair", "--branch general"])
    page = (tmp_path / "table.md").read_text()
    for file in ("table-theta_g_theta.png", "table-samples-1.5.png"):
        assert f"({file})" in page and (tmp_path / file).exists()


@pytest.mark.parametrize("name, says", [
    ("ckpt.pt", "not a page"), ("page.png", "name a .md file"), ("", "a folder")])
def test_out_must_be_a_page(tmp_path, capsys, name, says):
    (tmp_path / "ckpt.pt").write_bytes(b"PK weights")
    row, = write_rows(tmp_path, CM=FIRST)
    refuses(capsys, report.main, "--paper", "table2", "--row", row, "--out", tmp_path / name,
            says=["--out", says])
    assert (tmp_path / "ckpt.pt").read_bytes() == b"PK weights"


# --------------------------------------------------------------------------------------------------
# The same page as one HTML file

def test_the_html_page_has_all_of_the_markdown_page(tmp_path, three_rows):
    """Its table, marks, commands and the very picture; the settings of every file of a row."""
    as_of(tmp_path, "cifar10")
    make_page(tmp_path / "r.md", "table2", "cifar10-ir50", *three_rows)
    html = (tmp_path / "r.html").read_text()
    row = re.search(r'<tr><th scope="row">OC</th>(.*?)</tr>', html)[1]
    assert re.findall("<td>(.*?)</td>", row)[:2] == ["3", "<i>9.000 ± 0.000</i>"]
    assert "<b>8.500 ± 0.500</b>" in html and "python evaluate.py --seed 0    # CM</pre>" in (
        html.replace("\n</pre>", "</pre>"))
    picture = re.search(r'src="data:image/png;base64,(.*?)"', html)[1]
    assert base64.b64decode(picture) == (tmp_path / "r.png").read_bytes()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
    assert [name for name, _ in data] == ["DDPM", "OC", "CM"]
    assert [file["command"][-1] for file in data[2][1]] == ["0", "1", "2"]
    assert data[0][1][0]["num_real"] == 30 and data[0][1][0]["measured by"].endswith("--seed 0")
    assert "http://" not in html and "https://" not in html


def test_names_in_the_html_page(tmp_path):
    """A name is text, whatever stands in it: no element, no end of a cell."""
    disk.write_json(tmp_path / "a.json", fake_result(3.0, 0))
    name = "<b>a|b</b> & </script>"
    make_page(tmp_path / "r.md", "table2", "none", f"{name}={tmp_path / 'a.json'}")
    html = (tmp_path / "r.html").read_text()
    shown = "&lt;b&gt;a|b&lt;/b&gt; &amp; &lt;/script&gt;"
    assert f'<th scope="row">{shown}</th><td>1</td>' in html
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
    assert data[0][0] == name and html.count("</script>") == 2


def test_markdown_to_html(tmp_path):
    """Sections by headings; those of pictures only stand side by side."""
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    text = "# T\n\none\ntwo **b**\n\n| x | y |\n| --- | ---: |\n| 1 | 2 |\n\n## G\n\n![g](a.png)\n"
    html = page.from_markdown(text, tmp_path)
    assert html.count("<section>") == 1 and html.count('<section class="picture">') == 1
    assert "<h1>T</h1>\n<p>one\ntwo <b>b</b></p>" in html and "<h2>G</h2>" in html
    assert '<th scope="row">1</th><td>2</td>' in html


# --------------------------------------------------------------------------------------------------
# run_all.sh

@pytest.mark.parametrize("target, rows", [
    ("table1", ["DDPM", "CBDM", "CBDM (theta_g + theta_e)", "CBDM (LoRA)", "CM"]),
    ("tableG10", ["DDPM", "CM"])])
def test_run_all_makes_a_table(tmp_path, target, rows):
    """One of the paper's tables on digits; the smaller one twice: then everything is skipped."""
    for path in [*ROOT.glob("*.py"), ROOT / "pages/paper_results.json"]:
        (tmp_path / path.name).symlink_to(path)
    # Not a link: the script works in its own folder
    (tmp_path / "run_all.sh").write_text((ROOT / "run_all.sh").read_text())
    env = {**os.environ, "SCALE": "demo", "STEPS": "4", "NUM": "30", "CUDA_VISIBLE_DEVICES": "",
           "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    command = ["bash", tmp_path / "run_all.sh", target]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / f"out/{target}/digits-ir20/report.md").read_text()
    for row in rows:
        assert f"\n| {row} | 1 | " in page
    assert "do not compare them with the paper's numbers" in page
    if target != "tableG10":
        return
    again = subprocess.run(command, capture_output=True, text=True, env=env)
    assert again.returncode == 0
    assert again.stdout.count("finished, step 4 of 4") == len(rows)
    assert "img/s" not in again.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder in which tables 7, E.2 and G.8 have been made of digits, from beginning to end.

    The commands of run_all.sh run in this process, because starting thirty takes longer than they.
    """
    folder = tmp_path_factory.mktemp("targets")
    env = {"SCALE": "demo", "STEPS": "4", "NUM": "30", "EXTRA": "20", "EPOCHS": "2"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for target in ("table7", "tableE2", "tableG8"):
            code, commands = record(target, env, folder)
            assert code == 0
            for _, script, *flags in commands:
                call(importlib.import_module(script.removesuffix(".py")).main, *flags)
    return folder / "out"


@pytest.mark.parametrize("page, rows, empty", [
    ("table7/digits-ir20/theta_g", ["DDPM", "CM (theta_g)", "CM"], 0),
    # The Inception score is Inception's: a classifier has none; and no KD of so few images
    ("table7/digits-ir20/report", ["DDPM", "OC", "CM", "CM w/o L_Con", "CM w/o L_Div"], 2),
    ("tableE2/digits-ir20/report", ["DDPM", "Group-Expert LoRA", "CM"], 0),
    ("tableG8/digits-ir20/report", ["No augmentation", "DDPM", "CM"], 0)])
def test_a_table_has_a_number_in_every_cell(finished, page, rows, empty):
    text = (finished / f"{page}.md").read_text()
    for row in rows:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row} | 1 | "))
        assert line.count(" - |") == empty
    assert ("do not compare them with the paper's numbers" in text) == ("tableG8" not in page)


def test_the_rows_are_of_the_runs_that_they_name(finished):
    """theta_g, each of L_CM's terms left out, experts, and generated images in the training set."""
    runs = finished / "paper-demo/digits-ir20"
    config = {path.parent.name: disk.read_json(path)["config"]
              for path in runs.glob("*-seed0/config.json")}
    assert (config["cm-no-con-seed0"]["w_con"], config["cm-no-con-seed0"]["w_div"]) == (0, 1)
    assert (config["cm-no-div-seed0"]["w_con"], config["cm-no-div-seed0"]["w_div"]) == (1, 0)
    assert config["experts-seed0"]["experts"] == "group" and not config["experts-seed0"]["cm"]
    of_theta_g = disk.read_json(runs / "cm-seed0/eval-__branch_general.json")
    assert of_theta_g["settings"]["branch"] == "general"
    num = {name: disk.read_json(runs / f"classify-{name}-seed0/result.json")["num"]
           for name in ("plain", "ddpm", "cm")}
    assert num == {"plain": 502, "ddpm": 522, "cm": 522}
