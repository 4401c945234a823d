"""One table: the chosen settings of every library timed in paired rounds on one problem."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from tqdm import tqdm

from bench.measure import paired_rounds, spread
from bench.peers.ours import BASELINE
from bench.problems import Problem
from bench.settings import Chosen


def compare(
    chosen: list[Chosen], problem: Problem, v: Tensor, rounds: int, *, memory: bool
) -> list[dict[str, Any]]:
    """Time what was chosen for this very problem and batch; one row of results for each.

    Args:
        v: (B, d) gradient of the loss in x.
        memory: measure peak memory too.
    """
    forward_calls: dict[str, Callable[[], object]] = {}
    both_calls: dict[str, Callable[[], object]] = {}
    for item in chosen:
        forward_calls[item.label] = functools.partial(
            item.forward.peer.solve, problem, item.forward.tol.tol
        )
        if item.both is not None:
            both_calls[item.label] = functools.partial(
                item.both.peer.solve_and_grad,
                problem,
                item.both.tol.tol,
                item.both.adjoint.tol,
                v,
            )
    device = problem.z.device
    title = f"{problem.name} B={problem.batch}"
    forward = paired_rounds(forward_calls, rounds, device, _bar(f"{title} forward"))
    both = paired_rounds(both_calls, rounds, device, _bar(f"{title} forward+backward"))
    return [_row(item, problem, forward, both, memory) for item in chosen]


def _bar(what: str) -> Callable[[Iterable[int]], Iterable[int]]:
    return functools.partial(tqdm, desc=what, unit="round", leave=False)


def _row(
    chosen: Chosen,
    problem: Problem,
    forward_times: dict[str, list[float]],
    both_times: dict[str, list[float]],
    memory: bool,
) -> dict[str, Any]:
    peer, tol = chosen.forward.peer, chosen.forward.tol
    steps = peer.num_steps(problem, tol.tol).double()
    row: dict[str, Any] = {
        "label": chosen.label,
        "library": peer.library,
        "setting": peer.name,
        "tol": tol.tol,
        "solved": tol.solved,
        "worst_residual": tol.worst,
        "steps_mean": float(steps.mean()),
        "steps_max": float(steps.max()),
        "forward": _timing(forward_times, chosen.label, tol.solved * problem.batch),
    }
    if memory:
        row["peak_bytes"] = peer.peak_bytes(problem, tol.tol)
    if chosen.both is not None:
        both = chosen.both
        row["both_setting"] = both.peer.name
        row["adjoint_tol"] = both.adjoint.tol
        row["gradient_solved"] = both.adjoint.solved
        row["gradient_worst_error"] = both.adjoint.worst
        share = min(both.tol.solved, both.adjoint.solved)
        row["both"] = _timing(both_times, chosen.label, share * problem.batch)
    return row


def _timing(times: dict[str, list[float]], label: str, solved: float) -> dict[str, Any]:
    mine = times[label]
    result: dict[str, Any] = {
        "seconds": spread(mine),
        "rounds": len(mine),
        "solved_per_second": solved / spread(mine)["median"],
    }
    if BASELINE in times:
        pairs = zip(mine, times[BASELINE], strict=False)  # a slow row has fewer rounds
        result["time_over_baseline"] = spread([a / b for a, b in pairs])
    return result
