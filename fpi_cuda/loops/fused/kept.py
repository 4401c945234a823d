"""Solves that are like an earlier one: a guard, one call of native code, one autograd node."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, empty_like, is_autocast_enabled, is_grad_enabled, nn
from torch._C import (
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _set_grad_enabled,
)
from torch._functorch.pyfunctorch import (
    temporarily_clear_interpreter_stack as outside_transforms,
)
from torch.nn import functional

from fpi_cuda import _extension
from fpi_cuda.activations import CODES, DERIVATIVES
from fpi_cuda.autograd import Account, BoundMap, Strategy, attach, sequence_number
from fpi_cuda.autograd.closed_over import here
from fpi_cuda.cells.lowering import EVALUATION
from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.modules import modules_in
from fpi_cuda.evaluation.recomputed import hooks_on_saved_tensors
from fpi_cuda.evaluation.shortcuts import (
    FUNCTIONAL_LINEAR,
    LINEAR,
    hooks_on_all,
    is_ours,
    why_own_call_matters,
)
from fpi_cuda.loops import capture
from fpi_cuda.loops.adjoint import strategy_for
from fpi_cuda.loops.plan import Plan
from fpi_cuda.loops.stepping import depth_of, numbers_of
from fpi_cuda.lowered import Layer, Lowered, NotLowered
from fpi_cuda.norms import difference_norm, row_norm
from fpi_cuda.options import Anderson, Implicit, Options, Picard, Unroll
from fpi_cuda.solution import AdjointRecord, Route, Solution, SolveResult, Stats, Status
from fpi_cuda.unconverged import Notice

MOST_PLANS = 16
"""Of one g, or one kind of g; the one that has rested longest makes room."""

CONVERGED, DIVERGED = int(Status.CONVERGED), int(Status.DIVERGED)
ROUNDINGS = 4.0
"""Of the state: a tolerance below so many is one for g itself."""

DECLINED = -1
"""What an adjoint solve says of a gradient whose numbers have to be scaled first."""

UNFIT = -3
"""What native code says of tensors that are not those of its plan."""

ROUTE = Route("fused")

NO_MATRIX: Any = None
"""The adjoint solve by native code needs none."""

PLAIN = (Tensor, nn.Parameter)
"""Classes of tensors in which nothing is done besides."""

Parts = tuple[Tensor | None, ...]
"""Weight, bias, shift and factor of each layer, and x_factor."""

At = tuple[int, tuple[Tensor, ...], Tensor, Tensor | None, tuple[Tensor | None, ...]]
"""What native code is told of a map and its fixed point: batch, weights, x, hidden and slopes."""

REDEFINED = frozenset((*EVALUATION, "lower", "lower_descent", "value", "gradient", "_partial"))
"""What somebody may have set on the instance of a cell or of its energy."""


def is_plain_call(*, grad: bool) -> bool:
    """Whether nothing around the call changes or watches what torch computes."""
    return not (
        transforms.active()
        or _len_torch_function_stack()
        or _len_torch_dispatch_stack()
        or is_autocast_enabled("cpu")
        or _get_tracing_state() is not None
        or here.substitution is not None
        or transforms.in_dual_level()
        or (grad and hooks_on_saved_tensors() is not None)
    )


class OwnCell:
    """A cell of this package, as it was found: what its lower() says needs nobody's word.

    Args:
        g: for which fpi_cuda.loops.fused.why_not has nothing to say.
    """

    capture = None

    def __init__(self, g: nn.Module, lowered: Lowered) -> None:
        # No part of g is held, for plans are kept as long as g lives.
        self._kinds = [type(part) for part in modules_in(g)]
        self._classes = capture.Classes(self._kinds)
        self._form = form_of(lowered)

    @staticmethod
    def can_keep(g: Any) -> bool:
        """Whether all of it is this package's own, or a Linear."""
        return is_ours(g) and all(type(part) is LINEAR or is_ours(part) for part in modules_in(g))

    def parts(self, g: Any, x: Tensor, z: tuple[Any, ...]) -> Parts | None:
        """What the cell is made of now; None where that has to be looked into."""
        if hooks_on_all() or functional.linear is not FUNCTIONAL_LINEAR or not g.rowwise:
            return None
        modules = modules_in(g)
        for module in modules:
            if why_own_call_matters(module) or not REDEFINED.isdisjoint(module.__dict__):
                return None
        if [*map(type, modules)] != self._kinds or not self._classes.unchanged():
            return None
        lowered = g.lower(g.prepare(*z))
        return parts_of(lowered) if form_of(lowered) == self._form else None


