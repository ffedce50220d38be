"""load_model and describe_model: presets, directories, composed bases, options, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, BertConfig

from lvlm_clorae.errors import UserError
from lvlm_clorae.models import load_model
from lvlm_clorae.models.families import find_family
from lvlm_clorae.models.families.t5 import VisionT5
from lvlm_clorae.models.loading import (
    DEFAULT_VISION,
    TEXT_ONLY,
    WEIGHTS,
    WEIGHTS_INDEX,
    check_options,
    describe_model,
    find_source,
    loading_error,
    missing_files,
)
from lvlm_clorae.models.presets import preset_recipe, presets
from tests.helpers.tiny import DEMO, TOWER, save_plain_t5, save_tiny, tiny_batch
from tests.helpers.tiny_causal import save_language, save_tower

SMALLEST = "ViT-S-32-alt"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_demo_preset() -> None:
    model, processor = load_model("demo")
    assert isinstance(model, VisionT5)
    assert not model.training
    assert model.dtype == torch.float32
    batch = processor(["entities. text: Mara leaves Tamsk"], answers=["person, Mara"])
    assert torch.isfinite(model(**batch).loss)
    assert batch["pixel_values"].shape[-1] == model.vision_tower.image_size


def test_saved_model(tmp_path: Path) -> None:
    written = save_tiny(tmp_path)
    model, processor = load_model(str(tmp_path))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.state_dict().items())
    assert processor.image_transform.image_size == TOWER["image_size"]
    assert not any(parameter.requires_grad for parameter in model.vision_tower.parameters())
    with torch.no_grad():
        assert torch.equal(model(**tiny_batch()).logits, written(**tiny_batch()).logits)


def test_dtype_applies_to_all_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    model, _ = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.isfinite(model(**tiny_batch()).loss)


@pytest.mark.integration
@pytest.mark.parametrize("own_head", [True, False])
def test_composed_t5_keeps_its_weights(tmp_path: Path, own_head: bool) -> None:
    plain = save_plain_t5(tmp_path / "t5", own_head)
    model, processor = load_model(str(tmp_path / "t5"), vision=save_tower(tmp_path / "tower"))
    assert not model.training
    assert model.config.region_token_id == processor.region_token_id
    assert processor.image_transform.image_size == model.vision_tower.image_size == 32
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


@pytest.mark.integration
def test_composed_t5_with_tower_weights_from_a_file(tmp_path: Path) -> None:
    save_plain_t5(tmp_path / "t5", own_head=False)
    clip = open_clip.create_model(SMALLEST)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    model, _ = load_model(str(tmp_path / "t5"), vision=f"{SMALLEST}:{tmp_path / 'clip.pt'}")
    found = model.vision_tower.trunk.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in clip.visual.state_dict().items())


def test_towers_of_presets_have_the_activation_of_their_weights() -> None:
    """OpenAI's weights were trained with QuickGELU: under the plain name open_clip only warns and computes GELU."""
    towers = {preset.vision for preset in presets().values() if preset.vision} - {TEXT_ONLY} | {DEFAULT_VISION}
    for name, tag in (tower.split(":") for tower in towers):
        weights = open_clip.get_pretrained_cfg(name, tag)
        assert weights, f"{name} has no {tag}"
        assert open_clip.get_model_config(name).get("quick_gelu", False) == weights.get("quick_gelu", False)


def test_preset_recipe_is_a_copy() -> None:
    recipe = preset_recipe("demo")
    name, value = next(iter(recipe.items()))
    recipe[name] = None
    assert preset_recipe("demo")[name] == value
    assert preset_recipe("no/such") == {}
    assert Path(presets()["demo"].base).is_dir()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("flan-t5-bse", "flan-t5-base"), ("nobody/none", "hf download nobody/none")],
)
def test_unknown_base_is_an_error_with_a_suggestion(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=f"{name}.*{expected}"):
        load_model(name)


def test_base_of_no_family_is_an_error(tmp_path: Path) -> None:
    BertConfig(num_hidden_layers=1, architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"bert.*T5"):
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


