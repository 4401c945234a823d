"""Picks each library's settings on a problem: tolerances at equal true error, then the fastest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from bench.measure import Calibration, loosest_tolerance, quickest, seconds, time_limit
from bench.peers import Entry, Peer
from bench.problems import Problem, Reference, reference_solution
from bench.record import reason

SCREEN_BATCHES = (8, 64, 256)
SCREEN_SECONDS = 2.0
"""A setting that needs longer than this for so many samples is left out, by name."""

SOLVE_SECONDS, BOTH_SECONDS = 5.0, 10.0
"""A row is left out of a batch, by name, where one solve takes longer than this, alone or with its
backward. A tolerance whose solve takes longer is not taken."""

SEARCH_SECONDS = 15.0
"""For how long a tolerance is searched."""

BACKWARD_FIELD = 1.5
"""Settings within this factor of the fastest forward are tried forward+backward."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem with what its gradient is measured against.

    Attributes:
        v: (B, d) gradient of the loss in x.
    """

    problem: Problem
    v: Tensor
    reference: Reference

    @property
    def gradient_rtol(self) -> float:
        """condition times rtol: the relative error that a residual of rtol explains."""
        return self.reference.condition * self.problem.rtol

    def gradient_errors(self, z_grad: Tensor) -> Tensor:
        """(valid,) relative error of each sample's gradient in z; NaN counts as inf."""
        exact = self.reference.z_grad
        error = (z_grad.double() - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-30)
        return torch.nan_to_num(error[self.reference.valid], nan=torch.inf)


@dataclasses.dataclass(frozen=True)
class Forward:
    """A setting whose forward tolerance is found, and its time in seconds."""

    peer: Peer
    tol: Calibration
    seconds: float


@dataclasses.dataclass(frozen=True)
class Both:
    """The same with the tolerance of the backward solve; the time is forward+backward."""

    peer: Peer
    tol: Calibration
    adjoint: Calibration
    seconds: float


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A row of the tables: the best setting forward, and the best with the backward.

    Attributes:
        both: None where no setting's backward ran.
        failures: the settings that did not run, and why.
    """

    label: str
    forward: Forward
    both: Both | None
    failures: list[str]


def make_task(problem: Problem, start: Peer) -> Task:
    """Draw the loss and compute its exact gradient, from the solution that `start` finds."""
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(problem.x0.shape, generator=generator).to(problem.x0)
    x = start.solve(problem, start.first_tolerance(problem))
    return Task(problem, v, reference_solution(problem, x, v))


def choose(entry: Entry, task: Task, num_candidates: int | None = None) -> Chosen:
    """Pick the entry's settings on this problem.

    Args:
        num_candidates: try this many settings of a "fastest" entry; None tries all.
    Raises:
        RuntimeError: no setting ran; the message tells why.
    """
    if entry.pick == "first_solving":
        return _first_solving(entry, task)
    reasons: list[str] = []
    found = [
        forward
        for peer in entry.candidates[:num_candidates]
        if (forward := _attempt(lambda peer=peer: try_forward(peer, task.problem), peer, reasons))
    ]
    if not found:
        raise RuntimeError("; ".join(reasons))
    fastest = max(found, key=lambda item: (item.tol.solved, -item.seconds))
    field = [
        item
        for item in found
        if item.tol.solved == fastest.tol.solved
        and item.seconds <= BACKWARD_FIELD * fastest.seconds
    ]
    complete = [
        both
        for item in field
        if (both := _attempt(lambda item=item: try_both(item, task), item.peer, reasons))
    ]
    return Chosen(
        entry.label,
        fastest,
        max(complete, key=lambda item: (item.adjoint.solved, -item.seconds), default=None),
        reasons,
    )


def _first_solving(entry: Entry, task: Task) -> Chosen:
    """The first setting that solves all samples, and the first whose gradients are right, too."""
    reasons: list[str] = []
    forward: Forward | None = None
    both: Both | None = None
    for peer in entry.candidates:
        tried = _attempt(lambda peer=peer: try_forward(peer, task.problem), peer, reasons)
        if tried is None:
            continue
        if forward is None or tried.tol.solved > forward.tol.solved:
            forward = tried
        if tried.tol.solved < 1.0:
            continue
        complete = _attempt(lambda tried=tried: try_both(tried, task), peer, reasons)
        if complete and (both is None or complete.adjoint.solved > both.adjoint.solved):
            both = complete
        if both is not None and both.adjoint.solved == 1.0:
            break
    if forward is None:
        raise RuntimeError("; ".join(reasons))
    return Chosen(entry.label, forward, both, reasons)


T = TypeVar("T")


def _attempt(call: Callable[[], T], peer: Peer, reasons: list[str]) -> T | None:
    """The result of `call`; or None, and why in `reasons`: a peer's failure is a finding."""
    try:
        return call()
    except Exception as error:
        reasons.append(f"{peer.name}: {reason(error)}")
        return None