def form_of(lowered: Lowered) -> tuple[Any, ...]:
    """What a plan is made for besides the numbers in tensors."""
    layers = [(layer.activation, layer.factor is None) for layer in lowered.layers]
    return lowered.carry, lowered.x_factor is None, layers


def parts_of(lowered: Lowered) -> Parts:
    """What it is made of."""
    return (*(t for layer in lowered.layers for t in layer.tensors()), lowered.x_factor)


class Captured:
    """A g of which there is a capture."""

    def __init__(self, found: capture.Capture) -> None:
        self.capture = found

    def parts(self, g: Any, x: Tensor, z: tuple[Any, ...]) -> Parts | None:
        """What g is made of now; None where that has to be looked into."""
        found = self.capture
        grad = is_grad_enabled()
        _set_grad_enabled(True)
        try:
            holds = found.holds(g, x, z)
        finally:
            _set_grad_enabled(grad)
        return found.found.hoisted(*found.reads(g, x, z)) if holds else None


class KeptPlan:
    """What solves of one g, with states of one shape and the same options, have in common.

    Args:
        options: as they were given.
        plan: of an earlier solve, by the fused loop in native code.
        lowered: what was solved.
        source: reads the same off g as it is at a call.
    """

    def __init__(
        self, options: Options, plan: Plan, lowered: Lowered, source: OwnCell | Captured
    ) -> None:
        layout = plan.layout
        self.options = options
        self.plan = plan
        self.source = source
        self.shape = torch.Size((layout.batch, layout.dim))
        self.dtype = layout.dtype
        rest = lowered.layers[1:]
        self._widths = [len(layer.weight) for layer in lowered.layers]
        self._activations = [layer.activation for layer in lowered.layers]
        self._carry = lowered.carry
        self.nobody: tuple[Tensor | None, ...] = (None,) * len(lowered.layers)
        self.told = torch.promote_types(self.dtype, torch.float32)
        self.solver = plan.adjoint_solver
        adjoint = options.adjoint
        self.differentiable = (
            isinstance(adjoint, Implicit)
            and isinstance(self.solver, (Picard, Anderson))
            and (adjoint.solver is None)
            and (options.atol <= 0 or adjoint.rtol is not None)
            and lowered.x_factor is None
            and all(layer.factor is None for layer in lowered.layers)
            and all(name in DERIVATIVES for name in self._activations)
        )
        self.adjoint_rtol = options.rtol
        if isinstance(adjoint, Implicit) and adjoint.rtol is not None:
            self.adjoint_rtol = adjoint.rtol
        beta, ridge = numbers_of(options.solver)
        # The adjoint of a plan that is not differentiable is nobody's.
        linear = self.solver if isinstance(self.solver, (Picard, Anderson)) else options.solver
        adjoint_beta, adjoint_ridge = numbers_of(linear)
        most = plan.engine.CELL_LOOP_MAX_DEPTH  # type: ignore[attr-defined]
        codes = [CODES[name] for name in self._activations]
        slopes = [CODES[DERIVATIVES.get(name, "one")] for name in self._activations]
        from fpi_cuda._C import CellPlan  # only where _extension.module_error is None

        self._native = CellPlan(
            float64=layout.dtype == torch.float64,
            dim=layout.dim,
            hidden=self._widths[0] if rest else 0,
            activations=(codes[0], codes[-1] if rest else 0),
            derivatives=(slopes[0], slopes[-1] if rest else 0),
            carry=lowered.carry,
            depth=depth_of(options.solver, layout.dim),
            beta=beta,
            ridge=ridge,
            rtol=options.rtol,
            atol=options.atol,
            max_steps=options.max_steps,
            precision=0,
            adjoint_depth=min(depth_of(linear, layout.dim), most),
            adjoint_beta=adjoint_beta,
            adjoint_ridge=adjoint_ridge,
            adjoint_rtol=self.adjoint_rtol,
            adjoint_max_steps=options.adjoint_steps,
        )
        self.bytes = self._native.bytes
        self.solve_natively = self._native.solve
        self.solve_adjoint = self._native.adjoint
        self.gradients = self._native.gradients
        self._tight = is_tight(options, layout.dtype)
        found = source.capture
        self.route = Route("fused", plan.reasons)
        self.form = None if found is None else found.found.words

    @functools.cached_property
    def account(self) -> tuple[Tensor, Tensor, Tensor]:
        """What status, num_steps and residual are like, made in a call that nobody watches."""
        dtypes = (torch.int8, torch.int32, self.told)
        status, num_steps, residual = (torch.empty(self.shape[0], dtype=d) for d in dtypes)
        return status, num_steps, residual

    def serves(self, x0: Any, z: tuple[Any, ...], options: Options) -> bool:
        """Whether it is for such a state, such inputs and these options."""
        for t in z:
            if type(t) not in PLAIN or not t.is_cpu:
                return False
        return (
            type(x0) is Tensor
            and x0.shape == self.shape
            and x0.dtype is self.dtype
            and x0.is_cpu
            and (options is self.options or options == self.options)
        )

    def fits(self, parts: Parts) -> bool:
        """Whether `solve` takes these."""
        return self._native.fits(self.shape[0], parts)

    def solve(
        self,
        parts: Parts,
        x0: Tensor,
        evaluate: Callable[[Tensor], Tensor],
        notice: Notice,
    ) -> tuple[Solution, int] | None:
        """The solution and its worst status; None where the parts are none for this plan.

        Args:
            evaluate: g, with its inputs.
            notice: of the call.
        Raises:
            NotLowered: the ordinary way has to tell of it.
        """
        grad = is_grad_enabled() and any(t.requires_grad for t in parts if t is not None)
        if (grad and not self.differentiable) or (
            x0.requires_grad and isinstance(self.options.adjoint, Unroll)
        ):
            raise NotLowered("its derivative is another's")
        batch = self.shape[0]
        x = empty_like(x0, memory_format=torch.contiguous_format)
        status, num_steps, residual = map(empty_like, self.account)
        hidden: Tensor | None = None
        slopes, given = self.nobody, parts
        if grad:
            layers = zip(self._activations, self._widths, strict=True)
            slopes = tuple(
                [None if f == "identity" else x.new_empty(batch, width) for f, width in layers]
            )
            if len(slopes) == 2:
                hidden = x.new_empty(batch, self._widths[0])
            # Of the moment: a thread may exchange the .data of a parameter meanwhile.
            given = tuple([None if t is None else t.detach() for t in parts])
        worst = self.solve_natively(
            batch, given, x0, x, status, num_steps, residual, hidden, slopes
        )
        if worst == UNFIT:
            return None
        if worst >= DIVERGED:
            raise NotLowered("it has failed")
        if self.source.capture is not None and (self._tight or worst > CONVERGED):
            found = SolveResult(x, status, num_steps, residual)
            with torch.no_grad():
                residual = told_by_g(found, evaluate, self.options).residual.to(self.told)
        record = AdjointRecord(notice.look_at_adjoint)
        record.route, record.form = self.route, self.form
        if grad:
            record.adjoint_route = ROUTE
            weights: Any = given[:-1:4]
            x = attached(Run(self, record, status, x, hidden, slopes, weights), *parts)
        return Solution(x, status, num_steps, residual, record), worst


