"""Tables of runs and of sweeps: grouping by settings, differences, and notes on everything that is left out."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lvlm_clorae.analysis.compare import WEIGHTS, Row, RunTable, collect, compare, read_scores, trained_parameters
from lvlm_clorae.errors import UserError
from lvlm_clorae.sweep.expand import Sweep
from lvlm_clorae.sweep.status import run_statuses
from lvlm_clorae.training.config_loading import make_config
from tests.helpers.runs import make_run
from tests.helpers.sweeps import finish, mixed_sweep, sweep_of

pytestmark = pytest.mark.usefixtures("no_squeue")

A, B = {"a/entity": 50.0, "b/relation": 20.0}, {"a/entity": 56.0, "b/relation": 22.0}


def collected(sweep: Sweep) -> RunTable:
    return collect(sweep, run_statuses(sweep.sweep_runs))


def test_seeds_are_averaged_whatever_else_may_differ(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "0", A),
        make_run(tmp_path / "gate", A, use_gate=False),
        make_run(
            tmp_path / "1", B, seed=1, dataloader_num_workers=2, output_dir="elsewhere", resume_from_checkpoint="auto"
        ),
    ]
    table = compare(runs)
    assert [row.name for row in table.rows] == ["C-LoRAE", "C-LoRAE, no gate"]
    first = table.rows[0]
    assert first.runs == [runs[0], runs[2]]
    assert table.columns == ["a/entity", "b/relation", "All"]
    assert [first.mean(column) for column in table.columns] == [53, 21, 74]
    assert first.sd("All") == pytest.approx(8 / math.sqrt(2))
    assert [table.difference(table.rows[1], column) for column in table.columns] == [-3, -1, -4]
    assert table.notes == []


@given(st.lists(st.floats(0, 500), min_size=1, max_size=6))
def test_mean_and_deviation_equal_numpy(values: list[float]) -> None:
    row = Row("", make_config({}), {}, {seed: {"All": value} for seed, value in enumerate(values)}, [])
    assert row.mean("All") == pytest.approx(np.mean(values))
    if len(values) > 1:
        assert row.sd("All") == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    else:
        assert row.sd("All") is None
    assert row.mean("b/relation") is None


def test_a_run_given_twice_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", A)
    (tmp_path / "link").symlink_to(run)
    [row] = compare([run, tmp_path / "link", tmp_path / "run" / ".." / "run"]).rows
    assert row.runs == [run]


def test_a_repeated_seed_gets_its_own_row(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, f1) for name, f1 in (("before", A), ("after", B))]
    table = compare(runs)
    assert [row.name for row in table.rows] == [f"C-LoRAE ({run})" for run in runs]
    assert table.difference(table.rows[1], "All") == 8


def test_the_reference_is_chosen_by_any_of_its_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "lora", A, adapter="lora"), *(make_run(tmp_path / n, B, seed=int(n)) for n in "01")]
    names = [table.reference.name for table in (compare(runs), compare(runs, reference=runs[2])) if table.reference]
    assert names == ["LoRA", "C-LoRAE"]
    with pytest.raises(UserError, match="--reference") as error:
        compare(runs[:2], reference=runs[2])
    assert str(runs[0]) in str(error.value)


def test_runs_on_different_datasets_have_blanks_and_no_all(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one", A), make_run(tmp_path / "two", {"a/entity": 1.0, "c/x": 2.0}, lora_rank=8)]
    table = compare(runs)
    assert table.dataset_tasks == ["a/entity", "b/relation", "c/x"]
    one, two = table.rows
    assert (one.mean("All"), two.mean("b/relation"), table.difference(two, "b/relation")) == (None, None, None)
    assert table.difference(two, "a/entity") == -49
    first, second = table.notes
    assert one.name in first
    assert "c/x" in first
    assert two.name in second
    assert "b/relation" in second


def test_chosen_columns_are_summed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one", A), make_run(tmp_path / "two", {"b/relation": 3.0}, lora_rank=8)]
    table = compare(runs, dataset_tasks=["b/relation", "b/relation"])
    assert [row.mean("All") for row in table.rows] == [20, 3]
    [note] = table.notes
    assert "a/entity" in note
    with pytest.raises(UserError, match=r"b/relatoin.*b/relation"):
        compare(runs, dataset_tasks=["b/relatoin"])


def test_all_is_the_sum_of_the_columns_not_the_value_in_the_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", A)
    content = json.loads((run / "scores.json").read_text())
    (run / "scores.json").write_text(json.dumps({**content, "all": 99.0}))
    assert compare([run]).rows[0].mean("All") == 70


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
    ("what", "part"),
    [
        ("file", "config.yaml"),
        ("empty", "config.yaml"),
        ("unfinished", "scores.json: missing"),
        ("damaged", "scores.json: damaged"),
        ("folder", "scores.json: cannot be read"),
        ("foreign", "speed"),
        ("unreadable", "YAML"),
    ],
)
def test_a_run_without_scores_is_left_out_with_a_note(what: str, part: str, tmp_path: Path) -> None:
    bad, good = broken(tmp_path, what), make_run(tmp_path / "good", A)
    table = compare([bad, good])
    assert [row.runs for row in table.rows] == [[good]]
    [note] = table.notes
    assert str(bad) in note
    assert part in note
    with pytest.raises(UserError) as error:
        compare([bad])
    assert part in str(error.value)


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rnu"):
        compare([make_run(tmp_path / "run", A), tmp_path / "rnu"])


def weights(run: Path, header: bytes, length: int | None = None) -> Path:
    path = run / WEIGHTS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    return run


def test_trained_parameters_are_counted_from_the_header(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", A)
    (run / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": np.zeros((3, 4)), "b": np.zeros(())}, run / WEIGHTS, {"format": "pt"})
    assert compare([run]).rows[0].trained_parameters == 13
    assert trained_parameters(tmp_path) is None


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b'{"a": 3}', b'{"a": {"shape": "x"}}', b"\xff", b"[" * 99999])
def test_a_damaged_adapter_has_no_count(header: bytes, tmp_path: Path) -> None:
    assert trained_parameters(weights(tmp_path, header)) is None
    assert trained_parameters(weights(tmp_path, header, length=1 << 62)) is None
    (tmp_path / WEIGHTS).write_bytes(header[:5])
    assert trained_parameters(tmp_path) is None


SCORES = st.dictionaries(st.sampled_from(["a/x", "b/y", "c/z"]), st.floats(0, 100), min_size=1)
RUNS = st.lists(st.tuples(SCORES, st.sampled_from([8, 16]), st.integers(0, 2)), min_size=1, max_size=6)


@given(runs=RUNS)
@settings(deadline=None, max_examples=40)
def test_every_run_is_in_exactly_one_row(
    runs: list[tuple[dict[str, float], int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    paths = [make_run(folder / str(n), f1, lora_rank=rank, seed=seed) for n, (f1, rank, seed) in enumerate(runs)]
    table = compare(paths)
    assert sorted(run for row in table.rows for run in row.runs) == sorted(paths)
    for row in table.rows:
        members = [runs[paths.index(run)] for run in row.runs]
        assert len({rank for _, rank, _ in members}) == 1
        assert [seed for _, _, seed in members] == list(row.scores), "each seed once"
        for name in table.dataset_tasks:
            assert row.values(name) == [f1[name] for f1, _, _ in members if name in f1]
    assert len({row.name for row in table.rows}) == len(table.rows)


def test_a_sweep_is_grouped_by_the_settings_it_varies(tmp_path: Path) -> None:
    table = collected(mixed_sweep(tmp_path))
    assert (table.keys, table.dataset_tasks, table.reference) == (
        ["adapter", "lora_rank"],
        ["a/entity", "b/relation"],
        None,
    )
    assert [row.settings for row in table.rows] == [
        {"adapter": "clorae", "lora_rank": 8},
        {"adapter": "clorae", "lora_rank": 16},
        {"adapter": "lora", "lora_rank": 64},
    ]
    assert [row.name for row in table.rows] == ["lora_rank=8", "lora_rank=16", "adapter=lora"]
    assert [list(row.scores) for row in table.rows] == [[0, 1, 2], [0, 1], [0]]
    first, _, last = table.rows
    assert (first.mean("All"), first.sd("All"), first.mean("a/entity"), first.sd("a/entity")) == (78, 7, 55, 5)
    assert (last.mean("All"), last.sd("All")) == (50, None)


def test_runs_of_a_sweep_without_scores_are_listed(tmp_path: Path) -> None:
    table = collected(mixed_sweep(tmp_path))
    assert table.unfinished == [
        {"number": 5, "name": "lora_rank=16,seed=2", "state": "failed"},
        {"number": 8, "name": "adapter=lora,seed=2", "state": "waiting"},
    ]
    [note] = table.notes
    assert "adapter=lora,seed=1: scores.json: damaged" in note


def test_runs_of_a_sweep_are_grouped_by_value_not_by_spelling(tmp_path: Path) -> None:
    sweep = sweep_of(
        tmp_path, sweep_runs=[{"lora_rank": 16, "seed": 0}, {"lora_rank": 16, "adapter": "clorae", "seed": 1}]
    )
    for sweep_run in sweep.sweep_runs:
        finish(sweep_run, a_entity=50.0)
    [row] = collected(sweep).rows
    assert list(row.scores) == [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "null", "[" * 100000, '{"all": 1}', '{"dataset_tasks": []}'),
        *('{"dataset_tasks": {"a": 3}}', '{"dataset_tasks": {"a": {}}}', '{"dataset_tasks": {"a": {"f1": null}}}'),
        *('{"dataset_tasks": {"a": {"f1": "1"}}}', '{"dataset_tasks": {"a": {"f1": NaN}}}'),
        '{"dataset_tasks": {"a": {"f1": true}}}',
    ],
)
def test_damaged_scores_are_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        read_scores(tmp_path / "scores.json")


def test_missing_and_unreadable_scores_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        read_scores(tmp_path / "scores.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_scores(tmp_path)
