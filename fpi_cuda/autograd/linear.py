"""Linear systems with the Jacobian of a map, solved, as functions of all that they depend on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda.autograd.linearization import Jacobian, Linearization, OpenLinearization, Pull
from fpi_cuda.autograd.reattach import MaybeTensor
from fpi_cuda.autograd.strategy import dropped, failed, finite_rows, series
from fpi_cuda.autograd.transformed import Inputs, Transformed, has_slope
from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.same_value import require_same_value
from fpi_cuda.solution import Status

T = TypeVar("T")

Opened = OpenLinearization | Transformed
"""A map at a point; its products are functions of x, of the inputs and of what they take.

A list that is returned or taken begins with what belongs to x; the inputs follow.
"""


class Point(NamedTuple):
    """Where an equation was solved, and how that ended, as one level of derivatives sees it.

    Attributes:
        equation: it.
        held: the map there, where it is at hand.
        status: (B,) int8, of the solve.
        x, gx: (B, D) the solution, and what is differentiated there.
        inputs: all that it depends on besides x.
    """

    equation: Any
    held: OpenLinearization | None
    status: Tensor
    x: Tensor
    gx: Tensor
    inputs: Inputs

    @classmethod
    def of(
        cls, equation: Any, held: OpenLinearization | None, status: Tensor, x: Tensor, gx: Tensor,
        *inputs: Tensor,
    ) -> Point:  # fmt: skip
        """The same from tensors in a row, as autograd keeps them."""
        return cls(equation, held, status, x, gx, inputs)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in a row."""
        return (*self[2:5], *self.inputs)

    def without(self, bad: Tensor) -> Point:
        """The same where these samples (B,) have failed too."""
        status = torch.where(bad, int(Status.NONFINITE), self.status).to(self.status.dtype)
        return self._replace(status=status)

    def opened(self, bad: Tensor | None = None) -> Opened:
        """The map there; see Equation."""
        if self.held is not None and bad is None and not transforms.active():
            return self.held
        known = self.equation.known
        if bad is None and known.bad is None and known.leaves_out():
            bad = failed(self.status)  # of the samples of a vmap, each with its own
        found: Opened = self.equation.opened(self.x, self.gx, self.inputs, bad)
        return found

    def through_product(self, y: Tensor, *, transpose: bool) -> tuple[Opened, Pull]:
        """The map there, and how to pull back through J^T y or J y."""
        opened = self.opened()
        return opened, opened.through_product(y, transpose=transpose)

    def solve(self, opened: Opened, b: Tensor, *, transpose: bool) -> tuple[Tensor, Tensor]:
        """Linear, which looks whether the map that was opened is still the one that was solved."""
        tensors = (*self.tensors()[:3], opened.gx.detach(), *self.inputs)
        held = opened if isinstance(opened, OpenLinearization) else None
        return Linear.apply(self.equation, held, transpose, b, *tensors)

    def solution(self, opened: Opened, b: Tensor, *, transpose: bool) -> tuple[Tensor, Tensor]:
        """y of y = M y + b or what stands for it, as a function of b, x and the inputs.

        Returns:
            y, and (B,) bool: the sample failed.
        """
        b = without_failed(b, self.status)
        k = self.equation.common.truncation
        if not k:
            return self.solve(opened, b, transpose=transpose)
        y = series(lambda y: opened.differentiable(y, transpose=transpose), b, k)
        plain = Point.of(self.equation, None, *(t.detach() for t in self.tensors()))
        _, bad = plain.solve(opened, b.detach(), transpose=transpose)
        return y.masked_fill((bad & finite_rows(b))[:, None], 0.0), bad

    def pulled(self, opened: Opened, v: Tensor) -> list[MaybeTensor]:
        """The derivative of <v, x> in each input, as a function of v, x and the inputs."""
        c, bad = self.solution(opened, v, transpose=True)
        # The other kind is what transforms see, and they hide which samples failed.
        if isinstance(opened, OpenLinearization) and bool(bad.any()):
            if bool(bad.all()):
                return [torch.zeros_like(t) for t in self.inputs]
            opened = self.opened(bad)
            c, _ = self.without(bad).solution(opened, v, transpose=True)
        return opened.pulled(c)[1:]


