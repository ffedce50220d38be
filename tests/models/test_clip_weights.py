"""CLIP's vision tower of transformers under open_clip's names: the same numbers from both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from lvlm_clorae.errors import UserError
from lvlm_clorae.models.clip_weights import open_clip_state, tower_of_clip
from lvlm_clorae.models.vision import VisionTower

LAYERS = 3


def config(**changes: Any) -> CLIPVisionConfig:
    """Its heads and its MLP have other proportions than open_clip's defaults."""
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


def theirs(settings: CLIPVisionConfig, kind: Any = CLIPVisionModel) -> Any:
    """Random weights so large that every one of them matters, norms and biases too."""
    torch.manual_seed(0)
    model = kind(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def ours(settings: CLIPVisionConfig, state: dict[str, torch.Tensor], layer: int = -2, **options: Any) -> VisionTower:
    tower = VisionTower(tower_of_clip(settings, **options), layer=layer)
    tower.trunk.load_state_dict(open_clip_state(state))
    return tower


def spelling(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name.removeprefix("vision_model."): tensor for name, tensor in state.items()}


PIXELS = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [-1, -2, 0])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize("changes", [{"hidden_act": "quick_gelu"}, {"hidden_act": "gelu"}, {"layer_norm_eps": 0.03}])
def test_patch_tokens_are_those_of_transformers(changes: dict[str, Any], prefix: str, layer: int) -> None:
    settings = config(**changes)
    model = theirs(settings)
    with torch.no_grad():
        states = model(pixel_values=PIXELS, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1  # the first is the embeddings'
    found = ours(settings, spelling(model.state_dict(), prefix), layer)(PIXELS)
    torch.testing.assert_close(found, states[layer % LAYERS + 1][:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"layer_norm_eps": 1e-5}])
def test_the_activation_and_the_epsilon_matter(changes: dict[str, Any]) -> None:
    """Weights in which the parity above could not tell them apart would prove nothing."""
    settings = config(hidden_act="quick_gelu", layer_norm_eps=0.03)
    state = theirs(settings).state_dict()
    right, wrong = ours(settings, state)(PIXELS), ours(config(**{**settings.to_dict(), **changes}), state)(PIXELS)
    assert (right - wrong).abs().max() > 1e-3


def test_without_a_projection_the_pooled_output_is_that_of_transformers() -> None:
    settings = config()
    model = theirs(settings)
    with torch.no_grad():
        expected = model(pixel_values=PIXELS).pooler_output
        found = ours(settings, model.state_dict()).trunk(PIXELS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_with_a_projection_it_is_the_image_embedding() -> None:
    settings = config()
    model = theirs(settings, CLIPVisionModelWithProjection)
    with torch.no_grad():
        expected = model(pixel_values=PIXELS).image_embeds
        found = ours(settings, model.state_dict(), projection=True).trunk(PIXELS)
    assert found.shape == (2, 10)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_stays() -> None:
    state = open_clip_state(theirs(config()).half().state_dict())
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


def test_the_index_in_older_checkpoints_is_no_weight() -> None:
    settings = config()
    state = {**theirs(settings).state_dict(), "vision_model.embeddings.position_ids": torch.arange(10)[None]}
    ours(settings, state)


def test_the_shape_is_that_of_llavas_tower() -> None:
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
def test_the_mlp_is_exactly_as_wide(width: int, hidden: int) -> None:
    """The last quotient is rounded down: 112 * (976 / 112) is less than 976."""
    settings = config(hidden_size=width, intermediate_size=hidden, num_attention_heads=8, num_hidden_layers=1)
    with torch.device("meta"):
        tower = VisionTower(tower_of_clip(settings), layer=-1)
    assert tower.trunk.transformer.resblocks[0].mlp.c_fc.out_features == hidden


def test_what_open_clip_has_not_is_refused() -> None:
    with pytest.raises(UserError, match=r'activation "relu".*open_clip has only quick_gelu and gelu'):
        tower_of_clip(config(hidden_act="relu"))
    with pytest.raises(UserError, match="takes 4 channels"):
        tower_of_clip(config(num_channels=4))


def test_foreign_and_missing_weights_are_refused() -> None:
    state = theirs(config()).state_dict()
    with pytest.raises(UserError, match=r"has a weight head\.weight: it is none of CLIP"):
        open_clip_state({**state, "head.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"has a weight encoder\.layers\.0\.gate: it is none of CLIP"):
        open_clip_state({**state, "encoder.layers.0.gate": torch.zeros(2)})
    key = next(name for name in state if name.endswith("layers.1.self_attn.k_proj.bias"))
    with pytest.raises(UserError, match=r"lacks the k of transformer\.resblocks\.1\.attn\.in_proj_bias"):
        open_clip_state({name: tensor for name, tensor in state.items() if name != key})
