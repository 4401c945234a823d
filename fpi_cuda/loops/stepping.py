"""The arrays of one solve, and one step of a solver on every active sample of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fpi_cuda import _extension
from fpi_cuda.ops.compiled import native
from fpi_cuda.ops.solver_state import CONTROL_SIZE
from fpi_cuda.options import Anderson, Broyden, FixedPointSolver, Picard
from fpi_cuda.solution import SolveResult

if _extension.module_error is None or TYPE_CHECKING:
    from fpi_cuda._C import HostSolve, HostSteps
else:
    HostSteps = None


def compute_dtype(state: torch.dtype) -> torch.dtype:
    """What a step is computed in: the state's dtype, but float32 for the half precisions."""
    return torch.float64 if state == torch.float64 else torch.float32


@dataclass
class Workspace:
    """Arrays over a batch of B samples of D elements, with m columns of history; see depth_of.

    Attributes:
        best: (B, D) the best point so far; the point to return once the sample has stopped.
        anchor: (B, D) where the last Picard phase ended; (0, D) where m = 0.
        f_previous: (B, D) g(x) - x one step ago, in the compute dtype; (0, D) where m = 0, and
            where the slot of the next difference holds it: Anderson with history in that dtype.
        partner_previous: (B, D) g(x) (Anderson) or x (Broyden) one step ago; (0, D) likewise.
        columns_f: (B, m, D) differences of f (Anderson), or the u of Broyden's updates.
        columns_g: (B, m, D) differences of g (Anderson), or the v of Broyden's updates.
        gram: (B, m (m + 1) / 2) float64 <dF_i, dF_j>, j <= i; (B, 0) for Broyden.
        control: (B, CONTROL_SIZE) float64.
        atol: (B,) float64.
        status: (B,) int8. num_steps: (B,) int32. residual: (B,) float64.
        scratch: what the backend asks for, see its `scratch`.
    """

    best: Tensor
    anchor: Tensor
    f_previous: Tensor
    partner_previous: Tensor
    columns_f: Tensor
    columns_g: Tensor
    gram: Tensor
    control: Tensor
    atol: Tensor
    status: Tensor
    num_steps: Tensor
    residual: Tensor
    scratch: Tensor | None = None

    def forget(self) -> None:
        """Give back the memory of the history; no step can follow."""
        nothing = self.best.new_empty(0)
        self.columns_f = self.columns_g = self.f_previous = self.partner_previous = nothing
        self.anchor = nothing


def depth_of(solver: FixedPointSolver, dim: int) -> int:
    """Columns of history that `solver` keeps of samples of `dim` elements; 0 for Picard.

    Of Anderson's differences no more than `dim` are independent, and no more take part in a step.
    """
    if isinstance(solver, Anderson):
        return min(solver.m, dim)
    return solver.m if isinstance(solver, Broyden) else 0


empty = functools.lru_cache(256)(torch.empty)
"""Arrays without elements, which serve many solves."""


def numbers_of(solver: FixedPointSolver) -> tuple[float, float]:
    """beta and ridge of `solver`, as kernels take them; Picard's beta is its damping."""
    beta = solver.damping if isinstance(solver, Picard) else solver.beta
    return beta, solver.ridge if isinstance(solver, Anderson) else 0.0


def allocate(
    x0: Tensor, solver: FixedPointSolver, atol: float | Tensor, scratch: Tensor | None = None
) -> Workspace:
    """Arrays for a solve from x0 (B, D): 2m + 2 times the state, and what the rules remember.

    That is 4 m (m + 1) + 8 CONTROL_SIZE + 21 bytes a sample: nothing beside a large one.
    `scratch` is what the backend asks for besides.
    """
    batch, dim = x0.shape
    depth = depth_of(solver, dim)
    history = solver.history_dtype if isinstance(solver, Anderson) else None
    compute = compute_dtype(x0.dtype)
    stored = history or x0.dtype
    apart = batch if depth and (isinstance(solver, Broyden) or stored != compute) else 0
    products = 0 if isinstance(solver, Broyden) else depth * (depth + 1) // 2
    device, double = x0.device, torch.float64
    previous = (torch.empty if apart else empty)((apart, dim), dtype=compute, device=device)
    columns = (torch.empty if depth else empty)((batch, depth, dim), dtype=stored, device=device)
    return Workspace(
        best=x0.clone(memory_format=torch.contiguous_format),
        anchor=torch.empty_like(x0, memory_format=torch.contiguous_format)
        if depth
        else empty((0, dim), dtype=x0.dtype, device=device),
        f_previous=previous,
        partner_previous=torch.empty_like(previous) if apart else previous,
        columns_f=columns,
        columns_g=torch.empty_like(columns) if depth else columns,
        gram=(torch.empty if products else empty)((batch, products), dtype=double, device=device),
        control=torch.zeros((batch, CONTROL_SIZE), dtype=double, device=device),
        atol=torch.zeros(batch, dtype=double, device=device).copy_(atol)
        if isinstance(atol, Tensor)
        else torch.full((batch,), atol, dtype=double, device=device),
        status=torch.zeros(batch, dtype=torch.int8, device=device),
        num_steps=torch.zeros(batch, dtype=torch.int32, device=device),
        residual=torch.full((batch,), torch.inf, dtype=double, device=device),
        scratch=scratch,
    )


def reset(work: Workspace, x0: Tensor, atol: float | Tensor) -> None:
    """Make arrays that served another solve what `allocate` gives for this one."""
    work.best.copy_(x0)
    work.control.zero_()
    work.status.zero_()
    work.num_steps.zero_()
    work.residual.fill_(torch.inf)
    if work.scratch is not None:
        work.scratch.zero_()
    if isinstance(atol, Tensor):
        work.atol.copy_(atol)
    else:
        work.atol.fill_(atol)


