"""How (I - M)^-1 is applied to a batch of vectors in the backward and the forward-mode pass."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fpi_cuda.autograd.linearization import Jacobian
from fpi_cuda.autograd.scaling import Apply, Scaling, common_factor
from fpi_cuda.coupling import Coupling
from fpi_cuda.late import Late, worst_of
from fpi_cuda.result import AdjointRecord, SolveResult, Stats, Status
from fpi_cuda.row_norm import row_norm


class LinearSystem(NamedTuple):
    """y = M y + b for every sample, asked for to ||M y + b - y|| <= atol.

    Attributes:
        apply, apply_transpose: M and its transpose, of (B, D).
        b: (B, D). atol: (B,) float64.
    """

    apply: Apply
    apply_transpose: Apply
    b: Tensor
    atol: Tensor


class LinearSolve(Protocol):
    """Solves a linear system, from what the caller chose as a solver."""

    def __call__(
        self, system: LinearSystem, coupling: Coupling | None, found: SolveResult | None = None
    ) -> SolveResult:
        """y (B, D), without a graph.

        Args:
            coupling: what is known of whether rows depend on one another; None: they do not. Where
                they do, ||M y + b - y|| <= ||atol|| for all of them together.
            found: a solution for rows that do not, by somebody else.
        """


class DeviceSolve(Protocol):
    """Solves c = J^T c + b for every sample where J was recorded, without the host."""

    def __call__(self, matrix: Jacobian, b: Tensor, atol: Tensor) -> SolveResult | None:
        """c (B, D) with ||J^T c + b - c|| <= atol (B,); None: the host has to do it."""


FAILED = (Status.DIVERGED, Status.NONFINITE)


def failed(status: Tensor) -> Tensor:
    """(B,) bool: the sample's point means nothing, and neither would its gradient."""
    return (status == FAILED[0]) | (status == FAILED[1])


