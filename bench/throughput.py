"""Measures convergence throughput against other libraries, on users' own maps and on cells.

    python -m bench.throughput [--short | --full | --search [--only A,B]] [--data DIR]
                               [--device cpu] [--threads N] [--seconds N] [--peers A,B]
                               [--skip A,B] [--wheels DIR] [--out DIR] [--resume]

Every library gets g as its own users write it, and is set to the loosest tolerances at which each
sample's residual, recomputed in float64 from what the library returns, and each sample's gradient
meet their targets; then all are timed in paired rounds, each call on inputs in memory of their own
and on weights just written. A row that misses a target on some samples is marked, and compared with
nothing. One whose solves take too long at a batch size is left out there by name.

A "(best)" row takes the settings that --search found and left in bench/best.json; --only names
problems to search anew. The short form, the default, measures a few batch sizes; --full measures
the whole grid, with more widths and activations, the libraries' default settings, and the cost of a
sample over the batch size. Results go to DIR/throughput.json, on a device to
DIR/throughput-<device>.json, library by library, with settings, and plots beside it; tables and a
summary of ten lines go to the terminal.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import cost, machine, options, own, report
from bench.compare import Comparison
from bench.data import load_bibtex, load_digits
from bench.json_files import finite, write_json
from bench.peers import MODULES, Entry, by_worth, load_entries
from bench.problems import Problem, tanh_cell
from bench.record import OUT_OF_TIME, Record
from bench.settings import BEST, best_settings, family
from bench.training import Recipe, Trained, bibtex_recipes, digits_recipes, train

TRAINED_RTOL = 1e-5
OWN_LIBRARIES = ("fpi_cuda", "torch loop", "torch.compile", "torchdeq", "jaxopt", "optimistix")
"""Whose rows a user's own map has: of each other library one, the best of all its solvers."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much to measure.

    Attributes:
        own: users' maps. own_batches, tanh_batches, trained_batches: batch sizes.
        main_batch: where memory is measured.
        most_numbers: in the state of all samples of a user's map; a batch is cut to that.
        defaults: also measure libraries as they come, on cells.
        variants: inputs and weights that calls take in turn.
        most_settings: tried for a "best" row of which no search is kept; None tries all.
        compile_all: time what compiles on every problem: JAX not on users' maps and the tanh cell
            alone, torch.compile not on the first of these alone.
        scaled: batch sizes at which the cost of a sample is measured.
    """

    own: tuple[own.Own, ...] = own.MAPS + own.WIDER
    own_batches: tuple[int, ...] = (1, 16, 256, 4096)
    most_numbers: int = 2**24
    defaults: bool = True
    tanh_batches: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    trained_batches: tuple[int, ...] = (1, 16, 256, 1024)
    tanh_features: int = 128
    main_batch: int = 256
    digits_epochs: int = 40
    bibtex_epochs: int = 6
    rounds: int = 11
    variants: int = 4
    most_settings: int | None = None
    compile_all: bool = True
    scaled: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)


FULL = Size()
SHORT = Size(
    own=own.MAPS,
    own_batches=(1, 256),
    most_numbers=2**17,
    defaults=False,
    tanh_batches=(16, 256),
    trained_batches=(256,),
    digits_epochs=20,
    bibtex_epochs=2,
    rounds=5,
    variants=2,
    most_settings=2,
    compile_all=False,
    scaled=(),
)


DEVICE_SHORT = dataclasses.replace(
    SHORT, own=own.MAPS[:1], own_batches=(256,), tanh_batches=(256, 4096), digits_epochs=4,
    bibtex_epochs=1, most_settings=1,
)  # fmt: skip
"""For a few minutes of a device: a larger batch in the place of a small one, less training."""

SEARCH = dataclasses.replace(FULL, own=own.MAPS, digits_epochs=20, variants=2)
SEARCHED = (1, 256)
"""Batch sizes at which the fastest settings are searched."""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    given = parse(arguments)
    record = options.record_of(given)
    if given.search:
        only = tuple(filter(None, given.only.split(",")))
        search(
            record,
            SEARCH,
            data=given.data,
            device=given.device,
            modules=given.peers,
            only=only,
            resume=given.resume,
        )
        print("written:", BEST)
        return
    command = " ".join(machine.command_line())
    parts = Parts(given.path.with_name(f"{given.path.stem}-parts.json"), command, given.resume)
    short = SHORT if given.device.type == "cpu" else DEVICE_SHORT
    run(
        record,
        FULL if given.full else short,
        data=given.data,
        device=given.device,
        modules=given.peers,
        parts=parts,
    )
    results = finite(record.finish())
    from bench.plots import plot

    pictures = plot(results, record.path)
    print(report.text(results))
    print("written:", record.path, "with all settings,", *pictures)
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
    parser.add_argument("--full", action="store_true", help="the whole grid; without, --short")
    parser.add_argument("--search", action="store_true", help="find each library's best settings")
    parser.add_argument("--only", default="", help="what --search searches, by commas")
    parser.add_argument("--data", type=Path, help="folder that holds bibtex/; adds Bibtex layers")
    parser.add_argument("--resume", action="store_true", help="keep what is there already")
    given = options.parse(parser, arguments, MODULES)
    if given.short + given.full + given.search > 1:
        parser.error("--short, --full and --search exclude one another")
    return given


class Bench:
    """What a run measures: problems made of a size, and the rows that each of them has."""

    def __init__(self, record: Record, size: Size, entries: list[Entry]) -> None:
        self.record = record
        self.size = size
        self.entries = [e for e in entries if size.defaults or not e.label.endswith("(default)")]
        self.own_entries = own_entries(entries)
        record.results.update(kind="throughput", training=[], problems=[])

    def hold(self, problem: Problem, batches: tuple[int, ...], **given: Any) -> Comparison:
        """A comparison whose result is part of the record's from now on."""
        size = self.size
        given = {"entries": self.entries} | given
        main = size.main_batch if size.main_batch in batches else batches[-1]
        held = Comparison(
            problem=problem,
            batches=batches,
            main_batch=main,
            rounds=size.rounds,
            most_settings=size.most_settings,
            variants=size.variants,
            **given,
        )
        self.record.results["problems"].append(held.result)
        return held

    def own(self, device: torch.device) -> list[Comparison]:
        """Users' maps."""
        return [
            self.hold(
                each.problem(self.size.variants).to(device),
                self.batches(each),
                entries=self.own_entries,
                distinct=each.distinct,
                not_here=() if n == 0 else self.unless_all("torch.compile"),
            )
            for n, each in enumerate(self.size.own)
        ]

    def batches(self, each: own.Own) -> tuple[int, ...]:
        """Its batch sizes."""
        most = max(1, self.size.most_numbers // math.prod(each.shape))
        return tuple(dict.fromkeys(min(batch, most) for batch in self.size.own_batches))

    def tanh(self, device: torch.device) -> Comparison:
        """The cell that all diagnoses are made on."""
        samples = self.size.main_batch * self.size.variants
        problem = tanh_cell(samples, self.size.tanh_features).to(device)
        not_here = self.unless_all("torch.compile")
        return self.hold(problem, self.size.tanh_batches, diagnose=True, not_here=not_here)

    def unless_all(self, *libraries: str) -> tuple[str, ...]:
        """These, in a form that leaves them out."""
        return () if self.size.compile_all else libraries

    def trained(self, layer: Trained, recipes: list[Recipe], device: torch.device) -> Comparison:
        """A layer that was trained, on inputs that it was not trained on."""
        told = {"name": layer.name, "metric": layer.metric, "score": layer.score}
        self.record.results["training"].append(told | {"history": layer.history})
        split = next(recipe.split for recipe in recipes if recipe.name == layer.name)
        problem = layer.problem(split.x_test.to(device), TRAINED_RTOL)
        not_here = self.unless_all("torch.compile", "jaxopt", "optimistix")
        return self.hold(problem, self.size.trained_batches, not_here=not_here)

    def train(self, data: Path | None, device: torch.device) -> list[Comparison]:
        """Fit all layers."""
        begun = time.perf_counter()
        held: list[Comparison] = []
        recipes: list[Recipe] = []
        self.record.row("data", lambda: read(data, self.size), recipes.extend)
        for recipe in recipes:
            fit = functools.partial(train, recipe, device)
            keep = lambda layer: held.append(self.trained(layer, recipes, device))  # noqa: E731
            self.record.row(f"{recipe.name}: training", fit, keep)
        self.record.results["training_seconds"] = time.perf_counter() - begun
        return held


def own_entries(entries: list[Entry]) -> list[Entry]:
    """The rows of a user's own map: ours, loops, and of each other library its best solver."""
    found: list[Entry] = []
    for library in OWN_LIBRARIES:
        rows = [e for e in entries if e.library == library and "Broyden" not in e.label]
        best = [peer for row in rows if row.label.endswith("(best)") for peer in row.candidates]
        if best and library != "torch.compile":
            rows = [Entry(f"{library} (best)", tuple(best))]
        found += rows
    return found


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
    bench = Bench(record, size, entries)

    def measure(these: list[Entry], comparisons: list[Comparison]) -> None:
        jobs = [(entry, comparison) for entry in by_worth(these) for comparison in comparisons]
        for entry, comparison in tqdm(jobs, unit="row"):
            name = f"{comparison.problem.name}: {entry.label}"
            row = functools.partial(comparison.measure, entry)
            keep = functools.partial(comparison.keep, entry.label)
            once = functools.partial(parts.once, name, row)
            record.row(name, once, keep, compiles=entry.candidates[0].compiles)
            results["total_seconds"] = time.perf_counter() - started

    ours = [entry for entry in entries if entry.library == "fpi_cuda"]
    others = [entry for entry in bench.entries if entry not in ours]
    if device.type == "cpu":
        keep = functools.partial(results.__setitem__, "overhead")
        record.row("overhead", functools.partial(cost.overhead, size.rounds), keep)
    measure(bench.own_entries, bench.own(device))
    tanh = bench.tanh(device)
    measure(ours, [tanh])
    trained = bench.train(data, device)
    measure(ours, trained)
    measure(others, [tanh, *trained])
    if device.type == "cpu" and size.scaled:
        keep = functools.partial(results.__setitem__, "scaling")
        record.row("scaling", functools.partial(cost.scaling, size.scaled, size.rounds), keep)
    results["total_seconds"] = time.perf_counter() - started


def search(
    record: Record,
    size: Size,
    *,
    data: Path | None = None,
    device: torch.device | None = None,
    modules: tuple[str, ...] = MODULES,
    path: Path = BEST,
    only: tuple[str, ...] = (),
    resume: bool = False,
) -> None:
    """Try every setting of every "(best)" row, and keep the names of the fastest in `path`.

    What `path` holds of other problems, rows and kinds of devices stays.

    Args:
        only: families of problems, as `path` names them; all by default.
        resume: leave out what `path` holds.
    """
    device = device or torch.device("cpu")
    entries, missing = load_entries(modules)
    record.skipped.update(missing)
    bench = Bench(record, size, entries)
    best = json.loads(path.read_text()) if path.exists() else {}
    kind = best.setdefault(device.type, {})
    comparisons = [*bench.own(device), bench.tanh(device), *bench.train(data, device)]
    jobs = [
        (comparison, entry, batch)
        for comparison in comparisons
        for entry in comparison.entries
        if len(entry.candidates) > 1 and entry.pick == "fastest"
        if not only or family(comparison.problem) in only
        for batch in SEARCHED
        if not (
            resume and str(batch) in kind.get(family(comparison.problem), {}).get(entry.label, {})
        )
    ]
    for comparison, entry, batch in tqdm(jobs, unit="search"):
        rows = kind.setdefault(family(comparison.problem), {}).setdefault(entry.label, {})
        keep = functools.partial(rows.__setitem__, str(batch))
        name = f"{comparison.problem.name}: {entry.label}: B={batch}"
        record.row(name, functools.partial(comparison.search, entry, batch), keep)
        path.write_text(json.dumps(best, indent=1, sort_keys=True) + "\n")
    best_settings.cache_clear()


def read(data: Path | None, size: Size) -> list[Recipe]:
    """The layers to train."""
    recipes = digits_recipes(load_digits(), size.digits_epochs)
    if data is not None:
        recipes += bibtex_recipes(load_bibtex(data), size.bibtex_epochs)
    return recipes


if __name__ == "__main__":
    main()
