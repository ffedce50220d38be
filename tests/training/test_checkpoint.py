"""Checkpoints: bit-exact under any ZeRO stage, safe against kills and full disks, with errors that name the cause."""

from __future__ import annotations

import copy
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

from lvlm_clorae.digests import write_digests
from lvlm_clorae.errors import UserError
from lvlm_clorae.models.fingerprint import HASHED_FROM, base_fingerprint
from lvlm_clorae.training import checkpoint, distributed
from lvlm_clorae.training.checkpoint import VERSION, check_fingerprint
from lvlm_clorae.training.optimizer_state import trained_shapes

pytestmark = pytest.mark.integration

SIZES = (7, 5)  # odd, so that partitions are padded


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.start()
    yield
    distributed.stop()


def engine(stage: int, seed: int = 0, **more: Any) -> Any:
    """Return a small engine with one frozen weight."""
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
    return {"fingerprint": fingerprint_of(of.module), **more}


def fingerprint_of(model: Any) -> dict[str, Any]:
    """As in lvlm_clorae/training/setup.py, of the frozen weights alone: here they are trained from the start."""
    frozen = nn.ModuleDict({name: part for name, part in model.named_children() if not _is_trained(part)})
    return {"precision": "fp32", "base": base_fingerprint(frozen), "trained": trained_shapes(model)}


def _is_trained(part: nn.Module) -> bool:
    return any(weight.requires_grad for weight in part.parameters())


def save(directory: Path, of: Any, step: int, keep: int = 2) -> Path:
    return checkpoint.save(directory, of, step, state_of(of, progress=step), keep)


def load(path: Path, of: Any) -> Any:
    """Load a checkpoint and return its progress."""
    found, state = checkpoint.load([path], of, state_of(of)["fingerprint"], lambda line: None)
    assert found == path
    return state["progress"]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_training_continues_bit_exactly_under_any_zero_stage(before: int, after: int, tmp_path: Path) -> None:
    whole = engine(before)
    steps(whole, range(3))
    path = save(tmp_path, whole, 3)
    steps(whole, range(3, 6))  # consumes random numbers as well
    resumed = engine(after)
    initial = weights(resumed)
    assert load(path, resumed) == 3
    assert not equal(weights(resumed), initial)
    steps(resumed, range(3, 6))
    assert equal(weights(resumed), weights(whole))


def test_bf16_training_resumes_with_its_master_weights(tmp_path: Path) -> None:
    adam = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}  # without compiling DeepSpeed's own
    settings: dict[str, Any] = {"bf16": {"enabled": True}, "optimizer": adam}
    whole = engine(2, **settings)
    steps(whole, range(3))
    path = save(tmp_path, whole, 3)
    steps(whole, range(3, 9))
    resumed = engine(2, **settings)
    load(path, resumed)
    steps(resumed, range(3, 9))
    assert equal(weights(resumed), weights(whole))


def test_a_checkpoint_holds_no_frozen_weights_and_little_overhead(tmp_path: Path) -> None:
    whole = engine(2)
    steps(whole, range(1))
    path = save(tmp_path, whole, 1)
    trained = sum(weight.numel() for weight in whole.module.parameters() if weight.requires_grad)
    size = sum(file.stat().st_size for file in path.iterdir())
    assert size < 12 * trained + 12_000
    assert sorted(file.name for file in path.iterdir()) == [
        "SHA256SUMS",
        "random.safetensors",
        "state.json",
        "trained-00001.safetensors",
    ]


