"""torchdeq (https://github.com/locuslab/torchdeq): its solvers, through its DEQ module."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
import torchdeq
from torch import Tensor
from torchdeq import solver as solvers

from bench.peers.base import Entry, Peer
from bench.problems import Problem

STEPS_PER_DECADE = 16
"""simple_fixed_point_iter has no stop test: the search chooses its steps through the tolerance."""
FEWER = 32.0
"""Where that search begins, over rtol: most maps contract faster than so many steps a decade."""


class TorchDEQ(Peer):
    """torchdeq's DEQ with implicit differentiation.

    Args:
        f_solver, b_solver: names of its forward and backward solvers.
        stop_mode: "abs", its default, or "rel"; both take the largest residual of the batch.
        max_iter: None takes the problem's cap.
        hook_ift: its backward by a hook.
        options: keywords of the solver (m, lam, LBFGS_thres); the backward gets them too.
    """

    library = "torchdeq"

    def __init__(
        self,
        name: str,
        f_solver: str,
        b_solver: str = "fixed_point_iter",
        stop_mode: str = "abs",
        max_iter: int | None = None,
        hook_ift: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            name,
            f_solver=f_solver,
            b_solver=b_solver,
            stop_mode=stop_mode,
            max_iter=max_iter,
            hook_ift=hook_ift,
            **options,
        )
        self.options = options
        self._made: dict[tuple[Any, ...], Any] = {}

    def first_tolerance(self, problem: Problem) -> float:
        if self._has_no_stop_test:
            return FEWER * problem.rtol
        relative = self.settings["stop_mode"] == "rel"
        return problem.rtol if relative else super().first_tolerance(problem)

    def _deq(self, problem: Problem, tol: float, adjoint_tol: float, training: bool) -> Any:
        """The DEQ, made once for its options."""
        most = self.settings["max_iter"] or problem.max_steps
        key = (tol, adjoint_tol, most, training)
        if key not in self._made:
            deq = torchdeq.get_deq(
                f_solver=self.settings["f_solver"],
                b_solver=_with_options(self.settings["b_solver"], self.options),
                ift=True,
                hook_ift=self.settings["hook_ift"],
                f_tol=tol,
                b_tol=adjoint_tol,
                f_stop_mode=self.settings["stop_mode"],
                b_stop_mode=self.settings["stop_mode"],
                f_max_iter=fixed_steps(tol) if self._has_no_stop_test else most,
                b_max_iter=most,
            )
            self._made[key] = deq.train(training)
        return self._made[key]

    @property
    def _has_no_stop_test(self) -> bool:
        return bool(self.settings["f_solver"] == "simple_fixed_point_iter")

    def solve(self, problem: Problem, tol: float) -> Tensor:
        deq = self._deq(problem, tol, tol, training=False)
        with torch.no_grad():
            states, _ = deq(problem.bound(problem.z), problem.x0, solver_kwargs=self.options)
        return states[-1]

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        deq = self._deq(problem, tol, adjoint_tol, training=True)
        z = problem.z.detach().requires_grad_()
        states, _ = deq(problem.bound(z), problem.x0, solver_kwargs=self.options)
        x = states[-1]
        return x.detach(), list(torch.autograd.grad(x, [z, *problem.parameters], v))


def fixed_steps(tol: float) -> int:
    """Number of steps that stands for `tol` where a solver has no stop test."""
    return max(2, round(-STEPS_PER_DECADE * math.log10(tol)))


def _with_options(name: str, options: dict[str, Any]) -> str:
    """The name of solver `name` with `options` bound: DEQ gives its backward solver none."""
    if not options or name in ("fixed_point_iter", "simple_fixed_point_iter"):
        return name
    bound = f"{name} {sorted(options.items())}"
    solvers.register_solver(bound, functools.partial(solvers.get_solver(name), **options))
    return bound


CAPS = (40, 80, 160, 320, 640, 1000)
"""40 is its default cap; a default row takes the first of these that solves the problem."""


def _defaults(solver: str) -> tuple[TorchDEQ, ...]:
    return tuple(TorchDEQ(f"max_iter={cap}", solver, max_iter=cap) for cap in CAPS)


def _best_anderson() -> tuple[TorchDEQ, ...]:
    # The cap is part of a setting: what a solve does not need of it, it fills with numbers.
    given = [
        (m, lam, cap, backward, False)
        for m, lam, backward in itertools.product(
            (6, 5, 4, 10, 3), (1e-8, 1e-10, 1e-4), ("anderson", "fixed_point_iter")
        )
        for cap in (160,)
    ]
    given += [(6, 1e-8, 60, "anderson", False), (6, 1e-8, 1000, "anderson", False)]
    given += [(4, 1e-8, 60, "fixed_point_iter", True), (6, 1e-8, 160, "anderson", True)]
    return tuple(
        TorchDEQ(
            f"m={m}, lam={lam:g}, rel, {cap} steps, backward {backward}{_hooked(hook)}",
            "anderson",
            backward,
            "rel",
            cap,
            hook,
            m=m,
            lam=lam,
        )
        for m, lam, cap, backward, hook in given
    )


def _hooked(hook: bool) -> str:
    return " by a hook" if hook else ""


def _best_broyden() -> tuple[TorchDEQ, ...]:
    return tuple(
        TorchDEQ(
            f"LBFGS_thres={memory}, rel, {cap} steps, backward {backward}",
            "broyden",
            backward,
            "rel",
            cap,
            LBFGS_thres=memory,
        )
        for memory, cap, backward in (
            (60, 60, "broyden"),
            (160, 160, "broyden"),
            (30, 160, "broyden"),
            (60, 60, "fixed_point_iter"),
        )
    )


def _best_picard() -> tuple[TorchDEQ, ...]:
    # Its backward takes no simple_fixed_point_iter: that solver passes a damping on.
    found = [
        TorchDEQ(
            f"simple, backward {backward}, {cap} steps{_hooked(hook)}",
            "simple_fixed_point_iter",
            backward,
            "rel",
            cap,
            hook,
        )
        for cap, backward, hook in itertools.product(
            (160, 60), ("fixed_point_iter", "anderson"), (False, True)
        )
    ]
    return (
        *found,
        *(
            TorchDEQ(f"rel, {cap} steps", "fixed_point_iter", "fixed_point_iter", "rel", cap)
            for cap in (60, 160, 1000)
        ),
    )


def entries() -> list[Entry]:
    return [
        Entry("torchdeq Anderson (default)", _defaults("anderson"), pick="first_solving"),
        Entry("torchdeq Anderson (best)", _best_anderson()),
        Entry("torchdeq Broyden (default)", _defaults("broyden"), pick="first_solving"),
        Entry("torchdeq Broyden (best)", _best_broyden()),
        Entry("torchdeq Picard (default)", _defaults("fixed_point_iter"), pick="first_solving"),
        Entry("torchdeq Picard (best)", _best_picard()),
    ]
