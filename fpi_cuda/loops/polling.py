"""How the host learns how many samples are still active, without making the device wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fpi_cuda.evaluation.stream_capture import being_captured


class ActiveCount(Protocol):
    """What the host loop asks after every step.

    Attributes:
        pays_below: share of active samples from which on it pays that the others leave the batch.
    """

    pays_below: float

    def after_step(self, status: Tensor) -> int | None:
        """An upper bound on the active samples of `status` (n,): active ones never come back.

        None as long as nothing is known.
        """


def active_count(device: torch.device) -> ActiveCount:
    """The way to count on this device."""
    if device.type != "cuda":
        return CountAtOnce()
    if being_captured(device):
        return CountNever()
    stream = torch.cuda.current_stream(device)
    return CountLater(lambda: StreamEvent(stream), pinned=True)


class CountAtOnce:
    """Reads the status itself: on the CPU it is there."""

    # Gathering the active rows costs about as much as a step on a fifth of them.
    pays_below = 0.8

    def after_step(self, status: Tensor) -> int:
        """The active samples now."""
        return len(status) - int(torch.count_nonzero(status))


class CountNever:
    """Knows nothing: while a solve is being captured there is nothing to know."""

    pays_below = 0.0

    def after_step(self, status: Tensor) -> None:
        """None."""


class Event(Protocol):
    """A mark in the device's queue."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Wait until it has."""


class StreamEvent:
    """An event on `stream`, recorded as it is made."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)
        self.query = self._event.query
        self.synchronize = self._event.synchronize


class Pending(NamedTuple):
    """A count on its way: of `total` samples, `stopped` have stopped once `event` has passed."""

    event: Event
    stopped: Tensor
    total: int


class CountLater:
    """Has the count copied to pinned memory, and reads it a step or two later.

    The device always holds a step that is not begun, so it never waits for the host to look. The
    host waits only when it is LAG steps ahead: further ahead, it would queue evaluations that
    nobody needs. Steps taken after every sample has stopped change nothing.

    Args:
        record: puts an event behind what is queued so far.
        pinned: copies may run beside the host; needs a CUDA device.
    """

    LAG = 2

    # A gather is a dozen launches here, and may change which kernels evaluate g.
    pays_below = 0.5

    def __init__(self, record: Callable[[], Event], *, pinned: bool) -> None:
        self._record = record
        self._memory = torch.empty(self.LAG + 1, dtype=torch.int64, pin_memory=pinned)
        self._turn = 0
        self._pending: deque[Pending] = deque()
        self._known: int | None = None

    def after_step(self, status: Tensor) -> int | None:
        """The active samples as of at most LAG steps ago."""
        stopped = self._memory[self._turn]
        self._turn = (self._turn + 1) % len(self._memory)
        stopped.copy_(torch.count_nonzero(status), non_blocking=True)
        self._pending.append(Pending(self._record(), stopped, len(status)))
        if len(self._pending) > self.LAG:
            self._pending[0].event.synchronize()
        while self._pending and self._pending[0].event.query():
            passed = self._pending.popleft()
            self._known = passed.total - int(passed.stopped)
        return self._known
