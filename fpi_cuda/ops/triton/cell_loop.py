"""Launch the fused loop of a lowered cell."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fpi_cuda.activations import CODES
from fpi_cuda.ops.solver_state import CONTROL_SIZE
from fpi_cuda.ops.triton.cell_tile import cell_loop_kernel
from fpi_cuda.ops.triton.launch import (
    INTERPRETED,
    account_of,
    on_device_of,
    require_each,
    stall_steps_of,
)
from fpi_cuda.ops.triton.shape import MAX_DEPTH, CellShape, cell_shape, programs_for
from fpi_cuda.options import PRECISIONS

OP = "cell_loop_"
NAMES_OF_CODES = tuple(CODES)


def cell_loop_(
    x: Tensor,
    x_factor: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    shift1: Tensor | None,
    factor1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    shift2: Tensor | None,
    factor2: Tensor | None,
    atol: Tensor,
    status: Tensor,
    num_steps: Tensor,
    residual: Tensor,
    *,
    activation1: int,
    activation2: int,
    carry: float,
    depth: int,
    rtol: float,
    max_steps: int,
    beta: float,
    ridge: float,
    precision: int,
) -> None:
    """See fpi_cuda.ops.reference_loop.cell_loop_, its twin."""
    layer1 = (weight1, bias1, shift1, factor1)
    layer2 = (weight2, bias2, shift2, factor2)
    require_map(x, x_factor, layer1, layer2, (atol, status, num_steps, residual))
    most_precision = len(PRECISIONS) - 1 if x.dtype == torch.float32 else 0
    for name, value, least, most in (
        ("depth", depth, 0, MAX_DEPTH),
        ("activation1", activation1, 0, len(CODES) - 1),
        ("activation2", activation2, 0, len(CODES) - 1),
        ("precision", precision, 0, most_precision),
        ("max_steps", max_steps, 1, None),
    ):
        if value < least or (most is not None and value > most):
            bound = f"at least {least}" if most is None else f"from {least} to {most}"
            raise RuntimeError(f"{OP}: {name} must be {bound}, got {value}")
    batch, dim = x.shape
    if batch == 0:
        return
    shape = cell_shape(depth, x.dtype.itemsize)
    processors = 1
    if not INTERPRETED:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = programs_for(batch, shape.slots, processors)
    strides2 = (0, 0) if weight2 is None else weight2.stride()
    with on_device_of(x):
        cell_loop_kernel[(programs,)](
            x, x_factor, *layer1, *layer2, atol, status, num_steps, residual,
            *workspace(x, weight1.shape[0], depth, programs, shape),
            batch, dim, weight1.shape[0], *weight1.stride(), *strides2,
            carry, rtol, max_steps, beta, ridge,
            ACTIVATION1=NAMES_OF_CODES[activation1],
            ACTIVATION2="identity" if weight2 is None else NAMES_OF_CODES[activation2],
            CARRIES=carry != 0.0,
            PRECISION=precision,
            BF16_DOT=not INTERPRETED,
            EPSILON=torch.finfo(x.dtype).eps,
            STALL_STEPS=stall_steps_of(depth),
            S=shape.slots,
            PANEL=shape.panel,
            INNER=shape.inner,
            DEPTH=depth,
            M=shape.tile_rows,
            BLOCK=shape.block,
            COMPUTE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            num_warps=shape.num_warps,
            maxnreg=shape.registers,
        )  # fmt: skip


def workspace(
    x: Tensor, width: int, depth: int, programs: int, shape: CellShape
) -> tuple[Tensor, ...]:
    """The queue, and by slot x, gx, hidden, anchor, the two histories, gram and control."""
    rows, dim = programs * shape.slots, x.shape[1]
    return (
        torch.zeros(1, dtype=torch.int64, device=x.device),
        x.new_empty(rows, dim),
        x.new_empty(rows, dim),
        x.new_empty(rows, width),
        x.new_empty(rows if depth else 0, dim),
        x.new_empty(rows, depth, dim),
        x.new_empty(rows, depth, dim),
        x.new_empty((rows, depth * (depth + 1) // 2), dtype=torch.float64),
        x.new_empty((rows, CONTROL_SIZE), dtype=torch.float64),
    )


Layer = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def require_map(
    x: Tensor,
    x_factor: Tensor | None,
    layer1: Layer,
    layer2: Layer,
    account: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Raise unless all arrays are of the shapes and dtypes of the schema.

    Args:
        layer1, layer2: weight, bias, shift and factor; a weight may have any strides.
        account: atol, status, num_steps and residual.
    """
    if x.dim() != 2 or x.shape[1] < 1:
        raise RuntimeError(f"{OP}: x must be (batch, dim >= 1), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"{OP}: x must be float32 or float64, got {x.dtype}")
    if layer2[0] is None and any(t is not None for t in layer2):
        raise RuntimeError(f"{OP}: bias2, shift2 and factor2 belong to weight2, which is missing")
    batch, inputs = x.shape
    expected = {"x": (x, tuple(x.shape), x.dtype), **account_of(batch, *account)}
    if x_factor is not None:
        expected["x_factor"] = (x_factor, tuple(x.shape), x.dtype)
    for place, layer in (("1", layer1), ("2", layer2)):
        weight, bias, shift, factor = layer
        if weight is None:
            continue
        sound = weight.dim() == 2 and weight.shape[1] == inputs and weight.dtype == x.dtype
        if not sound or weight.device != x.device:
            raise RuntimeError(
                f"{OP}: weight{place} must be (outputs, {inputs}) {x.dtype} on {x.device}, got "
                f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
            )
        inputs = weight.shape[0]
        for name, array, wanted in (
            ("bias", bias, (inputs,)),
            ("shift", shift, (batch, inputs)),
            ("factor", factor, (batch, inputs)),
        ):
            if array is not None:
                expected[name + place] = (array, wanted, x.dtype)
    if inputs != x.shape[1]:
        raise RuntimeError(
            f"{OP}: the last weight must have the {x.shape[1]} outputs of x, got {inputs}"
        )
    require_each(OP, expected, x.device)
