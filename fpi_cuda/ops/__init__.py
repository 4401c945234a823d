"""Implementations of the step ops, and the choice between them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from fpi_cuda import _extension
from fpi_cuda.ops import reference, triton
from fpi_cuda.ops.compiled import cuda, native

BACKENDS: dict[str, Any] = {b.name: b for b in (reference, native, cuda, triton)}
NAMES = tuple(BACKENDS)
NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CUDA_DTYPES = (*NATIVE_DTYPES, torch.float16)


def resolve(name: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    """The backend called `name` for states of this device and dtype; None takes the best.

    Raises:
        ValueError: no such backend, or it cannot serve this device or dtype here.
    """
    if name is None:
        for fast in (native, cuda):
            if why_not(fast.name, device, dtype) is None:
                return fast
        return reference
    if name not in NAMES:
        raise ValueError(
            f"fixed_point: unknown backend {name!r}. Valid: None, {', '.join(map(repr, NAMES))}"
        )
    reason = why_not(name, device, dtype)
    if reason is not None:
        raise ValueError(
            f'fixed_point: backend="{name}" is unavailable: {reason}. '
            'Use backend=None or backend="reference".'
        )
    return BACKENDS[name]


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend called `name` cannot take such a state, or None if it can."""
    if name == "reference":
        return None
    if name == "triton":
        return triton.why_not(device, dtype)
    if _extension.load_error is not None:
        return _extension.load_error
    if name == "cuda":
        no_cuda = _no_cuda_reason()
        if no_cuda is not None:
            return (
                f"built without CUDA ({no_cuda}). Reinstall with CUDA_HOME set and FPI_CUDA=1, "
                "under a torch with CUDA"
            )
        if device.type != "cuda":
            return f"it runs on CUDA devices, the state is on {device.type}"
    elif device.type != "cpu":
        return f"it runs on the CPU, the state is on {device.type}"
    if dtype not in (CUDA_DTYPES if name == "cuda" else NATIVE_DTYPES):
        return f"it has no kernels for {dtype}"
    return None


@cache
def _no_cuda_reason() -> str | None:
    """Why the library, which is loaded, holds no CUDA kernels; None where it does."""
    return _extension.build_info().get("no_cuda")
