"""Trains small fixed-point layers on real data and measures convergence throughput against peers.

    python -m bench.throughput [--short] [--data DIR] [--device cpu] [--threads N] [--out DIR]
                               [--resume]

Every library is set to the loosest tolerance at which each sample's residual, recomputed in
float64 from what the library returns, meets the target; then all are timed in paired rounds. A
row whose solves take too long at a batch size is left out there by name, with the time of one.
Results go to DIR/throughput.json with plots beside it, and a table to the terminal.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import machine, report
from bench.compare import compare
from bench.contamination import contamination
from bench.data import load_bibtex, load_digits
from bench.loss_scale import loss_scale
from bench.measure import use_threads
from bench.peers import MODULES, Entry, load_entries
from bench.problems import Problem, tanh_cell
from bench.settings import Chosen, Task, at_batch, choose, make_task, reason
from bench.traces import residual_traces
from bench.training import bibtex_recipes, digits_recipes, train

TRACED = ("fpi_cuda Anderson", "fpi_cuda Picard", "torchdeq Anderson (best)")
TRACED_SAMPLES = 16
TRAINED_RTOL = 1e-5


@dataclasses.dataclass(frozen=True)
class Size:
    """How much to measure.

    Attributes:
        tanh_batches, trained_batches: batch sizes; the settings are chosen at `main_batch`.
        num_candidates: settings tried for each "best" row; None tries all.
        compile_everywhere: time torch.compile on every problem and batch, not on one.
    """

    tanh_batches: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    trained_batches: tuple[int, ...] = (1, 16, 256, 1024)
    tanh_features: int = 128
    main_batch: int = 256
    digits_epochs: int = 40
    bibtex_epochs: int = 6
    rounds: int = 11
    num_candidates: int | None = None
    compile_everywhere: bool = True


FULL = Size()
SHORT = Size(
    tanh_batches=(16, 256),
    trained_batches=(16, 256),
    digits_epochs=20,
    bibtex_epochs=2,
    rounds=7,
    num_candidates=2,
    compile_everywhere=False,
)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = parse(arguments)
    use_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(machine.command_line())
    parts = Parts(options.out / "throughput-parts.json", command, options.resume)
    results = run(
        SHORT if options.short else FULL,
        data=options.data,
        device=torch.device(options.device),
        modules=tuple(options.peers.split(",")),
        parts=parts,
    )
    results["machine"] = machine.describe(
        torch.device(options.device), options.threads, machine.command_line()
    )
    results = report.finite(results)
    path = options.out / "throughput.json"
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    pictures = report.plot(results, options.out)
    print(report.text(results))
    print("written:", path, *pictures)
    parts.clear()


class Parts:
    """The results of the problems measured so far, in a file: a run that breaks off can resume.

    Args:
        path: None keeps nothing.
        command: what they belong to; others' parts are not taken up.
        resume: take up what is there; False starts afresh.
    """

    def __init__(self, path: Path | None, command: str = "", resume: bool = False) -> None:
        self.path = path
        self.command = command.replace(" --resume", "")
        self.measured: dict[str, Any] = {}
        if path is not None and resume and path.exists():
            saved = json.loads(path.read_text())
            if saved["command"] == self.command:
                self.measured = saved["measured"]

    def once(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """measure(), or what it returned before the run was broken off."""
        if name not in self.measured:
            self.measured[name] = report.finite(measure())
            if self.path is not None:
                saved = {"command": self.command, "measured": self.measured}
                self.path.write_text(json.dumps(saved, allow_nan=False))
        return dict(self.measured[name])

    def clear(self) -> None:
        """Delete the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="bench.throughput", description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="a few minutes on two cores")
    parser.add_argument("--data", type=Path, help="folder that holds bibtex/; adds Bibtex layers")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="threads and cores of every library")
    parser.add_argument("--resume", action="store_true", help="keep the problems already measured")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="results folder")
    parser.add_argument(
        "--peers", default=",".join(MODULES), help="libraries to compare, separated by commas"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.peers.split(",") if name not in MODULES]
    if unknown:
        parser.error(f"--peers: unknown {unknown[0]!r}; there are {', '.join(MODULES)}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    return options


def run(
    size: Size,
    *,
    data: Path | None = None,
    device: torch.device | None = None,
    modules: tuple[str, ...] = MODULES,
    parts: Parts | None = None,
) -> dict[str, Any]:
    """Train, measure, and return everything that the report shows.

    Args:
        parts: keeps every problem's result as it comes.
    """
    parts = parts or Parts(None)
    device = device or torch.device("cpu")
    started = time.perf_counter()
    torch.manual_seed(0)
    recipes = digits_recipes(load_digits(), size.digits_epochs)
    if data is not None:
        recipes += bibtex_recipes(load_bibtex(data), size.bibtex_epochs)
    trained = [train(recipe, device) for recipe in recipes]
    training_seconds = time.perf_counter() - started

    entries, skipped = load_entries(modules)
    tanh = tanh_cell(size.main_batch, size.tanh_features).to(device)
    problems = [(tanh, size.tanh_batches)]
    for recipe, layer in zip(recipes, trained, strict=True):
        problem = layer.problem(recipe.split.x_test.to(device), TRAINED_RTOL)
        problems.append((problem, size.trained_batches))
    measured = [
        parts.once(
            problem.name,
            functools.partial(measure, problem, batches, entries, size, diagnose=problem is tanh),
        )
        for problem, batches in problems
    ]
    return {
        "kind": "throughput",
        "skipped": skipped,
        "training": [
            {"name": t.name, "metric": t.metric, "score": t.score, "history": t.history}
            for t in trained
        ],
        "training_seconds": training_seconds,
        "total_seconds": training_seconds + sum(result["seconds"] for result in measured),
        "problems": measured,
    }


def measure(
    problem: Problem,
    batches: tuple[int, ...],
    entries: list[Entry],
    size: Size,
    *,
    diagnose: bool,
) -> dict[str, Any]:
    """All libraries on one problem: settings chosen at the main batch, then every batch timed.

    Args:
        diagnose: also measure contamination and the gradient's dependence on the loss scale, and
            compile the loop even where `size` compiles it in one place only.
    """
    started = time.perf_counter()
    task = make_task(problem.with_batch(size.main_batch), entries[0].candidates[0])
    chosen: list[Chosen] = []
    failed: dict[str, str] = {}
    for entry in tqdm(entries, desc=f"{problem.name}: choose settings", unit="row"):
        compiles = entry.candidates[0].compiles
        if compiles and not (size.compile_everywhere or diagnose):
            failed[entry.label] = "compiled for the tanh cell only, in the short form"
            continue
        try:
            chosen.append(choose(entry, task, size.num_candidates))
        except RuntimeError as error:
            failed[entry.label] = str(error)
            continue
        if chosen[-1].failures:
            failed[f"{entry.label}, some settings"] = "; ".join(chosen[-1].failures)
    tables = [
        _table(problem, batch, chosen, task, size)
        for batch in tqdm(batches, desc=f"{problem.name}: time batches", unit="batch")
    ]
    result = {
        "name": problem.name,
        "commit": machine.commit(),
        "features": problem.x0.shape[1],
        "dtype": str(problem.x0.dtype).removeprefix("torch."),
        "rtol": problem.rtol,
        "condition": task.reference.condition,
        "gradient_rtol": task.gradient_rtol,
        "failed": failed,
        "tables": tables,
        "steps": _steps(chosen, task.problem),
        "traces": _traces(chosen, task.problem),
    }
    if diagnose:
        bar = tqdm(chosen, desc=f"{problem.name}: contamination, loss scale", unit="row")
        checked = [(contamination(item, problem), loss_scale(item, task)) for item in bar]
        result["contamination"] = [moved for moved, _ in checked]
        result["loss_scale"] = [scaled for _, scaled in checked]
    return result | {"seconds": time.perf_counter() - started}


def _table(
    problem: Problem, batch: int, chosen: list[Chosen], task: Task, size: Size
) -> dict[str, Any]:
    if batch == size.main_batch:
        rows = compare(chosen, task.problem, task.v, size.rounds, memory=True)
        return {"batch": batch, "rows": rows, "left_out": {}}
    sized = problem.with_batch(batch)
    kept: list[Chosen] = []
    left_out: dict[str, str] = {}
    v = task.v[torch.arange(batch, device=task.v.device) % len(task.v)]
    bar = tqdm(chosen, desc=f"{problem.name} B={batch}: tolerances", unit="row", leave=False)
    for item in bar:
        if not size.compile_everywhere and item.forward.peer.compiles:
            continue
        try:
            kept.append(at_batch(item, sized, v))
        except Exception as error:
            left_out[item.label] = reason(error)
    rows = compare(kept, sized, v, size.rounds, memory=False)
    return {"batch": batch, "rows": rows, "left_out": left_out}


def _steps(chosen: list[Chosen], problem: Problem) -> dict[str, list[int]]:
    return {
        item.label: item.forward.peer.num_steps(problem, item.forward.tol.tol).tolist()
        for item in chosen
        if item.label in TRACED
    }


def _traces(chosen: list[Chosen], problem: Problem) -> dict[str, list[list[float]]]:
    few = problem.with_batch(min(TRACED_SAMPLES, problem.batch))
    return {
        item.label: residual_traces(item.forward.peer, few, item.forward.tol.tol)
        for item in chosen
        if item.label in TRACED
    }


if __name__ == "__main__":
    main()
