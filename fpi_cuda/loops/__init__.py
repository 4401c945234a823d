"""Which loop runs a solve: all in one call of native code, on the device, or from the host."""

from __future__ import annotations

from typing import Any

from fpi_cuda import backends
from fpi_cuda.adjoint import adjoint_solver
from fpi_cuda.declined import Declined
from fpi_cuda.implicit import Account
from fpi_cuda.loops import device, fused, host
from fpi_cuda.loops.plan import Choice, Loop, LoopAdjoint, Plan, Request, Solved
from fpi_cuda.options import Implicit
from fpi_cuda.request import Options
from fpi_cuda.result import AdjointRecord, Reason, Route
from fpi_cuda.shortcuts import why_not_hoisted
from fpi_cuda.state import Layout

LOOPS: tuple[Loop, ...] = (fused, device, host)
"""In the order in which they are tried."""

IN_TRANSFORM = "the call is inside torch.func transforms"
UNROLLED = "adjoint=Unroll() differentiates every step, which a graph cannot"


class Unavailable(RuntimeError):
    """route asks for a loop that cannot run.

    Attributes:
        reason: why not.
    """

    def __init__(self, route: str | None, what: str, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f'fixed_point: route="{route}" was asked for, but {what} cannot run there: {reason}. '
            'Use route=None or route="host"'
        )


def plan_of(
    g: Any,
    layout: Layout,
    options: Options,
    *,
    only_host: str | None = None,
    rehearse: bool = False,
) -> Plan:
    """What these three decide, once for solves of any numbers.

    Args:
        only_host: why it is the host's loop in any case.
        rehearse: look too for what a solve finds out by itself.
    Raises:
        ValueError: the backend cannot serve such a state, or not with such a history.
    """
    engine = backends.resolve(options.backend, layout.device, layout.dtype)
    options = options.storable(engine.name, layout.dtype)
    rowwise, whole = options.asks_rowwise(g), why_not_hoisted(g)
    request = Request(g, layout, options, engine, rowwise, whole)
    route = options.route
    against: list[str | None] = []
    for loop in LOOPS:
        if route not in (None, loop.name):
            against.append(f'route="{route}" asks for it')
        elif loop.why_not is None:
            against.append(None)
        else:
            against.append(only_host or loop.why_not(request, rehearse=rehearse))
    adjoint = options.adjoint
    solver = adjoint_solver(options, layout.dim) if isinstance(adjoint, Implicit) else None
    return Plan(layout, options, engine, rowwise, whole, solver, tuple(against))


def choose(plan: Plan, declined: tuple[Reason, ...] = ()) -> Choice:
    """The loop that runs, and why each one ahead of it does not.

    Args:
        declined: what the loops that were tried have said.
    Raises:
        Unavailable: route asks for one that cannot.
    """
    reasons = list(declined)
    for loop, reason in zip(LOOPS[len(declined) :], plan.against[len(declined) :], strict=True):
        if reason is None:
            return Choice(loop, tuple(reasons))
        reasons.append(Reason(loop.name, reason))
    route = plan.options.route
    raise Unavailable(route, "the solve", next(r.text for r in reasons if r.name == route))


def adjoint_of(solved: Solved, account: Account, record: AdjointRecord) -> LoopAdjoint | None:
    """How the loop that ran solves the adjoint too; None: the host does, as after any solve.

    Raises:
        Unavailable: route asks for one that cannot.
    """
    adjoint = solved.loop.adjoint
    if adjoint is None or not isinstance(solved.plan.options.adjoint, Implicit):
        return None
    try:
        return adjoint(solved, account)
    except Declined as reason:
        leave_adjoint_to_host(solved, record, str(reason))
        return None


def prepare(adjoint: LoopAdjoint, solved: Solved, account: Account, record: AdjointRecord) -> None:
    """Make an adjoint solve ready, after g was evaluated at the solution.

    Raises:
        Unavailable: route asks for one that cannot.
    """
    name = solved.loop.name
    try:
        reason = adjoint.prepare(solved.result.x, account)
    except Declined as declined:
        leave_adjoint_to_host(solved, record, str(declined))
    else:
        record.adjoint_route = Route(name) if reason is None else by_host(name, reason)


def leave_adjoint_to_host(solved: Solved, record: AdjointRecord, reason: str) -> None:
    """Note why the host solves the adjoint, unless it was asked not to."""
    route, name = solved.plan.options.route, solved.loop.name
    if route == name:
        raise Unavailable(route, "the adjoint", reason)
    record.adjoint_route = by_host(name, reason)


def by_host(name: str, reason: str) -> Route:
    """The host's, where one loop gave a reason."""
    return Route(host.name, (Reason(name, reason),))


__all__ = [
    "IN_TRANSFORM",
    "LOOPS",
    "UNROLLED",
    "Plan",
    "Solved",
    "Unavailable",
    "adjoint_of",
    "choose",
    "plan_of",
    "prepare",
]
