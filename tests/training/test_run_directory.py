"""The run directory: naming, ownership, metrics without repeated steps, status.json."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.training import run_directory
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import read_config
from lvlm_clorae.training.run_directory import STATUS, Metrics, Status, find_run, is_done, open_run, slurm_job

CONFIG = TrainConfig(model="google/flan-t5-base")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _change_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_default_names_are_numbered() -> None:
    names = [open_run(CONFIG).as_posix() for _ in range(3)]
    assert names == ["runs/flan-t5-base-clorae", "runs/flan-t5-base-clorae-2", "runs/flan-t5-base-clorae-3"]
    assert open_run(replace(CONFIG, adapter="lora")).as_posix() == "runs/flan-t5-base-lora"


def test_resume_uses_the_newest_of_the_default_names() -> None:
    resumed = replace(CONFIG, resume_from_checkpoint="auto")
    assert open_run(resumed).as_posix() == "runs/flan-t5-base-clorae"
    assert open_run(resumed).as_posix() == "runs/flan-t5-base-clorae"
    second = open_run(CONFIG)
    assert open_run(resumed) == second
    first = Path("runs/flan-t5-base-clorae")
    (first / "checkpoints/step-00000007").mkdir(parents=True)
    (first / "checkpoints/step-00000007/state.json").touch()
    assert open_run(resumed) == first, "the second one failed before its first checkpoint"


def test_opening_a_run_writes_its_configuration(tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir=str(tmp_path / "deep" / "run"))
    assert read_config(open_run(config) / "config.yaml") == config


def test_finding_a_run_writes_nothing(tmp_path: Path) -> None:
    find_run(CONFIG)
    find_run(replace(CONFIG, output_dir=str(tmp_path / "new")))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert open_run(replace(CONFIG, output_dir=str(tmp_path / "run"))) == tmp_path / "run"


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("thesis.tex", "text", "no run"),
        ("config.yaml", "server:\n  port: 80\n", '"server"'),
        ("config.yaml", "not: [valid", "YAML"),
        ("config.yaml", "mim_samples: 3\nseed: 0\n", '"mim_samples"'),  # a setting of another release
    ],
)
def test_a_directory_of_something_else_or_another_release_is_refused_and_unchanged(
    name: str, text: str, message: str, resume: str | None, tmp_path: Path
) -> None:
    target = tmp_path / "theirs"
    target.mkdir()
    (target / name).write_text(text)
    with pytest.raises(UserError, match="another --output_dir") as caught:
        open_run(replace(CONFIG, output_dir=str(target), resume_from_checkpoint=resume))
    assert str(caught.value).startswith(f"{target}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(target) == {str(target / name): text.encode()}


def test_a_file_as_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: .*--output_dir"):
        open_run(replace(CONFIG, output_dir=str(tmp_path / "file")))
    with pytest.raises(UserError, match=r"below: .*--output_dir"):
        open_run(replace(CONFIG, output_dir=str(tmp_path / "file" / "below")))


def test_a_run_is_not_overwritten_without_resume(tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir=str(tmp_path / "run"))
    before = contents(open_run(config))
    with pytest.raises(UserError, match="--resume_from_checkpoint auto"):
        open_run(replace(config, seed=1))
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_failed_run_without_a_checkpoint_may_be_corrected(resume: str | None, tmp_path: Path) -> None:
    corrected = replace(CONFIG, output_dir=str(tmp_path / "run"), seed=1, resume_from_checkpoint=resume)
    directory = open_run(replace(corrected, seed=0, resume_from_checkpoint=None))
    status = Status(directory, 0)
    status.end("interrupted")
    with pytest.raises(UserError, match=str(directory)):
        open_run(corrected)
    status.fail("no such module")
    open_run(corrected)
    assert read_config(directory / "config.yaml").seed == 1
    (directory / "checkpoints").mkdir()
    with pytest.raises(UserError, match=str(directory)):
        open_run(replace(corrected, seed=2))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_rank", 8),
        ("seed", 3),
        ("learning_rate", 0.5),
        ("adapter", "lora"),
        ("target_modules", ["k"]),
        ("constrained", True),
    ],
)
def test_resuming_with_another_setting_names_the_difference(name: str, value: object, tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir=str(tmp_path / "run"))
    before = contents(open_run(config))
    with pytest.raises(UserError) as caught:
        open_run(replace(config, resume_from_checkpoint="auto", **{name: value}))  # type: ignore[arg-type]
    assert f"{name} = {getattr(config, name)}, but this one has {value}" in str(caught.value)
    assert contents(tmp_path / "run") == before


def test_settings_that_do_not_affect_the_result_may_change_on_resume(tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir=str(tmp_path / "run"))
    open_run(config)
    changed = replace(
        config,
        resume_from_checkpoint="auto",
        per_device_eval_batch_size=2,
        dataloader_num_workers=1,
        save_total_limit=5,
        logging_steps=1,
        on_invalid_sample="skip",
    )
    assert open_run(changed) == tmp_path / "run"


def test_the_micro_batch_may_change_on_resume(tmp_path: Path) -> None:
    """The checkpoint holds its product with the number of ranks (tests/distributed/test_resume.py)."""
    config = replace(CONFIG, output_dir=str(tmp_path / "run"))
    open_run(config)
    half = replace(
        config, resume_from_checkpoint="auto", per_device_train_batch_size=2 * config.per_device_train_batch_size
    )
    assert open_run(half) == tmp_path / "run"


def run_with_checkpoints(config: TrainConfig, *steps: int) -> Path:
    """Make the directory of a done run with these complete checkpoints."""
    directory = open_run(config)
    for step in steps:
        path = directory / f"checkpoints/step-{step:08d}"
        path.mkdir(parents=True)
        (path / "state.json").touch()
    for name in ("best/schema.json", "adapter/schema.json", "scores.json", "metrics.jsonl"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)
    status = Status(directory, 0)
    status.reached(steps[-1] if steps else 0, 1)
    status.end("done")
    return directory


def test_a_run_resumes_from_its_newest_checkpoint_by_path(tmp_path: Path) -> None:
    directory = run_with_checkpoints(CONFIG, 120, 240)
    newest = directory / "checkpoints" / "step-00000240"
    run_with_checkpoints(CONFIG, 240)  # the newest default name, which does not count
    for path in (str(newest), f"{newest}/", str(newest.resolve()), f"{directory}/best/../checkpoints/{newest.name}"):
        resumed = replace(CONFIG, resume_from_checkpoint=path)
        assert find_run(resumed).resolve() == directory.resolve()
        assert find_run(replace(resumed, output_dir=str(directory))) == directory


def test_a_checkpoint_elsewhere_incomplete_or_missing_is_refused(tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir="run")
    directory = run_with_checkpoints(config, 120)
    other = run_with_checkpoints(replace(CONFIG, output_dir="other"), 120)
    (directory / "checkpoints/step-00000240").mkdir()
    (directory / "checkpoints/.step-00000360.partial").mkdir()
    (directory / "checkpoints/.step-00000360.partial/state.json").touch()
    names = ("step-00000240", ".step-00000360.partial", "step-00000999", "")
    wrong = [str(directory / "checkpoints" / name) for name in names]
    for path in (*wrong, f"{other}/checkpoints/step-00000120", str(directory), "true", "never"):
        for output_dir in ("run", None):
            with pytest.raises(UserError) as caught:
                find_run(replace(config, resume_from_checkpoint=path, output_dir=output_dir, seed=7))
            assert "\n" not in str(caught.value)
            assert output_dir is None or f"{directory}/checkpoints/step-00000120" in str(caught.value)
    with pytest.raises(UserError, match="seed"):  # a complete one, of a run with another setting
        find_run(replace(config, resume_from_checkpoint=f"{directory}/checkpoints/step-00000120", seed=7))


def test_an_earlier_checkpoint_is_chosen_by_moving_what_came_after_it(tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir=str(tmp_path / "a run"))
    directory = run_with_checkpoints(config, 120, 240, 360)
    earlier = replace(config, resume_from_checkpoint=f"{directory}/checkpoints/step-00000120")
    before = contents(directory)
    with pytest.raises(UserError) as caught:
        find_run(earlier)
    assert "auto" in str(caught.value)
    assert contents(directory) == before
    subprocess.run(f"mkdir {str(caught.value).partition(': mkdir ')[2]}", shell=True, check=True)
    assert find_run(earlier) == directory
    assert not is_done(earlier, directory)
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-00000120"]
    assert not (directory / "best").exists()
    assert sorted(before.values()) == sorted(
        content for path, content in contents(directory).items() if path != str(directory / "metrics.jsonl")
    ), "nothing is lost"


@pytest.mark.parametrize(
    ("change", "done"),
    [
        ("nothing", True),
        ("rm -r checkpoints", True),  # to save space
        ("rm -r checkpoints/step-00000240", False),  # the earlier one is chosen
        ("rm -r adapter", False),
        ("sed -i s/done/interrupted/ status.json", False),
        ("rm status.json", False),
    ],
)
def test_a_run_with_nothing_left_to_do_is_done(change: str, done: bool) -> None:
    directory = run_with_checkpoints(CONFIG, 120, 240)
    if change != "nothing":
        subprocess.run(change, cwd=directory, shell=True, check=True)
    assert is_done(CONFIG, directory) is done


def test_metrics_remove_records_of_steps_that_are_repeated(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 6):
        metrics.write(step, "train", loss=1.0 / step, dataset_task="a/entity", f1={"a/entity": 50.0})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 3, "ki')  # truncated by a kill

    metrics = Metrics(tmp_path, 3)
    metrics.write(4, "train", loss=9.0)
    metrics.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0] == {"step": 1, "kind": "train", "loss": 1.0, "dataset_task": "a/entity", "f1": {"a/entity": 50.0}}
    assert records[-1]["loss"] == 9.0
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_damaged_record_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "kind": "train", "loss": 1.0}\n{"st\xf4p": 2, "kind": "train"}\n')
    Metrics(tmp_path, 3).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


def test_a_repeated_evaluation_is_recorded_once(tmp_path: Path) -> None:
    for _ in range(2):  # killed between an epoch's evaluation and the next checkpoint, then resumed
        metrics = Metrics(tmp_path, 10)
        for kind in ("train", "dev"):
            metrics.write(10, kind, epoch=1)
        metrics.write(11, "train", epoch=1)
        metrics.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["kind"]) for record in records] == [(10, "train"), (10, "dev"), (11, "train")]


def test_metrics_are_written_immediately(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, "train", loss=1.0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    metrics.close()


def test_inactive_metrics_write_nothing(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0, active=False)
    metrics.write(1, "train", loss=1.0)
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def read_json(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / STATUS).read_text())
    return content


def test_status_from_start_to_end_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "HEARTBEAT_SECONDS", 0.0)
    status = Status(tmp_path, 0)
    status.start()
    first = read_json(tmp_path)
    assert (first["state"], first["step"]) == ("running", 0)
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(first["time"])).total_seconds()) < 60
    status.reached(7, 1)
    assert (read_json(tmp_path)["step"], read_json(tmp_path)["epoch"]) == (7, 1)
    status.end("done")
    assert read_json(tmp_path) | {"time": ""} == {**first, "state": "done", "step": 7, "epoch": 1, "time": ""}


def test_status_is_not_written_at_every_step(tmp_path: Path) -> None:
    status = Status(tmp_path, 0)
    status.start()
    status.reached(7, 1)
    assert read_json(tmp_path)["step"] == 0
    status.end("interrupted", "saved at step 7")
    assert (read_json(tmp_path)["step"], read_json(tmp_path)["message"]) == (7, "saved at step 7")


def test_status_keeps_the_first_failure(tmp_path: Path) -> None:
    ranks = [Status(tmp_path, rank) for rank in range(3)]
    for status in ranks:
        status.start()
    assert ranks[2].fail("ValueError: broken", "Traceback ...")
    assert not ranks[0].fail("RuntimeError: Connection closed by peer", "Traceback ...")
    assert (read_json(tmp_path)["rank"], read_json(tmp_path)["message"]) == (2, "ValueError: broken")
    ranks[0].start()  # another attempt
    assert read_json(tmp_path)["state"] == "running"


def test_ranks_other_than_0_write_no_progress(tmp_path: Path) -> None:
    status = Status(tmp_path, 1)
    status.start()
    status.reached(7, 1)
    status.end("done")
    assert not (tmp_path / STATUS).exists()


def test_slurm_job_id(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert slurm_job() == "41"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert slurm_job() == "40_1"
