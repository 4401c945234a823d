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

from fpi_cuda.ops.triton.anderson_spans import (
    PLAN_GAMMA,
    anderson_advance_kernel,
    anderson_judge_kernel,
    anderson_measure_kernel,
)
from fpi_cuda.ops.triton.anderson_step import anderson_step_kernel
from fpi_cuda.ops.triton.arguments import compute_dtype, require_arrays
from fpi_cuda.ops.triton.shape import SPAN, shape_of

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


class Step:
    """One launch or several on the same rows: the grid, and what the kernels are compiled for."""

    def __init__(self, x: Tensor, columns: Tensor) -> None:
        depth = columns.shape[1]
        compute = compute_dtype(x.dtype)
        self.rows, self.dim = x.shape
        self.shape = shape_of(self.dim, depth, compute.itemsize)
        self.constants: dict[str, Any] = {
            "DEPTH": depth,
            "M": self.shape.tile_rows,
            "BLOCK": self.shape.block,
            "COMPUTE": tl.float64 if compute == torch.float64 else tl.float32,
            "num_warps": self.shape.num_warps,
        }
        # See reference.rules_for.
        stall_steps = float(max(20, 3 * depth))
        self.rules = {"EPSILON": torch.finfo(x.dtype).eps, "STALL_STEPS": stall_steps}
        self.in_slot = {"IN_SLOT": depth > 0 and columns.dtype == compute}
        self.span = {"SPAN": SPAN}
        self.by_row = (self.rows,)
        self.by_span = (self.rows * self.shape.spans,)

    def scratch(self, x: Tensor, *size: int) -> Tensor:
        """Float64 room for (rows, *size) numbers."""
        return x.new_empty((self.rows, *size), dtype=torch.float64)


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
    account = (control, atol, status, num_steps, residual)
    previous = {"f_previous": f_previous, "g_previous": g_previous}
    columns = {"columns_f": columns_f, "columns_g": columns_g}
    kept = {"best": best, "anchor": anchor, **previous}
    require_arrays("anderson_step_", x, gx, sample_of, kept, columns, gram, account)
    if x.shape[0] == 0:
        return
    step = Step(x, columns_f)
    c, dim, spans = step.constants, step.dim, step.shape.spans
    points = (*kept.values(), *columns.values())
    options = (rtol, max_steps, beta, ridge)
    with on_device_of(x):
        if spans == 1:
            anderson_step_kernel[step.by_row](
                x, gx, sample_of, *points, gram, *account, dim, *options,
                **step.rules, **c, **step.in_slot,
            )  # fmt: skip
            return
        partial = step.scratch(x, 3 + 2 * c["M"], spans)
        plan = step.scratch(x, PLAN_GAMMA.value + c["M"])
        anderson_measure_kernel[step.by_span](
            x, gx, sample_of, f_previous, g_previous, columns_f, columns_g, control, status,
            num_steps, partial, dim, spans, **step.span, **c, **step.in_slot,
        )  # fmt: skip
        anderson_judge_kernel[step.by_row](
            x, gx, sample_of, gram, *account, partial, plan, dim, spans, *options,
            **step.rules, **c,
        )  # fmt: skip
        anderson_advance_kernel[step.by_span](
            x, gx, sample_of, *points, plan, dim, spans, **step.span, **c, **step.in_slot
        )
