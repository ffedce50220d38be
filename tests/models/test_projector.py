"""Projection of patches and regions, and their placement among text tokens, against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lvlm_clorae.models.projector import VisualProjector, expand_to_rows, patch_weights, scatter_tokens

fractions = st.floats(0, 1, allow_subnormal=False)
boxes = st.tuples(fractions, fractions, fractions, fractions).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


def overlaps(box: tuple[float, ...], grid: int) -> np.ndarray:
    """Compute the area of each patch under the box, in row order."""
    x1, y1, x2, y2 = box
    areas = np.zeros((grid, grid))
    for row in range(grid):
        for column in range(grid):
            width = min(x2, (column + 1) / grid) - max(x1, column / grid)
            height = min(y2, (row + 1) / grid) - max(y1, row / grid)
            areas[row, column] = max(0.0, width) * max(0.0, height)
    return areas.ravel()


@given(st.lists(boxes, min_size=1, max_size=4), st.integers(1, 6))
def test_patch_weights_are_shares_of_the_overlap(found: list[tuple[float, ...]], grid: int) -> None:
    weights = patch_weights(torch.tensor(found, dtype=torch.float64), grid).numpy()
    assert weights.shape == (len(found), grid * grid)
    for box, row in zip(found, weights, strict=True):
        areas = overlaps(box, grid)
        if min(box[2] - box[0], box[3] - box[1]) > 1e-6:
            np.testing.assert_allclose(row, areas / areas.sum(), atol=1e-9)
            assert abs(row.sum() - 1) < 1e-9
        else:
            assert 0 <= row.sum() <= 1 + 1e-9


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (0.5, 0.2, 0.5, 0.9), (0.1, 1.0, 0.9, 1.0), (0.8, 0.1, 0.2, 0.9)])
def test_box_without_area_has_zero_weights(box: tuple[float, ...]) -> None:
    assert torch.equal(patch_weights(torch.tensor([box]), 4), torch.zeros(1, 16))


def test_weights_of_a_small_box_in_a_large_image_sum_to_one() -> None:
    """Three pixels of an image of 4000 x 4000, in float32."""
    side = 3 / 4000
    weights = patch_weights(torch.tensor([[0.31, 0.77, 0.31 + side, 0.77 + side]]), 16)
    assert abs(weights.sum().item() - 1) < 1e-3


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
def test_patches_and_regions_are_projected(projector_type: str) -> None:
    torch.manual_seed(0)
    projector = VisualProjector(6, 10, 2, projector_type)
    patches = torch.randn(3, 4, 6)
    regions = torch.tensor([[[0, 0, 0.5, 0.5], [0, 0, 1, 1]], [[0.5, 0, 1, 1], [0, 0, 0, 0]], [[0.0] * 4, [0.0] * 4]])
    tokens, found = projector(patches, regions)
    expected = projector.layers(patches)
    torch.testing.assert_close(tokens, expected)

    def embedded(*values: float) -> torch.Tensor:
        return projector.box_embedding(torch.tensor(values, dtype=torch.float32))

    torch.testing.assert_close(found[0, 0], expected[0, 0] + embedded(0, 0, 0.5, 0.5, 0.25))
    torch.testing.assert_close(found[0, 1], expected[0].mean(0) + embedded(0, 0, 1, 1, 1))
    torch.testing.assert_close(found[1, 0], expected[1, [1, 3]].mean(0) + embedded(0.5, 0, 1, 1, 0.5))
    torch.testing.assert_close(found[1, 1], embedded(0, 0, 0, 0, 0))


def test_projector_types() -> None:
    assert isinstance(VisualProjector(6, 10, 2, "linear").layers, nn.Linear)
    first, activation, second = VisualProjector(6, 10, 2).layers
    assert (first.in_features, first.out_features, second.in_features, second.out_features) == (6, 10, 10, 10)
    assert isinstance(activation, nn.GELU)
    with pytest.raises(ValueError, match="resampler"):
        VisualProjector(6, 10, 2, "resampler")


def test_bfloat16_output_is_close_to_float32() -> None:
    torch.manual_seed(0)
    projector = VisualProjector(6, 10, 2)
    patches, regions = torch.randn(1, 4, 6), torch.tensor([[[0.1, 0.2, 0.7, 0.9]]])
    exact = projector(patches, regions)
    half = projector.to(torch.bfloat16)(patches, regions)
    for wide, narrow in zip(exact, half, strict=True):
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.float(), wide, rtol=0.05, atol=0.05)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[bool]], int]:
    """Draw masks of one length, and a number of tokens per row that may be smaller or larger than the mask's."""
    length = draw(st.integers(1, 8))
    rows = st.lists(st.booleans(), min_size=length, max_size=length)
    return draw(st.lists(rows, min_size=1, max_size=4)), draw(st.integers(1, 6))


def by_loop(embeddings: torch.Tensor, masks: list[list[bool]], tokens: torch.Tensor) -> torch.Tensor:
    placed = embeddings.clone()
    for row, mask in enumerate(masks):
        waiting = list(tokens[row])
        for position, masked in enumerate(mask):
            if masked:
                placed[row, position] = waiting[0]
                waiting = waiting[1:] or waiting
    return placed


@given(cases())
def test_kth_masked_position_gets_the_kth_token(case: tuple[list[list[bool]], int]) -> None:
    masks, count = case
    rows, length, width = len(masks), len(masks[0]), 3
    embeddings = torch.arange(rows * length * width).reshape(rows, length, width).float()
    tokens = -1.0 - torch.arange(rows * count * width).reshape(rows, count, width).double()
    kept = embeddings.clone()
    placed = scatter_tokens(embeddings, torch.tensor(masks), tokens)
    assert placed.dtype == embeddings.dtype
    assert torch.equal(placed, by_loop(embeddings, masks, tokens))
    assert torch.equal(embeddings, kept)


def test_gradients_of_scattered_tokens() -> None:
    embeddings = torch.zeros(1, 3, 2, requires_grad=True)
    tokens = torch.zeros(1, 2, 2, requires_grad=True)
    weights = torch.arange(6.0).reshape(1, 3, 2) + 1
    (scatter_tokens(embeddings, torch.tensor([[False, True, False]]), tokens) * weights).sum().backward()
    assert embeddings.grad.tolist() == [[[1, 2], [0, 0], [5, 6]]]
    assert tokens.grad.tolist() == [[[3, 4], [0, 0]]]


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_each_row_gets_its_own_image(has_image: list[bool]) -> None:
    mask = torch.tensor(has_image).long()
    images = torch.arange(1.0, max(1, sum(has_image)) + 1)[:, None, None].expand(-1, 2, 3)
    found = expand_to_rows(images, mask)
    assert found.shape == (len(has_image), 2, 3)
    own = found[mask == 1][:, 0, 0].tolist()
    assert own == list(range(1, sum(has_image) + 1))
    aligned = torch.randn(len(has_image), 2, 3)
    assert torch.equal(expand_to_rows(aligned, mask), aligned)
