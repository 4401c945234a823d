"""Picks each library's settings on a problem: tolerances at equal true error, then the fastest."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.json_files import finite
from bench.measure import Calibration, loosest_tolerance, quickest, seconds
from bench.peers import Entry, Peer
from bench.problems import Problem, Variants, norms
from bench.record import reason

SCREEN_BATCHES = (8, 64, 256)
SCREEN_SECONDS = 2.0
"""A setting that needs longer than this for so many samples is left out, by name."""

SOLVE_SECONDS, BOTH_SECONDS = 5.0, 10.0
"""A row is left out of a batch, by name, where one solve takes longer than this, alone or with its
backward. A tolerance whose solve takes longer is not taken."""

SEARCH_SECONDS = 15.0
"""For how long a tolerance is searched."""

FIELD = 1.5
"""Settings within this factor of the fastest forward are tried forward+backward."""

TIGHTER, MOST_TIGHTER = 2**-0.25, 8
"""What a tolerance is multiplied by where it misses the target on other inputs, and how often."""

FORWARD_TIGHTER = (1.0, 0.25, 0.06)
"""How much tighter a forward solve is tried where no adjoint meets the gradient error."""


class Task:
    """A problem at one batch size, in several variants.

    Args:
        start: finds the points from which the references are polished.
    """

    def __init__(self, variants: Variants, batch: int, start: Peer) -> None:
        self.variants = variants
        self.batch = batch
        self.start = start
        self.v = variants.v[variants.rows(batch)]

    @property
    def problem(self) -> Problem:
        """The first variant."""
        return self.use(0)

    def use(self, variant: int) -> Problem:
        """A variant, its weights in the cell until the next."""
        return self.variants.use(variant % self.variants.count, self.batch)

    def residuals(self, peer: Peer, tol: float, variant: int) -> Tensor:
        """(B,) true residuals of what the library returns."""
        problem = self.use(variant)
        return problem.true_residual(peer.solve(problem, tol))

    def errors(self, peer: Peer, tol: float, adjoint_tol: float, variant: int) -> Tensor:
        """(valid,) relative errors of the gradients in z that the library returns."""
        problem = self.use(variant)
        _, grads = peer.solve_and_grad(problem, tol, adjoint_tol, self.v)
        return self.gradient_errors(grads[0], variant)

    def gradient_errors(self, z_grad: Tensor, variant: int = 0) -> Tensor:
        """(valid,) relative error of each sample's gradient in z; NaN counts as inf."""
        first = self.start.first_tolerance(self.variants.problem)
        reference = self.variants.reference(variant, lambda p: self.start.solve(p, first))
        rows = self.variants.rows(self.batch)
        exact = reference.z_grad[rows]
        error = norms(z_grad.double() - exact) / norms(exact).clamp_min(1e-30)
        return torch.nan_to_num(error[reference.valid[rows]], nan=torch.inf)


@dataclasses.dataclass(frozen=True)
class Forward:
    """A setting whose forward tolerance is found, and its time in seconds.

    Attributes:
        compiling: seconds that its first call took longer.
    """

    peer: Peer
    tol: Calibration
    seconds: float
    compiling: float = 0.0


@dataclasses.dataclass(frozen=True)
class Both:
    """The same with the tolerance of the backward solve; the time is forward+backward."""

    peer: Peer
    tol: Calibration
    adjoint: Calibration
    seconds: float
    compiling: float = 0.0


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


# The settings that a search has found fastest.

BEST = Path(__file__).with_name("best.json")
"""By kind of device, family of problems, row and batch size: the names of at most two settings."""


def family(problem: Problem) -> str:
    """Users' maps of one class have their settings in common, whatever their width."""
    own = problem.g == "your module"
    return f"your {type(problem.cell).__name__}" if own else problem.name


@functools.cache
def best_settings() -> dict[str, Any]:
    """What BEST holds."""
    return json.loads(BEST.read_text()) if BEST.exists() else {}


def candidates(entry: Entry, task: Task, most: int | None = None) -> tuple[Peer, ...]:
    """The settings to try: those that a search found at the nearest batch size.

    Where there was none, those found on other problems; else the first `most`, None tries all.
    """
    if len(entry.candidates) == 1 or entry.pick == "first_solving":
        return entry.candidates
    problem = task.variants.problem
    found = best_settings().get(problem.z.device.type, {})
    by_batch = found.get(family(problem), {}).get(entry.label, {})
    nearest = min(by_batch, key=lambda b: abs(math.log(int(b) / task.batch)), default=None)
    elsewhere = [n for rows in found.values() for n in rows.get(entry.label, {}).get("256", ())]
    names = by_batch[nearest] if nearest else elsewhere
    named = [peer for peer in entry.candidates if peer.name in names]
    return tuple(named) or entry.candidates[:most]


def names_of(chosen: Chosen) -> list[str]:
    """What BEST holds of it: without twice the same."""
    picked = [chosen.forward, *([chosen.both] if chosen.both else [])]
    return finite(list(dict.fromkeys(item.peer.name for item in picked)))


