"""Which way a solve goes: by the host loop, or by the loop on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fpi_cuda import device_loop
from fpi_cuda.adjoint import adjoint_method
from fpi_cuda.device_loop import DeviceAdjoint, Graphs, Method, Refused
from fpi_cuda.implicit import Account, DeviceSolve, FlatMap
from fpi_cuda.request import Options
from fpi_cuda.result import AdjointRecord, Route, SolveResult
from fpi_cuda.solvers.loop import Backend, solve

HOST_ASKED_FOR = 'route="host" asks for it'
IN_TRANSFORM = "the call is inside torch.func transforms"
FAILED_SAMPLES = "some samples of the latest solve failed, and their part of g was left out"
UNROLLED = "adjoint=Unroll() differentiates every step, which a graph cannot"


class Course:
    """The way of one solve and of its adjoint: the device's where it can be had.

    Args:
        flat_map: g, plain.
        engine: whose kernels take the steps.
        record: where the way that was taken is written down, with the reason.
    """

    def __init__(
        self, flat_map: FlatMap, options: Options, engine: Backend, record: AdjointRecord
    ) -> None:
        self._flat_map = flat_map
        self._options = options
        self._engine = engine
        self._record = record
        self._graphs: Graphs | None = None
        self._adjoint: DeviceAdjoint | None = None

    @property
    def on_device(self) -> DeviceSolve | None:
        """What solves the adjoint on the device, to be tried first; None where nothing does."""
        return None if self._adjoint is None else self._adjoint.solve

    def solve(self, x0: Tensor) -> SolveResult:
        """The fixed point from x0 (B, D), plain; under no_grad.

        Raises:
            RuntimeError: route="device" asks for what cannot be had.
        """
        options = self._options
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
            )
        except Refused as reason:
            require_host_allowed(options, "the solve", str(reason))
            self._record.route = Route("host", str(reason))
        else:
            self._graphs = graphs
            self._record.route = Route("device")
            return result
        return solve(
            self._flat_map.evaluate,
            x0,
            options.solver,
            rtol=options.rtol,
            atol=options.atol,
            max_steps=options.max_steps,
            backend=self._engine,
            rowwise=options.asks_rowwise(self._flat_map.g) and self._flat_map.selectable(),
        )

    def for_adjoint(self, flat_map: FlatMap) -> FlatMap:
        """`flat_map`, recorded if its adjoint is to be solved on the device."""
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
        if account.hopeless is not None:
            self._adjoint.skip()
            self._record.adjoint_route = Route("host", FAILED_SAMPLES)
            return
        try:
            with torch.no_grad(), self._flat_map.replay.solving():
                self._adjoint.prepare(x_star)
        except Refused as reason:
            self._adjoint_on_host(reason)
        else:
            self._record.adjoint_route = Route("device")

    def _adjoint_on_host(self, reason: Refused) -> None:
        require_host_allowed(self._options, "the adjoint", str(reason))
        self._record.adjoint_route = Route("host", str(reason))

    def _require_graphs(self, device: torch.device) -> Graphs:
        if self._options.route == "host":
            raise Refused(HOST_ASKED_FOR)
        return device_loop.graphs_for(device)


def require_host_allowed(options: Options, what: str, reason: str) -> None:
    """Raise unless the host may do what the device cannot."""
    if options.route == "device":
        raise RuntimeError(
            f'fixed_point: route="device" was asked for, but {what} cannot run there: {reason}. '
            'Use route=None or route="host"'
        )
