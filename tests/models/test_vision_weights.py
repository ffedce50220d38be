"""The tower's weights and picture settings, wherever they come from, and what the user is told of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.vision import VisionTower, tower_config
from tests.models.towers import KINDS, LAYERS, OPENAI_MEAN, RESNET, SMALLEST, VIT, clip_state, same_weights, tower


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_weight_file(kind: str, suffix: str, tmp_path: Path) -> None:
    written, path = tower(kind), tmp_path / f"clip{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(clip_state(written), path)
    assert same_weights(VisionTower(KINDS[kind], str(path)), written)


def test_a_weight_file_of_a_named_model_as_its_training_writes_it(tmp_path: Path) -> None:
    written = VisionTower(SMALLEST)
    state = {f"module.{name}": tensor for name, tensor in clip_state(written).items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "clip.pt")
    assert same_weights(VisionTower(SMALLEST, str(tmp_path / "clip.pt")), written)


def test_a_transformer_takes_weights_for_another_picture_size(tmp_path: Path) -> None:
    written = tower()
    torch.save(clip_state(written), tmp_path / "clip.pt")
    larger = VisionTower({**VIT, "image_size": 64}, str(tmp_path / "clip.pt")).trunk
    assert larger.positional_embedding.shape == (17, 32)
    torch.testing.assert_close(larger.positional_embedding[0], written.trunk.positional_embedding[0])
    torch.testing.assert_close(larger.positional_embedding[1:].mean(0), written.trunk.positional_embedding[1:].mean(0))
    assert torch.equal(larger.conv1.weight, written.trunk.conv1.weight)


def write_repository(directory: Path, written: VisionTower, weights: str = "open_clip_model.safetensors") -> None:
    """As ``open_clip.push_to_hf_hub`` lays it out."""
    towers = {"vision_cfg": {**VIT, "image_size": [32, 32]}, "text_cfg": {"hf_model_name": "no"}}
    config = {
        "model_cfg": {"embed_dim": 7, "quick_gelu": True, **towers},
        "preprocess_cfg": {"size": [32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3, "interpolation": "bilinear"},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    (save_file if weights.endswith(".safetensors") else torch.save)(clip_state(written), directory / weights)


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "any.pt"])
def test_a_local_directory(weights: str, tmp_path: Path) -> None:
    written = tower(quick_gelu=True, embed_dim=7)
    write_repository(tmp_path, written, weights)
    vision = VisionTower(f"local-dir:{tmp_path}")
    assert same_weights(vision, written)
    check_repository_tower(vision, f"local-dir:{tmp_path}")


def test_a_local_directory_prefers_open_clips_own_safetensors(tmp_path: Path) -> None:
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
    """The folder of owner/name in an otherwise empty cache of the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--owner--name/refs").mkdir(parents=True)
    (tmp_path / "models--owner--name/refs/main").write_text("abc", encoding="utf-8")
    return tmp_path / "models--owner--name/snapshots/abc"


def test_a_repository_of_the_hub(hub: Path) -> None:
    written = tower(quick_gelu=True, embed_dim=7)
    write_repository(hub, written)
    vision = VisionTower("hf-hub:owner/name")
    assert same_weights(vision, written)
    check_repository_tower(vision, "hf-hub:owner/name")


def test_on_the_meta_device_a_repository_needs_no_weights(hub: Path) -> None:
    write_repository(hub, tower(quick_gelu=True, embed_dim=7))
    (hub / "open_clip_model.safetensors").unlink()
    with torch.device("meta"):
        assert VisionTower("hf-hub:owner/name").grid == 2
    with pytest.raises(UserError, match=r"safetensors is not here.*hf download owner/name open_clip_config"):
        VisionTower("hf-hub:owner/name")


