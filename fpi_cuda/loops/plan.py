"""What is settled before a solve begins, and what a solve by one of the loops leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fpi_cuda.coupling import Coupling
from fpi_cuda.implicit import Account, FlatMap, Jacobian
from fpi_cuda.implicit.flat_map import Recording
from fpi_cuda.options import FixedPointSolver, LinearSolver
from fpi_cuda.request import Options
from fpi_cuda.result import Reason, SolveResult
from fpi_cuda.solvers.stepping import Backend
from fpi_cuda.state import Layout


class Request(NamedTuple):
    """What a loop is asked about.

    Attributes:
        g, layout: the map and how its state lies.
        options: with histories in a dtype that the engine stores.
        engine: whose kernels take the steps.
        rowwise: it was promised that rows are independent.
        whole: why prepare and step do not stand for g; None if they do.
    """

    g: Any
    layout: Layout
    options: Options
    engine: Backend
    rowwise: bool
    whole: str | None


@dataclass(frozen=True)
class Plan:
    """What g, the layout of its state and the options decide, whatever the numbers are.

    Attributes:
        layout, options, engine, rowwise, whole: as in Request.
        adjoint_solver: of the adjoint system, where one is solved.
        against: what speaks against each of LOOPS, None where nothing does. A loop may still
            decline while it solves.
    """

    layout: Layout
    options: Options
    engine: Backend
    rowwise: bool
    whole: str | None
    adjoint_solver: FixedPointSolver | LinearSolver | None
    against: tuple[str | None, ...]


class LoopAdjoint(Protocol):
    """How a loop solves c = J^T c + b at the fixed point that it has found."""

    @property
    def record(self) -> Recording | None:
        """What makes the evaluation of g that is differentiated; None: nobody needs to."""

    def solve(self, matrix: Jacobian, b: Tensor, atol: Tensor) -> SolveResult | None:
        """c (B, D) with ||J^T c + b - c|| <= atol (B,); None: the host has to do it."""

    def prepare(self, x_star: Tensor, account: Account) -> str | None:
        """Make ready for `solve` at x_star (B, D), after g was evaluated there.

        Returns:
            Why the host will do it this once, whatever was asked for; None: it will not.
        Raises:
            Declined: this loop cannot.
        """


class WhyNot(Protocol):
    """Why a loop cannot run such solves; None if that is not known."""

    def __call__(self, request: Request, *, rehearse: bool) -> str | None:
        """The reason.

        Args:
            rehearse: look too for what a solve finds out by itself.
        """


class AdjointBy(Protocol):
    """How a loop solves the adjoint of adjoint=Implicit, for a solve that it has run."""

    def __call__(self, solved: Solved, account: Account) -> LoopAdjoint:
        """Ready but for `prepare`.

        Raises:
            Declined: it cannot.
        """


class Loop(Protocol):
    """One way to run a solve.

    Attributes:
        name: of the route that asks for it.
        is_late: the host does not wait for the solve, so that reading its result would. g was then
            the same at every step, for the trace of each solve is compared.
        sees_all_rows: where g is not this package's own, it was evaluated on all rows together at
            the solution.
    """

    name: str
    is_late: bool
    sees_all_rows: bool

    @property
    def why_not(self) -> WhyNot | None:
        """None: it runs any g."""

    @property
    def adjoint(self) -> AdjointBy | None:
        """None: the host solves the adjoint, as it can after any solve."""

    def solve(
        self, plan: Plan, flat_map: FlatMap, x0: Tensor, coupling: Coupling | None
    ) -> tuple[SolveResult, Any]:
        """The fixed point from x0 (B, D), plain, and what its adjoint starts from; under no_grad.

        Args:
            flat_map: g, plain.
            coupling: what is known of whether rows depend on one another; None: they do not.
        Raises:
            Declined: another loop has to.
        """


class Choice(NamedTuple):
    """The loop that runs.

    Attributes:
        loop: which.
        reasons: why each one ahead of it does not.
    """

    loop: Loop
    reasons: tuple[Reason, ...]


class Solved(NamedTuple):
    """A solve that has ended, with what its adjoint needs.

    Attributes:
        plan, loop, flat_map: of what, by which.
        result: plain.
        kept: what the adjoint by the same loop starts from.
    """

    plan: Plan
    loop: Loop
    flat_map: FlatMap
    result: SolveResult
    kept: Any