Evaluate = Callable[[Tensor, "Tensor | None"], Tensor]
"""evaluate(x, rows): g on flat states. x is (n, D) and is overwritten by the next step; rows is
None where x holds the whole batch, else (n,) int64, the samples that x holds. The same rows
object is passed until the batch shrinks again. For loops.host.iterate it may return the n D numbers
in another shape."""


class Backend(Protocol):
    """One implementation of the step ops. The schemas are those of csrc/step_ops.cpp."""

    name: str
    scratch: Callable[[Tensor], Tensor | None]
    num_moved: Callable[[Tensor, Tensor, Tensor, Tensor], int]
    anderson_step_: Callable[..., None]
    broyden_step_: Callable[..., None]


def step_of(
    backend: Backend, solver: FixedPointSolver, work: Workspace, rtol: float, max_steps: int
) -> tuple[Callable[..., None], tuple[Tensor, ...], dict[str, Any]]:
    """The op that takes a step of `solver`, and what it is given after x, gx and rows each time.

    That is op(x, gx, rows, *arrays, **numbers), in place on every active sample of x.
    """
    account = (work.control, work.atol, work.status, work.num_steps, work.residual)
    points = (work.best, work.anchor, work.f_previous, work.partner_previous)
    history = (*points, work.columns_f, work.columns_g)
    numbers: dict[str, Any] = {"rtol": rtol, "max_steps": max_steps, "scratch": work.scratch}
    if isinstance(solver, Broyden):
        return backend.broyden_step_, (*history, *account), {**numbers, "beta": solver.beta}
    beta, ridge = numbers_of(solver)
    numbers.update(beta=beta, ridge=ridge)
    return backend.anderson_step_, (*history, work.gram, *account), numbers


def step(
    backend: Backend,
    solver: FixedPointSolver,
    work: Workspace,
    x: Tensor,
    gx: Tensor,
    rows: Tensor | None,
    rtol: float,
    max_steps: int,
) -> None:
    """One step of `solver` on every active sample of x, in place."""
    op, arrays, numbers = step_of(backend, solver, work, rtol, max_steps)
    op(x, gx, rows, *arrays, **numbers)


STATE_TYPES = (torch.float32, torch.float64, torch.bfloat16)
"""In the order of csrc/common/state_type.h."""


class HostWork:
    """What Workspace is where no op takes the steps: most of it is memory that nobody looks into.

    Args:
        x: (B, D) where the solve begins; its steps advance it in place.
    Attributes:
        best, status, num_steps, residual: as in Workspace.
        steps: takes the steps of `step_of`. Nobody checks there what the op would: gx is
            contiguous, of the dtype of x, on the CPU, and apart from it.
    """

    def __init__(
        self, x: Tensor, solver: FixedPointSolver, atol: float | Tensor, rtol: float, max_steps: int
    ) -> None:
        batch, dim = x.shape
        solve = host_solve(solver, batch, dim, x.dtype, rtol, max_steps)
        new = functools.partial(torch.empty, device=x.device)  # whatever the default device is
        self.best = best = new((batch, dim), dtype=x.dtype)
        self.status = status = new(batch, dtype=torch.int8)
        self.num_steps = num_steps = new(batch, dtype=torch.int32)
        self.residual = residual = new(batch, dtype=torch.float64)
        self._memory: Tensor | None = new(solve.size, dtype=torch.uint8)
        self._scalars = scalars = new(batch * (CONTROL_SIZE + 1), dtype=torch.float64)
        given, tolerance = 0, 0.0
        if isinstance(atol, Tensor):
            atol = atol.contiguous()
            given = atol.data_ptr()
        else:
            tolerance = atol
        self.steps = HostSteps(
            solve, self._memory.data_ptr(), scalars.data_ptr(), x.data_ptr(), best.data_ptr(),
            status.data_ptr(), num_steps.data_ptr(), residual.data_ptr(), given, tolerance,
        )  # fmt: skip

    @property
    def control(self) -> Tensor:
        """As in Workspace."""
        batch = len(self.status)
        return self._scalars[: batch * CONTROL_SIZE].view(batch, CONTROL_SIZE)

    @property
    def atol(self) -> Tensor:
        """As in Workspace."""
        return self._scalars[len(self.status) * CONTROL_SIZE :]

    def forget(self) -> None:
        """See Workspace."""
        self._memory = None


@functools.lru_cache(256)
def host_solve(
    solver: FixedPointSolver, batch: int, dim: int, dtype: torch.dtype, rtol: float, max_steps: int
) -> HostSolve:
    """The sizes and numbers of such a solve."""
    history = solver.history_dtype if isinstance(solver, Anderson) else None
    return HostSolve(
        isinstance(solver, Broyden),
        STATE_TYPES.index(dtype),
        STATE_TYPES.index(history or dtype),
        batch,
        dim,
        depth_of(solver, dim),
        rtol,
        max_steps,
        *numbers_of(solver),
    )


def is_native(backend: Backend) -> bool:
    """Whether HostWork serves it."""
    return backend.name == native.name and HostSteps is not None


def apart_from(x: Tensor, gx: Tensor) -> Tensor:
    """gx contiguous, and copied if it lies in the storage of x: g returned x or a view of it."""
    if gx.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        gx = gx.clone()
    return gx.contiguous().resolve_neg()


def empty_result(x0: Tensor) -> SolveResult:
    """The account of a batch without samples."""
    device = x0.device
    return SolveResult(
        x0.clone(),
        torch.zeros(0, dtype=torch.int8, device=device),
        torch.zeros(0, dtype=torch.int32, device=device),
        torch.zeros(0, dtype=torch.float64, device=device),
    )
