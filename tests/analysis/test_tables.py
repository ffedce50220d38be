"""The printed and written forms of a table of runs, and ``lvlm-clorae compare``."""

from __future__ import annotations

import csv
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from lvlm_clorae.analysis.compare import collect, compare
from lvlm_clorae.analysis.tables import sheets, write_sweep
from lvlm_clorae.sweep.status import run_statuses
from tests.helpers.commands import Run, runner
from tests.helpers.launch import REPOSITORY
from tests.helpers.runs import make_run
from tests.helpers.sweeps import finish, mixed_sweep, sweep_of

pytestmark = pytest.mark.usefixtures("no_squeue")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, "compare")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """C-LoRAE with two seeds, LoRA, a run without the second column, and one that has not ended."""
    (tmp_path / "open").mkdir()
    return [
        make_run(tmp_path / "c0", {"a/x": 50.0, "b/y": 20.0, "c/z": 1.0}),
        make_run(tmp_path / "c1", {"a/x": 56.0, "b/y": 22.0, "c/z": 3.0}, seed=1),
        make_run(tmp_path / "lora", {"a/x": 40.0, "b/y": 21.04, "c/z": 2.0}, adapter="lora"),
        make_run(tmp_path / "full", {"a/x": 60.0, "c/z": 2.0}, adapter="full"),
        tmp_path / "open",
    ]


def test_scores_and_differences_are_printed(runs: list[Path], run: Run) -> None:
    out, err = run(*runs)
    assert re.search(r"system +┃ seeds ┃ +x ┃ +y ┃ +z ┃ +All ┃", out), "no column of parameters if none are known"
    assert re.search(r"C-LoRAE +│ +2 │ 53.0 ± 4.2 │ 21.0 ± 1.4 │ +2.0 ± 1.4 │ 76.0 ± 7.1 │", out)
    assert re.search(r"LoRA +│ +-13.0 │ +\+0.0 │ +\+0.0 │ +-13.0 │", out)
    assert re.search(r"full fine-tuning +│ +\+7.0 │ +│ +\+0.0 │ +│", out)
    assert str(runs[-1]) in out, "the run that has not ended is named"
    assert err == ""


def test_the_best_of_each_column_is_emphasised(runs: list[Path]) -> None:
    scores, _ = sheets(compare(runs))
    bold = {(scores.rows[row][0], scores.columns[column]) for row, column in scores.best}
    rounded_alike = {("C-LoRAE", "b/y"), ("LoRA", "b/y")}
    assert bold >= {("full fine-tuning", "a/x"), ("C-LoRAE", "All"), *rounded_alike}
    assert not {("full fine-tuning", "b/y"), ("full fine-tuning", "All")} & bold


def test_one_row_has_no_differences_and_no_best(runs: list[Path]) -> None:
    [scores] = sheets(compare(runs[:2]))
    assert scores.best == set()


def test_markdown_holds_the_tables_and_notes_go_to_standard_error(runs: list[Path], tmp_path: Path, run: Run) -> None:
    out, err = run(*runs[:3], tmp_path / "open", "--markdown")
    tables = [[line for line in part.splitlines() if line.startswith("|")] for part in out.split("difference to")]
    assert [len(lines) for lines in tables] == [4, 3]
    assert len({line.count("|") for line in tables[0]}) == 1, "each line has the same number of cells"
    assert tables[0][2] == "| C-LoRAE | 2 | **53.0 ± 4.2** | **21.0 ± 1.4** | **2.0 ± 1.4** | **76.0 ± 7.1** |"
    assert str(tmp_path / "open") in err
    assert str(tmp_path / "open") not in out


def test_markdown_escapes_a_bar_in_a_name(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(rank), {"a/x": 1.0}, template="a|b" if rank else None) for rank in (0, 1)]
    text = next(sheets(compare(runs))).markdown()
    assert r"template=a\|b" in text


