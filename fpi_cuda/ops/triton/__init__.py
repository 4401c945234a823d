"""The step ops and the fused loop in Triton: compiled for CUDA states, interpreted in tests.

Triton is imported when the first step is taken, never with the package.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.norms import num_moved as num_moved
from fpi_cuda.ops.triton.shape import MAX_DEPTH, SLOTS

name = "triton"

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CELL_LOOP_DTYPES = (torch.float32, torch.float64)
CELL_LOOP_MAX_DEPTH = MAX_DEPTH


def scratch(x: Tensor) -> Tensor | None:
    """What a solve from x (B, D) must pass to every step as `scratch`: nothing."""
    return None


def anderson_step_(*args: Any, **kwargs: Any) -> None:
    """See fpi_cuda.ops.reference.anderson_step_, its twin."""
    from fpi_cuda.ops.triton import launch

    launch.anderson_step_(*args, **kwargs)


def cell_loop_(*args: Any, **kwargs: Any) -> None:
    """See fpi_cuda.ops.reference_loop.cell_loop_, its twin."""
    from fpi_cuda.ops.triton import cell_loop

    cell_loop.cell_loop_(*args, **kwargs)


def cell_loop_words(
    dim: int, hidden: int, depth: int, dtype: torch.dtype, precision: int, device: torch.device
) -> str:
    """Who runs the loop of a large batch; see fpi_cuda.ops.compiled.Native.cell_loop_words."""
    return f"one Triton kernel evaluates g and steps, {SLOTS} samples at a time per program"


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot take such a state, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed. pip install triton"
    if dtype not in DTYPES:
        return f"it has no kernels for {dtype}"
    if device.type not in ("cuda", "cpu"):
        return f"it runs on CUDA devices, the state is on {device.type}"
    if device.type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "it runs on CUDA devices, the state is on cpu. To try it there in Triton's "
            "interpreter, set TRITON_INTERPRET=1 before Triton is imported"
        )
    from fpi_cuda.ops.triton import launch

    if not launch.INTERPRETED:
        return "TRITON_INTERPRET=1 was set after Triton had been imported. Set it before"
    if version_of("triton") < (3, 7) and version_of("numpy") >= (2, 4):
        return "the interpreter of Triton 3.6 fails under NumPy 2.4. pip install 'numpy<2.4'"
    return None


def version_of(package: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))
