"""xitorch (https://github.com/xitorch/xitorch): equilibrium, one norm over the whole batch."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from xitorch.optimize import equilibrium

from bench.peers.base import Entry, Peer
from bench.problems import Problem


class _Step(nn.Module):
    """The step as a method: xitorch takes gradients in the parameters of a module only."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.step = problem.written[1]

    def forward(self, x: Tensor, *prepared: Tensor) -> Tensor:
        return self.step(x, *prepared)


class Xitorch(Peer):
    """xitorch.optimize.equilibrium; the backward is its bicgstab, its default."""

    library = "xitorch"

    def _run(self, problem: Problem, z: Tensor, tol: float, adjoint_tol: float) -> Tensor:
        tensors = problem.written[0](z)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it did not converge: the residual tells
            return equilibrium(
                _Step(problem).forward,
                problem.x0,
                params=tensors,
                bck_options={
                    "method": "bicgstab",
                    "rtol": adjoint_tol,
                    "atol": 0.0,
                    "max_niter": problem.max_steps,
                },
                maxiter=problem.max_steps,
                f_tol=tol,
                x_tol=float("inf"),
                **self.settings,
            )

    def first_tolerance(self, problem: Problem) -> float:
        return super().first_tolerance(problem) * problem.batch**0.5

    def solve(self, problem: Problem, tol: float) -> Tensor:
        with torch.no_grad():
            return self._run(problem, problem.z, tol, tol)

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        z = problem.z.detach().requires_grad_()
        x = self._run(problem, z, tol, adjoint_tol)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grads = torch.autograd.grad(x, [z, *problem.parameters], v)
        return x.detach(), list(grads)


def _best_anderson() -> tuple[Xitorch, ...]:
    return tuple(
        Xitorch(f"m={m}, lmbda={ridge:g}", method="anderson_acc", msize=m, lmbda=ridge)
        for m, ridge in ((5, 1e-10), (8, 1e-10), (5, 1e-4))
    )


def _best_broyden() -> tuple[Xitorch, ...]:
    # alpha=-1 begins with a Picard step; its own choice of alpha walks away from the fixed point.
    return (
        Xitorch("broyden1, alpha=-1", method="broyden1", alpha=-1.0, line_search=False),
        Xitorch("broyden2, alpha=-1", method="broyden2", alpha=-1.0, line_search=False),
        Xitorch("broyden1, alpha=-1, line search", method="broyden1", alpha=-1.0),
    )


def entries() -> list[Entry]:
    return [
        Entry("xitorch broyden1 (default)", (Xitorch("default", method="broyden1"),)),
        Entry("xitorch Anderson (best)", _best_anderson()),
        Entry("xitorch Broyden (best)", _best_broyden()),
    ]
