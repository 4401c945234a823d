"""Derivatives of a fixed point inside torch.func transforms, one level after the other.

At one level the fixed point is a function of g at it, as in plain autograd. The point must by
then carry the derivatives of the lower levels, for those are taken of this level's derivatives
too. So the levels are dealt with from the outermost inwards.

The graphs that are kept are those of single levels, below all vmaps above them, since a backward
pass may come when the levels above have ended.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from fpi_cuda import transforms
from fpi_cuda.implicit.graph import depends_beyond, mark_as_anchor
from fpi_cuda.implicit.linearization import Jacobian, Linearization, gradient
from fpi_cuda.implicit.strategy import Apply, Strategy, unmeasured
from fpi_cuda.result import Status
from fpi_cuda.transforms import Frame, Level, Restore

SAME_LEVEL = (
    "fixed_point: torch.autograd was asked for a second derivative of a fixed point that was "
    "solved or differentiated inside a torch.func transform. Nest torch.func.grad, vjp or jvp "
    "instead"
)
MIXED = (
    "fixed_point: inside torch.func transforms a tensor has a tangent from "
    "torch.autograd.forward_ad. Use torch.func.jvp instead"
)
FUNCTIONALIZE = "fixed_point: torch.func.functionalize of a fixed point is not supported"

HIGHEST = 1 << 30
"""Above every level."""
PLAIN = Level(0, "Grad", 0)
"""Plain autograd, below all transforms."""


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

        recording = {
            level.number for level in all_levels() if torch.is_grad_enabled() or level.kind == "Jvp"
        }
        return solution(h, v, solved, (self.tracked | tracked_levels(v)) & recording - {skip})


class Spread:
    """How N samples become N R: each of them with R right-hand sides.

    Args:
        sizes: dimensions whose product is N R, as they lie in a plain tensor.
        added: which of them number the right-hand sides.
    """

    def __init__(self, sizes: Sequence[int], added: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._added = tuple(added)
        self.num_sides = math.prod(self._sizes[i] for i in self._added)

    def rows(self, t: Tensor) -> Tensor:
        """(N,) repeated for every right-hand side: (N R,)."""
        kept = [1 if i in self._added else size for i, size in enumerate(self._sizes)]
        with transforms.truncated(0):
            return t.reshape(kept).expand(self._sizes).reshape(-1)

    def apart(self, t: Tensor) -> Tensor:
        """(N R, D) -> (R, N, D)."""
        front = t.reshape(*self._sizes, -1).movedim(self._added, self._front)
        return front.reshape(self.num_sides, -1, t.shape[-1])

    def together(self, t: Tensor) -> Tensor:
        """(R, N, D) -> (N R, D)."""
        added = [self._sizes[i] for i in self._added]
        kept = [size for i, size in enumerate(self._sizes) if i not in self._added]
        split = t.reshape(*added, *kept, -1).movedim(self._front, self._added)
        return split.reshape(-1, t.shape[-1])

    @property
    def _front(self) -> tuple[int, ...]:
        return tuple(range(len(self._added)))


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
    return Solved(solved.strategy.over(status), matrix, frame, status)


class LiveJacobian(Jacobian, Protocol):
    """A matrix for plain (N, D) that may have to be evaluated at the levels live by then."""

    def bound(self, restored: Restore) -> LiveJacobian:
        """The matrix for use outside of all levels; `restored` enters them again."""


class PlainJacobian:
    """A matrix that is known from a plain graph, whatever levels are live."""

    def __init__(self, matrix: Jacobian) -> None:
        self._matrix = matrix

    def product(self, t: Tensor) -> Tensor:
        """M t."""
        return self._matrix.product(t)

    def transposed(self, c: Tensor) -> Tensor:
        """M^T c."""
        return self._matrix.transposed(c)

    def bound(self, restored: Restore) -> PlainJacobian:
        """See LiveJacobian."""
        return self


class TransposedJacobian:
    """The transpose of a matrix."""

    def __init__(self, matrix: LiveJacobian) -> None:
        self._matrix = matrix

    def product(self, t: Tensor) -> Tensor:
        """M^T t."""
        return self._matrix.transposed(t)

    def transposed(self, c: Tensor) -> Tensor:
        """M c."""
        return self._matrix.product(c)

    def bound(self, restored: Restore) -> TransposedJacobian:
        """See LiveJacobian."""
        return TransposedJacobian(self._matrix.bound(restored))


class LevelJacobian:
    """A matrix known from the graph of some transform, where plain autograd records nothing.

    That is so for transforms entered under no_grad.

    Args:
        pull: c -> M^T c at the current levels.
        frame: where (N, D) belongs at these levels.
    """

    def __init__(self, pull: Apply, frame: Frame) -> None:
        self._pull = pull
        self._frame = frame
        self._restored: Restore | None = None
        self._push: Callable[[Tensor], tuple[Tensor]] | None = None

    def transposed(self, c: Tensor) -> Tensor:
        """M^T c."""
        assert self._restored is not None
        with self._restored():
            return self._frame.lower(self._pull(self._frame.raised(c)))

    def product(self, t: Tensor) -> Tensor:
        """M t, the derivative of M^T c in c, along t."""
        assert self._restored is not None
        with self._restored():
            if self._push is None:
                nothing = torch.zeros_like(self._frame.raised(t))
                self._push = torch.func.vjp(self._pull, nothing)[1]
            return self._frame.lower(self._push(self._frame.raised(t))[0])

    def bound(self, restored: Restore) -> LevelJacobian:
        """See LiveJacobian."""
        other = copy.copy(self)
        other._restored = restored
        return other


class SpreadJacobian:
    """A matrix applied to several right-hand sides at once."""

    def __init__(self, matrix: LiveJacobian, spread: Spread) -> None:
        self._matrix = matrix
        self._spread = spread

    def product(self, t: Tensor) -> Tensor:
        """M t."""
        return self._each(self._matrix.product, t)

    def transposed(self, c: Tensor) -> Tensor:
        """M^T c."""
        return self._each(self._matrix.transposed, c)

    def bound(self, restored: Restore) -> SpreadJacobian:
        """See LiveJacobian."""
        return SpreadJacobian(self._matrix.bound(restored), self._spread)

    def _each(self, apply: Apply, t: Tensor) -> Tensor:
        parts = [apply(part) for part in self._spread.apart(t)]
        return self._spread.together(torch.stack(parts))


def tracked_levels(t: Tensor) -> set[int]:
    """The live levels at which t has a graph or a tangent."""
    found = set()
    batch = transforms.frame_of((), t).batch
    for level in all_levels():
        here = transforms.strip(t, level.number, [b for b in batch if b.number > level.number])
        if level.kind == "Jvp":
            follows = tangent_at(here, level.number) is not None
        else:
            follows = level.kind == "Grad" and here.requires_grad
        if follows:
            found.add(level.number)
    return found


def tangent_at(t: Tensor, number: int) -> Tensor | None:
    """The tangent of t at a level of forward mode."""
    with transforms.truncated(number):
        return forward_ad.unpack_dual(t).tangent


class Probe:
    """One evaluation of h with a leaf for y at the wanted levels of reverse mode.

    Args:
        h: the map at the current levels.
        y: of levels below `number`, the vmaps from there on as leading dimensions.
        wanted: the levels whose derivatives are asked for.
        anchored: make the leaves; else y is a constant.
    Attributes:
        out: h(y) at the current levels.
        anchors: the leaf of each level.
    """

    def __init__(
        self,
        h: Apply,
        y: Tensor,
        number: int,
        wanted: Sequence[Level],
        frame: Frame,
        *,
        anchored: bool,
    ) -> None:
        self.anchors: dict[int, Tensor] = {}
        for level in all_levels():
            if level.number < number:
                continue
            if level in frame.batch:
                y = transforms.lift(y, [level])
            elif anchored and level.kind == "Grad" and level in wanted:
                y = mark_as_anchor(transforms.leaf(y, level.number))
                self.anchors[level.number] = y
        self.out = h(y)
        self._frame = frame

    def edge(self, number: int) -> Tensor:
        """h(y) as a tensor of one level, the vmaps above it as leading dimensions."""
        return transforms.strip(self.out, number, self._frame.above(number))

    def depends(self, level: Level) -> bool:
        """Whether h(y) is differentiated at this level, for something else than y."""
        edge = self.edge(level.number)
        tangent = tangent_at(edge, level.number)
        if level == PLAIN and tangent is not None:
            raise RuntimeError(MIXED)
        return tangent is not None if level.kind == "Jvp" else depends_beyond(edge)


def all_levels() -> list[Level]:
    """Plain autograd and the live transforms."""
    return [PLAIN, *transforms.live_levels()]


def matrix_of(h: Apply, y: Tensor, probe: Probe, frame: Frame) -> LiveJacobian:
    """dh/dy at the point that was probed from level 0, by the lowest level that recorded it."""
    for number, anchor in sorted(probe.anchors.items()):
        edge = probe.edge(number)
        if not edge.requires_grad:
            continue
        if number == 0:
            return PlainJacobian(FlatJacobian(Linearization(anchor, edge)))
        inner = [level for level in frame.batch if level.number < number]
        here = Frame(inner, Frame(frame.above(number), frame.samples).leading)
        return LevelJacobian(along(edge, anchor), here)
    _, vjp = torch.func.vjp(h, transforms.lift(y, frame.batch))[:2]
    return LevelJacobian(lambda c: vjp(c)[0], frame)


def along(edge: Tensor, anchor: Tensor) -> Apply:
    """c -> the derivative of <c, edge> in the anchor."""
    return lambda c: gradient(edge, anchor, c)


class FlatJacobian:
    """A matrix on (..., D), for (N, D)."""

    def __init__(self, matrix: Linearization) -> None:
        self._matrix = matrix

    def product(self, t: Tensor) -> Tensor:
        """M t."""
        return self._matrix.product(t.reshape(self._matrix.gx.shape)).reshape(t.shape)

    def transposed(self, c: Tensor) -> Tensor:
        """M^T c."""
        return self._matrix.transposed(c.reshape(self._matrix.gx.shape)).reshape(c.shape)


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
        _, bad = strategy.account.close(given, unmeasured(given, flat, strategy.truncation))
        dropped = strategy.account.hopeless if bad is None else bad
        if dropped is not None:
            keep = frame.raised(~dropped)[..., None]
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
    h: Apply, y: Tensor, solved: Solved, candidates: Set[int] | None = None
) -> Tensor:
    """y with its derivatives at every live level, or at those that are candidates.

    Args:
        h: the map at the current levels, of which y is the fixed point.
        y: plain (N, D).
        solved: without a matrix, it is taken from h; all levels must then be candidates.
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
    return apply_at(number, _PlainNode, _LevelNode, Holder(y, number, point=point), edge)


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


