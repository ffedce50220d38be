"""LLaVA-1.5 in the layout of llava-hf: the logits, tokens and CLIP tower of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from lvlm_clorae.errors import UserError
from lvlm_clorae.models import load_model
from lvlm_clorae.models.families import find_family
from lvlm_clorae.models.families.causal import VisionCausalLM
from lvlm_clorae.models.families.llava import open_clip_state, tower_of_clip
from lvlm_clorae.models.vision import VisionTower
from tests.helpers.tiny import noise_image
from tests.helpers.tiny_causal import save_llava

PROMPTS = ["entities. text: Mara Novotny leaves Tamsk for the Winter Cup", "entities. text: so"]


class Pair:
    """One checkpoint loaded by transformers' class and by load_model."""

    def __init__(self, directory: Path, act: str) -> None:
        self.directory = directory
        self.theirs = save_llava(directory, act)
        self.ours, self.processor = load_model(str(directory))

    def their_batch(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("llava"), request.param)


def test_logits_are_those_of_transformers(pair: Pair) -> None:
    assert isinstance(pair.ours, VisionCausalLM)
    batch = pair.processor(PROMPTS, [noise_image(0), noise_image(1)])
    with torch.no_grad():
        found = pair.ours(**batch).logits
        expected = pair.theirs(
            **pair.their_batch(batch), position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        ).logits
    real = batch["attention_mask"] == 1
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-4)
    assert expected[real].std() > 0.1, "logits that hardly vary would show nothing"
    blank = pair.ours(**{**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}).logits
    assert (blank[real] - found[real]).abs().max() > 0.01, "the image must count"


def test_greedy_tokens_are_those_of_transformers(pair: Pair) -> None:
    batch = pair.processor(PROMPTS, [noise_image(0), noise_image(1)])
    found = pair.ours.generate(**batch, max_new_tokens=16, do_sample=False)
    pad = pair.processor.tokenizer.pad_token_id
    expected = pair.theirs.generate(**pair.their_batch(batch), max_new_tokens=16, do_sample=False, pad_token_id=pad)
    assert torch.equal(found, expected[:, batch["input_ids"].shape[1] :])


def test_tower_is_that_of_transformers(pair: Pair) -> None:
    clip: Any = CLIPVisionModel(pair.theirs.config.vision_config).eval()
    clip.load_state_dict(pair.theirs.model.vision_tower.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(pair.ours.vision_tower(pixels), expected, rtol=0, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in pair.ours.vision_tower.parameters())


def test_region_starts_as_the_mean_of_its_patches(pair: Pair) -> None:
    tokens, regions = pair.ours.projector(
        torch.randn(1, 4, 32), torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 1.0, 0.5]]])
    )
    torch.testing.assert_close(regions[0, 0], tokens[0, 0])
    torch.testing.assert_close(regions[0, 1], tokens[0, :2].mean(0))


def test_parts_and_template_come_from_the_checkpoint(pair: Pair) -> None:
    assert pair.ours.newly_initialized == ()
    assert pair.processor.template.startswith("USER: ")
    assert pair.ours.config.image_token_id == pair.theirs.config.image_token_index
    assert pair.ours.config.region_token_id != pair.ours.config.image_token_id


def test_save_and_load(pair: Pair, tmp_path: Path) -> None:
    pair.ours.save_pretrained(tmp_path)
    pair.processor.save_pretrained(tmp_path)
    again, processor = load_model(str(tmp_path))
    batch = processor(PROMPTS, [noise_image(0), None])
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, pair.ours(**batch).logits)


def test_other_llavas_belong_to_the_image_text_family(pair: Pair, tmp_path: Path) -> None:
    """Our tower gives neither the class token nor several layers."""
    config = pair.theirs.config.__class__.from_pretrained(pair.directory)
    assert find_family(config, "x").name == "llava"
    config.vision_feature_select_strategy = "full"
    assert find_family(config, "x").name == "image_text"
    config.vision_feature_select_strategy, config.vision_feature_layer = "default", [-2, -1]
    assert find_family(config, "x").name == "image_text"


LAYERS = 3


def config(**changes: Any) -> CLIPVisionConfig:
    """Build a configuration whose heads and MLP differ from open_clip's defaults."""
    settings: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 60,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 3,
        "image_size": 24,
        "patch_size": 8,
        "projection_dim": 10,
    }
    return CLIPVisionConfig(**{**settings, **changes})


