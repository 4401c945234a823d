"""optimistix (https://github.com/patrick-kidger/optimistix): fixed_point under vmap and jit."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import lineax
import optimistix

from bench.peers.base import Entry
from bench.peers.jax_common import JaxPeer, Step, Weights
from bench.problems import Problem


class Optimistix(JaxPeer):
    """optimistix.fixed_point with its implicit adjoint.

    Args:
        solver: "picard" or "newton" (a root finder on g(x) - x, with a dense Jacobian).
        linear: "auto", its default: a dense LU per sample; "gmres" or "bicgstab".
        max_steps: a cap of its own: a Newton step costs as much as hundreds of Picard's.
    """

    library = "optimistix"

    def first_tolerance(self, problem: Problem) -> float:
        return problem.rtol

    def first_adjoint_tolerance(self, problem: Problem) -> float:
        # lineax raises where float32 keeps a solve from its tolerance: begin loose.
        return 1e-3

    def solve_one(
        self,
        step: Step,
        x0: Any,
        prepared: Any,
        weights: Weights,
        tol: Any,
        adjoint_tol: Any,
        max_steps: int,
    ) -> tuple[Any, Any]:
        # The absolute part only keeps the scaled norm finite: it is far below rtol ||x||.
        atol = 1e-3 * tol
        solvers = {"picard": optimistix.FixedPointIteration, "newton": optimistix.Newton}
        adjoint = optimistix.ImplicitAdjoint()
        if self.settings["linear"] != "auto" and adjoint_tol is not None:
            stop = {"rtol": adjoint_tol, "atol": 1e-3 * adjoint_tol, "max_steps": max_steps}
            adjoint = optimistix.ImplicitAdjoint(
                lineax.GMRES(**stop, restart=32, stagnation_iters=32)
                if self.settings["linear"] == "gmres"
                else lineax.BiCGStab(**stop)
            )
        solution = optimistix.fixed_point(
            lambda x, args: step(x, *args),
            solvers[self.settings["solver"]](rtol=tol, atol=atol, norm=_two_norm),
            x0,
            (prepared, weights),
            max_steps=min(max_steps, self.settings.get("max_steps", max_steps)),
            adjoint=adjoint,
            throw=False,
        )
        return solution.value, solution.stats["num_steps"]


def _two_norm(x: Any) -> Any:
    return jnp.sqrt(jnp.mean(x**2))


def entries() -> list[Entry]:
    return [
        Entry(
            "optimistix Picard (default)",
            (Optimistix("default", solver="picard", linear="auto"),),
        ),
        Entry(
            "optimistix (best)",
            (
                Optimistix("Picard, adjoint GMRES", solver="picard", linear="gmres"),
                Optimistix("Picard, adjoint BiCGStab", solver="picard", linear="bicgstab"),
                Optimistix("Picard, the batch as one", True, solver="picard", linear="gmres"),
                Optimistix("Newton", solver="newton", linear="auto", max_steps=20),
            ),
        ),
    ]
