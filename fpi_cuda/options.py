"""What a solve is told: solvers, adjoints and all other options, as frozen, checked records."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

T = TypeVar("T")

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_options: Any) -> Callable[[T], T]:
        """Nothing at run time: type checkers alone read it."""
        return lambda decorated: decorated


@dataclass_transform(frozen_default=True)
def option(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass whose unknown options raise and name the valid ones."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    generated: Callable[..., None] = cls.__init__
    valid = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    known = frozenset(valid)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not kwargs.keys() <= known:
            unknown = [name for name in kwargs if name not in known]
            choices = ", ".join(valid) if valid else "none"
            raise TypeError(
                f"{cls.__name__}: unknown option {unknown[0]!r}. Valid options: {choices}"
            )
        if len(args) > len(valid):
            raise TypeError(
                f"{cls.__name__}: takes at most {len(valid)} options, got {len(args)}. "
                f"Valid options: {', '.join(valid) if valid else 'none'}"
            )
        generated(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def require_count(
    owner: str, name: str, value: object, least: int, most: int | None = None
) -> None:
    """Raise unless `value` is an int in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < least or (most is not None and value > most):
        span = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{owner}: {name} must be {span}, got {value}")


def require_real(
    owner: str,
    name: str,
    value: object,
    least: float,
    most: float = math.inf,
    *,
    open_below: bool = False,
) -> None:
    """Raise unless `value` is a finite number in [least, most] (or (least, most])."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    below = value <= least if open_below else value < least
    if not math.isfinite(value) or below or value > most:
        left = "(" if open_below else "["
        right = "inf)" if most == math.inf else f"{most}]"
        raise ValueError(f"{owner}: {name} must be in {left}{least}, {right}, got {value}")


MAX_DEPTH = 16
"""Largest history depth: the small solve is unrolled to this size in the kernels."""


MOST_STEPS = 2**31 - 1
"""Steps are counted in int32."""


@option
class Picard:
    """x <- x + damping (g(x) - x).

    Args:
        damping: step length in (0, 2]; 1 is the plain iteration.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        require_real("Picard", "damping", self.damping, 0.0, 2.0, open_below=True)


@option
class Anderson:
    """Anderson acceleration, type II, per sample, with a scale-free ridge and a safeguard.

    Args:
        m: depth of the history, 1 to 16; of it, k = min(m, D) differences are kept of samples of
            D elements. Extra memory is 2k + 6 times the state, and 4k (k + 1) + 133 bytes a
            sample; four states more in the first solve of a map whose rows nobody promised to be
            independent.
        beta: mixing in (0, 2]; 1 uses g alone.
        ridge: relative to the unit diagonal of the scaled Gram matrix; 0 for linear maps.
        history_dtype: dtype of the stored differences; None stores them as the state.
            torch.bfloat16 halves the traffic of a float32 state. A float64 state keeps a float64
            history whatever this says, and a float32 state none wider than its differences, which
            are float32. A half-precision state keeps its own dtype: a wider one is served by
            backend="reference" alone, and is an error elsewhere.
    Source:
        Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011, eq. (2.2).
    """

    m: int = 5
    beta: float = 1.0
    ridge: float = 1e-3
    history_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        require_count("Anderson", "m", self.m, 1, MAX_DEPTH)
        require_real("Anderson", "beta", self.beta, 0.0, 2.0, open_below=True)
        require_real("Anderson", "ridge", self.ridge, 0.0, 1.0)
        allowed = (None, torch.float32, torch.float64, torch.bfloat16)
        if self.history_dtype not in allowed:
            raise ValueError(
                "Anderson: history_dtype must be None, torch.float32, torch.float64 or "
                f"torch.bfloat16, got {self.history_dtype!r}"
            )


@option
class Broyden:
    """Limited-memory good Broyden on g(x) - x = 0, per sample: the solver of DEQ.

    Args:
        m: number of rank-one updates kept, 1 to 16; the memory starts afresh when full. Extra
            memory is 2m + 6 times the state, and 133 bytes a sample.
        beta: mixing of the first step and after a restart, in (0, 2].
    Source:
        Broyden, Math. Comp. 19, 1965; Bai, Kolter, Koltun, NeurIPS 2019, section 3.1.3.
    """

    m: int = 16
    beta: float = 1.0

    def __post_init__(self) -> None:
        require_count("Broyden", "m", self.m, 1, MAX_DEPTH)
        require_real("Broyden", "beta", self.beta, 0.0, 2.0, open_below=True)


@option
class GMRES:
    """Restarted GMRES, per sample. For the adjoint system only: it is linear.

    Args:
        restart: size of the Krylov basis, 1 to 128; memory is restart + 4 times the state.
    Source:
        Saad and Schultz, SIAM J. Sci. Stat. Comput. 7(3), 1986.
    """

    restart: int = 32

    def __post_init__(self) -> None:
        require_count("GMRES", "restart", self.restart, 1, 128)


@option
class ConjugateGradient:
    """Conjugate gradients on the normal equations, per sample. For the adjoint system only.

    Each step costs one product with the Jacobian and one with its transpose.

    Source:
        Liao et al., Reviving and Improving Recurrent Back-Propagation, ICML 2018 (CG-RBP).
    """


