"""What the fused loop gains over the host loop and over peers, and what early exit saves.

    python -m bench.fused [--device cpu|cuda] [--short | --quarter] [--seconds N] [--threads N]
                          [--peers A,B] [--skip A,B] [--wheels DIR] [--out DIR]

Times on the CPU are CPU seconds of this process, so that a shared machine counts as little as it
can; they say nothing of parallel speed. On a device they are those from one idle device to the
next, beside those of its work alone and of one round of the loop. Results go to DIR/fused.json, on
a device to DIR/fused-<device>.json, row by row, and a table to the terminal.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch

from bench import options
from bench.fma_peak import fma_gflops
from bench.fused_report import readme, text
from bench.fused_rows import (
    CLOCKS,
    DEVICE_SHORT,
    FULL,
    QUARTER,
    SHORT,
    Contest,
    Routed,
    Size,
    early_exit,
    floor,
    mm_gflops,
    ours,
    per_round,
    precisions,
    problems,
    two_threads,
)
from bench.json_files import finite
from bench.peers import Entry, by_worth, load_entries
from bench.record import Record

PEERS = ("loop", "graphed", "compiled", "torchdeq", "jaxopt")
ROWS = (
    "torch loop, per-sample stop",
    "torch loop in a CUDA graph",
    "torch.compile'd loop (best)",
    "torchdeq Anderson (best)",
    "torchdeq Picard (best)",
    "jaxopt Anderson (best)",
    "jaxopt Picard (best)",
)
"""The peers' rows that are measured, the first setting of each."""


FIRST = ("fused", "host", "torch loop, per-sample stop")
"""How the labels of the rows end that are measured before all others."""
LAST = ("triton", "jaxopt", "torch.compile")
"""What the labels of the rows hold whose kernels are compiled as they run."""


def run(record: Record, size: Size, device: torch.device, modules: tuple[str, ...] = PEERS) -> None:
    """Measure everything, into `record`."""
    entries, missing = load_entries(modules)
    record.skipped.update(missing)
    peers = [entry for entry in entries if entry.label in ROWS]
    results = record.results
    results["clock"] = CLOCKS[device.type]
    record.row("torch.mm", lambda: mm_gflops(device), kept(results, "mm_gflops"))
    if device.type == "cpu":
        record.row("FMA", fma_gflops, kept(results, "fma_gflops"))
    contests = [Contest(task, size.rounds) for task in problems(size, device)]
    tables = [{"name": c.task.name, "rtol": c.task.rtol, "rows": {}} for c in contests]
    results["problems"] = tables
    rows = by_worth([*ours(device), *peers])
    for wave in range(3):
        for entry in (entry for entry in rows if wave_of(entry) == wave):
            few = entry in peers or wave == 2
            held = contests[: size.peers] if few else contests
            for contest, table in zip(held, tables, strict=False):
                measure(record, entry, contest, table["rows"])
        if wave == 0:
            exits = functools.partial(early_exit, size, device, size.rounds)
            record.row("early exit", exits, kept(results, "early_exit"))
    if device.type == "cpu":
        threads = functools.partial(two_threads, contests[0].task, size.rounds)
        record.row("two threads", threads, kept(results, "two_threads"))
        return
    found = results["precisions"] = {}
    for contest in contests[: size.peers]:
        compared = functools.partial(precisions, contest.task, size.rounds)
        name = contest.task.name
        record.row(f"{name}: precisions", compared, kept(found, name))


def wave_of(entry: Entry) -> int:
    """All problems go through one wave of rows before the next."""
    if entry.label.endswith(FIRST):
        return 0
    return 2 if any(word in entry.label for word in LAST) else 1


def kept(into: dict[str, Any], name: str) -> Callable[[Any], None]:
    """A call that stores a result by name."""
    return functools.partial(into.__setitem__, name)


def measure(
    record: Record, entry: Entry, contest: Contest, rows: dict[str, dict[str, Any]]
) -> None:
    """One row; of ours on a device, also how long it works and how long a round of it takes."""
    peer, label, task = entry.candidates[0], entry.label, contest.task
    title = f"{task.name}: {label}"
    roof = record.results.get("fma_gflops")

    def row() -> dict[str, Any]:
        found = contest.row(peer)
        return found | floor(task, found, roof)

    record.row(title, row, kept(rows, label), compiles=wave_of(entry) == 2)
    if label in rows and task.x0.device.type == "cuda":
        if isinstance(peer, Routed):
            slope = functools.partial(per_round, task, peer, contest.rounds)
            record.row(f"{title}, a round", slope, kept(rows[label], "round"))
        busy = functools.partial(contest.busy, rows[label], peer)
        record.row(f"{title}, busy", busy, kept(rows[label], "busy"))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.fused", description=__doc__.splitlines()[0])
    parser.add_argument("--quarter", action="store_true", help="a quarter of the large batches")
    given = options.parse(parser, arguments, PEERS, out="bench/results")
    record = options.record_of(given)
    short = SHORT if given.device.type == "cpu" else DEVICE_SHORT
    size = short if given.short else QUARTER if given.quarter else FULL
    run(record, size, given.device, given.peers)
    record.results["readme"] = readme(finite(record.results))
    print("\n".join(text(record.finish())))
    print("written:", record.path)


if __name__ == "__main__":
    main()
