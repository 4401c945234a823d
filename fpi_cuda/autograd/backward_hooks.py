"""Hooks that change gradients, which a second derivative cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda.autograd.one_matrix import differ, waves
from fpi_cuda.autograd.reattach import MaybeTensor, gradients
from fpi_cuda.evaluation import transforms

CHANGED = (
    "fixed_point: a second derivative differentiates the products with the Jacobian of g, and a "
    "backward hook on g or inside it changes these, so that they belong to no function. Return "
    "None from the hook, or ask for first derivatives only"
)

ROUNDINGS = 4.0
"""Of the arithmetic that g is evaluated in: what two products may differ by."""


def products_differ(
    pull: Callable[[Tensor], Sequence[MaybeTensor]],
    push: Callable[[Sequence[Tensor]], MaybeTensor],
    gx: Tensor,
    leaves: Sequence[Tensor],
    arithmetic: torch.dtype,
) -> bool:
    """Whether J^T w and J d are products with two matrices; see `differ`.

    Args:
        gx, leaves: what w and the directions d are like.
        arithmetic: what g is evaluated in.
    """
    share = max(torch.finfo(gx.dtype).eps ** 0.5, ROUNDINGS * torch.finfo(arithmetic).eps)
    directions = [waves(leaf, 1 + i) for i, leaf in enumerate(leaves)]
    return differ(pull, push, waves(gx, 0), directions, share, share)


def require_true_products(
    evaluate: Callable[[Sequence[Tensor]], Tensor],
    gx: Tensor,
    leaves: Sequence[Tensor],
    arithmetic: torch.dtype,
) -> None:
    """Raise where the graph of gx has other products with the Jacobian than forward mode has.

    Forward mode runs no backward hook. One product is compared.

    Args:
        evaluate: g as a function of the leaves.
        gx: its value, computed from the leaves.
        arithmetic: what g is evaluated in.
    Raises:
        RuntimeError: they differ by more than rounding.
    """
    if transforms.in_dual_level() or not gx.requires_grad:
        return

    def push(directions: Sequence[Tensor]) -> MaybeTensor:
        with torch.no_grad(), forward_ad.dual_level():
            pairs = zip(leaves, directions, strict=True)
            duals = [forward_ad.make_dual(leaf.detach(), d) for leaf, d in pairs]
            return forward_ad.unpack_dual(evaluate(duals)).tangent

    def pull(w: Tensor) -> list[MaybeTensor]:
        return gradients([gx], leaves, [w], create_graph=False)

    try:
        changed = products_differ(pull, push, gx, leaves, arithmetic)
    except (NotImplementedError, RuntimeError) as error:
        raise RuntimeError(CHANGED + ". Whether it does cannot be told, see above") from error
    if changed:
        raise RuntimeError(CHANGED)