def test_weights_are_split_over_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    whole = engine(2)
    steps(whole, range(2))
    path = save(tmp_path, whole, 2)
    assert len(list(path.glob("trained-*.safetensors"))) > 3
    resumed = engine(2, seed=1)
    resumed.module[0].weight.data.copy_(whole.module[0].weight.data)  # frozen, so not in the checkpoint
    load(path, resumed)
    assert equal(weights(resumed), weights(whole))


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    whole = engine(2)
    for step in range(1, 5):
        steps(whole, range(step, step + 1))
        save(tmp_path, whole, step, keep=3)
        written = (tmp_path / "checkpoints").stat().st_mtime_ns
        save(tmp_path, whole, step, keep=3)  # exists already
        assert (tmp_path / "checkpoints").stat().st_mtime_ns == written
    assert [path.name for path in checkpoint.complete_checkpoints(tmp_path)] == [f"step-0000000{n}" for n in (2, 3, 4)]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3, "no temporary files are left"


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    whole = engine(2)
    steps(whole, range(1))
    first = save(tmp_path, whole, 1)
    steps(whole, range(1, 2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write fails partway, as with a quota
    try:
        with pytest.raises(UserError, match=r"step-00000002.*step-00000001.*--resume_from_checkpoint") as caught:
            save(tmp_path, whole, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.everywhere
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [first.name]
    load(first, whole)
    assert save(tmp_path, whole, 2).name == "step-00000002", "saving works again with free space"


def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill a child at its first, second, third ... file operation, until it saves without being killed."""
    whole, other = engine(2), engine(2)
    steps(whole, range(1))
    save(tmp_path / "before", whole, 1)
    steps(whole, range(1, 2))
    tensors = list(checkpoint.optimizer_state.gather(whole))  # a forked child has no threads to communicate
    monkeypatch.setattr(checkpoint.optimizer_state, "gather", lambda engine: iter(tensors))
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
        newest.append(load(path, other))
        assert path.name == f"step-0000000{newest[-1]}"
        save(directory, whole, 3, keep=1)  # leftovers are removed
        assert [left.name for left in (directory / "checkpoints").iterdir()] == ["step-00000003"]
        if status == 0:
            break
    assert len(newest) > 8
    assert newest == sorted(newest), "the new checkpoint appears at one moment"
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


@pytest.mark.parametrize("name", ["trained-00001.safetensors", "random.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["bit", "truncated", "missing"])
def test_a_damaged_checkpoint_is_never_loaded(name: str, damage: str, tmp_path: Path) -> None:
    whole = engine(2)
    steps(whole, range(1))
    older = save(tmp_path, whole, 1)
    steps(whole, range(1, 2))
    newer = save(tmp_path, whole, 2)
    fingerprint = state_of(whole)["fingerprint"]
    data = bytearray((newer / name).read_bytes())
    data[len(data) // 2] ^= 1
    (newer / name).write_bytes(data if damage == "bit" else data[:-20])
    if damage == "missing":
        (newer / name).unlink()
    lines: list[str] = []
    path, state = checkpoint.load([older, newer], whole, fingerprint, lines.append)
    assert (path, state["progress"]) == (older, 1)
    assert str(newer) in lines[0]
    with pytest.raises(UserError, match=str(newer)):
        checkpoint.load([newer], whole, fingerprint, lines.append)


def test_a_checkpoint_of_an_earlier_release_is_refused(tmp_path: Path) -> None:
    whole = engine(2)
    steps(whole, range(1))
    path = save(tmp_path, whole, 1)
    state = json.loads((path / "state.json").read_text())
    state["identity"] = state.pop("fingerprint")  # as version 3 called it
    for version in (VERSION - 1, VERSION):
        (path / "state.json").write_text(json.dumps({**state, "version": version}))
        write_digests(path)
        with pytest.raises(UserError, match=rf"version {version}.*version {VERSION}.*release that wrote it") as caught:
            load(path, whole)
        assert caught.value.everywhere
        assert "\n" not in str(caught.value)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.vision_tower = nn.Linear(HASHED_FROM, 1), nn.Linear(HASHED_FROM, 1)
        self.projector = nn.Linear(3, 2)
        self.encoder.requires_grad_(False)
        self.vision_tower.requires_grad_(False)


def fingerprint(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Base()
    for name, change in changes.items():
        change(getattr(model, name))
    return fingerprint_of(model)


def test_fingerprints_ignore_the_values_of_trained_weights() -> None:
    check_fingerprint(fingerprint(), fingerprint(), "step-1")
    trained = fingerprint(projector=lambda part: part.weight.data.fill_(3.0))
    check_fingerprint(fingerprint(), trained, "step-1")


@pytest.mark.parametrize(("part", "named"), [("encoder", "language model"), ("vision_tower", "vision tower")])
def test_changed_frozen_weights_are_named(part: str, named: str) -> None:
    changed = fingerprint(**{part: lambda module: module.weight.data[0, :3].add_(1)})
    with pytest.raises(UserError, match=rf"step-1.*base \({named}"):
        check_fingerprint(fingerprint(), changed, "step-1")


def test_a_changed_adapter_is_named() -> None:
    changed = copy.deepcopy(fingerprint())
    changed["trained"]["projector.weight"] = [3, 3]
    with pytest.raises(UserError, match=r"projector.weight\): \[2, 3\] then, \[3, 3\] now"):
        check_fingerprint(fingerprint(), changed, "step-1")
    with pytest.raises(UserError, match=r"encoder.weight\): not trained then"):
        check_fingerprint(fingerprint(), fingerprint(encoder=lambda part: part.requires_grad_(True)), "step-1")


def test_a_changed_precision_is_named() -> None:
    with pytest.raises(UserError, match="--bf16 false"):
        check_fingerprint(fingerprint(), {**fingerprint(), "precision": "bf16"}, "step-1")
