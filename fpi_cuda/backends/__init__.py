"""Implementations of the step ops, and the choice between them."""

from __future__ import annotations

from types import ModuleType

import torch

from fpi_cuda import _extension
from fpi_cuda.backends import native, reference, triton

NAMES = ("reference", "native", "cuda", "triton")
NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def resolve(name: str | None, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend called `name` for states of this device and dtype; None takes the best.

    Raises:
        ValueError: no such backend, or it cannot serve this device or dtype here.
    """
    if name is not None and name not in NAMES:
        raise ValueError(
            f"fixed_point: unknown backend {name!r}. Valid: None, {', '.join(map(repr, NAMES))}"
        )
    if name == "reference":
        return reference
    reason = why_not_native(device, dtype)
    if name is None:
        return native if reason is None else reference
    if name == "native":
        if reason is not None:
            raise ValueError(
                f'fixed_point: backend="native" is unavailable: {reason}. '
                'Use backend=None or backend="reference".'
            )
        return native
    if name == "triton":
        reason = triton.why_not(device, dtype)
        if reason is not None:
            raise ValueError(
                f'fixed_point: backend="triton" is unavailable: {reason}. Use backend=None.'
            )
        return triton
    raise ValueError(
        f'fixed_point: backend="{name}" is unavailable: this build holds no {name} kernels. '
        "Use backend=None."
    )


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native backend cannot take such a state, or None if it can."""
    if _extension.load_error is not None:
        return _extension.load_error
    if device.type != "cpu":
        return f"it runs on the CPU, the state is on {device.type}"
    if dtype not in NATIVE_DTYPES:
        return f"it has no kernels for {dtype}"
    return None
