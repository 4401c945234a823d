"""What is settled before a solve begins, and what a loop is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fpi_cuda.autograd import Account, BoundMap, Jacobian
from fpi_cuda.coupling import Coupling
from fpi_cuda.evaluation.state import Layout
from fpi_cuda.loops.stepping import Backend
from fpi_cuda.options import FixedPointSolver, LinearSolver, Options
from fpi_cuda.solution import Reason, SolveResult


class Plan(NamedTuple):
    """What g, the layout of its state and the options decide, whatever the numbers are.

    Attributes:
        layout: of the state.
        options: with histories in a dtype that the engine stores.
        engine: whose kernels take the steps.
        rowwise: it was promised that rows are independent.
        whole: why prepare and step do not stand for g; None if they do.
        adjoint_solver: of the adjoint system, where one is solved.
        loop: that runs, unless it declines while it solves.
        reasons: why each one ahead of it does not.
    """

    layout: Layout
    options: Options
    engine: Backend
    rowwise: bool
    whole: str | None
    adjoint_solver: FixedPointSolver | LinearSolver
    loop: Loop
    reasons: tuple[Reason, ...] = ()


class Solved(NamedTuple):
    """A solve that has ended, with what its adjoint needs.

    Attributes:
        plan, bound_map: of what, and how.
        result: plain.
        kept: what the adjoint by the same loop starts from.
    """

    plan: Plan
    bound_map: BoundMap
    result: SolveResult
    kept: Any

    @property
    def form(self) -> str | None:
        """What g was recognised as, where it was captured."""
        return getattr(self.kept, "form", None)


class Loop(Protocol):
    """One way to run a solve.

    Attributes:
        name: of the route that asks for it.
        is_late: the host does not wait for the solve, so that reading its result would. g was then
            the same at every step, for the trace of each solve is compared.
        sees_all_rows: where g is not this package's own, it was evaluated on all rows together at
            the solution.
        is_rowwise: the maps that it runs have rows that do not depend on one another, as they show.
    """

    name: str
    is_late: bool
    sees_all_rows: bool
    is_rowwise: bool

    @property
    def why_not(self) -> Callable[[Any, Plan, bool], str | None] | None:
        """why_not(g, plan, rehearse): why it cannot run such solves, or None where that shows only
        while it does; with `rehearse` that is looked for too. None as a whole: it runs any g.
        """

    def solve(
        self, plan: Plan, bound_map: BoundMap, x0: Tensor, coupling: Coupling | None
    ) -> tuple[SolveResult, Any]:
        """The fixed point from x0 (B, D), plain, and what its adjoint starts from; under no_grad.

        Args:
            bound_map: g, plain.
            coupling: what is known of whether rows depend on one another; None: they do not.
        Raises:
            Declined: another loop has to.
        """

    @property
    def adjoint(self) -> Callable[[Solved, Account], LoopAdjoint] | None:
        """How it solves the adjoint too, or Declined; None: the host does, as after any solve."""


class LoopAdjoint(Protocol):
    """Solves c = J^T c + b at the fixed point that its loop has found."""

    @property
    def evaluate(self) -> Callable[[Tensor], Tensor] | None:
        """g at the fixed point (B, D), with the graph that is differentiated; None: as torch does.

        Where samples failed it is not called.
        """

    @property
    def prepare(self) -> Prepare | None:
        """None: it is ready."""

    def solve(self, matrix: Jacobian, b: Tensor, atol: Tensor) -> SolveResult | None:
        """c (B, D) with ||J^T c + b - c|| <= atol (B,); None: the host has to do it."""


class Prepare(Protocol):
    """Makes an adjoint solve ready."""

    def __call__(self, x_star: Tensor, account: Account) -> str | None:
        """At x_star (B, D), after g was evaluated there.

        Returns:
            Why the host will solve it this once, whatever was asked for; None: it will not.
        Raises:
            Declined: this loop cannot.
        """


class Unavailable(RuntimeError):
    """route asks for a loop that cannot run.

    Attributes:
        reason: why not.
    """

    def __init__(self, route: str, what: str, reason: str) -> None:
        self.said = (route, what, reason)
        super().__init__(
            f'fixed_point: route="{route}" was asked for, but {what} cannot run there: {reason}. '
            'Use route=None or route="host"'
        )

    @property
    def reason(self) -> str:
        return self.said[2]

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Pickled as what it was made from: worker processes hand their errors on."""
        return type(self), self.said
