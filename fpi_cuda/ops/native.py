"""The step ops in C++: csrc/cpu on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.ops.compiled import anderson_step_ as anderson_step_
from fpi_cuda.ops.compiled import broyden_step_ as broyden_step_
from fpi_cuda.ops.compiled import cell_layer_ as cell_layer_
from fpi_cuda.ops.compiled import cell_loop_ as cell_loop_
from fpi_cuda.ops.compiled import num_moved as num_moved
from fpi_cuda.ops.compiled import weight_gradient_ as weight_gradient_

name = "native"
CELL_LOOP_DTYPES = (torch.float32, torch.float64)
CELL_LOOP_MAX_DEPTH = 16


def scratch(x: Tensor) -> Tensor | None:
    """See fpi_cuda.ops.reference.scratch, its twin."""
    return None


def cell_loop_words(
    dim: int, hidden: int, depth: int, dtype: torch.dtype, precision: int, device: torch.device
) -> str:
    """Who runs the loop of a large batch, for explain().

    Args:
        dim, hidden: features of x and of the layer between, 0 for one layer.
        depth: of Anderson's history, 0 for Picard.
        precision: place in fpi_cuda.PRECISIONS.
    """
    plenty = 1 << 30
    tile = torch.ops.fpi_cuda.cell_loop_tile(plenty, dim, hidden, depth, dtype == torch.float64)
    return f"native code evaluates g and steps, up to {tile} samples at a time per thread"
