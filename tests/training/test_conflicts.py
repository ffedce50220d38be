"""The cosine between the datasets' gradients is what it is by hand, and measuring it leaves nothing behind."""

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

from lvlm_clorae.data.shard_reader import ShardReader
from lvlm_clorae.data.shards import load_index
from lvlm_clorae.errors import UserError
from lvlm_clorae.models.t5 import VisionT5
from lvlm_clorae.tasks.schema import in_task_order
from lvlm_clorae.training import conflicts, distributed
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.checks import check_conflicts
from lvlm_clorae.training.config import TrainConfig, load_config
from lvlm_clorae.training.conflicts import cosines, measure_conflicts, probe_batches, summary
from lvlm_clorae.training.deepspeed_config import read_deepspeed_file
from lvlm_clorae.training.job import Job
from lvlm_clorae.training.reporting import Reporter
from lvlm_clorae.training.status import Status
from lvlm_clorae.training.units import choose_units
from tests.launch import REPOSITORY, records, small_shards, train
from tests.models.tiny import tiny_config, tiny_processor
from tests.test_readme import blocks, commands

SHARED = {"clorae": r"universal_[AB]$|gate$|projector", "loramoe": r"\.(A|B|router)$|projector", "lora": r"lora_|proj"}


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    distributed.start()
    yield
    distributed.stop()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("conflicts") / "shards")


class Records(list[dict[str, Any]]):
    """Metrics that are kept in memory."""

    def write(self, step: int, kind: str, **values: Any) -> None:
        self.append({"step": step, "kind": kind, **values})


def tiny_job(shards: Path, directory: Path, adapter: str = "clorae") -> Job:
    """A job without an engine, its adapter away from zero as if it had been trained."""
    config = TrainConfig(adapter=adapter, rank=4, micro_batch=3, target_modules=["q", "v"], max_answer_length=16)
    reader = ShardReader(load_index(shards), shards)
    tasks = in_task_order(entry.task for entry in reader.index.datasets.values())
    torch.manual_seed(0)
    model = add_adapter(VisionT5(tiny_config()), config, tasks)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and adapter != "full":
                parameter.add_(torch.randn_like(parameter) / 10)
    (directory / "metrics.jsonl").touch()
    return Job(
        config=config,
        directory=directory,
        model=model.train(),
        engine=None,
        processor=tiny_processor(),
        report=Reporter(False, 1),
        units=choose_units(reader.index, config),
        tasks=tasks,
        reader=reader,
        status=Status(directory, 0),
    )


def measured(job: Job, step: int = 0) -> dict[str, Any]:
    found = Records()
    assert measure_conflicts(job, found, step)
    (record,) = found
    return record


def by_hand(job: Job, shared: str, step: int) -> np.ndarray:
    """The matrix from plain backward passes in float64."""
    model = copy.deepcopy(job.model).double().eval()
    flat = []
    for unit in job.units.train.values():
        for batch in probe_batches(job, unit, step):
            if job.has_tasks:
                model.set_task(unit.task)
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
    for unit in range(size):
        matrix[unit, unit] = products[2 * unit, 2 * unit + 1]
    return matrix


@pytest.mark.parametrize("adapter", ["clorae", "lora", "moslora", "loramoe", "full"])
def test_the_matrix_is_that_of_gradients_by_hand(adapter: str, shards: Path, tmp_path: Path) -> None:
    job = tiny_job(shards, tmp_path, adapter)
    record = measured(job, step=7)
    matrix = np.array(record["matrix"])
    assert record["units"] == list(job.units.train)
    assert len(matrix) > 3
    expected = by_hand(job, SHARED.get(adapter, ""), 7)
    assert np.abs(matrix - expected).max() < 1e-4
    pairs = expected[np.triu_indices(len(expected), 1)]
    assert record["between"] == pytest.approx(pairs.mean(), abs=1e-4)
    assert record["negative"] == pytest.approx((pairs < 0).mean(), abs=1e-6)
    assert record["within"] == pytest.approx(expected.diagonal().mean(), abs=1e-4)
    assert np.abs(expected - np.eye(len(expected))).max() > 0.05, "not trivially right"


