"""Bases without a vision tower: equal to the bare language model, without image tokens, saved and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lvlm_clorae.adapters.register import method_names
from lvlm_clorae.errors import UserError
from lvlm_clorae.models import Processor, load_model
from lvlm_clorae.models.families.causal import IMAGE
from lvlm_clorae.models.loading import describe_model
from lvlm_clorae.models.parts import part_sizes
from lvlm_clorae.tasks import REGION
from lvlm_clorae.training.adapters import add_adapter
from lvlm_clorae.training.config_loading import make_config
from tests.helpers.tiny import noise_image, save_plain_t5
from tests.helpers.tiny_causal import TOKENIZERS, save_language

PROMPTS = ["event arguments. objects: O1 [0, 0, 20, 15] text: guards struck the harbour", "entities. text: Mara"]
ANSWERS = ["attack <spot> target, O1", "none"]


def save_t5(directory: Path) -> Any:
    return save_plain_t5(directory, own_head=True)


def save_causal(model_type: str) -> Callable[[Path], Any]:
    return lambda directory: save_language(directory, model_type)


@pytest.fixture(params=["t5", *TOKENIZERS])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Processor]:
    """The bare language model, and the text-only model and processor loaded from it."""
    plain = (save_t5 if request.param == "t5" else save_causal(request.param))(tmp_path / "base")
    return plain, *load_model(str(tmp_path / "base"), vision="none")


def bare_logits(plain: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the bare language model for the labels of ``batch``."""
    labels = batch["labels"]
    with torch.no_grad():
        if plain.config.is_encoder_decoder:
            return plain(**batch).logits
        mask = batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = plain(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions).logits
    return found[:, -labels.shape[1] - 1 : -1]


def test_logits_and_answers_equal_those_of_the_bare_language_model(base: tuple[Any, Any, Processor]) -> None:
    plain, model, processor = base
    batch = processor(PROMPTS, answers=ANSWERS)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    with torch.no_grad():
        found = model(**batch).logits
    real = batch["labels"] != -100
    torch.testing.assert_close(found[real], bare_logits(plain, batch)[real], rtol=1e-6, atol=1e-6)
    prompt = processor(PROMPTS)
    new = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    expected = plain.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=processor.pad_token_id)
    assert torch.equal(
        new, expected if plain.config.is_encoder_decoder else expected[:, prompt["input_ids"].shape[1] :]
    )


def test_has_no_parts_for_images(base: tuple[Any, Any, Processor]) -> None:
    plain, model, processor = base
    assert model.vision_tower is model.projector is None
    assert set(part_sizes(model)) == {"language model"}
    assert part_sizes(model)["language model"].parameters == sum(one.numel() for one in plain.parameters())
    assert model.newly_initialized == ()
    assert not {IMAGE, REGION} & set(processor.tokenizer.get_vocab())


def test_refuses_images_and_boxes(base: tuple[Any, Any, Processor]) -> None:
    _, model, processor = base
    with pytest.raises(ValueError, match="text only"):
        processor(["a"], [noise_image()])
    with pytest.raises(ValueError, match="text only"):
        processor(["a"], [None], [[[0, 0, 1, 1]]])
    with pytest.raises(ValueError, match="text only"):
        model(**processor(["a"], answers=["b"]), pixel_values=torch.zeros(1, 3, 32, 32))


def test_is_saved_and_loaded_again(base: tuple[Any, Any, Processor], tmp_path: Path) -> None:
    _, model, processor = base
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, reader = load_model(str(tmp_path / "saved"))
    batch = processor(PROMPTS, answers=ANSWERS)
    assert not reader.reads_images
    assert all(torch.equal(tensor, batch[name]) for name, tensor in reader(PROMPTS, answers=ANSWERS).items())
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("method", method_names())
def test_every_adapter_method_is_added_and_trained(method: str, tmp_path: Path) -> None:
    save_language(tmp_path)
    model, processor = load_model(str(tmp_path), vision="none")
    config = make_config({"model": str(tmp_path), "vision": "none", "adapter": method, "lora_rank": 4})
    model = add_adapter(model, config, ["mner", "mre"])
    if hasattr(model, "set_task"):
        model.set_task("mner")
    model(**processor(PROMPTS, answers=ANSWERS)).loss.backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in model.parameters())


@pytest.mark.parametrize("option", [{"vision_layer": -1}, {"projector": "linear"}, {"fusion": "gated"}])
def test_refuses_options_of_a_tower(tmp_path: Path, option: dict[str, Any]) -> None:
    save_t5(tmp_path)
    with pytest.raises(UserError, match=next(iter(option))):
        describe_model(str(tmp_path), vision="none", **option)


@pytest.mark.parametrize(("preset", "parameters"), [("smollm2-135m", 134_515_008), ("smollm2-360m", 361_821_120)])
def test_smollm2_presets_are_text_only(preset: str, parameters: int) -> None:
    sizes = part_sizes(describe_model(preset))
    assert {name: size.parameters for name, size in sizes.items()} == {"language model": parameters}
