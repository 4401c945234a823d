"""Which loop runs a solve: all in one call of native code, on the device, or from the host."""

from __future__ import annotations

from typing import Any

from fpi_cuda import ops
from fpi_cuda.autograd import Account
from fpi_cuda.declined import Declined
from fpi_cuda.evaluation.shortcuts import why_not_hoisted
from fpi_cuda.evaluation.state import Layout
from fpi_cuda.loops import device, fused, host
from fpi_cuda.loops.plan import Loop, LoopAdjoint, Plan, Prepare, Solved
from fpi_cuda.options import Implicit
from fpi_cuda.request import Options
from fpi_cuda.solution import AdjointRecord, Route

LOOPS: tuple[Loop, ...] = (fused, device, host)
"""In the order in which they are tried."""

IN_TRANSFORM = "the call is inside torch.func transforms"
BEING_CAPTURED = "the call is itself being captured into a CUDA graph"
UNROLLED = "adjoint=Unroll() differentiates every step, which a graph cannot"


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
        Unavailable: route asks for a loop that cannot run.
    """
    engine = ops.resolve(options.backend, layout.device, layout.dtype)
    options = options.storable(engine.name, layout.dtype)
    solver = options.adjoint_solver(layout.dim)
    rowwise, whole = options.asks_rowwise(g), why_not_hoisted(g)
    plan = Plan(layout, options, engine, rowwise, whole, solver, host)
    return choose(g, plan, only_host=only_host, rehearse=rehearse)


def choose(g: Any, plan: Plan, *, only_host: str | None = None, rehearse: bool = False) -> Plan:
    """`plan` with the next loop that nothing speaks against, and what does against those ahead.

    Args:
        plan: with the reasons of loops that are out already.
        only_host, rehearse: see plan_of.
    Raises:
        Unavailable: route asks for one that cannot run.
    """
    route, reasons = plan.options.route, plan.reasons
    for loop in LOOPS[len(reasons) :]:
        reason = None
        if route not in (None, loop.name):
            reason = f'route="{route}" asks for it'
        elif loop.why_not is not None:
            reason = only_host or loop.why_not(g, plan, rehearse)
        if reason is None:
            return plan._replace(loop=loop, reasons=reasons)
        reasons = (*reasons, (loop.name, reason))
    assert route is not None  # else the host runs it
    raise Unavailable(route, "the solve", dict(reasons)[route])


def after_decline(g: Any, plan: Plan, reason: Declined) -> Plan:
    """`plan` with the loop that comes after its own."""
    return choose(g, plan._replace(reasons=(*plan.reasons, (plan.loop.name, str(reason)))))


def adjoint_of(solved: Solved, account: Account, record: AdjointRecord) -> LoopAdjoint | None:
    """How the loop that ran solves the adjoint too; None: the host does, as after any solve.

    Raises:
        Unavailable: route asks for one that cannot.
    """
    adjoint = solved.plan.loop.adjoint
    if adjoint is None or not isinstance(solved.plan.options.adjoint, Implicit):
        return None
    try:
        found = adjoint(solved, account)
    except Declined as reason:
        leave_adjoint_to_host(solved.plan, record, str(reason))
        return None
    if found.prepare is None:
        record.adjoint_route = Route(solved.plan.loop.name)
    return found


def prepare(by: Prepare, solved: Solved, account: Account, record: AdjointRecord) -> None:
    """Make an adjoint solve ready, after g was evaluated at the solution.

    Raises:
        Unavailable: route asks for one that cannot.
    """
    name = solved.plan.loop.name
    try:
        reason = by(solved.result.x, account)
    except Declined as declined:
        leave_adjoint_to_host(solved.plan, record, str(declined))
    else:
        record.adjoint_route = Route(name) if reason is None else by_host(name, reason)


def leave_adjoint_to_host(plan: Plan, record: AdjointRecord, reason: str) -> None:
    """Note why the host solves the adjoint, unless it was asked not to."""
    name = plan.loop.name
    if plan.options.route == name:
        raise Unavailable(name, "the adjoint", reason)
    record.adjoint_route = by_host(name, reason)


def by_host(name: str, reason: str) -> Route:
    """The host's, where one loop gave a reason."""
    return Route(host.name, ((name, reason),))


__all__ = [
    "BEING_CAPTURED",
    "IN_TRANSFORM",
    "LOOPS",
    "UNROLLED",
    "Plan",
    "Solved",
    "Unavailable",
    "adjoint_of",
    "after_decline",
    "plan_of",
    "prepare",
]
