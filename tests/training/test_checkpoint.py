"""A checkpoint brings back every bit under any ZeRO stage, survives a kill at any moment, and says what is wrong."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lvlm_clorae.errors import UserError
from lvlm_clorae.training import checkpoint, distributed
from lvlm_clorae.training.identity import run_identity

SIZES = (7, 5)  # odd, so that parts are padded


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.start()
    yield
    distributed.stop()


def engine(stage: int, seed: int = 0, **more: Any) -> Any:
    """A small engine with one frozen weight."""
    import deepspeed

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(100, SIZES[0]), nn.Tanh(), nn.Linear(SIZES[0], SIZES[1]), nn.Linear(SIZES[1], 1))
    model[0].weight.requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, **more}
    optimizer = None if "optimizer" in more else torch.optim.AdamW(trained, lr=0.01)
    return deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=settings)[0]


def steps(of: Any, numbers: range) -> None:
    for number in numbers:
        inputs = torch.randn(4, 100, generator=torch.Generator().manual_seed(number))
        loss = (of(inputs.to(next(of.parameters()).dtype)).float() - torch.rand(1)).square().mean()
        of.backward(loss)
        of.step()


def weights(of: Any) -> dict[str, torch.Tensor]:
    return distributed.gathered_state(of.module, trainable_only=False)


def state_of(of: Any, **more: Any) -> dict[str, Any]:
    return {"identity": run_identity(of.module, "fp32"), **more}


def save(directory: Path, of: Any, step: int, keep: int = 2) -> Path:
    return checkpoint.save(directory, of, step, state_of(of, progress=step), keep)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_what_follows_is_the_same_under_any_stage(before: int, after: int, tmp_path: Path) -> None:
    whole = engine(before)
    steps(whole, range(3))
    path = save(tmp_path, whole, 3)
    steps(whole, range(3, 6))  # draws random numbers as well
    gone_on = engine(after)
    fresh = weights(gone_on)
    assert checkpoint.load(path, gone_on, state_of(gone_on)["identity"])["progress"] == 3
    assert not equal(weights(gone_on), fresh)
    steps(gone_on, range(3, 6))
    assert equal(weights(gone_on), weights(whole))


def test_bf16_keeps_its_master_weights(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
    whole = engine(2, **settings)
    steps(whole, range(3))
    path = save(tmp_path, whole, 3)
    steps(whole, range(3, 9))
    gone_on = engine(2, **settings)
    checkpoint.load(path, gone_on, state_of(gone_on)["identity"])
    steps(gone_on, range(3, 9))
    assert equal(weights(gone_on), weights(whole))


def test_it_holds_nothing_frozen_and_little_else(tmp_path: Path) -> None:
    whole = engine(2)
    steps(whole, range(1))
    path = save(tmp_path, whole, 1)
    trained = sum(weight.numel() for weight in whole.module.parameters() if weight.requires_grad)
    size = sum(file.stat().st_size for file in path.iterdir())
    assert size < 12 * trained + 12_000
    assert sorted(file.name for file in path.iterdir()) == [
        "random.safetensors",
        "state.json",
        "trained-00001.safetensors",
    ]


def test_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    whole = engine(2)
    steps(whole, range(2))
    path = save(tmp_path, whole, 2)
    assert len(list(path.glob("trained-*.safetensors"))) > 3
    gone_on = engine(2, seed=1)
    gone_on.module[0].weight.data.copy_(whole.module[0].weight.data)  # frozen, so not in the checkpoint
    checkpoint.load(path, gone_on, state_of(gone_on)["identity"])
    assert equal(weights(gone_on), weights(whole))


def test_so_many_are_kept(tmp_path: Path) -> None:
    whole = engine(2)
    for step in range(1, 5):
        steps(whole, range(step, step + 1))
        save(tmp_path, whole, step, keep=3)
        written = (tmp_path / "checkpoints").stat().st_mtime_ns
        save(tmp_path, whole, step, keep=3)  # is there already
        assert (tmp_path / "checkpoints").stat().st_mtime_ns == written
    assert [path.name for path in checkpoint.complete_checkpoints(tmp_path)] == [f"step-0000000{n}" for n in (2, 3, 4)]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3, "nothing is left over"


def test_a_full_disk_leaves_the_one_before(tmp_path: Path) -> None:
    whole = engine(2)
    steps(whole, range(1))
    first = save(tmp_path, whole, 1)
    steps(whole, range(1, 2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a quota does, a write fails in its middle
    try:
        with pytest.raises(UserError, match=r"step-00000002.*could not be written.*step-00000001.*Make room") as caught:
            save(tmp_path, whole, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.everywhere
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [first.name]
    checkpoint.load(first, whole, state_of(whole)["identity"])
    assert save(tmp_path, whole, 2).name == "step-00000002", "with room it goes on"


def test_a_kill_at_any_moment_leaves_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child is killed at its first, second, third ... operation on a file, until it has saved in peace."""
    whole, other = engine(2), engine(2)
    steps(whole, range(1))
    save(tmp_path / "before", whole, 1)
    steps(whole, range(1, 2))
    tensors = list(checkpoint.trained_state.gather(whole))  # a forked child has no threads to communicate
    monkeypatch.setattr(checkpoint.trained_state, "gather", lambda engine: iter(tensors))
    newest = []
    for operation in itertools.count(1):
        directory = tmp_path / str(operation)
        shutil.copytree(tmp_path / "before", directory)
        child = os.fork()
        if child == 0:
            _kill_at(operation)
            save(directory, whole, 2, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        path = checkpoint.complete_checkpoints(directory)[-1]
        newest.append(checkpoint.load(path, other, state_of(other)["identity"])["progress"])
        assert path.name == f"step-0000000{newest[-1]}"
        save(directory, whole, 3, keep=1)  # what was left is in nobody's way, and goes
        assert [left.name for left in (directory / "checkpoints").iterdir()] == ["step-00000003"]
        if status == 0:
            break
    assert len(newest) > 8
    assert newest == sorted(newest), "made current at one moment"
    assert {1, 2} == set(newest[:-1])


def _kill_at(operation: int) -> None:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir"):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("name", ["trained-00001.safetensors", "random.safetensors", "state.json"])
def test_a_damaged_file(name: str, tmp_path: Path) -> None:
    whole = engine(2)
    steps(whole, range(1))
    path = save(tmp_path, whole, 1)
    (path / name).write_bytes((path / name).read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot be read.*Remove it to go on from the one before"):
        checkpoint.load(path, whole, state_of(whole)["identity"])


def test_another_version(tmp_path: Path) -> None:
    whole = engine(2)
    steps(whole, range(1))
    path = save(tmp_path, whole, 1)
    (path / "state.json").write_text(json.dumps({**json.loads((path / "state.json").read_text()), "version": 99}))
    with pytest.raises(UserError, match="has version 99"):
        checkpoint.load(path, whole, state_of(whole)["identity"])
