"""``lvlm-clorae evaluate``: the run's own scores, confusion, scores without images, and mistakes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from lvlm_clorae.analysis.evaluate import Scores, check_tasks
from lvlm_clorae.cli import main as cli
from lvlm_clorae.data.index import DatasetTask
from lvlm_clorae.errors import UserError
from lvlm_clorae.tasks import Counts
from tests.helpers.fork_server import train
from tests.helpers.launch import small_shards

SETTINGS = "--lora_rank 4 --num_train_epochs 1 --per_device_train_batch_size 8 --max_target_length 12".split()
SETTINGS += ["--per_device_eval_batch_size", "4"]
SCORES = Scores(
    "dev",
    {"a/entity": Counts(3, 4, 6), "b/relation": Counts(0, 0, 2)},
    {"a/entity": 2, "b/relation": 0},
    {"a/entity": Counter({("x", "x"): 9, ("x", "y"): 2, ("(spurious)", "y"): 1}), "b/relation": Counter()},
    {"a/entity": Counts(1, 4, 6), "b/relation": Counts(0, 0, 2)},
)


def rendered(renderable: object) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_table_has_a_row_for_each_dataset_task_and_all() -> None:
    lines = rendered(SCORES.table()).splitlines()
    (row,) = [line for line in lines if "a/entity" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == "a/entity 75.0 50.0 60.0 20.0 40.0 2".split()
    (row,) = [line for line in lines if "All" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["All", "", "", "60.0", "20.0", "40.0", "2"]
    plain = Scores(SCORES.split, SCORES.counts, SCORES.malformed, SCORES.confusion)
    assert "blank" not in rendered(plain.table())


def test_correct_labels_are_not_in_the_confusion_table() -> None:
    rows = [line.split() for line in rendered(SCORES.confusion_table()).splitlines() if "a/entity" in line]
    assert [[cell for cell in row if cell not in "│┃"] for row in rows] == [
        ["a/entity", "x", "y", "2"],
        ["a/entity", "(spurious)", "y", "1"],
    ]
    assert rendered(SCORES.confusion_table(most=1)).count("a/entity") == 1


def test_scores_as_plain_data() -> None:
    found = json.loads(json.dumps(SCORES.to_dict()))
    assert (found["split"], found["all"], found["maximum"], found["all_without_images"]) == ("dev", 60.0, 200.0, 20.0)
    assert found["dataset_tasks"]["a/entity"] == {
        "tp": 3,
        "predicted": 4,
        "gold": 6,
        "precision": 75.0,
        "recall": 50.0,
        "f1": 60.0,
        "malformed": 2,
        "confusion": [["x", "x", 9], ["x", "y", 2], ["(spurious)", "y", 1]],
        "f1_without_images": 20.0,
    }


def test_limited_scores_say_so() -> None:
    limited = replace(SCORES, limit=7)
    assert limited.to_dict()["limit"] == 7
    assert SCORES.to_dict()["limit"] is None
    assert " 7 " in rendered(limited.table()).splitlines()[0]


@pytest.mark.parametrize("value", ["0", "-1", "many", str(10**30)])
@pytest.mark.parametrize("flag", ["--limit", "--per_device_eval_batch_size"])
def test_a_number_of_samples_below_one_is_an_error(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["evaluate", "--run", "x", flag, value]) == 2
    error = capsys.readouterr().err
    assert flag in error
    assert value in error


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluate")
    shards = small_shards(directory / "shards", train=8, dev=2, test=5)
    train(directory / "run", 1, "--shards", shards, *SETTINGS)
    return directory / "run"


@pytest.mark.slow
def test_the_command_reproduces_the_runs_scores(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli(["evaluate", "--run", str(run), "--blank-images", "--json", "--predictions", str(tmp_path)]) == 0
    found, own = json.loads(capsys.readouterr().out), json.loads((run / "scores.json").read_text())
    assert (found["all"], found["maximum"]) == (own["all"], own["maximum"])
    f1, expected = ({name: one["f1"] for name, one in what["dataset_tasks"].items()} for what in (found, own))
    assert f1 == expected
    assert found.keys() >= {"all_without_images"}
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in (run / "predictions").iterdir())
    for name in names:
        assert (tmp_path / name).read_text() == (run / "predictions" / name).read_text()

    assert cli(["evaluate", "--run", str(run / "best"), "--split", "dev", "--datasets", "demo_pairs"]) == 0
    printed = capsys.readouterr().out
    assert "demo_pairs/relation" in printed
    assert "demo_posts" not in printed
    assert "most often confused" in printed


@pytest.mark.slow
def test_a_limit_restricts_each_dataset_task(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = (run / "scores.json").read_bytes()
    assert cli(["evaluate", "--run", str(run), "--limit", "2", "--json", "--predictions", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["limit"] == 2
    lines = Counter(
        (line["dataset"], line["subtask"])
        for path in tmp_path.iterdir()
        for line in map(json.loads, path.read_text().splitlines())
    )
    assert set(lines.values()) == {2}
    assert len(lines) == 5
    assert (run / "scores.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--datasets", "demo_pair"], '"demo_pairs"'),
        (["--shards", "nowhere"], "error: nowhere"),
        (["--match", "exactly"], '"exact"'),
        (["--split", "validation"], '"validation"'),
        (["--predictions", "predictions"], "predictions of test"),
    ],
)
def test_mistakes_end_with_code_2(
    flags: list[str], part: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    assert cli(["evaluate", "--run", ".", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert part in error


def test_shards_that_moved_are_named_with_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/adapter/schema.json").touch()
    (tmp_path / "run/config.yaml").write_text("shards: gone/shards\n")
    assert cli(["evaluate", "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in ("config.yaml", "gone/shards", "--shards"))


def test_a_task_without_an_expert_is_an_error() -> None:
    extractor = SimpleNamespace(schema={"tasks": ["mner", "mee"]}, model=SimpleNamespace(set_task=None))
    with pytest.raises(UserError, match=r"demo_pairs has the task mre.*mner, mee"):
        check_tasks(extractor, [DatasetTask("demo_pairs/relation", "demo_pairs", "relation", "mre", ["none"], None)])


@pytest.mark.slow
def test_an_adapter_without_its_run_needs_shards(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (run / "adapter").iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert cli(["evaluate", "--run", str(moved)]) == 2
    assert "--shards" in capsys.readouterr().err
    assert (
        cli(["evaluate", "--run", str(moved), "--shards", str(run.parent / "shards"), "--datasets", "demo_news"]) == 0
    )
