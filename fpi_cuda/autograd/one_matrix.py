"""Whether products with a Jacobian and with its transpose are those of one matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fpi_cuda.autograd.reattach import MaybeTensor

MULTIPLES = (1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875)
"""No powers of two: what is multiplied by them is rounded to other neighbours."""

ROUNDINGS = 4.0
"""Of the largest change by rounding that a few products show: chance may make them small."""


def differ(
    pull: Callable[[Tensor], Sequence[MaybeTensor]],
    push: Callable[[Sequence[Tensor]], MaybeTensor],
    w: Tensor,
    directions: Sequence[Tensor],
    share: float,
    rounding: float,
) -> bool:
    """Whether <J^T w, d> and <w, J d> differ, by more than what J itself rounds to.

    Args:
        pull: w -> J^T w, a tensor like each of the directions. push: d -> J d. None is zero.
        share, rounding: of the sizes of J^T w and d, and of J d and w, multiplied: what they may
            differ by.
    """
    pulled, pushed = pull(w), push(directions)
    across, along = inner(pulled, directions), inner([pushed], [w])
    allowed = share * sizes(pulled, directions) + rounding * sizes([pushed], [w])
    gap = abs(across - along) - allowed
    if not gap > 0:
        return False
    # It may round to fewer digits inside, or be what is left of numbers that cancel.
    pulls = (inner(pull(k * w), directions) / k for k in MULTIPLES)
    pushes = (inner([push([k * d for d in directions])], [w]) / k for k in MULTIPLES)
    noise = max(abs(p - across) for p in pulls) + max(abs(p - along) for p in pushes)
    return gap > ROUNDINGS * noise


def inner(ones: Sequence[MaybeTensor], others: Sequence[Tensor]) -> float:
    """The sum of products of two lists of tensors, in float64."""
    pairs = zip(ones, others, strict=True)
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs if a is not None)


def sizes(ones: Sequence[MaybeTensor], others: Sequence[Tensor]) -> float:
    """The sum of their 2-norms, multiplied."""
    pairs = zip(ones, others, strict=True)
    return sum(float(a.double().norm() * b.double().norm()) for a, b in pairs if a is not None)


def waves(t: Tensor, phase: int) -> Tensor:
    """Numbers between -1 and 1 in the shape of t, other ones for each phase."""
    numbers = torch.arange(1, t.numel() + 1, device=t.device, dtype=torch.float64)
    return (numbers * (1 + 0.1 * phase) + phase).sin().to(t.dtype).reshape(t.shape)
