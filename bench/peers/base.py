"""What the benchmark asks of a library: a solve, a gradient, and an account of its work."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from bench.memory import torch_peak_bytes
from bench.problems import Counter, Problem


class Peer:
    """One library at one setting.

    Args:
        name: of the setting, unique within the library.
        settings: what was passed to the library; goes into the JSON as it is.
    """

    library = ""
    compiles = False
    """Whether a new shape costs seconds before the first solve."""
    promises_residual = False
    """Whether its tolerance is the true relative residual of every sample: none looser is tried,
    though more samples than needed may happen to meet the target."""

    def __init__(self, name: str, **settings: Any) -> None:
        self.name = name
        self.settings = settings

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.settings})"

    def first_tolerance(self, problem: Problem) -> float:
        """Where the search for the loosest sufficient tolerance begins; absolute by default."""
        return problem.rtol * max(1.0, float(problem.features) ** 0.5)

    def first_adjoint_tolerance(self, problem: Problem) -> float:
        """The same for the backward solve; the forward's by default."""
        return self.first_tolerance(problem)

    def solve(self, problem: Problem, tol: float) -> Tensor:
        """(B, ...) the library's fixed point, without gradients."""
        raise NotImplementedError

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The fixed point x, and the gradients of sum(v * x) in z and in each parameter."""
        raise NotImplementedError

    def load(self, problem: Problem, v: Tensor | None = None) -> Any:
        """What `run` and `run_both` take: the problem where this library keeps its data.

        It is not timed. Whatever serves other inputs and weights of the same shapes, such as a
        compiled solve, is made once and kept by the peer.
        """
        return problem, v

    def run(self, loaded: Any, tol: float) -> Any:
        """What is timed: a forward solve, ended, in the library's own arrays."""
        return self.solve(loaded[0], tol)

    def run_both(self, loaded: Any, tol: float, adjoint_tol: float) -> Any:
        """The same with the backward."""
        return self.solve_and_grad(loaded[0], tol, adjoint_tol, loaded[1])

    def way(self, problem: Problem, tol: float) -> str:
        """How g is given to it and run."""
        return "as you wrote it" if problem.g == "your module" else "addmm by hand"

    def num_steps(self, problem: Problem, tol: float) -> Tensor:
        """(B,) evaluations of g on each sample; by default those of the whole batch, counted."""
        counter = Counter(problem)
        self.solve(dataclasses.replace(problem, cell=counter), tol)
        return torch.full((problem.batch,), counter.rows // problem.batch, dtype=torch.int32)

    def peak_bytes(self, problem: Problem, tol: float) -> int:
        """Most memory that one forward solve holds beyond its inputs."""
        return torch_peak_bytes(lambda: self.solve(problem, tol), problem.z.device)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table: one setting, or one picked from several on the problem at hand.

    Attributes:
        candidates: the settings to pick from.
        pick: "fastest", among those that solve most samples; or "first_solving", the first that
            solves as many samples as any.
    """

    label: str
    candidates: tuple[Peer, ...]
    pick: Literal["fastest", "first_solving"] = "fastest"

    @property
    def library(self) -> str:
        return self.candidates[0].library
