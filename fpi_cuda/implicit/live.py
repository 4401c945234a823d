"""A whole solve inside torch.func transforms: on plain numbers, then attached level by level."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fpi_cuda import transforms
from fpi_cuda.implicit.cut_graph import notice_cut_apart, notice_cut_inside
from fpi_cuda.implicit.flat_map import FlatMap
from fpi_cuda.implicit.levels import Solved, attach_levels
from fpi_cuda.implicit.mending import mended_if_batchwise
from fpi_cuda.implicit.probe import tracked_levels
from fpi_cuda.implicit.strategy import Strategy
from fpi_cuda.result import SolveResult
from fpi_cuda.transforms import Frame

Evaluate = Callable[[Tensor, "Tensor | None"], Tensor]


def live_solve(
    flat_map: FlatMap, x0: Tensor, run: Callable[[Evaluate, Tensor], SolveResult]
) -> tuple[SolveResult, Frame]:
    """Solve for the samples of all vmaps at once, outside of every transform.

    Args:
        x0: (B, D) at the current levels.
        run: the solver, on plain tensors.
    Returns:
        Plain results for N samples, and how these belong to the vmaps.
    """
    with torch.no_grad():
        gx = flat_map.evaluate(x0.detach(), None)
    frame = transforms.frame_of(x0.shape[:1], gx, x0)
    start = frame.lower(x0)
    with transforms.truncated(0) as restored, torch.no_grad():

        def evaluate(x: Tensor, rows: Tensor | None) -> Tensor:
            with restored():
                return frame.lower(flat_map.evaluate(frame.raised(x), rows))

        return run(evaluate, start), frame


def attach_live(flat_map: FlatMap, x_star: Tensor, strategy: Strategy, frame: Frame) -> Tensor:
    """x_star with its derivatives at every live level.

    Args:
        x_star: plain (N, D), the samples as in `frame`.
        strategy: with the account of these N samples.
    Returns:
        (B, D) at the current levels.
    """
    hopeless = strategy.account.hopeless
    if hopeless is not None and not frame.batch and not bool(hopeless.all()):
        flat_map = mended_if_batchwise(flat_map, x_star, hopeless)
    solved = Solved(strategy, None, frame, strategy.account.status)

    look = functools.partial(notice_cut_inside, flat_map, x_star, frame)
    value = attach_levels(flat_map, x_star, solved, look=look)
    if strategy.truncation == 0 and flat_map.damping[0] > 1 and tracked_levels(value):
        notice_cut_apart(flat_map, x_star, frame)
    return value
