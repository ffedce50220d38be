"""Gradient conflict and auxiliary share equal a float64 reference, and measuring them does not affect training."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lvlm_clorae.data.dataset import ShardDataset
from lvlm_clorae.data.index import load_index
from lvlm_clorae.errors import UserError
from lvlm_clorae.models.families.t5 import VisionT5
from lvlm_clorae.tasks.schema import in_task_order
from lvlm_clorae.training import distributed, gradients
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.checks import check_conflicts
from lvlm_clorae.training.config import TrainConfig
from lvlm_clorae.training.config_loading import load_config
from lvlm_clorae.training.dataset_tasks import choose_dataset_tasks
from lvlm_clorae.training.deepspeed_config import read_deepspeed_file
from lvlm_clorae.training.gradients import aux_gradient_share, cosines, measure_conflicts, probe_batches, summary
from lvlm_clorae.training.loop import micro_step
from lvlm_clorae.training.reporting import Reporter
from lvlm_clorae.training.run_directory import Status
from lvlm_clorae.training.setup import Run, compute_losses
from tests.helpers.fork_server import train
from tests.helpers.launch import REPOSITORY, records, small_shards
from tests.helpers.pages import commands
from tests.helpers.tiny import tiny_config, tiny_processor

SHARED = {
    "clorae": r"universal_[AB]$|gate$|projector",
    "loramoe": r"\.(A|B|router)$|projector",
    "hydralora": r"\.(A|B|router)$|projector",
    "mtllora": r"\.(A|B)$|projector",
    "lora": r"lora_|proj",
}


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    distributed.start()
    yield
    distributed.stop()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("conflicts") / "shards")


class Records(list[dict[str, Any]]):
    """Metrics in memory."""

    def write(self, step: int, kind: str, **values: Any) -> None:
        self.append({"step": step, "kind": kind, **values})


def tiny_run(shards: Path, directory: Path, adapter: str = "clorae", dropout: float = 0.1) -> Run:
    """Return a run without an engine, with random adapter weights as after some training."""
    settings: dict[str, Any] = {
        "lora_rank": 4,
        "per_device_train_batch_size": 3,
        "target_modules": ["q", "v"],
        "max_target_length": 16,
    }
    config = TrainConfig(adapter=adapter, lora_dropout=dropout, **settings)
    dataset = ShardDataset(load_index(shards), shards)
    tasks = in_task_order(entry.task for entry in dataset.index.datasets.values())
    torch.manual_seed(0)
    model = add_adapter(VisionT5(tiny_config(dropout_rate=dropout)), config, tasks)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and adapter != "full":
                parameter.add_(torch.randn_like(parameter) / 10)
    (directory / "metrics.jsonl").touch()
    return Run(
        config=config,
        directory=directory,
        model=model.train(),
        engine=None,
        processor=tiny_processor(),
        report=Reporter(False),
        dataset_tasks=choose_dataset_tasks(dataset.index, config),
        tasks=tasks,
        dataset=dataset,
        status=Status(directory, 0),
    )


def measured(run: Run, step: int = 0) -> dict[str, Any]:
    found = Records()
    assert measure_conflicts(run, found, step)
    (record,) = found
    return record


def reference_matrix(run: Run, shared: str, step: int) -> np.ndarray:
    """Return the matrix from plain backward passes in float64."""
    model = copy.deepcopy(run.model).double().eval()
    flat = []
    for dataset_task in run.dataset_tasks.train.values():
        for batch in probe_batches(run, dataset_task, step):
            if run.has_tasks:
                model.set_task(dataset_task.task)
            model.zero_grad()
            wide = {
                name: value.double() if value.is_floating_point() else value for name, value in batch.tensors.items()
            }
            model(**wide).loss.backward()
            grads = [p.grad for name, p in model.named_parameters() if p.requires_grad and re.search(shared, name)]
            vector = torch.cat([grad.flatten() for grad in grads if grad is not None]).numpy()
            flat.append(vector / np.linalg.norm(vector))
    products = np.array(flat) @ np.array(flat).T
    size = len(flat) // 2
    matrix = products.reshape(size, 2, size, 2).mean((1, 3))
    for dataset_task in range(size):
        matrix[dataset_task, dataset_task] = products[2 * dataset_task, 2 * dataset_task + 1]
    return matrix


@pytest.mark.integration
@pytest.mark.parametrize("adapter", ["clorae", "lora", "moslora", "loramoe", "mtllora", "hydralora", "full"])
def test_the_conflict_matrix_equals_a_float64_reference(adapter: str, shards: Path, tmp_path: Path) -> None:
    run = tiny_run(shards, tmp_path, adapter)
    record = measured(run, step=7)
    matrix = np.array(record["matrix"])
    assert record["dataset_tasks"] == list(run.dataset_tasks.train)
    assert len(matrix) > 3
    expected = reference_matrix(run, SHARED.get(adapter, ""), 7)
    assert np.abs(matrix - expected).max() < 1e-4
    pairs = expected[np.triu_indices(len(expected), 1)]
    assert record["between"] == pytest.approx(pairs.mean(), abs=1e-4)
    assert record["negative"] == pytest.approx((pairs < 0).mean(), abs=1e-6)
    assert record["within"] == pytest.approx(expected.diagonal().mean(), abs=1e-4)
    assert np.abs(expected - np.eye(len(expected))).max() > 0.05, "not trivially equal"


def state_of(run: Run) -> dict[str, Any]:
    """Return the state that a measurement must not change."""
    return {
        "random": torch.get_rng_state().tolist(),
        "modes": [module.training for module in run.model.modules()],
        "task": run.model.base_model._context.tasks,
        "weights": {name: weight.clone() for name, weight in run.model.named_parameters()},
        "gradients": [weight.grad for weight in run.model.parameters()],
    }


def test_measuring_conflicts_restores_the_state(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(shards, tmp_path)
    run.model.set_task("mre")
    before = state_of(run)
    directions = gradients._direction

    def consume_random_numbers(*arguments: Any) -> torch.Tensor:
        assert not run.model.training, "dropout is off"
        torch.rand(7)
        return directions(*arguments)

    monkeypatch.setattr(gradients, "_direction", consume_random_numbers)
    measured(run)
    after = state_of(run)
    weights = before.pop("weights")
    assert all(torch.equal(weights[name], weight) for name, weight in after.pop("weights").items())
    assert after == before
    assert run.model.base_model._context.aux_terms == []
    assert before["gradients"] == [None] * len(before["gradients"])


def test_probe_batches_depend_on_the_step_only(shards: Path, tmp_path: Path) -> None:
    run = tiny_run(shards, tmp_path)
    dataset_task = next(iter(run.dataset_tasks.train.values()))
    keys = {step: [batch.keys for batch in probe_batches(run, dataset_task, step)] for step in (0, 20)}
    assert keys[0] == [batch.keys for batch in probe_batches(run, dataset_task, 0)]
    assert keys[0] != keys[20]
    for first, second in keys.values():
        assert len({*first, *second}) == 2 * run.config.per_device_train_batch_size, "distinct samples"
    assert measured(run) == measured(run)


def test_conflicts_use_gradient_checkpointing_if_training_does(shards: Path, tmp_path: Path) -> None:
    run = tiny_run(shards, tmp_path)
    calls = []
    layer = run.model.get_submodule("base_model.model.encoder.block.1.layer.0.SelfAttention.k")
    layer.register_forward_hook(lambda *_: calls.append(1))
    plain = measured(run)
    once = len(calls)
    run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = measured(run)
    assert len(calls) == once + 2 * once
    assert np.allclose(plain["matrix"], recomputed["matrix"], atol=1e-5)


def test_a_stop_request_ends_the_measurement(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, found, asked = tiny_run(shards, tmp_path), Records(), []
    monkeypatch.setattr(gradients, "stop_requested", lambda: bool(asked.append(1)) or len(asked) == 3)
    assert measure_conflicts(run, found, 4) is False
    assert (len(asked), found) == (3, [])
    assert run.model.training
    assert not (tmp_path / "conflicts.png").exists()


class Engine:
    """The parts of DeepSpeed's engine that a micro-step uses, on one process."""

    def __init__(self, run: Run) -> None:
        self.model, self.accumulation = run.model, run.config.gradient_accumulation_steps

    def __call__(self, **tensors: Any) -> Any:
        return self.model(**tensors)

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        pass

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        pass


