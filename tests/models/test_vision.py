"""The vision tower: the patch tokens of the chosen layer, frozen whatever is done to the model around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lvlm_clorae.errors import UserError
from lvlm_clorae.models import vision as vision_module
from lvlm_clorae.models.t5 import VisionT5
from lvlm_clorae.models.vision import VisionTower, tower_config
from tests.models.tiny import TOWER, tiny_config

LAYERS = 3
VIT = {**TOWER, "layers": LAYERS}
RESNET = {"layers": (1, 2, 1, 1), "width": 8, "head_width": 8, "image_size": 64}
TIMM_VIT = {"timm_model_name": "test_vit", "image_size": 160}
CONVNEXT = {"timm_model_name": "test_convnext", "image_size": 64}
KINDS = {"vit": VIT, "resnet": RESNET, "timm_vit": TIMM_VIT, "convnext": CONVNEXT}
SMALLEST = "ViT-S-32-alt"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def tower(kind: str = "vit", layer: int = -2, **changes: Any) -> VisionTower:
    """With weights of which none is zero, as open_clip makes some of a ResNet's."""
    torch.manual_seed(0)
    found = VisionTower({**KINDS[kind], **changes}, layer=layer)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return found


def layers_of(trunk: Any, kind: str) -> list[nn.Module]:
    if kind == "vit":
        return list(trunk.transformer.resblocks)
    if kind == "resnet":
        return [trunk.avgpool, trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    return list(trunk.trunk.blocks if kind == "timm_vit" else trunk.trunk.stages)


def outputs_of(modules: list[nn.Module], run: Any) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        outputs.append(output)

    handles = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, -2, 0, 1, 2])
def test_patch_tokens_are_the_output_of_the_chosen_layer(kind: str, layer: int) -> None:
    vision = tower(kind, layer)
    modules = layers_of(vision.trunk, kind)
    pixels = torch.randn(2, 3, vision.image_size, vision.image_size)
    expected = outputs_of(modules, lambda: vision.trunk(pixels))[layer]
    found = vision(pixels)
    assert found.shape == (2, vision.grid**2, vision.width)
    if expected.ndim == 4:  # [B, C, H, W]
        assert expected.shape[1:] == (vision.width, vision.grid, vision.grid)
        for row in range(vision.grid):
            for column in range(vision.grid):
                token = found[:, row * vision.grid + column]
                torch.testing.assert_close(token, expected[:, :, row, column])
    else:
        torch.testing.assert_close(found, expected[:, 1:])  # the first is the class token


@pytest.mark.parametrize("kind", KINDS)
def test_layers_after_the_chosen_one_are_not_run(kind: str) -> None:
    vision = tower(kind, layer=1)
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    assert len(outputs_of(layers_of(vision.trunk, kind), lambda: vision(pixels))) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_patches_stand_row_by_row(kind: str) -> None:
    """A change in the picture's upper right corner changes the token at the end of the first row most."""
    vision = tower(kind, layer=0)
    size = vision.image_size
    pixels = torch.zeros(1, 3, size, size)
    part = max(size // vision.grid, 8)
    pixels[..., :part, -part:] = 3 * torch.randn(3, part, part)
    change = (vision(pixels) - vision(torch.zeros_like(pixels))).norm(dim=-1)[0]
    row, column = divmod(int(change.argmax()), vision.grid)
    cells = -(-part * vision.grid // size)
    assert row < cells
    assert column >= vision.grid - cells


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_is_frozen_whatever_its_model_does(kind: str) -> None:
    vision = tower(kind)
    holder = nn.Sequential(vision, nn.Linear(vision.width, 4))
    holder.requires_grad_(True)
    holder.train()
    assert not any(module.training for module in vision.modules())
    assert not any(parameter.requires_grad for parameter in vision.parameters())
    assert holder[1].training
    assert holder[1].weight.requires_grad
    before = {name: tensor.clone() for name, tensor in vision.state_dict().items()}
    found = vision(torch.randn(2, 3, vision.image_size, vision.image_size, requires_grad=True))
    assert not found.requires_grad
    after = vision.state_dict()  # with the statistics of batch norms
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_forward_below_no_grad_can_be_trained() -> None:
    """The demo base's recipe takes it so."""
    vision = tower().requires_grad_(True)
    type(vision).forward.__wrapped__(vision, torch.randn(1, 3, 32, 32)).sum().backward()
    assert vision.trunk.conv1.weight.grad is not None


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("ViT-L-14-quickgelu", -2, (1024, 224, 16, 22)),
        ("ViT-B-16-SigLIP", -2, (768, 224, 14, 10)),
        ("ViT-SO400M-14-SigLIP-384", -1, (1152, 384, 27, 26)),
        ("EVA02-B-16", -2, (768, 224, 14, 10)),
        ("RN50", -2, (1024, 224, 14, 3)),
        ("RN50", -1, (2048, 224, 7, 4)),
        ("RN50", 0, (64, 224, 56, 0)),
        ("RN50x4", -2, (1280, 288, 18, 3)),
        ("convnext_base_w", -2, (512, 256, 16, 2)),
        ("convnext_base_w", -1, (1024, 256, 8, 3)),
    ],
)
def test_a_named_tower_has_its_shape_and_can_be_made_without_memory(
    name: str, layer: int, shape: tuple[int, int, int, int]
) -> None:
    with torch.device("meta"):
        vision = VisionTower(name, layer=layer)
        found = vision(torch.empty(1, 3, vision.image_size, vision.image_size))
    assert (vision.width, vision.image_size, vision.grid, vision.layer) == shape
    assert found.shape == (1, vision.grid**2, vision.width)


