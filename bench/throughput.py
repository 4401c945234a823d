"""Trains small fixed-point layers on real data and measures convergence throughput against peers.

    python -m bench.throughput [--short] [--data DIR] [--device cpu] [--threads N] [--out DIR]
                               [--seconds N] [--peers A,B] [--skip A,B] [--wheels DIR] [--resume]

Every library is set to the loosest tolerance at which each sample's residual, recomputed in
float64 from what the library returns, meets the target; then all are timed in paired rounds. A
row whose solves take too long at a batch size is left out there by name, with the time of one.
Results go to DIR/throughput.json, on a device to DIR/throughput-<device>.json, library by library,
with plots beside it, and a table to the terminal.
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

from bench import machine, options, report
from bench.compare import Comparison
from bench.data import load_bibtex, load_digits
from bench.json_files import finite, write_json
from bench.peers import MODULES, Entry, by_worth, load_entries
from bench.problems import Problem, tanh_cell
from bench.record import OUT_OF_TIME, Record
from bench.training import Recipe, Trained, bibtex_recipes, digits_recipes, train

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


DEVICE_SHORT = dataclasses.replace(
    SHORT, tanh_batches=(256, 4096), trained_batches=(256,), digits_epochs=4, bibtex_epochs=1,
    num_candidates=1,
)  # fmt: skip
"""For a few minutes of a device: a larger batch in the place of a small one, less training."""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    given = parse(arguments)
    record = options.record_of(given)
    command = " ".join(machine.command_line())
    parts = Parts(given.path.with_name(f"{given.path.stem}-parts.json"), command, given.resume)
    short = SHORT if given.device.type == "cpu" else DEVICE_SHORT
    run(
        record,
        short if given.short else FULL,
        data=given.data,
        device=given.device,
        modules=given.peers,
        parts=parts,
    )
    results = finite(record.finish())
    from bench.plots import plot

    print(report.text(results))
    print("written:", record.path, *plot(results, record.path))
    if OUT_OF_TIME not in record.skipped.values():
        parts.clear()


class Parts:
    """What was measured so far, in a file: a run that breaks off can resume.

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
            self.measured[name] = finite(measure())
            if self.path is not None:
                write_json(self.path, {"command": self.command, "measured": self.measured})
        return dict(self.measured[name])

    def clear(self) -> None:
        """Delete the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="bench.throughput", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder that holds bibtex/; adds Bibtex layers")
    parser.add_argument("--resume", action="store_true", help="keep the rows already measured")
    return options.parse(parser, arguments, MODULES)


def run(
    record: Record,
    size: Size,
    *,
    data: Path | None = None,
    device: torch.device | None = None,
    modules: tuple[str, ...] = MODULES,
    parts: Parts | None = None,
) -> None:
    """Train and measure everything that the report shows, into `record`.

    Args:
        parts: keeps every row as it comes.
    """
    parts = parts or Parts(None)
    device = device or torch.device("cpu")
    started = time.perf_counter()
    torch.manual_seed(0)
    entries, missing = load_entries(modules)
    record.skipped.update(missing)
    results = record.results
    results.update(kind="throughput", training=[], problems=[])
    held: list[Comparison] = []

    def measure(these: list[Entry], comparisons: list[Comparison]) -> None:
        jobs = [(entry, comparison) for entry in by_worth(these) for comparison in comparisons]
        for entry, comparison in tqdm(jobs, unit="row"):
            name = f"{comparison.problem.name}: {entry.label}"
            row = functools.partial(comparison.measure, entry)
            keep = functools.partial(comparison.keep, entry.label)
            once = functools.partial(parts.once, name, row)
            record.row(name, once, keep, compiles=entry.candidates[0].compiles)
            results["total_seconds"] = time.perf_counter() - started

    def hold(problem: Problem, batches: tuple[int, ...], diagnose: bool = False) -> None:
        held.append(
            Comparison(
                problem,
                entries,
                batches,
                size.main_batch,
                size.rounds,
                size.num_candidates,
                size.compile_everywhere,
                diagnose,
            )
        )
        results["problems"].append(held[-1].result)

    def hold_trained(layer: Trained) -> None:
        told = {"name": layer.name, "metric": layer.metric, "score": layer.score}
        results["training"].append(told | {"history": layer.history})
        split = next(recipe.split for recipe in recipes if recipe.name == layer.name)
        hold(layer.problem(split.x_test.to(device), TRAINED_RTOL), size.trained_batches)

    ours = [entry for entry in entries if entry.library == "fpi_cuda"]
    hold(tanh_cell(size.main_batch, size.tanh_features).to(device), size.tanh_batches, True)
    measure(ours, held)
    begun = time.perf_counter()
    recipes: list[Recipe] = []
    record.row("data", lambda: read(data, size), recipes.extend)
    for recipe in recipes:
        fit = functools.partial(train, recipe, device)
        record.row(f"{recipe.name}: training", fit, hold_trained)
    results["training_seconds"] = time.perf_counter() - begun
    measure(ours, held[1:])
    measure([entry for entry in entries if entry not in ours], held)


def read(data: Path | None, size: Size) -> list[Recipe]:
    """The layers to train."""
    recipes = digits_recipes(load_digits(), size.digits_epochs)
    if data is not None:
        recipes += bibtex_recipes(load_bibtex(data), size.bibtex_epochs)
    return recipes


if __name__ == "__main__":
    main()
