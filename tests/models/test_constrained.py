"""Constrained decoding: gold answers are possible with every tokenizer, and all answers are grounded in the sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from lvlm_clorae.errors import UserError
from lvlm_clorae.models import Processor, load_model
from lvlm_clorae.models.constrained import Constraint, check_tokenizer
from lvlm_clorae.models.families.causal import CausalProcessor
from lvlm_clorae.models.families.t5 import T5Processor
from lvlm_clorae.models.generation import generate_answers
from lvlm_clorae.models.processor import ImageTransform
from lvlm_clorae.tasks import SUBTASKS, build_prompt, format_answer
from tests.helpers.task_samples import LABELS, SAMPLES, asked_samples, assert_grounded, mner
from tests.helpers.tiny import noise_image, tiny_model, tiny_processor, unigram_tokenizer
from tests.helpers.tiny_causal import llama_tokenizer, qwen_tokenizer, save_language, save_tower
from tests.helpers.tiny_image_text import save_qwen

pytestmark = pytest.mark.integration

Asked = tuple[str, dict[str, Any]]
IMAGES = ImageTransform(32)


def legacy_llama_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer like LLaVA-1.5's: no pre-tokenizer, and a space is always prepended."""
    content = json.loads(llama_tokenizer().backend_tokenizer.to_str())
    tokenizer = Tokenizer.from_str(json.dumps({**content, "pre_tokenizer": None}))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


PROCESSORS: dict[str, Callable[[], Processor]] = {
    "demo": tiny_processor,
    "t5": lambda: T5Processor(unigram_tokenizer(), IMAGES),
    "llama": lambda: CausalProcessor(llama_tokenizer(), IMAGES, 4),
    "legacy llama": lambda: CausalProcessor(legacy_llama_tokenizer(), IMAGES, 4),
    "qwen": lambda: CausalProcessor(qwen_tokenizer(), IMAGES, 4),
}


@cache
def processor_of(name: str) -> Processor:
    return PROCESSORS[name]()


def constraint_of(processor: Processor, *asked: Asked) -> Constraint:
    return Constraint(processor, [(sample, subtask, LABELS[subtask]) for subtask, sample in asked])


def label_ids(processor: Processor, answer: str) -> list[int]:
    """Return the answer's labels in training."""
    (labels,) = processor(["entities."], answers=[answer], max_target_length=4000)["labels"]
    return labels[labels != -100].tolist()


def tokenizable(asked: Asked) -> bool:
    """Tokenizers reject lone surrogates, and T5's drops control characters."""
    return all(character.isprintable() or character.isspace() for character in asked[1]["text"])


def decode_greedily(
    constraint: Constraint, rows: int, vocabulary: int, end: int, steps: int, seed: int
) -> torch.Tensor:
    """Generate token ids ``[rows, T]`` greedily from random scores, as transformers does, after one start token."""
    generator = torch.Generator().manual_seed(seed)
    tokens, going = torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, dtype=torch.long)
    while going.any() and tokens.shape[1] <= steps:
        scores = constraint(tokens, torch.randn(rows, vocabulary, generator=generator))
        following = scores.argmax(-1) * going
        tokens = torch.cat([tokens, following[:, None]], 1)
        going = going * (following != end)
    return tokens


@pytest.mark.parametrize("name", PROCESSORS)
@settings(deadline=None)
@given(asked=asked_samples.filter(tokenizable))
def test_gold_answer_is_allowed_with_its_labels(name: str, asked: Asked) -> None:
    processor = processor_of(name)
    gold = format_answer(asked[1], asked[0])
    tokens = label_ids(processor, gold)
    constraint = constraint_of(processor, asked)
    for number in range(len(tokens)):
        scores = constraint(torch.tensor([[0, *tokens[:number]]]), torch.zeros(1, len(processor.tokenizer)))
        assert scores[0, tokens[number]] == 0, processor.tokenizer.convert_ids_to_tokens(tokens[: number + 1])
    (said,) = constraint.answers(torch.tensor([[0, *tokens]]))
    assert said == gold or label_ids(processor, said) == tokens, "words with equal tokens are ambiguous"
    if name != "t5":
        assert said == gold


