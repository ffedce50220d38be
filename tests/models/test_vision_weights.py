"""Weights and image settings of the vision tower from every source, and errors for invalid ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.vision import VisionTower, tower_config
from tests.helpers.towers import LAYERS, OPENAI_MEAN, RESNET, SMALLEST, TOWERS, VIT, clip_state, same_weights, tower


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("architecture", TOWERS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weight_file(architecture: str, suffix: str, tmp_path: Path) -> None:
    written, path = tower(architecture), tmp_path / f"clip{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(clip_state(written), path)
    assert same_weights(VisionTower(TOWERS[architecture], str(path)), written)


def test_weight_file_of_open_clips_training(tmp_path: Path) -> None:
    written = VisionTower(SMALLEST)
    state = {f"module.{name}": tensor for name, tensor in clip_state(written).items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "clip.pt")
    assert same_weights(VisionTower(SMALLEST, str(tmp_path / "clip.pt")), written)


def test_position_embedding_is_resized_to_another_image_size(tmp_path: Path) -> None:
    written = tower()
    torch.save(clip_state(written), tmp_path / "clip.pt")
    larger = VisionTower({**VIT, "image_size": 64}, str(tmp_path / "clip.pt")).trunk
    assert larger.positional_embedding.shape == (17, 32)
    torch.testing.assert_close(larger.positional_embedding[0], written.trunk.positional_embedding[0])
    torch.testing.assert_close(larger.positional_embedding[1:].mean(0), written.trunk.positional_embedding[1:].mean(0))
    assert torch.equal(larger.conv1.weight, written.trunk.conv1.weight)


def write_repository(directory: Path, written: VisionTower, weights: str = "open_clip_model.safetensors") -> None:
    """Write a repository in the layout of ``open_clip.push_to_hf_hub``."""
    towers = {"vision_cfg": {**VIT, "image_size": [32, 32]}, "text_cfg": {"hf_model_name": "no"}}
    config = {
        "model_cfg": {"embed_dim": 7, "quick_gelu": True, **towers},
        "preprocess_cfg": {"size": [32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3, "interpolation": "bilinear"},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    (save_file if weights.endswith(".safetensors") else torch.save)(clip_state(written), directory / weights)


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "any.pt"])
def test_local_directory(weights: str, tmp_path: Path) -> None:
    written = tower(quick_gelu=True, embed_dim=7)
    write_repository(tmp_path, written, weights)
    vision = VisionTower(f"local-dir:{tmp_path}")
    assert same_weights(vision, written)
    check_repository_tower(vision, f"local-dir:{tmp_path}")


def test_local_directory_prefers_safetensors_of_open_clip(tmp_path: Path) -> None:
    written = tower(quick_gelu=True, embed_dim=7)
    write_repository(tmp_path, written)
    for other in ("aaa.safetensors", "open_clip_pytorch_model.bin"):
        (tmp_path / other).write_bytes(b"something else")
    assert same_weights(VisionTower(f"local-dir:{tmp_path}"), written)


def check_repository_tower(vision: VisionTower, name: str) -> None:
    assert vision.preprocess == {
        "image_size": 32,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.2),
        "interpolation": "bilinear",
    }
    assert type(vision.trunk.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    rebuilt = VisionTower(json.loads(json.dumps(tower_config(name))))
    assert repr(rebuilt) == repr(vision)
    rebuilt.load_state_dict(vision.state_dict())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of owner/name in an otherwise empty cache of the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--owner--name/refs").mkdir(parents=True)
    (tmp_path / "models--owner--name/refs/main").write_text("abc", encoding="utf-8")
    return tmp_path / "models--owner--name/snapshots/abc"


def test_hub_repository(hub: Path) -> None:
    written = tower(quick_gelu=True, embed_dim=7)
    write_repository(hub, written)
    vision = VisionTower("hf-hub:owner/name")
    assert same_weights(vision, written)
    check_repository_tower(vision, "hf-hub:owner/name")


def test_repository_needs_no_weights_on_the_meta_device(hub: Path) -> None:
    write_repository(hub, tower(quick_gelu=True, embed_dim=7))
    (hub / "open_clip_model.safetensors").unlink()
    with torch.device("meta"):
        assert VisionTower("hf-hub:owner/name").grid == 2
    with pytest.raises(UserError, match=r"safetensors .*hf download owner/name open_clip_config"):
        VisionTower("hf-hub:owner/name")


@pytest.fixture
def tagged(hub: Path, monkeypatch: pytest.MonkeyPatch) -> VisionTower:
    """Put a published tag of the smallest model into the hub's cache."""
    written = VisionTower(SMALLEST)
    hub.mkdir(parents=True)
    save_file(clip_state(written), hub / "open_clip_model.safetensors")
    weights = {"hf_hub": "owner/name/", "mean": (0.1,) * 3, "std": (0.2,) * 3, "interpolation": "bilinear"}
    other = {**weights, "mean": (0.9,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, SMALLEST, {"mine": weights, "other": other})
    return written


def test_pretrained_tag(tagged: VisionTower) -> None:
    vision = VisionTower(SMALLEST, "mine")
    assert same_weights(vision, tagged)
    assert vision.preprocess == {
        "image_size": 224,
        "mean": (0.1, 0.1, 0.1),
        "std": (0.2, 0.2, 0.2),
        "interpolation": "bilinear",
    }


def test_weight_file_uses_the_preprocessing_of_the_first_tag(tagged: VisionTower, tmp_path: Path) -> None:
    torch.save(clip_state(tagged), tmp_path / "clip.pt")
    assert VisionTower(SMALLEST, "other").preprocess["mean"] == (0.9, 0.9, 0.9)
    for weights in (str(tmp_path / "clip.pt"), None):
        assert VisionTower(SMALLEST, weights).preprocess["mean"] == (0.1, 0.1, 0.1)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "tag", "mean", "interpolation"),
    [
        ("ViT-L-14-quickgelu", "openai", OPENAI_MEAN, "bicubic"),
        ("ViT-B-16-SigLIP", "webli", (0.5, 0.5, 0.5), "bicubic"),
        ("ViT-B-16-SigLIP", None, (0.5, 0.5, 0.5), "bicubic"),
        ("ViT-L-14", "laion2b_s32b_b82k", (0.5, 0.5, 0.5), "bicubic"),
        ("ViT-L-14", None, OPENAI_MEAN, "bicubic"),
        ("MobileCLIP-S1", "datacompdr", (0.0, 0.0, 0.0), "bilinear"),
        (SMALLEST, None, OPENAI_MEAN, "bicubic"),
    ],
)
def test_preprocessing_is_that_of_the_weights(
    name: str, tag: str | None, mean: tuple[float, ...], interpolation: str
) -> None:
    with torch.device("meta"):
        found = VisionTower(name, tag).preprocess
    assert found["mean"] == mean
    assert found["interpolation"] == interpolation
    assert set(found) == {"image_size", "mean", "std", "interpolation"}


