"""Low-rank products added in place to a layer's output and its input's gradient: no large tensor, no extra pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_product(output: Tensor, h: Tensor, B: Tensor) -> Tensor:
    """Return ``output + h B'``, from h ``[..., k]`` and B ``[d_out, k]`` of one dtype.

    It is written to ``output`` ``[..., d_out]`` itself, a new tensor of the base layer that nothing else refers to;
    except under torch.compile, which plans memory itself.
    """
    if torch.compiler.is_compiling():
        return output + (h @ B.T).to(output.dtype)
    return _AddProduct.apply(output, h.reshape(-1, h.shape[-1]), B)


def add_product_(output: Tensor, h: Tensor, B: Tensor, factor: float = 1.0) -> None:
    """Compute ``output [..., d_out] += factor h [T, k] B' [k, d_out]`` without a graph."""
    if output.dtype == h.dtype and output.is_contiguous():
        output.view(-1, output.shape[-1]).addmm_(h, B.T, alpha=factor)
    else:
        output.add_((h @ B.T).view_as(output), alpha=factor)


def alias(output: Tensor) -> Tensor:
    """Return the output as a tensor that a function may modify and return; autograd refuses that for Conv1D's view.

    It shares the version counter, so autograd still reports the change if the old value was saved for backward.
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


class GradientAdder:
    """Adds an adapter's gradient of the layer's input, the low-rank product dz A, to the base layer's, in place.

    The adapter's backward runs first, since it adds to the base layer's output, and sets ``product``: dz ``[T, k]`` and
    A ``[k, d_in]``. The base layer's follows, and its gradient of the input passes through :meth:`wrap`'s node.
    """

    product: tuple[Tensor, Tensor] | None = None

    def wrap(self, x: Tensor) -> Tensor:
        """Return x for the base layer; the adapter reads x itself."""
        return _AddToGradient.apply(x, self)


class _AddToGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, adder: GradientAdder) -> Tensor:
        ctx.adder = adder
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        product, ctx.adder.product = ctx.adder.product, None
        if product is not None:  # None if the adapter is not part of the differentiated graph
            dz, A = product
            with torch.autocast(dx.device.type, enabled=False):
                add_product_(dx, dz, A.T)
        return dx, None