class Account:
    """Writes down how adjoint solves went, and shows them to whoever warns of them.

    Args:
        status: (B,) int8, how the forward solve ended.
        record: where the latest account is kept.
        coupling: what is known of whether rows depend on one another; None: they do not.
        late: do not look at status before a backward pass has to; the host need not wait for the
            solve then.
    Attributes:
        status, coupling: as given.
        late: nobody has looked yet.
    """

    def __init__(
        self,
        status: Tensor,
        record: AdjointRecord,
        coupling: Coupling | None = None,
        *,
        late: bool = False,
    ) -> None:
        self.status = status
        self.coupling = coupling
        self.late = late
        self._record = record
        self._worst = Late(worst_of(status))
        if record.worst is None:
            record.worst = self._worst
        self._unmended = late

    @property
    def hopeless(self) -> Tensor | None:
        """(B,) bool, samples that failed in the forward solve; None if none did."""
        self.late = False
        return self._failed

    @functools.cached_property
    def _failed(self) -> Tensor | None:
        return failed(self.status) if self._worst.value() >= min(FAILED) else None

    @property
    def joint(self) -> bool:
        """Whether rows were seen to depend on one another."""
        return self.coupling is not None and self.coupling.joint

    def settle(self) -> Tensor | None:
        """`hopeless`, for a forward pass that takes care of these samples."""
        self._unmended = False
        return self.hopeless

    def over(self, status: Tensor) -> Account:
        """An account of the same record, for samples that ended otherwise."""
        return Account(status, self._record, self.coupling)

    def spread(self, b: Tensor) -> Tensor:
        """b, not finite in all rows where one row is not and others depend on it."""
        if self.coupling is None or not self.joint or bool(torch.isfinite(b).all()):
            return b
        rows = self.coupling.together
        lost = ~finite_rows(b).reshape(-1, rows).all(1).repeat_interleave(rows)
        return torch.where(lost[:, None], b + torch.nan, b)

    def masked(self, b: Tensor) -> Tensor:
        """b with zeros for the samples that failed forward."""
        hopeless = self.hopeless
        return b if hopeless is None else dropped(b, hopeless)

    def close(
        self, b: Tensor, result: SolveResult, *, whole: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Record `result`, of a solve for b; return its x and which samples fail in all.

        Those have zero in x. The second value is None where it says no more than what the forward
        pass has taken care of. A b that is itself not finite is no failed solve: x is not finite
        there either, for whoever watches gradients for overflow.

        Args:
            whole: all of such a row of x is lost; else it is left as it is.
        """
        hopeless = self.hopeless
        x, status, num_steps, residual = result
        bad = failed(status)
        worst = worst_of(status).item()
        fails_here = worst >= min(FAILED)
        num_zeroed = 0
        if fails_here or hopeless is not None:
            finite = finite_rows(b)
            bad = bad & finite
            if fails_here:
                x = zero_rows(x, bad)
                if whole:
                    x = torch.where(finite[:, None], x, b + torch.nan)
                residual = torch.where(bad, row_norm(b), residual)
                fails_here = bool(bad.any())
            if hopeless is not None:
                bad = bad | hopeless
                status = torch.where(hopeless, self.status, status)
            num_zeroed = int((bad & finite).sum())
        self._record.stats = Stats(status, num_steps, residual_in(b.dtype, residual), num_zeroed)
        unfinished = worst > Status.CONVERGED and not isinstance(result, Unmeasured)
        record = self._record
        if record.look is not None and not record.warned and (num_zeroed or unfinished):
            record.warned = record.look(b, status, residual, num_zeroed)
        unseen = hopeless is not None and self._unmended
        return x, bad if fails_here or unseen else None


@dataclass(frozen=True)
class Strategy(abc.ABC):
    """A choice of adjoint.

    Attributes:
        account: of the solve.
        scaling: of right-hand sides.
        truncation: y is the series b + M b + ... + M^k b with this k; None: it is the solution.
    """

    account: Account
    truncation: int | None = None
    scaling: Scaling = dataclasses.field(default=Scaling(), kw_only=True)

    @abc.abstractmethod
    def solve(
        self, b: Tensor, matrix: Jacobian, *, transpose: bool
    ) -> tuple[Tensor, Tensor | None]:
        """y = (I - M)^-1 b or what stands for it, M = J^T or J; and samples failing, if any.

        Without a graph. Samples are independent only if g is row-wise.
        """

    def over(self, status: Tensor) -> Strategy:
        """The same choice, for samples whose forward solve ended so.

        Args:
            status: (n B,) int8, for the B samples n times over.
        """
        return dataclasses.replace(self, account=self.account.over(status))


@dataclass(frozen=True)
class Exact(Strategy):
    """The exact one: y solves y = M y + b to rtol ||b|| per sample.

    Attributes:
        linear_solve, rtol: how, and how far: one number, or (B,) float64.
        on_device: tried first for J^T.
    """

    linear_solve: LinearSolve = dataclasses.field(kw_only=True)
    rtol: float | Tensor = dataclasses.field(kw_only=True)
    on_device: DeviceSolve | None = None

    def over(self, status: Tensor) -> Strategy:
        """See Strategy."""
        rtol = self.rtol
        if isinstance(rtol, Tensor) and len(rtol) != len(status):
            rtol = rtol.repeat(len(status) // len(rtol))
        return dataclasses.replace(self, account=self.account.over(status), rtol=rtol)

    def solve(
        self, b: Tensor, matrix: Jacobian, *, transpose: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See Strategy."""
        with torch.no_grad(), without_autocast(b.device):
            return self._solve(self.account.masked(b), matrix, transpose)

    def _solve(self, b: Tensor, matrix: Jacobian, transpose: bool) -> tuple[Tensor, Tensor | None]:
        b = self.account.spread(b)
        scaling = self.scaling.joint() if self.account.joint else self.scaling
        scale = scaling.of(b)
        factor = scale.factor
        if factor is None:
            result = self._solve_scaled(b, matrix, transpose)
            return self.account.close(self.account.spread(b), result)
        result = self._solve_scaled(b / factor, matrix, transpose)
        if scale.differs is not None and bool(scale.differs):
            apply = matrix.transposed if transpose else matrix.product
            if not scaling.holds(apply, b, scale, result):
                factor = common_factor(b)
                result = self._solve_scaled(b / factor, matrix, transpose)
        residual = result.residual * factor[:, 0].double()
        b = self.account.spread(b)  # what couples the rows may have been found only now
        return self.account.close(b, result._replace(x=result.x * factor, residual=residual))

    def _solve_scaled(self, b: Tensor, matrix: Jacobian, transpose: bool) -> SolveResult:
        both: list[Apply] = [matrix.product, matrix.transposed]
        apply, apply_transpose = reversed(both) if transpose else both
        size = row_norm(b)
        system = LinearSystem(apply, apply_transpose, b, self.rtol * size)
        coupling = self.account.coupling
        found = None
        if transpose and self.on_device is not None and not self.account.joint:
            found = self.on_device(matrix, b, system.atol)
            if found is not None and coupling is None:
                return found
        total = float(size.sum())
        if total == 0:
            return found or trivial(b, size)
        if math.isfinite(total):
            return self.linear_solve(system, coupling, found)
        # Iterated on, these rows would spoil others where g couples them.
        lost = ~torch.isfinite(size)
        atol = self.rtol * torch.where(lost, 0.0, size)
        result = self.linear_solve(system._replace(b=zero_rows(b, lost), atol=atol), coupling)
        return lose(result, lost)


@dataclass(frozen=True)
class Truncated(Strategy):
    """The series b + M b + ... + M^k b; k = 0 takes the identity for (I - M)^-1.

    Attributes:
        truncation: k.
    """

    truncation: int = dataclasses.field(kw_only=True)

    def solve(
        self, b: Tensor, matrix: Jacobian, *, transpose: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See Strategy."""
        b = self.account.masked(b)
        if self.truncation:
            b = self.account.spread(b)
        apply = matrix.transposed if transpose else matrix.product
        with torch.no_grad(), without_autocast(b.device):
            result = self._summed(b, apply)
            if self.truncation and bool((result.status == Status.NONFINITE).any()):
                # Rows of b that are not finite must not reach others where g couples them, and
                # scaled, an overflow is told from a series that has no finite sum.
                lost = ~finite_rows(b)
                clean = zero_rows(b, lost)
                factor = self.scaling.of(clean).factor
                result = self._summed(clean, apply)
                if factor is not None:
                    status = self._summed(clean / factor, apply).status
                    result = result._replace(status=status)
                result = lose(result, lost)
            return self.account.close(b, result, whole=self.truncation > 0)

    def _summed(self, b: Tensor, apply: Apply) -> SolveResult:
        return unmeasured(b, series(apply, b, self.truncation), self.truncation)


def series(apply: Apply, b: Tensor, k: int) -> Tensor:
    """b + M b + ... + M^k b."""
    y = b
    for _ in range(k):
        y = apply(y) + b
    return y


class Unmeasured(SolveResult):
    """The account of what stopped where it did by choice; its residual is NaN."""


def unmeasured(b: Tensor, y: Tensor, num_steps: int) -> SolveResult:
    """The account of a y that stopped after `num_steps` by choice, its residual NaN: unknown."""
    size = row_norm(b)
    nothing = trivial(b, size)
    finite = torch.isfinite(y).all(1)
    status = torch.where(finite, Status.MAX_STEPS, Status.NONFINITE).to(torch.int8)
    return Unmeasured(
        y,
        torch.where(size == 0, nothing.status, status),
        torch.where(size == 0, 0, num_steps).int(),
        torch.where(size == 0, 0.0, torch.nan),
    )


def trivial(b: Tensor, residual: Tensor) -> SolveResult:
    """The account of a solve whose b is zero."""
    status = torch.full_like(residual, Status.CONVERGED, dtype=torch.int8)
    return SolveResult(b, status, torch.zeros_like(residual, dtype=torch.int32), residual)


def zero_rows(t: Tensor, rows: Tensor) -> Tensor:
    """t with zeros where rows (B,) is True, whatever stood there."""
    return torch.where(rows[:, None], torch.zeros((), dtype=t.dtype, device=t.device), t)


def finite_rows(b: Tensor) -> Tensor:
    """(B,) bool: the row of b (B, D) is finite."""
    return torch.isfinite(b).all(1)


def dropped(b: Tensor, rows: Tensor) -> Tensor:
    """b with zeros where rows (B,) is True, but for rows of b that are themselves not finite.

    An overflow of the user's loss is theirs to see, whatever became of the sample.
    """
    return zero_rows(b, rows & finite_rows(b))


def lose(result: SolveResult, rows: Tensor) -> SolveResult:
    """`result`, with rows (B,) of the account as those of right-hand sides that are not finite."""
    status = torch.where(rows, int(Status.NONFINITE), result.status).to(torch.int8)
    residual = torch.where(rows, torch.nan, result.residual)
    return result._replace(status=status, residual=residual)


def residual_in(state: torch.dtype, residual: Tensor) -> Tensor:
    """A residual as it is reported: in the state's dtype, but at least float32."""
    return residual.to(torch.promote_types(state, torch.float32))


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Products in backward are not rounded again, even where backward runs under autocast."""
    with torch.autocast(device.type, enabled=False):
        yield
