"""What a row-wise g pays for nobody having promised that it is: python -m bench.row_watch

Solves of a tanh cell on the host route, with the rows watched (rowwise=None, the verdict on the map
cached) and with nothing watched, one after the other in alternating order. The ratio is the median
over such pairs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fpi_cuda as fpi
from bench import machine
from bench.json_files import write_json
from bench.report import piped

BATCHES = (16, 256, 4096)
FEATURES = (64, 1024)
SOLVERS = (fpi.Picard(), fpi.Anderson(m=5))
functional = import_module("fpi_cuda.fixed_point")  # the package gives its function
WATCHED = functional.coupling_of
FEWEST_PAIRS, MOST_PAIRS = 9, 400


def unwatched(*_: Any) -> None:
    """In the place of functional.coupling_of: no row can depend on another."""


def row(batch: int, features: int, solver: Any, *, grad: bool, seconds: float) -> dict[str, Any]:
    """One line of the table."""
    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(features, features))[0] * 0.9
    z = torch.randn(batch, features, requires_grad=grad)
    x0 = torch.zeros(batch, features)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ weight + z)

    def solve(watched: bool) -> tuple[float, fpi.Solution]:
        functional.coupling_of = WATCHED if watched else unwatched  # type: ignore[assignment]
        began = time.perf_counter()
        with torch.set_grad_enabled(grad):
            solution = fpi.fixed_point(g, x0, z, solver=solver, rtol=1e-4, route="host")
            if grad:
                solution.value.sum().backward()
        took = time.perf_counter() - began
        functional.coupling_of = WATCHED
        return took, solution

    for watched in (True, False, True, False):
        solve(watched)
    ratios, times = [], []
    ends = time.perf_counter() + seconds
    while len(ratios) < MOST_PAIRS and (len(ratios) < FEWEST_PAIRS or time.perf_counter() < ends):
        order = (True, False) if len(ratios) % 2 else (False, True)
        took = {watched: solve(watched)[0] for watched in order}
        ratios.append(took[True] / took[False])
        times.append(took[False])
    return {
        "batch": batch,
        "features": features,
        "solver": type(solver).__name__,
        "grad": grad,
        "steps": int(solve(True)[1].num_steps.max()),
        "microseconds": round(1e6 * statistics.median(times), 1),
        "ratio": round(statistics.median(ratios), 4),
        "pairs": len(ratios),
    }


def section(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The section of bench/results/README.md: what watching costs, a line for each solve."""
    table = [("B", "d", "solver", "steps", "us", "watched / not")]
    table += [
        (
            *(str(one[key]) for key in ("batch", "features", "solver", "steps", "microseconds")),
            f"{one['ratio']:.3f}",
        )
        for one in rows
    ]
    return (
        "### What it costs to watch the rows\n\n"
        f"{__doc__.split(chr(10), 2)[2].strip()}\n\n"
        f"{piped(table)}\n\n{about['cpu']}, one thread, torch {about['versions']['torch']}, "
        f"commit {about['commit']}, {about['date']}: `python -m bench.row_watch`."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description="The price of watching rows.")
    parser.add_argument("--seconds", type=float, default=6.0, help="per line, at least nine pairs")
    parser.add_argument("--grad", action="store_true", help="backward too")
    parser.add_argument("--json", type=Path, default=None)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    print("| B | d | solver | steps | us | watched / not |\n" + "| --- " * 6 + "|")
    for batch in BATCHES:
        for features in FEATURES:
            for solver in SOLVERS:
                one = row(batch, features, solver, grad=chosen.grad, seconds=chosen.seconds)
                rows.append(one)
                cells = (batch, features, one["solver"], one["steps"], one["microseconds"])
                print("| " + " | ".join(map(str, cells)) + f" | {one['ratio']:.4f} |", flush=True)
    if chosen.json is not None:
        about = machine.describe(torch.device("cpu"), 1, sys.argv)
        write_json(chosen.json, {"machine": about, "rows": rows, "readme": section(about, rows)})


if __name__ == "__main__":
    main()
