"""Tokens in their slots, against a loop."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lvlm_clorae.models.slots import of_rows, place


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[bool]], int]:
    """Rows of slots of one length, and how many tokens a row has: fewer or more than slots."""
    length = draw(st.integers(1, 8))
    rows = st.lists(st.booleans(), min_size=length, max_size=length)
    return draw(st.lists(rows, min_size=1, max_size=4)), draw(st.integers(1, 6))


def by_loop(embeddings: torch.Tensor, slots: list[list[bool]], tokens: torch.Tensor) -> torch.Tensor:
    placed = embeddings.clone()
    for row, marks in enumerate(slots):
        waiting = list(tokens[row])
        for position, slot in enumerate(marks):
            if slot:
                placed[row, position] = waiting[0]
                waiting = waiting[1:] or waiting
    return placed


@given(cases())
def test_the_kth_slot_of_a_row_gets_its_kth_token(case: tuple[list[list[bool]], int]) -> None:
    slots, count = case
    rows, length, width = len(slots), len(slots[0]), 3
    embeddings = torch.arange(rows * length * width).reshape(rows, length, width).float()
    tokens = -1.0 - torch.arange(rows * count * width).reshape(rows, count, width).double()
    kept = embeddings.clone()
    placed = place(embeddings, torch.tensor(slots), tokens)
    assert placed.dtype == embeddings.dtype
    assert torch.equal(placed, by_loop(embeddings, slots, tokens))
    assert torch.equal(embeddings, kept)


def test_gradients_go_where_the_values_came_from() -> None:
    embeddings = torch.zeros(1, 3, 2, requires_grad=True)
    tokens = torch.zeros(1, 2, 2, requires_grad=True)
    weights = torch.arange(6.0).reshape(1, 3, 2) + 1
    (place(embeddings, torch.tensor([[False, True, False]]), tokens) * weights).sum().backward()
    assert embeddings.grad.tolist() == [[[1, 2], [0, 0], [5, 6]]]
    assert tokens.grad.tolist() == [[[3, 4], [0, 0]]]


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_each_row_gets_its_own_picture(shown: list[bool]) -> None:
    mask = torch.tensor(shown).long()
    pictures = torch.arange(1.0, max(1, sum(shown)) + 1)[:, None, None].expand(-1, 2, 3)
    found = of_rows(pictures, mask)
    assert found.shape == (len(shown), 2, 3)
    own = found[mask == 1][:, 0, 0].tolist()
    assert own == list(range(1, sum(shown) + 1))
    aligned = torch.randn(len(shown), 2, 3)
    assert torch.equal(of_rows(aligned, mask), aligned)
