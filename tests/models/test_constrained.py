"""Constrained decoding: gold can be said with every kind of tokenizer, and nothing else than what the sample has."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from lvlm_clorae.errors import UserError
from lvlm_clorae.models import Processor, load_model
from lvlm_clorae.models.constrained import Constraint, check_tokenizer
from lvlm_clorae.models.generation import generate_answers
from lvlm_clorae.models.pictures import PictureTransform
from lvlm_clorae.models.processor_causal import CausalProcessor
from lvlm_clorae.models.processor_t5 import T5Processor
from lvlm_clorae.tasks import SUBTASKS, build_prompt, format_answer
from tests.models.tiny import picture, tiny_model, tiny_processor, unigram_tokenizer
from tests.models.tiny_causal import llama_tokenizer, qwen_tokenizer, save_language, save_tower
from tests.models.tiny_image_text import save_qwen
from tests.tasks.samples import LABELS, SAMPLES, asked_samples, assert_founded, mner

Asked = tuple[str, dict[str, Any]]
PICTURES = PictureTransform(32)


def legacy_llama_tokenizer() -> PreTrainedTokenizerFast:
    """As LLaVA-1.5's: nothing splits the text into words, and a blank comes before it in any case."""
    content = json.loads(llama_tokenizer().backend_tokenizer.to_str())
    tokenizer = Tokenizer.from_str(json.dumps({**content, "pre_tokenizer": None}))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


PROCESSORS: dict[str, Callable[[], Processor]] = {
    "demo": tiny_processor,
    "t5": lambda: T5Processor(unigram_tokenizer(), PICTURES),
    "llama": lambda: CausalProcessor(llama_tokenizer(), PICTURES, 4),
    "legacy llama": lambda: CausalProcessor(legacy_llama_tokenizer(), PICTURES, 4),
    "qwen": lambda: CausalProcessor(qwen_tokenizer(), PICTURES, 4),
}


@cache
def processor_of(kind: str) -> Processor:
    return PROCESSORS[kind]()


def constraint_of(processor: Processor, *asked: Asked) -> Constraint:
    return Constraint(processor, [(sample, subtask, LABELS[subtask]) for subtask, sample in asked])


def learnt(processor: Processor, answer: str) -> list[int]:
    """The tokens that training asks for."""
    (labels,) = processor(["entities."], answers=[answer], max_answer_length=4000)["labels"]
    return labels[labels != -100].tolist()


def sayable(asked: Asked) -> bool:
    """Tokenizers take no lone surrogates, and T5's drops characters of control."""
    return all(character.isprintable() or character.isspace() for character in asked[1]["text"])


def play(constraint: Constraint, rows: int, vocabulary: int, end: int, steps: int, seed: int) -> torch.Tensor:
    """Token ids ``[rows, T]`` as transformers generates them greedily, from random scores and a start of one token."""
    generator = torch.Generator().manual_seed(seed)
    tokens, going = torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, dtype=torch.long)
    while going.any() and tokens.shape[1] <= steps:
        scores = constraint(tokens, torch.randn(rows, vocabulary, generator=generator))
        following = scores.argmax(-1) * going
        tokens = torch.cat([tokens, following[:, None]], 1)
        going = going * (following != end)
    return tokens


@pytest.mark.parametrize("kind", PROCESSORS)
@given(asked=asked_samples.filter(sayable))
def test_gold_can_be_said_as_it_was_learnt(kind: str, asked: Asked) -> None:
    processor = processor_of(kind)
    gold = format_answer(asked[1], asked[0])
    tokens = learnt(processor, gold)
    constraint = constraint_of(processor, asked)
    for number in range(len(tokens)):
        scores = constraint(torch.tensor([[0, *tokens[:number]]]), torch.zeros(1, len(processor.tokenizer)))
        assert scores[0, tokens[number]] == 0, processor.tokenizer.convert_ids_to_tokens(tokens[: number + 1])
    (said,) = constraint.answers(torch.tensor([[0, *tokens]]))
    assert said == gold or learnt(processor, said) == tokens, "two words of the same tokens cannot be told apart"
    if kind != "t5":
        assert said == gold


