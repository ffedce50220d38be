"""Console output in a log: a line per detail, and rows of dataset tasks without scores."""

from __future__ import annotations

import pytest

from lvlm_clorae.tasks import Counts
from lvlm_clorae.training.reporting import Reporter, clock


def test_every_detail_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the number of steps in an epoch: with 9 of them, every 10th step of the run has its line."""
    with Reporter(True) as report:
        for epoch in range(3):
            report.begin(f"epoch {epoch + 1}/3", 9)
            for step in range(9):
                report.advance(detail="due" if (9 * epoch + step + 1) % 10 == 0 else "")
    assert capsys.readouterr().out.splitlines() == ["epoch 2/3 1/9  due", "epoch 3/3 2/9  due"]


def test_an_evaluation_has_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(True) as report:
        report.begin("test", 300)
        for _ in range(100):
            report.advance(3)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"test {30 * tenth}/300" for tenth in range(1, 11)]


def test_a_dataset_task_without_scores_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(True) as report:
        report.scores("dev", {"a": Counts(1, 1, 2)}, {"weight": {"a": 0.5, "b": 1.5}})
    lines = [line.split() for line in capsys.readouterr().out.replace("\u2502", " ").splitlines()]
    assert ["b", "-", "-", "-", "1.500"] in lines
    assert ["a", "100.0", "50.0", "66.7", "0.500"] in lines


def test_a_log_has_room_for_long_names(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a_dataset_of_a_long_name/relation_between_names_of_persons"
    with Reporter(True) as report:
        report.scores("dev", {name: Counts(1, 1, 2)}, {"weight": {name: 0.5}, "next": {name: 0.5}})
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3661.4, "1:01:01"), (90000, "25:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert clock(seconds) == text