def theirs(settings: CLIPVisionConfig) -> Any:
    """Build transformers' model with weights large enough that each matters, including norms and biases."""
    torch.manual_seed(0)
    model: Any = CLIPVisionModel(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def ours(settings: CLIPVisionConfig, state: dict[str, torch.Tensor], layer: int = -2) -> VisionTower:
    tower = VisionTower(tower_of_clip(settings), layer=layer)
    tower.trunk.load_state_dict(open_clip_state(state))
    return tower


def with_prefix(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name.removeprefix("vision_model."): tensor for name, tensor in state.items()}


PIXELS = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [-1, -2, 0])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize("changes", [{"hidden_act": "quick_gelu"}, {"hidden_act": "gelu"}, {"layer_norm_eps": 0.03}])
def test_patch_tokens_are_those_of_clip(changes: dict[str, Any], prefix: str, layer: int) -> None:
    settings = config(**changes)
    model = theirs(settings)
    with torch.no_grad():
        states = model(pixel_values=PIXELS, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1  # the first is the embeddings'
    found = ours(settings, with_prefix(model.state_dict(), prefix), layer)(PIXELS)
    torch.testing.assert_close(found, states[layer % LAYERS + 1][:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"layer_norm_eps": 1e-5}])
def test_activation_and_epsilon_change_the_tokens(changes: dict[str, Any]) -> None:
    """The comparison with transformers needs weights that are sensitive to them."""
    settings = config(hidden_act="quick_gelu", layer_norm_eps=0.03)
    state = theirs(settings).state_dict()
    right, wrong = ours(settings, state)(PIXELS), ours(config(**{**settings.to_dict(), **changes}), state)(PIXELS)
    assert (right - wrong).abs().max() > 1e-3


def test_pooled_output_without_projection() -> None:
    settings = config()
    model = theirs(settings)
    with torch.no_grad():
        expected = model(pixel_values=PIXELS).pooler_output
        found = ours(settings, model.state_dict()).trunk(PIXELS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_conversion_keeps_the_dtype() -> None:
    state = open_clip_state(theirs(config()).half().state_dict())
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


def test_position_ids_of_older_checkpoints_are_ignored() -> None:
    settings = config()
    state = {**theirs(settings).state_dict(), "vision_model.embeddings.position_ids": torch.arange(10)[None]}
    ours(settings, state)


def test_shape_of_llavas_tower() -> None:
    """llava-1.5-7b's vision_config is OpenAI's ViT-L/14 for 336 pixels."""
    settings = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    with torch.device("meta"):
        named, found = VisionTower("ViT-L-14-336-quickgelu"), VisionTower(tower_of_clip(settings))
        state = open_clip_state(CLIPVisionModel(settings).state_dict())
    assert repr(found.trunk) == repr(named.trunk)  # layer by layer, with activations and epsilons
    assert (found.width, found.grid, found.layer) == (named.width, named.grid, named.layer) == (1024, 24, 22)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    assert shapes == {name: tensor.shape for name, tensor in found.trunk.state_dict().items()}


@pytest.mark.parametrize(("width", "hidden"), [(1408, 6144), (1664, 8192), (112, 976)])
def test_width_of_the_mlp_is_exact(width: int, hidden: int) -> None:
    """The last quotient is rounded down: 112 * (976 / 112) is less than 976."""
    settings = config(hidden_size=width, intermediate_size=hidden, num_attention_heads=8, num_hidden_layers=1)
    with torch.device("meta"):
        tower = VisionTower(tower_of_clip(settings), layer=-1)
    assert tower.trunk.transformer.resblocks[0].mlp.c_fc.out_features == hidden


def test_unsupported_towers_are_an_error() -> None:
    with pytest.raises(UserError, match="relu"):
        tower_of_clip(config(hidden_act="relu"))
    with pytest.raises(UserError, match="4 channels"):
        tower_of_clip(config(num_channels=4))


def test_unknown_and_missing_weights_are_an_error() -> None:
    state = theirs(config()).state_dict()
    with pytest.raises(UserError, match=r"head\.weight"):
        open_clip_state({**state, "head.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"encoder\.layers\.0\.gate"):
        open_clip_state({**state, "encoder.layers.0.gate": torch.zeros(2)})
    key = next(name for name in state if name.endswith("layers.1.self_attn.k_proj.bias"))
    with pytest.raises(UserError, match=r"no k for transformer\.resblocks\.1\.attn\.in_proj_bias"):
        open_clip_state({name: tensor for name, tensor in state.items() if name != key})
