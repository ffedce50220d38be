"""recipes/real_base: the ONNX reader on a file made by hand, and the build from the package registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lvlm_clorae.models import load_model
from lvlm_clorae.models.vision import VisionTower
from tests.helpers.fork_server import train
from tests.helpers.launch import REPOSITORY, records, small_shards

RECIPE = REPOSITORY / "recipes/real_base"
sys.path.insert(0, str(RECIPE))

from onnx_weights import read_weights  # noqa: E402


def varint(value: int) -> bytes:
    head, rest = value & 127, value >> 7
    return bytes([head | 128]) + varint(rest) if rest else bytes([head])


def field(number: int, content: int | str | bytes) -> bytes:
    """Encode a field of a protobuf message."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    data = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(name: str, values: torch.Tensor) -> bytes:
    shape = b"".join(field(1, size) for size in values.shape)
    return field(5, shape + field(2, 1) + field(8, name) + field(9, values.numpy().tobytes()))


def node(kind: str, inputs: list[str], output: str) -> bytes:
    return field(1, b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind))


def test_reads_weights_under_the_names_of_their_biases(tmp_path: Path) -> None:
    weight, bias = torch.randn(3, 200), torch.randn(200)
    graph = node("MatMul", ["x", "onnx::MatMul_7"], "y") + node("Add", ["fc1.bias", "y"], "z")
    graph += tensor("onnx::MatMul_7", weight) + tensor("fc1.bias", bias)
    path = tmp_path / "model.onnx"
    path.write_bytes(field(1, 8) + field(7, graph))
    found = read_weights(path)
    assert set(found) == {"fc1.weight", "fc1.bias"}
    assert torch.equal(found["fc1.weight"], weight.T)
    assert torch.equal(found["fc1.bias"], bias)


def test_a_file_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(field(7, tensor("a", torch.zeros(9)))[:-5])
    with pytest.raises(ValueError, match="cut off"):
        read_weights(path)


def build(output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPE / "build.py"), "--output", str(output), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)


@pytest.fixture(scope="session")
def real_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct with EfficientNet-Lite0, built once in a test session."""
    output = tmp_path_factory.mktemp("real") / "base"
    done = build(output, "--tower", "efficientnet_lite0")
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
def test_an_existing_output_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    done = build(tmp_path / "base")
    assert done.returncode == 2
    assert "exists" in done.stderr


@pytest.mark.slow
def test_the_language_model_answers(real_base: Path) -> None:
    model, processor = load_model(str(real_base), vision="none")
    batch = processor(["What is the capital of France?"])
    answer = processor.decode(model.generate(**batch, max_new_tokens=12, do_sample=False))
    assert "Paris" in answer[0]


@pytest.mark.slow
def test_the_tower_is_loaded_and_trained_with(real_base: Path, tmp_path: Path) -> None:
    tower = VisionTower(str(real_base / "tower"))
    assert (tower.width, tower.grid) == (112, 14)
    shards, run = small_shards(tmp_path / "shards", train=4, dev=2, test=2), tmp_path / "run"
    flags = ["--vision", real_base / "tower", "--vision_layer", -1, "--lora_rank", 4, "--max_target_length", 8]
    flags += ["--max_steps", 2, "--per_device_train_batch_size", 2, "--logging_steps", 1]
    train(run, 1, "--model", real_base, "--shards", shards, *flags)
    assert len(records(run, "train")) == 2


@pytest.mark.slow
def test_dinov2_is_complete_and_depends_on_the_image(tmp_path: Path) -> None:
    done = build(tmp_path / "base", "--tower", "dinov2_small")
    assert done.returncode == 0, done.stderr
    tower = VisionTower(str(tmp_path / "base/tower"), layer=-1)
    assert (tower.width, tower.grid) == (384, 16)
    found = tower(torch.randn(2, 3, 224, 224))
    assert found.isfinite().all()
    assert not torch.allclose(found[0], found[1])