def test_mapping_uses_openais_preprocessing() -> None:
    assert tower().preprocess == {
        "image_size": 32,
        "mean": OPENAI_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
    }


def test_unknown_model_is_an_error_with_the_nearest_name() -> None:
    for make in (VisionTower, tower_config):
        with pytest.raises(UserError, match=r'"ViT-B-23".*"ViT-B-'):
            make("ViT-B-23")


def test_unknown_tag_is_an_error_with_the_known_tags() -> None:
    with pytest.raises(UserError, match=r'"opnai".* openai, laion400m_e31'):
        VisionTower("ViT-B-32", "opnai")
    with pytest.raises(UserError, match=r'"openai".* no tags'):
        VisionTower(SMALLEST, "openai")
    with pytest.raises(UserError, match='"openai"'):
        VisionTower(VIT, "openai")


@pytest.mark.parametrize("file", ["no/such/clip", "clip.safetensors", "clip.pt"])
def test_missing_weight_file_is_an_error(file: str) -> None:
    with pytest.raises(UserError, match=rf"no weight file {file}"):
        VisionTower("ViT-B-32", file)


def test_weights_that_are_not_cached_are_an_error_with_the_download_command(hub: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"(?s)open_clip_model\.safetensors of timm/vit_base_patch32_clip_224\.openai.*"
        r"hf download timm/vit_base_patch32_clip_224\.openai open_clip_model\.safetensors.*"
        r"ViT-B-32-quickgelu:/path/to/file",
    ):
        VisionTower("ViT-B-32-quickgelu", "openai")
    with pytest.raises(UserError, match=r"hf download jienengchen/ViTamin-S pytorch_model\.bin"):
        VisionTower("ViTamin-S", "datacomp1b")
    with pytest.raises(UserError, match=r"hf-hub:no/body: open_clip_config\.json .*hf download no/body "):
        VisionTower("hf-hub:no/body")


def test_weights_at_a_url_are_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = {"url": f"file://{tmp_path}/clip.pt", "hf_hub": "", "mean": (0,), "std": (1,), "interpolation": "bicubic"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, SMALLEST, {"mine": weights})
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"curl -LO file://{tmp_path}/clip\.pt"):
        VisionTower(SMALLEST, "mine")


