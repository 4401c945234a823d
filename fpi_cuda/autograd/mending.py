"""Samples that failed, evaluated where another one is, so that they spoil no derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.autograd.flat_map import FlatMap


def mended_if_batchwise(flat_map: FlatMap, x: Tensor, bad: Tensor) -> FlatMap:
    """The map with bad samples evaluated elsewhere, if that leaves the good ones alone.

    Their derivative is zero times whatever g's derivative is there, which may be NaN.
    """
    mended = flat_map.mended(bad)
    # Not under no_grad: autocast would cache weights without their graph.
    with torch.enable_grad():
        moved, expected = mended(x.detach())[~bad], flat_map(x.detach())[~bad]
    return mended if alike(moved, expected) else flat_map


def alike(moved: Tensor, expected: Tensor) -> bool:
    """Whether rows (n, D) have the same values, but for the order of sums."""
    size = expected.abs().amax(1, keepdim=True) if expected.numel() else expected
    kind = torch.finfo(expected.dtype)
    rounding = (100 if kind.bits > 16 else 4) * kind.eps
    # So that what is not a number is not the same.
    return bool(((moved - expected).abs() <= rounding * size).all())
