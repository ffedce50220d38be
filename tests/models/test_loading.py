"""load_model: presets, directories, a plain T5 with a tower of open_clip, and clear words for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import BertConfig, T5Config, T5ForConditionalGeneration

from lvlm_clorae.errors import UserError
from lvlm_clorae.models import load_model
from lvlm_clorae.models.loading import DEFAULT_VISION, describe_model
from lvlm_clorae.models.presets import preset_recipe, presets
from lvlm_clorae.models.t5 import VisionT5
from tests.models.tiny import T5, TOWER, save_tiny, tiny_batch, tiny_processor
from tests.models.tiny_causal import save_tower

SMALLEST = "ViT-S-32-alt"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_the_demo_preset() -> None:
    model, processor = load_model("demo")
    assert isinstance(model, VisionT5)
    assert not model.training
    assert model.dtype == torch.float32
    batch = processor(["entities. text: Mara leaves Tamsk"], answers=["person, Mara"])
    assert torch.isfinite(model(**batch).loss)
    assert batch["pixel_values"].shape[-1] == model.vision_tower.image_size


def test_a_directory(tmp_path: Path) -> None:
    written = save_tiny(tmp_path)
    model, processor = load_model(str(tmp_path))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.state_dict().items())
    assert processor.pictures.image_size == TOWER["image_size"]
    assert not any(parameter.requires_grad for parameter in model.vision_tower.parameters())
    with torch.no_grad():
        assert torch.equal(model(**tiny_batch()).logits, written(**tiny_batch()).logits)


def test_the_dtype_is_that_of_all_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    model, _ = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.isfinite(model(**tiny_batch()).loss)


def save_plain_t5(directory: Path, own_head: bool) -> T5ForConditionalGeneration:
    """A plain T5 as on the hub; FLAN-T5 has an output embedding of its own."""
    torch.manual_seed(3)
    processor = tiny_processor()
    kind = "gated-gelu" if own_head else "relu"
    config = T5Config(
        **T5,
        vocab_size=len(processor.tokenizer),
        feed_forward_proj=kind,
        tie_word_embeddings=not own_head,
        decoder_start_token_id=0,
    )
    plain = T5ForConditionalGeneration(config).eval()
    if own_head:
        plain.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn_like(plain.lm_head.weight))
    plain.save_pretrained(directory)
    processor.tokenizer.save_pretrained(directory)
    return plain


@pytest.mark.parametrize("own_head", [True, False])
def test_a_plain_t5_with_a_tower_keeps_its_weights(tmp_path: Path, own_head: bool) -> None:
    plain = save_plain_t5(tmp_path / "t5", own_head)
    model, processor = load_model(str(tmp_path / "t5"), vision=f"{SMALLEST}:")
    assert not model.training
    assert model.config.region_token_id == processor.region_token_id
    assert processor.pictures.image_size == model.vision_tower.image_size == 224
    batch = processor(["entities. text: Mara", "entities. text: so"], None, None, ["person, Mara", "person, so"])
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    real = batch["labels"] != -100

    def check(found: VisionT5) -> None:
        state = found.state_dict()
        for name, tensor in plain.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        with torch.no_grad():
            torch.testing.assert_close(found(**batch).logits[real], plain(**text).logits[real], rtol=1e-4, atol=1e-5)

    check(model)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, _ = load_model(str(tmp_path / "saved"))
    check(again)
    tower = again.vision_tower.state_dict()
    assert all(torch.equal(tensor, tower[name]) for name, tensor in model.vision_tower.state_dict().items())


def test_a_tower_from_a_weight_file(tmp_path: Path) -> None:
    save_plain_t5(tmp_path / "t5", own_head=False)
    clip = open_clip.create_model(SMALLEST)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    model, _ = load_model(str(tmp_path / "t5"), vision=f"{SMALLEST}:{tmp_path / 'clip.pt'}")
    found = model.vision_tower.trunk.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in clip.visual.state_dict().items())


def test_the_presets_towers_exist_with_the_activation_of_their_weights() -> None:
    """OpenAI's weights were trained with QuickGELU: under the plain name open_clip only warns and computes GELU."""
    towers = {preset.vision for preset in presets().values() if preset.vision} | {DEFAULT_VISION}
    for name, tag in (tower.split(":") for tower in towers):
        weights = open_clip.get_pretrained_cfg(name, tag)
        assert weights, f"{name} has no {tag}"
        assert open_clip.get_model_config(name).get("quick_gelu", False) == weights.get("quick_gelu", False)


