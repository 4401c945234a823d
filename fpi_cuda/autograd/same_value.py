"""A map that is evaluated again, later, has to be the one that was solved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# By how many roundings two evaluations of one g at one x may differ, relative to the largest
# number of the sample: sums in another order, which in 16 bits are made in more and rounded once.
ROUNDINGS = 64
ROUNDINGS_IN_16_BITS = 2

CHANGED = (
    "fixed_point: a derivative of a derivative, or inside torch.func transforms, evaluates g again "
    "in backward, and there {what}. g must be a function of x, z and tensors that do not change in "
    "between: take the derivative before they change, or change a copy"
)


def rounding_of(arithmetic: torch.dtype) -> float:
    """By what share two evaluations of one g in this arithmetic may differ."""
    bits = torch.finfo(arithmetic).bits
    return torch.finfo(arithmetic).eps * (ROUNDINGS if bits > 16 else ROUNDINGS_IN_16_BITS)


def require_same_value(
    gx: Tensor, expected: Tensor, arithmetic: torch.dtype, sizes: Sequence[int]
) -> None:
    """Raise if g (B, D), evaluated again, is another function than to rounding.

    Args:
        sizes: of the parts of the state, each of which is judged by itself.
    """
    gx, expected = gx.detach(), expected.detach()
    if gx.numel() == 0 or torch.equal(gx, expected):
        return
    for now, then in zip(gx.split(list(sizes), 1), expected.split(list(sizes), 1), strict=True):
        largest = torch.maximum(now.abs(), then.abs()).nan_to_num(0.0, 0.0).amax(1, keepdim=True)
        rounding = rounding_of(arithmetic) * largest.to(
            torch.promote_types(gx.dtype, torch.float32)
        )
        same = (now == then) | ((now - then).abs() <= rounding) | (now.isnan() & then.isnan())
        if not bool(same.all()):
            raise RuntimeError(CHANGED.format(what="it had another value than in the forward pass"))
