"""The loop on the device: a CUDA graph repeats g and the solver's step, without the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fpi_cuda.autograd import Account, BoundMap, Jacobian, Linearization
from fpi_cuda.coupling import Coupling
from fpi_cuda.evaluation.shortcuts import why_not_captured
from fpi_cuda.loops.coupled import feels, retold
from fpi_cuda.loops.device.cache import PlanCache
from fpi_cuda.loops.device.cuda_graphs import CudaGraphs, Refused
from fpi_cuda.loops.device.plan import (
    AdjointPlan,
    Method,
    SolvePlan,
    key_of,
    read_on_device,
)
from fpi_cuda.loops.device.trace import Recorder, difference, require_repeatable, require_same
from fpi_cuda.loops.plan import Plan, Solved
from fpi_cuda.options import GMRES, ConjugateGradient
from fpi_cuda.solution import SolveResult

name = "device"
is_late = True
sees_all_rows = False
is_rowwise = False

plans = PlanCache()
"""The captured solves of this process: plans.memory() is what they hold, plans.clear() frees it."""

GRAPHS = {"cuda": CudaGraphs()}
"""What can capture, by device type."""

COUPLED = (
    "its rows depend on one another, and the host solves them as one sample (batch_dims=0 makes "
    "them one from the start)"
)


def why_not(g: Any, plan: Plan, rehearse: bool) -> str | None:
    """See Loop."""
    kind = plan.layout.device.type
    if kind not in GRAPHS:
        return f"the state is on {kind}, which has no CUDA graphs"
    return GRAPHS[kind].why_not() or why_not_captured(g) if rehearse else None


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
            raise Refused("it is the first of its kind; it is captured when it comes again")
        captured = SolvePlan(key, bound_map, x0, method, graphs)
        captured.warm_up(*given)
        with plans.made(captured):
            result = captured.build(*given)
    if coupling is not None:
        # Told by g of all rows together. The host waits only where nothing is known of them.
        gx = bound_map.evaluate(result.x, None)
        alone = result
        result = retold(alone, gx, options.atol, options.rtol, by_other_code=True)
        if not coupling.independent:
            if feels(result, alone, gx):
                coupling.depends()
                raise Refused(COUPLED, passing=True)
            coupling.is_independent()
    return result, graphs


def adjoint(solved: Solved, account: Account) -> DeviceAdjoint:
    """See Loop."""
    plan, solver = solved.plan, solved.plan.adjoint_solver
    if isinstance(solver, (GMRES, ConjugateGradient)):
        raise Refused(f"{solver} runs on the host")
    method = Method(solver, 0.0, plan.options.adjoint_steps, plan.engine)
    return DeviceAdjoint(solved.bound_map, method, solved.kept)


@dataclass(eq=False)
class DeviceAdjoint:
    """Solves c = J^T c + b at the solution of one call, where that can be done on the device.

    The plan is made in the forward pass: autograd's threads must not capture. Every backward pass
    tests it by the trace of what the forward pass evaluated, and of the first product J^T b.

    Attributes:
        bound_map: g, plain.
        method: of the adjoint solve.
        recorder: of the evaluation that is differentiated, once that was made.
    """

    bound_map: BoundMap
    method: Method
    graphs: CudaGraphs
    recorder: Recorder | None = None

    @property
    def evaluate(self) -> BoundMap:
        """g, written down where it is evaluated with a graph."""
        return self.bound_map.recorded(self._record)

    def _record(self, evaluate: Callable[[Any], Any], state: Any) -> Any:
        """evaluate(state), written down where it is the one that will be differentiated."""
        differentiated = torch.is_grad_enabled() and any(
            t.requires_grad for t in pytree.tree_leaves(state)
        )
        if self.recorder is not None or not differentiated:
            return evaluate(state)
        recorder = Recorder(self.bound_map.layout.device, read_on_device(self.bound_map))
        result = recorder.record(evaluate, state)
        self.recorder = recorder
        return result

    def prepare(self, x_star: Tensor, account: Account) -> str | None:
        """See to it that there is a plan, made now if need be.

        Returns:
            Why it is left to the host this once; None: it is not.
        Raises:
            Refused: there can be no plan.
        """
        if not account.late and account.failed_forward is not None:
            self.recorder = None
            return "some samples of the latest solve failed, and their part of g was left out"
        if self.recorder is None:
            raise Refused("g was not evaluated with a graph")
        with torch.no_grad(), self.bound_map.context.solving():
            self._require_plan(x_star, self.recorder)
        return None

    def _require_plan(self, x_star: Tensor, recorder: Recorder) -> None:
        require_repeatable(recorder, self.bound_map)
        key = key_of("adjoint", self.bound_map, self.method)
        known = plans.refusal(key)
        if known is not None:
            raise Refused(known)
        idle = cast("AdjointPlan | None", plans.take(key))
        if idle is None and plans.has(key):
            return
        if idle is not None:
            try:
                require_same(recorder, idle.calls_at_point)
            except Refused as reason:
                if not plans.outgrown(idle, reason):
                    raise
            else:
                plans.give_back(idle)
                return
        plan = AdjointPlan(key, self.bound_map, x_star, self.method, self.graphs)
        with plans.made(plan):
            plan.build(self.bound_map, x_star)
            found = difference(recorder.calls, plan.calls_at_point)
            if found is not None:
                raise Refused(f"g at the solution is another computation than on copies: {found}")

    def solve(self, matrix: Jacobian, b: Tensor, atol: Tensor) -> SolveResult | None:
        """c (B, D) with ||J^T c + b - c|| <= atol (B,); None where the host has to do it."""
        recorder = self.recorder
        if (
            recorder is None
            or type(matrix) is not Linearization
            or not recorder.knows(matrix.x)
            or recorder.changed()
            or self.graphs.why_not() is not None
        ):
            return None
        key = key_of("adjoint", self.bound_map, self.method)
        with contextlib.suppress(Refused):
            return plans.solve(key, self.bound_map, recorder, matrix, b, atol)
        return None