FixedPointSolver = Picard | Anderson | Broyden
LinearSolver = GMRES | ConjugateGradient
FIXED_POINT_SOLVERS = (Picard, Anderson, Broyden)
LINEAR_SOLVERS = (GMRES, ConjugateGradient)


@option
class Implicit:
    """Gradient from the adjoint fixed point c = J^T c + v, by the solver named here.

    Args:
        solver: Picard, Anderson, Broyden, GMRES or ConjugateGradient. None takes the forward's
            solver; an Anderson then runs with no ridge and a depth of up to 16, for the
            system is linear.
        rtol: ||J^T c + v - c|| <= rtol ||v|| per sample, in [0, 1]. None takes the accuracy that
            the forward was asked for: its rtol, and where its atol is not 0, rtol + atol / ||x||
            for the x that was found, but no looser than 1% on account of atol.
        max_steps: None takes the forward's max_steps.
    """

    solver: FixedPointSolver | LinearSolver | None = None
    rtol: float | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.solver is not None:
            require_instance(
                "Implicit", "solver", self.solver, FIXED_POINT_SOLVERS + LINEAR_SOLVERS
            )
        if self.rtol is not None:
            require_real("Implicit", "rtol", self.rtol, 0.0, 1.0)
        if self.max_steps is not None:
            require_count("Implicit", "max_steps", self.max_steps, 1, MOST_STEPS)


@option
class JacobianFree:
    """Gradient with (I - J)^-1 replaced by I: cheap, biased.

    Source:
        Fung et al., JFB: Jacobian-Free Backpropagation for Implicit Networks, AAAI 2022.
    """


@option
class Phantom:
    """Gradient of k damped steps x <- tau g(x) + (1 - tau) x unrolled at the fixed point.

    Source:
        Geng et al., On Training Implicit Models, NeurIPS 2021.
    """

    k: int = 5
    tau: float = 1.0

    def __post_init__(self) -> None:
        require_count("Phantom", "k", self.k, 1)
        require_real("Phantom", "tau", self.tau, 0.0, 1.0, open_below=True)


@option
class Neumann:
    """Gradient with (I - J)^-T replaced by its Neumann series up to (J^T)^k.

    Source:
        Liao et al., Reviving and Improving Recurrent Back-Propagation, ICML 2018.
    """

    k: int = 5

    def __post_init__(self) -> None:
        require_count("Neumann", "k", self.k, 0)


@option
class Unroll:
    """Gradient by differentiating through every step of the solver.

    Memory grows with the number of steps. It is the only choice that also gives the gradient
    in x0. A sample that returns its x0, for it was solved or nothing better was found, has the
    gradient of one step from there.
    """


Adjoint = Implicit | JacobianFree | Phantom | Neumann | Unroll
ADJOINTS = (Implicit, JacobianFree, Phantom, Neumann, Unroll)


def require_instance(owner: str, name: str, value: object, classes: tuple[type, ...]) -> None:
    """Raise unless `value` is an instance of one of `classes`; a bare class gets a hint."""
    if isinstance(value, classes):
        return
    names = ", ".join(c.__name__ for c in classes)
    hint = ""
    if isinstance(value, type) and issubclass(value, classes):
        hint = f"; did you mean {value.__name__}()?"
    raise TypeError(f"{owner}: {name} must be one of {names}, got {value!r}{hint}")


BACKENDS = ("reference", "native", "cuda", "triton")

FLOORS = {"ieee": 0.0, "tf32x3": 1e-6, "tf32": 1e-3, "bf16": 1e-2}
"""The least rtol to ask for. Rounding moves g of the built-in cells by up to 2.4e-7, 2.4e-4 and
1.9e-3 of its norm, and half of the tolerance is left for that. Plain float32 needs no such rule: a
sample that cannot get there is STALLED."""


PRECISIONS = tuple(FLOORS)
"""In the order of csrc/common/precision.h."""


def require_precision(
    owner: str, precision: object, rtol: float, atol: float, *, what: str = "rtol"
) -> None:
    """Raise unless `precision` is one of PRECISIONS and can reach the tolerance.

    Args:
        what: the name of the option that rtol was given as.
    """
    if not isinstance(precision, str) or precision not in FLOORS:
        raise ValueError(
            f"{owner}: precision must be one of {', '.join(map(repr, PRECISIONS))}, "
            f"got {precision!r}"
        )
    floor = FLOORS[precision]
    # An absolute tolerance is in the units of x: what it amounts to shows at the end of a solve.
    if rtol < floor and atol == 0.0:
        fine = [name for name in PRECISIONS if FLOORS[name] <= rtol]
        raise ValueError(
            f'{owner}: precision="{precision}" reaches tolerances of {floor:g} and above, got '
            f'{what}={rtol:g}. Loosen {what}, or use precision="{fine[-1]}"'
        )


ROUTES = ("host", "device", "fused")


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
    notice: Any = field(compare=False, repr=False, kw_only=True)

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
        if self.backend is not None and self.backend not in BACKENDS:
            valid = ", ".join(map(repr, BACKENDS))
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
