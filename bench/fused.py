"""What the fused loop gains over the host loop and over peers, and what early exit saves.

    python -m bench.fused [--device cpu|cuda] [--short | --quarter] [--threads N] [--out DIR]

Times on the CPU are CPU seconds of this process, so that a shared machine counts as little as it
can; they say nothing of parallel speed. On a device they are those of its work and of the host's.
Results go to DIR/fused.json and a table to the terminal.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench import machine, report
from bench.fma_peak import fma_gflops
from bench.fused_report import readme, text
from bench.fused_rows import (
    CLOCKS,
    FULL,
    QUARTER,
    SHORT,
    Size,
    early_exit,
    floor,
    measure,
    mm_gflops,
    ours,
    precisions,
    problems,
    two_threads,
)
from bench.measure import use_threads
from bench.peers import load_entries

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


def run(size: Size, device: torch.device, modules: tuple[str, ...] = PEERS) -> dict[str, Any]:
    """Everything, as it goes into the JSON file."""
    entries, skipped = load_entries(modules)
    roof = fma_gflops() if device.type == "cpu" else None
    tables = []
    tasks = problems(size, device)
    for number, task in enumerate(tasks):
        peers = [entry for entry in entries if entry.label in ROWS and number < size.peers]
        table = measure(task, [*ours(device), *peers], size.rounds)
        for row in table["rows"].values():
            row.update(floor(task, row, roof))
        tables.append(table)
        print("\n".join(text(table)), flush=True)
    results = {
        "clock": CLOCKS[device.type],
        "mm_gflops": mm_gflops(device),
        "fma_gflops": roof,
        "skipped": skipped,
        "problems": tables,
        "early_exit": early_exit(size, device, size.rounds),
    }
    if device.type == "cpu":
        results["two_threads"] = two_threads(tasks[0], size.rounds)
    else:
        results["precisions"] = {
            task.name: precisions(task, size.rounds) for task in tasks[: size.peers]
        }
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--short", action="store_true", help="smaller batches, fewer rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--quarter", action="store_true", help="a quarter of the large batches")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    use_threads(given.threads)
    device = torch.device(given.device)
    size = SHORT if given.short else QUARTER if given.quarter else FULL
    results = run(size, device)
    results["machine"] = machine.describe(device, given.threads, machine.command_line())
    if device.type == "cpu":
        results["readme"] = readme(report.finite(results))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "fused.json"
    path.write_text(json.dumps(report.finite(results), indent=1) + "\n")
    for solver in ("Picard", "Anderson"):
        row = results["early_exit"][solver]
        print(
            f"10% hard samples, {solver}: {row['fused']['of_ideal']:.2f} of the ideal fused, "
            f"{row['host']['of_ideal']:.2f} by the host loop"
        )
    print(f"torch.mm: {results['mm_gflops']:.0f} GFLOP/s; written to {path}")


if __name__ == "__main__":
    main()
