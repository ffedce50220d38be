"""Adding a product into what the base layer made, its output and its input's gradient: no pass of its own over either.

Both are written to where they lie, so nothing of their size is made, read and added beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_product(output: Tensor, h: Tensor, B: Tensor) -> Tensor:
    """``output + h B'``, in ``output`` itself, but for torch.compile, which plans memory for itself.

    Args:
        output: ``[..., d_out]``, just made by the base layer and held by nobody else
        h: ``[..., k]``
        B: ``[d_out, k]``, of h's dtype
    """
    if torch.compiler.is_compiling():
        return output + (h @ B.T).to(output.dtype)
    return _AddProduct.apply(output, h.reshape(-1, h.shape[-1]), B)


def add_product_(output: Tensor, h: Tensor, B: Tensor) -> None:
    """``output [..., d_out] += h [T, k] B' [k, d_out]``, without a graph."""
    if output.dtype == h.dtype and output.is_contiguous():
        output.view(-1, output.shape[-1]).addmm_(h, B.T)
    else:
        output.add_((h @ B.T).view_as(output))


def alias(output: Tensor) -> Tensor:
    """The output as a function may write to it and return it: autograd refuses that of a view, as which Conv1D's comes.

    It shares the version counter: had somebody kept the output for backward, autograd would say so.
    """
    return output.detach()


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, h: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(h, B)
        output = alias(output)
        with torch.autocast(h.device.type, enabled=False):
            add_product_(output, h, B)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, B = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            rows = dy.reshape(-1, dy.shape[-1]).to(h.dtype)
            return dy, rows @ B, rows.T @ h


class InputTap:
    """Where an adapter's function leaves its part of the input's gradient, dz A, for the base layer's to take it in.

    The function's backward comes first, since it adds to the base layer's output; the base layer's backward follows and
    hands its gradient of the input to the tap, which adds the product to it.
    """

    def __init__(self) -> None:
        self.part: tuple[Tensor, Tensor] | None = None  # dz [T, k], A [k, d_in]; of the last backward

    def open(self, x: Tensor) -> Tensor:
        """x for the base layer alone, the adapter reads its own."""
        return _Tap.apply(x, self)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: InputTap) -> Tensor:
        ctx.tap = tap
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        part, ctx.tap.part = ctx.tap.part, None
        if part is not None:  # None where only what else reads the base layer's output is differentiated
            dz, A = part
            with torch.autocast(dx.device.type, enabled=False):
                add_product_(dx, dz, A.T)
        return dx, None
