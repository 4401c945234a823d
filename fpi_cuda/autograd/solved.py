"""A solved equation, with what its g depends on besides x: z, parameters, what it closes over."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fpi_cuda.autograd.backward_hooks import require_true_products
from fpi_cuda.autograd.closed_over import Watch, exchanging, here
from fpi_cuda.autograd.cut_graph import unreached
from fpi_cuda.autograd.equation import Common, Equation, Evaluate
from fpi_cuda.autograd.fixed_point import FixedPoint
from fpi_cuda.autograd.graph import Frontier, edge_of, leaves_of, mark_as_tracking_leaf
from fpi_cuda.autograd.linear import Opened, Point
from fpi_cuda.autograd.linearization import Jacobian, Linearization, OpenLinearization
from fpi_cuda.autograd.reattach import MaybeTensor, has_tangent, stand_in
from fpi_cuda.autograd.strategy import Strategy, finite_rows
from fpi_cuda.autograd.transformed import Inputs
from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.bound_map import BoundMap
from fpi_cuda.evaluation.modules import held_by
from fpi_cuda.evaluation.same_value import CHANGED, counted_version, require_same_value, version_of
from fpi_cuda.evaluation.shortcuts import any_backward_hooks

UNNAMED = (
    "fixed_point: a second derivative needs every tensor that g depends on, and g closes over one "
    "that was computed before the call and could not be found. Pass it to g as a z"
)

TANGENT = (
    "fixed_point: the tangent of a gradient needs tensors with tangents that g closes over to "
    "require grad too. Call requires_grad_() on them, or pass them to g as z"
)


class SolvedEquation(Equation):
    """x = g(x) where x is known, and what g depends on is found in the graph of g(x).

    Args:
        bound_map: g, or what is differentiated in its place.
        x: (B, D) the solution, plain.
        leaf: the same numbers, where g was evaluated.
        gx: (B, D) g there, with its graph.
        strategy: how linear systems are solved.
        frontier: of the graph of gx.
    Attributes:
        x, gx: as given.
        originals: the tensors with a derivative that g was found to depend on besides x.
        unreached: columns of x that the graph does not lead to.
        unnamed: some tensor was computed before the call, is closed over, and could not be
            identified: what needs another evaluation of g has to be refused.
    """

    def __init__(
        self, bound_map: BoundMap, x: Tensor, leaf: Tensor, gx: Tensor, strategy: Strategy,
        frontier: Frontier,
    ) -> None:  # fmt: skip
        self.x = x
        self.gx = self._there = gx
        self._bound_map = bound_map
        self._leaf = leaf
        self._strategy = strategy
        self._z = bound_map.z
        self._around = here.substitution
        leaves, edges, tracking, visited = frontier

        def matters(t: Tensor) -> bool:
            there = id(t) in leaves or (t.grad_fn, t.output_nr) in edges
            return there or has_tangent(t)

        explicit = {id(t): t for t in self._z if matters(t)}
        captured = edges - {(t.grad_fn, t.output_nr) for t in explicit.values()}
        found: dict[Any, Tensor] = {}
        # Where modules hold some of them: functional_call has put others there by backward.
        self._places: list[tuple[Tensor, nn.Module, str]] = []
        exchanged = captured or any(type(t) is not nn.Parameter for t in leaves.values())
        if bound_map.modules and (exchanged or isinstance(bound_map.g, nn.Module)):
            among = None if captured else leaves
            for module, name, t in held_by(bound_map.modules, among=among):
                edge = edge_of(t) if captured else None
                if id(t) in leaves or edge in captured:
                    self._places.append((t, module, name))
                    found |= {edge: t} if edge in captured else {}
        if captured - found.keys():
            used = used_by(bound_map, leaf, [leaf, *self._z, *found.values()])
            found |= {edge: t for t in used if (edge := edge_of(t)) in captured}
        self.unnamed = not captured <= found.keys()
        self._leaves = [t for t in leaves.values() if id(t) not in explicit]
        self.originals = [*explicit.values(), *found.values(), *self._leaves]
        # Of every z: what a change in it does need not show in the value of g at x.
        watched = {id(t): t for t in (*self._z, *self.originals)}
        self._versions = [
            (t, 0 if t.is_inference() else counted_version(t)) for t in watched.values()
        ]
        layout = bound_map.layout
        whole = not leaf.requires_grad or (len(layout.shapes) == 1 and id(leaf) in tracking)
        self.unreached = [] if whole else unreached(gx, leaf, layout.sizes, visited)

    @functools.cached_property
    def common(self) -> Common:  # type: ignore[override]
        """See Equation."""
        strategy, bound_map = self._strategy, self._bound_map
        return Common(
            lambda status, _: strategy.over(status),
            strategy.truncation,
            bound_map.arithmetic,
            bound_map.layout.sizes,
        )

    def solved(self, whole: Equation, x0: Tensor, inputs: Inputs) -> Inputs:
        """See Equation."""
        return self.x.detach(), self._there.detach(), self._strategy.account.status.detach()

    def _leave_out_failed(self) -> None:
        """Evaluate failed samples where another one is, unless the forward pass has seen to it."""
        account = self._strategy.account
        failed_forward = account.failed_forward if account.late else None
        if failed_forward is None or self.all_failed:
            return
        with transforms.in_forward_mode():  # what it reads instead keeps its tangents
            replaced = self._bound_map.replace_failed_if_batchwise(self.x, failed_forward)
        with torch.no_grad():
            self._there = torch.where(failed_forward[:, None], replaced(self.x), self.gx)
        self._bound_map = replaced

    def bound(
        self, inputs: Sequence[Tensor], *, damped: bool, bad: Tensor | None = None
    ) -> Evaluate:
        """See Equation."""
        return lambda x: self._evaluated(self._bound_map, x, inputs)

    def matrix(self, x: Tensor, gx: Tensor, inputs: Inputs, *, transpose: bool) -> Jacobian:
        """See Equation."""
        return self.opened(x, gx, inputs)

    def opened(self, x: Tensor, gx: Tensor, inputs: Inputs, bad: Tensor | None = None) -> Opened:
        """See Equation; g is evaluated on stand-ins for x and for all that it depends on.

        Raises:
            RuntimeError: g can no longer be evaluated as it was then.
        """
        self._require_usable()
        if transforms.active():
            self._require_all_exchanged()
            return super().opened(x, gx, inputs)
        bound_map = self._bound_map
        if bad is not None:
            bound_map = bound_map.replace_failed_if_batchwise(self.x, bad)
        # Autograd runs the hooks of what it is asked about, and will run them again later.
        own = {id(t) for t in self._leaves if not t._backward_hooks}
        aside = [t if id(t) in own else stand_in(t) for t in self.originals]
        leaf = mark_as_tracking_leaf(stand_in(x))
        with torch.enable_grad():
            now = self._evaluated(bound_map, leaf, aside)
        if self.common.hooked or any_backward_hooks(bound_map.g):
            moving = [leaf, *(t for t in aside if id(t) not in own)]

            def evaluate(given: Sequence[Tensor]) -> Tensor:
                other = dict(zip(map(id, moving), given, strict=True))
                return self._evaluated(bound_map, given[0], [other.get(id(t), t) for t in aside])

            require_true_products(evaluate, now, moving, self.common.arithmetic)
        if set(leaves_of(now)) != set(map(id, aside)):
            # An energy makes a leaf of an x that does not require grad, to differentiate in it.
            with torch.enable_grad():
                again = [self._evaluated(bound_map, x.detach(), aside) for _ in range(2)]
            self._require_made_inside([now, *again], aside)
        rows = slice(None) if bad is None else ~bad
        require_same_value(now[rows], gx[rows], self.common.arithmetic, self.common.sizes)
        return OpenLinearization(leaf, now, aside, x, inputs)

    @functools.cached_property
    def jacobian(self) -> Jacobian:
        """dg/dx, from the graph of g(x)."""
        return Linearization(self._leaf, self.gx)

    @functools.cached_property
    def all_failed(self) -> bool:
        """Whether no sample was solved."""
        failed_forward = self._strategy.account.failed_forward
        return failed_forward is not None and bool(failed_forward.all())

    def solve(self, b: Tensor, *, transpose: bool) -> Tensor:
        """(I - J^T)^-1 b or (I - J)^-1 b, J = dg/dx, without a graph."""
        account = self._strategy.account
        if not transpose and account.late and account.failed_forward is not None:
            # A tangent comes from g at failed samples too.
            b = b.masked_fill(account.failed_forward[:, None], 0.0)
        return self._strategy.solve(b, self.jacobian, transpose=transpose)[0]

    def pulled_through_g(self, v: Tensor) -> tuple[MaybeTensor, list[MaybeTensor]]:
        """What goes through the graph of g(x) for v, and what each input gets besides."""
        c, bad = self._strategy.solve(v, self.jacobian, transpose=True)
        if self.all_failed or (bad is not None and bool(bad.all())):
            return None, self._with_overflow(self._zeros(), v)
        if bad is None or self.unnamed:
            return c, self._with_overflow(self.nothing(), v)
        opened = self.opened(self.x, self.gx, tuple(self.originals), bad)
        return None, self._with_overflow(opened.pulled(c)[1:], v)

    def pulled(self, v: Tensor, inputs: Inputs) -> list[MaybeTensor]:
        """The derivative of <v, x> in each input, as a function of v and the inputs."""
        if self.all_failed:
            self.solve(v.detach(), transpose=True)  # for the account
            return self._with_overflow(self._zeros(), v)
        point = self._point(inputs)
        return self._with_overflow(point.pulled(point.opened(), v), v)

    def pushed(self, inputs: Inputs) -> Tensor:
        """The tangent of x, as a function of the inputs, whose tangents g has as well."""
        # Forward mode is off here, so this one has the graph alone.
        point = self._point(inputs)
        with transforms.in_forward_mode():
            tangent = forward_ad.unpack_dual(self._bound_map(point.x)).tangent
        if tangent is None or self.all_failed:
            return torch.zeros_like(self.x)
        return point.solution(point.opened(), tangent, transpose=False)[0]

    def _point(self, inputs: Inputs) -> Point:
        """The solution, as a function of the inputs."""
        self._leave_out_failed()
        x, gx, status = FixedPoint.apply(self, self.x, *inputs)
        return Point(self, None, status, x, gx, inputs)

    def nothing(self) -> list[MaybeTensor]:
        """For each input."""
        return [None] * len(self.originals)

    def _zeros(self) -> list[MaybeTensor]:
        return [torch.zeros_like(t) for t in self.originals]

    def _with_overflow(self, found: list[MaybeTensor], v: Tensor) -> list[MaybeTensor]:
        """Gradients, and what they get besides where v is not finite in samples left out."""
        failed_forward = self._strategy.account.failed_forward
        if failed_forward is None or transforms.active():
            return found
        rows = failed_forward & ~finite_rows(v.detach())
        if not bool(rows.any()):
            return found
        more = [spoiled(t, rows) for t in self.originals]
        return [b if a is None else a + b for a, b in zip(found, more, strict=True)]

    def require_all_tangents(self) -> None:
        """Raise where a tangent of a gradient would come out too small.

        So it is where g closes over tensors with tangents that were not found to matter.
        """
        if transforms.active() or not transforms.in_dual_level():
            return
        known = set(map(id, self.originals))
        for t in used_by(self._bound_map, self.x, [self.x, *self._z]):
            if id(t) not in known and has_tangent(t):
                raise RuntimeError(TANGENT)

    def _evaluated(self, bound_map: BoundMap, x: Tensor, given: Sequence[Tensor]) -> Tensor:
        """bound_map(x) with others in the place of `originals`."""
        now = {id(t): other for t, other in zip(self.originals, given, strict=True)}
        z = [now.get(id(t), t.detach()) for t in self._z]
        # What g is given as z it may close over as well.
        pairs = [(t, now[id(t)]) for t in self.originals if now[id(t)] is not t]
        pairs += [(getattr(module, name, t), now[id(t)]) for t, module, name in self._places]
        with exchanging(pairs, self._around) as exchange:
            gx = bound_map.bound(z)(x)
        self.common.hooked |= exchange.hooks_set
        return gx

    def _require_usable(self) -> None:
        """Raise where g cannot be evaluated as it was: not found, or written to since then."""
        if self.unnamed:
            raise RuntimeError(UNNAMED)
        if torch.is_grad_enabled() and any(hasattr(t, "full_tensor") for t in self.originals):
            raise RuntimeError(
                "fixed_point: a second derivative cannot go through a DTensor that g reads. Hand g "
                "its .full_tensor() or .to_local(), computed before the call"
            )
        for t, version in self._versions:
            if version_of(t) != version:
                of = next((f"z[{i}]" for i, z in enumerate(self._z) if z is t), "a tensor")
                what = f"{of} of shape {tuple(t.shape)} had been changed in place"
                raise RuntimeError(CHANGED.format(what=what))

    def _require_all_exchanged(self) -> None:
        """Raise unless something else can stand in for everything that g depends on."""
        with torch.enable_grad():
            gx = self.evaluate(self.x, *(t.detach() for t in self.originals))
        left = set(leaves_of(gx))
        while transforms.numbers(gx) is not gx:  # TorchScript takes leaves into the graph inside
            gx = transforms.unwrapped(gx)
            left |= set(leaves_of(gx))
        if not left.isdisjoint(map(id, self._leaves)):
            raise RuntimeError(UNNAMED)

    def _require_made_inside(self, values: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        """Raise unless g depends on the same tensors always, but for leaves that it makes anew.

        Args:
            values: of g, where x requires grad; then twice where it does not, as it was at first.
        """
        known = {id(leaf) for leaf in leaves}
        missing = known.difference(leaves_of(values[0]))
        fresh, first, second = (set(leaves_of(gx)) - known for gx in values)
        made = len(first) == len(second) == len(missing) and not first & second
        if not made or fresh & (first | second) or not missing <= {id(t) for t in self._leaves}:
            raise RuntimeError(
                "fixed_point: a second derivative evaluates g again in backward, and there it "
                "depended on other tensors than in the forward pass. Pass what changes between "
                "the two as z, or make g an nn.Module so that its parameters are remembered"
            )


def used_by(bound_map: BoundMap, x: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
    """What one more evaluation of g uses besides what it is given."""
    watch = Watch(given)
    with torch.enable_grad(), watch:
        bound_map(x.detach())
    return [t for _, t in watch.captured()]


def spoiled(t: Tensor, rows: Tensor) -> Tensor:
    """A gradient for t that is NaN in rows (B,), or as a whole where t has no such rows."""
    if t.dim() == 0 or len(t) != len(rows):
        return torch.full_like(t, torch.nan)
    mask = rows.reshape(-1, *[1] * (t.dim() - 1))
    return torch.where(mask, torch.full_like(t, torch.nan), 0.0)
