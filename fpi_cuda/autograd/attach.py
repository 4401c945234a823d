"""Give a fixed point its derivatives in plain autograd, from one evaluation of g at it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fpi_cuda import transforms
from fpi_cuda.autograd.cut_graph import notice_cut, notice_cut_in_step
from fpi_cuda.autograd.equation import Equation, Evaluate
from fpi_cuda.autograd.fixed_point import FixedPoint
from fpi_cuda.autograd.flat_map import FlatMap
from fpi_cuda.autograd.graft import MaybeTensor, follows, has_tangent
from fpi_cuda.autograd.graph import ANCHOR
from fpi_cuda.autograd.inputs import Inputs
from fpi_cuda.autograd.linear import Opened, Point
from fpi_cuda.autograd.linearization import Jacobian, Linearization
from fpi_cuda.autograd.strategy import Strategy, finite_rows
from fpi_cuda.recomputed import tensors_saved_as_they_are
from fpi_cuda.state import Layout

STRIDED_NESTED = (
    "fixed_point: autograd cannot hand a gradient to a nested tensor of layout torch.strided that "
    "g reads. Make it with layout=torch.jagged, or use adjoint=Unroll()"
)
LEGACY = (
    "fixed_point: is_grads_batched together with create_graph is not supported. Use "
    "torch.func.vmap over torch.func.vjp"
)
LEGACY_TANGENT = (
    "fixed_point: torch.autograd.functional with vectorize=True in forward mode is not supported. "
    "Use torch.func.jacfwd, or torch.func.hessian"
)


class Check(Protocol):
    """Raises where g(x) is not what the solver was shown, but for ignored samples (B,)."""

    def __call__(self, x: Tensor, gx: Tensor, ignored: Tensor | None = None) -> None: ...


class SolvedEquation(Equation):
    """x = g(x) where x is known, and what g depends on was found in the graph of g(x).

    Args:
        flat_map: g, or what is differentiated in its place.
        x: (B, D) the solution, plain.
        leaf: the same numbers, where g was evaluated.
        gx: (B, D) g there, with its graph.
        inputs: what g depends on.
        strategy: how linear systems are solved.
    """

    def __init__(
        self, flat_map: FlatMap, x: Tensor, leaf: Tensor, gx: Tensor, inputs: Inputs,
        strategy: Strategy,
    ) -> None:  # fmt: skip
        self.x = x
        self.gx = gx
        self.strategy = lambda status, x: strategy.over(status)
        self.truncation = strategy.truncation
        self.arithmetic = flat_map.arithmetic
        self._flat_map = flat_map
        self._leaf = leaf
        self._inputs = inputs
        self._strategy = strategy
        self._opened: Any = None
        self._there = gx
        self.changes = []

    def solved(self, x0: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See Equation."""
        return self.x.detach(), self._there.detach(), self._strategy.account.status.detach()

    def _leave_out_failed(self) -> None:
        """Evaluate failed samples where another one is, unless the forward pass has seen to it."""
        account = self._strategy.account
        hopeless = account.hopeless if account.late else None
        if hopeless is None or self.all_failed is not None:
            return
        with transforms.in_forward_mode():  # what it reads instead keeps its tangents
            mended = self._flat_map.mended_if_batchwise(self.x, hopeless)
        with torch.no_grad():
            self._there = torch.where(hopeless[:, None], mended(self.x), self.gx)
        self._flat_map = mended

    def bound(
        self, inputs: Sequence[Tensor], *, damped: bool, bad: Tensor | None = None
    ) -> Evaluate:
        """See Equation."""
        return lambda x: self._inputs.evaluate(self._flat_map, x, inputs)

    def matrix(
        self, x: Tensor, gx: Tensor, inputs: Sequence[Tensor], *, transpose: bool
    ) -> Jacobian:
        """See Equation."""
        found: Jacobian = self._opened or self._inputs.opened(self._flat_map, x, gx, inputs, None)
        return found

    def opened(
        self, x: Tensor, gx: Tensor, inputs: Sequence[Tensor], bad: Tensor | None = None
    ) -> Opened:
        """See Equation."""
        if transforms.active():
            self._inputs.require_all_exchanged(self._flat_map, self.x)
            return super().opened(x, gx, tuple(inputs))
        if self._opened is not None and bad is None:
            known: Opened = self._opened
            return known
        flat_map = self._flat_map
        if bad is not None:
            flat_map = flat_map.mended_if_batchwise(self.x, bad)
        return self._inputs.opened(flat_map, x, gx, inputs, bad)

    def at(self, opened: Opened) -> SolvedEquation:
        """See Equation."""
        if transforms.active():
            return self
        other = SolvedEquation.__new__(SolvedEquation)
        other.__dict__ = self.__dict__ | {"_opened": opened}
        return other

    def sees(self, bad: Tensor) -> bool:
        """See Equation."""
        return not transforms.active() and bool(bad.any())

    @property
    def sizes(self) -> Sequence[int]:  # type: ignore[override]
        return self._flat_map.layout.sizes

    @functools.cached_property
    def jacobian(self) -> Jacobian:
        """dg/dx, from the graph of g(x)."""
        return Linearization(self._leaf, self.gx)

    @functools.cached_property
    def all_failed(self) -> Tensor | None:
        """(B,) bool, all True, where no sample was solved; else None."""
        hopeless = self._strategy.account.hopeless
        return hopeless if hopeless is not None and bool(hopeless.all()) else None

    def pull(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """(I - dg/dx)^-T v without a graph, and the samples that fail, if any."""
        c, bad = self._strategy.solve(v, self.jacobian, transpose=True)
        return c, bad if self.all_failed is None else self.all_failed

    def push(self, t: Tensor) -> Tensor:
        """(I - dg/dx)^-1 t without a graph."""
        account = self._strategy.account
        if account.late and (hopeless := account.hopeless) is not None:
            # It comes from g at failed samples too.
            t = t.masked_fill(hopeless[:, None], 0.0)
        return self._strategy.solve(t, self.jacobian, transpose=False)[0]

    def pulled(self, v: Tensor, inputs: Sequence[Tensor]) -> list[MaybeTensor]:
        """The derivative of <v, x> in each input, as a function of v and the inputs."""
        if self.all_failed is not None:
            self.pull(v.detach())
            return self._no_gradient()
        point = self._point(inputs)
        return point.pulled(point.opened(), v)

    def pulled_without(self, c: Tensor, bad: Tensor) -> list[MaybeTensor] | None:
        """The same from the solution c, samples `bad` evaluated elsewhere; None: impossible."""
        if bool(bad.all()):
            return self._no_gradient()
        if self._inputs.unnamed:
            return None
        return self.opened(self.x, self.gx, self._inputs.originals, bad).pulled(c)[1:]

    def pushed(self, inputs: Sequence[Tensor]) -> Tensor:
        """The tangent of x, as a function of the inputs, whose tangents g has as well."""
        # Forward mode is off here, so this one has the graph alone.
        point = self._point(inputs)
        with transforms.in_forward_mode():
            tangent = forward_ad.unpack_dual(self._flat_map(point.x)).tangent
        if tangent is None or self.all_failed is not None:
            return torch.zeros_like(self.x)
        return point.solution(point.opened(), tangent, transpose=False)[0]

    def _point(self, inputs: Sequence[Tensor]) -> Point:
        """The solution, as a function of the inputs."""
        self._leave_out_failed()
        x, gx, status = FixedPoint.apply(self, self.x, *inputs)
        return Point(self, status, x, gx, tuple(inputs))

    def require_all_tangents(self) -> None:
        """Raise where a tangent of a gradient would come out too small."""
        if transforms.in_dual_level() and not transforms.active():
            self._inputs.require_all_tangents(self._flat_map, self.x)

    def overflow(self, v: Tensor) -> list[Tensor] | None:
        """What each input gets besides where v is not finite in samples left out; None: nothing."""
        hopeless = self._strategy.account.hopeless
        if hopeless is None:
            return None
        rows = hopeless & ~finite_rows(v.detach())
        return [spoiled(t, rows) for t in self._inputs.originals] if bool(rows.any()) else None

    def _no_gradient(self) -> list[MaybeTensor]:
        return [torch.zeros_like(t) for t in self._inputs.originals]


class Attached(torch.autograd.Function):
    """The state that the user sees, as a function of g at it and of all that g depends on.

    A first derivative goes through the graph of g(x), where the user's closures are. That graph
    holds x constant, so a second derivative has to go to the inputs directly.
    """

    @staticmethod
    def forward(
        ctx: Any, get: Callable[[], SolvedEquation], layout: Layout, gx: Tensor, *inputs: Tensor
    ) -> Any:
        ctx.get, ctx.layout, ctx.num_inputs = get, layout, len(inputs)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        # A copy, so that an in-place op on the value does not reach the x that is linearized at;
        # and copied last, for views refuse in-place operations.
        if layout.is_tuple:
            return tuple(map(contiguous_copy, layout.unflatten(get().x)))
        x = get().x
        return contiguous_copy(x.reshape(x.shape[: layout.batch_dims] + layout.shapes[0]))

    @staticmethod
    def backward(ctx: Any, *parts: Tensor) -> tuple[MaybeTensor, ...]:
        equation, v = ctx.get(), ctx.layout.flatten(parts if ctx.layout.is_tuple else parts[0])
        nothing: list[MaybeTensor] = [None] * ctx.num_inputs
        legacy = transforms.is_legacy_batched(v)
        if torch.is_grad_enabled() or transforms.in_dual_level():
            if legacy:
                raise RuntimeError(LEGACY)
            # Not read before: it raises where one of them was written to.
            inputs = ctx.saved_tensors
            equation.require_all_tangents()
            if follows(v, *inputs):
                more = None if transforms.active() else equation.overflow(v)
                return (None, None, None, *added(equation.pulled(v, inputs), more))
        if legacy or transforms.active():
            c = transforms.one_by_one(lambda v: equation.pull(v)[0], v)
            return (None, None, c, *nothing)
        c, bad = equation.pull(v)
        overflow = equation.overflow(v)
        if bad is not None:
            found = equation.pulled_without(c, bad)
            if found is not None:
                return (None, None, None, *added(found, overflow))
        return (None, None, c, *added(nothing, overflow))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, t: Tensor, *___: Tensor) -> Any:
        equation = ctx.get()
        if transforms.is_legacy_batched(t):
            raise RuntimeError(LEGACY_TANGENT)
        elif torch.is_grad_enabled():
            tangent = equation.pushed(ctx.saved_tensors)
        else:
            tangent = equation.push(t)
        return ctx.layout.unflatten(tangent)


