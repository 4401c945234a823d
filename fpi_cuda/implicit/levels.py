"""Derivatives of a fixed point inside torch.func transforms, one level after the other.

At one level the fixed point is a function of g at it, as in plain autograd. The point must by
then carry the derivatives of the lower levels, for those are taken of this level's derivatives
too. So the levels are dealt with from the outermost inwards.

The graphs that are kept are those of single levels, below all vmaps above them, since a backward
pass may come when the levels above have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda import transforms
from fpi_cuda.implicit.live_jacobian import (
    LiveJacobian,
    Spread,
    SpreadJacobian,
    TransposedJacobian,
)
from fpi_cuda.implicit.nodes import pulled_by, refused
from fpi_cuda.implicit.probe import (
    Probe,
    all_levels,
    along,
    matrix_of,
    tangent_at,
    tracked_levels,
)
from fpi_cuda.implicit.scaling import Apply
from fpi_cuda.implicit.strategy import Strategy, finite_rows, unmeasured
from fpi_cuda.result import Status
from fpi_cuda.transforms import Frame, Level

SAME_LEVEL = (
    "fixed_point: torch.autograd was asked for a second derivative of a fixed point that was "
    "solved or differentiated inside a torch.func transform. Nest torch.func.grad, vjp or jvp "
    "instead"
)
LATER_LEVEL = (
    "fixed_point: torch.autograd.grad of a fixed point that was solved outside of a "
    "torch.func.grad, vjp or jvp cannot be differentiated by it. Solve inside of the transform, or "
    "differentiate twice by torch.autograd.grad(create_graph=True)"
)
FUNCTIONALIZE = "fixed_point: torch.func.functionalize of a fixed point is not supported"

HIGHEST = 1 << 30
"""Above every level."""


@dataclass(frozen=True)
class Solved:
    """That a point y = h(y) was solved for, and how.

    Attributes:
        strategy: how to apply (I - dh/dy)^-1.
        matrix: dh/dy on plain (N, D); None where the strategy does not need it.
        frame: where the N samples belong.
        status: (N,) int8, how they ended.
    """

    strategy: Strategy
    matrix: LiveJacobian | None
    frame: Frame
    status: Tensor


@dataclass(frozen=True)
class Point:
    """A solved point at one level, as its backward pass there needs it.

    Attributes:
        pull: c -> (dh/dy)^T c, differentiable at all levels under grad mode; c has the samples
            that h has at this level, those of the vmaps above it included.
        edge: h at the point as a tensor of this level: a first derivative goes through it.
        number: the level.
        token: wrapped for this level, to see when that has ended; None at level 0.
        tracked: levels at which h depends on anything that is differentiated.
    """

    solved: Solved
    pull: Apply
    edge: Tensor
    number: int
    token: Tensor | None
    tracked: frozenset[int]

    def pulled(self, v: Tensor) -> Tensor:
        """(I - dh/dy)^-T v, with its derivatives at all levels that are live but this one."""
        number = self.number
        if self.token is not None and transforms.is_dead(self.token):
            return self._pulled(v, None)
        above = transforms.frame_of((), v).above(number)
        if number == 0 and recording_levels() & tracked_levels(v) - {0}:
            raise RuntimeError(LATER_LEVEL)
        v_here = transforms.strip(v, number, above)
        v_below = transforms.strip(v, number - 1, above) if number else v_here.detach()
        c = self._pulled(transforms.lift(v_below, above), number)
        if not torch.is_grad_enabled():
            return c
        with transforms.truncated(0):
            nothing = torch.zeros((), dtype=v.dtype, device=v.device)
        return c + refused(SAME_LEVEL, nothing, (self.edge, v_here), number)

    def _pulled(self, v: Tensor, skip: int | None) -> Tensor:
        """The same; `skip` is the level of this point, None if that has ended."""
        solved = for_right_hand_side(self.solved, v, self.number, transpose=True)

        def h(c: Tensor) -> Tensor:
            return self.pull(c) + v

        recording = recording_levels()
        return solution(h, v, solved, (self.tracked | tracked_levels(v)) & recording - {skip})


def recording_levels() -> set[int]:
    """Levels at which what is computed now may be differentiated."""
    enabled = torch.is_grad_enabled()
    return {level.number for level in all_levels() if enabled or level.kind == "Jvp"}


def for_right_hand_side(solved: Solved, b: Tensor, number: int, *, transpose: bool) -> Solved:
    """What is needed to solve with dh/dy, or its transpose, for b of the current levels.

    Args:
        number: vmaps of the forward solve from this level on have ended, or are leading
            dimensions of b for another reason.
    """
    forward = solved.frame
    kept = [level for level in forward.batch if level.number < number]
    here = Frame(forward.above(number - 1), forward.samples).leading
    known = {level.number for level in kept}
    found = transforms.batch_levels_of(b) | known
    frame = Frame([level for level in transforms.live_levels() if level.number in found], here)
    added = [i for i, level in enumerate(frame.batch) if level.number not in known]
    spread = Spread(frame.leading, added)
    matrix = solved.matrix
    if matrix is not None:
        if transpose:
            matrix = TransposedJacobian(matrix)
        if added:
            matrix = SpreadJacobian(matrix, spread)
    status = spread.rows(solved.status)
    return Solved(solved.strategy.over(status, spread.rows), matrix, frame, status)


def solution(h: Apply, b: Tensor, solved: Solved, candidates: Set[int]) -> Tensor:
    """The y of y = h(y) = M y + b, with derivatives at the candidate levels.

    Args:
        h: at the current levels.
        b: (samples..., D) there.
        solved: its matrix is M.
    Returns:
        (samples..., D) at the current levels.
    """
    strategy, frame = solved.strategy, solved.frame
    if strategy.truncation is not None:
        y = b
        for _ in range(strategy.truncation):
            y = h(y)
        flat = frame.lower(y)
        given = strategy.account.masked(frame.lower(b))
        if strategy.truncation and not bool(finite_rows(flat).all()):
            # There an overflow is told from a series that has no finite sum.
            with transforms.truncated(0) as restored:
                assert solved.matrix is not None
                _, bad = strategy.solve(given, solved.matrix.bound(restored), transpose=False)
        else:
            _, bad = strategy.account.close(given, unmeasured(given, flat, strategy.truncation))
        zeroed = strategy.account.hopeless if bad is None else bad
        if zeroed is not None:
            keep = frame.raised(~zeroed | ~finite_rows(given))[..., None]
            y = torch.where(keep, y, torch.zeros((), dtype=y.dtype, device=y.device))
        return y
    flat = frame.lower(b)
    status = solved.status
    with transforms.truncated(0) as restored:
        assert solved.matrix is not None
        y, bad = strategy.solve(flat, solved.matrix.bound(restored), transpose=False)
        if bad is not None:
            status = torch.where(bad, Status.NONFINITE, status).to(status.dtype)
            strategy = strategy.over(status)
    return attach_levels(h, y, Solved(strategy, solved.matrix, frame, status), candidates)


def attach_levels(
    h: Apply,
    y: Tensor,
    solved: Solved,
    candidates: Set[int] | None = None,
    look: Callable[[Probe], None] | None = None,
) -> Tensor:
    """y with its derivatives at every live level, or at those that are candidates.

    Args:
        h: the map at the current levels, of which y is the fixed point.
        y: plain (N, D).
        solved: without a matrix, it is taken from h; all levels must then be candidates.
        look: shown an evaluation of h at leaves for y.
    Returns:
        (samples..., D) at the current levels.
    """
    frame = solved.frame
    y = frame.spread(y)
    levels = all_levels()
    if any(level.kind == "Functionalize" for level in levels):
        raise RuntimeError(FUNCTIONALIZE)
    wanted = [
        level
        for level in levels
        if level.kind != "Vmap" and (candidates is None or level.number in candidates)
    ]
    if not wanted:
        return transforms.lift(y, frame.batch)
    anchored = solved.strategy.truncation != 0
    probe: Probe | None = Probe(h, y, 0, wanted, frame, anchored=anchored)
    assert probe is not None
    tracked = [level for level in wanted if probe.depends(level)]
    numbers = frozenset(level.number for level in tracked)
    if tracked and anchored and look is not None:
        look(probe)
    if tracked and anchored and solved.matrix is None:
        solved = replace(solved, matrix=matrix_of(h, y, probe, frame))
    if tracked and any(number < min(numbers) for number in probe.anchors):
        # What is computed from such a leaf would require grad where nothing does.
        probe = None
    for level in levels:
        number = level.number
        if level in frame.batch:
            y = transforms.lift(y, [level])
        if number not in numbers:
            continue
        if probe is None:
            probe = Probe(h, y, number, tracked, frame, anchored=anchored)
        if level.kind == "Jvp":
            y = with_tangent(h, y, probe, level, solved, numbers)
        else:
            y = with_gradient(y, probe, level, solved, numbers)
        probe = None
    return y


def with_gradient(
    y: Tensor, probe: Probe, level: Level, solved: Solved, tracked: frozenset[int]
) -> Tensor:
    """y as a function of h(y) at a level of reverse mode."""
    number = level.number
    edge = probe.edge(number)
    token = None
    if number:
        with transforms.truncated(0):
            token = torch.zeros(())
        token = transforms.wrap(token, number)
    # Without an anchor the strategy asks for no products.
    pull = along(edge, probe.anchors.get(number, edge))
    point = Point(solved, pull, edge, number, token, tracked)
    return pulled_by(point, y, edge, number)


def with_tangent(
    h: Apply, y: Tensor, probe: Probe, level: Level, solved: Solved, tracked: frozenset[int]
) -> Tensor:
    """y with its tangent at a level of forward mode."""
    number = level.number
    above = solved.frame.above(number)

    def with_u(u: Tensor) -> Tensor:
        with transforms.truncated(number):
            return forward_ad.make_dual(transforms.wrap(y, number), transforms.wrap(u, number))

    def tangent_of(out: Tensor) -> Tensor:
        tangent = tangent_at(transforms.strip(out, number, above), number)
        assert tangent is not None
        return transforms.lift(transforms.strip(tangent, number - 1, []), above)

    def push(u: Tensor) -> Tensor:
        """(dh/dy) u and the tangent that h has from its own inputs."""
        return tangent_of(h(transforms.lift(with_u(transforms.strip(u, number - 1, above)), above)))

    lower = {other for other in tracked if other < number}
    t = tangent_of(probe.out)
    # A direction may have vmaps of its own: jacfwd.
    given = for_right_hand_side(solved, t, HIGHEST, transpose=False)
    u = solution(push, t, given, lower)
    return with_u(transforms.strip(u, number - 1, above))
