"""What a solve reports: status per sample, steps, residual, and how the adjoint went."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpi_cuda.late import Late

LookAtAdjoint = Callable[[Tensor, Tensor, Tensor, int], bool]
"""look(b, status, residual, num_zeroed): at an adjoint solve for b (B, D) that has ended; whether
there was anything to say."""


class Status(enum.IntEnum):
    """How one sample's solve ended. The values are those of csrc/common/status.h."""

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
    Status.STALLED: "the residual is at the dtype's floor: loosen rtol or use float64",
    Status.DIVERGED: "g does not contract here: bound it (fpi.contract_) or damp it",
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
            solve ended NONFINITE or DIVERGED. 0 for a forward solve.
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


class Route(NamedTuple):
    """Which way a solve went.

    Attributes:
        name: "host", "device" or "fused".
        reason: why no way ahead of it was taken.
    """

    name: str
    reason: str = ""


class AdjointRecord:
    """A box that the backward pass fills: autograd runs after the Solution was returned.

    Args:
        look: sees every adjoint solve, to warn of what it finds.
    Attributes:
        stats: the latest account.
        look: as given.
        warned: it has had something to say, which is enough for one solution.
        worst: the highest status of the forward solve; None where nobody has asked for it yet.
        route: which way the forward solve went; None where there is but one.
        adjoint_route: which way the adjoint solve will go; likewise.
    """

    def __init__(self, look: LookAtAdjoint | None = None) -> None:
        self.stats: Stats | None = None
        self.look = look
        self.warned = False
        self.worst: Late | None = None
        self.route: Route | None = None
        self.adjoint_route: Route | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What can be handed to another process."""
        return self.__dict__ | {"worst": None}


@dataclass(frozen=True)
class Solution:
    """A fixed point and how it was reached.

    Attributes:
        value: like x0; differentiable in z, in g's parameters and in what g closes over.
        status: (B,) int8, values of Status.
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
        return self.adjoint_record.stats


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
