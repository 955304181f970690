"""report.py's paper tables, the paper's numbers, and run_all.sh end to end at demo scale."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT, call
from test_mistakes import refuses

import report
import runtime

PAPER = runtime.read_json(ROOT / "paper_results.json")["tables"]


def test_the_papers_numbers():
    """The number of tables and a handful of cells, read off the paper by hand; every row as long as its columns."""
    assert len(PAPER) == 19 and all(t["settings"] for t in PAPER.values())
    cell = lambda t, s, row, column: PAPER[t]["settings"][s]["rows"][row][PAPER[t]["settings"][s]["columns"].index(column)]
    assert cell("table1", "cifar100-ir100", "CBDM (LoRA)", "fid") == 11.424
    assert cell("table2", "cifar10-ir50", "+ADA", "is") == [9.28, 0.21]
    assert cell("table3", "cifar100-ir100", "CM", "Few fid") == [18.729, 0.141]
    assert cell("table4", "celebahq-ir100", "OC", "Male fid") == [13.962, 0.221]
    assert cell("table5", "inat2018-64", "CM", "kid") == 0.0020
    assert cell("table7-left", "cifar100-ir100", "CM (theta_g)", "Few fid") == [29.357, 0.318]
    assert cell("table7-right", "cifar100-ir100", "CM w/o L_Con", "recall") == [0.50, 0.01]
    assert cell("tableG10", "cifar100-ir100", "CM", "fid") == 8.033
    for table in PAPER.values():
        for setting in table["settings"].values():
            assert all(len(row) == len(setting["columns"]) for row in setting["rows"].values())
    for figure in ("fig4a", "fig4b", "fig4c", "fig4d"):         # no numbers of their own: those of the same runs in the tables
        for name, setting in PAPER[figure]["settings"].items():
            for row, values in setting["rows"].items():
                assert values[-1] == cell("table2", name, row.removesuffix(", 1 2 2 2"), "fid")
                if values[0] is not None and len(values) > 1:
                    assert values[2] == cell("table3", name, row.removesuffix(", 1 2 2 2"), "Few fid")


def fake_result(fid, seed, dtype="fid"):
    part = lambda v: {dtype: v, "kid": v / 1000, "recall": 0.5, "is": 9.0, "num": 20, "num_real": 30}
    return {**part(fid), "splits": {n: part(fid + k) for k, n in enumerate(("Many", "Medium", "Few"), 3)}, "classes": {},
            "command": f"python evaluate.py --seed {seed}", "settings": {"dataset": "cifar100", "step": 9, "sampler": "ddim", "steps": 50, "guidance": 1.5, "weights": "ema",
                         "reference": "r", "command": f"python train.py --seed {seed}"}}


def test_table_has_means_deviations_the_paper_and_marks(tmp_path, capsys):
    for name, values in {"ddpm": [10, 11, 12], "oc": [9, 9, 9], "cm": [8, 8.5, 9]}.items():
        for seed, v in enumerate(values):
            runtime.write_json(tmp_path / f"{name}-{seed}.json", fake_result(v, seed))
    files = {"DDPM": f"{tmp_path}/ddpm-*.json", "OC": f"{tmp_path}/oc-0.json,{tmp_path}/oc-[12].json,", "CM": f"{tmp_path}/cm-*.json"}
    rows = [f for name, pattern in files.items() for f in ("--row", f"{name}={pattern}")]
    call(report.main, "--paper", "table3", "--setting", "cifar100-ir100", *rows, "--out", tmp_path / "page/report.md")
    page = (tmp_path / "page/report.md").read_text()
    lines = {line.split(" | ")[0][2:]: line for line in page.splitlines() if line.startswith("| ")}
    assert "| CM | 3 | **11.500 +- 0.500** | 11.713 +- 0.247 |" in lines["CM"] and "**8.500 +- 0.500** | 7.519 +- 0.132" in lines["CM"]
    assert "*9.000 +- 0.000* | 8.309 +- 0.233" in lines["OC"] and "| 11.000 +- 1.000 | 10.163" in lines["DDPM"]
    assert "python train.py --seed 0    # CM\npython evaluate.py --seed 0    # CM" in page and (tmp_path / "page/report.pdf").exists() and (tmp_path / "page/report.png").exists()
    call(report.main, "--paper", "tableG10", "--setting", "cifar10-ir7", *rows[:2], *rows[4:], "--out", tmp_path / "two.md")
    assert "| CM | 3 | **8.500 +- 0.500**" in (tmp_path / "two.md").read_text()              # the better of two rows is marked as well
    call(report.main, "--paper", "fig4a", "--setting", "cifar100-ir100", "--row", f"+RS={tmp_path}/ddpm-*.json", "--out", tmp_path / "figure.md")
    assert "| +RS | 3 | 14.000 +- 1.000 | - |" in (page := (tmp_path / "figure.md").read_text()) and "| 11.000 +- 1.000 | 11.432 +- 0.287 |" in page
    call(report.main, "--paper", "table2", "--setting", "cifar10-ir7", *rows, "--out", tmp_path / "other.md")
    assert "paper" not in (tmp_path / "other.md").read_text().split("##")[0].split("\n")[4]      # no such setting in the paper
    refuses(capsys, report.main, "--paper", "table99", *rows, "--out", tmp_path / "x.md", says=["--paper table99", "table2"])


def test_rows_of_different_budgets_are_called_so(tmp_path, capsys):
    short, long = fake_result(9, 0), fake_result(8, 0)
    long["settings"]["step"] = 300_000
    for name, r in (("short", short), ("long", long)):
        runtime.write_json(tmp_path / f"{name}.json", r)
    rows = [f for name in ("short", "long") for f in ("--row", f"{name}={tmp_path}/{name}.json")]
    call(report.main, "--paper", "table2", "--setting", "cifar10-ir7", *rows, "--out", tmp_path / "p.md")
    assert "Not one budget: the rows' checkpoints are at steps 9, 300,000." in (tmp_path / "p.md").read_text()
    call(report.main, "--paper", "table2", "--setting", "cifar10-ir7", *rows[:2], "--out", tmp_path / "p.md")
    assert "Not one budget" not in (tmp_path / "p.md").read_text()
    del short["settings"]["guidance"]
    runtime.write_json(tmp_path / "short.json", {**short, "fd": 1.0, "floor": 0.5})
    refuses(capsys, report.main, *rows[:2], "--out", tmp_path / "p.md", says=["--row short", "sample.py"])


def test_a_row_of_someone_elses_images(tmp_path):
    """What evaluate.py measured on images that sample.py did not draw: no sampler, no step."""
    runtime.write_json(tmp_path / "peer.json", {**fake_result(7.5, 0), "settings": {"samples": "peer.npz", "reference": "cifar100, full training set"}})
    call(report.main, "--paper", "table3", "--setting", "cifar100-ir100", "--row", f"Peer={tmp_path / 'peer.json'}", "--out", tmp_path / "p.md")
    assert "20 samples against 30 real images (cifar100" in (tmp_path / "p.md").read_text()


def test_paired_differences():
    results = lambda values: [{"fid": 0, "accuracy": v} for v in values]
    rows = [("CE", results([10, 20, 30])), ("CE + CM", results([12, 21, 33])), ("LA", results([1]))]
    text = report.paired_differences(rows, ["accuracy"])
    half = 4.302653 * 1.0 / 3 ** 0.5                        # t quantile of two degrees of freedom; deviation of 2, 1, 3 is 1
    assert f"| CE + CM against CE | +2.00 ({2 - half:+.2f} to {2 + half:+.2f}) |" in text and "LA" not in text
    assert [report.without_cm(n) for n in ("CM on +ADA", "CM", "CM, 1 2 2", "CM (theta_g)", "CM w/o L_Div", "OC")] == ["+ADA", "OC", "OC, 1 2 2"] + [None] * 3


@pytest.mark.parametrize("target, rows", [
    ("table1", ["DDPM", "CBDM", "CBDM (theta_g + theta_e)", "CBDM (LoRA)", "CM"]), ("tableG10", ["DDPM", "CM"])])
def test_run_all_makes_a_table(tmp_path, target, rows):
    """One of the paper's tables on digits, from nothing, and the smaller one again: then everything is skipped."""
    for f in [*ROOT.glob("*.py"), ROOT / "run_all.sh", ROOT / "paper_results.json"]:
        (tmp_path / f.name).symlink_to(f)
    (tmp_path / "run_all.sh").unlink()
    (tmp_path / "run_all.sh").write_text((ROOT / "run_all.sh").read_text())
    env = {**os.environ, "SCALE": "demo", "STEPS": "4", "NUM": "30", "CUDA_VISIBLE_DEVICES": "",
           "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    command = ["bash", tmp_path / "run_all.sh", target]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / f"out/{target}/digits-ir20/report.md").read_text()
    for row in rows:
        assert f"\n| {row} | 1 | " in page
    assert "nothing here compares with the paper" in page
    if len(rows) > 2:
        return
    again = subprocess.run(command, capture_output=True, text=True, env=env)
    assert again.returncode == 0 and again.stdout.count("finished, step 4 of 4") == len(rows) and "img/s" not in again.stdout