@pytest.mark.parametrize("kind", PROCESSORS)
@settings(max_examples=25)
@given(asked=st.lists(asked_samples.filter(sayable), min_size=1, max_size=6), seed=st.integers(0, 1 << 32))
def test_whatever_the_model_wants_answers_are_founded(kind: str, asked: list[Asked], seed: int) -> None:
    """Rows of all sub-tasks beside one another, some of which end long before others."""
    processor = processor_of(kind)
    constraint = constraint_of(processor, *asked)
    end = processor.tokenizer.eos_token_id
    tokens = play(constraint, len(asked), len(processor.tokenizer), end, 300, seed)
    for (subtask, sample), row, answer in zip(asked, tokens.tolist(), constraint.answers(tokens), strict=True):
        if end in row:
            assert_founded(sample, subtask, answer)


BATCH: list[Asked] = [(subtask, SAMPLES[subtask]()) for subtask in SUBTASKS]


def tiny_t5(directory: Path) -> tuple[Any, Processor]:
    return tiny_model(), tiny_processor()


def tiny_causal(directory: Path) -> tuple[Any, Processor]:
    save_language(directory, "llama")
    return load_model(str(directory), vision=save_tower(directory / "tower"))


def tiny_image_text(directory: Path) -> tuple[Any, Processor]:
    save_qwen(directory)
    return load_model(str(directory))


@pytest.fixture(scope="module", params=[tiny_t5, tiny_causal, tiny_image_text])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Processor]:
    make: Callable[[Path], tuple[Any, Processor]] = request.param
    return make(tmp_path_factory.mktemp("base"))


def ask(processor: Processor, asked: list[Asked]) -> dict[str, torch.Tensor]:
    """The batch; its first row has no picture."""
    boxes = [[item["box"] for item in sample["objects"]] for _, sample in asked]
    images = [None, *(picture(number) for number in range(1, len(asked)))]
    return processor([build_prompt(sample, subtask, LABELS[subtask]) for subtask, sample in asked], images, boxes)


class Wish(LogitsProcessor):
    """What a model of firm opinions does to the scores: it wants to say just these answers."""

    def __init__(self, processor: Processor, answers: list[str]) -> None:
        self.tokens = [learnt(processor, answer) for answer in answers]
        self.number = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, tokens in enumerate(self.tokens):
            scores[row, tokens[min(self.number, len(tokens) - 1)]] += 1e4
        self.number += 1
        return scores


def test_a_model_of_random_weights_is_held_to_it(base: tuple[Any, Processor]) -> None:
    """All sub-tasks in one batch: prompts of several lengths, padded, with a picture and without."""
    model, processor = base
    batch = ask(processor, BATCH)
    answers = generate_answers(model, processor, batch, 200, constraint_of(processor, *BATCH))
    for (subtask, sample), answer in zip(BATCH, answers, strict=True):
        assert_founded(sample, subtask, answer)
    free = generate_answers(model, processor, batch, 50)
    assert free != answers
    tokens = model.generate(**batch, max_new_tokens=50, do_sample=False)
    assert free == processor.decode(tokens[:, processor.echoed(batch) :]), "as ever where nothing is constrained"


def test_what_was_allowed_already_stays_as_it_was(base: tuple[Any, Processor]) -> None:
    model, processor = base
    gold = [format_answer(sample, subtask) for subtask, sample in BATCH]
    batch = ask(processor, BATCH)
    for constraint in (None, constraint_of(processor, *BATCH)):
        wish = [Wish(processor, gold)]
        assert generate_answers(model, processor, batch, 160, constraint, logits_processor=wish) == gold


def test_what_is_not_allowed_is_not_said(base: tuple[Any, Processor]) -> None:
    model, processor = base
    wanted = ["person, Sven", "Ryan <spot> friend <spot> Sven", "attack, war", "attack <spot> target, O7"]
    batch = ask(processor, BATCH)
    assert generate_answers(model, processor, batch, 50, logits_processor=[Wish(processor, wanted)]) == wanted
    wish = [Wish(processor, wanted)]
    answers = generate_answers(model, processor, batch, 200, constraint_of(processor, *BATCH), logits_processor=wish)
    for (subtask, sample), answer in zip(BATCH, answers, strict=True):
        assert_founded(sample, subtask, answer)
    assert answers[0].startswith("person, ")
    assert answers[1].startswith("Ryan Reynolds <spot> ")
    assert answers[2].startswith("attack, ")
    assert answers[3].startswith("attack <spot> target, ")


