"""Hooks that change gradients, which a second derivative cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda import transforms

CHANGED = (
    "fixed_point: a second derivative differentiates the products with the Jacobian of g, and a "
    "backward hook on g or inside it changes these, so that they belong to no function. Return "
    "None from the hook, or ask for first derivatives only"
)

ROUNDINGS = 4.0
"""Of the arithmetic that g is evaluated in: what two products may differ by."""


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
    w = waves(gx, 0)
    pulled = torch.autograd.grad(gx, list(leaves), w, retain_graph=True, allow_unused=True)
    directions = [waves(leaf, 1 + i) for i, leaf in enumerate(leaves)]
    try:
        with torch.no_grad(), forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(leaf.detach(), d)
                for leaf, d in zip(leaves, directions, strict=True)
            ]
            pushed = forward_ad.unpack_dual(evaluate(duals)).tangent
    except (NotImplementedError, RuntimeError) as error:
        raise RuntimeError(CHANGED + ". Whether it does cannot be told, see above") from error
    if differ(pushed, w, list(pulled), directions, arithmetic):
        raise RuntimeError(CHANGED)


def differ(
    pushed: Tensor | None,
    w: Tensor,
    pulled: Sequence[Tensor | None],
    directions: Sequence[Tensor],
    arithmetic: torch.dtype,
) -> bool:
    """Whether <w, pushed> and the sum of <directions, pulled> differ by more than rounding."""
    gap = size = 0.0
    for p, d in zip([pushed, *pulled], [-w, *directions], strict=True):
        if p is not None:
            gap += float((p.double() * d).sum())
            size += float(p.double().norm() * d.double().norm())
    rounding = max(torch.finfo(w.dtype).eps ** 0.5, ROUNDINGS * torch.finfo(arithmetic).eps)
    return abs(gap) > rounding * size


def waves(t: Tensor, phase: int) -> Tensor:
    """Numbers between -1 and 1 in the shape of t, other ones for each phase."""
    numbers = torch.arange(1, t.numel() + 1, device=t.device, dtype=torch.float64)
    return (numbers * (1 + 0.1 * phase) + phase).sin().to(t.dtype).reshape(t.shape)
