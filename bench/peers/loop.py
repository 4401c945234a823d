"""Plain torch loops: the Picard iteration that people write by hand, with the usual hook."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.base import Entry, Peer
from bench.problems import Problem, norms, per_sample

Step = Callable[[Tensor], Tensor]
Loop = Callable[[Step, Tensor, float, int], Tensor]


def whole_batch(step: Step, x: Tensor, tol: float, max_steps: int) -> Tensor:
    """The stop test that most loops have: one norm over the batch."""
    for _ in range(max_steps):
        image = step(x)
        done = bool((image - x).norm() <= tol * image.norm())
        x = image
        if done:
            break
    return x


def every_sample(step: Step, x: Tensor, tol: float, max_steps: int) -> Tensor:
    """Stop when each sample meets the tolerance."""
    for _ in range(max_steps):
        image = step(x)
        done = bool((norms(image - x) <= tol * norms(image)).all())
        x = image
        if done:
            break
    return x


def masked(step: Step, x: Tensor, tol: float, max_steps: int) -> Tensor:
    """Each sample stays where it met the tolerance: no answer depends on who else is there."""
    active = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    for _ in range(max_steps):
        image = step(x)
        moving = norms(image - x) > tol * norms(image)
        x = torch.where(per_sample(active, x), image, x)
        active = active & moving
        if not bool(active.any()):
            break
    return x


LOOPS: dict[str, Loop] = {
    "whole_batch": whole_batch, "every_sample": every_sample, "masked": masked,
}  # fmt: skip


class TorchLoop(Peer):
    """Hand-written Picard; the backward iterates the adjoint the same way."""

    library = "torch loop"

    def first_tolerance(self, problem: Problem) -> float:
        return problem.rtol

    def solve(self, problem: Problem, tol: float) -> Tensor:
        loop = LOOPS[self.settings["stop"]]
        with torch.no_grad():
            return loop(problem.bound(problem.z), problem.x0, tol, problem.max_steps)

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        loop = LOOPS[self.settings["stop"]]
        z = problem.z.detach().requires_grad_()
        step = problem.bound(z)
        with torch.no_grad():
            x = loop(step, problem.x0, tol, problem.max_steps)
        state = x.requires_grad_()
        image = step(state)

        def adjoint_step(c: Tensor) -> Tensor:
            return torch.autograd.grad(image, state, c, retain_graph=True)[0] + v

        c = loop(adjoint_step, v, adjoint_tol, problem.max_steps)
        return x.detach(), list(torch.autograd.grad(image, [z, *problem.parameters], c))


def entries() -> list[Entry]:
    return [
        Entry("hand loop, a mask per sample", (TorchLoop("masked", stop="masked"),)),
        Entry("torch loop, batch-wide stop", (TorchLoop("batch-wide", stop="whole_batch"),)),
        Entry("torch loop, per-sample stop", (TorchLoop("per-sample", stop="every_sample"),)),
    ]
