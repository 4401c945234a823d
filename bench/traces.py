"""The residual of each sample at each evaluation of g, recorded from inside the solve."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from bench.peers import Peer
from bench.problems import Problem


class RecordingCell:
    """A cell that keeps ||g(x) - x|| / ||g(x)|| of every sample at every evaluation.

    It does not declare itself row-wise, so that every evaluation holds the whole batch.
    """

    def __init__(self, cell: Any) -> None:
        self.cell = cell
        self.residuals: list[list[float]] = []

    def prepare(self, z: Tensor) -> Any:
        return self.cell.prepare(z)

    def step(self, x: Tensor, prepared: Any) -> Tensor:
        image = self.cell.step(x, prepared)
        self.residuals.append(((image - x).norm(dim=1) / image.norm(dim=1)).tolist())
        return image

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return self.step(x, self.prepare(z))


def residual_traces(peer: Peer, problem: Problem, tol: float) -> list[list[float]]:
    """Per sample, the relative residual at each evaluation until the solve ends."""
    recorder = RecordingCell(problem.cell)
    peer.solve(dataclasses.replace(problem, cell=recorder), tol)
    return [list(trace) for trace in zip(*recorder.residuals, strict=True)]
