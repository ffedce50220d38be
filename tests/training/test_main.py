"""Printing of errors: by rank 0 if all ranks raise them, otherwise by the rank that does."""

from __future__ import annotations

import pytest

from lvlm_clorae.errors import UserError
from lvlm_clorae.training import main as job


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


@pytest.mark.usefixtures("process_group")
def test_an_error_on_the_first_rank_is_raised_on_every_rank() -> None:
    from lvlm_clorae.training import distributed

    def work() -> str:
        raise UserError("the directory holds another run")

    with pytest.raises(UserError, match="another run") as caught:
        distributed.on_first_rank(work)
    assert caught.value.everywhere
    assert distributed.on_first_rank(lambda: "runs/demo") == "runs/demo"