class Linear(torch.autograd.Function):
    """y of y = M y + b, M = J^T or J, and which samples failed. With truncation, its series.

    The derivatives of a solution are solutions of such systems again. Those of a series are taken
    of its terms; here only of the first one.
    """

    @staticmethod
    def forward(
        equation: Any, held: OpenLinearization | None, transpose: bool, b: Tensor, status: Tensor,
        x: Tensor, gx: Tensor, now: Tensor, *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if not torch.equal(now, gx):
            good = ~failed(status)
            require_same_value(
                now[good], gx[good], equation.common.arithmetic, equation.common.sizes
            )
        strategy = equation.common.strategy(status, x)
        matrix: Jacobian = Linearization(x, x)
        if len(x):
            matrix = held or equation.matrix(x, gx, inputs, transpose=transpose)
        y, bad = strategy.solve(b, matrix, transpose=transpose)
        return y.clone(), torch.zeros_like(status, dtype=torch.bool) if bad is None else bad

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        ctx.equation, ctx.held, ctx.transpose, _, status, x, gx, _, *inputs = args
        y, bad = outputs
        ctx.mark_non_differentiable(bad)
        point = Point(ctx.equation, ctx.held, status, x, gx, tuple(inputs)).without(bad)
        remember(ctx, y, *point.tensors())
        ctx.through = None
        if ctx.equation.common.truncation != 0:
            look = functools.partial(point.through_product, y, transpose=ctx.transpose)
            ctx.through = if_once_only(ctx, look)

    @staticmethod
    def backward(ctx: Any, v: MaybeTensor, _: None) -> tuple[MaybeTensor, ...]:
        transpose = ctx.transpose
        y, *tensors = ctx.saved_tensors
        if v is None:
            return (None,) * (5 + len(tensors))
        if transforms.is_legacy_batched(v):
            return tuple(transforms.all_one_by_one(lambda v: Linear.backward(ctx, v, None), v))
        point = Point.of(ctx.equation, ctx.held, *tensors)
        s = without_failed(v, point.status)
        found: list[MaybeTensor] = [None] * (1 + len(point.inputs))
        if point.equation.common.truncation != 0:
            point.equation.require_true_products()
            opened, through = ctx.through or point.through_product(y, transpose=transpose)
            s = point.solve(opened, s, transpose=not transpose)[0]
            found = through(s)
        of_x, *of_inputs = found
        return (None, None, None, s, None, of_x, None, None, *of_inputs)

    @staticmethod
    def jvp(
        ctx: Any, _: None, __: None, ___: None, tb: MaybeTensor, ____: None, tx: MaybeTensor,
        _____: None, ______: None, *ti: MaybeTensor,
    ) -> tuple[Tensor, None]:  # fmt: skip
        transpose = ctx.transpose
        with as_lower_levels_see():
            y, *tensors = map(primal, ctx.saved_tensors)
            point = Point.of(ctx.equation, ctx.held, *tensors)
            t = torch.zeros_like(y) if tb is None else tb
            if point.equation.common.truncation == 0:
                return without_failed(t, point.status), None
            point.equation.require_true_products()
            opened = point.opened()
            t = t + opened.pushed_product(y, [tx, *ti], transpose=transpose)
            t = without_failed(t, point.status)
            return point.solve(opened, t, transpose=transpose)[0], None

    @staticmethod
    def vmap(
        info: Any, dims: Any, equation: Any, _: None, transpose: bool, *args: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if all(dim is None for dim in dims[4:]):
            whole = equation.with_sides(info.batch_size)
        else:
            whole = equation.merged(info.batch_size, dims[8:], info.randomness)
        return side_by_side(
            lambda *rows: Linear.apply(whole, None, transpose, *rows, *args[5:]),
            info.batch_size, args[:5], dims[3:8],
        )  # fmt: skip


def remember(ctx: Any, *tensors: Tensor) -> None:
    """Save tensors for a backward pass and for forward mode."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def if_once_only(ctx: Any, make: Callable[[], T]) -> T | None:
    """What a backward pass needs, made ahead where g could not be evaluated by then; else None."""
    if not (ctx.equation.common.once_only and transforms.active() and any(ctx.needs_input_grad)):
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
    return forward_ad.unpack_dual(t).primal if has_slope(t) else t


@contextlib.contextmanager
def as_lower_levels_see() -> Iterator[None]:
    """Let what a tangent is computed from be differentiated at the levels of torch.func below."""
    if not transforms.active():
        yield
        return
    with transforms.in_forward_mode(), torch.enable_grad():
        yield
