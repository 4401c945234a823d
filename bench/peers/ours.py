"""fpi_cuda itself, as a user calls it: a layer around g, made once."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import fpi_cuda as fpi
from bench.peers.base import Entry, Peer
from bench.problems import Problem
from fpi_cuda.loops import traced

traced.WORTH_A_TRACE = 0.0  # what is timed is what a g that was solved for a second has

BASELINE = "fpi_cuda Anderson"
"""The row that all ratios are taken against."""


@functools.lru_cache(maxsize=16)
def layer_of(cell: Any, **options: Any) -> fpi.FPILayer:
    """The layer around g, made once for its options."""
    return fpi.FPILayer(cell, **options)


class FpiCuda(Peer):
    """FPILayer with `solver`; the adjoint's solver is the library's default for it."""

    library = "fpi_cuda"
    promises_residual = True

    def __init__(
        self,
        solver: fpi.Picard | fpi.Anderson | fpi.Broyden,
        route: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(repr(solver), solver=repr(solver), route=route, **options)
        self.options = {"solver": solver, "route": route, **options}

    def first_tolerance(self, problem: Problem) -> float:
        return problem.rtol

    def layer(self, problem: Problem, tol: float, adjoint_tol: float) -> fpi.FPILayer:
        adjoint = fpi.Implicit(rtol=adjoint_tol)
        steps = problem.max_steps
        return layer_of(problem.cell, rtol=tol, adjoint=adjoint, max_steps=steps, **self.options)

    def solve(self, problem: Problem, tol: float) -> Tensor:
        with torch.no_grad():
            return self.layer(problem, tol, tol)(problem.z)

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        z = problem.z.detach().requires_grad_()
        x = self.layer(problem, tol, adjoint_tol)(z)
        return x.detach(), list(torch.autograd.grad(x, [z, *problem.parameters], v))

    def way(self, problem: Problem, tol: float) -> str:
        layer = self.layer(problem, tol, tol)
        with torch.no_grad():
            layer(problem.z)
        said = str(layer.explain()).partition("route")[2].split()
        return f"{said[0]}: {problem.g}"

    def num_steps(self, problem: Problem, tol: float) -> Tensor:
        with torch.no_grad():
            return self.layer(problem, tol, tol).solve(problem.z).num_steps


def entries() -> list[Entry]:
    return [
        Entry(BASELINE, (FpiCuda(fpi.Anderson(m=5)),)),
        Entry("fpi_cuda Picard", (FpiCuda(fpi.Picard()),)),
        Entry("fpi_cuda Broyden", (FpiCuda(fpi.Broyden()),)),
    ]
