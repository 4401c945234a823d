"""Linear systems with the Jacobian of a map, solved, as functions of all that they depend on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda import transforms
from fpi_cuda.autograd.graft import MaybeTensor
from fpi_cuda.autograd.linearization import Jacobian
from fpi_cuda.autograd.strategy import dropped, failed, finite_rows, series
from fpi_cuda.result import Status

Inputs = tuple[Tensor, ...]

Pull = Callable[[Tensor], list[MaybeTensor]]


class Opened(Jacobian, Protocol):
    """A map at a point; its products are functions of x, of the inputs and of what they take.

    A list that is returned or taken begins with what belongs to x; the inputs follow.
    """

    def differentiable(self, y: Tensor, *, transpose: bool) -> Tensor:
        """J^T y or J y."""

    def pulled(self, c: Tensor) -> list[MaybeTensor]:
        """The derivative of <c, g>."""

    def through_product(self, y: Tensor, *, transpose: bool) -> Pull:
        """s -> the derivative of <J^T y, s> or <J y, s>, y held."""

    def pushed(self, tangents: list[MaybeTensor]) -> Tensor:
        """The derivative of g along tangents."""

    def pushed_product(self, y: Tensor, tangents: list[MaybeTensor], *, transpose: bool) -> Tensor:
        """The derivative of J^T y or J y, y held, along tangents."""


class Linear(torch.autograd.Function):
    """y of y = M y + b, M = J^T or J, and which samples failed. With truncation, its series.

    The derivatives of a solution are solutions of such systems again. Those of a series are taken
    of its terms; here only of the first one.
    """

    @staticmethod
    def forward(
        equation: Any, transpose: bool, b: Tensor, status: Tensor, x: Tensor, gx: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        strategy = equation.strategy(status, x)
        matrix = equation.matrix(x, gx, inputs, transpose=transpose)
        y, bad = strategy.solve(b, matrix, transpose=transpose)
        return y.clone(), torch.zeros_like(status, dtype=torch.bool) if bad is None else bad

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        ctx.equation, ctx.transpose, _, status, *point = args
        y, bad = outputs
        ctx.mark_non_differentiable(bad)
        ctx.set_materialize_grads(False)
        status = torch.where(bad, int(Status.NONFINITE), status).to(status.dtype)
        ctx.save_for_backward(y, status, *point)
        ctx.save_for_forward(y, status, *point)
        ctx.through = None
        once_only = ctx.equation.once_only and transforms.active()
        if once_only and ctx.equation.truncation != 0 and any(ctx.needs_input_grad):
            with as_lower_levels_see():
                ctx.through = through_product(ctx, y, *point)

    @staticmethod
    def backward(ctx: Any, v: MaybeTensor, _: None) -> tuple[MaybeTensor, ...]:
        equation, transpose = ctx.equation, ctx.transpose
        y, status, x, gx, *inputs = ctx.saved_tensors
        nothing = (None,) * len(inputs)
        if v is None:
            return (None,) * 6 + nothing
        if transforms.is_legacy_batched(v):
            return tuple(transforms.all_one_by_one(lambda v: Linear.backward(ctx, v, None), v))
        v = without_failed(v, status)
        if equation.truncation == 0:
            return (None, None, v, None, None, None, *nothing)
        equation.require_true_products()
        opened, through = ctx.through or through_product(ctx, y, x, gx, *inputs)
        s, _ = Linear.apply(equation.at(opened), not transpose, v, status, x, gx, *inputs)
        of_x, *of_inputs = through(s)
        return (None, None, s, None, of_x, None, *of_inputs)

    @staticmethod
    def jvp(
        ctx: Any, _: None, __: None, tb: MaybeTensor, ___: None, tx: MaybeTensor, ____: None,
        *ti: MaybeTensor,
    ) -> tuple[Tensor, None]:  # fmt: skip
        equation, transpose = ctx.equation, ctx.transpose
        with as_lower_levels_see():
            y, status, x, gx, *inputs = map(primal, ctx.saved_tensors)
            if equation.truncation == 0:
                return (torch.zeros_like(y) if tb is None else without_failed(tb, status)), None
            equation.require_true_products()
            opened = equation.opened(x, gx, tuple(inputs))
            t = opened.pushed_product(y, [tx, *ti], transpose=transpose)
            t = without_failed(t if tb is None else t + tb, status)
            return Linear.apply(equation.at(opened), transpose, t, status, x, gx, *inputs)[0], None

    @staticmethod
    def vmap(
        info: Any, dims: Any, equation: Any, transpose: bool, *args: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if all(dim is None for dim in dims[3:]):
            # Of one point with several right-hand sides g need not be evaluated under a vmap.
            sides = [
                Linear.apply(equation, transpose, b, *args[1:]) for b in args[0].unbind(dims[2])
            ]
            if sides:
                return tuple(map(torch.stack, zip(*sides, strict=True))), (0, 0)
        merged = equation.merged(info.batch_size, dims[6:], info.randomness)
        return side_by_side(
            lambda *rows: Linear.apply(merged, transpose, *rows, *args[4:]),
            info.batch_size, args[:4], dims[2:6],
        )  # fmt: skip


def through_product(
    ctx: Any, y: Tensor, x: Tensor, gx: Tensor, *inputs: Tensor
) -> tuple[Opened, Pull]:
    """g at the point of a linear system, and how to pull back through its product with y."""
    opened = ctx.equation.opened(x, gx, inputs)
    return opened, opened.through_product(y, transpose=ctx.transpose)


def solution(
    equation: Any, opened: Opened, b: Tensor, status: Tensor, x: Tensor, gx: Tensor,
    inputs: Inputs, *, transpose: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y of y = M y + b or what stands for it, as a function of b, x and the inputs.

    Args:
        opened: g at x.
    Returns:
        y, and (B,) bool: the sample failed.
    """
    b = without_failed(b, status)
    k = equation.truncation
    if not k:
        return Linear.apply(equation.at(opened), transpose, b, status, x, gx, *inputs)
    y = series(lambda y: opened.differentiable(y, transpose=transpose), b, k)
    plain = [t.detach() for t in (b, status, x, gx, *inputs)]
    _, bad = Linear.apply(equation.at(opened), transpose, *plain)
    return y.masked_fill((bad & finite_rows(b))[:, None], 0.0), bad


def without_failed(v: Tensor, status: Tensor) -> Tensor:
    """v (B, D) with zeros for samples that failed, but where it is itself not finite."""
    return dropped(v, failed(status))


def side_by_side(
    function: Any, size: int, rows: Sequence[Tensor], dims: Sequence[int | None]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The outputs (V, B, ...) of a function of rows, for all samples of a vmap at once.

    Args:
        function: of tensors (V B, ...), to such.
        rows: tensors (B, ...) with the dimension of the vmap somewhere, or without it.
    """
    first = [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(rows, dims, strict=True)
    ]
    outputs = function(*(t.flatten(0, 1).contiguous() for t in first))
    apart = tuple(t.reshape(first[0].shape[:2] + t.shape[1:]) for t in outputs)
    return apart, (0,) * len(apart)


def primal(t: Tensor) -> Tensor:
    """t without its tangent."""
    return forward_ad.unpack_dual(t).primal if t.is_floating_point() or t.is_complex() else t


def as_lower_levels_see() -> contextlib.AbstractContextManager[Any]:
    """Let what a tangent is computed from be differentiated at the levels of torch.func below."""
    if not transforms.active():
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(transforms.in_forward_mode())
    stack.enter_context(torch.enable_grad())
    return stack
