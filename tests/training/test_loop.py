"""One micro-step: L = w CE + beta MIM, scaled so that a window is a mean over the micro-steps it has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvlm_clorae.data.batches import Batch
from lvlm_clorae.data.units import Unit
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.loop import _given_up, micro_step
from lvlm_clorae.training.progress import Progress

UNIT = Unit("posts/entity", "posts", "entity", "mner", ["person"], 90.0)
LABELS = torch.tensor([[3, 4, -100], [5, -100, -100]])
CE_SUM, MIM = 6.0, 0.5


class Engine:
    """Takes the calls that the loop makes of DeepSpeed's engine and keeps what it was given."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __call__(self, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> Any:
        self.calls.append(("forward", float(num_items_in_batch)))
        return SimpleNamespace(loss=torch.tensor(CE_SUM) / num_items_in_batch)

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        self.calls.append(("boundary", boundary))

    def backward(self, loss: torch.Tensor) -> None:
        self.calls.append(("backward", float(loss)))

    def step(self) -> None:
        self.calls.append(("step", None))


class Model:
    def __init__(self) -> None:
        self.task = ""

    def set_task(self, task: str) -> None:
        self.task = task

    def mutual_information_loss(self, mean_counts: Any) -> torch.Tensor:
        counts = torch.tensor([3.0, 5.0])
        assert torch.equal(mean_counts(counts.clone()), counts)  # one rank: its own counts
        return torch.tensor(MIM)


def take_step(labels: torch.Tensor = LABELS, **settings: Any) -> tuple[Engine, Model, torch.Tensor]:
    config = TrainConfig(beta=0.1, accumulation=4)
    job: Any = SimpleNamespace(config=config, engine=Engine(), model=Model(), has_tasks=True, side_loss="mim")
    rows = {
        "keys": ["a", "b"],
        "samples": [{}, {}],
        "prompts": ["", ""],
        "wrapped": [False] * 2,
        "ignored": [False] * 2,
    }
    batch = Batch([UNIT, UNIT], **rows, tensors={"labels": labels}, bad=["a bad one"])
    losses, own = micro_step(job, batch, **settings)
    assert own == losses[1]  # one rank
    return job.engine, job.model, losses


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("window", "last"), [(4, False), (4, True), (1, True)])
def test_the_loss_of_a_micro_step(window: int, last: bool) -> None:
    engine, model, losses = take_step(weight=1.5, window=window, last=last)
    ce = CE_SUM / 3  # three target tokens are not padding
    loss = 1.5 * ce + 0.1 * MIM
    assert model.task == "mner"
    # DeepSpeed divides by 4, so the gradients of a window add up to a mean over the window.
    expected = [("forward", 3.0), ("boundary", last), ("backward", pytest.approx(loss * 4 / window)), ("step", None)]
    assert engine.calls == expected
    assert losses.tolist() == pytest.approx([loss, ce, MIM, 1.0, 0.0])


@pytest.mark.usefixtures("process_group")
def test_a_micro_batch_of_ignored_rows_has_a_finite_loss() -> None:
    engine, _, losses = take_step(torch.full((2, 3), -100), weight=1.0, window=4, last=False)
    assert engine.calls[0] == ("forward", 1.0), "not a division by no tokens"
    assert losses.isfinite().all()


@pytest.mark.parametrize(("patience", "waited", "ends"), [(None, 99, False), (3, 2, False), (3, 3, True), (1, 1, True)])
def test_patience(patience: int | None, waited: int, ends: bool) -> None:
    said: list[str] = []
    job: Any = SimpleNamespace(config=TrainConfig(patience=patience), report=SimpleNamespace(say=said.append))
    assert _given_up(job, Progress(best=123.4, waited=waited)) is ends
    assert said == (["All on dev is 123.4 at best, " + f"{waited} evaluations ago: training ends here"] if ends else [])
