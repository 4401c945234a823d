"""One evaluation of a map, looked at from every torch.func level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda import transforms
from fpi_cuda.implicit.graph import depends_beyond, mark_as_anchor
from fpi_cuda.implicit.linearization import Linearization, gradient
from fpi_cuda.implicit.live_jacobian import (
    FlatJacobian,
    LevelJacobian,
    LiveJacobian,
    PlainJacobian,
)
from fpi_cuda.implicit.scaling import Apply
from fpi_cuda.transforms import Frame, Level

MIXED = (
    "fixed_point: inside torch.func transforms a tensor has a tangent from "
    "torch.autograd.forward_ad. Use torch.func.jvp instead"
)
PLAIN = Level(0, "Grad", 0)
"""Plain autograd, below all transforms."""


def all_levels() -> list[Level]:
    """Plain autograd and the live transforms."""
    return [PLAIN, *transforms.live_levels()]


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

    def lowest(self) -> tuple[Tensor, Tensor] | None:
        """h(y) and the leaf it has for y, at the lowest level that recorded a graph."""
        if not self.anchors or not torch.is_grad_enabled():
            return None
        pairs = [(self.edge(number), anchor) for number, anchor in sorted(self.anchors.items())]
        return next((pair for pair in pairs if pair[0].requires_grad), pairs[0])


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
