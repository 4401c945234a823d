"""fpi_cuda itself, as a user calls it: fixed_point on a cell."""

from __future__ import annotations

import torch
from torch import Tensor

import fpi_cuda as fpi
from bench.peers.base import Entry, Peer
from bench.problems import Problem

BASELINE = "fpi_cuda Anderson"
"""The row that all ratios are taken against."""


class FpiCuda(Peer):
    """fixed_point with `solver`; the adjoint's solver is the library's default for it."""

    library = "fpi_cuda"
    promises_residual = True

    def __init__(
        self, solver: fpi.Picard | fpi.Anderson | fpi.Broyden, route: str | None = None
    ) -> None:
        super().__init__(repr(solver), solver=repr(solver), route=route)
        self.solver = solver
        self.route = route

    def first_tolerance(self, problem: Problem) -> float:
        return problem.rtol

    def _solution(
        self, problem: Problem, z: Tensor, tol: float, adjoint_tol: float
    ) -> fpi.Solution:
        return fpi.fixed_point(
            problem.cell,
            problem.x0,
            z,
            solver=self.solver,
            rtol=tol,
            max_steps=problem.max_steps,
            route=self.route,
            adjoint=fpi.Implicit(rtol=adjoint_tol),
        )

    def solve(self, problem: Problem, tol: float) -> Tensor:
        with torch.no_grad():
            return self._solution(problem, problem.z, tol, tol).value

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        z = problem.z.detach().requires_grad_()
        x = self._solution(problem, z, tol, adjoint_tol).value
        grads = torch.autograd.grad((v * x).sum(), [z, *problem.parameters])
        return x.detach(), list(grads)

    def num_steps(self, problem: Problem, tol: float) -> Tensor:
        with torch.no_grad():
            return self._solution(problem, problem.z, tol, tol).num_steps


def entries() -> list[Entry]:
    return [
        Entry(BASELINE, (FpiCuda(fpi.Anderson(m=5)),)),
        Entry("fpi_cuda Picard", (FpiCuda(fpi.Picard()),)),
        Entry("fpi_cuda Broyden", (FpiCuda(fpi.Broyden()),)),
    ]
