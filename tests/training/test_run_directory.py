"""The run directory: a name of its own, nothing foreign is touched, metrics without what is computed again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.training.config import TrainConfig, read_config
from lvlm_clorae.training.run_directory import Metrics, find_run, open_run, replace_directory

CONFIG = TrainConfig(model="google/flan-t5-base")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_default_names_are_numbered() -> None:
    names = [open_run(CONFIG).as_posix() for _ in range(3)]
    assert names == ["runs/flan-t5-base-clorae", "runs/flan-t5-base-clorae-2", "runs/flan-t5-base-clorae-3"]
    assert open_run(replace(CONFIG, adapter="lora")).as_posix() == "runs/flan-t5-base-lora"


def test_resume_takes_up_the_newest_of_the_default_names() -> None:
    resumed = replace(CONFIG, resume="auto")
    assert open_run(resumed).as_posix() == "runs/flan-t5-base-clorae"
    assert open_run(resumed).as_posix() == "runs/flan-t5-base-clorae"
    second = open_run(CONFIG)
    assert open_run(resumed) == second


def test_the_configuration_is_written(tmp_path: Path) -> None:
    config = replace(CONFIG, output=str(tmp_path / "deep" / "run"))
    assert read_config(open_run(config) / "config.yaml") == config


def test_finding_writes_nothing(tmp_path: Path) -> None:
    find_run(CONFIG)
    find_run(replace(CONFIG, output=str(tmp_path / "new")))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert open_run(replace(CONFIG, output=str(tmp_path / "run"))) == tmp_path / "run"


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("thesis.tex", "years of work", "is not empty and holds no run"),
        ("config.yaml", "server:\n  port: 80\n", "holds a foreign config.yaml"),
        ("config.yaml", "not: [valid", "holds a foreign config.yaml"),
    ],
)
def test_a_foreign_directory_is_refused_and_untouched(
    name: str, text: str, message: str, resume: str | None, tmp_path: Path
) -> None:
    target = tmp_path / "theirs"
    target.mkdir()
    (target / name).write_text(text)
    with pytest.raises(UserError, match=r"[cC]hoose another --output") as caught:
        open_run(replace(CONFIG, output=str(target), resume=resume))
    assert str(caught.value).startswith(f"{target}: ")
    assert message in str(caught.value)
    assert contents(target) == {str(target / name): text.encode()}


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        open_run(replace(CONFIG, output=str(tmp_path / "file")))
    with pytest.raises(UserError, match="cannot be written"):
        open_run(replace(CONFIG, output=str(tmp_path / "file" / "below")))


def test_a_run_is_not_overwritten_without_resume(tmp_path: Path) -> None:
    config = replace(CONFIG, output=str(tmp_path / "run"))
    before = contents(open_run(config))
    with pytest.raises(UserError, match=r"already holds a run.*--resume auto"):
        open_run(replace(config, seed=1))
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 8),
        ("seed", 3),
        ("learning_rate", 0.5),
        ("adapter", "lora"),
        ("target_modules", ["k"]),
        ("constrained", True),
    ],
)
def test_resuming_names_the_difference(name: str, value: object, tmp_path: Path) -> None:
    config = replace(CONFIG, output=str(tmp_path / "run"))
    before = contents(open_run(config))
    with pytest.raises(UserError) as caught:
        open_run(replace(config, resume="auto", **{name: value}))  # type: ignore[arg-type]
    assert f"{name} = {getattr(config, name)}, but this one has {value}" in str(caught.value)
    assert contents(tmp_path / "run") == before


def test_resuming_may_change_what_does_not_decide_the_result(tmp_path: Path) -> None:
    config = replace(CONFIG, output=str(tmp_path / "run"))
    open_run(config)
    changed = replace(
        config, resume="auto", eval_batch=2, workers=1, keep_checkpoints=5, log_every=1, on_bad_sample="skip"
    )
    assert open_run(changed) == tmp_path / "run"


def test_other_ranks_may_share_the_batch_otherwise(tmp_path: Path) -> None:
    """What its product with the ranks must be is in the checkpoint (tests/distributed/test_resume.py)."""
    config = replace(CONFIG, output=str(tmp_path / "run"))
    open_run(config)
    half = replace(config, resume="auto", micro_batch=2 * config.micro_batch)
    assert open_run(half) == tmp_path / "run"


def test_metrics_drop_what_is_computed_again(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 6):
        metrics.write(step, "train", loss=1.0 / step, unit="a/entity", f1={"a/entity": 50.0})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 3, "ki')  # cut off by a kill

    metrics = Metrics(tmp_path, 3)
    metrics.write(4, "train", loss=9.0)
    metrics.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0] == {"step": 1, "kind": "train", "loss": 1.0, "unit": "a/entity", "f1": {"a/entity": 50.0}}
    assert records[-1]["loss"] == 9.0
    assert list((tmp_path / "tensorboard").iterdir())


def test_an_evaluation_done_again_is_not_recorded_twice(tmp_path: Path) -> None:
    for _ in range(2):  # killed between an epoch's evaluation and the next checkpoint, then resumed
        metrics = Metrics(tmp_path, 10)
        for kind in ("train", "dev"):
            metrics.write(10, kind, epoch=1)
        metrics.write(11, "train", epoch=1)
        metrics.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["kind"]) for record in records] == [(10, "train"), (10, "dev"), (11, "train")]


def test_metrics_reach_the_file_at_once(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, "train", loss=1.0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    metrics.close()


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    replace_directory(target, lambda path: (path / "first").touch())
    replace_directory(target, lambda path: (path / "second").touch())
    assert [path.name for path in target.iterdir()] == ["second"]

    def fail(path: Path) -> None:
        (path / "third").touch()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        replace_directory(target, fail)
    assert [path.name for path in target.iterdir()] == ["second"]
    replace_directory(target, lambda path: (path / "fourth").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert [path.name for path in target.iterdir()] == ["fourth"]
