"""The norm that tolerances are relative to."""

from __future__ import annotations

import torch
from torch import Tensor


def row_norm(a: Tensor) -> Tensor:
    """(B,) float64 2-norm of each row of a (B, D); squares neither overflow nor vanish."""
    if a.dtype != torch.float64 or a.shape[1] == 0:
        return torch.linalg.vector_norm(a, dim=1, dtype=torch.float64)
    largest = a.abs().amax(1)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    return scale * torch.linalg.vector_norm(a / scale[:, None], dim=1)


def difference_norm(gx: Tensor, x: Tensor) -> Tensor:
    """(B,) float64 ||gx - x|| of each row, subtracted as the steps do."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return row_norm(gx.to(wide) - x.to(wide))


ROUNDING = 16.0
"""Of epsilon times the size of x and g(x): what g may change by where nothing that it reads has."""
SUMMED = 1e-5
"""Of a residual: what it may differ by where the same numbers are summed in another order."""


def beyond_rounding(change: Tensor, gx: Tensor, x: Tensor) -> Tensor:
    """(B,) whether a change of g(x), or of a residual there, is more than g's own rounding.

    Where a norm is not finite nothing is known, and the answer is no.
    """
    size = torch.maximum(row_norm(gx), row_norm(x))
    return (change > ROUNDING * torch.finfo(x.dtype).eps * size) & torch.isfinite(size)


def differs(now: Tensor, recorded: Tensor) -> Tensor:
    """(B,) whether a residual is another one than was recorded; no where it is not finite now."""
    close = (now - recorded).abs() <= SUMMED * torch.maximum(now, recorded)
    return ~close & (now != recorded) & torch.isfinite(now)


def num_moved(x: Tensor, gx: Tensor, status: Tensor, residual: Tensor) -> int:
    """Stopped samples of x (B, D) whose residual is no longer the one that was recorded.

    Args:
        gx: (B, D) g(x) now.
        status: (B,) int8, 0 for samples that have not stopped.
        residual: (B,) float64, as recorded.
    """
    return int(((status != 0) & differs(difference_norm(gx, x), residual)).sum())
