"""FPILayer: a fixed point as a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.state import STATE_DTYPES, require_known, require_map, why_not_dense
from fpi_cuda.explain import explain
from fpi_cuda.fixed_point import detached, solve_as_told, solve_untraced
from fpi_cuda.options import Adjoint, Anderson, FixedPointSolver, Implicit, Options
from fpi_cuda.solution import Solution
from fpi_cuda.unconverged import Notice

NOT_ALWAYS_SHOWN = (
    "atol", "max_steps", "adjoint", "backend", "batch_dims", "rowwise", "route", "precision",
    "throw",
)  # fmt: skip
"""Options that repr shows where they are not the default."""


class FPILayer(nn.Module):
    """x = g(x, *z), solved for x in the forward pass; see fixed_point.

        layer = FPILayer(cells.Dense(z_features=64, x_features=128))
        x = layer(z)  # z (B, 64) -> x (B, 128)
        x = layer(z, x0=x)  # a warm start
        layer.solve(z).converged  # (B,) bool

    A call takes the inputs z of g, the first with the batch in dim 0, and returns x: like the
    state, (B, ...) or a tuple of such tensors. The solve starts, in this order, from the x0 that
    the call is given, init(*z), zeros of state_shape, zeros with g.x_features in the last
    dimension of z, or zeros like z. The zeros have the batch and the device of z, and the wider
    of the dtypes of z and of g's parameters.

    A layer warns once of samples that have not converged, and once of adjoint solves that have
    not (FixedPointWarning); a copy of it is another layer.

    Args:
        g: g(x, *z) -> like x. A module becomes a submodule.
        state_shape: of one sample, without the batch: a tuple of ints (or an int); for a tuple
            state, a tuple of such tuples. With batch_dims=0, of the whole state.
        init: init(*z) -> x0, the batch included. A module becomes a submodule. It gets a
            gradient with adjoint=Unroll() only, for the fixed point does not depend on x0.
        solver, rtol, atol, max_steps, adjoint, backend, batch_dims, rowwise, route, precision,
            throw: as in fixed_point.
    Attributes:
        last_solution: Solution of the latest call by any thread, without its graph; None before
            the first, after copying or unpickling, and after a call inside torch.func
            transforms. Its value shares memory with the one returned, and its adjoint_stats
            appear once backward has run.
    Raises:
        TypeError, ValueError: an option that makes no sense.
    """

    _sensible: Options | None = None
    """The options that were checked last: somebody may have put others in their place."""

    def __init__(
        self,
        g: Callable[..., Any],
        *,
        state_shape: int | Sequence[Any] | None = None,
        init: Callable[..., Any] | None = None,
        solver: FixedPointSolver = Anderson(),  # noqa: B008
        rtol: float = 1e-4,
        atol: float = 0.0,
        max_steps: int = 100,
        adjoint: Adjoint = Implicit(),  # noqa: B008
        backend: str | None = None,
        batch_dims: int = 1,
        rowwise: bool | None = None,
        route: str | None = None,
        precision: str = "ieee",
        throw: bool = False,
        **unknown: Any,
    ) -> None:
        require_known("FPILayer", FPILayer.__init__, unknown)
        require_map("FPILayer", g)
        super().__init__()
        if init is not None and not callable(init):
            raise TypeError(f"FPILayer: init must be a function of z, got {type(init).__name__}")
        if init is not None and state_shape is not None:
            raise ValueError("FPILayer: give state_shape or init, not both")
        self.options = Options(
            solver, rtol, atol, max_steps, adjoint, backend, rowwise, throw, route, precision,
            batch_dims,
            notice=Notice(f"FPILayer({getattr(g, '__name__', type(g).__name__)})"),
        )  # fmt: skip
        self.options.require_sensible("FPILayer")
        self._sensible = self.options
        self.g = g
        self.init = init
        self.state_shape = None if state_shape is None else checked_shape(state_shape)
        self.last_solution: Solution | None = None
        self._last_state: tuple[torch.device, torch.dtype] | None = None

    def forward(self, *z: Tensor, x0: Any = None) -> Any:
        """The fixed point: a tensor (B, ...), or a tuple of them.

        Args:
            z: inputs of g.
            x0: where to start, such as an earlier result; None for the layer's own start.
        """
        return self.solve(*z, x0=x0).value

    def solve(self, *z: Tensor, x0: Any = None) -> Solution:
        """The fixed point and how it was reached; arguments as in forward."""
        start = self.start(*z) if x0 is None else x0
        options = self.options
        if options is not self._sensible:
            options.require_sensible("FPILayer")
            self._sensible = options
        run = solve_untraced if torch.compiler.is_dynamo_compiling() else solve_as_told
        solution = run(self.g, start, z, options)
        first = solution.value[0] if isinstance(solution.value, tuple) else solution.value
        latest = None if transforms.active() else detached(solution)
        # Not by the module's own, which looks for parameters among what it is given.
        object.__setattr__(self, "_last_state", (first.device, first.dtype))
        object.__setattr__(self, "last_solution", latest)
        return solution

    def start(self, *z: Tensor) -> Any:
        """The x0 of a call that is given none."""
        if self.init is not None:
            return self.init(*z)
        batch_dims = self.options.batch_dims
        like: Any = z[0] if z else None
        if not isinstance(like, Tensor) or like.dim() < batch_dims:
            given = "no z" if not z else f"z[0] = {type(z[0]).__name__}"
            if z and isinstance(z[0], Tensor):
                given = "z[0] of shape ()"
            raise TypeError(
                "FPILayer: the first z must be a tensor with the batch in dim 0, to start from "
                f"zeros, got {given}. Convert it with torch.as_tensor, pass x0, or give the layer "
                "an init"
            )
        dtype = self._state_dtype(like)
        found = why_not_dense(like)
        if self.state_shape is None:
            if found is not None:
                raise TypeError(
                    f"FPILayer: cannot start from zeros like z[0], which is {found[0]}: give the "
                    "layer a state_shape or an init, or pass x0"
                )
            features = getattr(self.g, "x_features", None)
            if features is not None:
                return like.new_zeros((*like.shape[:-1], features), dtype=dtype)
            return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)

        def zeros(*shape: int) -> Tensor:
            if found is not None:
                batch = [like.size(0)] if batch_dims else []
                return torch.zeros(*batch, *shape, dtype=dtype, device=like.device)
            return like.new_zeros((*like.shape[:batch_dims], *shape), dtype=dtype)

        shapes = self.state_shape
        if shapes and isinstance(shapes[0], tuple):
            return tuple(zeros(*shape) for shape in shapes)
        return zeros(*shapes)

    def explain(self) -> str:
        """Which way a solve goes and why, one line per choice.

        It is that of the device and dtype of the latest call, else of the parameters of g.
        """
        if self._last_state is not None:
            device, dtype = self._last_state
        else:
            parameter = self._floating_parameter()
            if parameter is None:
                device, dtype = torch.device("cpu"), torch.get_default_dtype()
            else:
                device, dtype = parameter.device, parameter.dtype
        latest = self.last_solution
        record = None if latest is None else latest.adjoint_record
        return explain(self.options, self.g, device, dtype, record)

    def extra_repr(self) -> str:
        """What repr shows besides the submodules."""
        options = self.options
        given = [f"solver={options.solver}", f"rtol={options.rtol}"]
        for name in NOT_ALWAYS_SHOWN:
            value = getattr(options, name)
            if value != inspect.signature(FPILayer).parameters[name].default:
                given.append(f"{name}={value!r}")
        if not isinstance(self.g, nn.Module):
            given.insert(0, f"g={getattr(self.g, '__name__', type(self.g).__name__)}")
        if self.state_shape is not None:
            given.append(f"state_shape={self.state_shape}")
        return ", ".join(given)

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks of a module before anything else.

        Raises:
            RuntimeError: always; TorchScript has no solves.
        """
        raise RuntimeError(
            "FPILayer: torch.jit.script cannot compile a solve. Script g, which the layer takes as "
            "it does any module: FPILayer(torch.jit.script(g)); or use torch.compile"
        )

    def __getstate__(self) -> dict[str, Any]:
        """The layer without its latest solution, which belongs to a call."""
        return self.__dict__ | {"last_solution": None}

    def _state_dtype(self, z: Tensor) -> torch.dtype:
        parameter = self._floating_parameter()
        if z.dtype not in STATE_DTYPES:
            return torch.get_default_dtype() if parameter is None else parameter.dtype
        # Under autocast z may be narrower than what the state should be iterated in.
        return z.dtype if parameter is None else torch.promote_types(z.dtype, parameter.dtype)

    def _floating_parameter(self) -> Tensor | None:
        return first_floating(self)


def first_floating(module: nn.Module) -> Tensor | None:
    """The first floating one of module.parameters(), in less time."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.is_floating_point():
            return parameter
    for inside in module._modules.values():
        found = None if inside is None else first_floating(inside)
        if found is not None:
            return found
    return None


def checked_shape(shape: object) -> tuple[Any, ...]:
    """`shape` as a tuple of ints, or of such tuples for a tuple state."""
    if is_size(shape):
        return (shape,)
    if isinstance(shape, (tuple, list)):
        if all(map(is_size, shape)):
            return tuple(shape)
        if all(isinstance(s, (tuple, list)) and all(map(is_size, s)) for s in shape):
            return tuple(map(tuple, shape))
    raise ValueError(
        "FPILayer: state_shape must be the shape of one sample, as a tuple of ints, or a tuple of "
        f"such tuples, got {shape!r}"
    )


def is_size(value: object) -> bool:
    """Whether value can be the size of a dimension."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
