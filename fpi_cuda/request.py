"""What fixed_point and FPILayer are told besides g, x0 and z, checked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from fpi_cuda import ops
from fpi_cuda.evaluation.dense import why_not_dense
from fpi_cuda.evaluation.shortcuts import why_not_hoisted, why_rows_unknown
from fpi_cuda.options import (
    ADJOINTS,
    FIXED_POINT_SOLVERS,
    MAX_DEPTH,
    MOST_STEPS,
    Adjoint,
    Anderson,
    Broyden,
    FixedPointSolver,
    Implicit,
    LinearSolver,
    require_count,
    require_instance,
    require_real,
)
from fpi_cuda.precision import require_precision
from fpi_cuda.unconverged import Notice

ROUTES = ("host", "device", "fused")
NO_NUMBERS = "fixed_point: a solve needs the numbers in x0 and z, and {} has none. {}"


@dataclass(frozen=True)
class Options:
    """What fixed_point is told besides g, x0 and z, and who says that it has not converged."""

    solver: FixedPointSolver
    rtol: float
    atol: float
    max_steps: int
    adjoint: Adjoint
    backend: str | None
    rowwise: bool | None
    throw: bool
    route: str | None
    precision: str
    batch_dims: int = 1
    notice: Notice = field(
        default_factory=lambda: Notice("fixed_point"), compare=False, repr=False, kw_only=True
    )

    def require_sensible(self, owner: str) -> None:
        """Raise unless every option is one that fixed_point can work with."""
        require_instance(owner, "solver", self.solver, FIXED_POINT_SOLVERS)
        require_instance(owner, "adjoint", self.adjoint, ADJOINTS)
        require_real(owner, "rtol", self.rtol, 0.0, 1.0)
        require_real(owner, "atol", self.atol, 0.0)
        require_count(owner, "max_steps", self.max_steps, 1, MOST_STEPS)
        require_precision(owner, self.precision, self.rtol, self.atol)
        if isinstance(self.adjoint, Implicit) and self.adjoint.rtol is not None:
            require_precision(
                owner, self.precision, self.adjoint.rtol, 0.0, what="rtol of Implicit"
            )
        if self.backend is not None and self.backend not in ops.NAMES:
            valid = ", ".join(map(repr, ops.NAMES))
            raise ValueError(f"{owner}: unknown backend {self.backend!r}. Valid: None, {valid}")
        if self.route is not None and self.route not in ROUTES:
            valid = ", ".join(map(repr, ROUTES))
            raise ValueError(f"{owner}: unknown route {self.route!r}. Valid: None, {valid}")
        if self.rowwise is not None and not isinstance(self.rowwise, bool):
            raise TypeError(f"{owner}: rowwise must be None or a bool, got {self.rowwise!r}")
        if not isinstance(self.throw, bool):
            raise TypeError(f"{owner}: throw must be a bool, got {self.throw!r}")
        require_count(owner, "batch_dims", self.batch_dims, 0, 1)
        if self.rowwise and not self.batch_dims:
            raise ValueError(
                f"{owner}: rowwise=True says that the samples are independent, but batch_dims=0 "
                "makes the whole state one sample. Leave one of them out"
            )

    def storable(self, backend: str, state: torch.dtype) -> Options:
        """These options with histories in a dtype that the backend stores for such a state.

        Raises:
            ValueError: it stores none that is as good as the one asked for, or has no such solver.
        """
        solver = with_storable_history(self.solver, backend, state)
        adjoint = self.adjoint
        if isinstance(adjoint, Implicit) and adjoint.solver is not None:
            linear = with_storable_history(adjoint.solver, backend, state)
            if linear is not adjoint.solver:
                adjoint = replace(adjoint, solver=linear)
        if solver is self.solver and adjoint is self.adjoint:
            return self
        return replace(self, solver=solver, adjoint=adjoint)

    def adjoint_solver(self, dim: int) -> FixedPointSolver | LinearSolver:
        """The solver of the adjoint system for samples of `dim` elements, where one is solved."""
        asked = self.adjoint.solver if isinstance(self.adjoint, Implicit) else None
        return asked or default_adjoint_solver(self.solver, dim)

    @functools.cached_property
    def adjoint_steps(self) -> int:
        """Cap on the products with the Jacobian in an adjoint solve."""
        asked = self.adjoint.max_steps if isinstance(self.adjoint, Implicit) else None
        return asked or self.max_steps

    def asks_rowwise(self, g: object) -> bool:
        """Whether it was promised that g may be evaluated on some of the samples."""
        if not self.batch_dims:
            return False
        if self.rowwise is not None:
            return self.rowwise
        return bool(getattr(g, "rowwise", False)) and why_rows_unknown(g) is None


def default_adjoint_solver(solver: FixedPointSolver, dim: int) -> FixedPointSolver:
    """The forward's solver; for Anderson, as deep as it can be of use, and without a ridge."""
    if not isinstance(solver, Anderson):
        return solver
    return linear_anderson(max(solver.m, min(MAX_DEPTH, dim)), solver.history_dtype)


@functools.cache
def linear_anderson(depth: int, history_dtype: torch.dtype | None) -> Anderson:
    """Anderson's method for a linear map."""
    return Anderson(m=depth, ridge=0.0, history_dtype=history_dtype)


Solver = TypeVar("Solver")


