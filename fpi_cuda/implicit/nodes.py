"""Autograd nodes that are placed at one torch.func level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from fpi_cuda import transforms


class Pulls(Protocol):
    """What the backward of a node is left to."""

    def pulled(self, v: Tensor) -> Tensor:
        """The derivative of <v, y> in the edge of the node."""


@dataclass(frozen=True)
class Holder:
    """What a node is given besides the tensors that it depends on."""

    y: Tensor
    number: int
    point: Pulls | None = None
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


def pulled_by(point: Pulls, y: Tensor, edge: Tensor, number: int) -> Tensor:
    """y as a function of `edge` at this level, whose derivative `point` computes."""
    holder = Holder(y, number, point=point)
    return apply_at(number, _PlainNode, _LevelNode, holder, edge)


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
