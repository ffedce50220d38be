"""The training loop: loss of a micro-step, learning-rate schedules, early stopping."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lvlm_clorae.data.collate import Batch
from lvlm_clorae.data.index import DatasetTask
from lvlm_clorae.tasks import Counts
from lvlm_clorae.training import loop
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.loop import TrainerState, _Trainer, learning_rate, micro_step, stops_early

DATASET_TASK = DatasetTask("posts/entity", "posts", "entity", "mner", ["person"], 90.0)
LABELS = torch.tensor([[3, 4, -100], [5, -100, -100]])
CE_SUM, MIM = 6.0, 0.5


class Engine:
    """Records the calls that the loop makes to DeepSpeed's engine."""

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

    @property
    def base_model(self) -> Model:
        return self

    def aux_loss(self, sum_over_ranks: Any, ranks: int) -> torch.Tensor:
        counts = torch.tensor([3.0, 5.0])
        assert ranks == 1
        assert torch.equal(sum_over_ranks(counts.clone()), counts)  # one rank: its own counts
        return torch.tensor(MIM)


def take_step(labels: torch.Tensor = LABELS, **settings: Any) -> tuple[Engine, Model, torch.Tensor]:
    config = TrainConfig(beta=0.1, gradient_accumulation_steps=4)
    run: Any = SimpleNamespace(
        config=config, engine=Engine(), model=Model(), has_tasks=True, aux_loss="mim", padding_free=False
    )
    rows = {
        "keys": ["a", "b"],
        "samples": [{}, {}],
        "prompts": ["", ""],
        "is_padding": [False] * 2,
        "ignored": [False] * 2,
    }
    batch = Batch(DATASET_TASK, **rows, tensors={"labels": labels}, invalid=["an invalid sample"])
    losses, own = micro_step(run, batch, **settings)
    assert own == losses[1]  # one rank
    return run.engine, run.model, losses


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
    assert engine.calls[0] == ("forward", 1.0), "no division by zero"
    assert losses.isfinite().all()


@pytest.mark.parametrize(("patience", "waited", "ends"), [(None, 99, False), (3, 2, False), (3, 3, True), (1, 1, True)])
def test_early_stopping(patience: int | None, waited: int, ends: bool) -> None:
    said: list[str] = []
    run: Any = SimpleNamespace(
        config=TrainConfig(early_stopping_patience=patience), report=SimpleNamespace(say=said.append)
    )
    assert stops_early(run, TrainerState(best=123.4, waited=waited)) is ends
    assert len(said) == ends


class Sampler:
    """A position in epochs of ``PER_EPOCH`` micro-steps."""

    epoch = micro_step = 0

    def __len__(self) -> int:
        return PER_EPOCH

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.micro_step = epoch, 0


