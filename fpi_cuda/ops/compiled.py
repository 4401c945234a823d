"""The compiled library: its ops, which torch dispatches by device, and the backends they make."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fpi_cuda import _extension
from fpi_cuda.norms import SUMMED
from fpi_cuda.norms import num_moved as num_moved_by_torch


def unavailable(name: str, *_: Any, **__: Any) -> NoReturn:
    """What stands for an op of a library that is not there."""
    raise RuntimeError(f"{name}: the library is unavailable: {_extension.load_error}.")


def op(name: str) -> Callable[..., Any]:
    """torch.ops.fpi_cuda's op of this name, without a Python function around it."""
    if _extension.load_error is not None:
        return functools.partial(unavailable, name)
    found: Callable[..., Any] = getattr(torch.ops.fpi_cuda, name).default
    return found


PLENTY = 1 << 30
"""Samples that no device holds at once."""


class Compiled:
    """What both backends have. The twins of the ops are in fpi_cuda.ops.reference."""

    CELL_LOOP_DTYPES = (torch.float32, torch.float64)
    CELL_LOOP_MAX_DEPTH = 16
    anderson_step_ = staticmethod(op("anderson_step_"))
    broyden_step_ = staticmethod(op("broyden_step_"))
    cell_loop_ = staticmethod(op("cell_loop_"))


class Native(Compiled):
    """csrc/cpu, on the CPU."""

    name = "native"
    cell_layer_ = staticmethod(op("cell_layer_"))
    weight_gradient_ = staticmethod(op("weight_gradient_"))
    num_moved = staticmethod(functools.partial(op("num_moved"), rounding=SUMMED))

    def scratch(self, x: Tensor) -> None:
        """See fpi_cuda.ops.reference.scratch, its twin."""

    def cell_loop_words(
        self,
        dim: int,
        hidden: int,
        depth: int,
        dtype: torch.dtype,
        precision: int,
        device: torch.device,
    ) -> str:
        """Who runs the loop of a large batch, for explain().

        Args:
            dim, hidden: features of x and of the layer between, 0 for one layer.
            depth: of Anderson's history, 0 for Picard.
            precision: place in options.PRECISIONS.
        """
        double = dtype == torch.float64
        tile = torch.ops.fpi_cuda.cell_loop_tile(PLENTY, dim, hidden, depth, double)
        return f"native code evaluates g and steps, up to {tile} samples at a time per thread"


class Cuda(Compiled):
    """csrc/cuda, on the device of the state."""

    name = "cuda"
    num_moved = staticmethod(num_moved_by_torch)

    def scratch(self, x: Tensor) -> Tensor | None:
        """What a solve from x (B, D) must pass to every step: room where blocks share a sample."""
        size = torch.ops.fpi_cuda.step_scratch_bytes.default(*x.shape, x.dtype)
        return torch.zeros(size, dtype=torch.uint8, device=x.device) if size else None

    def cell_loop_words(self, *sizes: Any) -> str:
        """Who runs the loop of a large batch; see Native.cell_loop_words."""
        tile, _ = self.cell_loop_plan(PLENTY, *sizes)
        _, reason = self.cell_loop_plan(1, *sizes)
        rest = "" if reason is None else ", or torch and the steps' own kernels where they are few"
        return f"one kernel evaluates g and steps, {tile} samples at a time per block{rest}"

    def cell_loop_plan(
        self,
        batch: int,
        dim: int,
        hidden: int,
        depth: int,
        dtype: torch.dtype,
        precision: int,
        device: torch.device,
    ) -> tuple[int, str | None]:
        """Samples that a block works on at a time, and why another loop should be faster, if so.

        That is by arithmetic alone, in csrc/cuda/cell_loop_plan.cpp. The sizes are those of
        Native.cell_loop_words.
        """
        cores, shared_bytes, capability = self.limits_of(device)
        words = torch.ops.fpi_cuda.cell_loop_on_cuda(
            batch, dim, hidden, depth, dtype == torch.float64, precision, cores, shared_bytes
        )
        tile, _, reason = words.partition(" ")
        if precision and capability < (8, 0):
            reason = "rounded products need a device of compute capability 8.0 or above"
        return int(tile), reason or None

    def limits_of(self, device: torch.device) -> tuple[int, int, tuple[int, int]]:
        """Multiprocessors, bytes of shared memory that a block may ask for, compute capability."""
        properties: Any = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        shared_bytes = properties.shared_memory_per_block_optin
        return properties.multi_processor_count, shared_bytes, capability


native, cuda = Native(), Cuda()
