"""Whether a solution is one of g, evaluated once more on all rows together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fpi_cuda.coupling import Coupling
from fpi_cuda.norms import difference_norm, row_norm
from fpi_cuda.solution import SolveResult, Status

BROKEN_PROMISE = (
    "fixed_point: g has another value at the solution for all rows together than the solver was "
    "given for some of them, in samples {samples}: with rowwise=True no row may depend on another. "
    "Use rowwise=None, and rows that do are solved as one sample; or batch_dims=0, which makes the "
    "whole state one from the start. If g draws random numbers out of reach, draw them from the "
    "default generators of torch, or before the call"
)
UNREPEATABLE = (
    "fixed_point: g has another value at the solution than the solver was given, in samples "
    "{samples}. If it draws random numbers out of reach, draw them from the default generators of "
    "torch, or before the call. If it remembers earlier evaluations, make it a function of x and z"
)
# Of epsilon times the size of x and g(x): kernels that are chosen by the size of a batch, or under
# grad mode, sum in another order. In 16 bits sums are made in more of them, and rounded once.
ROUNDINGS = 1000.0
ROUNDINGS_IN_16_BITS = 8.0
# Of the size of x and g(x): a residual that moved by so much is that of another map.
OTHER_MAP = 1e-2


@dataclass
class SolutionCheck:
    """Raises where g at a solution is another map than the solver was shown.

    Attributes:
        result: the solution; once looked at, told by g of all rows together, to rounding.
        rtol, atol: what its samples have converged to.
        arithmetic: what g is evaluated in.
        coupling: None where it was promised that rows are independent.
        on_word: whether nothing but somebody's word says that rows are independent.
        num_moved: of a backend, see fpi_cuda.norms.num_moved.
    """

    result: SolveResult
    rtol: float
    atol: float
    arithmetic: torch.dtype
    coupling: Coupling | None
    on_word: Callable[[], bool]
    num_moved: Callable[[Tensor, Tensor, Tensor, Tensor], int]

    def __call__(self, x: Tensor, gx: Tensor, ignored: Tensor | None = None) -> None:
        """Look at g(x), x being the solution.

        Args:
            ignored: (B,) bool, samples that need not agree.
        Raises:
            RuntimeError: another map.
        """
        found = self.result
        x, gx = x.detach(), gx.detach().contiguous()
        if not self.num_moved(x, gx, found.status, found.residual):
            return
        residual, norm_gx = difference_norm(gx, x), row_norm(gx)
        size = torch.maximum(norm_gx, row_norm(x))
        change = (residual - found.residual).abs()
        info = torch.finfo(self.arithmetic)
        roundings = ROUNDINGS if info.bits > 16 else ROUNDINGS_IN_16_BITS
        rounding = roundings * info.eps * size
        # False where anything is not finite: that is the solver's to report.
        off = change > torch.maximum(OTHER_MAP * size, rounding)
        lost = residual > 2 * (self.atol + self.rtol * norm_gx) + rounding
        off = off | (lost & (change > rounding) & (found.status == Status.CONVERGED))
        if ignored is not None:
            off = off & ~ignored
        if bool(off.any()):
            samples = torch.nonzero(off).flatten().tolist()[:8]
            message = BROKEN_PROMISE if self.coupling is None and len(x) > 1 else UNREPEATABLE
            raise RuntimeError(message.format(samples=samples))
        if self.on_word():
            told = change > rounding
            if ignored is not None:
                told &= ~ignored
            fails = told & ~(residual <= self.atol + self.rtol * norm_gx)
            fails &= found.status == Status.CONVERGED
            status = torch.where(fails, int(Status.MAX_STEPS), found.status).to(torch.int8)
            residual = torch.where(told, residual, found.residual)
            self.result = found._replace(status=status, residual=residual)
