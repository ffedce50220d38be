"""Who tells of an error: rank 0 what all ranks found alike, each rank what it found alone."""

from __future__ import annotations

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.training import main as job


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_a_wrong_flag_is_told_once(
    rank: str, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert job.main(["--adaptr", "lora"]) == 2
    assert ("--adapter" in capsys.readouterr().err) == told


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_broken_sample_is_told_by_the_rank_that_read_it(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*prepared: object) -> None:
        raise UserError("posts-train-000000.tar, 0001: its picture cannot be decoded")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(job, "prepare", lambda argv: ())
    monkeypatch.setattr(job, "run", run)
    assert job.main([]) == 2
    error = capsys.readouterr().err
    assert "0001" in error
    assert ("on rank 1" in error) == (rank == "1")


@pytest.mark.usefixtures("process_group")
def test_what_rank_0_finds_is_everyones() -> None:
    from lvlm_clorae.training import distributed

    def work() -> str:
        raise UserError("the directory holds another run")

    with pytest.raises(UserError, match="another run") as caught:
        distributed.on_first_rank(work)
    assert caught.value.everywhere
    assert distributed.on_first_rank(lambda: "runs/demo") == "runs/demo"
