"""What the planner asks of a device: to capture a computation, and to repeat it there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from fpi_cuda.declined import Declined


class Refused(Declined):
    """This solve cannot run on the device; the text says why.

    Args:
        passing: the next solve may fare better.
    """

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


class Replayable(Protocol):
    """A captured computation.

    Attributes:
        memory: bytes that it holds besides the tensors it was given.
    """

    memory: int

    def replay(self) -> None:
        """Enqueue it on the current stream, on what its tensors hold then."""

    def close(self) -> None:
        """Give its memory back; a replay under way ends as it should."""


class Session(Protocol):
    """Captures that share a stream and a memory pool, so that one may read what another made."""

    def capture(self, body: Callable[[], None]) -> Replayable:
        """Capture what body computes, without running it.

        Raises:
            Refused: there is something in it that a graph cannot hold.
        """

    def capture_loop(
        self, body: Callable[[], None], status: Tensor, rounds: Tensor, max_steps: int
    ) -> Replayable:
        """The same, repeated while any of status (B,) int8 is 0, max_steps times at most.

        rounds (1,) int32 counts the repetitions of the latest replay.
        """


class Fence(Protocol):
    """The order of the replays of one plan, whichever streams they run on."""

    def wait(self) -> None:
        """Let the current stream wait for the latest replay."""

    def mark(self) -> None:
        """Remember what the current stream has been given."""

    def retire(self, tensors: Iterable[Tensor]) -> None:
        """Let the memory of these tensors be reused only after the latest replay."""


class Graphs(Protocol):
    """Captures and replays on one kind of device."""

    def why_not(self) -> str | None:
        """Why nothing can be captured now, or None."""

    def session(self, device: torch.device) -> contextlib.AbstractContextManager[Session]:
        """Captures of one plan; other threads' captures wait."""

    def launches(self) -> int:
        """Kernels captured so far, inside of a capture."""

    def fence(self, device: torch.device) -> Fence:
        """A new one."""


def first_line(error: BaseException) -> str:
    """What an error says, without the traceback that CUDA errors carry."""
    return str(error).strip().split("\n", 1)[0]
