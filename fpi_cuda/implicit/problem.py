"""A solved fixed point, or adjoint system, as autograd and forward mode see it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda import transforms
from fpi_cuda.implicit.flat_map import FlatMap
from fpi_cuda.implicit.graft import MaybeTensor, follows
from fpi_cuda.implicit.inputs import Inputs
from fpi_cuda.implicit.levels import Point, Solved
from fpi_cuda.implicit.linearization import Jacobian, OpenLinearization
from fpi_cuda.implicit.live_jacobian import PlainJacobian, TransposedJacobian
from fpi_cuda.implicit.mending import mended_if_batchwise
from fpi_cuda.implicit.strategy import Strategy, dropped, finite_rows, series, unmeasured
from fpi_cuda.result import Status
from fpi_cuda.state import Layout
from fpi_cuda.transforms import Frame

LEGACY = (
    "fixed_point: is_grads_batched together with create_graph is not supported. Use "
    "torch.func.vmap over torch.func.vjp"
)

LEGACY_TANGENT = (
    "fixed_point: torch.autograd.functional with vectorize=True in forward mode is not supported. "
    "Use torch.func.jacfwd, or torch.func.hessian"
)


Get = Callable[[], Any]
"""The problem of a node, held or only known."""


class Problem(Protocol):
    """y = h(y; inputs), solved, and what its derivatives need.

    Attributes:
        value: (B, D) y, plain.
        hy: (B, D) h(value; inputs), with its graph in the inputs.
    """

    value: Tensor
    hy: Tensor

    def pull(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """(I - dh/dy)^-T v without a graph, and the samples that fail, if any."""

    def push(self, t: Tensor) -> Tensor:
        """(I - dh/dy)^-1 t without a graph."""

    def point(self) -> Point:
        """The solution as torch.func transforms around a backward pass see it."""

    def pulled(self, v: Tensor, y: Tensor) -> list[MaybeTensor]:
        """The derivative of <v, y> in each input, as a function of v, y and the inputs."""

    def pulled_without(self, c: Tensor, bad: Tensor) -> list[MaybeTensor] | None:
        """The same from the solution c, samples `bad` evaluated elsewhere; None: impossible."""

    def pushed(self, y: Tensor) -> Tensor:
        """The tangent of the solution, as a function of y and the inputs, which have tangents."""

    def overflow(self, v: Tensor) -> list[Tensor] | None:
        """What each input gets besides where v is not finite in samples left out; None: nothing."""


class _Implicit(torch.autograd.Function):
    """The fixed point of a Problem, as a function of h at it and of the inputs of h.

    A first derivative goes through the graph of h, where the user's closures are. That graph
    holds y constant, so a second derivative has to go to the inputs directly.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, hy: Tensor, *inputs: Tensor) -> Tensor:
        ctx.problem, ctx.num_inputs = problem, len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        # A copy, so that an in-place op on the result does not reach the y that is linearized at.
        return problem.value.clone()

    @staticmethod
    def backward(ctx: Any, v: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return (None, *pulled_back(ctx.problem, v, ctx))

    @staticmethod
    def jvp(ctx: Any, _: None, t: MaybeTensor, *__: MaybeTensor) -> Tensor:
        return pushed_forward(ctx.problem, t, ctx.saved_tensors)


class _State(torch.autograd.Function):
    """The same as the state that the user sees."""

    @staticmethod
    def forward(ctx: Any, get: Get, layout: Layout, hy: Tensor, *inputs: Tensor) -> Any:
        ctx.get, ctx.layout, ctx.num_inputs = get, layout, len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        value = layout.unflatten(get().value)
        # As above, and copied last: views refuse in-place operations.
        return tuple(map(contiguous_copy, value)) if layout.is_tuple else contiguous_copy(value)

    @staticmethod
    def backward(ctx: Any, *v: MaybeTensor) -> tuple[MaybeTensor, ...]:
        return (None, None, *pulled_back(ctx.get(), flat(ctx.layout, v), ctx))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, t: MaybeTensor, *___: MaybeTensor) -> Any:
        return ctx.layout.unflatten(pushed_forward(ctx.get(), t, ctx.saved_tensors))