@pytest.mark.parametrize("name", PROCESSORS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(asked=st.lists(asked_samples.filter(tokenizable), min_size=1, max_size=6), seed=st.integers(0, 1 << 32))
def test_answers_for_random_scores_are_grounded(name: str, asked: list[Asked], seed: int) -> None:
    """A batch mixes sub-tasks, and some rows end long before others."""
    processor = processor_of(name)
    constraint = constraint_of(processor, *asked)
    end = processor.eos_token_id
    tokens = decode_greedily(constraint, len(asked), len(processor.tokenizer), end, 300, seed)
    for (subtask, sample), row, answer in zip(asked, tokens.tolist(), constraint.answers(tokens), strict=True):
        if end in row:
            assert_grounded(sample, subtask, answer)


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
    """Build the batch; its first row has no image."""
    boxes = [[item["box"] for item in sample["objects"]] for _, sample in asked]
    images = [None, *(noise_image(number) for number in range(1, len(asked)))]
    return processor([build_prompt(sample, subtask, LABELS[subtask]) for subtask, sample in asked], images, boxes)


class Forced(LogitsProcessor):
    """Raises the scores of the tokens of given answers, like a model that is certain of them."""

    def __init__(self, processor: Processor, answers: list[str]) -> None:
        self.tokens = [label_ids(processor, answer) for answer in answers]
        self.number = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, tokens in enumerate(self.tokens):
            scores[row, tokens[min(self.number, len(tokens) - 1)]] += 1e4
        self.number += 1
        return scores


def test_answers_of_a_random_model_are_grounded(base: tuple[Any, Processor]) -> None:
    """One batch has all sub-tasks, prompts of several lengths, and rows with and without an image."""
    model, processor = base
    batch = ask(processor, BATCH)
    answers = generate_answers(model, processor, batch, 200, constraint=constraint_of(processor, *BATCH))
    for (subtask, sample), answer in zip(BATCH, answers, strict=True):
        assert_grounded(sample, subtask, answer)
    constraint = constraint_of(processor, *BATCH)
    by_generate = generate_answers(model, processor, batch, 200, constraint=constraint, use_cache=True)
    assert answers == by_generate, "rows that have ended leave the batch, and the constraint"
    free = generate_answers(model, processor, batch, 50)
    assert free != answers
    tokens = model.generate(**batch, max_new_tokens=50, do_sample=False)
    assert free == processor.decode(tokens[:, processor.prompt_length(batch) :]), "without constraint"


def test_allowed_answers_are_unchanged(base: tuple[Any, Processor]) -> None:
    model, processor = base
    gold = [format_answer(sample, subtask) for subtask, sample in BATCH]
    batch = ask(processor, BATCH)
    for constraint in (None, constraint_of(processor, *BATCH)):
        forced = [Forced(processor, gold)]
        assert generate_answers(model, processor, batch, 160, constraint=constraint, logits_processor=forced) == gold


def test_disallowed_answers_are_replaced(base: tuple[Any, Processor]) -> None:
    model, processor = base
    wanted = ["person, Sven", "Ryan <spot> friend <spot> Sven", "attack, war", "attack <spot> target, O7"]
    wanted += ["Date: <spot> gift <spot> Sven"]
    batch = ask(processor, BATCH)
    assert generate_answers(model, processor, batch, 50, logits_processor=[Forced(processor, wanted)]) == wanted
    forced = [Forced(processor, wanted)]
    constraint = constraint_of(processor, *BATCH)
    answers = generate_answers(model, processor, batch, 200, constraint=constraint, logits_processor=forced)
    for (subtask, sample), answer in zip(BATCH, answers, strict=True):
        assert_grounded(sample, subtask, answer)
    assert answers[0].startswith("person, ")
    assert answers[1].startswith("Ryan Reynolds <spot> ")
    assert answers[2].startswith("attack, ")
    assert answers[3].startswith("attack <spot> target, ")


def test_truncated_answer_ends_with_a_whole_piece() -> None:
    processor = tiny_processor()
    constraint = constraint_of(processor, ("entity", mner()))
    tokens = label_ids(processor, "person, Kyrie leaves Dallas")
    said = {constraint.answers(torch.tensor([tokens[:number]]))[0] for number in range(len(tokens) + 1)}
    assert said == {"", "person,", "person, Kyrie", "person, Kyrie leaves", "person, Kyrie leaves Dallas"}


def test_row_may_only_end_after_its_end_or_a_disallowed_token() -> None:
    processor = tiny_processor()
    end = processor.eos_token_id
    constraint = constraint_of(processor, ("entity", mner()), ("entity", mner()))
    none = label_ids(processor, "none")
    tokens = torch.tensor([[0, *none, 0, 0], [0, *[end] * (len(none) + 2)]])
    for length in range(1, tokens.shape[1] + 1):
        kept = constraint(tokens[:, :length], torch.zeros(2, len(processor.tokenizer))).isfinite()
        assert kept.any(1).all()
    assert kept.nonzero().tolist() == [[0, end], [1, end]]
    assert constraint.answers(tokens) == ["none", ""]


def test_scores_of_allowed_tokens_are_kept() -> None:
    processor = tiny_processor()
    scores = torch.randn(len(BATCH), len(processor.tokenizer) + 7)
    kept = constraint_of(processor, *BATCH)(torch.zeros(len(BATCH), 1, dtype=torch.long), scores)
    allowed = kept.isfinite()
    assert torch.equal(kept[allowed], scores[allowed])
    entity, relation, *_ = (set(row.nonzero().flatten().tolist()) for row in allowed)
    assert entity == {label_ids(processor, name)[0] for name in (*LABELS["entity"], "none")}
    assert relation == {label_ids(processor, "Ryan")[0]}


def test_answer_text_has_characters_that_t5_cannot_tokenize() -> None:
    """Their tokens are unknown or those of other characters."""
    processor = processor_of("t5")
    sample = {**mner(), "text": "fans of Ⓜara 🙂 in Tamsk"}
    gold = "person, Ⓜara 🙂 <spot> location, Tamsk"
    tokens = torch.tensor([label_ids(processor, gold)])
    assert processor.decode(tokens) == ["person, Mara <unk> <spot> location, Tamsk"]
    assert constraint_of(processor, ("entity", sample)).answers(tokens) == [gold]


@pytest.mark.parametrize("subtask", ["entity", "trigger"])
def test_words_that_the_tokenizer_drops_are_not_allowed(subtask: str) -> None:
    processor = processor_of("t5")
    for seed in range(5):
        constraint = constraint_of(processor, (subtask, {**mner(), "text": "\x01 \x02"}))
        tokens = decode_greedily(constraint, 1, len(processor.tokenizer), processor.eos_token_id, 100, seed)
        assert "," not in constraint.answers(tokens)[0]


def test_tokenizer_that_merges_words_is_an_error() -> None:
    processor = T5Processor(unigram_tokenizer(split=False), IMAGES)
    with pytest.raises(UserError, match="--constrained"):
        check_tokenizer(processor)
    for seed in range(10):
        constraint = constraint_of(processor, *BATCH)
        tokens = decode_greedily(constraint, len(BATCH), len(processor.tokenizer), processor.eos_token_id, 300, seed)
        for (subtask, sample), answer in zip(BATCH, constraint.answers(tokens), strict=True):
            assert_grounded(sample, subtask, answer)


@pytest.mark.parametrize("name", PROCESSORS)
def test_other_tokenizers_pass_the_check(name: str) -> None:
    check_tokenizer(processor_of(name))


def test_labels_of_the_wrong_structure_are_an_error() -> None:
    with pytest.raises(UserError, match="list"):
        Constraint(tiny_processor(), [(mner(), "entity", "person")])
