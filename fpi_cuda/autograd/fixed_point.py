"""The fixed point of a map, as a function of all that the map depends on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpi_cuda.autograd.equation import Equation
from fpi_cuda.autograd.linear import (
    Opened,
    Point,
    as_lower_levels_see,
    if_once_only,
    primal,
    remember,
    side_by_side,
)
from fpi_cuda.autograd.reattach import MaybeTensor
from fpi_cuda.autograd.transformed import Inputs
from fpi_cuda.evaluation import transforms


class FixedPoint(torch.autograd.Function):
    """x of x = g(x, *inputs), g(x), and status, num_steps and residual of the solve.

    Autograd, forward mode and torch.func meet the solution here, each of their levels in turn,
    and no step of the solver. A first derivative in plain autograd is `attach`'s.
    """

    @staticmethod
    def forward(equation: Equation, x0: Tensor, *inputs: Tensor) -> Inputs:
        return equation.solved(equation, x0, inputs)

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], outputs: Inputs) -> None:
        transforms.require_working()
        ctx.equation, _, *inputs = args
        x, gx, status, *_ = outputs
        ctx.num_told = len(outputs) - 1
        ctx.mark_non_differentiable(*outputs[1:])
        point = Point(ctx.equation, None, status, x, gx, tuple(inputs))
        remember(ctx, *point.tensors())
        if any(ctx.needs_input_grad):
            ctx.equation.look()

        def opened() -> Opened:
            found = point.opened()
            found.gx  # noqa: B018
            return found

        ctx.opened = if_once_only(ctx, opened)

    @staticmethod
    def backward(ctx: Any, v: MaybeTensor, *_: None) -> tuple[MaybeTensor, ...]:
        point = Point.of(ctx.equation, None, *ctx.saved_tensors)
        if v is None:
            return (None,) * (2 + len(point.inputs))
        if transforms.is_legacy_batched(v):
            return tuple(transforms.all_one_by_one(lambda v: FixedPoint.backward(ctx, v), v))
        return (None, None, *point.pulled(ctx.opened or point.opened(), v))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: MaybeTensor) -> tuple[MaybeTensor, ...]:
        with as_lower_levels_see():
            point = Point.of(ctx.equation, None, *map(primal, ctx.saved_tensors))
            point.equation.look()
            opened = point.opened()
            t = opened.pushed([None, *tangents])
            y = point.solution(opened, t, transpose=False)[0]
        return (y, *(None,) * ctx.num_told)

    @staticmethod
    def vmap(info: Any, dims: Any, equation: Equation, x0: Tensor, *inputs: Tensor) -> Any:
        merged = equation.merged(info.batch_size, dims[2:], info.randomness)
        return side_by_side(
            lambda x0: FixedPoint.apply(merged, x0, *inputs), info.batch_size, [x0], dims[1:2]
        )
