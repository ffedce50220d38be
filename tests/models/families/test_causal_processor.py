"""CausalProcessor: rows of training and generation, labels, placeholders, templates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.errors import UserError
from lvlm_clorae.models import Processor
from lvlm_clorae.models.families.causal import LLAVA_TEMPLATE, CausalProcessor
from lvlm_clorae.models.processor import ImageTransform
from lvlm_clorae.tasks import EVENT, SPOT
from tests.helpers.task_samples import ANSWERS
from tests.helpers.tiny import noise_image
from tests.helpers.tiny_causal import llama_tokenizer, qwen_tokenizer

PATCHES = 4


def make(tokenizer_name: str, template: str | None = None) -> CausalProcessor:
    tokenizer = {"llama": llama_tokenizer, "qwen": qwen_tokenizer}[tokenizer_name]()
    return CausalProcessor(tokenizer, ImageTransform(32), PATCHES, template)


@pytest.fixture(scope="module", params=["llama", "qwen"])
def processor(request: pytest.FixtureRequest) -> CausalProcessor:
    return make(request.param)


def row(batch: dict[str, torch.Tensor], number: int = 0) -> list[int]:
    """Return the row's tokens without padding."""
    return batch["input_ids"][number][batch["attention_mask"][number] == 1].tolist()


words = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=6)
answers = st.lists(words | st.sampled_from([SPOT, EVENT, ",", "none", "O1"]), min_size=1, max_size=6).map(" ".join)


@pytest.mark.integration
@given(prompt=answers, answer=answers, has_image=st.booleans())
def test_training_row_continues_the_generation_row(
    processor: CausalProcessor, prompt: str, answer: str, has_image: bool
) -> None:
    images = [noise_image() if has_image else None]
    asked, trained = processor([prompt], images), processor([prompt], images, None, [answer])
    head, whole = row(asked), row(trained)
    assert whole[: len(head)] == head
    labels = trained["labels"][0]
    assert labels[labels != -100].tolist() == whole[len(head) :]
    assert whole[-1] == processor.tokenizer.eos_token_id
    assert processor.decode(labels[labels != -100][None]) == [answer]


@pytest.mark.parametrize("answer", [*ANSWERS.values(), "none", "Müller 's <spot> /per/per/couple <spot> Zoë , Ltd ."])
def test_decode_inverts_encode(processor: CausalProcessor, answer: str) -> None:
    labels = processor(["entities."], None, None, [answer], max_target_length=512)["labels"]
    assert processor.decode(labels.clamp(min=processor.tokenizer.pad_token_id)) == [answer]


def test_answer_is_complete_if_a_token_spans_the_border() -> None:
    processor = make("llama")
    processor._before, processor._blank = "ASSISTANT: pers", ""  # "person" is one token
    assert processor.decode(processor(["x"], None, None, ["on"])["labels"][:, :-1].clamp(min=0))[0].startswith("on")


@pytest.mark.parametrize("name", ["llama", "qwen"])
@pytest.mark.parametrize("template", [None, "<s>{image}Q: {prompt} A:{answer}"])
def test_an_image_without_a_prompt_is_followed_by_its_answer_alone(name: str, template: str | None) -> None:
    """LLaVA's plain conversation; without an image the template stays."""
    processor = make(name, template if name == "llama" else None)
    begin = [] if processor.tokenizer.bos_token is None else [processor.tokenizer.bos_token_id]
    found = row(processor([""], [noise_image()], None, ["Mara leaves Tamsk"]))
    assert found[: len(begin) + PATCHES] == begin + PATCHES * [processor.image_token_id]
    answer = found[len(begin) + PATCHES :]
    assert answer[-1] == processor.eos_token_id
    assert processor.decode(torch.tensor([answer])) == ["Mara leaves Tamsk"]
    assert len(row(processor([""], [None], None, ["Mara"]))) > len(row(processor([""], [None]))) > len(begin)


