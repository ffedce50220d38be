"""Printing of errors: by rank 0 if all ranks raise them, otherwise by the rank that does."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.training import main as job
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.preemption import EXIT_CODE, Interrupted
from lvlm_clorae.training.run_directory import Status, open_run


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False)])
def test_a_wrong_flag_is_printed_once(
    rank: str, printed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert job.main(["--adaptr", "lora"]) == 2
    assert ("--adapter" in capsys.readouterr().err) == printed


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_invalid_sample_is_printed_by_the_rank_that_read_it(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*prepared: object) -> None:
        raise UserError("posts-train-000000.tar, 0001: its image cannot be decoded")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(job, "_prepare", lambda *given: ())
    monkeypatch.setattr(job, "run", run)
    assert job.main([]) == 2
    error = capsys.readouterr().err
    assert "0001" in error
    assert ("on rank 1" in error) == (rank == "1")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_done_run_is_not_evaluated_again(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = open_run(TrainConfig(output_dir=str(tmp_path / "run")))
    (directory / "adapter").mkdir()
    (directory / "adapter" / "schema.json").touch()
    Status(directory, 0).end("done")
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    resumed = TrainConfig(output_dir=str(directory), resume_from_checkpoint="auto")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(job, "_prepare", lambda *given: (resumed, None, {}))
    monkeypatch.setattr(job, "_run", None)
    assert job.main([]) == 0
    printed = capsys.readouterr().out
    assert (str(directory) in printed) == (rank == "0")
    assert ("scores.json" in printed) == (rank == "0")
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_the_run_directory_is_printed_first_and_named_by_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: object) -> None:
        print("training")
        raise Interrupted("saved at step 3")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "_prepare", lambda *given: (TrainConfig(), None, {}))
    monkeypatch.setattr(job, "_run", interrupted)
    assert job.main([]) == EXIT_CODE
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-2:] == ["run directory: runs/demo-clorae", "training"]
    assert "--output_dir runs/demo-clorae --resume_from_checkpoint auto" in captured.err.splitlines()[-1]


@pytest.mark.usefixtures("process_group")
def test_an_error_on_the_first_rank_is_raised_on_every_rank() -> None:
    from lvlm_clorae.training import distributed

    def work() -> str:
        raise UserError("the directory holds another run")

    with pytest.raises(UserError, match="another run") as caught:
        distributed.on_first_rank(work)
    assert caught.value.everywhere
    assert distributed.on_first_rank(lambda: "runs/demo") == "runs/demo"