def test_a_named_tower_has_the_activation_of_its_name() -> None:
    with torch.device("meta"):
        quick, plain = VisionTower("ViT-L-14-quickgelu"), VisionTower("ViT-L-14")
    assert type(quick.trunk.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert type(plain.trunk.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"


def test_every_family_of_open_clips_towers() -> None:
    families: dict[str, str] = {}
    for name in open_clip.list_models():
        config = tower_config(name)
        families.setdefault(config.get("timm_model_name", str(type(config.get("layers")))).split("_")[0], name)
    assert len(families) >= 8
    for name in families.values():
        with torch.device("meta"):
            vision = VisionTower(name)
            found = vision(torch.empty(1, 3, vision.image_size, vision.image_size))
        assert found.shape == (1, vision.grid**2, vision.width), name


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "RN50", "ViT-B-16-SigLIP"])
def test_the_mapping_form_makes_the_same_architecture(name: str) -> None:
    config = json.loads(json.dumps(tower_config(name)))
    with torch.device("meta"):
        named, mapped = VisionTower(name), VisionTower(config)
    assert repr(named) == repr(mapped)
    shapes = {key: tensor.shape for key, tensor in named.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in mapped.state_dict().items()}


def test_timm_fetches_no_weights_of_its_own() -> None:
    with torch.device("meta"):
        VisionTower({**CONVNEXT, "timm_model_pretrained": True})


def test_the_mapping_form_has_an_activation_and_an_embedding_of_its_own() -> None:
    vision = VisionTower({**VIT, "quick_gelu": True, "embed_dim": 7})
    assert type(vision.trunk.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert vision.trunk.proj.shape == (32, 7)
    assert VisionTower(VIT).trunk.proj.shape == (32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [RESNET, CONVNEXT, {"timm_model_name": "eva02_tiny_patch14_224"}])
def test_a_saved_model_has_all_of_its_tower(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """EVA's rotary table is in no checkpoint of open_clip, and from_pretrained leaves it as it finds the memory."""
    torch.manual_seed(0)
    model = VisionT5(tiny_config(vision={"model": config})).to(dtype)
    model.save_pretrained(tmp_path)
    again = VisionT5.from_pretrained(tmp_path, dtype=dtype)
    state = again.vision_tower.state_dict()
    for name, tensor in model.vision_tower.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert state[name].dtype == (dtype if tensor.is_floating_point() else tensor.dtype)
    size = again.vision_tower.image_size
    pixels = torch.randn(1, 3, size, size, dtype=dtype)
    assert torch.equal(model.vision_tower(pixels), again.vision_tower(pixels))
    assert not any(parameter.requires_grad for parameter in again.vision_tower.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_shape_is_known_where_zero_3_has_taken_the_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``deepspeed.zero.Init``, under which from_pretrained builds, leaves empty parameters that know their shape."""
    expected = tower(kind)

    def taken(*args: Any) -> nn.Module:
        for parameter in expected.trunk.parameters():
            parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
        return expected.trunk

    monkeypatch.setattr(vision_module, "_build", taken)
    found = VisionTower(KINDS[kind])
    assert (found.width, found.grid, found.layer) == (expected.width, expected.grid, expected.layer)


# ---- weights


def clip_state(vision: VisionTower) -> dict[str, torch.Tensor]:
    """The state of a whole CLIP with this tower, as far as one can tell it from the tower's part."""
    state = {f"visual.{name}": tensor for name, tensor in vision.trunk.state_dict().items()}
    return {**state, "text_projection": torch.zeros(4, 4), "logit_scale": torch.tensor(1.0)}


def same_weights(found: VisionTower, expected: VisionTower) -> bool:
    state = found.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())


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


# ---- what the user can mend


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
