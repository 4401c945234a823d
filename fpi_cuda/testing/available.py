"""Which backends can serve a state on this machine."""

from __future__ import annotations

import torch

from fpi_cuda import ops


def backends_available(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[str, ...]:
    """Names of the backends that take states of this device and dtype; "reference" always does."""
    return tuple(name for name in ops.NAMES if _available(name, torch.device(device), dtype))


def _available(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        ops.resolve(name, device, dtype)
    except ValueError:
        return False
    return True
