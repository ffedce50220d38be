"""LLaVA-1.5 in the layout of llava-hf, loaded by us: the same logits and greedy tokens as transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionModel

from lvlm_clorae.models import load_model
from lvlm_clorae.models.causal import VisionCausalLM
from tests.models.tiny import picture
from tests.models.tiny_causal import save_llava

PROMPTS = ["entities. text: Mara Novotny leaves Tamsk for the Winter Cup", "entities. text: so"]


class Pair:
    """The same checkpoint in transformers' class and in ours."""

    def __init__(self, directory: Path, act: str) -> None:
        self.directory = directory
        self.theirs = save_llava(directory, act)
        self.ours, self.processor = load_model(str(directory))

    def their_batch(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("llava"), request.param)


def test_logits_are_transformers_own(pair: Pair) -> None:
    assert isinstance(pair.ours, VisionCausalLM)
    batch = pair.processor(PROMPTS, [picture(0), picture(1)])
    with torch.no_grad():
        found = pair.ours(**batch).logits
        expected = pair.theirs(
            **pair.their_batch(batch), position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        ).logits
    real = batch["attention_mask"] == 1
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-4)
    assert expected[real].std() > 0.1, "logits that hardly vary would show nothing"
    blank = pair.ours(**{**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}).logits
    assert (blank[real] - found[real]).abs().max() > 0.01, "the picture must count"


def test_greedy_tokens_are_transformers_own(pair: Pair) -> None:
    batch = pair.processor(PROMPTS, [picture(0), picture(1)])
    found = pair.ours.generate(**batch, max_new_tokens=16, do_sample=False)
    pad = pair.processor.tokenizer.pad_token_id
    expected = pair.theirs.generate(**pair.their_batch(batch), max_new_tokens=16, do_sample=False, pad_token_id=pad)
    assert torch.equal(found, expected[:, batch["input_ids"].shape[1] :])


def test_the_tower_is_transformers_clip(pair: Pair) -> None:
    clip: Any = CLIPVisionModel(pair.theirs.config.vision_config).eval()
    clip.load_state_dict(pair.theirs.model.vision_tower.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(pair.ours.vision_tower(pixels), expected, rtol=0, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in pair.ours.vision_tower.parameters())


def test_a_region_starts_as_the_patches_under_its_box(pair: Pair) -> None:
    tokens, regions = pair.ours.projector(
        torch.randn(1, 4, 32), torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 1.0, 0.5]]])
    )
    torch.testing.assert_close(regions[0, 0], tokens[0, 0])
    torch.testing.assert_close(regions[0, 1], tokens[0, :2].mean(0))


def test_it_needs_no_training_of_its_parts_and_its_template_is_llavas(pair: Pair) -> None:
    assert pair.ours.fresh_parts == ()
    assert pair.processor.template.startswith("USER: ")
    assert pair.ours.config.image_token_id == pair.theirs.config.image_token_index
    assert pair.ours.config.region_token_id != pair.ours.config.image_token_id


def test_saved_by_us_it_is_the_same(pair: Pair, tmp_path: Path) -> None:
    pair.ours.save_pretrained(tmp_path)
    pair.processor.save_pretrained(tmp_path)
    again, processor = load_model(str(tmp_path))
    batch = processor(PROMPTS, [picture(0), None])
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, pair.ours(**batch).logits)


def test_another_kind_of_llava_is_left_to_transformers(pair: Pair, tmp_path: Path) -> None:
    """Class token kept, several layers: not what our tower gives."""
    from lvlm_clorae.models.source import family_of

    config = pair.theirs.config.__class__.from_pretrained(pair.directory)
    assert family_of(config, "x") == "llava"
    config.vision_feature_select_strategy = "full"
    assert family_of(config, "x") == "image_text"
    config.vision_feature_select_strategy, config.vision_feature_layer = "default", [-2, -1]
    assert family_of(config, "x") == "image_text"