def test_json_holds_every_row_unrounded(runs: list[Path], run: Run) -> None:
    content = json.loads(run(*runs, "--json")[0])
    assert content["dataset_tasks"] == ["a/x", "b/y", "c/z"]
    assert content["reference"] == "C-LoRAE"
    first, _, full = content["rows"]
    assert (first["seeds"], first["runs"]) == ([0, 1], [str(path) for path in runs[:2]])
    assert first["scores"]["a/x"] == {"mean": 53, "sd": pytest.approx(18**0.5), "values": [50, 56], "difference": 0}
    assert full["scores"]["All"] == {"mean": None, "sd": None, "values": [], "difference": None}
    assert full["settings"]["adapter"] == "full"
    assert any(str(runs[-1]) in note for note in content["notes"])


@pytest.mark.integration
def test_a_table_imports_no_heavy_library() -> None:
    code = (
        "import sys, lvlm_clorae.analysis.tables, lvlm_clorae.analysis.plots\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'matplotlib', 'rich', 'peft'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_name_is_not_read_as_markup(tmp_path: Path, run: Run) -> None:
    make_run(tmp_path / "[b]", {"a/x": 1.0})
    make_run(tmp_path / "[", {"a/x": 1.0})
    assert f"C-LoRAE ({tmp_path}/[b])" in run(tmp_path / "[b]", tmp_path / "[")[0]


def test_mistakes_end_with_code_2(runs: list[Path], tmp_path: Path, run: Run) -> None:
    assert str(tmp_path / "none") in run(tmp_path / "none", code=2)[1]
    assert str(tmp_path / "open") in run(tmp_path / "open", code=2)[1]
    assert "--markdown" in run(*runs, "--json", "--markdown", code=2)[1]
    assert "a/x" in run(*runs, "--dataset_tasks", "ax", code=2)[1]


def test_a_sweep_is_written_as_csv_json_and_plots(tmp_path: Path) -> None:
    sweep = mixed_sweep(tmp_path)
    table = collect(sweep, run_statuses(sweep.sweep_runs))
    paths = write_sweep(sweep, table)
    names = ["sweep.csv", "sweep.json", "sweep.png", "sweep-dataset-tasks.png"]
    assert paths == [tmp_path / "runs" / name for name in names]
    with open(paths[0], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["name"], rows[0]["adapter"], rows[0]["lora_rank"], rows[0]["seeds"]) == (
        "lora_rank=8",
        "clorae",
        "8",
        "3",
    )
    assert (float(rows[0]["All_mean"]), float(rows[0]["All_sd"]), rows[2]["All_sd"]) == (78, 7, "")
    content = json.loads(paths[1].read_text(encoding="utf-8"))
    assert content["sweep"] == str(sweep.path)
    assert content["rows"][1]["settings"] == {"adapter": "clorae", "lora_rank": 16}
    entity = content["rows"][1]["scores"]["a/entity"]
    assert (entity["mean"], entity["sd"], entity["values"]) == (71, statistics.stdev([70, 72]), [70, 72])
    assert [entry["number"] for entry in content["unfinished"]] == [5, 8]
    assert len(content["notes"]) == 1
    assert not list((tmp_path / "runs").glob(".*")), "no temporary file is left"
    assert write_sweep(sweep, table) == paths, "its own files are replaced"


def test_a_sweep_of_seeds_alone_has_no_plot(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, seeds=[0, 1])
    for sweep_run in sweep.sweep_runs:
        finish(sweep_run, a_entity=50.0 + sweep_run.number)
    table = collect(sweep, run_statuses(sweep.sweep_runs))
    assert (table.keys, table.rows[0].mean("All")) == ([], 50.5)
    assert [path.name for path in write_sweep(sweep, table)] == ["sweep.csv", "sweep.json"]
    [sheet] = sheets(table)
    assert sheet.rows[0][-1] == "50.5 ± 0.7"