class _Part(torch.autograd.Function):
    """One tensor of a tuple state, itself. It holds what its tuple only knows of.

    So the cycle through a g that holds its own fixed point is one that Python's collector can
    see: through the node that belongs to this tensor alone.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, part: Tensor) -> Tensor:
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(part)
        return part

    @staticmethod
    def backward(ctx: Any, v: MaybeTensor) -> tuple[None, MaybeTensor]:
        return None, v


def contiguous_copy(t: Tensor) -> Tensor:
    """t, row-major, in memory of its own."""
    return t.clone(memory_format=torch.contiguous_format)


def flat(layout: Layout, v: tuple[MaybeTensor, ...]) -> MaybeTensor:
    """(B, D) from the gradients of the tensors of a state; None where there are none."""
    like = next((t for t in v if t is not None), None)
    if like is None:
        return None
    parts = tuple(
        like.new_zeros((layout.batch, *shape)) if t is None else t
        for t, shape in zip(v, layout.shapes, strict=True)
    )
    return layout.flatten(parts if layout.is_tuple else parts[0])


def pulled_back(problem: Problem, v: MaybeTensor, ctx: Any) -> tuple[MaybeTensor, ...]:
    """The gradients of hy and of the inputs that are saved in ctx, from that of the solution."""
    nothing: list[MaybeTensor] = [None] * ctx.num_inputs
    if v is None:
        return (None, *nothing)
    if transforms.is_legacy_batched(v):
        if torch.is_grad_enabled():
            raise RuntimeError(LEGACY)
        return (transforms.from_legacy_vmap(problem.point().pulled, v), *nothing)
    if transforms.active():
        return (problem.point().pulled(v), *nothing)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        # Not read before: it raises where one of them was written to.
        inputs = ctx.saved_tensors
        y = differentiable(problem, *inputs)
        if follows(v, y, *inputs):
            return (None, *added(problem.pulled(v, y), problem.overflow(v)))
    c, bad = problem.pull(v)
    overflow = problem.overflow(v)
    if bad is not None:
        pulled = problem.pulled_without(c, bad)
        if pulled is not None:
            return (None, *added(pulled, overflow))
    return (c, *added(nothing, overflow))


def pushed_forward(problem: Problem, t: MaybeTensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """The tangent of the solution, from that of hy."""
    if t is None:
        return torch.zeros_like(problem.value)
    if transforms.is_legacy_batched(t):
        raise RuntimeError(LEGACY_TANGENT)
    if not torch.is_grad_enabled():
        return problem.push(t)
    # Forward-mode is off here, so this one has the graph alone.
    return problem.pushed(differentiable(problem, *inputs))


def added(pulled: list[MaybeTensor], more: list[Tensor] | None) -> list[MaybeTensor]:
    """The sums of two lists of gradients."""
    if more is None:
        return pulled
    return [b if a is None else a + b for a, b in zip(pulled, more, strict=True)]


def differentiable(problem: Problem, *inputs: Tensor) -> Tensor:
    """The value of the problem, as a function of the inputs of its h."""
    return _Implicit.apply(problem, problem.hy, *inputs)


def solved_state(problem: Problem, layout: Layout, *inputs: Tensor) -> Any:
    """The value of the problem as the user's state, as a function of the inputs of its h.

    A g that holds its own fixed point, as self.x = fixed_point(self.step, ...).value does, is a
    cycle that Python's collector sees only through nodes with one owner: the tensor's own.
    """
    # What changes a tensor in place must change its tangent in place: no parts there.
    if not layout.is_tuple or forward_ad._current_level >= 0:
        return _State.apply(lambda: problem, layout, problem.hy, *inputs)
    parts = _State.apply(weakref.ref(problem), layout, problem.hy, *inputs)
    return tuple(_Part.apply(problem, part) for part in parts)


class MapProblem:
    """x = g(x, *z): the fixed point itself."""

    def __init__(
        self,
        flat_map: FlatMap,
        x_star: Tensor,
        gx: Tensor,
        matrix: Jacobian,
        inputs: Inputs,
        strategy: Strategy,
    ) -> None:
        self.value = x_star
        self.hy = gx
        self._flat_map = flat_map
        self._matrix = matrix
        self._inputs = inputs
        self._strategy = strategy

    @functools.cached_property
    def _all_failed(self) -> Tensor | None:
        """(B,) bool, all True, where no sample was solved; else None."""
        hopeless = self._strategy.account.hopeless
        return hopeless if hopeless is not None and bool(hopeless.all()) else None

    def pull(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        c, bad = self._strategy.solve(v, self._matrix, transpose=True)
        return c, bad if self._all_failed is None else self._all_failed

    def push(self, t: Tensor) -> Tensor:
        return self._strategy.solve(t, self._matrix, transpose=False)[0]

    def point(self) -> Point:
        return plain_point(self.hy, self._matrix, self._strategy, self._strategy.account.status)

    def pulled(self, v: Tensor, y: Tensor) -> list[MaybeTensor]:
        if self._all_failed is not None:
            self.pull(v.detach())
            return self._no_gradient()
        opened = self._open(y)
        c, bad = linear_solution(self._strategy, opened, v, transpose=True)
        if bad is not None:
            if bool(bad.all()):
                return self._no_gradient()
            opened = self._open(y, bad)
            v = dropped(v, bad)
            c, _ = linear_solution(self._strategy, opened, v, transpose=True)
        return opened.pulled(c)

    def pulled_without(self, c: Tensor, bad: Tensor) -> list[MaybeTensor] | None:
        if bool(bad.all()):
            return self._no_gradient()
        if self._inputs.unnamed:
            return None
        return self._open(self.value, bad).pulled(c)

    def pushed(self, y: Tensor) -> Tensor:
        with forward_ad._set_fwd_grad_enabled(True):
            tangent = forward_ad.unpack_dual(self._flat_map(y)).tangent
        if tangent is None or self._all_failed is not None:
            return torch.zeros_like(y)
        return linear_solution(self._strategy, self._open(y), tangent, transpose=False)[0]

    def overflow(self, v: Tensor) -> list[Tensor] | None:
        hopeless = self._strategy.account.hopeless
        if hopeless is None:
            return None
        rows = hopeless & ~finite_rows(v.detach())
        return [spoiled(t, rows) for t in self._inputs.originals] if bool(rows.any()) else None

    def _open(self, x: Tensor, bad: Tensor | None = None) -> OpenLinearization:
        if bad is None:
            return self._inputs.linearize(self._flat_map, x, self.hy, None)
        flat_map = mended_if_batchwise(self._flat_map, self.value, bad)
        return self._inputs.linearize(flat_map, x, self.hy, ~bad)

    def _no_gradient(self) -> list[MaybeTensor]:
        return [torch.zeros_like(t) for t in self._inputs.originals]


class LinearProblem:
    """y = M y + b, M = J^T or J at an x: an adjoint or a tangent solution.

    Its inputs are b, x, and the inputs of g.
    """

    def __init__(
        self,
        opened: OpenLinearization,
        b: Tensor,
        y: Tensor,
        hy: Tensor,
        strategy: Strategy,
        bad: Tensor | None,
        *,
        transpose: bool,
    ) -> None:
        self.value = y
        self.hy = hy
        self._opened = opened
        self._b = b
        self._strategy = strategy
        self._bad = bad
        self._transpose = transpose

    def pull(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        v = self._masked(v)
        return self._strategy.solve(v, self._opened, transpose=not self._transpose)

    def push(self, t: Tensor) -> Tensor:
        t = self._masked(t)
        return self._strategy.solve(t, self._opened, transpose=self._transpose)[0]

    def point(self) -> Point:
        matrix: Jacobian = self._opened
        if self._transpose:
            matrix = TransposedJacobian(PlainJacobian(matrix))
        status = self._strategy.account.status
        if self._bad is not None:
            status = torch.where(self._bad, Status.NONFINITE, status).to(status.dtype)
        return plain_point(self.hy, matrix, self._strategy, status)

    def pulled(self, v: Tensor, y: Tensor) -> list[MaybeTensor]:
        s, _ = linear_solution(
            self._strategy, self._opened, self._masked(v), transpose=not self._transpose
        )
        left, right = (y, s) if self._transpose else (s, y)
        return [s, *self._opened.pulled_product(left, right)]

    def pulled_without(self, c: Tensor, bad: Tensor) -> list[MaybeTensor] | None:
        return None

    def pushed(self, y: Tensor) -> Tensor:
        with forward_ad._set_fwd_grad_enabled(True):
            hy = self._opened.differentiable(y, transpose=self._transpose) + self._b
            tangent = forward_ad.unpack_dual(hy).tangent
        if tangent is None:
            return torch.zeros_like(y)
        solution, _ = linear_solution(
            self._strategy, self._opened, self._masked(tangent), transpose=self._transpose
        )
        return solution

    def overflow(self, v: Tensor) -> list[Tensor] | None:
        return None

    def _masked(self, v: Tensor) -> Tensor:
        return v if self._bad is None else dropped(v, self._bad)


def spoiled(t: Tensor, rows: Tensor) -> Tensor:
    """A gradient for t that is NaN in rows (B,), or as a whole where t has no such rows."""
    if t.dim() == 0 or len(t) != len(rows):
        return torch.full_like(t, torch.nan)
    mask = rows.reshape(-1, *[1] * (t.dim() - 1))
    return torch.where(mask, torch.full_like(t, torch.nan), 0.0)


def plain_point(hy: Tensor, matrix: Jacobian, strategy: Strategy, status: Tensor) -> Point:
    """A point that was solved for outside of all transforms."""
    solved = Solved(strategy, PlainJacobian(matrix), Frame([], hy.shape[:1]), status)
    return Point(solved, matrix.transposed, hy, 0, None, frozenset())


def linear_solution(
    strategy: Strategy, opened: OpenLinearization, b: Tensor, *, transpose: bool
) -> tuple[Tensor, Tensor | None]:
    """(I - M)^-1 b as a function of b, x and the inputs of g, M = J^T or J there.

    Returns:
        The solution, and the samples that fail, if any.
    """
    account = strategy.account
    b = account.masked(b)
    if strategy.truncation is not None:
        k = strategy.truncation
        y = series(lambda y: opened.differentiable(y, transpose=transpose), b, k)
        if k and not bool(finite_rows(y.detach()).all()):
            # There an overflow is told from a series that has no finite sum.
            _, bad = strategy.solve(b.detach(), opened, transpose=transpose)
        else:
            _, bad = account.close(b, unmeasured(b, y.detach(), k))
        return y if bad is None else torch.where((bad & finite_rows(b))[:, None], 0.0, y), bad
    y, bad = strategy.solve(b.detach(), opened, transpose=transpose)
    hy = opened.differentiable(y, transpose=transpose) + b
    problem = LinearProblem(opened, b, y, hy, strategy, bad, transpose=transpose)
    return differentiable(problem, b, *opened.originals), bad
