"""A model family registered from outside the package: text-only BART."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration, LlamaConfig

from lvlm_clorae.errors import UserError
from lvlm_clorae.models import Family, Processor, families, load_model, register_family
from lvlm_clorae.models.families import LoadOptions, Source, find_family
from lvlm_clorae.models.generation import generate_answers
from lvlm_clorae.models.loading import describe_model
from lvlm_clorae.models.parts import language_names
from lvlm_clorae.models.processor import Batch, Boxes, Images, Lengths, Texts, pad
from tests.helpers.tiny import noise_image, tiny_processor

PROMPTS = ["entities. text: Mara leaves Tamsk", "entities. text: so"]


class BartProcessor(Processor):
    """Ignores images and boxes."""

    processor_type = "test-bart"

    @classmethod
    def read(cls, path: str | Path, settings: dict[str, Any]) -> BartProcessor:
        return cls(AutoTokenizer.from_pretrained(path))

    def encode(self, prompts: Texts, images: Images, boxes: Boxes, answers: Texts | None, lengths: Lengths) -> Batch:
        ids, mask = pad([row[: lengths[0]] for row in self.answer_ids(prompts)], self.pad_token_id, left=False)
        batch = {"input_ids": ids, "attention_mask": mask}
        if answers is not None:
            labels, valid = pad([[*row, self.eos_token_id] for row in self.answer_ids(answers)], 0, left=False)
            batch["labels"] = labels.masked_fill(valid == 0, -100)
        return batch

    def answer_ids(self, answers: Texts) -> list[list[int]]:
        return list(self.tokenizer(list(answers), add_special_tokens=False)["input_ids"])


class BartFamily(Family):
    name = "test-bart"
    description = "BART"
    processor_class = BartProcessor

    def matches(self, config: Any) -> bool:
        return config.model_type == "bart"

    def load(self, source: Source, options: LoadOptions) -> tuple[Any, Processor]:
        model = AutoModelForSeq2SeqLM.from_pretrained(source.base, **options.from_pretrained)
        return model, BartProcessor(AutoTokenizer.from_pretrained(source.base))

    def describe(self, source: Source, options: LoadOptions) -> Any:
        return AutoModelForSeq2SeqLM.from_config(source.config)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """Save a BART of one layer."""
    tokenizer = tiny_processor().tokenizer
    widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    ends = {"decoder_start_token_id": 0, "forced_eos_token_id": None}
    torch.manual_seed(0)
    config = BartConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **widths, **layers, **ids, **ends)
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", [])
    register_family(BartFamily())


def test_unregistered_family_is_an_error(base: str) -> None:
    with pytest.raises(UserError, match="bart"):
        load_model(base)


@pytest.mark.usefixtures("registered")
def test_registered_family_loads_trains_and_generates(base: str, tmp_path: Path) -> None:
    model, processor = load_model(base)
    assert isinstance(model, BartForConditionalGeneration)
    assert model.newly_initialized == ()
    batch = processor(PROMPTS, [noise_image(), None], None, ["person, Mara", "none"])
    loss = model.train()(**batch).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    answers = generate_answers(model.eval(), processor, processor(PROMPTS), max_new_tokens=6)
    assert len(answers) == 2
    assert language_names(model) == ["model.encoder", "model.decoder"]
    processor.save_pretrained(tmp_path / "saved")
    again = Processor.from_pretrained(tmp_path / "saved")
    assert isinstance(again, BartProcessor)
    assert torch.equal(again(PROMPTS)["input_ids"], processor(PROMPTS)["input_ids"])


@pytest.mark.usefixtures("registered")
def test_registered_family_is_described(base: str) -> None:
    described, (loaded, _) = describe_model(base), load_model(base)
    assert {parameter.device.type for parameter in described.parameters()} == {"meta"}
    shapes = [{name: value.shape for name, value in model.named_parameters()} for model in (described, loaded)]
    assert shapes[0] == shapes[1]


@pytest.mark.usefixtures("registered")
def test_registered_family_rejects_options_that_it_does_not_accept(base: str) -> None:
    with pytest.raises(UserError, match="fusion = gated"):
        load_model(base, fusion="gated")


@pytest.mark.usefixtures("registered")
def test_registered_family_precedes_built_in_ones() -> None:
    class LlamaFamily(BartFamily):
        name = "test-llama"

        def matches(self, config: Any) -> bool:
            return config.model_type == "llama"

    assert find_family(LlamaConfig(), "x").name == "causal"
    register_family(LlamaFamily())
    assert find_family(LlamaConfig(), "x").name == "test-llama"
    with pytest.raises(ValueError, match="test-llama"):
        register_family(LlamaFamily())