def reference_share(run: Run, batch: Any, weight: float) -> float:
    """Return the share from separate gradients of both losses, in the model's precision."""
    named = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
    weights = [p for name, p in named if re.search(r"expert_[AB]$", name)] or [p for _, p in named]
    ce, aux = compute_losses(run, run.model, batch)
    norms = []
    for loss in (run.config.beta * aux, weight * ce):
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        norms.append(torch.stack([gradient.norm() for gradient in found]).norm().item())
    return norms[0] / norms[1]


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("adapter", ["clorae", "loramoe"])
def test_the_auxiliary_share_equals_a_float64_reference(
    adapter: str, window: int, shards: Path, tmp_path: Path
) -> None:
    run = tiny_run(shards, tmp_path, adapter, dropout=0.0)
    run.engine, batch = Engine(run), next(iter(run.train_dataloader(run.train_sampler())))
    with aux_gradient_share(run, batch, window) as share:
        micro_step(run, batch, 1.5, window, last=True)
    found = share()
    run.model.double()
    for name, tensor in batch.tensors.items():
        batch.tensors[name] = tensor.double() if tensor.is_floating_point() else tensor
    expected = reference_share(run, batch, 1.5)
    assert found == pytest.approx(expected, rel=1e-4)
    assert 1e-6 < expected < 1e6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_measuring_the_auxiliary_share_does_not_affect_training(
    checkpointing: bool, shards: Path, tmp_path: Path
) -> None:
    """With dropout, so that the measurement must repeat the random numbers of the training step."""
    run = tiny_run(shards, tmp_path)
    if checkpointing:
        run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run.engine, batch = Engine(run), next(iter(run.train_dataloader(run.train_sampler())))
    before = torch.get_rng_state()
    micro_step(run, batch, 1.0, 1, last=True)
    after, expected = torch.get_rng_state(), [p.grad for p in run.model.parameters()]
    run.model.zero_grad()
    torch.set_rng_state(before)
    reference = reference_share(run, batch, 1.0)
    torch.set_rng_state(before)
    with aux_gradient_share(run, batch, 1) as share:
        assert all(p.grad is None for p in run.model.parameters())
        micro_step(run, batch, 1.0, 1, last=True)
    assert share() == pytest.approx(reference, rel=1e-4)
    assert torch.equal(torch.get_rng_state(), after)
    for grad, p in zip(expected, run.model.parameters(), strict=True):
        assert (grad is None and p.grad is None) or torch.equal(grad, p.grad)
    micro_step(run, batch, 1.0, 1, last=True)
    assert share() == pytest.approx(reference, rel=1e-4), "the hooks are removed"


