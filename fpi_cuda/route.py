"""Which way a solve goes: by the fused loop, the loop on the device, or the host's."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda import device_loop
from fpi_cuda.adjoint import adjoint_method, adjoint_solver
from fpi_cuda.capturing import being_captured
from fpi_cuda.coupling import Coupling
from fpi_cuda.device_loop import DeviceAdjoint, Graphs, Method, Refused
from fpi_cuda.faithful import counting_changes
from fpi_cuda.fused import (
    FusedAdjoint,
    fused_map,
    require_same_as_step,
    why_no_fused_adjoint,
    why_not_worth,
)
from fpi_cuda.fused_evaluation import FusedEvaluation
from fpi_cuda.implicit import Account, DeviceSolve, FlatMap
from fpi_cuda.lowered import NotLowered
from fpi_cuda.options import Implicit
from fpi_cuda.request import Options
from fpi_cuda.result import AdjointRecord, Route, SolveResult
from fpi_cuda.shortcuts import why_not_captured
from fpi_cuda.solvers.coupled import feels, retold
from fpi_cuda.solvers.fused import FusedMap, no_deeper, solve_fused, why_not_served
from fpi_cuda.solvers.loop import solve
from fpi_cuda.solvers.stepping import Backend

HOST_ASKED_FOR = 'route="host" asks for it'
BEING_CAPTURED = "the call is itself being captured into a CUDA graph"
IN_TRANSFORM = "the call is inside torch.func transforms"
FAILED_SAMPLES = "some samples of the latest solve failed, and their part of g was left out"
COUPLED = (
    "its rows depend on one another, and the host solves them as one sample (batch_dims=0 makes "
    "them one from the start)"
)
UNCONFIRMED = "step() is not within the tolerance where lower() was"
UNROLLED = "adjoint=Unroll() differentiates every step, which a graph cannot"


class Course:
    """The way of one solve and of its adjoint: fused, else on the device, where it can be had.

    Args:
        flat_map: g, plain.
        engine: whose kernels take the steps.
        record: where the way that was taken is written down, with the reason.
        coupling: what is known of whether rows depend on one another; None: they do not.
        rowwise: that was promised.
    """

    def __init__(
        self,
        flat_map: FlatMap,
        options: Options,
        engine: Backend,
        record: AdjointRecord,
        coupling: Coupling | None,
        rowwise: bool,
    ) -> None:
        self._flat_map = flat_map
        self._options = options
        self._engine = engine
        self.record = record
        self.coupling = coupling
        self._rowwise = rowwise
        self._graphs: Graphs | None = None
        self._adjoint: DeviceAdjoint | None = None
        self._fused: FusedMap | None = None
        self._fused_at: Tensor
        self._fused_adjoint: FusedAdjoint | None = None
        self._evaluation: FusedEvaluation | None = None

    @property
    def leaves_the_host_alone(self) -> bool:
        """Whether the device solved, so that reading a result would make the host wait.

        g was the same at every step then, for the trace of each solve is compared.
        """
        return self._graphs is not None

    @property
    def on_device(self) -> DeviceSolve | None:
        """What solves the adjoint in one call, to be tried first; None where nothing does."""
        adjoint = self._fused_adjoint or self._adjoint
        return None if adjoint is None else adjoint.solve

    def solve(self, x0: Tensor) -> SolveResult:
        """The fixed point from x0 (B, D), plain; under no_grad.

        Raises:
            RuntimeError: route="fused" or "device" asks for what cannot be had.
        """
        options = self._options
        try:
            result = self._solve_fused(x0)
        except NotLowered as reason:
            if options.route == "fused":
                require_host_allowed(options, "the solve", str(reason))
            not_fused = str(reason)
        else:
            self.record.route = Route("fused")
            return result
        method = Method(options.solver, options.rtol, options.max_steps, self._engine)
        try:
            graphs = self._require_graphs(x0.device)
            result = device_loop.solve(
                self._flat_map,
                x0,
                method,
                atol=options.atol,
                graphs=graphs,
                cache=device_loop.plans,
                at_once=options.route == "device",
                rowwise=self.may_take_rows,
            )
            result = self._true_of_all_rows(result)
        except Refused as reason:
            require_host_allowed(options, "the solve", str(reason))
            self.record.route = Route("host", not_taken(not_fused, str(reason)))
        else:
            self._graphs = graphs
            self.record.route = Route("device")
            return result
        with counting_changes():
            return solve(
                self._flat_map.evaluate,
                x0,
                options.solver,
                rtol=options.rtol,
                atol=options.atol,
                max_steps=options.max_steps,
                backend=self._engine,
                rowwise=self.may_take_rows,
                coupling=self.coupling,
                arithmetic=self._flat_map.arithmetic,
            )

    def _solve_fused(self, x0: Tensor) -> SolveResult:
        options, flat_map = self._options, self._flat_map
        if options.route not in (None, "fused"):
            raise NotLowered(f'route="{options.route}" asks for it')
        if being_captured(x0.device):
            raise NotLowered(BEING_CAPTURED)
        fused = fused_map(flat_map, self._engine, options.solver, rowwise=self._rowwise)
        if options.route is None:
            reason = why_not_worth(fused, self._engine, options.solver, len(x0), options.precision)
            if reason is not None:
                raise NotLowered(reason)
        result = solve_fused(
            fused.lowered,
            x0,
            options.solver,
            rtol=options.rtol,
            atol=options.atol,
            max_steps=options.max_steps,
            backend=self._engine,
            precision=options.precision,
        )
        gx = require_same_as_step(flat_map, fused, result.x)
        if gx is not None:
            # Terms that cancel may hide a difference in their rounding.
            told = retold(result, gx, options.atol, options.rtol, by_other_code=True)
            if bool((told.status != result.status).any()):
                raise NotLowered(UNCONFIRMED)
            result = told
        self._fused, self._fused_at = fused, result.x
        return result

    def plan_fused_adjoint(self, account: Account) -> None:
        """See to it that the adjoint of a fused solve is one too, if its solver has such a loop.

        Raises:
            RuntimeError: route="fused" asks for what cannot be had.
        """
        options, layout = self._options, self._flat_map.layout
        if self._fused is None or not isinstance(options.adjoint, Implicit):
            return
        solver = adjoint_solver(options, options.adjoint, layout.dim)
        if options.adjoint.solver is None:
            solver = no_deeper(solver, self._engine)
        reason = why_not_served(solver, layout.dtype, self._engine)
        if reason is None:
            reason = why_no_fused_adjoint(self._flat_map, self._fused, self._fused_at)
        if reason is not None:
            require_host_allowed(options, "the adjoint", reason)
            self.record.adjoint_route = Route("host", reason)
            return
        if account.hopeless is None:
            self._evaluation = FusedEvaluation(self._flat_map, self._engine)
        self._fused_adjoint = FusedAdjoint(
            self._fused,
            solver,
            options.adjoint.max_steps or options.max_steps,
            self._engine,
            options.precision,
            account.hopeless,
            self._evaluation,
        )
        self.record.adjoint_route = Route("fused")

    def for_adjoint(self, flat_map: FlatMap) -> FlatMap:
        """`flat_map`, recorded if its adjoint is to be fused or solved on the device."""
        if self._evaluation is not None:
            return flat_map.recorded(self._evaluation.record)
        if self._graphs is None:
            return flat_map
        try:
            method = adjoint_method(self._options, self._engine, flat_map.layout.dim)
        except Refused as reason:
            self._adjoint_on_host(reason)
            return flat_map
        if method is None:
            return flat_map
        self._adjoint = DeviceAdjoint(flat_map, method, self._graphs, device_loop.plans)
        return flat_map.recorded(self._adjoint.record)

    def prepare_adjoint(self, x_star: Tensor, account: Account) -> None:
        """Plan the adjoint solve at x_star (B, D), after its g was evaluated there.

        Raises:
            RuntimeError: route="device" asks for what cannot be had.
        """
        if self._adjoint is None:
            return
        if not account.late and account.hopeless is not None:
            self._adjoint.skip()
            self.record.adjoint_route = Route("host", FAILED_SAMPLES)
            return
        try:
            with torch.no_grad(), self._flat_map.replay.solving():
                self._adjoint.prepare(x_star)
        except Refused as reason:
            self._adjoint_on_host(reason)
        else:
            self.record.adjoint_route = Route("device")

    def _adjoint_on_host(self, reason: Refused) -> None:
        require_host_allowed(self._options, "the adjoint", str(reason))
        self.record.adjoint_route = Route("host", str(reason))

    def _true_of_all_rows(self, result: SolveResult) -> SolveResult:
        """`result` of rows on their own, told by g of all of them together.

        The host waits for it only where nothing is known of the rows.

        Raises:
            Refused: they depend on one another.
        """
        coupling = self.coupling
        if coupling is None:
            return result
        gx = self._flat_map.evaluate(result.x, None)
        options = self._options
        told = retold(result, gx, options.atol, options.rtol, by_other_code=True)
        if coupling.independent:
            return told
        if feels(told, result, gx):
            coupling.depends()
            raise Refused(COUPLED, passing=True)
        coupling.is_independent()
        return told

    @property
    def may_take_rows(self) -> bool:
        """Whether the host loop leaves stopped samples out."""
        flat_map = self._flat_map
        return flat_map.layout.batch > 1 and self._rowwise and flat_map.selectable()

    @property
    def compared_with_step(self) -> bool:
        """Whether g was evaluated on all rows at the solution."""
        return self._fused is not None

    def _require_graphs(self, device: torch.device) -> Graphs:
        if self._options.route == "host":
            raise Refused(HOST_ASKED_FOR)
        graphs = device_loop.graphs_for(device)
        if self.coupling is not None and self.coupling.suspected:
            raise Refused(COUPLED)
        reason = why_not_captured(self._flat_map.g)
        if reason is not None:
            raise Refused(reason)
        return graphs


def not_taken(not_fused: str, not_on_device: str) -> str:
    """Why neither way was taken; once, where it is the same reason."""
    if not_fused == not_on_device:
        return not_fused
    return f"not fused: {not_fused}; not on the device: {not_on_device}"


def require_host_allowed(options: Options, what: str, reason: str) -> None:
    """Raise unless the host may do what another way cannot."""
    if options.route in ("device", "fused"):
        raise RuntimeError(
            f'fixed_point: route="{options.route}" was asked for, but {what} cannot run there: '
            f'{reason}. Use route=None or route="host"'
        )
