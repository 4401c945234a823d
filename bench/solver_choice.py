"""Whether the first steps could choose the solver: python -m bench.solver_choice [--json FILE]

A rule that has seen the residuals of a few Picard steps takes Picard where they shrink fast and
Anderson elsewhere. For each sample of the zoo, and for what an Anderson step costs against one of
Picard, the cost of the best such rule is put in relation to that of the better solver.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import machine
from bench.json_files import write_json
from bench.report import piped
from fpi_cuda import ops
from fpi_cuda.loops.host import iterate
from fpi_cuda.options import Anderson, Picard
from fpi_cuda.solution import Status
from fpi_cuda.testing import Problem, names, problem

RTOLS = (1e-3, 1e-5)
MAX_STEPS = 2000
SEEN = (2, 3, 4)
"""Evaluations after which the choice is made."""
COSTS = (1.0, 1.15, 1.3, 1.6, 1.9)
"""Of a step of Anderson in steps of Picard."""
RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Below which a rule takes Picard; 0: never."""
ALLOWED = 1.05


def samples(p: Problem) -> np.ndarray:
    """(n, 2 + max(SEEN)): evaluations by each solver, inf where it fails, and first residuals."""
    engine = ops.resolve(None, torch.device("cpu"), p.x0.dtype)
    x, residuals = p.flat_x0.clone(), []
    for _ in range(max(SEEN)):
        gx = p.evaluate(x, None)
        residuals.append((gx - x).norm(dim=1))
        x = gx
    rows = []
    for rtol in RTOLS:
        spent = []
        for solver in (Picard(), Anderson()):
            result = iterate(
                p.evaluate, p.flat_x0, solver, rtol=rtol, atol=0.0, max_steps=MAX_STEPS,
                backend=engine,
            )  # fmt: skip
            solved = result.status == Status.CONVERGED
            spent.append(torch.where(solved, result.num_steps.double(), torch.inf))
        rows.append(torch.stack([*spent, *residuals], dim=1).numpy())
    found: np.ndarray = np.concatenate(rows)
    return found[np.isfinite(found[:, :2]).any(axis=1)]


def table(found: np.ndarray) -> list[dict[str, Any]]:
    """One row for each cost and number of evaluations that are seen: the best rule there is."""
    picard, anderson, residuals = found[:, 0], found[:, 1], found[:, 2:]
    rows = []
    for cost in COSTS:
        best = np.minimum(picard, cost * anderson)
        for seen in SEEN:
            with np.errstate(all="ignore"):
                rate = (residuals[:, seen - 1] / residuals[:, 0]) ** (1 / (seen - 1))
            ratios = {
                limit: np.where(rate < limit, picard, cost * anderson) / best for limit in RATES
            }
            limit = min(ratios, key=lambda r: float(np.minimum(ratios[r], 50).mean()))
            rows.append(
                {
                    "cost": cost,
                    "seen": seen,
                    "rate": limit,
                    "mean": float(np.minimum(ratios[limit], 50).mean()),
                    "over": int((ratios[limit] > ALLOWED).sum()),
                    "least_worst": min(float(r.max()) for r in ratios.values()),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=None)
    chosen = parser.parse_args(arguments)
    found = np.concatenate([samples(problem(name, dtype=torch.float64)) for name in names()])
    rows = table(found)
    shown = [("Anderson step", "seen", "Picard below", "mean", f"over {ALLOWED}", "worst, at best")]
    shown += [
        (
            f"{row['cost']:.2f}",
            str(row["seen"]),
            f"{row['rate']:.2f}",
            f"{row['mean']:.3f}",
            f"{row['over']} of {len(found)}",
            f"{row['least_worst']:.1f}",
        )
        for row in rows
    ]
    print(piped(shown))
    failed = int(np.isinf(found[:, 0]).sum())
    print(f"Picard does not solve {failed} of {len(found)}, Anderson all but "
          f"{int(np.isinf(found[:, 1]).sum())}.")  # fmt: skip
    if chosen.json is not None:
        about = machine.describe(torch.device("cpu"), 1, sys.argv)
        text = (
            "### Could the first steps choose the solver?\n\n"
            f"{__doc__.split(chr(10), 2)[2].strip()}\n\n{piped(shown)}\n\n"
            f"Picard does not solve {failed} of the {len(found)} samples. "
            f"Commit {about['commit']}, {about['date']}: `python -m bench.solver_choice`."
        )
        write_json(chosen.json, {"machine": about, "rows": rows, "readme": text})


if __name__ == "__main__":
    main()