def is_tight(options: Options, dtype: torch.dtype) -> bool:
    """Whether rounding may decide what is within the tolerance."""
    return options.rtol < ROUNDINGS * torch.finfo(dtype).eps


def told_by_g(
    result: SolveResult, evaluate: Callable[[Tensor], Tensor], options: Options
) -> SolveResult:
    """`result` of a g that was captured, with the residuals of samples that fail those of g.

    Those of all samples, where the tolerance is near the rounding of the kernels, which is another
    than that of g.

    Args:
        evaluate: g on (B, D).
    Raises:
        NotLowered: by g a sample has not converged, which by the kernels has.
    """
    x, status, residual = result.x, result.status, result.residual
    tight = is_tight(options, x.dtype)
    told = status > CONVERGED
    if not tight and not bool(told.any()):
        return result
    gx = evaluate(x.clone())
    by_g = difference_norm(gx, x)
    if tight:
        told = torch.ones_like(told)
        within = by_g <= options.atol + options.rtol * row_norm(gx)
        if bool((~within & (status == CONVERGED)).any()):
            raise NotLowered("at such a tolerance the rounding of its own evaluation decides")
    return result._replace(residual=torch.where(told, by_g, residual))


class Run:
    """What the gradient of one solve starts from.

    Attributes:
        plan: of the solve. record: where its adjoint is told of. status: (B,) how it ended.
        x: (B, D) the solution; None once the node has it, which would hold itself otherwise.
        hidden, slopes: at the solution; see fpi_cuda._C.CellPlan.
        weights: as they were, whatever .data of a parameter becomes.
    """

    __slots__ = ("hidden", "plan", "record", "slopes", "status", "weights", "x")

    def __init__(
        self, plan: KeptPlan, record: AdjointRecord, status: Tensor, x: Tensor,
        hidden: Tensor | None, slopes: tuple[Tensor | None, ...], weights: tuple[Tensor, ...],
    ) -> None:  # fmt: skip
        self.plan = plan
        self.record = record
        self.status = status
        self.x: Tensor | None = x
        self.hidden = hidden
        self.slopes = slopes
        self.weights = weights