def _no_image_settings(directory: Path) -> None:
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
        _no_image_settings,
        _no_tokenizer,
    ],
)
def test_damaged_directory_is_an_error(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save_tiny(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_model(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", "[3]", "7"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "vision_processor.json"])
def test_error_names_the_invalid_file(tmp_path: Path, name: str, content: str) -> None:
    save_tiny(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=name):
        load_model(str(tmp_path))


def test_tokenizer_without_sentinels_is_an_error(tmp_path: Path) -> None:
    save_plain_t5(tmp_path, own_head=False)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<extra_id_99>"]
    content["model"]["vocab"] = _without(content["model"]["vocab"], "<extra_id_99>")
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="<extra_id_99>"):
        load_model(str(tmp_path), vision=save_tower(tmp_path / "tower"))


def _without(vocabulary: object, name: str) -> object:
    if isinstance(vocabulary, dict):
        return {("_" if word == name else word): number for word, number in vocabulary.items()}
    assert isinstance(vocabulary, list)
    return [["_", entry[1]] if entry[0] == name else entry for entry in vocabulary]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("fusion", "cross"),
        ("fusion", "gated"),
        ("vision", "ViT-B-32:"),
        ("vision_layer", -1),
        ("projector", "mlp"),
        ("projector", "linear"),
        ("template", "x"),
    ],
)
def test_invalid_or_inapplicable_option_is_an_error(option: str, value: object) -> None:
    for function in (load_model, describe_model, check_options):
        with pytest.raises(UserError, match=rf"{option}.*{value}"):
            function("demo", **{option: value})


def test_check_options_checks_repository_of_the_tower(tmp_path: Path) -> None:
    check_options("demo", fusion="concat")
    save_plain_t5(tmp_path / "t5", own_head=True)
    check_options(str(tmp_path / "t5"), vision=save_tower(tmp_path / "tower"))
    with pytest.raises(UserError, match="nowhere"):
        check_options(str(tmp_path / "t5"), vision="local-dir:nowhere")


@pytest.mark.parametrize("tower", ["ViT-B-32", "ViT-B-32:", "test_vit", SMALLEST])
def test_a_tower_without_weights_is_an_error(tower: str, tmp_path: Path) -> None:
    """No file would store its random weights, so that each load of an adapter would be another model."""
    save_plain_t5(tmp_path, own_head=True)
    for function in (load_model, check_options):
        with pytest.raises(UserError, match=rf"{tower.rstrip(':')}(:| )") as caught:
            function(str(tmp_path), vision=tower)
        assert "\n" not in str(caught.value)
    if tower == "ViT-B-32":
        assert "ViT-B-32:openai" in str(caught.value)
        assert describe_model(str(tmp_path), vision=tower).vision_tower.width == 768, "counted without weights"


def test_composed_base_keeps_layer_and_projector(tmp_path: Path) -> None:
    save_plain_t5(tmp_path, own_head=True)
    tower = save_tower(tmp_path / "tower")
    model, processor = load_model(str(tmp_path), vision=tower, vision_layer=0, projector="linear")
    assert model.vision_tower.layer == 0
    assert isinstance(model.projector.layers, torch.nn.Linear)
    assert processor.image_transform.mean == (0.5, 0.5, 0.5), "preprocessing is that of the tower"
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, other = load_model(str(tmp_path / "saved"))
    assert again.vision_tower.layer == 0
    assert tuple(other.image_transform.mean) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("fusion", ["concat", "gated"])
def test_described_base_has_the_shapes_and_new_parts_of_the_loaded_one(tmp_path: Path, fusion: str) -> None:
    save_plain_t5(tmp_path, own_head=True)
    options = {"fusion": fusion, "vision": save_tower(tmp_path / "tower")}
    loaded, _ = load_model(str(tmp_path), **options)
    described = describe_model(str(tmp_path), **options)
    assert described.newly_initialized == loaded.newly_initialized
    assert ("fusion" in described.newly_initialized) == (fusion == "gated")
    shapes = [{name: value.shape for name, value in model.named_parameters()} for model in (loaded, described)]
    assert shapes[0] == shapes[1]


def test_missing_tower_is_reported_before_the_language_model_is_loaded(tmp_path: Path) -> None:
    save_plain_t5(tmp_path, own_head=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="ViT-B-23"):
        load_model(str(tmp_path), vision="ViT-B-23:")


class Cache:
    """A hub cache with these files for any repository."""

    def __init__(self, directory: Path, files: dict[str, Any]) -> None:
        self.paths = {}
        for name, content in files.items():
            self.paths[name] = str(directory / name)
            (directory / name).write_text(json.dumps(content), encoding="utf-8")

    def __call__(self, repository: str, name: str) -> str | None:
        return self.paths.get(name)