def test_presets_have_recipes_that_can_be_changed_by_nobody() -> None:
    recipe = preset_recipe("demo")
    assert recipe["rank"] == 16
    recipe["rank"] = 1
    assert preset_recipe("demo")["rank"] == 16
    assert preset_recipe("no/such") == {}
    assert Path(presets()["demo"].base).is_dir()


def test_an_unknown_name_gives_the_nearest_preset() -> None:
    with pytest.raises(UserError, match=r'"flan-t5-bse" cannot be loaded.*Did you mean "flan-t5-base"'):
        load_model("flan-t5-bse")


def test_a_hub_model_that_is_not_here_says_how_to_fetch_it() -> None:
    with pytest.raises(UserError, match=r'"nobody/no-such-model" cannot be loaded.*hf download nobody/no-such-model'):
        load_model("nobody/no-such-model")


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    BertConfig(num_hidden_layers=1, architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match='is a "bert" model, which writes no text'):
        load_model(str(tmp_path))


def _no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def _broken_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": ', encoding="utf-8")


def _no_object(directory: Path) -> None:
    (directory / "config.json").write_text("[1, 2]", encoding="utf-8")


def _unknown_type(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "t5000"}', encoding="utf-8")


def _no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _cut_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _no_picture_settings(directory: Path) -> None:
    (directory / "vision_processor.json").unlink()


def _no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        _no_config,
        _broken_config,
        _no_object,
        _unknown_type,
        _no_weights,
        _cut_weights,
        _no_picture_settings,
        _no_tokenizer,
    ],
)
def test_a_damaged_directory_is_a_user_error(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save_tiny(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_model(str(tmp_path))


def test_a_tokenizer_without_sentinels_is_refused(tmp_path: Path) -> None:
    save_plain_t5(tmp_path, own_head=False)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<extra_id_99>"]
    content["model"]["vocab"] = _without(content["model"]["vocab"], "<extra_id_99>")
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="no <extra_id_99>"):
        load_model(str(tmp_path), vision=f"{SMALLEST}:")


def _without(vocabulary: object, name: str) -> object:
    if isinstance(vocabulary, dict):
        return {("_" if word == name else word): number for word, number in vocabulary.items()}
    assert isinstance(vocabulary, list)
    return [["_", entry[1]] if entry[0] == name else entry for entry in vocabulary]


def test_an_unknown_fusion_is_refused() -> None:
    with pytest.raises(UserError, match='fusion "cross" is not available: choose concat or gated'):
        load_model("demo", fusion="cross")
    with pytest.raises(UserError, match="fusion = gated is for T5; demo takes pictures in its own"):
        load_model("demo", fusion="gated")
    with pytest.raises(UserError, match='projector "mlp" is not available: choose linear or mlp2x_gelu'):
        load_model("demo", projector="mlp")


@pytest.mark.parametrize(
    ("option", "value"), [("vision", "ViT-B-32:"), ("vision_layer", -1), ("projector", "linear"), ("template", "x")]
)
def test_options_that_a_base_has_no_use_for_are_refused(option: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"{option} = .* Leave {option} out"):
        load_model("demo", **{option: value})


def test_layer_and_projector_of_a_composed_base(tmp_path: Path) -> None:
    save_plain_t5(tmp_path, own_head=True)
    tower = save_tower(tmp_path / "tower")
    model, processor = load_model(str(tmp_path), vision=tower, vision_layer=0, projector="linear")
    assert model.vision_tower.layer == 0
    assert isinstance(model.projector.layers, torch.nn.Linear)
    assert processor.pictures.mean == (0.5, 0.5, 0.5), "pictures are prepared as the tower's own settings say"
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, other = load_model(str(tmp_path / "saved"))
    assert again.vision_tower.layer == 0
    assert tuple(other.pictures.mean) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("fusion", ["concat", "gated"])
def test_a_described_base_has_the_same_parts_to_train_as_a_loaded_one(tmp_path: Path, fusion: str) -> None:
    save_plain_t5(tmp_path, own_head=True)
    options = {"fusion": fusion, "vision": save_tower(tmp_path / "tower")}
    loaded, _ = load_model(str(tmp_path), **options)
    described = describe_model(str(tmp_path), **options)
    assert described.fresh_parts == loaded.fresh_parts
    assert ("fusion" in described.fresh_parts) == (fusion == "gated")
    shapes = [{name: value.shape for name, value in model.named_parameters()} for model in (loaded, described)]
    assert shapes[0] == shapes[1]


def test_a_tower_that_is_not_there_is_known_before_the_language_model_is_read(tmp_path: Path) -> None:
    save_plain_t5(tmp_path, own_head=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no vision model"):
        load_model(str(tmp_path), vision="ViT-B-23:")