class Trainer(_Trainer):
    """A trainer whose optimizer steps do nothing, with the steps of its checkpoints and its evaluations."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.config, self.sampler, self.state = TrainConfig(**settings), Sampler(), TrainerState()  # type: ignore[assignment]
        self.steps_per_epoch, self.loader = PER_EPOCH, []  # type: ignore[assignment]
        self.total_steps = min(self.config.max_steps or 999, PER_EPOCH * self.config.num_train_epochs)
        self.saved: list[int] = []
        self.evaluated: list[float] = []
        self.metrics: Any = SimpleNamespace(write=self._record, close=lambda: None)
        self.weighting: Any = SimpleNamespace(weights={})
        report = SimpleNamespace(begin=lambda *given: None, say=lambda text: None, scores=lambda *given: None)
        status = SimpleNamespace(reached=lambda *given: None)
        self.run: Any = SimpleNamespace(
            config=self.config, directory=directory, report=report, status=status, advance=None, model=None, dev=Dev()
        )

    def _record(self, step: int, kind: str, epoch: float, **values: Any) -> None:
        self.evaluated.append(epoch)

    def _optimizer_step(self, batches: Any, window: int) -> None:
        self.state.step += 1
        self.sampler.micro_step += 1  # type: ignore[misc]

    def _save(self) -> None:
        self.saved.append(self.state.step)


class Dev:
    def __len__(self) -> int:
        return 1

    def __call__(self, model: Any, advance: Any) -> Any:
        return SimpleNamespace(counts={"posts/entity": Counts(1, 1, 1)})


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("settings", "saved", "evaluated"),
    [
        ({"num_train_epochs": 3}, [10, 20, 30], [1, 2, 3]),
        ({"num_train_epochs": 3, "eval_every_epochs": 2}, [10, 20, 30], [2, 3]),
        ({"num_train_epochs": 3, "max_steps": 4}, [4], [0.4]),
        ({"num_train_epochs": 3, "max_steps": 14}, [10, 14], [1, 1.4]),
        ({"num_train_epochs": 4, "max_steps": 10, "eval_every_epochs": 2}, [10], [1]),
        ({"num_train_epochs": 3, "max_steps": 20}, [10, 20], [1, 2]),
        ({"num_train_epochs": 9, "early_stopping_patience": 2}, [10, 20, 30], [1, 2, 3]),
    ],
)
def test_a_run_ends_with_a_checkpoint_and_an_evaluation(
    settings: dict[str, Any], saved: list[int], evaluated: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = []
    monkeypatch.setattr(loop, "plot_progress", lambda directory: None)
    monkeypatch.setattr(loop, "save_adapter", lambda run, target, *given: exported.append(target.name))
    trainer = Trainer(tmp_path, loss_weighting="none", **settings)
    trainer.train()
    assert (trainer.saved, trainer.evaluated, exported) == (saved, evaluated, ["best"])
    trainer.train()  # as a run that was killed in its last evaluation
    if "early_stopping_patience" not in settings and trainer.sampler.micro_step:
        assert trainer.evaluated == [*evaluated, evaluated[-1]]


STEPS, PER_EPOCH = 100, 10


def rates(schedule: str, **settings: Any) -> list[float]:
    config = TrainConfig(lr_scheduler_type=schedule, learning_rate=2.0, **{"warmup_ratio": 0.0, **settings})
    return [learning_rate(config, step, STEPS, PER_EPOCH) for step in range(STEPS)]


def test_constant_schedule() -> None:
    assert rates("constant") == [2.0] * STEPS


def test_linear_schedule() -> None:
    values = rates("linear")
    assert values[0] == 2.0
    assert values[50] == pytest.approx(1.0)
    differences = {round(first - second, 9) for first, second in pairwise(values)}
    assert differences == {0.02}
    assert values[-1] == pytest.approx(0.02)


def test_cosine_schedule() -> None:
    values = rates("cosine")
    assert values[0] == 2.0
    assert values[50] == pytest.approx(1.0)
    assert values[25] == pytest.approx(1.0 + 2**-0.5)
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] < 0.001


def test_step_schedule_halves_every_few_epochs() -> None:
    values = rates("step", step_epochs=3)
    assert values[:30] == [2.0] * 30
    assert values[30:60] == [1.0] * 30
    assert values[60:90] == [0.5] * 30
    assert values[90:] == [0.25] * 10


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_warm_up_is_linear(schedule: str) -> None:
    values = rates(schedule, warmup_ratio=0.1)
    assert values[:10] == pytest.approx([2.0 * (step + 1) / 11 for step in range(10)])
    assert values[10] == 2.0
    assert max(values) == 2.0
    assert min(values) > 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_the_schedule_of_a_single_step(schedule: str) -> None:
    config = TrainConfig(lr_scheduler_type=schedule, learning_rate=2.0, warmup_ratio=0.03)
    assert learning_rate(config, 0, 1, 1) == 2.0


@pytest.mark.parametrize("change", [{}, {"step": -1}, {"step": "3"}, {"best": None}, {"dev": {"a": "x"}}])
def test_a_saved_state_is_validated(change: dict[str, Any]) -> None:
    saved = {**vars(TrainerState(step=3, best=-1.0, dev={"a": 50.0})), **change}
    if not change:
        assert vars(loop._STATE.validate_json(json.dumps(saved), strict=True)) == saved
        return
    with pytest.raises(ValueError, match="validation error"):
        loop._STATE.validate_json(json.dumps(saved), strict=True)
