"""The rows of the paper that runs correspond to, and the tables of runs beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.data.convert import CONVERTERS
from lvlm_clorae.data.convert.m2e2 import SPEC as M2E2
from lvlm_clorae.training.config_loading import make_config
from tests.helpers.runs import make_run
from tools import paper
from tools.paper import DATASET_TASKS, ROWS, PaperRow, compare_with_paper, paper_row, sheets_with_paper, unlike


def row(name: str) -> PaperRow:
    [found] = [row for row in ROWS if row.name == name]
    return found


def test_all_is_the_sum_except_for_two_misprints() -> None:
    """C-LoRAE base is off by 0.4; large has 0.5 more for MED in Table 2 than in Table 3."""
    off = {}
    for found in ROWS:
        if "All" in found.f1:
            gap = round(found.f1["All"] - sum(found.f1[dataset_task] for dataset_task in DATASET_TASKS), 1)
            off |= {found.name: gap} if gap else {}
    assert off == {"C-LoRAE base": -0.4, "C-LoRAE large": -0.5}


def test_rows_are_distinct_and_have_known_datasets() -> None:
    assert len({row.name for row in ROWS}) == len({row.recipe for row in ROWS}) == len(ROWS) == 21
    assert {dataset_task.partition("/")[0] for dataset_task in DATASET_TASKS} <= set(CONVERTERS)
    assert [dataset_task for dataset_task in DATASET_TASKS if dataset_task.startswith("m2e2/")] == [
        f"m2e2/{subtask}" for subtask in M2E2.subtasks
    ]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"model": "flan-t5-base"}, "C-LoRAE base"),
        ({"model": "google/flan-t5-xl"}, "C-LoRAE xl"),
        ({"model": "/data/flan-t5-large", "beta": 0.0}, "C-LoRAE large, no MIM"),
        ({"model": "flan-t5-base", "beta": 0.0}, None),
        ({"model": "flan-t5-large", "beta": 0.0, "use_gate": False}, None),
        ({"model": "flan-t5-large", "adapter": "full"}, "UMIE large"),
        ({"model": "flan-t5-xl", "adapter": "lora"}, None),
        ({"model": "flan-t5-base", "adapter": "none"}, None),
        ({"model": "demo"}, None),
        (
            {"model": "flan-t5-base", "hold_out": ["mre_v2", "m2e2", "twitter17"]},
            "C-LoRAE base, twitter17 and mre_v2 held out",
        ),
        ({"model": "flan-t5-base", "hold_out": ["mre_v2"]}, None),
    ],
)
def test_a_run_corresponds_to_the_row_of_its_system(settings: dict[str, Any], name: str | None) -> None:
    found = paper_row(make_config(settings))
    assert (found.name if found else None) == name


def test_differences_from_the_recipe() -> None:
    large, umie = row("C-LoRAE large"), row("UMIE large")
    settings: dict[str, Any] = {"model": "flan-t5-large", "shards": "elsewhere", "hold_out": ["m2e2"], "seed": 3}
    assert unlike(make_config(settings), large) == {}
    assert unlike(
        make_config({**settings, "lora_rank": 32, "fusion": "gated", "dataloader_num_workers": 4}), large
    ) == {
        "lora_rank": 32,
        "fusion": "gated",
    }
    assert unlike(make_config({**settings, "hold_out": []}), large) == {"hold_out": []}
    assert unlike(make_config({**settings, "adapter": "full", "fusion": "gated", "loss_weighting": "none"}), umie) == {}
    assert unlike(make_config({**settings, "beta": 0.0}), row("C-LoRAE large, no MIM")) == {}
    unseen = row("C-LoRAE large, twitter17 and mre_v2 held out")
    assert unlike(make_config({**settings, "hold_out": ["mre_v2", "m2e2", "twitter17"]}), unseen) == {}


def test_the_default_columns_beside_the_paper_are_the_papers(tmp_path: Path) -> None:
    f1 = {"swig/trigger": 1.0, **{name: 10.0 + n for n, name in enumerate(DATASET_TASKS)}}
    config = {"model": "flan-t5-large", "shards": "shards/real", "hold_out": ["m2e2"]}
    runs = [
        make_run(tmp_path / "whole", f1, **config),
        make_run(tmp_path / "gate", f1, **config, use_gate=False, lora_rank=32),
        make_run(tmp_path / "xl", f1, **config, adapter="none"),
    ]
    table, papers = compare_with_paper(runs)
    assert table.dataset_tasks == list(DATASET_TASKS)
    whole, gate, none = table.rows
    assert whole.mean("All") == sum(range(10, 17))
    assert [found and found.name for found in papers.values()] == ["C-LoRAE large", "C-LoRAE large, no gate", None]
    _, differences = sheets_with_paper(table, papers)
    assert [line[0].strip() for line in differences.rows] == [
        gate.name,
        "paper, Table 3: C-LoRAE large, no gate",
        none.name,
    ], "the reference has no difference to itself"
    assert differences.rows[1][-1] == "-13.4"
    dropped, deviates, unknown = table.notes
    assert "swig/trigger" in dropped
    assert deviates.startswith(gate.name)
    assert deviates.endswith("rank=32")
    assert unknown.startswith(none.name)


def test_runs_on_other_data_keep_their_columns_beside_the_paper(tmp_path: Path) -> None:
    table, _ = compare_with_paper([make_run(tmp_path / "demo", {"a/entity": 50.0, "b/relation": 20.0})])
    assert table.dataset_tasks == ["a/entity", "b/relation"]
    assert len(table.notes) == 1


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    paper.main([str(word) for word in words])
    return capsys.readouterr().out


def test_the_papers_figures_are_printed_below_each_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"model": "flan-t5-large", "hold_out": ["m2e2"], "shards": "shards/real"}
    f1 = dict.fromkeys(DATASET_TASKS, 50.0)
    one = make_run(tmp_path / "one", f1, **common)
    two = make_run(tmp_path / "two", f1, **common, beta=0)
    out = printed(capsys, one, two)
    lines = [re.split(r" *[│] *", line)[1:-1] for line in out.splitlines() if "│" in line]
    assert lines[1][:3] == ["paper, Table 2: C-LoRAE large", "", "39.9"]
    assert lines[1][3:] == ["75.9", "88.9", "89.3", "89.2", "82.8", "64.5", "31.2", "521.3"]
    assert lines[-1] == ["paper, Table 3: C-LoRAE large, no MIM", *"-0.5 -0.7 -1.2 -2.1 -0.8 -0.7 -1.0 -6.5".split()]
    content = json.loads(printed(capsys, one, "--json"))
    assert content["rows"][0]["paper"]["f1"]["All"] == 521.3


def test_the_best_is_emphasised_among_runs_only(tmp_path: Path) -> None:
    f1 = dict.fromkeys(DATASET_TASKS, 50.0)
    runs = [
        make_run(tmp_path / str(gate), {**f1, DATASET_TASKS[0]: 50.0 - gate}, model="flan-t5-large", use_gate=gate)
        for gate in (True, False)
    ]
    scores, _ = sheets_with_paper(*compare_with_paper(runs))
    assert {(scores.rows[row][0], scores.columns[column]) for row, column in scores.best} >= {
        ("C-LoRAE, no gate", DATASET_TASKS[0]),
        ("C-LoRAE, no gate", "All"),
    }
    assert not any(scores.rows[row][0].startswith("  paper") for row, _ in scores.best)


def test_the_radar_is_written_and_never_over_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"a/x": 50.0, "b/y": 20.0, "c/z": 1.0}
    runs = [make_run(tmp_path / "one", scores), make_run(tmp_path / "two", {"a/x": 1.0}, adapter="full")]
    out = printed(capsys, *runs, "--png", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"not plotted: full fine-tuning", out)
    (tmp_path / "plot.png").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        paper.main([*map(str, runs), "--png", str(tmp_path / "plot.png")])
    out, err = capsys.readouterr()
    assert (out, (tmp_path / "plot.png").read_text()) == ("", "mine")
    assert "plot.png" in err
