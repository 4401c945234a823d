"""Launch the kernels of a step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpi_cuda.ops.solver_state import CONTROL_SIZE
from fpi_cuda.ops.triton.anderson_step import (
    PLAN_GAMMA,
    anderson_advance_kernel,
    anderson_judge_kernel,
    anderson_measure_kernel,
    anderson_step_kernel,
)
from fpi_cuda.ops.triton.shape import SPLIT, shape_of
from fpi_cuda.options import MAX_DEPTH

# False too where Triton's own functions were made before the interpreter was asked for.
INTERPRETED = not any(isinstance(f, triton.JITFunction) for f in (anderson_step_kernel, tl.sum))


@contextlib.contextmanager
def on_device_of(x: Tensor) -> Iterator[None]:
    """Launch on the device of x; under the interpreter let NaN and Inf pass without a warning."""
    if not INTERPRETED:
        with torch.cuda.device(x.device):
            yield
        return
    import numpy

    with numpy.errstate(all="ignore"), warnings.catch_warnings():
        # Of NumPy, on what the interpreter of Triton 3.6 does at every loop bound.
        warnings.filterwarnings("ignore", "Conversion of an array", DeprecationWarning)
        yield


Expected = dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]]


def stall_steps_of(depth: int) -> float:
    """See reference.rules_for."""
    return float(max(20, 3 * depth))


def compute_dtype(state: torch.dtype) -> torch.dtype:
    """What a step is computed in."""
    return torch.float64 if state == torch.float64 else torch.float32


def require_step(
    x: Tensor,
    gx: Tensor,
    sample_of: Tensor | None,
    best: Tensor,
    anchor: Tensor,
    f_previous: Tensor,
    g_previous: Tensor,
    columns_f: Tensor,
    columns_g: Tensor,
    gram: Tensor,
    control: Tensor,
    atol: Tensor,
    status: Tensor,
    num_steps: Tensor,
    residual: Tensor,
) -> None:
    """Raise unless all arrays of a step are contiguous, and of the shapes and dtypes of its schema.

    Raises:
        RuntimeError: one is not, or the depth is beyond MAX_DEPTH.
    """
    op = "anderson_step_"
    if x.dim() != 2 or best.dim() != 2 or columns_f.dim() != 3:
        raise RuntimeError(
            f"{op}: x and best must be matrices and columns_f (batch, depth, dim), got "
            f"{tuple(x.shape)}, {tuple(best.shape)}, {tuple(columns_f.shape)}"
        )
    (rows, dim), batch, depth = x.shape, best.shape[0], columns_f.shape[1]
    if depth > MAX_DEPTH:
        raise RuntimeError(f"{op}: depth must be at most {MAX_DEPTH}, got {depth}")
    state, compute = x.dtype, compute_dtype(x.dtype)
    apart = batch if depth and columns_f.dtype != compute else 0
    narrow = state == torch.float32 and columns_f.dtype == torch.bfloat16
    stored = columns_f.dtype if narrow else state
    expected: Expected = {
        "x": (x, (rows, dim), state),
        "gx": (gx, (rows, dim), state),
        "best": (best, (batch, dim), state),
        "anchor": (anchor, (batch if depth else 0, dim), state),
        "f_previous": (f_previous, (apart, dim), compute),
        "g_previous": (g_previous, (apart, dim), compute),
        "columns_f": (columns_f, (batch, depth, dim), stored),
        "columns_g": (columns_g, (batch, depth, dim), stored),
        "gram": (gram, (batch, depth * (depth + 1) // 2), torch.float64),
        "control": (control, (batch, CONTROL_SIZE), torch.float64),
        **account_of(batch, atol, status, num_steps, residual),
    }
    if sample_of is not None:
        expected["sample_of"] = (sample_of, (rows,), torch.int64)
    elif rows != batch:
        raise RuntimeError(
            f"{op}: x must hold the whole batch of {batch}, got {rows} rows; pass sample_of to "
            "name those it holds"
        )
    require_each(op, expected, x.device)


def account_of(
    batch: int, atol: Tensor, status: Tensor, num_steps: Tensor, residual: Tensor
) -> Expected:
    """What the account of a solve is expected to be."""
    return {
        "atol": (atol, (batch,), torch.float64),
        "status": (status, (batch,), torch.int8),
        "num_steps": (num_steps, (batch,), torch.int32),
        "residual": (residual, (batch,), torch.float64),
    }


def require_each(op: str, expected: Expected, device: torch.device) -> None:
    """Raise unless each array is contiguous, of its shape and dtype, and on the device."""
    for name, (array, shape, dtype) in expected.items():
        same = array.shape == shape and array.dtype == dtype and array.device == device
        if not (same and array.is_contiguous()):
            raise RuntimeError(
                f"{op}: {name} must be contiguous, {shape} {dtype} on {device}, got "
                f"{tuple(array.shape)} {array.dtype} on {array.device} with strides "
                f"{array.stride()}"
            )


def anderson_step_(
    x: Tensor,
    gx: Tensor,
    sample_of: Tensor | None,
    best: Tensor,
    anchor: Tensor,
    f_previous: Tensor,
    g_previous: Tensor,
    columns_f: Tensor,
    columns_g: Tensor,
    gram: Tensor,
    control: Tensor,
    atol: Tensor,
    status: Tensor,
    num_steps: Tensor,
    residual: Tensor,
    *,
    rtol: float,
    max_steps: int,
    beta: float,
    ridge: float,
    scratch: Tensor | None = None,
) -> None:
    """See fpi_cuda.ops.reference.anderson_step_, its twin."""
    points = (best, anchor, f_previous, g_previous, columns_f, columns_g)
    account = (control, atol, status, num_steps, residual)
    require_step(x, gx, sample_of, *points, gram, *account)
    if x.shape[0] == 0:
        return
    (rows, dim), depth = x.shape, columns_f.shape[1]
    compute = compute_dtype(x.dtype)
    shape = shape_of(dim, depth, compute.itemsize)
    splits = shape.splits
    size: dict[str, Any] = {
        "DEPTH": depth,
        "M": shape.tile_rows,
        "BLOCK": shape.block,
        "COMPUTE": tl.float64 if compute == torch.float64 else tl.float32,
        "num_warps": shape.num_warps,
    }
    in_slot = depth > 0 and columns_f.dtype == compute
    options = (rtol, max_steps, beta, ridge, torch.finfo(x.dtype).eps, stall_steps_of(depth))
    with on_device_of(x):
        if splits == 1:
            anderson_step_kernel[(rows,)](
                x, gx, sample_of, *points, gram, *account, dim, *options, **size, IN_SLOT=in_slot
            )
            return
        partial = gram.new_empty((rows, 3 + 2 * shape.tile_rows, splits))
        plan = gram.new_empty((rows, PLAN_GAMMA.value + shape.tile_rows))
        anderson_measure_kernel[(rows * splits,)](
            x, gx, sample_of, f_previous, g_previous, columns_f, columns_g, control, status,
            num_steps, partial, dim, splits, SPLIT, **size, IN_SLOT=in_slot,
        )  # fmt: skip
        anderson_judge_kernel[(rows,)](
            x, gx, sample_of, gram, *account, partial, plan, dim, splits, *options, **size
        )
        anderson_advance_kernel[(rows * splits,)](
            x, gx, sample_of, *points, plan, dim, splits, SPLIT, **size, IN_SLOT=in_slot
        )
