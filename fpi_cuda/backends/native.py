"""The step ops in C++: csrc/cpu on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpi_cuda.row_norm import SUMMED

name = "native"
CELL_LOOP_DTYPES = (torch.float32, torch.float64)
CELL_LOOP_MAX_DEPTH = 16
CELL_LOOP_TAKES_ADDED = True


def scratch(x: Tensor) -> Tensor | None:
    """See fpi_cuda.backends.reference.scratch, its twin."""
    return None


def num_moved(x: Tensor, gx: Tensor, status: Tensor, residual: Tensor) -> int:
    """See fpi_cuda.row_norm.num_moved, its twin."""
    found: int = torch.ops.fpi_cuda.num_moved.default(x, gx, status, residual, rounding=SUMMED)
    return found


def anderson_step_(*args: Any, **kwargs: Any) -> None:
    """See fpi_cuda.backends.reference.anderson_step_, its twin."""
    torch.ops.fpi_cuda.anderson_step_.default(*args, **kwargs)


def broyden_step_(*args: Any, **kwargs: Any) -> None:
    """See fpi_cuda.backends.reference.broyden_step_, its twin."""
    torch.ops.fpi_cuda.broyden_step_.default(*args, **kwargs)


def cell_loop_(*args: Any, **kwargs: Any) -> None:
    """See fpi_cuda.backends.reference.cell_loop_, its twin."""
    torch.ops.fpi_cuda.cell_loop_.default(*args, **kwargs)


def cell_loop_words(
    dim: int, hidden: int, depth: int, dtype: torch.dtype, precision: int, device: torch.device
) -> str:
    """Who runs the loop of a large batch, for explain().

    Args:
        dim, hidden: features of x and of the layer between, 0 for one layer.
        depth: of Anderson's history, 0 for Picard.
        precision: place in fpi_cuda.precision.NAMES.
    """
    plenty = 1 << 30
    tile = torch.ops.fpi_cuda.cell_loop_tile(plenty, dim, hidden, depth, dtype == torch.float64)
    return f"native code evaluates g and steps, up to {tile} samples at a time per thread"


def cell_layer_(*args: Any, **kwargs: Any) -> None:
    """See fpi_cuda.backends.reference_loop.cell_layer_, its twin."""
    torch.ops.fpi_cuda.cell_layer_.default(*args, **kwargs)


def weight_gradient_(out: Tensor, delta: Tensor, h: Tensor) -> None:
    """See fpi_cuda.backends.reference_loop.weight_gradient_, its twin."""
    torch.ops.fpi_cuda.weight_gradient_.default(out, delta, h)
