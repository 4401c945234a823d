"""The loop on the device: a CUDA graph repeats g and the solver's step, without the host."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fpi_cuda.autograd import Account, BoundMap
from fpi_cuda.coupling import Coupling
from fpi_cuda.evaluation.shortcuts import why_not_captured
from fpi_cuda.loops.coupled import feels, retold
from fpi_cuda.loops.device.adjoint_solve import DeviceAdjoint
from fpi_cuda.loops.device.cache import PlanCache
from fpi_cuda.loops.device.cuda_graphs import CudaGraphs, Refused
from fpi_cuda.loops.device.plan import Method, SolvePlan, key_of
from fpi_cuda.loops.plan import Plan, Solved
from fpi_cuda.options import GMRES, ConjugateGradient
from fpi_cuda.request import Options
from fpi_cuda.solution import SolveResult

name = "device"
is_late = True
sees_all_rows = False

plans = PlanCache()
"""The captured solves of this process: plans.memory() is what they hold, plans.clear() frees it."""

GRAPHS = {"cuda": CudaGraphs()}
"""What can capture, by device type."""

FIRST_SIGHT = "it is the first of its kind; it is captured when it comes again"
COUPLED = (
    "its rows depend on one another, and the host solves them as one sample (batch_dims=0 makes "
    "them one from the start)"
)


def why_not(g: Any, plan: Plan, rehearse: bool) -> str | None:
    """See Loop."""
    device = plan.layout.device
    graphs = GRAPHS.get(device.type)
    if graphs is None:
        return f"the state is on {device.type}, which has no CUDA graphs"
    return graphs.why_not() or why_not_captured(g) if rehearse else None


def solve(
    plan: Plan, bound_map: BoundMap, x0: Tensor, coupling: Coupling | None
) -> tuple[SolveResult, CudaGraphs]:
    """See Loop.

    A plan's first solve is checked against the host loop; every later one against the trace of
    one evaluation of g, which is its first step.
    """
    options, graphs = plan.options, GRAPHS[x0.device.type]
    if coupling is not None and coupling.suspected:
        raise Refused(COUPLED)
    empty = None if len(x0) else "the batch is empty"
    reason = why_not_captured(bound_map.g) or empty or graphs.why_not()
    if reason is None:
        method = Method(options.solver, options.rtol, options.max_steps, plan.engine)
        key = key_of("solve", bound_map, method)
        reason = plans.refusal(key)
    if reason is not None:
        raise Refused(reason)
    given = (bound_map, x0, options.atol)
    result = plans.solve(key, *given)
    if result is None:
        if plans.first_sight(key) and options.route != name:
            raise Refused(FIRST_SIGHT)
        captured = SolvePlan(key, bound_map, x0, method, graphs)
        captured.warm_up(*given)
        with plans.made(captured):
            result = captured.build(*given)
    if coupling is not None:
        result = true_of_all_rows(result, bound_map, options, coupling)
    return result, graphs


def true_of_all_rows(
    result: SolveResult, bound_map: BoundMap, options: Options, coupling: Coupling
) -> SolveResult:
    """`result` of rows on their own, told by g of all of them together.

    The host waits for it only where nothing is known of the rows.

    Raises:
        Refused: they depend on one another.
    """
    gx = bound_map.evaluate(result.x, None)
    told = retold(result, gx, options.atol, options.rtol, by_other_code=True)
    if coupling.independent:
        return told
    if feels(told, result, gx):
        coupling.depends()
        raise Refused(COUPLED, passing=True)
    coupling.is_independent()
    return told


def adjoint(solved: Solved, account: Account) -> DeviceAdjoint:
    """See Loop."""
    plan, solver = solved.plan, solved.plan.adjoint_solver
    if isinstance(solver, (GMRES, ConjugateGradient)):
        raise Refused(f"{solver} runs on the host")
    method = Method(solver, 0.0, plan.options.adjoint_steps, plan.engine)
    return DeviceAdjoint(solved.bound_map, method, solved.kept, plans)
