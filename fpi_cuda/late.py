"""A number of the device that the host will want, but not now."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """Sends a number on its way to the host, and waits for it when it is asked for.

    Args:
        number: 0-dim, of any dtype.
    """

    def __init__(self, number: Tensor) -> None:
        self._number = number
        self._arrived: torch.cuda.Event | None = None
        if number.is_cuda:
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._arrived = torch.cuda.current_stream(number.device).record_event()

    def value(self) -> int | float | bool:
        """The number. Waits for what it was computed from, not for what was enqueued since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._number.item()

    def peek(self) -> int | float | bool | None:
        """The number if it has come, else None; waits for nothing."""
        if self._arrived is not None and not self._arrived.query():
            return None
        return self._number.item()


def worst_of(status: Tensor) -> Tensor:
    """0-dim, the highest status: above CONVERGED if a sample has not, from DIVERGED on if lost."""
    return status.max() if status.numel() else status.new_ones(())  # CONVERGED