class Repeated(torch.autograd.Function):
    """The fixed point as a function of the tensors that its map is made of."""

    @staticmethod
    def forward(ctx: Any, run: Run, *tensors: Tensor | None) -> Tensor:
        x, run.x = run.x, None
        assert x is not None
        ctx.run = run
        # Of its own: whoever is given x may write over it.
        ctx.save_for_backward(x.clone(), *tensors)
        return x

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        batched = transforms.active() or transforms.is_legacy_batched(v)
        if batched or is_grad_enabled() or transforms.in_dual_level():
            return (None, *differentiated(ctx.run, x, tensors, needed, v))
        return (None, *pulled(ctx.run, x, tensors, needed, v))


attached = super(torch.autograd.Function, Repeated).apply
"""Repeated.apply, which first looks for transforms. Here there are none."""


def pulled(
    run: Run, x: Tensor, tensors: list[Tensor | None], needed: tuple[bool, ...], v: Tensor
) -> list[Tensor | None]:
    """v times the derivative of the fixed point in each of the tensors that need it.

    Args:
        x: (B, D) the fixed point. v: (B, D).
    """
    plan = run.plan
    batch = plan.shape[0]
    found: list[Tensor | None] = [None] * len(tensors)
    deltas, weights = [*plan.nobody], [*plan.nobody]
    for layer, width in enumerate(plan._widths):
        place = 4 * layer
        if needed[place]:
            found[place] = weights[layer] = x.new_empty(run.weights[layer].shape)
        if needed[place + 1] or needed[place + 2]:
            deltas[layer] = x.new_empty(batch, width)
    at = (batch, run.weights, x, run.hidden, run.slopes)
    wanted = (tuple(deltas), tuple(weights))
    c = empty_like(x)
    status, num_steps, residual = map(empty_like, plan.account)
    worst = plan.solve_adjoint(*at, v, c, status, num_steps, residual, *wanted)
    if worst == UNFIT:
        return differentiated(run, x, tensors, needed, v)
    if worst == CONVERGED:
        run.record.stats = Stats(status, num_steps, residual)
    else:
        first = SolveResult(c, status, num_steps, residual.double())
        solution = looked_after(run, at, first if worst != DECLINED else None, v)
        plan.gradients(*at, solution, *wanted)
    for layer, delta in enumerate(deltas):
        place = 4 * layer
        if needed[place + 1]:
            assert delta is not None
            found[place + 1] = delta.sum(0)  # as FusedEvaluation does it
        if needed[place + 2]:
            found[place + 2] = delta
    return found


def looked_after(run: Run, at: At, first: SolveResult | None, v: Tensor) -> Tensor:
    """c = J^T c + v where not every sample has one at once: scaled, or told of.

    Args:
        first: a solution for v; None where its numbers have to be scaled.
    """
    plan = run.plan

    def solve(_: object, b: Tensor, __: Tensor) -> SolveResult:
        if first is not None:
            return first
        c = empty_like(b, memory_format=torch.contiguous_format)
        status, num_steps, rounded = map(empty_like, plan.account)
        result = SolveResult(c, status, num_steps, rounded.double())
        plan.solve_adjoint(*at, b, *result, plan.nobody, plan.nobody)
        return result

    strategy = Strategy(
        Account(run.status, run.record), plan.dtype, rtol=plan.adjoint_rtol, on_device=solve
    )
    return strategy.solve(v.contiguous().resolve_neg(), NO_MATRIX, transpose=True)[0]


