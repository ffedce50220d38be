"""Greedy decoding whose rows leave when they have ended: the tokens of ``generate``, in fewer rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm_clorae.models.decoding import decode
from lvlm_clorae.models.packing import MODEL_TYPES
from tests.helpers.packed import padded_batch, tiny_language_model

NEW = 12
PREFIX = 7


def prompts() -> dict[str, torch.Tensor]:
    """Six prompts, padded on the left."""
    found = [padded_batch(seed, PREFIX) for seed in (0, 0)]
    ids, mask = (torch.cat([one[name][:, :-5] for one in found]) for name in ("input_ids", "attention_mask"))
    ids[3:, -1] = torch.tensor([9, 11, 13])
    return {"input_ids": ids, "attention_mask": mask}


def model_that_ends(model_type: str, ends: list[int], shortest: int | None = None) -> Any:
    model = tiny_language_model(model_type)
    model.generation_config.update(eos_token_id=ends, pad_token_id=0, do_sample=False, min_new_tokens=shortest)
    return model


def expected_tokens(model: Any) -> torch.Tensor:
    """The tokens of ``generate`` for the prompts, padded to ``NEW``."""
    batch = prompts()
    tokens = model.generate(**batch, max_new_tokens=NEW)[:, batch["input_ids"].shape[1] :]
    return torch.nn.functional.pad(tokens, (0, NEW - tokens.shape[1]))


def decoded(model: Any, prefix: int = 0, **how: Any) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """The tokens of ``decode`` for the prompts, and rows and tokens of each forward."""
    batch, shapes = prompts(), []

    def record(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else kwargs["input_ids"]
        shapes.append(tuple(given.shape[:2]))

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        tokens = decode(model, embeds, batch["attention_mask"], NEW, prefix, **how)
    hook.remove()
    return tokens, shapes


def length(tokens: list[int], ends: Iterable[int]) -> int:
    """The number of tokens of a row up to its end."""
    return next((place for place, token in enumerate(tokens, 1) if token in ends), len(tokens))


def frequent_ends(model_type: str) -> list[int]:
    """Tokens of which the rows of the endless model have the first at different places."""
    endless = expected_tokens(model_that_ends(model_type, [1]))
    return sorted({int(endless[0, 2]), int(endless[3, 5])})


@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_tokens_are_those_of_generate(model_type: str, prefix: int) -> None:
    ends = frequent_ends(model_type)
    model = model_that_ends(model_type, ends)
    expected = expected_tokens(model)
    tokens, shapes = decoded(model, prefix)
    assert torch.equal(tokens, expected)
    assert len({length(row, ends) for row in expected.tolist()}) > 1, "rows end at different places"
    assert shapes[: 2 if prefix else 1] == ([(1, prefix)] if prefix else []) + [(6, 13 - prefix)]


@pytest.mark.integration
@given(st.sets(st.integers(1, 63), min_size=1, max_size=30), st.sampled_from([0, PREFIX]), st.integers(0, 4))
@settings(deadline=None, max_examples=40)
def test_any_end_tokens(ends: set[int], prefix: int, shortest: int) -> None:
    model = model_that_ends("llama", sorted(ends), shortest)
    expected = expected_tokens(model)
    for rows_may_leave in (True, False):
        tokens, shapes = decoded(model, prefix, rows_may_leave=rows_may_leave)
        assert torch.equal(tokens, expected)
        running = torch.tensor([length(row, ends) for row in expected.tolist()])
        for place, (rows, _) in enumerate(shapes[1 if prefix else 0 :]):
            going = int((running > place).sum())
            assert rows >= going
            assert rows == 6 if not rows_may_leave else (rows == going or rows < 2 * going or going == 0)
        assert len(shapes) - bool(prefix) == int(running.max()), "no forward after the last row has ended"


def test_a_rank_goes_on_while_another_does() -> None:
    model = model_that_ends("llama", list(range(1, 64)))
    left = [True] * 4 + [False]
    tokens, shapes = decoded(model, any_rank=lambda flag: flag or left.pop(0))
    assert len(shapes) == 5
    assert torch.equal(tokens, expected_tokens(model))


class Recorded:
    """Allows everything, and keeps the rows that it is asked about."""

    def __init__(self) -> None:
        self.rows = list(range(6))
        self.answers: dict[int, list[int]] = {row: [] for row in self.rows}

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert len(ids) == len(scores) == len(self.rows)
        for row, before in zip(self.rows, ids.tolist(), strict=True):
            self.answers[row] = before
        return scores

    def keep(self, rows: list[int]) -> None:
        self.rows = [self.rows[row] for row in rows]


def test_a_constraint_is_asked_about_the_rows_that_are_left() -> None:
    model, constraint = model_that_ends("llama", frequent_ends("llama")), Recorded()
    tokens, _ = decoded(model, constraint=constraint)
    assert len(constraint.rows) < 6
    for row, before in constraint.answers.items():
        assert tokens[row, : len(before)].tolist() == before, row
