"""A truth value of the device that the host will want, but not now."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """Sends a flag on its way to the host, and waits for it when it is asked for.

    Args:
        flag: 0-dim bool.
    """

    def __init__(self, flag: Tensor) -> None:
        self._flag = flag
        self._arrived: torch.cuda.Event | None = None
        if flag.device.type == "cuda":
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.current_stream(flag.device).record_event()

    def value(self) -> bool:
        """The flag. Waits for what it was computed from, not for what was enqueued since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