def with_storable_history(solver: Solver, backend: str, state: torch.dtype) -> Solver:
    """`solver`, its history in a dtype in which the backend stores differences of such a state.

    Raises:
        ValueError: there is none that is as good as the one asked for, or no such solver.
    """
    if backend == "triton" and isinstance(solver, Broyden):
        raise ValueError(
            f'fixed_point: backend="triton" runs Picard and Anderson, got {solver}. '
            "Use one of these, or backend=None"
        )
    if not isinstance(solver, Anderson) or solver.history_dtype in (None, state):
        return solver
    history = solver.history_dtype
    if state in (torch.float32, torch.float64):
        if (state, history) == (torch.float32, torch.bfloat16):
            return solver
        return replace(solver, history_dtype=None)
    if backend == "reference":
        # Differences of a half-precision state are computed in float32.
        stored = torch.float32 if history == torch.float64 else history
        return solver if stored == history else replace(solver, history_dtype=stored)
    raise ValueError(
        f"fixed_point: Anderson(history_dtype={history}) is not available for a {state} state in "
        f'backend "{backend}", which stores differences as the state, or those of a float32 state '
        'in bfloat16. Use history_dtype=None, a float32 state, or backend="reference"'
    )


def require_known(owner: str, function: Callable[..., Any], unknown: dict[str, Any]) -> None:
    """Raise for an option that `function` does not have."""
    if unknown:
        parameters = inspect.signature(function).parameters.values()
        valid = ", ".join(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        raise TypeError(f"{owner}: unknown option {next(iter(unknown))!r}. Valid options: {valid}")


def require_map(owner: str, g: object) -> None:
    """Raise unless g can be evaluated."""
    if isinstance(g, type) and issubclass(g, nn.Module):
        raise TypeError(
            f"{owner}: g must be a function or a module, got the class {g.__name__}. "
            f"Pass an instance of it: {g.__name__}(...)"
        )
    if not callable(g):
        raise TypeError(f"{owner}: g must be a function or module g(x, *z), got {type(g).__name__}")


def require_arity(g: Callable[..., Any], z: tuple[object, ...]) -> None:
    """Raise where g cannot be called with x and all of z; for when calling it has failed."""
    hoisted = why_not_hoisted(g) is None
    called: Any = getattr(g, "prepare", g) if hoisted else g
    given = z if hoisted else (None, *z)
    try:
        signature = inspect.signature(called.forward if isinstance(called, nn.Module) else called)
    except (TypeError, ValueError):
        return  # written in C: nobody knows
    try:
        signature.bind(*given)
    except TypeError as mismatch:
        name = getattr(called, "__qualname__", type(called).__name__)
        raise TypeError(
            f"fixed_point: g must take x and every z, but {name}{signature} cannot take the "
            f"{len(z)} z given: {mismatch}. Bind other arguments with "
            "functools.partial(g, name=value)"
        ) from None


def require_g_reads(z: tuple[object, ...], error: Exception) -> None:
    """Name a z that g may not be able to compute with, for when evaluating g has failed."""
    # A class of the user's own passes through as it is.
    torchs = type(error) in (RuntimeError, TypeError, NotImplementedError)
    if not torchs or str(error).startswith("fixed_point: "):
        return
    for index, t in enumerate(z):
        found = why_not_dense(t, f"z[{index}]") if isinstance(t, Tensor) else None
        if found is not None:
            said = str(error).partition("\n")[0][:200]
            raise RuntimeError(
                f"fixed_point: g failed with x a plain tensor and z[{index}] {found[0]} ({said}). "
                f"If that is why, {found[1]}"
            ) from error


def require_batch(g: object, x0: object) -> None:
    """Raise where g names the features of its state, and x0 has no dimension for the batch."""
    features = getattr(g, "x_features", None)
    if isinstance(features, int) and isinstance(x0, Tensor) and x0.dim() < 2:
        raise ValueError(
            f"fixed_point: x0 must be (batch, {features}) for {type(g).__name__}, got "
            f"x0={tuple(x0.shape)}. Give x0 and z a batch dimension: z[None] is a batch of one"
        )


def require_inputs(z: tuple[object, ...]) -> None:
    """Raise unless all z are tensors with something in them; what kind is up to g."""
    for index, t in enumerate(z):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"fixed_point: z must be tensors, got z[{index}] of type {type(t).__name__}. "
                "Bind other arguments with functools.partial(g, name=value)"
            )
        if is_lazy(t):
            raise ValueError(
                f"fixed_point: z[{index}] is an uninitialized parameter; call the module that it "
                "belongs to first"
            )


def require_numbers(*tensors: Tensor) -> None:
    """Raise where tensors only stand for numbers, as those of tracers do.

    Raises:
        ValueError: a tensor on the meta device.
        RuntimeError: fake tensors, or a trace that would hold the steps taken for these data.
    """
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "fixed_point: torch.jit.trace would keep the steps that these data need for all "
            "others. Trace what is around the layer, or call it as it is"
        )
    for t in tensors:
        if isinstance(t, FakeTensor) or _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None:
            raise RuntimeError(
                NO_NUMBERS.format("a FakeTensor", "torch.export of a solve is not possible")
            )
        if t.is_meta:
            raise ValueError(NO_NUMBERS.format("device meta", "Pass tensors on a real device"))
    if _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None:
        raise RuntimeError(
            "fixed_point: make_fx and torch.func.linearize cannot trace a solve, whose steps "
            "depend on the data. In the place of linearize use torch.func.jvp"
        )
