"""What the kernels take for granted of their arguments, checked: they are handed bare addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda.ops.solver_state import CONTROL_SIZE
from fpi_cuda.options import MAX_DEPTH

Expected = dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]]


def compute_dtype(state: torch.dtype) -> torch.dtype:
    """What a step is computed in."""
    return torch.float64 if state == torch.float64 else torch.float32


def require_arrays(
    op: str,
    x: Tensor,
    gx: Tensor,
    sample_of: Tensor | None,
    points: dict[str, Tensor],
    columns: dict[str, Tensor],
    gram: Tensor,
    account: tuple[Tensor, ...],
) -> None:
    """Raise unless all arrays of a step are contiguous, and of the shapes and dtypes of its schema.

    Args:
        points: best, anchor, and the evaluation before this one (two arrays), in that order.
        columns: the two histories.
        account: control, atol, status, num_steps and residual.
    Raises:
        RuntimeError: one is not, or the depth is beyond MAX_DEPTH.
    """
    best, anchor, *previous = points.items()
    history = next(iter(columns.values()))
    if x.dim() != 2 or best[1].dim() != 2 or history.dim() != 3:
        raise RuntimeError(
            f"{op}: x and {best[0]} must be matrices and {next(iter(columns))} (batch, depth, "
            f"dim), got {tuple(x.shape)}, {tuple(best[1].shape)}, {tuple(history.shape)}"
        )
    (rows, dim), batch, depth = x.shape, best[1].shape[0], history.shape[1]
    if depth > MAX_DEPTH:
        raise RuntimeError(f"{op}: depth must be at most {MAX_DEPTH}, got {depth}")
    state, compute = x.dtype, compute_dtype(x.dtype)
    apart = batch if depth and history.dtype != compute else 0
    narrow = state == torch.float32 and history.dtype == torch.bfloat16
    stored = history.dtype if narrow else state
    control, atol, status, num_steps, residual = account
    expected: Expected = {
        "x": (x, (rows, dim), state),
        "gx": (gx, (rows, dim), state),
        best[0]: (best[1], (batch, dim), state),
        anchor[0]: (anchor[1], (batch if depth else 0, dim), state),
        **{name: (array, (apart, dim), compute) for name, array in previous},
        **{name: (array, (batch, depth, dim), stored) for name, array in columns.items()},
        "gram": (gram, (batch, depth * (depth + 1) // 2), torch.float64),
        "control": (control, (batch, CONTROL_SIZE), torch.float64),
        "atol": (atol, (batch,), torch.float64),
        "status": (status, (batch,), torch.int8),
        "num_steps": (num_steps, (batch,), torch.int32),
        "residual": (residual, (batch,), torch.float64),
    }
    if sample_of is not None:
        expected["sample_of"] = (sample_of, (rows,), torch.int64)
    elif rows != batch:
        raise RuntimeError(
            f"{op}: x must hold the whole batch of {batch}, got {rows} rows; pass sample_of to "
            "name those it holds"
        )
    require_each(op, expected, x.device)


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
