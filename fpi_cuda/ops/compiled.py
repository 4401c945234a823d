"""The ops of the compiled library, which torch dispatches by the device of their tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from fpi_cuda import _extension
from fpi_cuda.norms import SUMMED


def unavailable(name: str, *_: Any, **__: Any) -> NoReturn:
    """What stands for an op of a library that is not there."""
    raise RuntimeError(f"{name}: the library is unavailable: {_extension.load_error}.")


def op(name: str) -> Callable[..., Any]:
    """torch.ops.fpi_cuda's op of this name, without a Python function around it."""
    if _extension.load_error is not None:
        return functools.partial(unavailable, name)
    found: Callable[..., Any] = getattr(torch.ops.fpi_cuda, name).default
    return found


anderson_step_ = op("anderson_step_")
"""See fpi_cuda.ops.reference.anderson_step_, its twin."""
broyden_step_ = op("broyden_step_")
"""See fpi_cuda.ops.reference.broyden_step_, its twin."""
cell_loop_ = op("cell_loop_")
"""See fpi_cuda.ops.reference_loop.cell_loop_, its twin."""
cell_layer_ = op("cell_layer_")
"""See fpi_cuda.ops.reference_loop.cell_layer_, its twin."""
weight_gradient_ = op("weight_gradient_")
"""See fpi_cuda.ops.reference_loop.weight_gradient_, its twin."""
num_moved = functools.partial(op("num_moved"), rounding=SUMMED)
"""See fpi_cuda.norms.num_moved, its twin."""
