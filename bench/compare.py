"""One problem: settings chosen for every library, and times in rounds paired with ours."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from bench import checkout
from bench.contamination import contamination
from bench.loss_scale import loss_scale
from bench.measure import fresh_rounds, spread
from bench.peers import Entry
from bench.peers.ours import BASELINE
from bench.problems import Problem, Variants
from bench.record import reason
from bench.settings import Chosen, Task, choose, names_of

COUNTED = ("fpi_cuda Anderson", "fpi_cuda Picard", "torchdeq Anderson (best)")
"""Rows whose evaluations are kept sample by sample: the histogram's."""


@dataclasses.dataclass
class Comparison:
    """One problem at some batch sizes, for one library after the other.

    Attributes:
        entries: the rows in the order of the tables; times are set against the one named BASELINE.
        batches: settings are chosen, and times taken, at each; memory at `main_batch`.
        most_settings: tried for each "best" row of which no search is kept; None tries all.
        diagnose: also measure contamination and the gradient's dependence on the loss scale.
        variants: inputs and weights that times are taken on, in turn.
        distinct: different samples in a batch.
        not_here: libraries that compile for longer than this form has time for.
        measured: what was kept so far, by label.
        result: the same as the report takes it.
    """

    problem: Problem
    entries: list[Entry]
    batches: tuple[int, ...]
    main_batch: int
    rounds: int
    most_settings: int | None = None
    diagnose: bool = False
    variants: int = 1
    distinct: int = 256
    not_here: tuple[str, ...] = ()
    measured: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    result: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        own = self.problem.g == "your module"
        self.result |= {"name": self.problem.name, "own": own, "failed": {}, "tables": []}
        self._ours: dict[int, Chosen | None] = {}

    @functools.cached_property
    def in_turn(self) -> Variants:
        """The problem as it is timed."""
        return Variants(self.problem, self.variants, self.distinct)

    def task(self, batch: int) -> Task:
        """At one batch size."""
        return Task(self.in_turn, batch, self.entries[0].candidates[0])

    def ours(self, batch: int) -> Chosen | None:
        """The settings of the row that times are set against; None where it is not asked for."""
        if batch not in self._ours:
            entry = next((entry for entry in self.entries if entry.label == BASELINE), None)
            try:
                self._ours[batch] = entry and choose(entry, self.task(batch))
            except RuntimeError:  # told in its own row; the others are measured without a ratio
                self._ours[batch] = None
        return self._ours[batch]

    def measure(self, entry: Entry) -> dict[str, Any]:
        """All that is told of one library, times by batch size; why, where none of it ran."""
        if entry.library in self.not_here:
            return {"failed": "its compiler takes too long for the short form"}
        main = self.main_batch
        found: dict[str, Any] = {"failures": [], "rows": {}, "left_out": {}}
        for batch in sorted(self.batches, key=lambda batch: batch != main):
            task = self.task(batch)
            try:
                ours = self.ours(batch)
                mine = ours if ours and entry.label == BASELINE else None
                chosen = mine or choose(entry, task, self.most_settings)
                row = compare(chosen, ours, task, self.rounds, memory=batch == main)
            except Exception as error:
                if batch == main:
                    return {"failed": str(error) or reason(error)}
                found["left_out"][str(batch)] = reason(error)
                continue
            found["rows"][str(batch)] = row
            if batch == main:
                found["failures"] = chosen.failures
                self.extras(chosen, task, found)
        return found

    def extras(self, chosen: Chosen, task: Task, found: dict[str, Any]) -> None:
        """What is measured at the main batch only."""
        if chosen.label in COUNTED:
            peer, tol = chosen.forward.peer, chosen.forward.tol.tol
            found["steps"] = peer.num_steps(task.problem, tol).tolist()
        if self.diagnose:
            found["contamination"] = contamination(chosen, task.problem)
            found["loss_scale"] = loss_scale(chosen, task)

    def search(self, entry: Entry, batch: int) -> list[str]:
        """The names of the fastest settings of all, forward and with the backward."""
        return names_of(choose(entry, self.task(batch), peers=entry.candidates))

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
            "features": self.problem.features,
            "dtype": str(self.problem.x0.dtype).removeprefix("torch."),
            "rtol": self.problem.rtol,
            "gradient_rtol": self.problem.gradient_rtol,
            "judged": self.in_turn.judged(),
            "failed": failed,
            "tables": tables,
        }
        self.result["steps"] = {k: f["steps"] for k, f in ran.items() if "steps" in f}
        if self.diagnose:
            for name in ("contamination", "loss_scale"):
                self.result[name] = [f[name] for f in ran.values() if name in f]