def test_weights_with_another_activation_are_an_error(hub: Path) -> None:
    """Every tag in open_clip is accepted, or rejected with the name of the matching model."""
    rejected = 0
    for name, tag in open_clip.list_pretrained():
        with pytest.raises(UserError) as caught:
            VisionTower(name, tag)
        if "QuickGELU" in str(caught.value):
            rejected += 1
            right = str(caught.value).rpartition("Use ")[2].split(":")[0]
            with pytest.raises(UserError, match="not cached"):
                VisionTower(right, tag)
        else:
            assert "not cached" in str(caught.value)
            weights, config = open_clip.get_pretrained_cfg(name, tag), tower_config(name)
            if isinstance(config.get("layers"), int):
                assert not weights.get("quick_gelu") or config["quick_gelu"]
    assert rejected >= 10
    with pytest.raises(UserError, match="ViT-L-14-quickgelu:openai"):
        VisionTower("ViT-L-14", "openai")
    with pytest.raises(UserError, match="not cached"):
        VisionTower("RN50", "openai")  # a ResNet has neither activation


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_another_model_are_an_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(clip_state(tower(width=48)), path)
    with pytest.raises(
        UserError,
        match=r"visual\.class_embedding is \[48\] .*\[32\]",
    ):
        VisionTower(VIT, str(path))
    with pytest.raises(UserError, match=rf"{SMALLEST}: visual.* differ"):
        VisionTower(SMALLEST, str(path))


def test_weight_file_with_missing_or_unknown_weights_is_an_error(tmp_path: Path) -> None:
    torch.save({"text_projection": torch.zeros(2)}, tmp_path / "text.pt")
    with pytest.raises(UserError, match=r"visual\.class_embedding is absent .*\[32\]"):
        VisionTower(VIT, str(tmp_path / "text.pt"))
    torch.save({**clip_state(tower()), "visual.more": torch.zeros(2)}, tmp_path / "more.pt")
    with pytest.raises(UserError, match=r"visual\.more is \[2\] .*absent .*1 differ"):
        VisionTower(VIT, str(tmp_path / "more.pt"))


class MaliciousPickle:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_pickled_code_in_a_weight_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"visual.proj": MaliciousPickle(tmp_path / "sprung")}, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"clip\.pt"):
        VisionTower(VIT, str(tmp_path / "clip.pt"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04 cut"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_weight_file_is_an_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        VisionTower(VIT, str(path))


def test_damaged_repository_is_an_error(tmp_path: Path) -> None:
    name = f"local-dir:{tmp_path}"
    with pytest.raises(UserError, match=rf"open_clip_config\.json in {tmp_path}"):
        VisionTower(name)
    with pytest.raises(UserError, match=rf"open_clip_config\.json in {tmp_path}/none"):
        VisionTower(f"{name}/none")
    for content in ("{", "[]", '{"model_cfg": {"vision_cfg": {}}}', '{"model_cfg": null}'):
        (tmp_path / "open_clip_config.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"open_clip_config\.json"):
            tower_config(name)
    write_repository(tmp_path, tower())
    with pytest.raises(UserError, match='"openai"'):
        VisionTower(name, "openai")
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        VisionTower(name)


def test_mapping_that_open_clip_cannot_build_is_an_error() -> None:
    with pytest.raises(UserError, match=r'"widht".*"width"'):
        VisionTower({"widht": 32})
    with pytest.raises(UserError, match="vit_tny"):
        VisionTower({"timm_model_name": "vit_tny"})
    with pytest.raises(UserError, match="configured tower"):
        VisionTower({**VIT, "head_width": 5})


def test_images_and_maps_must_be_square() -> None:
    with pytest.raises(UserError, match="32 x 48"):
        VisionTower({**VIT, "image_size": [32, 48]})
    assert VisionTower({**RESNET, "image_size": [64, 64]}).image_size == 64
    with torch.device("meta"), pytest.raises(UserError, match="2 x 1"):
        VisionTower({**VIT, "patch_size": [16, 32]}, layer=0)


def test_timm_model_of_fixed_size_rejects_other_sizes() -> None:
    with torch.device("meta"), pytest.raises(UserError, match="160 x 160"):
        VisionTower({"timm_model_name": "vit_tiny_patch16_224", "image_size": 160})


@pytest.mark.parametrize("layer", [LAYERS, -LAYERS - 1])
def test_unknown_layer_is_an_error(layer: int) -> None:
    with pytest.raises(UserError, match=rf"no layer {layer}\. .*0 to 2.*-1 to -3"):
        tower(layer=layer)
