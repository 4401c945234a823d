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
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

MOST_DOUBLINGS = 8
BISECTIONS = 3
SAME = 3
"""Halvings without any effect after which the search gives up."""
SHORTEST_SAMPLE = 0.02
"""Seconds that one timing sample lasts at least, by repeating short calls."""
MOST_REPEATS = 2000

LONGEST_ROW = 8.0
FEWEST_ROUNDS = 3
"""A call leaves the rounds once it has taken so many seconds in so many of them."""

SLEEPS = (5_000_000, 20_000_000, 80_000_000)
"""Cycles that a device sleeps while the host issues a call: 2.5 to 40 ms at 2 GHz."""


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
def time_limit(limit: float, error: type[BaseException] = TimeoutError) -> Iterator[None]:
    """Raise `error` once the block has taken so many seconds, before its next Python line.

    A call into compiled code ends first. An earlier limit around this one holds in it. No limit
    outside the main thread, or without SIGALRM.
    """
    usable = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    around = signal.getitimer(signal.ITIMER_REAL)[0] if usable else 0.0
    if not usable or math.isinf(limit) or 0.0 < around <= limit:
        yield
        return

    def stop(*_: object) -> None:
        raise error(f"takes more than {limit:g} s")

    began = time.perf_counter()
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        if around > 0.0:
            left = around - (time.perf_counter() - began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3))


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Wall-clock seconds of one call, the mean of `repeats`."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


class Timing(NamedTuple):
    """Seconds of one call.

    Attributes:
        device: of its work there, without a gap; where the call waits, from start to end.
        host: until the call has returned.
        waits: whether the host waits for the device inside the call.
    """

    device: float
    host: float
    waits: bool


Clock = Callable[[Callable[[], object], Callable[[], object]], Timing]
"""clock(call, before): `before` is called ahead of every try, and is not timed."""


def cpu_clock(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> Timing:
    """Host and device are the same."""
    before()
    taken = seconds(call, torch.device("cpu"))
    return Timing(taken, taken, False)


def cuda_clock(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> Timing:
    """Time a call that is issued while the device sleeps, so that it never waits for the host."""
    for cycles in SLEEPS:
        asleep, begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        before()
        torch.cuda.synchronize()
        asleep.record()
        torch.cuda._sleep(cycles)
        begin.record()
        started = time.perf_counter()
        call()
        host = time.perf_counter() - started
        end.record()
        torch.cuda.synchronize()
        if host < asleep.elapsed_time(begin) / 1e3:
            return Timing(begin.elapsed_time(end) / 1e3, host, False)
    before()
    taken = seconds(call, torch.device("cuda", torch.cuda.current_device()))
    return Timing(taken, taken, True)


def busy_seconds(call: Callable[[], object]) -> float:
    """Seconds of all that a CUDA device does in one call, by the profiler's account."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    busy = [
        event.time_range.elapsed_us()
        for event in profile.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]
    if not busy:
        raise RuntimeError("the profiler saw no work of the device")
    return sum(busy) / 1e6


def quickest(call: Callable[[], object], device: torch.device, tries: int = 5) -> float:
    """The shortest of a few timings: enough to choose between settings.

    On the CPU it is the time that this process worked, whoever else uses the machine.
    """

    def worked() -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    return min(worked() if device.type == "cpu" else seconds(call, device) for _ in range(tries))


def paired_rounds(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Time every call once per round, A B C A B C ..., after a warm-up round.

    Returns:
        the seconds of each call in each round, of a slow one in the first rounds only; entries of
        one round are paired, so that a ratio of two calls sees the same machine.
    """
    fresh = {name: (lambda _, call=call: call) for name, call in calls.items()}
    return fresh_rounds(fresh, rounds, device)


def fresh_rounds(
    calls: Mapping[str, Callable[[int], Callable[[], object]]],
    rounds: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """The same for calls that are made anew each time: calls[name](n), the n-th, is not timed."""

    def taken(name: str, first: int, repeats: int) -> float:
        return sum(seconds(calls[name](first + n), device) for n in range(repeats)) / repeats

    quick = {name: min(taken(name, n, 1) for n in (0, 1)) for name in calls}
    repeats = {
        name: round(min(MOST_REPEATS, SHORTEST_SAMPLE / t)) or 1 for name, t in quick.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for first in range(rounds):
        for name in calls:
            spent = sum(times[name]) * repeats[name]
            if len(times[name]) < FEWEST_ROUNDS or spent < LONGEST_ROW:
                times[name].append(taken(name, first, repeats[name]))
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Min, median and max."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