Timed = dict[str, Callable[[int], Callable[[], object]]]
"""By label: what makes the n-th call ready."""


def compare(
    item: Chosen, ours: Chosen | None, task: Task, rounds: int, *, memory: bool
) -> dict[str, Any]:
    """Time what was chosen for this very problem and batch in turn with ours: one row.

    Every call is on inputs in memory of their own and on weights that have just been written.

    Args:
        memory: measure peak memory too.
    """
    forward: Timed = {}
    both: Timed = {}
    for each in filter(None, (ours, item)):
        forward[each.label] = functools.partial(ready, each, task)
        if item.both is not None and each.both is not None:
            both[each.label] = functools.partial(ready_both, each, task)
    device = task.v.device
    row = _row(item, task, memory)
    solved = row["solved"] * task.batch
    row["forward"] = _timing(fresh_rounds(forward, rounds, device), item.label, solved)
    if item.both is not None:
        solved = min(row["solved"], row["gradient_solved"]) * task.batch
        row["both"] = _timing(fresh_rounds(both, rounds, device), item.label, solved)
    return row


def ready(chosen: Chosen, task: Task, n: int) -> Callable[[], object]:
    """A forward call on the n-th inputs and weights."""
    peer, tol = chosen.forward.peer, chosen.forward.tol.tol
    loaded = peer.load(task.use(n), task.v)
    return lambda: peer.run(loaded, tol)


def ready_both(chosen: Chosen, task: Task, n: int) -> Callable[[], object]:
    """The same with the backward."""
    both = chosen.both
    assert both is not None
    loaded = both.peer.load(task.use(n), task.v)
    return lambda: both.peer.run_both(loaded, both.tol.tol, both.adjoint.tol)


def _row(chosen: Chosen, task: Task, memory: bool) -> dict[str, Any]:
    peer, tol = chosen.forward.peer, chosen.forward.tol
    problem = task.problem
    steps = peer.num_steps(problem, tol.tol).double()
    row: dict[str, Any] = {
        "label": chosen.label,
        "library": peer.library,
        "way": peer.way(problem, tol.tol),
        "setting": peer.name,
        "tol": tol.tol,
        "solved": tol.solved,
        "worst_residual": tol.worst,
        "steps_mean": float(steps.mean()),
        "steps_max": float(steps.max()),
    }
    if memory:
        row["peak_bytes"] = peer.peak_bytes(problem, tol.tol)
    if peer.compiles:
        row["compile_seconds"] = chosen.forward.compiling + (
            chosen.both.compiling if chosen.both else 0.0
        )
    if chosen.both is not None:
        both = chosen.both
        row["both_setting"] = both.peer.name
        row["both_tol"] = both.tol.tol
        row["adjoint_tol"] = both.adjoint.tol
        row["gradient_solved"] = both.adjoint.solved
        row["gradient_worst_error"] = both.adjoint.worst
    return row


def _timing(times: dict[str, list[float]], label: str, solved: float) -> dict[str, Any]:
    mine = times[label]
    seconds = spread(mine)["median"]
    result: dict[str, Any] = {"seconds": seconds, "solved_per_second": solved / seconds}
    if BASELINE in times:
        pairs = zip(mine, times[BASELINE], strict=False)  # a slow row has fewer rounds
        result["time_over_baseline"] = spread([a / b for a, b in pairs])
    return result
