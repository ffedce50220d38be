"""Vision towers in directories of timm and transformers: equal features, rebuilt without the directory, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from lvlm_clorae.errors import UserError
from lvlm_clorae.models import load_model
from lvlm_clorae.models.vision import VisionTower, split_tower, tower_config
from tests.helpers.tiny import noise_image
from tests.helpers.tiny_causal import save_language, save_tower

MEAN = [0.1, 0.2, 0.3]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


def save_timm(directory: Path) -> Any:
    """Save a small CNN in timm's hub format; return it."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=5).eval()
    directory.mkdir()
    settings = {"input_size": [3, 96, 96], "mean": MEAN, "std": MEAN, "classifier": "classifier"}
    content = {"architecture": "test_efficientnet", "num_classes": 5, "pretrained_cfg": settings}
    (directory / "config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), directory / "model.safetensors")
    return model


def save_dinov2(directory: Path, registers: bool = False) -> Any:
    """Save a small DINOv2, whose processor takes smaller images than it was trained with; return it."""
    torch.manual_seed(0)
    if registers:
        model: Any = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE))
    else:
        model = Dinov2Model(Dinov2Config(**SHAPE))
    model.save_pretrained(directory)
    about = {"crop_size": {"height": 42, "width": 42}, "image_mean": MEAN, "image_std": MEAN}
    (directory / "preprocessor_config.json").write_text(json.dumps(about))
    return model.eval()


def test_a_timm_directory_has_the_features_of_timm(tmp_path: Path) -> None:
    model = save_timm(tmp_path / "tower")
    tower = VisionTower(str(tmp_path / "tower"), layer=-2)
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model.forward_intermediates(pixels, intermediates_only=True)[-2]
    assert tower.preprocess["mean"] == tuple(MEAN)
    assert (tower.width, tower.grid) == tuple(expected.shape[1:3])
    torch.testing.assert_close(tower(pixels), expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("registers", [False, True])
def test_a_dinov2_directory_has_the_patch_states_of_transformers(tmp_path: Path, registers: bool) -> None:
    model = save_dinov2(tmp_path / "tower", registers)
    tower = VisionTower(str(tmp_path / "tower"), layer=-2)
    pixels = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states[2]
    assert (tower.image_size, tower.width, tower.grid) == (42, 32, 3)
    assert tower.preprocess["std"] == tuple(MEAN)
    torch.testing.assert_close(tower(pixels), states[:, -9:])


@pytest.mark.integration
@pytest.mark.parametrize("save", [save_timm, save_dinov2])
def test_a_saved_model_does_not_need_the_directory(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "tower")
    save_language(tmp_path / "base")
    model, processor = load_model(str(tmp_path / "base"), vision=str(tmp_path / "tower"))
    batch = processor(["a"], [noise_image()], answers=["b"])
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "tower").rename(tmp_path / "moved")
    again, _ = load_model(str(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        changed = model(**{**batch, "pixel_values": batch["pixel_values"] + 1}).logits
    assert not torch.equal(changed, model(**batch).logits), "the image matters"


def test_the_architecture_builds_the_tower_without_weights(tmp_path: Path) -> None:
    save_dinov2(tmp_path / "tower")
    tower = VisionTower(tower_config(str(tmp_path / "tower")))
    assert (tower.width, tower.grid) == (32, 3)


def test_an_open_clip_directory_needs_no_prefix(tmp_path: Path) -> None:
    save_tower(tmp_path / "tower")
    assert split_tower(str(tmp_path / "tower")) == (f"local-dir:{tmp_path / 'tower'}", None)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "llama"}'])
def test_another_directory_is_a_user_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        VisionTower(str(tmp_path))


def test_damaged_or_foreign_weights_are_user_errors(tmp_path: Path) -> None:
    save_timm(tmp_path / "tower")
    save_file({"a": torch.zeros(1)}, tmp_path / "tower/model.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        VisionTower(str(tmp_path / "tower"))
    (tmp_path / "tower/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        VisionTower(str(tmp_path / "tower"))


def test_dinov2_with_missing_weights_is_a_user_error(tmp_path: Path) -> None:
    save_dinov2(tmp_path / "tower")
    save_file({"embeddings.cls_token": torch.zeros(1, 1, 32)}, tmp_path / "tower/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks"):
        VisionTower(str(tmp_path / "tower"))