def test_family_of_each_model_type() -> None:
    expected = {"t5": "t5", "llama": "causal", "qwen2": "causal", "llava": "llava", "qwen2_5_vl": "image_text"}
    for model_type, family in expected.items():
        assert find_family(AutoConfig.for_model(model_type), "x").name == family
    assert find_family(find_source("demo").config, "demo").name == "t5"
    assert find_family(BertConfig(architectures=["BertLMHeadModel"]), "x").name == "causal"
    with pytest.raises(UserError, match="bert"):
        find_family(BertConfig(architectures=["BertForMaskedLM"]), "x")


def test_preset_is_described_without_a_file() -> None:
    of_name = {"flan-t5": "t5", "llava-1.5": "llava", "smollm2": "causal"}
    for name, preset in presets().items():
        if name == "demo":
            continue
        source = find_source(name, offline=True)
        assert source.base == preset.base
        assert find_family(source.config, name).name == of_name[name.rpartition("-")[0]]
    assert find_source("demo", offline=True).base == str(DEMO)


@pytest.mark.parametrize(
    ("here", "missing"),
    [
        ({}, ["config.json", "tokenizer.json", WEIGHTS]),
        ({"config.json": {}, "tokenizer.json": {}}, [WEIGHTS]),
        ({"config.json": {}, "spiece.model": {}, WEIGHTS: {}}, []),
        (
            {
                "config.json": {},
                "tokenizer.json": {},
                WEIGHTS_INDEX: {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}},
                "model-1-of-2.safetensors": {},
            },
            ["model-2-of-2.safetensors"],
        ),
    ],
)
def test_missing_files_are_reported(
    here: dict[str, Any], missing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lvlm_clorae.models.loading.try_to_load_from_cache", Cache(tmp_path, here))
    assert missing_files("owner/name") == missing
    message = str(loading_error("owner/name", "owner/name", OSError("no network\nat all")))
    assert "no network" in message
    assert "\n" not in message
    assert "hf download owner/name" in message
    assert all(name in message for name in missing)


def test_all_files_of_an_invalid_repository_name_are_missing() -> None:
    assert missing_files("a b:c") == ["config.json", "tokenizer.json", WEIGHTS]


@pytest.mark.parametrize("name", ["flan-t5-bas", "dmo"])
def test_a_misspelt_preset_is_named_without_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvlm_clorae.models.loading.AutoConfig", None)
    for function in (load_model, describe_model, check_options):
        with pytest.raises(UserError, match=r'Did you mean "(flan-t5-base|demo)"'):
            function(name)


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (ImportError("Package `num2words` is required. Install it with `pip install num2words`."), "num2words"),
        (ImportError("\nT5Tokenizer requires the SentencePiece library but it was not found.\nSee"), "sentencepiece"),
        (ImportError("\nX requires the timm library.\n`pip install -U timm`. Note"), "timm"),
        (ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken.load"), "tiktoken"),
    ],
)
def test_a_missing_package_of_a_model_is_named(error: ImportError, package: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with patch.object(VisionT5, "from_pretrained", side_effect=error), pytest.raises(UserError) as caught:
        load_model(str(tmp_path))
    assert str(caught.value).endswith(f"pip install {package}")
    assert "\n" not in str(caught.value)


class _HeadProducts(TorchDispatchMode):
    """Collects the operators that multiply by the output head's weight ``[vocabulary, d]``, as one matrix or many."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.found = vocabulary, set[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        sizes = {size for one in args if isinstance(one, torch.Tensor) for size in one.shape}
        if name in ("mm", "addmm", "bmm", "baddbmm") and self.vocabulary in sizes:
            self.found.add(name)
        return function(*args, **(kwargs or {}))


def test_output_head_is_one_product_of_all_rows(tmp_path: Path) -> None:
    save_language(tmp_path)
    model, processor = load_model(str(tmp_path), vision="none")
    prompts, answers = ["entities. text: Mara Novotny leaves Tamsk", "entities. text: so"], ["person, Mara", "none"]
    with _HeadProducts(model.get_output_embeddings().weight.shape[0]) as products:
        model.requires_grad_(False)(**processor(prompts, answers=answers))
        model.generate(**processor(prompts), max_new_tokens=2)
    assert products.found == {"mm"}