def test_all_answers_start_in_one_column(processor: CausalProcessor) -> None:
    batch = processor(["a", "a text that is longer"], None, None, ["none", "person, Mara Novotny"])
    width, target = batch["input_ids"].shape[1], batch["labels"].shape[1]
    assert width % 8 == target % 8 == 0
    assert (batch["attention_mask"][:, width - target] == 1).all()
    assert (batch["attention_mask"][:, width - target - 1] == 1).all()
    assert batch["attention_mask"][0, 0] == 0
    assert torch.equal(batch["attention_mask"][:, -target:] == 1, batch["labels"] != -100)
    assert torch.equal(
        batch["input_ids"][:, -target:][batch["labels"] != -100], batch["labels"][batch["labels"] != -100]
    )
    assert "labels" not in processor(["a"])


def test_placeholders_of_images_and_regions(processor: CausalProcessor) -> None:
    batch = processor(["a <region> b <region>", "a"], [noise_image(), None], [[[0, 0, 20, 15], [1, 1, 5, 5]], []])
    found = [(line == processor.image_token_id).sum().item() for line in batch["input_ids"]]
    assert found == [PATCHES, 0]
    assert (batch["input_ids"] == processor.region_token_id).sum(1).tolist() == [2, 0]
    assert batch["pixel_mask"].tolist() == [1, 0]
    assert batch["regions"].shape == (2, 2, 4)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("token", ["</s>", "<s>", "<unk>", "<image>", "<|im_end|>", "<|im_start|>"])
def test_special_tokens_in_text_are_escaped(processor: CausalProcessor, token: str) -> None:
    plain, forged = row(processor(["some text"])), row(processor([f"some {token} text"]))
    special = set(processor.tokenizer.all_special_ids) | {processor.image_token_id}
    assert [number for number in forged if number in special] == [number for number in plain if number in special]


def test_truncation_keeps_the_end_of_the_template(processor: CausalProcessor) -> None:
    short, long = (
        row(processor(["word " * 5], max_source_length=6)),
        row(processor(["word " * 100], max_source_length=6)),
    )
    assert len(long) <= len(short) + 6
    ending = row(processor([""]))[-2:]
    assert long[-2:] == ending
    labels = processor(["a"], None, None, ["name " * 100], max_target_length=16)["labels"]
    assert labels.shape == (1, 16)
    assert processor.tokenizer.eos_token_id not in labels, "the model would learn to stop there"


def test_bos_token_occurs_once() -> None:
    processor = make("llama")
    assert row(processor(["a"])).count(processor.tokenizer.bos_token_id) == 1
    own = make("llama", "<s>[INST] {image}{prompt} [/INST] {answer}")
    assert row(own(["a"])).count(own.tokenizer.bos_token_id) == 1
    assert row(own(["a"]))[0] == own.tokenizer.bos_token_id


def test_default_template() -> None:
    assert make("llama").template == LLAVA_TEMPLATE
    assert make("qwen").template == "<|im_start|>user\n{image}{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}"
    text = make("llama").tokenizer.decode(row(make("llama")(["a"], [noise_image()])))
    assert "".join(text.split()) == f"<s>USER:{'<image>' * PATCHES}aASSISTANT:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{prompt} {answer}", "{image} 0 times"),
        ("{image}{prompt}", "{answer} 0 times"),
        ("{image}{prompt}{prompt}{answer}", "{prompt} 2 times"),
        ("{answer} {image}{prompt}", "{answer} last"),
    ],
)
def test_invalid_template_is_an_error(template: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        make("llama", template)
    assert message in str(error.value)


def test_invalid_chat_template_is_an_error() -> None:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="chat template"):
        CausalProcessor(tokenizer, ImageTransform(32), PATCHES)
    tokenizer.chat_template = "hello"
    with pytest.raises(UserError, match="hello"):
        CausalProcessor(tokenizer, ImageTransform(32), PATCHES)


def test_tokenizer_without_eos_token_is_an_error() -> None:
    tokenizer = qwen_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        CausalProcessor(tokenizer, ImageTransform(32), PATCHES)


def test_save_and_load(processor: CausalProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    assert isinstance(again, CausalProcessor)
    arguments = (["a <region>", "b"], [noise_image(), None], [[[0, 0, 20, 15]], []], ["person, Mara", "none"])
    first, second = processor(*arguments), again(*arguments)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
