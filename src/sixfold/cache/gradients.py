"""Gradients that would be wrong are refused."""

from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.errors import SixfoldError


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, reason: str) -> Tensor:
        ctx.reason = reason
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise SixfoldError(ctx.reason)


_LOST = (
    "no gradient passes through cached tokens: they were computed with a graph, which the cache "
    "has not kept, so the gradient would lack their part. Compute all tokens in one forward pass; "
    "or, if the cached ones are meant to be constant, compute those under torch.no_grad()."
)


def refuse_gradient(x: Float[Tensor, "*shape"], reason: str = _LOST) -> Float[Tensor, "*shape"]:
    """`x`, from which no backward pass gets any further.

    Args:
        x: What is asked for a gradient.
        reason: What the error says.

    Raises:
        SixfoldError: From `backward`, not from here: who asks for no gradient never notices.
    """
    # Whatever else needs a gradient or not, the error must be reached.
    anchor = torch.zeros((), device=x.device, requires_grad=True)
    refused: Tensor = _Refusal.apply(x, anchor, reason)  # type: ignore[no-untyped-call]
    return refused
