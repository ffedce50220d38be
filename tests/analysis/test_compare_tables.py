"""What ``lvlm-clorae compare`` prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lvlm_clorae import cli
from lvlm_clorae.analysis.compare import compare
from lvlm_clorae.analysis.compare_tables import sheets
from lvlm_clorae.analysis.paper import UNITS
from tests.analysis.runs import make_run
from tests.launch import REPOSITORY

Run = Callable[..., "tuple[str, str]"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; returns what it printed, and its messages."""

    def _run(*argv: object, code: int = 0) -> tuple[str, str]:
        assert cli.main(["compare", *map(str, argv)]) == code
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    return _run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """C-LoRAE with two seeds, LoRA, and a run without the second column; one has not ended."""
    (tmp_path / "open").mkdir()
    return [
        make_run(tmp_path / "c0", {"a/x": 50.0, "b/y": 20.0, "c/z": 1.0}),
        make_run(tmp_path / "c1", {"a/x": 56.0, "b/y": 22.0, "c/z": 3.0}, seed=1),
        make_run(tmp_path / "lora", {"a/x": 40.0, "b/y": 21.04, "c/z": 2.0}, adapter="lora"),
        make_run(tmp_path / "full", {"a/x": 60.0, "c/z": 2.0}, adapter="full"),
        tmp_path / "open",
    ]


def test_both_forms(runs: list[Path], run: Run) -> None:
    out, err = run(*runs)
    assert re.search(r"system +┃ seeds ┃ +x ┃ +y ┃ +z ┃ +All ┃", out), "no column of parameters where none are known"
    assert re.search(r"C-LoRAE +│ +2 │ 53.0 ± 4.2 │ 21.0 ± 1.4 │ +2.0 ± 1.4 │ 76.0 ± 7.1 │", out)
    assert "difference to C-LoRAE" in out
    assert re.search(r"LoRA +│ +-13.0 │ +\+0.0 │ +\+0.0 │ +-13.0 │", out)
    assert re.search(r"full fine-tuning +│ +\+7.0 │ +│ +\+0.0 │ +│", out)
    assert "no All of full fine-tuning: it has no scores of b/y" in out
    assert "left out: " in out
    assert err == ""


def test_the_best_of_each_column_stands_out(runs: list[Path]) -> None:
    scores, _ = sheets(compare(runs))
    bold = {(scores.rows[row][0], scores.columns[column]) for row, column in scores.best}
    shown_alike = {("C-LoRAE", "b/y"), ("LoRA", "b/y")}
    assert bold >= {("full fine-tuning", "a/x"), ("C-LoRAE", "All"), *shown_alike}
    assert not {("full fine-tuning", "b/y"), ("full fine-tuning", "All")} & bold


def test_one_system_has_no_differences_and_no_best(runs: list[Path]) -> None:
    [scores] = sheets(compare(runs[:2]))
    assert scores.best == set()


def test_markdown(runs: list[Path], tmp_path: Path, run: Run) -> None:
    out, err = run(*runs[:3], tmp_path / "open", "--markdown")
    tables = [[line for line in part.splitlines() if line.startswith("|")] for part in out.split("difference to")]
    assert [len(lines) for lines in tables] == [4, 3]
    assert len({line.count("|") for line in tables[0]}) == 1, "as many cells in every line"
    assert tables[0][2] == "| C-LoRAE | 2 | **53.0 ± 4.2** | **21.0 ± 1.4** | **2.0 ± 1.4** | **76.0 ± 7.1** |"
    assert "left out: " in err
    assert "left out" not in out, "what is piped into a file is the tables alone"


def test_markdown_of_a_name_with_a_bar(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(rank), {"a/x": 1.0}, template="a|b" if rank else None) for rank in (0, 1)]
    text = next(sheets(compare(runs))).markdown()
    assert r"template=a\|b" in text


def test_json(runs: list[Path], run: Run) -> None:
    content = json.loads(run(*runs, "--json", "--paper")[0])
    assert content["units"] == ["a/x", "b/y", "c/z"]
    assert content["reference"] == "C-LoRAE"
    first, _, full = content["systems"]
    assert (first["seeds"], first["runs"]) == ([0, 1], [str(path) for path in runs[:2]])
    assert first["scores"]["a/x"] == {"mean": 53, "sd": pytest.approx(18**0.5), "values": [50, 56], "difference": 0}
    assert full["scores"]["All"] == {"mean": None, "sd": None, "values": [], "difference": None}
    assert (full["settings"]["adapter"], full["paper"]) == ("full", None)
    assert any(note.startswith("left out") for note in content["notes"])


def test_the_papers_figures_stand_below(tmp_path: Path, run: Run) -> None:
    common = {"model": "flan-t5-large", "hold_out": ["m2e2"], "shards": "shards/real"}
    f1 = dict.fromkeys(UNITS, 50.0)
    one = make_run(tmp_path / "one", f1, **common)
    two = make_run(tmp_path / "two", f1, **common, beta=0)
    out, _ = run(one, two, "--paper")
    lines = [re.split(r" *[│] *", line)[1:-1] for line in out.splitlines() if "│" in line]
    assert lines[1][:3] == ["paper, Table 2: C-LoRAE large", "", "39.9"]
    assert lines[1][3:] == ["75.9", "88.9", "89.3", "89.2", "82.8", "64.5", "31.2", "521.3"]
    assert lines[-1] == ["paper, Table 3: C-LoRAE large, no MIM", *"-0.5 -0.7 -1.2 -2.1 -0.8 -0.7 -1.0 -6.5".split()]
    content = json.loads(run(one, "--paper", "--json")[0])
    assert content["systems"][0]["paper"]["f1"]["All"] == 521.3


def test_nothing_heavy_is_imported_for_a_table() -> None:
    code = (
        "import sys, lvlm_clorae.analysis.compare_tables, lvlm_clorae.analysis.radar\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'matplotlib', 'rich', 'peft'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_name_is_no_markup(tmp_path: Path, run: Run) -> None:
    make_run(tmp_path / "[b]", {"a/x": 1.0})
    make_run(tmp_path / "[", {"a/x": 1.0})
    assert f"C-LoRAE ({tmp_path}/[b])" in run(tmp_path / "[b]", tmp_path / "[")[0]


def test_mistakes(runs: list[Path], tmp_path: Path, run: Run) -> None:
    assert "no such run directory" in run(tmp_path / "none", code=2)[1]
    assert "None of these is a run" in run(tmp_path / "open", code=2)[1]
    assert "not allowed with" in run(*runs, "--json", "--markdown", code=2)[1]
    assert 'Did you mean "a/x"?' in run(*runs, "--units", "ax", code=2)[1]
    (tmp_path / "plot.png").write_text("mine")
    out, err = run(*runs, "--png", tmp_path / "plot.png", code=2)
    assert (out, (tmp_path / "plot.png").read_text()) == ("", "mine")
    assert "is not overwritten" in err


def test_the_picture_is_written_beside_the_table(runs: list[Path], tmp_path: Path, run: Run) -> None:
    out, _ = run(*runs, "--png", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "not drawn: full fine-tuning, which lacks a column" in out