@pytest.fixture
def tagged(hub: Path, monkeypatch: pytest.MonkeyPatch) -> VisionTower:
    """A published tag of the smallest model, in the hub's cache."""
    written = VisionTower(SMALLEST)
    hub.mkdir(parents=True)
    save_file(clip_state(written), hub / "open_clip_model.safetensors")
    weights = {"hf_hub": "owner/name/", "mean": (0.1,) * 3, "std": (0.2,) * 3, "interpolation": "bilinear"}
    other = {**weights, "mean": (0.9,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, SMALLEST, {"mine": weights, "other": other})
    return written


def test_a_tag(tagged: VisionTower) -> None:
    vision = VisionTower(SMALLEST, "mine")
    assert same_weights(vision, tagged)
    assert vision.preprocess == {
        "image_size": 224,
        "mean": (0.1, 0.1, 0.1),
        "std": (0.2, 0.2, 0.2),
        "interpolation": "bilinear",
    }


def test_pictures_for_a_weight_file_are_those_of_the_models_first_tag(tagged: VisionTower, tmp_path: Path) -> None:
    torch.save(clip_state(tagged), tmp_path / "clip.pt")
    assert VisionTower(SMALLEST, "other").preprocess["mean"] == (0.9, 0.9, 0.9)
    for weights in (str(tmp_path / "clip.pt"), None):
        assert VisionTower(SMALLEST, weights).preprocess["mean"] == (0.1, 0.1, 0.1)


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
def test_pictures_are_prepared_as_the_weights_want(
    name: str, tag: str | None, mean: tuple[float, ...], interpolation: str
) -> None:
    with torch.device("meta"):
        found = VisionTower(name, tag).preprocess
    assert found["mean"] == mean
    assert found["interpolation"] == interpolation
    assert set(found) == {"image_size", "mean", "std", "interpolation"}


def test_a_mapping_wants_pictures_as_openais() -> None:
    assert tower().preprocess == {
        "image_size": 32,
        "mean": OPENAI_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
    }


def test_an_unknown_name_gives_the_nearest() -> None:
    for make in (VisionTower, tower_config):
        with pytest.raises(UserError, match=r'no vision model "ViT-B-23".*Did you mean "ViT-B-'):
            make("ViT-B-23")


def test_an_unknown_tag_gives_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match=r'no weights "opnai".*Did you mean "openai"\? Valid: openai, laion400m_e31'):
        VisionTower("ViT-B-32", "opnai")
    with pytest.raises(UserError, match=r'no weights "openai" in open_clip\. It has no tag there: give a weight file'):
        VisionTower(SMALLEST, "openai")
    with pytest.raises(UserError, match='The tower of the configuration has no weights "openai"'):
        VisionTower(VIT, "openai")


@pytest.mark.parametrize("file", ["no/such/clip", "clip.safetensors", "clip.pt"])
def test_a_missing_weight_file(file: str) -> None:
    with pytest.raises(UserError, match=rf"There is no weight file {file}"):
        VisionTower("ViT-B-32", file)


def test_weights_that_are_not_here_and_how_to_fetch_them(hub: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"(?s)open_clip_model\.safetensors of timm/vit_base_patch32_clip_224\.openai\) are not here.*"
        r"hf download timm/vit_base_patch32_clip_224\.openai open_clip_model\.safetensors.*"
        r"ViT-B-32-quickgelu:/path/to/file",
    ):
        VisionTower("ViT-B-32-quickgelu", "openai")
    with pytest.raises(UserError, match=r"hf download jienengchen/ViTamin-S pytorch_model\.bin"):
        VisionTower("ViTamin-S", "datacomp1b")
    with pytest.raises(UserError, match=r"hf-hub:no/body: open_clip_config\.json is not here.*hf download no/body "):
        VisionTower("hf-hub:no/body")


def test_weights_that_are_nowhere_but_at_an_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = {"url": f"file://{tmp_path}/clip.pt", "hf_hub": "", "mean": (0,), "std": (1,), "interpolation": "bicubic"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, SMALLEST, {"mine": weights})
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"\(file://{tmp_path}/clip\.pt\) are not here.*curl -LO file://{tmp_path}"):
        VisionTower(SMALLEST, "mine")