class _Part(torch.autograd.Function):
    """One tensor of a tuple state, itself. It holds what its tuple only knows of.

    So the cycle through a g that holds its own fixed point is one that Python's collector can
    see: through the node that belongs to this tensor alone.
    """

    @staticmethod
    def forward(ctx: Any, equation: SolvedEquation, part: Tensor) -> Tensor:
        ctx.equation = equation
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(part)
        return part

    @staticmethod
    def backward(ctx: Any, v: MaybeTensor) -> tuple[None, MaybeTensor]:
        return None, v


def attach(
    flat_map: FlatMap,
    x_star: Tensor,
    check: Check | None,
    strategy: Strategy,
    born_after: int,
    evaluate: Evaluate | None = None,
) -> Any:
    """x_star, as the user's state, as a function of all that g depends on.

    Grad mode is on, or a level of forward mode.

    Args:
        flat_map: g with its inputs, already evaluated.
        x_star: (B, D) its fixed point, plain.
        check: looks at x_star and g there, and at the samples that failed; None: nobody does.
        born_after: autograd's sequence number before flat_map was made.
        evaluate: another way to the value of flat_map and its graph, where no sample failed.
    """
    layout = flat_map.layout
    x = x_star.detach()
    if strategy.truncation != 0:
        setattr(x.requires_grad_(), ANCHOR, True)
        # The user's backward pass also ends here, and nobody reads what it leaves.
        x.register_post_accumulate_grad_hook(drop_gradient)
    account = strategy.account
    hopeless = None if account.late else account.hopeless
    if hopeless is not None:
        evaluate = None
        if not bool(hopeless.all()):
            flat_map = flat_map.mended_if_batchwise(x_star, hopeless)
    evaluated, once = flat_map, flat_map.damping == (1, 1.0)
    if not once:

        def watch(step: int, x: Tensor, gx: Tensor) -> None:
            if step == 0 and check is not None:
                check(x, gx, hopeless)
            elif step == 1 and strategy.truncation == 0:
                notice_cut_in_step(flat_map, x, gx)

        evaluated = flat_map.damped(*flat_map.damping, watch)
    with torch.enable_grad(), tensors_saved_as_they_are():
        gx = (evaluate or evaluated)(x)
    if check is not None and once:
        check(x, gx, hopeless)
    inputs = Inputs(flat_map, x, gx, born_after)
    for t in inputs.originals:
        if t.is_nested and t.layout == torch.strided:
            raise TypeError(STRIDED_NESTED)
    if inputs.unnamed and account.late and account.hopeless is not None:
        # Samples that failed cannot be left out later where g cannot be evaluated again.
        account.late = False
        return attach(flat_map, x_star, check, strategy, born_after)
    if not (inputs.originals or inputs.unnamed or has_tangent(gx)):
        return layout.taken_apart(x_star)
    if strategy.truncation != 0 and inputs.unreached:
        notice_cut(flat_map, x, inputs.unreached)
    equation = SolvedEquation(flat_map, x_star, x, gx, inputs, strategy)
    return state_of(equation, layout, inputs.originals)


