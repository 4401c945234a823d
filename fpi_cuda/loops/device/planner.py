"""A solve on the device, from the plan that fits it, or the reason why there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from fpi_cuda.autograd import BoundMap
from fpi_cuda.loops.device.cache import PlanCache
from fpi_cuda.loops.device.graphs import Graphs, Refused, first_line
from fpi_cuda.loops.device.method import Method, key_of
from fpi_cuda.loops.device.plan import Plan, SolvePlan
from fpi_cuda.loops.host import iterate
from fpi_cuda.norms import row_norm
from fpi_cuda.solution import SolveResult, Status

FIRST_SIGHT = "it is the first of its kind; it is captured when it comes again"
DISAGREES = "its first solve disagreed with the host loop ({}), so the captured graph is not g"


def solve(
    bound_map: BoundMap,
    x0: Tensor,
    method: Method,
    *,
    atol: float | Tensor,
    graphs: Graphs,
    cache: PlanCache,
    at_once: bool,
) -> SolveResult:
    """Iterate from x0 until every sample has stopped, without the host.

    A plan's first solve is checked against the host loop; every later one against the trace of
    one evaluation of g, which is its first step.

    Args:
        bound_map: g, plain; under no_grad.
        x0: (B, D), plain, not modified.
        atol: one number, or (B,) float64.
        at_once: capture a solve that was not seen before; else at its second call.
    Raises:
        Refused: the host has to do it.
    """
    if x0.shape[0] == 0:
        raise Refused("the batch is empty")
    unavailable = graphs.why_not()
    if unavailable is not None:
        raise Refused(unavailable)
    key = key_of("solve", bound_map, method, with_graph=False)
    known = cache.refusal(key)
    if known is not None:
        raise Refused(known)
    plan = cast("SolvePlan | None", cache.take(key))
    if plan is not None:
        try:
            with lent(plan, cache):
                result = plan.solve(bound_map, x0, atol)
        except Refused as reason:
            if not cache.count_rebuild(key):
                cache.refuse(key, reason)
                raise
        else:
            cache.give_back(plan, fitted=True)
            return result
    if cache.first_sight(key) and not at_once:
        raise Refused(FIRST_SIGHT)
    plan = SolvePlan(key, bound_map, x0, method, graphs)
    cache.lend(plan)
    try:
        with lent(plan, cache):
            plan.warm_up(bound_map, x0, atol)
            with failures_refused():
                result = plan.build(bound_map, x0, atol)
                require_agreement(result, on_host(bound_map, x0, method, atol))
    except Refused as reason:
        cache.refuse(key, reason)
        raise
    cache.give_back(plan)
    return result


@contextlib.contextmanager
def lent(plan: Plan, cache: PlanCache) -> Iterator[None]:
    """Drop the plan where what is done with it fails."""
    try:
        yield
    except BaseException:
        cache.discard(plan)
        raise


@contextlib.contextmanager
def failures_refused() -> Iterator[None]:
    """Turn errors into Refused: g works, so they come of its being recorded and captured.

    If not, the host loop will meet them too.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        # A warning that the user has made an error: torch gives some of its own only once.
        passing = isinstance(error, Warning)
        reason = f"g fails while it is captured: {first_line(error)}"
        raise Refused(reason, passing=passing) from error


def on_host(bound_map: BoundMap, x0: Tensor, method: Method, atol: float | Tensor) -> SolveResult:
    """The same solve by the host loop."""
    return iterate(
        bound_map.evaluate,
        x0,
        method.solver,
        rtol=method.rtol,
        atol=atol,
        max_steps=method.max_steps,
        backend=method.backend,
    )


def require_agreement(result: SolveResult, expected: SolveResult) -> None:
    """Raise Refused unless two solves of one problem ended alike.

    Where g repeats its bits they end equal. Where it does not, samples that converged must have
    done so at the same point, up to a hundred times what each is known to.
    """
    if all(map(identical, result, expected)):
        return
    if not torch.equal(result.status, expected.status):
        raise Refused(DISAGREES.format("another status"))
    good = expected.status == Status.CONVERGED
    gap = row_norm(result.x - expected.x)
    known_to = result.residual + expected.residual
    eps = torch.finfo(result.x.dtype).eps
    size = row_norm(expected.x)
    if bool((good & ~(gap <= 100 * known_to + 100 * eps * size)).any()):
        raise Refused(DISAGREES.format("another point"))
    if not bool(good.any()):
        raise Refused(DISAGREES.format("no sample converged, and their points differ"))


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are equal, NaN to NaN too."""
    return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
