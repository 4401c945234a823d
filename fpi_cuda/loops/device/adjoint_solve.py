"""The adjoint solve of one call on the device: planned in the forward pass, run in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fpi_cuda.autograd import Account, BoundMap, Jacobian, Linearization
from fpi_cuda.loops import iteration
from fpi_cuda.loops.device.cache import Key, PlanCache
from fpi_cuda.loops.device.graphs import Graphs, Refused
from fpi_cuda.loops.device.method import Method, key_of
from fpi_cuda.loops.device.plan import AdjointPlan
from fpi_cuda.loops.device.planner import failures_refused, lent, require_agreement
from fpi_cuda.loops.device.trace import Recorder, difference, require_repeatable
from fpi_cuda.norms import row_norm
from fpi_cuda.solution import SolveResult

FAILED_SAMPLES = "some samples of the latest solve failed, and their part of g was left out"


class DeviceAdjoint:
    """Solves c = J^T c + b at the solution of one call, where that can be done on the device.

    The plan is made in the forward pass: autograd's threads must not capture. Every backward pass
    tests it by the trace of what the forward pass evaluated, and of the first product J^T b.

    Args:
        bound_map: g, plain.
        method: of the adjoint solve.
    Attributes:
        evaluate: g, written down where it is evaluated.
    """

    def __init__(
        self, bound_map: BoundMap, method: Method, graphs: Graphs, cache: PlanCache
    ) -> None:
        self._bound_map = bound_map
        self._method = method
        self._graphs = graphs
        self._cache = cache
        self._recorder: Recorder | None = None
        self.evaluate = bound_map.recorded(self._record)

    def _record(self, evaluate: Callable[[Any], Any], state: Any) -> Any:
        """evaluate(state), written down where it is the one that will be differentiated."""
        differentiated = torch.is_grad_enabled() and any(
            t.requires_grad for t in pytree.tree_leaves(state)
        )
        if self._recorder is not None or not differentiated:
            return evaluate(state)
        recorder = self._new_recorder()
        result = recorder.record(evaluate, state)
        self._recorder = recorder
        return result

    def prepare(self, x_star: Tensor, account: Account) -> str | None:
        """See to it that there is a plan, made now if need be.

        Returns:
            Why it is left to the host this once; None: it is not.
        Raises:
            Refused: there can be no plan.
        """
        if not account.late and account.hopeless is not None:
            self._recorder = None
            return FAILED_SAMPLES
        with torch.no_grad(), self._bound_map.replay.solving():
            self._require_plan(x_star)
        return None

    def _require_plan(self, x_star: Tensor) -> None:
        recorder = self._recorder
        if recorder is None:
            raise Refused("g was not evaluated with a graph")
        require_repeatable(recorder, self._bound_map)
        key = self._key()
        known = self._cache.refusal(key)
        if known is not None:
            raise Refused(known)
        plan = cast("AdjointPlan | None", self._cache.take(key))
        if plan is not None and plan.calls_at_x == recorder.calls:
            self._cache.give_back(plan)
            return
        try:
            if plan is not None:
                self._drop(plan)
            elif self._cache.has(key):
                return
            self._build(key, recorder, x_star)
        except Refused as reason:
            self._cache.refuse(key, reason)
            raise

    def solve(self, matrix: Jacobian, b: Tensor, atol: Tensor) -> SolveResult | None:
        """c (B, D) with ||J^T c + b - c|| <= atol (B,); None where the host has to do it."""
        recorder = self._recorder
        if (
            recorder is None
            or type(matrix) is not Linearization
            or not recorder.knows(matrix.x)
            or recorder.changed()
            or self._graphs.why_not() is not None
        ):
            return None
        key = self._key()
        plan = cast("AdjointPlan | None", self._cache.take(key))
        if plan is None:
            return None
        try:
            with lent(plan, self._cache):
                result = plan.solve(self._bound_map, recorder, matrix, b, atol)
        except Refused as reason:
            if not self._cache.count_rebuild(key):
                self._cache.refuse(key, reason)
            return None
        self._cache.give_back(plan, fitted=True)
        return result

    def _drop(self, plan: AdjointPlan) -> None:
        found = difference(self._recorder.calls if self._recorder else [], plan.calls_at_x)
        self._cache.discard(plan)
        if not self._cache.count_rebuild(plan.key):
            raise Refused(f"g is another computation than when it was captured: {found}")

    def _build(self, key: Key, recorder: Recorder, x_star: Tensor) -> None:
        b = probe_like(x_star)
        atol = self._rtol() * row_norm(b)
        plan = AdjointPlan(key, self._bound_map, x_star, self._method, self._graphs)
        self._cache.lend(plan)
        with lent(plan, self._cache), failures_refused(), torch.no_grad():
            result, matrix = plan.build(self._bound_map, x_star, b, atol)
            require_agreement(result, self._on_host(matrix, b, atol))
            found = difference(recorder.calls, plan.calls_at_x)
            if found is not None:
                raise Refused(f"g at the solution is another computation than on copies: {found}")
        self._cache.give_back(plan)

    def _on_host(self, matrix: Linearization, b: Tensor, atol: Tensor) -> SolveResult:
        method = self._method
        return iteration.solve(
            lambda c, rows: matrix.transposed(c) + b,
            b,
            method.solver,
            rtol=method.rtol,
            atol=atol,
            max_steps=method.max_steps,
            backend=method.backend,
        )

    def _rtol(self) -> float:
        # The check of a plan wants many steps; what backward asks for is passed to solve.
        return 1e-4

    def _new_recorder(self) -> Recorder:
        device = self._bound_map.layout.device
        read = pytree.tree_leaves(self._bound_map.read)
        named = [t for t in read if isinstance(t, Tensor) and t.device == device]
        return Recorder(device, named)

    def _key(self) -> Key:
        return key_of("adjoint", self._bound_map, self._method, with_graph=True)


def probe_like(x: Tensor) -> Tensor:
    """(B, D) with every number in [-1, 1] and no symmetry that an error could hide behind."""
    angle = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device)
    return angle.mul_(0.754877666).sin_().reshape(x.shape).to(x.dtype)