def state_of(equation: SolvedEquation, layout: Layout, inputs: Sequence[Tensor]) -> Any:
    """The solution as the user's state, as a function of the inputs.

    A g that holds its own fixed point, as self.x = fixed_point(self.step, ...).value does, is a
    cycle that Python's collector sees only through nodes with one owner: the tensor's own.
    """
    # What changes a tensor in place must change its tangent in place: no parts there.
    if not layout.is_tuple or transforms.in_dual_level():
        return Attached.apply(lambda: equation, layout, equation.gx, *inputs)
    parts = Attached.apply(weakref.ref(equation), layout, equation.gx, *inputs)
    return tuple(_Part.apply(equation, part) for part in parts)


def drop_gradient(x: Tensor) -> None:
    """Forget what was accumulated in x."""
    x.grad = None


def contiguous_copy(t: Tensor) -> Tensor:
    """t, row-major, in memory of its own."""
    return t.clone(memory_format=torch.contiguous_format)


def added(pulled: list[MaybeTensor], more: list[Tensor] | None) -> list[MaybeTensor]:
    """The sums of two lists of gradients."""
    if more is None:
        return pulled
    return [b if a is None else a + b for a, b in zip(pulled, more, strict=True)]


def spoiled(t: Tensor, rows: Tensor) -> Tensor:
    """A gradient for t that is NaN in rows (B,), or as a whole where t has no such rows."""
    if t.dim() == 0 or len(t) != len(rows):
        return torch.full_like(t, torch.nan)
    mask = rows.reshape(-1, *[1] * (t.dim() - 1))
    return torch.where(mask, torch.full_like(t, torch.nan), 0.0)