def test_the_activation_of_the_weights_and_of_the_name_agree(hub: Path) -> None:
    """For every tag that open_clip lists: it is taken, or refused with the name under which it is."""
    refused = 0
    for name, tag in open_clip.list_pretrained():
        with pytest.raises(UserError) as caught:
            VisionTower(name, tag)
        if "QuickGELU" in str(caught.value):
            refused += 1
            right = str(caught.value).rpartition("Use ")[2].split(":")[0]
            with pytest.raises(UserError, match="are not here"):
                VisionTower(right, tag)
        else:
            assert "are not here" in str(caught.value)
            weights, config = open_clip.get_pretrained_cfg(name, tag), tower_config(name)
            if isinstance(config.get("layers"), int):
                assert not weights.get("quick_gelu") or config["quick_gelu"]
    assert refused >= 10
    with pytest.raises(UserError, match=r"trained with QuickGELU.*Use ViT-L-14-quickgelu:openai"):
        VisionTower("ViT-L-14", "openai")
    with pytest.raises(UserError, match="are not here"):
        VisionTower("RN50", "openai")  # its tower has neither activation


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_another_model(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(clip_state(tower(width=48)), path)
    with pytest.raises(
        UserError,
        match=r"weights of another model than The tower.*visual\.class_embedding is \[48\] there and \[32\] here",
    ):
        VisionTower(VIT, str(path))
    with pytest.raises(UserError, match=rf"another model than {SMALLEST}: visual.* differ in all"):
        VisionTower(SMALLEST, str(path))


def test_a_file_without_a_tower_and_one_with_too_much(tmp_path: Path) -> None:
    torch.save({"text_projection": torch.zeros(2)}, tmp_path / "text.pt")
    with pytest.raises(UserError, match=r"visual\.class_embedding is absent there and \[32\] here"):
        VisionTower(VIT, str(tmp_path / "text.pt"))
    torch.save({**clip_state(tower()), "visual.more": torch.zeros(2)}, tmp_path / "more.pt")
    with pytest.raises(UserError, match=r"visual\.more is \[2\] there and absent here; 1 differ"):
        VisionTower(VIT, str(tmp_path / "more.pt"))


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_nothing_in_a_weight_file_is_run(tmp_path: Path) -> None:
    torch.save({"visual.proj": Trap(tmp_path / "sprung")}, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"clip\.pt cannot be read as weights of open_clip"):
        VisionTower(VIT, str(tmp_path / "clip.pt"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04 cut"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_weight_file(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as weights of open_clip"):
        VisionTower(VIT, str(path))


def test_damaged_repositories(tmp_path: Path) -> None:
    name = f"local-dir:{tmp_path}"
    with pytest.raises(UserError, match=rf"there is no open_clip_config\.json in {tmp_path}"):
        VisionTower(name)
    with pytest.raises(UserError, match=rf"there is no open_clip_config\.json in {tmp_path}/none"):
        VisionTower(f"{name}/none")
    for content in ("{", "[]", '{"model_cfg": {"vision_cfg": {}}}', '{"model_cfg": null}'):
        (tmp_path / "open_clip_config.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"open_clip_config\.json is no configuration of open_clip"):
            tower_config(name)
    write_repository(tmp_path, tower())
    with pytest.raises(UserError, match='brings its own weights: leave "openai" out'):
        VisionTower(name, "openai")
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights: no file of"):
        VisionTower(name)


def test_a_mapping_that_open_clip_cannot_build() -> None:
    with pytest.raises(UserError, match=r'CLIPVisionCfg has no field "widht".*Did you mean "width"'):
        VisionTower({"widht": 32})
    with pytest.raises(UserError, match=r"cannot build this vision tower: Unknown model \(vit_tny\)"):
        VisionTower({"timm_model_name": "vit_tny"})
    with pytest.raises(UserError, match="cannot build this vision tower"):
        VisionTower({**VIT, "head_width": 5})


def test_pictures_are_square() -> None:
    with pytest.raises(UserError, match="takes pictures of 32 x 48 pixels; square ones are needed"):
        VisionTower({**VIT, "image_size": [32, 48]})
    assert VisionTower({**RESNET, "image_size": [64, 64]}).image_size == 64
    with torch.device("meta"), pytest.raises(UserError, match=r"Layer 0 of The tower.* gives maps of 2 x 1"):
        VisionTower({**VIT, "patch_size": [16, 32]}, layer=0)


def test_a_timm_model_of_fixed_size_takes_no_other() -> None:
    with torch.device("meta"), pytest.raises(UserError, match="gives no feature maps for pictures of 160 x 160 pixels"):
        VisionTower({"timm_model_name": "vit_tiny_patch16_224", "image_size": 160})


@pytest.mark.parametrize("layer", [LAYERS, -LAYERS - 1])
def test_a_layer_that_is_not_there(layer: int) -> None:
    with pytest.raises(UserError, match=rf"has the layers 0 to 2, counted from its end -1 to -3: not {layer}"):
        tower(layer=layer)