@dataclass(frozen=True)
class Holder:
    """What a node is given besides the tensors that it depends on."""

    y: Tensor
    number: int
    point: Point | None = None
    message: str = ""

    @property
    def output(self) -> Tensor:
        """y as a new tensor of the node's level."""
        return transforms.wrap(self.y, self.number) if self.number else self.y.clone()


class _Node:
    """The fixed point at one level, as a function of h at it."""

    @staticmethod
    def forward(holder: Holder, edge: Tensor) -> Tensor:
        return holder.output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Holder, Tensor], output: Tensor) -> None:
        ctx.point = inputs[0].point
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> tuple[None, Tensor | None]:
        return None, None if v is None else ctx.point.pulled(v)


class _Refusal:
    """A value of which no derivative can be taken."""

    @staticmethod
    def forward(holder: Holder, *edges: Tensor) -> Tensor:
        return holder.output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[0].message

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(ctx.message)


class _PlainNode(_Node, torch.autograd.Function):
    pass


class _LevelNode(_Node, _SingleLevelFunction):
    pass


class _PlainRefusal(_Refusal, torch.autograd.Function):
    pass


class _LevelRefusal(_Refusal, _SingleLevelFunction):
    pass


def refused(message: str, y: Tensor, edges: tuple[Tensor, ...], number: int) -> Tensor:
    """y as if it depended on `edges` at this level; a derivative there raises."""
    holder = Holder(y, number, message=message)
    return apply_at(number, _PlainRefusal, _LevelRefusal, holder, *edges)


def apply_at(number: int, plain: Any, single: Any, *args: Any) -> Tensor:
    """Apply a node at one level; `plain` at level 0."""
    with transforms.truncated(number), torch.enable_grad():
        if number == 0:
            return plain.apply(*args)
        with enable_single_level_autograd_function():
            return single.apply(*args)
