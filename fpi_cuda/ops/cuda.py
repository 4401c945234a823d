"""The step ops and the cell loop in CUDA: csrc/cuda on the device of the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpi_cuda.norms import num_moved as num_moved
from fpi_cuda.ops.compiled import anderson_step_ as anderson_step_
from fpi_cuda.ops.compiled import broyden_step_ as broyden_step_
from fpi_cuda.ops.compiled import cell_loop_ as cell_loop_

name = "cuda"
CELL_LOOP_DTYPES = (torch.float32, torch.float64)
CELL_LOOP_MAX_DEPTH = 16
OLDEST_FOR_ROUNDED = (8, 0)
"""The least compute capability with products in TF32 and bfloat16."""


def scratch(x: Tensor) -> Tensor | None:
    """What a solve from x (B, D) must pass to every step: room where blocks share a sample."""
    size = torch.ops.fpi_cuda.step_scratch_bytes.default(*x.shape, x.dtype)
    return torch.zeros(size, dtype=torch.uint8, device=x.device) if size else None


def cell_loop_words(
    dim: int, hidden: int, depth: int, dtype: torch.dtype, precision: int, device: torch.device
) -> str:
    """Who runs the loop of a large batch; see fpi_cuda.ops.native.cell_loop_words."""
    tile, _ = cell_loop_plan(PLENTY, dim, hidden, depth, dtype, precision, device)
    _, reason = cell_loop_plan(1, dim, hidden, depth, dtype, precision, device)
    rest = "" if reason is None else ", or torch and the steps' own kernels where they are few"
    return f"one kernel evaluates g and steps, {tile} samples at a time per block{rest}"


PLENTY = 1 << 30
"""Samples that no device holds at once."""


def cell_loop_plan(
    batch: int,
    dim: int,
    hidden: int,
    depth: int,
    dtype: torch.dtype,
    precision: int,
    device: torch.device,
) -> tuple[int, str | None]:
    """Samples that a block works on at a time, and why another loop should be faster, if it should.

    That is by arithmetic alone, in csrc/cuda/cell_loop_plan.cpp.

    Args:
        dim, hidden: features of x and of the layer between, 0 for one layer.
        precision: place in fpi_cuda.PRECISIONS.
    """
    cores, shared_bytes, capability = limits_of(device)
    words = torch.ops.fpi_cuda.cell_loop_on_cuda(
        batch, dim, hidden, depth, dtype == torch.float64, precision, cores, shared_bytes
    )
    tile, _, reason = words.partition(" ")
    if precision and capability < OLDEST_FOR_ROUNDED:
        reason = "rounded products need a device of compute capability 8.0 or above"
    return int(tile), reason or None


def limits_of(device: torch.device) -> tuple[int, int, tuple[int, int]]:
    """Multiprocessors, bytes of shared memory that a block may ask for, compute capability."""
    properties: Any = torch.cuda.get_device_properties(device)
    return (
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        (properties.major, properties.minor),
    )
