"""One Anderson step by each implementation, on states where the step is an accelerated one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.measure import Clock, Timing, seconds
from fpi_cuda.loops import stepping
from fpi_cuda.loops.stepping import Workspace, allocate
from fpi_cuda.ops.solver_state import column
from fpi_cuda.options import Anderson
from fpi_cuda.solution import Status

RTOL = 1e-12
MAX_STEPS = 1000
# Of the largest element: how far one rounding of each sum moves an accelerated step.
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-9, torch.bfloat16: 0.1, torch.float16: 1e-2}
# Bytes of a step that takes long enough for a few of them to be timed.
LARGE = 2**24


@dataclass(frozen=True)
class Case:
    """B samples of d elements with m columns of history."""

    batch: int
    dim: int
    depth: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What a step has to move: 2m + 4 times the state."""
        return self.batch * self.dim * (2 * self.depth + 4) * self.dtype.itemsize

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"B={self.batch} d={self.dim} m={self.depth} {dtype}"


class Row:
    """One implementation of the step."""

    name = ""

    def reset(self) -> None:
        """Go back to where every timed step begins; not timed."""

    def run(self) -> None:
        """The step."""
        raise NotImplementedError

    def timing(self, clock: Clock) -> Timing:
        """Of one step."""
        return clock(self.run, self.reset)


@dataclass
class Snapshot:
    """A solve under way, about to take an accelerated step with a full history."""

    x: Tensor
    gx: Tensor
    work: Workspace
    after: Tensor
    """x after that step, by the reference."""


def snapshot(case: Case, device: torch.device, reference: ModuleType) -> Snapshot:
    """Solve a linear map until its next step is accelerated in every sample."""
    solver = Anderson(m=case.depth)
    shape = (case.batch, case.dim)
    generator = torch.Generator(device).manual_seed(0)
    slopes = torch.linspace(-0.7, 0.97, case.dim, device=device)
    z = torch.randn(shape, generator=generator, device=device)
    x = torch.zeros(shape, dtype=case.dtype, device=device)
    work = allocate(x, solver, 0.0)
    for _ in range(64):
        gx = (slopes * x.float() + z).to(case.dtype)
        before, kept = x.clone(), copy_of(work)
        stepping.step(reference, solver, work, x, gx, None, RTOL, MAX_STEPS)
        if is_accelerated(work, kept, x, gx):
            return Snapshot(before, gx, kept, x)
    raise RuntimeError(f"bench.step: no accelerated step within 64 steps at {case.title}")


def is_accelerated(work: Workspace, before: Workspace, x: Tensor, gx: Tensor) -> bool:
    """Whether the step just taken used a full history in every sample."""
    depth = work.columns_f.shape[1]
    full = column(before.control, "columns") >= depth - 1
    mixed = column(work.control, "picard_left") == 0
    active = work.status == Status.ACTIVE
    return bool((full & mixed & active & (x != gx).any(1)).all())


def copy_of(work: Workspace) -> Workspace:
    """A workspace of its own with the same contents, without scratch."""
    arrays = {name: array.clone() for name, array in arrays_of(work).items()}
    return Workspace(**arrays)


def arrays_of(work: Workspace) -> dict[str, Tensor]:
    """The arrays of a workspace by name, but for scratch."""
    names = {field.name for field in dataclasses.fields(Workspace)} - {"scratch"}
    return {name: getattr(work, name) for name in names}


