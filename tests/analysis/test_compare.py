"""Runs beside one another: grouped by settings, nothing silently left out."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.analysis.compare import WEIGHTS, compare, trained_parameters
from lvlm_clorae.analysis.paper import UNITS
from lvlm_clorae.errors import UserError
from tests.analysis.runs import make_run

A, B = {"a/entity": 50.0, "b/relation": 20.0}, {"a/entity": 56.0, "b/relation": 22.0}


def test_seeds_become_a_mean(tmp_path: Path) -> None:
    """Whatever they may differ in besides."""
    runs = [
        make_run(tmp_path / "0", A),
        make_run(tmp_path / "gate", A, use_gate=False),
        make_run(tmp_path / "1", B, seed=1, workers=2, output="elsewhere", resume="auto"),
    ]
    found = compare(runs)
    assert [system.name for system in found.systems] == ["C-LoRAE", "C-LoRAE, no gate"]
    first = found.systems[0]
    assert first.runs == [runs[0], runs[2]]
    assert found.columns == ["a/entity", "b/relation", "All"]
    assert [first.row.mean(column) for column in found.columns] == [53, 21, 74]
    assert first.row.sd("All") == pytest.approx(8 / math.sqrt(2))
    assert [found.difference(found.systems[1], column) for column in found.columns] == [-3, -1, -4]
    assert found.notes == []


def test_a_run_that_is_given_twice_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", A)
    (tmp_path / "link").symlink_to(run)
    [system] = compare([run, tmp_path / "link", tmp_path / "run" / ".." / "run"]).systems
    assert system.runs == [run]


def test_the_same_seed_again_is_another_row(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, f1) for name, f1 in (("before", A), ("after", B))]
    found = compare(runs)
    assert [system.name for system in found.systems] == [f"C-LoRAE ({run})" for run in runs]
    assert found.difference(found.systems[1], "All") == 8


def test_the_reference_is_chosen_by_any_of_its_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "lora", A, adapter="lora"), *(make_run(tmp_path / n, B, seed=int(n)) for n in "01")]
    assert compare(runs).reference.name == "LoRA"
    assert compare(runs, reference=runs[2]).reference.name == "C-LoRAE"
    with pytest.raises(UserError, match="is none of the runs that are shown") as told:
        compare(runs[:2], reference=runs[2])
    assert str(runs[0]) in str(told.value)


def test_other_datasets_leave_blanks_and_no_all(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one", A), make_run(tmp_path / "two", {"a/entity": 1.0, "c/x": 2.0}, rank=8)]
    found = compare(runs)
    assert found.units == ["a/entity", "b/relation", "c/x"]
    one, two = found.systems
    assert (one.row.mean("All"), two.row.mean("b/relation"), found.difference(two, "b/relation")) == (None, None, None)
    assert found.difference(two, "a/entity") == -49
    assert [note.partition(":")[0] for note in found.notes] == ["no All of C-LoRAE", "no All of C-LoRAE, rank=8"]
    assert "it has no scores of b/relation (" in found.notes[1]


def test_columns_are_chosen_and_all_is_their_sum(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one", A), make_run(tmp_path / "two", {"b/relation": 3.0}, rank=8)]
    found = compare(runs, units=["b/relation", "b/relation"])
    assert [system.row.mean("All") for system in found.systems] == [20, 3]
    assert found.notes == ["not among the columns, nor in All: a/entity"]
    with pytest.raises(UserError, match=r'no run has scores of "b/relatoin"\. Did you mean "b/relation"\?'):
        compare(runs, units=["b/relatoin"])


def test_all_is_the_sum_of_the_columns_whatever_the_file_says(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", A)
    content = json.loads((run / "scores.json").read_text())
    (run / "scores.json").write_text(json.dumps({**content, "all": 99.0}))
    assert compare([run]).systems[0].row.mean("All") == 70


def broken(tmp_path: Path, what: str) -> Path:
    path = tmp_path / "broken"
    if what == "file":
        path.write_text("a file")
    elif what == "empty":
        path.mkdir()
    else:
        make_run(path, A)
        if what == "unfinished":
            (path / "scores.json").unlink()
        elif what == "damaged":
            (path / "scores.json").write_text('{"all": 1')
        elif what == "folder":
            (path / "scores.json").unlink()
            (path / "scores.json").mkdir()
        elif what == "foreign":
            (path / "config.yaml").write_text("speed: 3")
        else:
            (path / "config.yaml").write_bytes(b"\xff{")
    return path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("file", "is no run directory"),
        ("empty", "is no run directory"),
        ("unfinished", "scores.json: there is none; the run has not ended"),
        ("damaged", "scores.json: is damaged: no JSON"),
        ("folder", "scores.json: cannot be read"),
        ("foreign", 'There is no setting "speed"'),
        ("unreadable", "is not valid YAML"),
    ],
)
def test_what_is_left_out_is_told(what: str, message: str, tmp_path: Path) -> None:
    bad, good = broken(tmp_path, what), make_run(tmp_path / "good", A)
    found = compare([bad, good])
    assert [system.runs for system in found.systems] == [[good]]
    [note] = found.notes
    assert note.startswith("left out: ")
    assert message in note
    with pytest.raises(UserError, match="None of these is a run") as told:
        compare([bad])
    assert message in str(told.value)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        compare([make_run(tmp_path / "run", A), tmp_path / "rnu"])


def weights(run: Path, header: bytes, length: int | None = None) -> Path:
    path = run / WEIGHTS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    return run


def test_trained_parameters_are_counted_from_the_header(tmp_path: Path) -> None:
    tensors = {"a": {"shape": [3, 4]}, "b": {"shape": []}, "__metadata__": {"format": "pt"}}
    run = weights(make_run(tmp_path / "run", A), json.dumps(tensors).encode())
    assert compare([run]).systems[0].trained == 13
    assert trained_parameters(tmp_path) is None


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b'{"a": 3}', b'{"a": {"shape": "x"}}', b"\xff", b"[" * 99999])
def test_a_damaged_adapter_has_no_count(header: bytes, tmp_path: Path) -> None:
    assert trained_parameters(weights(tmp_path, header)) is None
    assert trained_parameters(weights(tmp_path, header, length=1 << 62)) is None
    (tmp_path / WEIGHTS).write_bytes(header[:5])
    assert trained_parameters(tmp_path) is None


def test_the_papers_columns_come_first_and_alone(tmp_path: Path) -> None:
    f1 = {"swig/trigger": 1.0, **{unit: 10.0 + n for n, unit in enumerate(UNITS)}}
    settings = {"model": "flan-t5-large", "shards": "shards/real", "hold_out": ["m2e2"]}
    runs = [
        make_run(tmp_path / "whole", f1, **settings),
        make_run(tmp_path / "gate", f1, **settings, use_gate=False, rank=32),
        make_run(tmp_path / "xl", f1, **settings, adapter="none"),
    ]
    found = compare(runs, paper=True)
    assert found.units == list(UNITS)
    assert found.systems[0].row.mean("All") == sum(range(10, 17))
    whole, gate, none = found.systems
    assert whole.paper is not None
    assert gate.paper is not None
    assert (whole.paper.name, gate.paper.name, none.paper) == ("C-LoRAE large", "C-LoRAE large, no gate", None)
    assert found.paper_difference(gate, "All") == pytest.approx(507.9 - 521.3)
    assert found.paper_difference(whole, "All") is None, "the paper's row of the reference itself"
    assert found.paper_difference(none, "All") is None
    assert found.notes == [
        "not among the columns, nor in All: swig/trigger",
        "C-LoRAE, no gate, rank=32: otherwise than recipes/paper has it: rank=32",
        "base alone: no row of the paper is like it",
    ]


def test_runs_on_other_data_keep_their_columns_beside_the_paper(tmp_path: Path) -> None:
    found = compare([make_run(tmp_path / "demo", A)], paper=True)
    assert found.units == list(A)
    assert found.notes == ["C-LoRAE: no row of the paper is like it"]


SCORES = st.dictionaries(st.sampled_from(["a/x", "b/y", "c/z"]), st.floats(0, 100), min_size=1)
RUNS = st.lists(st.tuples(SCORES, st.sampled_from([8, 16]), st.integers(0, 2)), min_size=1, max_size=6)


@given(runs=RUNS)
@settings(deadline=None, max_examples=40)
def test_every_run_is_in_one_row(
    runs: list[tuple[dict[str, float], int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    paths = [make_run(folder / str(n), f1, rank=rank, seed=seed) for n, (f1, rank, seed) in enumerate(runs)]
    found = compare(paths)
    assert sorted(run for system in found.systems for run in system.runs) == sorted(paths)
    for system in found.systems:
        members = [runs[paths.index(run)] for run in system.runs]
        assert len({rank for _, rank, _ in members}) == 1
        assert [seed for _, _, seed in members] == list(system.row.scores), "a seed once"
        for unit in found.units:
            values = [f1[unit] for f1, _, _ in members if unit in f1]
            assert system.row.values(unit) == values
    assert len({system.name for system in found.systems}) == len(found.systems)
