"""How (I - M)^-1 is applied to a batch of vectors in the backward and the forward-mode pass."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fpi_cuda.autograd.linearization import Jacobian
from fpi_cuda.autograd.scaling import Apply, Sizes, factor_of, is_solved_jointly, sizes_of
from fpi_cuda.coupling import Coupling
from fpi_cuda.norms import row_norm
from fpi_cuda.solution import AdjointRecord, AsyncNumber, SolveResult, Stats, Status, worst_of


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


LinearSolve = Callable[[LinearSystem, Coupling | None, SolveResult | None], SolveResult]
"""solve(system, coupling, found): y (B, D), without a graph, by what the caller chose as a solver.

coupling: what is known of whether rows depend on one another; None: they do not. Where they do,
||M y + b - y|| <= ||atol|| for all of them together. found: a solution for rows that do not, by
somebody else; None: there is none.
"""

DeviceSolve = Callable[[Jacobian, Tensor, Tensor], SolveResult | None]
"""solve(J, b, atol): c (B, D) with ||J^T c + b - c|| <= atol (B,) where J was recorded, without the
host; None: the host has to do it."""


class Account:
    """Writes down how adjoint solves went, and shows them to whoever warns of them.

    Args:
        status: (B,) int8, how the forward solve ended.
        record: where the latest account is kept.
        coupling: what is known of whether rows depend on one another; None: they do not.
        late: see below.
    Attributes:
        status, coupling, record: as given.
        late: whoever evaluates g in the forward pass does so at failed samples too, and a backward
            pass leaves them out: the host need not wait for the solve then.
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
        self.record = record
        self._worst = AsyncNumber(worst_of(status))
        if record.worst is None:
            record.worst = self._worst

    @functools.cached_property
    def failed_forward(self) -> Tensor | None:
        """(B,) bool, samples that failed in the forward solve; None if none did."""
        return failed(self.status) if self._worst.value() >= Status.DIVERGED else None

    @property
    def coupled(self) -> bool | None:
        """Whether rows depend on one another; None: so far they were not seen to."""
        return False if self.coupling is None else self.coupling.joint or None

    def close(
        self,
        b: Tensor,
        result: SolveResult,
        truncation: int | None = None,
        *,
        finite_b: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Record `result`, of a solve for b; return its x and which samples fail in all.

        Those have zero in x. The second value is None where it says no more than what the forward
        pass has taken care of. A b that is itself not finite is no failed solve: x is not finite
        there either, for whoever watches gradients for overflow.

        Args:
            truncation: see Strategy. What a whole solution or a sum has lost of such a row, and of
                those that depend on it, is all of it.
            finite_b: all of b is known to be finite.
        """
        x, status, num_steps, residual = result
        failed_forward, record = self.failed_forward, self.record
        worst = worst_of(status).item()
        bad, num_zeroed = None, 0
        # Rows that are finite have a finite sum, but for an overflow.
        spoiled = not (finite_b or math.isfinite(b.sum().item()))
        if spoiled or worst >= Status.DIVERGED or failed_forward is not None:
            finite = finite_rows(b)
            if truncation != 0 and self.coupling is not None and self.coupling.joint:
                rows = self.coupling.together
                finite = finite.reshape(-1, rows).all(1).repeat_interleave(rows)
            status = torch.where(finite, status, int(Status.NONFINITE))
            worst = worst_of(status).item()
        if worst >= Status.DIVERGED or failed_forward is not None:
            failing = failed(status) & finite
            lost = b if truncation == 0 else b + torch.nan
            x = torch.where(finite[:, None], x.masked_fill(failing[:, None], 0.0), lost)
            residual = torch.where(failing, row_norm(b), residual.masked_fill(~finite, torch.nan))
            is_news = bool(failing.any())
            if failed_forward is not None:
                failing = failing | failed_forward
                status = torch.where(failed_forward, self.status, status)
                is_news = is_news or self.late
            num_zeroed = int((failing & finite).sum())
            bad = failing if is_news else None
        told = residual.to(torch.promote_types(b.dtype, torch.float32))
        record.stats = Stats(status, num_steps, told, num_zeroed)
        unfinished = worst > Status.CONVERGED and truncation is None
        if record.look is not None and not record.warned and (num_zeroed or unfinished):
            record.warned = record.look(b, status, residual, num_zeroed)
        return x, bad


@dataclass(frozen=True)
class Strategy:
    """A choice of adjoint: y solves y = M y + b to rtol ||b|| per sample, or is a series.

    Attributes:
        account: of the solve.
        arithmetic: the narrowest dtype that g is evaluated in.
        truncation: y is the series b + M b + ... + M^k b with this k; None: it is the solution.
        linear_solve, rtol: how it is found, and how far: one number, or (B,) float64.
        on_device: tried first for J^T.
    """

    account: Account
    arithmetic: torch.dtype
    truncation: int | None = None
    linear_solve: LinearSolve | None = None
    rtol: float | Tensor = 0.0
    on_device: DeviceSolve | None = None

    def over(self, status: Tensor) -> Strategy:
        """The same choice, for samples whose forward solve ended so.

        Args:
            status: (n B,) int8, for the B samples n times over.
        """
        account, rtol = self.account, self.rtol
        if isinstance(rtol, Tensor) and len(rtol) != len(status):
            rtol = rtol.repeat(len(status) // len(rtol))
        account = Account(status, account.record, account.coupling)
        return dataclasses.replace(self, account=account, rtol=rtol)

    def solve(
        self, b: Tensor, matrix: Jacobian, *, transpose: bool
    ) -> tuple[Tensor, Tensor | None]:
        """y = (I - M)^-1 b or what stands for it, M = J^T or J; and samples failing, if any.

        Without a graph, and not rounded again where backward runs under autocast. Samples are
        independent only if g is row-wise.
        """
        account = self.account
        if torch.is_autocast_enabled(b.device.type):
            with torch.autocast(b.device.type, enabled=False):
                return self.solve(b, matrix, transpose=transpose)
        with torch.no_grad():
            if account.failed_forward is not None:
                b = dropped(b, account.failed_forward)
            if self.truncation is not None:
                result = self._summed(b, matrix.transposed if transpose else matrix.product)
                return account.close(b, result, self.truncation)
            sizes = sizes_of(b, self.rtol)
            result = self._scaled(b, matrix, transpose, account.coupled, sizes)
            return account.close(
                b, result, finite_b=sizes is not None and math.isfinite(sizes[0][1])
            )

    def _scaled(
        self,
        b: Tensor,
        matrix: Jacobian,
        transpose: bool,
        coupled: bool | None,
        sizes: Sizes | None = None,
    ) -> SolveResult:
        """The solution, found in numbers of about 1."""
        span, atol = sizes or (None, None)
        factor = factor_of(b, self.arithmetic, coupled, span)
        if factor is None:
            return self._solved(b, matrix, transpose, atol)
        # Iterated on, these rows would spoil others where g couples them.
        b = b.masked_fill(~finite_rows(b)[:, None], 0.0)
        if not bool(b.any()):
            return unmeasured(b, b, 0)
        result = self._solved(b / factor, matrix, transpose)
        if coupled is None and bool((factor != factor[0]).any()):
            apply = matrix.transposed if transpose else matrix.product
            seen = self.account.coupled  # by now
            if seen or not is_solved_jointly(apply, b, factor, result, self.arithmetic):
                return self._scaled(b, matrix, transpose, True)
        residual = result.residual * factor[:, 0].double()
        return result._replace(x=result.x * factor, residual=residual)

    def _solved(
        self, b: Tensor, matrix: Jacobian, transpose: bool, atol: Tensor | None = None
    ) -> SolveResult:
        coupling, found = self.account.coupling, None
        if atol is None:
            atol = self.rtol * row_norm(b)
        if transpose and self.on_device is not None and not self.account.coupled:
            found = self.on_device(matrix, b, atol)
            if found is not None and coupling is None:
                return found
        both: list[Apply] = [matrix.product, matrix.transposed]
        apply, apply_transpose = reversed(both) if transpose else both
        assert self.linear_solve is not None
        return self.linear_solve(LinearSystem(apply, apply_transpose, b, atol), coupling, found)

    def _summed(self, b: Tensor, apply: Apply) -> SolveResult:
        k = self.truncation or 0
        y = told = series(apply, b, k)
        if k and not bool(torch.isfinite(y).all()):
            # Rows of b that are not finite must not reach others where g couples them, and scaled,
            # an overflow is told from a series that has no finite sum.
            b = b.masked_fill(~finite_rows(b)[:, None], 0.0)
            y = told = series(apply, b, k)
            factor = factor_of(b, self.arithmetic, self.account.coupled)
            if factor is not None:
                told = series(apply, b / factor, k)
        return unmeasured(b, told, k)._replace(x=y)


def series(apply: Apply, b: Tensor, k: int) -> Tensor:
    """b + M b + ... + M^k b."""
    y = b
    for _ in range(k):
        y = apply(y) + b
    return y


def unmeasured(b: Tensor, y: Tensor, num_steps: int) -> SolveResult:
    """The account of a y that stopped after `num_steps` by choice, its residual NaN: unknown.

    Where b is zero, so is y, and that is known.
    """
    status = torch.where(finite_rows(y), int(Status.MAX_STEPS), int(Status.NONFINITE))
    nothing = (b == 0).all(1)
    status = status.masked_fill(nothing, int(Status.CONVERGED)).to(torch.int8)
    steps = torch.where(nothing, 0, num_steps).int()
    return SolveResult(y, status, steps, torch.where(nothing, 0.0, torch.nan).double())


def failed(status: Tensor) -> Tensor:
    """(B,) bool: the sample's point means nothing, and neither would its gradient."""
    return status >= Status.DIVERGED


def finite_rows(b: Tensor) -> Tensor:
    """(B,) bool: the row of b (B, D) is finite."""
    return torch.isfinite(b).all(1)


def dropped(b: Tensor, rows: Tensor) -> Tensor:
    """b with zeros where rows (B,) is True, but for rows of b that are themselves not finite.

    An overflow of the user's loss is theirs to see, whatever became of the sample.
    """
    return b.masked_fill((rows & finite_rows(b))[:, None], 0.0)
