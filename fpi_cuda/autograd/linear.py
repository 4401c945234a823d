"""Linear systems with the Jacobian of a map, solved, as functions of all that they depend on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda import transforms
from fpi_cuda.autograd.graft import MaybeTensor
from fpi_cuda.autograd.linearization import Jacobian
from fpi_cuda.autograd.same_value import require_same_value
from fpi_cuda.autograd.strategy import dropped, failed, finite_rows, series
from fpi_cuda.result import Status

T = TypeVar("T")

Inputs = tuple[Tensor, ...]

Pull = Callable[[Tensor], list[MaybeTensor]]


class Opened(Jacobian, Protocol):
    """A map at a point; its products are functions of x, of the inputs and of what they take.

    A list that is returned or taken begins with what belongs to x; the inputs follow.
    """

    @property
    def gx(self) -> Tensor:
        """g there."""

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
        now: Tensor, *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if not torch.equal(now, gx):
            good = ~failed(status)
            require_same_value(now[good], gx[good], equation.arithmetic, equation.sizes)
        strategy = equation.strategy(status, x)
        matrix = equation.matrix(x, gx, inputs, transpose=transpose)
        y, bad = strategy.solve(b, matrix, transpose=transpose)
        return y.clone(), torch.zeros_like(status, dtype=torch.bool) if bad is None else bad

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        ctx.equation, ctx.transpose, _, status, x, gx, _, *inputs = args
        y, bad = outputs
        ctx.mark_non_differentiable(bad)
        status = torch.where(bad, int(Status.NONFINITE), status).to(status.dtype)
        remember(ctx, y, status, x, gx, *inputs)
        ctx.through = None
        if ctx.equation.truncation != 0:
            ctx.through = if_once_only(ctx, lambda: through_product(ctx, y, x, gx, *inputs))

    @staticmethod
    def backward(ctx: Any, v: MaybeTensor, _: None) -> tuple[MaybeTensor, ...]:
        equation, transpose = ctx.equation, ctx.transpose
        y, status, x, gx, *inputs = ctx.saved_tensors
        if v is None:
            return (None,) * (7 + len(inputs))
        if transforms.is_legacy_batched(v):
            return tuple(transforms.all_one_by_one(lambda v: Linear.backward(ctx, v, None), v))
        s = without_failed(v, status)
        found: list[MaybeTensor] = [None] * (1 + len(inputs))
        if equation.truncation != 0:
            equation.require_true_products()
            opened, through = ctx.through or through_product(ctx, y, x, gx, *inputs)
            s = solved_at(equation, opened, s, status, x, gx, inputs, transpose=not transpose)[0]
            found = through(s)
        of_x, *of_inputs = found
        return (None, None, s, None, of_x, None, None, *of_inputs)

    @staticmethod
    def jvp(
        ctx: Any, _: None, __: None, tb: MaybeTensor, ___: None, tx: MaybeTensor, ____: None,
        _____: None, *ti: MaybeTensor,
    ) -> tuple[Tensor, None]:  # fmt: skip
        equation, transpose = ctx.equation, ctx.transpose
        with as_lower_levels_see():
            y, status, x, gx, *inputs = map(primal, ctx.saved_tensors)
            t = torch.zeros_like(y) if tb is None else tb
            if equation.truncation == 0:
                return without_failed(t, status), None
            equation.require_true_products()
            opened = equation.opened(x, gx, tuple(inputs))
            t = t + opened.pushed_product(y, [tx, *ti], transpose=transpose)
            t = without_failed(t, status)
            return solved_at(equation, opened, t, status, x, gx, inputs, transpose=transpose)[
                0
            ], None

    @staticmethod
    def vmap(
        info: Any, dims: Any, equation: Any, transpose: bool, *args: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if all(dim is None for dim in dims[3:]):
            whole = equation.with_sides(info.batch_size)
        else:
            whole = equation.merged(info.batch_size, dims[7:], info.randomness)
        return side_by_side(
            lambda *rows: Linear.apply(whole, transpose, *rows, *args[5:]),
            info.batch_size, args[:5], dims[2:7],
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
        return solved_at(equation, opened, b, status, x, gx, inputs, transpose=transpose)
    y = series(lambda y: opened.differentiable(y, transpose=transpose), b, k)
    b_at, status, x, gx, *aside = (t.detach() for t in (b, status, x, gx, *inputs))
    _, bad = solved_at(equation, opened, b_at, status, x, gx, aside, transpose=transpose)
    return y.masked_fill((bad & finite_rows(b))[:, None], 0.0), bad


def solved_at(
    equation: Any, opened: Opened, b: Tensor, status: Tensor, x: Tensor, gx: Tensor,
    inputs: Sequence[Tensor], *, transpose: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Linear, where g was evaluated again for derivatives of what it gives."""
    now = opened.gx.detach()
    return Linear.apply(equation.at(opened), transpose, b, status, x, gx, now, *inputs)


def remember(ctx: Any, *tensors: Tensor) -> None:
    """Save tensors for a backward pass and for forward mode."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def if_once_only(ctx: Any, make: Callable[[], T]) -> T | None:
    """What a backward pass needs, made ahead where g could not be evaluated by then; else None."""
    if not (ctx.equation.once_only and transforms.active() and any(ctx.needs_input_grad)):
        return None
    with as_lower_levels_see():
        return make()


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


@contextlib.contextmanager
def as_lower_levels_see() -> Iterator[None]:
    """Let what a tangent is computed from be differentiated at the levels of torch.func below."""
    if not transforms.active():
        yield
        return
    with transforms.in_forward_mode(), torch.enable_grad():
        yield