def try_forward(peer: Peer, problem: Problem) -> Forward:
    """Find the loosest tolerance at which the library's answers meet the problem's rtol.

    Raises:
        RuntimeError: a few samples already take too long.
    """
    screen(peer, problem)
    tol = forward_tolerance(peer, problem, peer.first_tolerance(problem))
    return Forward(peer, tol, quickest(lambda: peer.solve(problem, tol.tol), problem.z.device))


def forward_tolerance(peer: Peer, problem: Problem, first: float) -> Calibration:
    """The loosest that meets the problem's rtol, searched from `first`."""
    return loosest_tolerance(
        lambda tol: problem.true_residual(peer.solve(problem, tol)),
        problem.rtol,
        first,
        looser=not peer.promises_residual,
        within=SEARCH_SECONDS,
        longest=math.inf if peer.compiles else SOLVE_SECONDS,
    )


def try_both(forward: Forward, task: Task) -> Both:
    """Find the loosest adjoint tolerance at which every sample's gradient in z is close enough."""
    peer, tol, problem = forward.peer, forward.tol, task.problem

    def errors(adjoint_tol: float) -> Tensor:
        _, grads = peer.solve_and_grad(problem, tol.tol, adjoint_tol, task.v)
        return task.gradient_errors(grads[0])

    adjoint = loosest_tolerance(
        errors,
        task.gradient_rtol,
        peer.first_adjoint_tolerance(problem),
        within=SEARCH_SECONDS,
        longest=math.inf if peer.compiles else BOTH_SECONDS,
    )
    taken = quickest(
        lambda: peer.solve_and_grad(problem, tol.tol, adjoint.tol, task.v), problem.z.device
    )
    return Both(peer, tol, adjoint, taken)


def at_batch(chosen: Chosen, problem: Problem, v: Tensor) -> Chosen:
    """The same settings on another batch: forward tolerances found anew, adjoint ones kept.

    Args:
        v: (B, d) gradient of the loss in x.
    Raises:
        TimeoutError: a solve takes longer than SOLVE_SECONDS, or BOTH_SECONDS with its backward.
    """
    peer, tol = chosen.forward.peer, chosen.forward.tol.tol
    taken = _taken(lambda: peer.solve(problem, tol), SOLVE_SECONDS, peer, problem)
    forward = Forward(peer, forward_tolerance(peer, problem, tol), taken)
    if chosen.both is None:
        return dataclasses.replace(chosen, forward=forward)
    other = chosen.both.peer
    tol_both = (
        forward.tol if other is peer else forward_tolerance(other, problem, chosen.both.tol.tol)
    )
    adjoint_tol = chosen.both.adjoint.tol
    _taken(
        lambda: other.solve_and_grad(problem, tol_both.tol, adjoint_tol, v),
        BOTH_SECONDS,
        other,
        problem,
    )
    both = dataclasses.replace(chosen.both, tol=tol_both)
    return dataclasses.replace(chosen, forward=forward, both=both)


def _taken(call: Callable[[], object], limit: float, peer: Peer, problem: Problem) -> float:
    """Seconds of the call, after one that may compile."""
    with time_limit(math.inf if peer.compiles else limit):
        if (first := seconds(call, problem.z.device)) <= limit:
            return first
        taken = seconds(call, problem.z.device)
    if taken > limit:
        raise TimeoutError(f"takes {taken:.0f} s, more than {limit:g} s")
    return taken


def screen(peer: Peer, problem: Problem) -> None:
    """Raise a RuntimeError where a few samples already take too long."""
    if peer.compiles:
        return
    for size in SCREEN_BATCHES:
        few = problem.with_batch(min(size, problem.batch))
        solve = partial(peer.solve, few, peer.first_tolerance(few))
        taken = seconds(solve, problem.z.device)  # the first one may warm up
        if taken > SCREEN_SECONDS and (taken := seconds(solve, problem.z.device)) > SCREEN_SECONDS:
            raise RuntimeError(f"too slow, {taken:.1f} s for {few.batch} samples")
