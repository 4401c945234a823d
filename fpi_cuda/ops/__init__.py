"""Implementations of the step ops, and the choice between them."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from fpi_cuda import _extension
from fpi_cuda.ops import cuda, native, reference, triton

NAMES = ("reference", "native", "cuda", "triton")
NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CUDA_DTYPES = (*NATIVE_DTYPES, torch.float16)


def resolve(name: str | None, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend called `name` for states of this device and dtype; None takes the best.

    Raises:
        ValueError: no such backend, or it cannot serve this device or dtype here.
    """
    if name is not None and name not in NAMES:
        raise ValueError(
            f"fixed_point: unknown backend {name!r}. Valid: None, {', '.join(map(repr, NAMES))}"
        )
    if name is None:
        if why_not_native(device, dtype) is None:
            return native
        return cuda if why_not_cuda(device, dtype) is None else reference
    reason = why_not(name, device, dtype)
    if reason is not None:
        raise ValueError(
            f'fixed_point: backend="{name}" is unavailable: {reason}. '
            'Use backend=None or backend="reference".'
        )
    return {b.name: b for b in (reference, native, cuda, triton)}[name]


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend called `name` cannot take such a state, or None if it can."""
    if name == "reference":
        return None
    if name == "native":
        return why_not_native(device, dtype)
    if name == "cuda":
        return why_not_cuda(device, dtype)
    return triton.why_not(device, dtype)


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native backend cannot take such a state, or None if it can."""
    if _extension.load_error is not None:
        return _extension.load_error
    if device.type != "cpu":
        return f"it runs on the CPU, the state is on {device.type}"
    if dtype not in NATIVE_DTYPES:
        return f"it has no kernels for {dtype}"
    return None


def why_not_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the cuda backend cannot take such a state, or None if it can."""
    if _extension.load_error is not None:
        return _extension.load_error
    no_cuda = _no_cuda_reason()
    if no_cuda is not None:
        return (
            f"built without CUDA ({no_cuda}). Reinstall with CUDA_HOME set and FPI_CUDA=1, under a "
            "torch with CUDA"
        )
    if device.type != "cuda":
        return f"it runs on CUDA devices, the state is on {device.type}"
    if dtype not in CUDA_DTYPES:
        return f"it has no kernels for {dtype}"
    return None


@cache
def _no_cuda_reason() -> str | None:
    """Why the library, which is loaded, holds no CUDA kernels; None where it does."""
    return _extension.build_info().get("no_cuda")
