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

    def __init__(
        self,
        name: str,
        solver: str,
        adjoint: str = "normal_cg",
        batched: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(name, batched, solver=solver, adjoint=adjoint, **options)
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


def _best_picard() -> tuple[Jaxopt, ...]:
    return tuple(
        Jaxopt(f"{_whole(batched)}adjoint {adjoint}", "picard", adjoint, batched=batched)
        for batched in (False, True)
        for adjoint in ("bicgstab", "gmres", "normal_cg")
    )


def _best_anderson() -> tuple[Jaxopt, ...]:
    return tuple(
        Jaxopt(
            f"{_whole(batched)}history_size={m}, ridge={ridge:g}, adjoint bicgstab",
            "anderson",
            "bicgstab",
            batched=batched,
            history_size=m,
            ridge=ridge,
        )
        for m, ridge, batched in (
            (5, 1e-8, False), (5, 1e-10, False), (3, 1e-10, False), (8, 1e-10, False),
            (5, 1e-8, True), (3, 1e-8, True),
        )
    )  # fmt: skip


def _whole(batched: bool) -> str:
    return "the batch as one, " if batched else ""


def entries() -> list[Entry]:
    return [
        Entry("jaxopt Picard (default)", (Jaxopt("default", "picard"),)),
        Entry("jaxopt Picard (best)", _best_picard()),
        Entry("jaxopt Anderson (default)", (Jaxopt("default", "anderson"),)),
        Entry("jaxopt Anderson (best)", _best_anderson()),
    ]
