"""A plain torch loop: the Picard iteration that people write by hand, with the usual hook."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.base import Entry, Peer
from bench.problems import Problem

StopTest = Callable[[Tensor, Tensor, float], bool]


def whole_batch(image: Tensor, x: Tensor, tol: float) -> bool:
    """The stop test that most loops have: one norm over the batch."""
    return bool((image - x).norm() <= tol * image.norm())


def every_sample(image: Tensor, x: Tensor, tol: float) -> bool:
    """Stop when each sample meets the tolerance."""
    return bool(((image - x).norm(dim=1) <= tol * image.norm(dim=1)).all())


STOP_TESTS: dict[str, StopTest] = {"whole_batch": whole_batch, "every_sample": every_sample}


def picard(
    step: Callable[[Tensor], Tensor], x: Tensor, tol: float, max_steps: int, stop: StopTest
) -> Tensor:
    """Iterate x <- step(x) until `stop` or `max_steps`."""
    for _ in range(max_steps):
        image = step(x)
        done = stop(image, x, tol)
        x = image
        if done:
            break
    return x


class TorchLoop(Peer):
    """Hand-written Picard; the backward iterates the adjoint the same way."""

    library = "torch loop"

    def first_tolerance(self, problem: Problem) -> float:
        return problem.rtol

    def solve(self, problem: Problem, tol: float) -> Tensor:
        stop = STOP_TESTS[self.settings["stop"]]
        with torch.no_grad():
            prepared = problem.cell.prepare(problem.z)
            return picard(
                lambda x: problem.cell.step(x, prepared), problem.x0, tol, problem.max_steps, stop
            )

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        stop = STOP_TESTS[self.settings["stop"]]
        z = problem.z.detach().requires_grad_()
        prepared = problem.cell.prepare(z)
        with torch.no_grad():
            x = picard(
                lambda x: problem.cell.step(x, prepared), problem.x0, tol, problem.max_steps, stop
            )
        state = x.requires_grad_()
        image = problem.cell.step(state, prepared)

        def adjoint_step(c: Tensor) -> Tensor:
            return torch.autograd.grad(image, state, c, retain_graph=True)[0] + v

        c = picard(adjoint_step, v, adjoint_tol, problem.max_steps, stop)
        return x.detach(), list(torch.autograd.grad(image, [z, *problem.parameters], c))


def entries() -> list[Entry]:
    return [
        Entry("torch loop, batch-wide stop", (TorchLoop("batch-wide", stop="whole_batch"),)),
        Entry("torch loop, per-sample stop", (TorchLoop("per-sample", stop="every_sample"),)),
    ]
