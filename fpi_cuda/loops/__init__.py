"""Which loop runs a solve: all in one call of native code, on the device, or from the host."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import nn

from fpi_cuda import ops
from fpi_cuda.declined import Declined
from fpi_cuda.evaluation.shortcuts import asks_rowwise, why_not_hoisted
from fpi_cuda.evaluation.state import Layout
from fpi_cuda.loops import device, fused, host
from fpi_cuda.loops.plan import Loop, Plan, Solved, Unavailable
from fpi_cuda.options import Options

LOOPS: tuple[Loop, ...] = (fused, device, host)
"""In the order in which they are tried."""

IN_TRANSFORM = "the call is inside torch.func transforms"
BEING_CAPTURED = "the call is itself being captured into a CUDA graph"
UNROLLED = "adjoint=Unroll() differentiates every step, which a graph cannot"


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
    plain = only_host is None and not rehearse and is_plain_map(g)
    plain = plain and layout.device.type not in device.GRAPHS
    engine = ops.resolve(options.backend, layout.device, layout.dtype)
    key, asked = (type(g), id(options), id(layout)), options
    if plain:
        found, known = plans.get(key, (None, None))
        # Another may have the number of an object that is gone; its layout the plan holds.
        if known is not None and found is options and known.engine is engine:
            return known
    options = options.storable(engine.name, layout.dtype)
    solver = options.adjoint_solver(layout.dim)
    rowwise, whole = asks_rowwise(g, options.rowwise, options.batch_dims), why_not_hoisted(g)
    plan = Plan(layout, options, engine, rowwise, whole, solver, host)
    plan = choose(g, plan, only_host=only_host, rehearse=rehearse)
    if plain:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plans[key] = asked, plan
    return plan


MODULE_GETATTR = nn.Module.__getattr__
ASKED_FOR = ("prepare", "step", "lower", "rowwise")
"""What a map may have besides a call."""


def is_plain_map(g: Any) -> bool:
    """Whether g is a function or a module that has none of ASKED_FOR."""
    if type(g) is FunctionType:
        return not g.__dict__
    if not isinstance(g, nn.Module) or type(g).__getattr__ is not MODULE_GETATTR:
        return False
    kind, own = type(g), g.__dict__
    for name in ASKED_FOR:
        if hasattr(kind, name) or name in own or name in own["_modules"]:
            return False
    return "rowwise" not in own["_buffers"] and "rowwise" not in own["_parameters"]


MOST_PLANS = 256

plans: dict[tuple[type, int, int], tuple[Options, Plan]] = {}
"""Those of maps that are nothing but called, of which a plan depends on no more than their type."""


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


__all__ = [
    "BEING_CAPTURED",
    "IN_TRANSFORM",
    "LOOPS",
    "UNROLLED",
    "Plan",
    "Solved",
    "Unavailable",
    "after_decline",
    "plan_of",
]
