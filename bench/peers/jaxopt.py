"""jaxopt (https://github.com/google/jaxopt): jitted Picard and Anderson under vmap."""

from __future__ import annotations

import functools
from typing import Any

from jaxopt import AndersonAcceleration, FixedPointIteration
from jaxopt.linear_solve import solve_bicgstab, solve_gmres, solve_normal_cg

from bench.peers.base import Entry
from bench.peers.jax_common import JaxPeer, Step, Weights

SOLVERS = {"picard": FixedPointIteration, "anderson": AndersonAcceleration}
ADJOINTS = {"normal_cg": solve_normal_cg, "gmres": solve_gmres, "bicgstab": solve_bicgstab}


class Jaxopt(JaxPeer):
    """A jaxopt solver with implicit differentiation; normal_cg is its default adjoint."""

    library = "jaxopt"

    def __init__(self, name: str, solver: str, adjoint: str = "normal_cg", **options: Any) -> None:
        super().__init__(name, solver=solver, adjoint=adjoint, **options)
        self.options = options

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
        adjoint = ADJOINTS[self.settings["adjoint"]]
        solver = SOLVERS[self.settings["solver"]](
            step,
            maxiter=max_steps,
            tol=tol,
            implicit_diff_solve=functools.partial(adjoint, tol=adjoint_tol, maxiter=max_steps),
            **self.options,
        )
        x, state = solver.run(x0, prepared, weights)
        return x, state.num_fun_eval


def entries() -> list[Entry]:
    return [
        Entry("jaxopt Picard (default)", (Jaxopt("default", "picard"),)),
        Entry(
            "jaxopt Picard (best)",
            (
                Jaxopt("adjoint bicgstab", "picard", "bicgstab"),
                Jaxopt("adjoint gmres", "picard", "gmres"),
            ),
        ),
        Entry("jaxopt Anderson (default)", (Jaxopt("default", "anderson"),)),
        Entry(
            "jaxopt Anderson (best)",
            tuple(
                Jaxopt(
                    f"history_size={m}, ridge={ridge:g}, adjoint bicgstab",
                    "anderson",
                    "bicgstab",
                    history_size=m,
                    ridge=ridge,
                )
                for m, ridge in ((5, 1e-8), (5, 1e-10), (3, 1e-10), (8, 1e-10))
            ),
        ),
    ]
