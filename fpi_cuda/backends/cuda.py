"""The step ops in CUDA: csrc/cuda on the device of the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

name = "cuda"


def scratch(x: Tensor) -> Tensor | None:
    """What a solve from x (B, D) must pass to every step: room where blocks share a sample."""
    size = torch.ops.fpi_cuda.step_scratch_bytes.default(*x.shape, x.dtype)
    return torch.zeros(size, dtype=torch.uint8, device=x.device) if size else None


def anderson_step_(*args: Any, **kwargs: Any) -> None:
    """See fpi_cuda.backends.reference.anderson_step_, its twin."""
    torch.ops.fpi_cuda.anderson_step_.default(*args, **kwargs)


def broyden_step_(*args: Any, **kwargs: Any) -> None:
    """See fpi_cuda.backends.reference.broyden_step_, its twin."""
    torch.ops.fpi_cuda.broyden_step_.default(*args, **kwargs)