class Ours(Row):
    """fpi_cuda's step by one of its backends."""

    def __init__(self, backend: ModuleType, case: Case, start: Snapshot) -> None:
        self.name = f"fpi_cuda {backend.name}"
        self.backend, self.start = backend, start
        self.solver = Anderson(m=case.depth)
        self.x, self.work = start.x.clone(), copy_of(start.work)
        self.work.scratch = backend.scratch(self.x)
        self.active_before = self.active_after = 1.0

    def reset(self) -> None:
        self.x.copy_(self.start.x)
        kept = arrays_of(self.start.work)
        for name, array in arrays_of(self.work).items():
            array.copy_(kept[name])

    def run(self) -> None:
        stepping.step(
            self.backend, self.solver, self.work, self.x, self.start.gx, None, RTOL, MAX_STEPS
        )

    def timing(self, clock: Clock) -> Timing:
        """Of one step in which no sample was free.

        Raises:
            RuntimeError: a sample was not active before the step, or not moved by it.
        """
        self.reset()
        self.active_before = min(self.active_before, self.active())
        if self.active_before < 1.0:
            raise RuntimeError(f"{self.name}: {self.active_before:.2%} active before a timed step")
        found = clock(self.run, self.reset)
        self.active_after = min(self.active_after, self.active())
        if not torch.equal(self.work.num_steps, self.start.work.num_steps + 1):
            raise RuntimeError(f"{self.name}: a timed step left samples where they were")
        return found

    def active(self) -> float:
        """Share of the samples that have not stopped."""
        return float((self.work.status == Status.ACTIVE).double().mean())

    def require_right(self) -> None:
        """Raise where the step is not the reference's: no speed of a wrong result."""
        self.reset()
        self.run()
        scale = self.start.after.float().abs().amax()
        error = float((self.x.float() - self.start.after.float()).abs().amax() / scale)
        if not error <= CLOSE[self.x.dtype]:
            raise RuntimeError(f"{self.name} is off the reference by {error:.1e}")


def hand_written_step(
    X: Tensor, G: Tensor, x: Tensor, gx: Tensor, slot: int, lam: float
) -> tuple[Tensor, Tensor]:
    """Batched Anderson as people write it: minimise ||sum alpha_i f_i|| with sum alpha_i = 1.

    Args:
        X, G: (B, m, d) the last m points and their images, a ring; written in `slot`.
    Returns:
        the next point, and ||g(x) - x|| (B,).
    """
    X[:, slot] = x
    G[:, slot] = gx
    F = (G - X).float()
    count = F.shape[1]
    gram = F @ F.transpose(1, 2) + lam * torch.eye(count, device=F.device)
    # Not `solve`, which lets the host wait for the device.
    alpha = torch.linalg.solve_ex(gram, gram.new_ones(count)).result
    alpha = (alpha / alpha.sum(1, keepdim=True)).to(G.dtype)
    stepped = (alpha[:, None] @ G)[:, 0]
    return stepped, (gx - x).norm(dim=1)


class HandWritten(Row):
    """The same in torch operations, without a safeguard, a status or a read by the host."""

    name = "torch, by hand"

    def __init__(self, case: Case, start: Snapshot) -> None:
        generator = torch.Generator(start.x.device).manual_seed(1)
        shape = (case.batch, case.depth + 1, case.dim)
        self.X = torch.randn(shape, generator=generator, device=start.x.device).to(case.dtype)
        self.G = self.X.flip(2).contiguous()
        self.x, self.gx = start.x, start.gx
        self.step: Any = hand_written_step

    def run(self) -> None:
        self.step(self.X, self.G, self.x, self.gx, 1, 1e-4)


class Compiled(HandWritten):
    """The same under torch.compile."""

    name = "torch, by hand, compiled"

    def __init__(self, case: Case, start: Snapshot) -> None:
        super().__init__(case, start)
        self.step = torch.compile(hand_written_step, dynamic=False)


class TorchDEQ(Row):
    """torchdeq's Anderson, by the difference of a long and a short solve on given images.

    The host waits for the device in each of its steps, so that a clock of the host serves.
    """

    name = "torchdeq"

    def __init__(self, case: Case, start: Snapshot) -> None:
        from torchdeq.solver.anderson import anderson_solver

        self.solver, self.depth, self.x0 = anderson_solver, case.depth, start.x
        generator = torch.Generator(start.x.device).manual_seed(2)
        self.images = [
            torch.randn(start.x.shape, generator=generator, device=start.x.device).to(case.dtype)
            for _ in range(self.depth + 2)  # distinct, or its matrix is singular
        ]
        self.more = 8 if case.bytes > LARGE else 64
        self.solve(self.depth + 2)

    def solve(self, steps: int) -> None:
        images = iter(self.images * steps)
        self.solver(lambda x: next(images), self.x0, max_iter=steps, tol=0.0, m=self.depth)

    def timing(self, clock: Clock) -> Timing:
        few, many = (
            seconds(lambda steps=steps: self.solve(steps), self.x0.device)
            for steps in (self.depth + 2, self.depth + 2 + self.more)
        )
        each = (many - few) / self.more
        return Timing(each, each, True)


def right(row: Ours) -> Ours:
    """`row`, found to take the reference's step."""
    row.require_right()
    return row