def choose(
    entry: Entry, task: Task, most: int | None = None, peers: tuple[Peer, ...] | None = None
) -> Chosen:
    """Pick the entry's settings on this problem.

    Args:
        most: how many settings of a "fastest" entry are tried where no search has been made, or
            nothing of what it found runs here.
        peers: the settings to try, whatever a search has found.
    Raises:
        RuntimeError: no setting ran; the message tells why.
    """
    if entry.pick == "first_solving":
        return _first_solving(entry, task)
    reasons: list[str] = []
    found: list[Forward] = []
    first = peers or candidates(entry, task, most)
    for some in (first, entry.candidates[:most]):
        found = [
            forward
            for peer in some
            if (some is first or peer not in first)
            and (forward := _attempt(lambda peer=peer: try_forward(peer, task), peer, reasons))
        ]
        if found:
            break
    if not found:
        raise RuntimeError("; ".join(reasons))
    fastest = max(found, key=lambda item: (item.tol.solved, -item.seconds))
    field = [
        item
        for item in found
        if item.tol.solved == fastest.tol.solved and item.seconds <= FIELD * fastest.seconds
    ]
    complete = [
        both
        for item in (field if len(found) > 2 else found)
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
        tried = _attempt(lambda peer=peer: try_forward(peer, task), peer, reasons)
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


def try_forward(peer: Peer, task: Task) -> Forward:
    """Find the loosest tolerance at which the library's answers meet the problem's rtol.

    Raises:
        RuntimeError: a few samples already take too long.
    """
    problem, device = task.problem, task.v.device
    compiling = compiled_in(peer, task, lambda loaded: peer.run(loaded, problem.rtol))
    screen(peer, problem)
    found = loosest_tolerance(
        lambda tol: task.residuals(peer, tol, 0),
        problem.rtol,
        peer.first_tolerance(problem),
        looser=not peer.promises_residual,
        within=SEARCH_SECONDS,
        longest=math.inf if peer.compiles else SOLVE_SECONDS,
    )
    tol = confirmed(found, partial(task.residuals, peer), problem.rtol, task)
    loaded = peer.load(task.problem, task.v)
    taken = quickest(lambda: peer.run(loaded, tol.tol), device)
    return Forward(peer, tol, taken, compiling)


def try_both(forward: Forward, task: Task) -> Both:
    """Find the loosest adjoint tolerance at which every sample's gradient in z is close enough.

    The forward solve is made tighter where none is: then its own error is what the gradient shows.
    """
    peer, problem, device = forward.peer, task.problem, task.v.device
    target = problem.gradient_rtol
    first = peer.first_adjoint_tolerance(problem)
    compiling = compiled_in(
        peer, task, lambda loaded: peer.run_both(loaded, forward.tol.tol, first)
    )
    tried: list[tuple[Calibration, Calibration]] = []
    for factor in FORWARD_TIGHTER:
        tol = dataclasses.replace(forward.tol, tol=factor * forward.tol.tol)
        found = loosest_tolerance(
            lambda adjoint_tol, tol=tol: task.errors(peer, tol.tol, adjoint_tol, 0),
            target,
            first,
            within=SEARCH_SECONDS,
            longest=math.inf if peer.compiles else BOTH_SECONDS,
        )
        errors = partial(task.errors, peer, tol.tol)
        tried.append((tol, confirmed(found, errors, target, task)))
        if tried[-1][1].solved == 1.0:
            break
    tol, adjoint = max(tried, key=lambda pair: pair[1].solved)
    loaded = peer.load(task.problem, task.v)
    taken = quickest(lambda: peer.run_both(loaded, tol.tol, adjoint.tol), device)
    return Both(peer, tol, adjoint, taken, compiling)


def confirmed(
    found: Calibration, error: Callable[[float, int], Tensor], target: float, task: Task
) -> Calibration:
    """A tolerance that meets the target on the first variant, tightened until it does on all.

    Returns:
        it, with the share and the worst of all variants; of those tried, the one that solves most.
    """
    tried: list[Calibration] = []
    tol = found.tol
    for _ in range(MOST_TIGHTER):
        errors = torch.cat([error(tol, k) for k in range(task.variants.count)])
        solved = float((errors <= target).double().mean())
        tried.append(Calibration(tol, solved, float(errors.max())))
        if solved == 1.0 or found.solved < 1.0:
            break
        tol *= TIGHTER
    return max(tried, key=lambda each: each.solved)


def compiled_in(peer: Peer, task: Task, call: Callable[[Any], object]) -> float:
    """Seconds that the first call takes longer than the next: what is compiled in it."""
    if not peer.compiles:
        return 0.0
    loaded = peer.load(task.problem, task.v)
    first, later = (seconds(lambda: call(loaded), task.v.device) for _ in range(2))
    return max(0.0, first - later)


def screen(peer: Peer, problem: Problem) -> None:
    """Raise a RuntimeError where a few samples already take too long."""
    if peer.compiles:
        return
    for size in sorted({min(size, problem.batch) for size in SCREEN_BATCHES}):
        few = problem.with_batch(size)
        solve = partial(peer.solve, few, peer.first_tolerance(few))
        taken = seconds(solve, problem.z.device)  # the first one may warm up
        if taken > SCREEN_SECONDS and (taken := seconds(solve, problem.z.device)) > SCREEN_SECONDS:
            raise RuntimeError(f"too slow, {taken:.1f} s for {few.batch} samples")