def state_of(job: Job) -> dict[str, Any]:
    """What a measurement must leave alone."""
    return {
        "random": torch.get_rng_state().tolist(),
        "modes": [module.training for module in job.model.modules()],
        "task": job.model.base_model._context.tasks,
        "weights": {name: weight.clone() for name, weight in job.model.named_parameters()},
        "gradients": [weight.grad for weight in job.model.parameters()],
    }


def test_it_leaves_nothing_behind(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_job(shards, tmp_path)
    job.model.set_task("mre")
    before = state_of(job)
    directions = conflicts._direction

    def drawing(*arguments: Any) -> torch.Tensor:
        assert not job.model.training, "nothing is dropped"
        torch.rand(7)
        return directions(*arguments)

    monkeypatch.setattr(conflicts, "_direction", drawing)
    measured(job)
    after = state_of(job)
    weights = before.pop("weights")
    assert all(torch.equal(weights[name], weight) for name, weight in after.pop("weights").items())
    assert after == before
    assert job.model.base_model._context.side_terms == []
    assert before["gradients"] == [None] * len(before["gradients"])


def test_another_step_has_other_batches_and_the_same_step_the_same(shards: Path, tmp_path: Path) -> None:
    job = tiny_job(shards, tmp_path)
    unit = next(iter(job.units.train.values()))
    keys = {step: [batch.keys for batch in probe_batches(job, unit, step)] for step in (0, 20)}
    assert keys[0] == [batch.keys for batch in probe_batches(job, unit, 0)]
    assert keys[0] != keys[20]
    for first, second in keys.values():
        assert len({*first, *second}) == 2 * job.config.micro_batch, "no sample twice"
    assert measured(job) == measured(job)


def test_activations_are_recomputed_where_training_does_it(shards: Path, tmp_path: Path) -> None:
    job = tiny_job(shards, tmp_path)
    calls = []
    layer = job.model.get_submodule("base_model.model.encoder.block.1.layer.0.SelfAttention.k")
    layer.register_forward_hook(lambda *_: calls.append(1))
    plain = measured(job)
    once = len(calls)
    job.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = measured(job)
    assert len(calls) == once + 2 * once
    assert np.allclose(plain["matrix"], recomputed["matrix"], atol=1e-5)


def test_whoever_is_told_to_stop_measures_no_further(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, found, asked = tiny_job(shards, tmp_path), Records(), []
    monkeypatch.setattr(conflicts, "wished", lambda: bool(asked.append(1)) or len(asked) == 3)
    assert measure_conflicts(job, found, 4) is False
    assert (len(asked), found) == (3, [])
    assert job.model.training
    assert not (tmp_path / "conflicts.png").exists()


class Guess(nn.Module):
    """Says how likely class 1 is, whatever it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(1, 2))
        self.unread = nn.Parameter(torch.ones(3))

    def forward(self, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> Any:
        total = nn.functional.cross_entropy(self.logits.expand(labels.numel(), 2), labels.flatten(), reduction="sum")
        return SimpleNamespace(loss=total / num_items_in_batch)


def guessing_job(directory: Path, monkeypatch: pytest.MonkeyPatch, **answers: int) -> Any:
    (directory / "metrics.jsonl").touch()

    def batches(job: Any, unit: str, step: int) -> list[Any]:
        labels = torch.full((2, 3), answers[unit])
        return [SimpleNamespace(tensors={"labels": labels}), SimpleNamespace(tensors={"labels": labels})]

    monkeypatch.setattr(conflicts, "probe_batches", batches)
    quiet = SimpleNamespace(pulse=lambda: None, say=lambda text: None)
    units = SimpleNamespace(train={name: name for name in answers})
    return SimpleNamespace(model=Guess(), units=units, has_tasks=False, status=quiet, report=quiet, directory=directory)


def test_opposed_targets_conflict_and_equal_ones_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = measured(guessing_job(tmp_path, monkeypatch, yes=1, no=0, also_yes=1))
    assert np.allclose(record["matrix"], [[1, -1, 1], [-1, 1, -1], [1, -1, 1]], atol=1e-6)
    assert record["between"] == pytest.approx(-1 / 3, abs=1e-5)
    assert record["negative"] == pytest.approx(2 / 3, abs=1e-5)
    assert record["within"] == pytest.approx(1)


def test_one_unit_has_no_pairs_and_a_gradient_of_zero_no_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = measured(guessing_job(tmp_path, monkeypatch, yes=1))
    assert (record["between"], record["negative"], record["matrix"]) == (None, None, [[1.0]])
    job = guessing_job(tmp_path, monkeypatch, yes=1, no=0)
    with torch.no_grad():
        job.model.logits[0, 1] = 1e4  # of which nobody who says yes learns anything
    record = measured(job)
    assert record["matrix"] == [[None, None], [None, 1.0]]
    assert (record["between"], record["within"]) == (None, 1.0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 1000))
def test_entries_are_means_of_four_cosines(units: int, width: int, seed: int) -> None:
    vectors = torch.randn(units, 2, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors /= vectors.norm(dim=-1, keepdim=True)
    matrix = cosines(list(vectors.mean(1).float()))
    for (a, first), (b, second) in product(enumerate(vectors), repeat=2):
        expected = first[0] @ first[1] if a == b else (first @ second.T).mean()
        assert abs(matrix[a, b] - expected) < 1e-5
    record = summary([str(number) for number in range(units)], matrix)
    assert record["negative"] is None or 0 <= record["negative"] <= 1


def test_partitioned_weights_and_ones_that_nobody_shares_are_refused() -> None:
    three = {"zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match=r"zero3.json partitions them \(ZeRO-3\).*ds_configs/zero2.json"):
        check_conflicts(TrainConfig(log_conflicts=5, deepspeed="zero3.json"), three)
    with pytest.raises(UserError, match="Leave out --log-conflicts or --no-use-universal"):
        check_conflicts(TrainConfig(log_conflicts=5, use_universal=False), {})
    check_conflicts(TrainConfig(log_conflicts=0), three)
    check_conflicts(TrainConfig(log_conflicts=5, adapter="none"), three)
    check_conflicts(TrainConfig(log_conflicts=5, adapter="lora", use_universal=False), {})


@pytest.mark.slow
def test_the_command_of_the_training_page(shards: Path, tmp_path: Path) -> None:
    """As it stands, but for fewer samples and steps; nothing of the training changes by it."""
    (line,) = [line for _, text in blocks(REPOSITORY / "docs/training.md", "bash") for line in commands(text)]
    words = shlex.split(line)
    assert words[:2] == ["deepspeed", "train.py"]
    config = load_config(words[2:])
    check_conflicts(config, read_deepspeed_file(REPOSITORY / config.deepspeed))
    assert config.log_conflicts == 20
    few = ["--shards", shards, "--micro-batch", 4, "--max-steps", 21, "--log-every", 1, "--max-answer-length", 16]
    log = train(tmp_path / "with", 1, *words[2:], *few)
    train(tmp_path / "without", 1, *words[2:], *few, "--log-conflicts", 0)
    found = records(tmp_path / "with", "conflicts")
    assert [record["step"] for record in found] == [0, 20]
    assert f"cosine {found[1]['between']:.3f} between datasets, {found[1]['within']:.3f} within" in log
    assert (tmp_path / "with/conflicts.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "without/conflicts.png").exists()
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    assert records(tmp_path / "with", "train") == records(tmp_path / "without", "train")
