"""How the benchmark measures: tolerances at equal true residual, times in paired rounds."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

MOST_DOUBLINGS = 8
BISECTIONS = 3
SAME = 3
"""Halvings without any effect after which the search gives up."""
SHORTEST_SAMPLE = 0.02
"""Seconds that one timing sample lasts at least, by repeating short calls."""

LONGEST_ROW = 8.0
FEWEST_ROUNDS = 3
"""A call leaves the rounds once it has taken so many seconds in so many of them."""


def use_threads(count: int) -> None:
    """Hold this process to `count` threads and cores: torch's, XLA's and anybody's.

    To be called before JAX is imported.
    """
    torch.set_num_threads(count)
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen={str(count > 1).lower()}"
        f" intra_op_parallelism_threads={count}"
    ).strip()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A tolerance, and the share of samples whose true error it brings to the target."""

    tol: float
    solved: float
    worst: float


def loosest_tolerance(
    error: Callable[[float], torch.Tensor],
    target: float,
    first: float,
    *,
    looser: bool = True,
    within: float = math.inf,
    longest: float = math.inf,
) -> Calibration:
    """Search the loosest tolerance at which the true error of every sample meets `target`.

    Args:
        error: (B,) true errors of what a library returns at a given tolerance.
        first: where to begin.
        looser: look beyond `first` where it suffices.
        within: seconds after which no other tolerance is tried.
        longest: seconds of one evaluation of `error`; a tolerance that takes longer, or raises, is
            insufficient and ends the search.
    Returns:
        a sufficient tolerance within a factor 2 ** 0.125 of an insufficient one, or 2 where time
        ran out; where none suffices, the loosest of those that solve most samples.
    Raises:
        TimeoutError: the very first evaluation took longer than `longest`.
    """
    began = time.perf_counter()

    errors: list[torch.Tensor] = []

    def attempt(tol: float) -> Calibration:
        with time_limit(longest):
            errors.append(error(tol))
        solved = float((errors[-1] <= target).double().mean())
        return Calibration(tol, solved, float(errors[-1].max()))

    tried = [attempt(first)]
    sufficient = tried[0].solved == 1.0
    if sufficient and not looser:
        return tried[0]
    for _ in range(MOST_DOUBLINGS):
        if time.perf_counter() - began > within:
            break
        try:
            tried.append(attempt(tried[-1].tol * (2.0 if sufficient else 0.5)))
        except Exception:  # some libraries raise where they miss their tolerance
            break
        if (tried[-1].solved == 1.0) != sufficient:
            break
        # The step cap ends the solves, not the stop test: the tolerance changes nothing.
        if len(errors) > SAME and all(torch.equal(errors[-1], e) for e in errors[-SAME - 1 : -1]):
            break
    best = max(tried, key=lambda attempt: (attempt.solved, attempt.tol))
    insufficient = [attempt.tol for attempt in tried if attempt.solved < 1.0]
    if best.solved < 1.0 or not insufficient:
        return best
    failing = min(insufficient)
    for _ in range(BISECTIONS):
        if time.perf_counter() - began > within:
            break
        try:
            middle = attempt((best.tol * failing) ** 0.5)
        except Exception:
            break
        if middle.solved == 1.0:
            best = middle
        else:
            failing = middle.tol
    return best


@contextlib.contextmanager
def time_limit(limit: float) -> Iterator[None]:
    """Raise a TimeoutError once the block has taken so many seconds, before its next Python line.

    A call into compiled code ends first. No limit outside the main thread, or without SIGALRM.
    """
    usable = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    if not usable or math.isinf(limit):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"takes more than {limit:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    outer = signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, handler)


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall-clock seconds of one call, the mean of `repeats`."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def quickest(call: Callable[[], object], device: torch.device, tries: int = 3) -> float:
    """The shortest of a few timings: enough to choose between settings."""
    return min(seconds(call, device) for _ in range(tries))


def paired_rounds(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, list[float]]:
    """Time every call once per round, A B C A B C ..., after a warm-up round.

    Returns:
        the seconds of each call in each round, of a slow one in the first rounds only; entries of
        one round are paired, so that a ratio of two calls sees the same machine.
    """
    repeats = {
        name: max(1, round(SHORTEST_SAMPLE / max(quickest(call, device, 2), 1e-6)))
        for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in progress(range(rounds)):
        for name, call in calls.items():
            spent = sum(times[name]) * repeats[name]
            if len(times[name]) < FEWEST_ROUNDS or spent < LONGEST_ROW:
                times[name].append(seconds(call, device, repeats[name]))
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Min, median and max."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
