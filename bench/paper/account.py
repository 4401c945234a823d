"""How the solves of a training or a test went: solved, at the cap, steps."""

from __future__ import annotations

from torch import nn

import fpi_cuda as fpi
from fpi_cuda.solution import Solution, Status


class Account:
    """Sums over solves; read it with `summary`."""

    def __init__(self) -> None:
        self.solves = self.converged = self.capped = self.steps = 0
        self.adjoint_solves = self.adjoint_converged = self.adjoint_steps = self.zeroed = 0

    def add(self, solution: Solution | None) -> None:
        """Count a solution, and its adjoint solve where backward has run; None counts nothing."""
        if solution is None:
            return
        self.solves += solution.status.numel()
        self.converged += int(solution.converged.sum())
        self.capped += int((solution.status == Status.MAX_STEPS).sum())
        self.steps += int(solution.num_steps.sum())
        adjoint = solution.adjoint_stats
        if adjoint is not None:
            self.adjoint_solves += adjoint.status.numel()
            self.adjoint_converged += int(adjoint.converged.sum())
            self.adjoint_steps += int(adjoint.num_steps.sum())
            self.zeroed += adjoint.num_zeroed

    def summary(self) -> dict[str, float]:
        """Shares of solves and mean steps per sample; empty where nothing was solved.

        Returns:
            solved, at_cap and steps of the forward solves; adjoint_solved, adjoint_steps and
            zeroed (the share of samples without gradient) where there were adjoint solves.
        """
        if not self.solves:
            return {}
        shares = {
            "solved": self.converged / self.solves,
            "at_cap": self.capped / self.solves,
            "steps": self.steps / self.solves,
        }
        if self.adjoint_solves:
            shares |= {
                "adjoint_solved": self.adjoint_converged / self.adjoint_solves,
                "adjoint_steps": self.adjoint_steps / self.adjoint_solves,
                "zeroed": self.zeroed / self.adjoint_solves,
            }
        return shares


def last_solution(model: nn.Module) -> Solution | None:
    """Of the FPILayer in the model; None where it has none."""
    for module in model.modules():
        if isinstance(module, fpi.FPILayer):
            return module.last_solution
    return None
