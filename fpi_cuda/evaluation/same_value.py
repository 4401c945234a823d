"""A map that is evaluated again, later or in other samples, has to be the one that was solved."""

from __future__ import annotations

import operator
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


counted_version = operator.attrgetter("_version")
"""How often a tensor was changed in place; raises for inference tensors, which do not count it."""


def version_of(t: Tensor) -> int:
    """The same, and 0 for inference tensors."""
    return 0 if t.is_inference() else counted_version(t)


def same_value(gx: Tensor, expected: Tensor, arithmetic: torch.dtype, sizes: Sequence[int]) -> bool:
    """Whether two values of g (B, D) differ by rounding only.

    Args:
        arithmetic: what they were computed in.
        sizes: of the parts of the state, each of which is judged by itself.
    """
    gx, expected = gx.detach(), expected.detach()
    if gx.numel() == 0 or torch.equal(gx, expected):
        return True
    kind = torch.finfo(arithmetic)
    share = kind.eps * (ROUNDINGS if kind.bits > 16 else ROUNDINGS_IN_16_BITS)
    wide = torch.promote_types(gx.dtype, torch.float32)
    for now, then in zip(gx.split(list(sizes), 1), expected.split(list(sizes), 1), strict=True):
        largest = torch.maximum(now.abs(), then.abs()).nan_to_num(0.0, 0.0).amax(1, keepdim=True)
        near = (now - then).abs() <= share * largest.to(wide)
        if not bool((near | (now == then) | (now.isnan() & then.isnan())).all()):
            return False
    return True


def require_same_value(
    gx: Tensor, expected: Tensor, arithmetic: torch.dtype, sizes: Sequence[int]
) -> None:
    """Raise if g (B, D), evaluated again, is another function than to rounding."""
    if not same_value(gx, expected, arithmetic, sizes):
        raise RuntimeError(CHANGED.format(what="it had another value than in the forward pass"))