def differentiated(
    run: Run, x: Tensor, tensors: list[Tensor | None], needed: tuple[bool, ...], v: Tensor
) -> list[Tensor | None]:
    """The same as a function of v and the tensors, or of many v at once.

    What was solved is attached again, by what serves any map, to the map in torch.
    """
    plan = run.plan.plan
    with outside_transforms(), torch.enable_grad():  # v alone may be of a transform
        # Aliases: one of them may have been computed from another.
        aliases = [None if t is None else t.view_as(t) for t in tensors]
    present = [t for t in aliases if t is not None]
    form = run.plan

    def g(x: Tensor, *given: Tensor) -> Tensor:
        left = iter(given)
        parts = [None if t is None else next(left) for t in tensors]
        layers = tuple(
            Layer(parts[4 * i], name, *parts[4 * i + 1 : 4 * i + 4])  # type: ignore[arg-type]
            for i, name in enumerate(form._activations)
        )
        return Lowered(layers, parts[-1], form._carry)(x)

    born_after = sequence_number()
    bound_map = BoundMap(g, plan.layout, tuple(present))
    account = Account(run.status, run.record)
    strategy = strategy_for(
        plan.options, plan.engine, account, bound_map, x.detach(), None, plan.adjoint_solver
    )
    with outside_transforms(), torch.enable_grad():
        value = attach(bound_map, x.detach(), None, strategy, born_after)
    inputs = [t for t, wanted in zip(aliases, needed, strict=True) if wanted and t is not None]
    grads = iter(
        torch.autograd.grad(value, inputs, v, create_graph=is_grad_enabled(), allow_unused=True)
    )
    return [next(grads) if wanted else None for wanted in needed]


lock = threading.Lock()
known: weakref.WeakKeyDictionary[Any, tuple[KeptPlan, ...]] = weakref.WeakKeyDictionary()
"""By g, or by the class or the code of what was captured; those used last come first."""


def key_of(g: Any) -> Any:
    """What the plans of g are kept by; None if there can be none."""
    if hasattr(type(g), "lower"):
        return g if is_ours(g) else None
    return capture.key_of_kind(g)


def kept_solution(
    g: Any, x0: Any, z: tuple[Any, ...], options: Options
) -> tuple[Solution, int] | None:
    """The solution by a plan that is kept, and its worst status; None where there is none."""
    key = key_of(g)
    plans = () if key is None else known.get(key)
    if not plans or not is_plain_call(grad=is_grad_enabled()):
        return None
    for plan in plans:
        if plan.serves(x0, z, options):
            try:
                parts = plan.source.parts(g, x0, z)
            except Exception:
                return None  # the ordinary way will tell of it
            if parts is None:
                continue
            try:
                found = plan.solve(parts, x0, lambda x: g(x, *z), options.notice)
            except NotLowered:
                return None
            if found is not None:
                if plan is not plans[0]:
                    known[key] = (plan, *(other for other in plans if other is not plan))
                return found
    return None


def keep(g: Any, options: Options, plan: Plan, lowered: Lowered, found: Any) -> None:
    """Make a plan of a solve that has gone well, for others like it.

    Args:
        found: the capture that it was made by; None for a cell.
    """
    served = plan.engine.name == "native" and options.precision == "ieee"
    if _extension.module_error is not None or not served or not plan.layout.batch:
        return
    if found is None and not OwnCell.can_keep(g):
        return
    key, shape = key_of(g), (plan.layout.batch, plan.layout.dim)
    with lock:
        plans = known.get(key, ())
        alike = [
            p
            for p in plans
            if p.shape == shape and p.options == options and p.source.capture is found
        ]
        if found is not None and any(p.fits(parts_of(lowered)) for p in alike):
            return  # one that serves: this solve alone was out of the ordinary
        others = [p for p in plans if p not in alike]
        source = OwnCell(g, lowered) if found is None else Captured(found)
        known[key] = (KeptPlan(options, plan, lowered, source), *others)[:MOST_PLANS]


def clear() -> None:
    """Let go of every plan; those at work are dropped when they are done."""
    with lock:
        known.clear()


def memory() -> int:
    """Bytes that plans keep for calls to come."""
    return sum(plan.bytes() for plans in list(known.values()) for plan in plans)