def test_without_an_auxiliary_gradient_the_share_is_zero(shards: Path, tmp_path: Path) -> None:
    run = tiny_run(shards, tmp_path)
    run.model.base_model.aux_loss = lambda *_: torch.zeros(())
    run.engine, batch = Engine(run), next(iter(run.train_dataloader(run.train_sampler())))
    with aux_gradient_share(run, batch, 1) as share:
        micro_step(run, batch, 1.0, 1, last=True)
    assert share() == 0


class BiasOnly(nn.Module):
    """A classifier of two classes that ignores its input."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(1, 2))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> Any:
        total = nn.functional.cross_entropy(self.logits.expand(labels.numel(), 2), labels.flatten(), reduction="sum")
        return SimpleNamespace(loss=total / num_items_in_batch)


def bias_only_run(directory: Path, monkeypatch: pytest.MonkeyPatch, **answers: int) -> Any:
    (directory / "metrics.jsonl").touch()

    def batches(run: Any, dataset_task: str, step: int) -> list[Any]:
        labels = torch.full((2, 3), answers[dataset_task])
        return [SimpleNamespace(tensors={"labels": labels}), SimpleNamespace(tensors={"labels": labels})]

    monkeypatch.setattr(gradients, "probe_batches", batches)
    quiet = SimpleNamespace(heartbeat=lambda: None, say=lambda text: None)
    dataset_tasks = SimpleNamespace(train={name: name for name in answers})
    return SimpleNamespace(
        model=BiasOnly(),
        dataset_tasks=dataset_tasks,
        has_tasks=False,
        padding_free=False,
        aux_loss=None,
        status=quiet,
        report=quiet,
        directory=directory,
    )


def test_opposite_targets_conflict_and_equal_targets_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = measured(bias_only_run(tmp_path, monkeypatch, yes=1, no=0, also_yes=1))
    assert np.allclose(record["matrix"], [[1, -1, 1], [-1, 1, -1], [1, -1, 1]], atol=1e-6)
    assert record["between"] == pytest.approx(-1 / 3, abs=1e-5)
    assert record["negative"] == pytest.approx(2 / 3, abs=1e-5)
    assert record["within"] == pytest.approx(1)


def test_single_dataset_tasks_and_zero_gradients_give_undefined_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = measured(bias_only_run(tmp_path, monkeypatch, yes=1))
    assert (record["between"], record["negative"], record["matrix"]) == (None, None, [[1.0]])
    run = bias_only_run(tmp_path, monkeypatch, yes=1, no=0)
    with torch.no_grad():
        run.model.logits[0, 1] = 1e4  # saturated: no gradient for class 1
    record = measured(run)
    assert record["matrix"] == [[None, None], [None, 1.0]]
    assert (record["between"], record["within"]) == (None, 1.0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 1000))
def test_matrix_entries_are_means_of_four_cosines(dataset_tasks: int, width: int, seed: int) -> None:
    vectors = torch.randn(dataset_tasks, 2, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors /= vectors.norm(dim=-1, keepdim=True)
    matrix = cosines(list(vectors.mean(1).float()))
    for (a, first), (b, second) in product(enumerate(vectors), repeat=2):
        expected = first[0] @ first[1] if a == b else (first @ second.T).mean()
        assert abs(matrix[a, b] - expected) < 1e-5
    record = summary([str(number) for number in range(dataset_tasks)], matrix)
    assert record["negative"] is None or 0 <= record["negative"] <= 1


def test_conflicts_need_whole_and_shared_weights() -> None:
    three = {"zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match=r"zero3.json.*zero2"):
        check_conflicts(TrainConfig(log_conflicts=5, deepspeed="zero3.json"), three)
    with pytest.raises(UserError, match="use_universal"):
        check_conflicts(TrainConfig(log_conflicts=5, use_universal=False), {})
    check_conflicts(TrainConfig(log_conflicts=0), three)
    check_conflicts(TrainConfig(log_conflicts=5, adapter="none"), three)
    check_conflicts(TrainConfig(log_conflicts=5, adapter="lora", use_universal=False), {})


@pytest.mark.slow
def test_the_command_of_the_training_page_does_not_change_training(shards: Path, tmp_path: Path) -> None:
    """With fewer samples and steps."""
    lines = commands(REPOSITORY / "docs/training.md", "deepspeed train.py")
    assert all(load_config(shlex.split(line)[2:]) for line in lines)
    (line,) = (line for line in lines if "--log_conflicts" in line)
    words = shlex.split(line)
    config = load_config(words[2:])
    check_conflicts(config, read_deepspeed_file(REPOSITORY / config.deepspeed))
    assert config.log_conflicts == 20
    few = [
        "--shards",
        shards,
        "--per_device_train_batch_size",
        4,
        "--max-steps",
        21,
        "--logging_steps",
        1,
        "--max_target_length",
        16,
    ]
    log = train(tmp_path / "with", 1, *words[2:], *few)
    train(tmp_path / "without", 1, *words[2:], *few, "--log-conflicts", 0)
    found = records(tmp_path / "with", "conflicts")
    assert [record["step"] for record in found] == [0, 20]
    assert f"{found[1]['between']:.3f}" in log
    assert (tmp_path / "with/conflicts.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "without/conflicts.png").exists()
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    assert records(tmp_path / "with", "train") == records(tmp_path / "without", "train")
