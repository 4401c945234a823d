"""One problem: settings chosen for every library, and times in rounds paired with ours."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import checkout
from bench.contamination import contamination
from bench.loss_scale import loss_scale
from bench.measure import paired_rounds, spread
from bench.peers import Entry
from bench.peers.ours import BASELINE
from bench.problems import Problem
from bench.record import reason
from bench.settings import Chosen, Task, at_batch, choose, make_task

COUNTED = ("fpi_cuda Anderson", "fpi_cuda Picard", "torchdeq Anderson (best)")
"""Rows whose evaluations are kept sample by sample: the histogram's."""


@dataclasses.dataclass
class Comparison:
    """One problem at some batch sizes, for one library after the other.

    Attributes:
        entries: the rows in the order of the tables; times are set against the one named BASELINE.
        batches: settings are chosen at `main_batch`, and compiled solves timed there only unless
            `compile_everywhere`.
        num_candidates: settings tried for each "best" row; None tries all.
        diagnose: also measure contamination and the gradient's dependence on the loss scale, and
            compile a solve even where `compile_everywhere` does not hold.
        measured: what was kept so far, by label.
        result: the same as the report takes it.
    """

    problem: Problem
    entries: list[Entry]
    batches: tuple[int, ...]
    main_batch: int
    rounds: int
    num_candidates: int | None = None
    compile_everywhere: bool = True
    diagnose: bool = False
    measured: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    result: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.result |= {"name": self.problem.name, "failed": {}, "tables": []}

    @functools.cached_property
    def task(self) -> Task:
        """At the main batch."""
        start = self.entries[0].candidates[0]
        return make_task(self.problem.with_batch(self.main_batch), start)

    @functools.cached_property
    def ours(self) -> Chosen | None:
        """The settings of the row that times are set against; None where it is not asked for."""
        entry = next((entry for entry in self.entries if entry.label == BASELINE), None)
        try:
            return entry and choose(entry, self.task, self.num_candidates)
        except RuntimeError:  # told in its own row; the others are measured without a ratio
            return None

    def measure(self, entry: Entry) -> dict[str, Any]:
        """All that is told of one library, times by batch size; why, where none of it ran."""
        compiles = entry.candidates[0].compiles
        if compiles and not (self.compile_everywhere or self.diagnose):
            return {"failed": "compiled for the tanh cell only, in the short form"}
        ours = self.ours
        try:
            chosen = (
                ours
                if ours is not None and entry.label == BASELINE
                else choose(entry, self.task, self.num_candidates)
            )
        except RuntimeError as error:
            return {"failed": str(error)}
        main = self.main_batch
        found: dict[str, Any] = {"failures": chosen.failures, "rows": {}, "left_out": {}}
        found["rows"][str(main)] = compare(
            chosen, ours, self.task.problem, self.task.v, self.rounds, memory=True
        )
        for batch in self.batches:
            if batch == main or (compiles and not self.compile_everywhere):
                continue
            try:
                found["rows"][str(batch)] = self._at(batch, chosen)
            except Exception as error:
                found["left_out"][str(batch)] = reason(error)
        if entry.label in COUNTED:
            peer, tol = chosen.forward.peer, chosen.forward.tol.tol
            found["steps"] = peer.num_steps(self.task.problem, tol).tolist()
        if self.diagnose:
            found["contamination"] = contamination(chosen, self.problem)
            found["loss_scale"] = loss_scale(chosen, self.task)
        return found

    def _at(self, batch: int, chosen: Chosen) -> dict[str, Any]:
        """The row at another batch size."""
        sized = self.problem.with_batch(batch)
        v = self.task.v[torch.arange(batch, device=self.task.v.device) % self.main_batch]
        theirs = at_batch(chosen, sized, v)
        ours = theirs if chosen is self.ours else None
        if ours is None and self.ours is not None:
            with contextlib.suppress(Exception):  # told in its own row
                ours = at_batch(self.ours, sized, v)
        return compare(theirs, ours, sized, v, self.rounds, memory=False)

    def keep(self, label: str, found: dict[str, Any]) -> None:
        """Bring `result` up to date with what `measure` found."""
        self.measured[label] = found
        ran = {
            entry.label: self.measured[entry.label]
            for entry in self.entries
            if "rows" in self.measured.get(entry.label, ())
        }
        tables = []
        for batch in map(str, self.batches):
            rows = [f["rows"][batch] for f in ran.values() if batch in f["rows"]]
            left_out = {k: f["left_out"][batch] for k, f in ran.items() if batch in f["left_out"]}
            if rows:
                tables.append({"batch": int(batch), "rows": rows, "left_out": left_out})
        failed = {k: f["failed"] for k, f in self.measured.items() if "failed" in f}
        for label, f in ran.items():
            if f["failures"]:
                failed[f"{label}, some settings"] = "; ".join(f["failures"])
        self.result |= {
            "commit": checkout.commit(),
            "features": self.problem.x0.shape[1],
            "dtype": str(self.problem.x0.dtype).removeprefix("torch."),
            "rtol": self.problem.rtol,
            "condition": self.task.reference.condition,
            "gradient_rtol": self.task.gradient_rtol,
            "failed": failed,
            "tables": tables,
        }
        self.result["steps"] = {k: f["steps"] for k, f in ran.items() if "steps" in f}
        if self.diagnose:
            for name in ("contamination", "loss_scale"):
                self.result[name] = [f[name] for f in ran.values() if name in f]


def compare(
    item: Chosen, ours: Chosen | None, problem: Problem, v: Tensor, rounds: int, *, memory: bool
) -> dict[str, Any]:
    """Time what was chosen for this very problem and batch in turn with ours: one row.

    Args:
        v: (B, d) gradient of the loss in x.
        memory: measure peak memory too.
    """
    forward_calls: dict[str, Callable[[], object]] = {}
    both_calls: dict[str, Callable[[], object]] = {}
    for each in filter(None, (ours, item)):
        forward_calls[each.label] = functools.partial(
            each.forward.peer.solve, problem, each.forward.tol.tol
        )
        if item.both is not None and each.both is not None:
            both_calls[each.label] = functools.partial(
                each.both.peer.solve_and_grad,
                problem,
                each.both.tol.tol,
                each.both.adjoint.tol,
                v,
            )
    device = problem.z.device
    forward = paired_rounds(forward_calls, rounds, device)
    both = paired_rounds(both_calls, rounds, device)
    return _row(item, problem, forward, both, memory)


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
    seconds = spread(mine)["median"]
    result: dict[str, Any] = {"seconds": seconds, "solved_per_second": solved / seconds}
    if BASELINE in times:
        pairs = zip(mine, times[BASELINE], strict=False)  # a slow row has fewer rounds
        result["time_over_baseline"] = spread([a / b for a, b in pairs])
    return result
