"""What a solve reports: status per sample, steps, residual, and how the adjoint went."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

LookAtAdjoint = Callable[[Tensor, Tensor, Tensor, int], bool]
"""look(b, status, residual, num_zeroed): at an adjoint solve for b (B, D) that has ended; whether
there was anything to say."""


class Status(enum.IntEnum):
    """How one sample's solve ended. The values are those of csrc/common/status.h.

    CONVERGED: ||g(x) - x|| <= atol + min(rtol ||g(x)||, cap). The cap is a tenth of the larger of
    x0 and g(x0), or a hundredth of the largest residual since ||g|| last grew fourfold: drifting
    off is no convergence, growth to a fixed point of another size is.
    STALLED: no gain of a tenth for a while, and ||g(x) - x|| within 64 roundings of ||g(x)|| (8 of
    a state of 16 bits), or, under autocast, within the noise that g was seen to have.
    DIVERGED: the residual nears overflow, or has grown a million times over the first one and
    grows still at the last step; or x ran so far that rounding hides whether it drifts.
    NONFINITE: g was not finite at x0, or time and again.
    MAX_STEPS: none of these.
    """

    ACTIVE = 0
    CONVERGED = 1
    MAX_STEPS = 2
    STALLED = 3
    DIVERGED = 4
    NONFINITE = 5

    @property
    def remedy(self) -> str:
        """What to try when a sample ends so."""
        return _REMEDIES[self]


_REMEDIES = {
    Status.ACTIVE: "the solve has not ended",
    Status.CONVERGED: "",
    Status.MAX_STEPS: "raise max_steps, loosen rtol, or use a deeper Anderson history",
    Status.STALLED: "the residual is at the floor of the arithmetic, that of autocast where it "
    "is on: loosen rtol, or compute in a wider dtype",
    Status.DIVERGED: "g does not contract here: bound it (fpi.contract_) or damp it; if it only "
    "grows on its way, raise max_steps",
    Status.NONFINITE: "g returned NaN or Inf: look at that sample's x0 and z",
}


@dataclass(frozen=True)
class Stats:
    """The account of one solve.

    Attributes:
        status: (B,) int8, values of Status.
        num_steps: (B,) int32, evaluations of the map spent on each sample.
        residual: (B,) ||h(y) - y||_2 of the returned y, in the units of y.
        num_zeroed: samples whose gradient was set to zero, because the forward or the adjoint
            solve ended NONFINITE or DIVERGED. 0 for a forward solve. A sample whose incoming
            gradient is itself Inf or NaN is NONFINITE but not counted: its gradient is NaN.
    """

    status: Tensor
    num_steps: Tensor
    residual: Tensor
    num_zeroed: int = 0

    @property
    def converged(self) -> Tensor:
        """(B,) bool: status is CONVERGED."""
        return self.status == Status.CONVERGED


class SolveResult(NamedTuple):
    """What a solver returns for a flat batch.

    Attributes:
        x: (B, D) the solution, or the best iterate where the solve failed.
        status: (B,) int8, values of Status.
        num_steps: (B,) int32, evaluations of the map or operator spent on each sample.
        residual: (B,) float64, the residual of the returned x, in the units of x.
    """

    x: Tensor
    status: Tensor
    num_steps: Tensor
    residual: Tensor


Reason = tuple[str, str]
"""The name of a loop, and why it does not run a solve."""


class Route(NamedTuple):
    """Which loop ran a solve.

    Attributes:
        name: "host", "device" or "fused".
        reasons: why each loop ahead of it did not.
    """

    name: str
    reasons: tuple[Reason, ...] = ()

    @property
    def reason(self) -> str:
        """The reasons in words; one, where it is the same for all."""
        texts = {text for _, text in self.reasons}
        if len(texts) == 1:
            return texts.pop()
        return "; ".join(f"{NOT_BY[name]}: {text}" for name, text in self.reasons)


NOT_BY = {"fused": "not fused", "device": "not on the device"}


class AsyncNumber:
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


@dataclass(eq=False, repr=False)
class AdjointRecord:
    """A box that the backward pass fills: autograd runs after the Solution was returned.

    Attributes:
        look: sees every adjoint solve, to warn of what it finds.
        batch_dims: 0 where the whole state is one sample.
        stats: the latest account.
        warned: it has had something to say, which is enough for one solution.
        worst: the highest status of the forward solve; None where nobody has asked for it yet.
        route: which way the forward solve went; None where there is but one.
        adjoint_route: which way the adjoint solve will go; likewise.
        form: what g was recognised as, where it was captured.
        joint: rows were seen to depend on one another in the forward solve.
    """

    look: LookAtAdjoint | None = None
    batch_dims: int = 1
    stats: Stats | None = None
    warned: bool = False
    worst: AsyncNumber | None = None
    route: Route | None = None
    adjoint_route: Route | None = None
    form: str | None = None
    joint: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """What can be handed to another process."""
        return self.__dict__ | {"worst": None}


@dataclass(frozen=True)
class Solution:
    """A fixed point and how it was reached.

    Attributes:
        value: like x0; differentiable in z, in g's parameters and in what g closes over.
        status: (B,) int8, values of Status; () with batch_dims=0, as the next two.
        num_steps: (B,) int32, evaluations of g spent on each sample.
        residual: (B,) ||g(x) - x||_2 of the returned x.
    """

    value: Any
    status: Tensor
    num_steps: Tensor
    residual: Tensor
    adjoint_record: AdjointRecord

    @property
    def converged(self) -> Tensor:
        """(B,) bool: status is CONVERGED."""
        return self.status == Status.CONVERGED

    @property
    def adjoint_stats(self) -> Stats | None:
        """The account of the latest adjoint solve; None until backward has run."""
        stats = self.adjoint_record.stats
        if stats is None or self.adjoint_record.batch_dims:
            return stats
        return Stats(stats.status[0], stats.num_steps[0], stats.residual[0], stats.num_zeroed)


class ConvergenceError(RuntimeError):
    """Raised with throw=True; names the samples that did not converge.

    Attributes:
        solution: the whole Solution, detached.
    """

    def __init__(self, solution: Solution) -> None:
        self.solution = solution
        super().__init__(describe_failures(solution.status, solution.residual))

    def __reduce__(self) -> tuple[type, tuple[Solution]]:
        """Pickled as the solution: worker processes hand their errors on."""
        return type(self), (self.solution,)


def describe_failures(status: Tensor, residual: Tensor, limit: int = 8) -> str:
    """One line that counts the failed samples, names the first few, and says what to try."""
    status, residual = status.reshape(-1), residual.reshape(-1)
    failed = torch.nonzero(status != Status.CONVERGED).flatten().tolist()
    named = ", ".join(
        f"{i}: {Status(int(status[i])).name} (residual {float(residual[i]):.3g})"
        for i in failed[:limit]
    )
    more = f" and {len(failed) - limit} more" if len(failed) > limit else ""
    remedies = sorted({Status(int(status[i])).remedy for i in failed})
    return (
        f"fixed_point: {len(failed)} of {status.numel()} samples did not converge: "
        f"{named}{more}. Try: {'; '.join(remedies)}"
    )
