"""The plain torch loop as a CUDA graph: cuBLAS and elementwise kernels, and nobody who decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.peers.base import Entry, Peer
from bench.problems import Problem

WARM_UPS = 3


class GraphedLoop(Peer):
    """Picard, as many steps as the slowest sample needs, captured for each problem and tolerance.

    How many that is was found before, and is not timed: no loop of such kernels can be faster.
    """

    library = "CUDA graph"
    compiles = True
    promises_residual = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._counts: dict[tuple[Any, ...], int] = {}
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._kept: list[object] = []  # so that an id in a key stays its own

    def first_tolerance(self, problem: Problem) -> float:
        return problem.rtol

    def solve(self, problem: Problem, tol: float) -> Tensor:
        count = self.steps_to(problem, tol)

        def body() -> Tensor:
            with torch.no_grad():
                return repeated(problem.bound(problem.z), problem.x0, count)

        return self._replayed(body, problem, count)

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        count = self.steps_to(problem, tol)
        adjoint_count = self.adjoint_steps_to(problem, tol, adjoint_tol, v)
        z = problem.z.detach().clone().requires_grad_()

        def body() -> tuple[Tensor, list[Tensor]]:
            step = problem.bound(z)
            with torch.no_grad():
                x = repeated(step, problem.x0, count)
            state = x.requires_grad_()
            image = step(state)
            c = v
            for _ in range(adjoint_count):
                c = torch.autograd.grad(image, state, c, retain_graph=True)[0] + v
            return x, list(torch.autograd.grad(image, [z, *problem.parameters], c))

        return self._replayed(body, problem, count, adjoint_count, id(v))

    def num_steps(self, problem: Problem, tol: float) -> Tensor:
        return torch.full((problem.batch,), self.steps_to(problem, tol), dtype=torch.int32)

    def steps_to(self, problem: Problem, tol: float) -> int:
        """Picard steps until every sample meets the tolerance."""
        key = (id(problem), tol)
        if key not in self._counts:
            with torch.no_grad():
                self._counts[key] = steps_of(
                    problem.bound(problem.z), problem.x0, tol, problem.max_steps
                )
            self._kept.append(problem)
        return self._counts[key]

    def adjoint_steps_to(self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor) -> int:
        """The same of the adjoint, at the fixed point."""
        key = (id(problem), tol, adjoint_tol, id(v))
        if key not in self._counts:
            state = self.solve(problem, tol).clone().requires_grad_()
            image = problem.bound(problem.z)(state)

            def adjoint_step(c: Tensor) -> Tensor:
                return torch.autograd.grad(image, state, c, retain_graph=True)[0] + v

            self._counts[key] = steps_of(adjoint_step, v, adjoint_tol, problem.max_steps)
            self._kept += [problem, v]
        return self._counts[key]

    def _replayed(self, body: Callable[[], Any], problem: Problem, *key: Any) -> Any:
        key = (id(problem), *key)
        if key not in self._graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    body()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = body()
            self._kept.append(problem)
            self._graphs[key] = (graph, result)
        graph, result = self._graphs[key]
        graph.replay()
        return result


def repeated(step: Callable[[Tensor], Tensor], x: Tensor, count: int) -> Tensor:
    """x after `count` Picard steps."""
    for _ in range(count):
        x = step(x)
    return x


def steps_of(step: Callable[[Tensor], Tensor], x: Tensor, tol: float, max_steps: int) -> int:
    """Steps until every sample moves by no more than the tolerance."""
    for count in range(1, max_steps + 1):
        image = step(x)
        if bool(((image - x).norm(dim=1) <= tol * image.norm(dim=1)).all()):
            return count
        x = image
    return max_steps


def entries() -> list[Entry]:
    if not torch.cuda.is_available():
        return []
    return [Entry("torch loop in a CUDA graph", (GraphedLoop("fixed number of steps"),))]