def test_an_answer_that_is_cut_off_ends_with_a_whole_piece() -> None:
    processor = tiny_processor()
    constraint = constraint_of(processor, ("entity", mner()))
    tokens = learnt(processor, "person, Kyrie leaves Dallas")
    said = {constraint.answers(torch.tensor([tokens[:number]]))[0] for number in range(len(tokens) + 1)}
    assert said == {"", "person,", "person, Kyrie", "person, Kyrie leaves", "person, Kyrie leaves Dallas"}


def test_after_the_end_and_after_what_was_not_allowed_a_row_may_only_end() -> None:
    processor = tiny_processor()
    end = processor.tokenizer.eos_token_id
    constraint = constraint_of(processor, ("entity", mner()), ("entity", mner()))
    none = learnt(processor, "none")
    tokens = torch.tensor([[0, *none, 0, 0], [0, *[end] * (len(none) + 2)]])
    for length in range(1, tokens.shape[1] + 1):
        kept = constraint(tokens[:, :length], torch.zeros(2, len(processor.tokenizer))).isfinite()
        assert kept.any(1).all()
    assert kept.nonzero().tolist() == [[0, end], [1, end]]
    assert constraint.answers(tokens) == ["none", ""]


def test_scores_of_what_is_allowed_are_kept() -> None:
    processor = tiny_processor()
    scores = torch.randn(len(BATCH), len(processor.tokenizer) + 7)
    kept = constraint_of(processor, *BATCH)(torch.zeros(len(BATCH), 1, dtype=torch.long), scores)
    allowed = kept.isfinite()
    assert torch.equal(kept[allowed], scores[allowed])
    entity, relation, *_ = (set(row.nonzero().flatten().tolist()) for row in allowed)
    assert entity == {learnt(processor, name)[0] for name in (*LABELS["entity"], "none")}
    assert relation == {learnt(processor, "Ryan")[0]}


def test_what_t5_cannot_write_is_spelled_all_the_same() -> None:
    """Its tokens for this are unknown ones, or those of other characters."""
    processor = processor_of("t5")
    sample = {**mner(), "text": "fans of Ⓜara 🙂 in Tamsk"}
    gold = "person, Ⓜara 🙂 <spot> location, Tamsk"
    tokens = torch.tensor([learnt(processor, gold)])
    assert processor.decode(tokens) == ["person, Mara <unk> <spot> location, Tamsk"]
    assert constraint_of(processor, ("entity", sample)).answers(tokens) == [gold]


@pytest.mark.parametrize("subtask", ["entity", "trigger"])
def test_words_that_the_tokenizer_drops_cannot_be_said(subtask: str) -> None:
    processor = processor_of("t5")
    for seed in range(5):
        constraint = constraint_of(processor, (subtask, {**mner(), "text": "\x01 \x02"}))
        tokens = play(constraint, 1, len(processor.tokenizer), processor.tokenizer.eos_token_id, 100, seed)
        assert "," not in constraint.answers(tokens)[0]


def test_a_tokenizer_that_joins_words_is_refused_and_does_no_harm() -> None:
    processor = T5Processor(unigram_tokenizer(split=False), PICTURES)
    with pytest.raises(UserError, match=r"joins words of .* Leave out --constrained"):
        check_tokenizer(processor)
    for seed in range(10):
        constraint = constraint_of(processor, *BATCH)
        tokens = play(constraint, len(BATCH), len(processor.tokenizer), processor.tokenizer.eos_token_id, 300, seed)
        for (subtask, sample), answer in zip(BATCH, constraint.answers(tokens), strict=True):
            assert_founded(sample, subtask, answer)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_other_tokenizers_are_not_refused(kind: str) -> None:
    check_tokenizer(processor_of(kind))


def test_labels_of_another_form_are_the_users_error() -> None:
    with pytest.raises(UserError, match="must be a list of names"):
        Constraint(tiny_processor(), [(mner(), "entity", "person")])
