"""Run every solver on every problem of the zoo, and say where Anderson breaks its promises.

python -m bench.zoo --quick
python -m bench.zoo --dtypes float32 --rtol 1e-5 --solvers picard anderson:m=8,ridge=1e-2
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bench import machine
from bench.json_files import write_json
from fpi_cuda import ops
from fpi_cuda.loops.host import iterate
from fpi_cuda.options import Anderson, Broyden, Picard
from fpi_cuda.solution import Status
from fpi_cuda.testing import Problem, names, problem

Solver = Picard | Anderson | Broyden
CLASSES: dict[str, type[Solver]] = {"picard": Picard, "anderson": Anderson, "broyden": Broyden}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
RATIO_LIMIT = 1.5
DEFAULT_SOLVERS = ["picard", "anderson:m=5", "anderson:m=10", "broyden"]


@dataclass(frozen=True)
class Run:
    """One solver on one problem.

    Attributes:
        status, num_steps, residual: per sample, as reported.
        exists: per sample, whether there is a fixed point.
        missed: samples that are CONVERGED though their re-evaluated residual misses the
            tolerance, or that report another residual than they have.
        seconds: wall time of the solve.
    """

    solver: str
    problem: str
    dtype: str
    rtol: float
    status: list[str]
    num_steps: list[int]
    residual: list[float]
    exists: list[bool]
    missed: list[int]
    seconds: float

    @property
    def solved(self) -> list[bool]:
        """Per sample: CONVERGED where there is a fixed point."""
        return [s == "CONVERGED" and e for s, e in zip(self.status, self.exists, strict=True)]

    @property
    def failures(self) -> int:
        """Samples that have a fixed point and did not converge."""
        return sum(self.exists) - sum(self.solved)

    @property
    def evaluations(self) -> int:
        """Evaluations spent on the samples that have a fixed point."""
        return sum(n for n, e in zip(self.num_steps, self.exists, strict=True) if e)

    @property
    def imagined(self) -> list[int]:
        """Samples without a fixed point that are labelled CONVERGED."""
        pairs = enumerate(zip(self.status, self.exists, strict=True))
        return [i for i, (s, e) in pairs if s == "CONVERGED" and not e]


@dataclass(frozen=True)
class Comparison:
    """A solver against Picard on one problem, over the samples that Picard solves.

    Attributes:
        lost: samples that Picard solves and the solver does not.
        ratio: its evaluations over Picard's, both summed over those samples; None if Picard
            solves none.
        sample_ratios: the same per sample.
    """

    solver: str
    problem: str
    dtype: str
    rtol: float
    lost: list[int]
    ratio: float | None
    sample_ratios: list[float]

    @property
    def breaks_promise(self) -> bool:
        """Contract 5: no sample lost, at most RATIO_LIMIT times Picard's evaluations."""
        return bool(self.lost) or (self.ratio is not None and self.ratio > RATIO_LIMIT)


def parse_solver(text: str) -> Solver:
    """The solver written as name:option=value,...

    Raises:
        ValueError: the name is unknown.
    """
    name, _, options = text.partition(":")
    if name not in CLASSES:
        raise ValueError(f"solver must be one of {', '.join(CLASSES)}, got {name!r}")
    pairs = (option.split("=") for option in options.split(",") if option)
    return CLASSES[name](**{key: int(v) if key == "m" else float(v) for key, v in pairs})


def true_residual(p: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) float64 ||g(x) - x|| and ||g(x)|| of flat x, by one more evaluation."""
    gx = p.evaluate(x, None).double()
    return (gx - x.double()).norm(dim=-1), gx.norm(dim=-1)


def missed_samples(p: Problem, x: Tensor, status: Tensor, residual: Tensor, rtol: float) -> Tensor:
    """(B,) bool: CONVERGED and the re-evaluated residual misses rtol or differs from `residual`.

    Allowed for rounding: one unit of the norm's arithmetic, relative; and where g is not
    bitwise row-wise, 8 units of g.
    """
    true, scale = true_residual(p, x)
    eps = torch.finfo(torch.float32 if x.dtype == torch.bfloat16 else x.dtype).eps
    slack = 4 * eps * true + (0.0 if p.bitwise else 8 * eps) * scale
    wrong = (true > rtol * scale + slack) | ((true - residual).abs() > slack)
    return (status == Status.CONVERGED) & wrong


def run(
    p: Problem, label: str, rtol: float, max_steps: int, backend: str | None, rowwise: bool
) -> Run:
    """Solve `p` with the solver written as `label`.

    `max_steps` is Picard's cap; the others have RATIO_LIMIT times as many, so that whoever keeps
    contract 5 can solve what Picard solves in its last step.
    """
    start = time.perf_counter()
    result = iterate(
        p.evaluate,
        p.flat_x0,
        parse_solver(label),
        rtol=rtol,
        atol=0.0,
        max_steps=max_steps if label == "picard" else int(RATIO_LIMIT * max_steps),
        backend=ops.resolve(backend, p.x0.device, p.x0.dtype),
        rowwise=rowwise,
    )
    seconds = time.perf_counter() - start
    missed = missed_samples(p, result.x, result.status, result.residual, rtol)
    return Run(
        label,
        p.name,
        str(p.x0.dtype).removeprefix("torch."),
        rtol,
        [Status(int(s)).name for s in result.status],
        result.num_steps.tolist(),
        result.residual.tolist(),
        p.has_fixed_point.tolist(),
        missed.nonzero().flatten().tolist(),
        seconds,
    )


def compare(run: Run, picard: Run) -> Comparison:
    """How `run` does against Picard on the same problem."""
    solved = [i for i, ok in enumerate(picard.solved) if ok]
    ratios = [run.num_steps[i] / picard.num_steps[i] for i in solved]
    mine, theirs = (sum(r.num_steps[i] for i in solved) for r in (run, picard))
    lost = [i for i in solved if not run.solved[i]]
    ratio = mine / theirs if solved else None
    return Comparison(run.solver, run.problem, run.dtype, run.rtol, lost, ratio, ratios)


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Every run that is not Picard against the Picard run of its problem, where there is one."""
    picard = {(r.problem, r.dtype, r.rtol): r for r in runs if r.solver == "picard"}
    keyed = [(r, picard.get((r.problem, r.dtype, r.rtol))) for r in runs if r.solver != "picard"]
    return [compare(r, reference) for r, reference in keyed if reference is not None]


def table(runs: Sequence[Run], against: Sequence[Comparison]) -> str:
    """Failures / evaluations per problem and solver, and the ratio to Picard, as Markdown."""
    solvers = list(dict.fromkeys(r.solver for r in runs))
    by_key = {(r.problem, r.solver): r for r in runs}
    ratios = {(c.problem, c.solver): c for c in against}
    head = ["problem"] + [f"{s} fail / evals" for s in solvers]
    head += [f"{s} : Picard (worst sample)" for s in solvers if s != "picard"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name in dict.fromkeys(r.problem for r in runs):
        cells = [name]
        for s in solvers:
            r = by_key[name, s]
            marks = f" IMAGINED{r.imagined}" if r.imagined else ""
            marks += f" MISSED{r.missed}" if r.missed else ""
            cells.append(f"{r.failures} / {r.evaluations}{marks}")
        for s in solvers:
            c = ratios.get((name, s))
            if c is None:
                continue
            if c.ratio is None:
                cells.append("-")
                continue
            mark = f" LOST{c.lost}" if c.lost else ""
            mark += " SLOW" if c.ratio > RATIO_LIMIT else ""
            cells.append(f"{c.ratio:.2f} ({max(c.sample_ratios):.2f}){mark}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def totals(runs: Sequence[Run], against: Sequence[Comparison]) -> dict[str, dict[str, float]]:
    """Sums over the zoo per solver; what the summary line prints."""
    out: dict[str, dict[str, float]] = {}
    for s in dict.fromkeys(r.solver for r in runs):
        mine = [r for r in runs if r.solver == s]
        vs = [c for c in against if c.solver == s]
        sample_ratios = [ratio for c in vs for ratio in c.sample_ratios]
        out[s] = {
            "samples": sum(sum(r.exists) for r in mine),
            "failures": sum(r.failures for r in mine),
            "evaluations": sum(r.evaluations for r in mine),
            "imagined": sum(len(r.imagined) for r in mine),
            "missed": sum(len(r.missed) for r in mine),
            "seconds": round(sum(r.seconds for r in mine), 2),
        }
        if vs:
            out[s] |= {
                "lost_samples": sum(len(c.lost) for c in vs),
                "slow_problems": sum((c.ratio or 0) > RATIO_LIMIT for c in vs),
                "slow_samples": sum(ratio > RATIO_LIMIT for ratio in sample_ratios),
                "worst_problem_ratio": round(max(c.ratio or 0 for c in vs), 2),
                "worst_sample_ratio": round(max(sample_ratios, default=0), 2),
                "mean_sample_ratio": round(sum(sample_ratios) / max(1, len(sample_ratios)), 3),
            }
    return out


def readme(runs: Sequence[Run], against: Sequence[Comparison], max_steps: int) -> str:
    """The section of bench/results/README.md: totals in the open, every problem folded away."""
    kinds = dict.fromkeys((r.dtype, r.rtol) for r in runs)
    parts = [
        f"### The zoo, {' and '.join(f'{dtype}, {rtol:g}' for dtype, rtol in kinds)}",
        f"{len(names())} problems x 8 samples, at most {max_steps} Picard evaluations and "
        f"{RATIO_LIMIT:g} times as many for the others. Lost: samples that Picard solves and the "
        "solver does not. Ratio: evaluations over Picard's on a problem, over what Picard solves.",
    ]
    for dtype, rtol in kinds:
        here = [r for r in runs if (r.dtype, r.rtol) == (dtype, rtol)]
        there = [c for c in against if (c.dtype, c.rtol) == (dtype, rtol)]
        lines = [
            f"| {dtype}, {rtol:g} | unsolved | evaluations | lost | worst ratio |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for label, sums in totals(here, there).items():
            lost = f"{sums['lost_samples']}" if "lost_samples" in sums else "-"
            ratio = f"{sums['worst_problem_ratio']:.2f}" if "lost_samples" in sums else "-"
            lines.append(
                f"| {label} | {sums['failures']} of {sums['samples']} | "
                f"{sums['evaluations']:,} | {lost} | {ratio} |"
            )
        parts.append("\n".join(lines))
        summary = f"<details><summary>Every problem, {dtype}, {rtol:g}</summary>"
        parts.append(f"{summary}\n\n{table(here, there)}\n\n</details>")
    return "\n\n".join(parts)


def violations(runs: Sequence[Run], against: Sequence[Comparison]) -> list[str]:
    """One line per broken promise; contract 5 binds Anderson, the others bind every solver."""
    lines = []
    for r in runs:
        where = f"{r.problem} {r.dtype} rtol={r.rtol:g} {r.solver}"
        if r.imagined:
            lines.append(f"imagined: {where} samples {r.imagined} have no fixed point")
        if r.missed:
            lines.append(f"missed: {where} samples {r.missed} are CONVERGED above the tolerance")
    for c in against:
        where = f"{c.problem} {c.dtype} rtol={c.rtol:g} {c.solver}"
        if c.solver.startswith("anderson") and c.breaks_promise:
            lines.append(f"unsafe: {where} loses {c.lost}, ratio {c.ratio:.2f}")
    return lines


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Every solver on every problem of the zoo.")
    parser.add_argument("--backend", default=None, help="default: the best there is")
    parser.add_argument("--solvers", nargs="+", default=None, metavar="NAME[:OPTION=VALUE,...]")
    parser.add_argument("--dtypes", nargs="+", default=None, choices=list(DTYPES))
    parser.add_argument("--rtol", nargs="+", type=float, default=None)
    parser.add_argument("--max-steps", type=int, default=None)
    parser.add_argument("--problems", nargs="+", default=None, metavar="PREFIX")
    parser.add_argument("--rowwise", action="store_true", help="let the solver compact the batch")
    parser.add_argument("--quick", action="store_true", help="float32, 1e-5, 300 steps, no Broyden")
    parser.add_argument("--no-table", action="store_true", help="print violations and summary only")
    parser.add_argument("--json", type=Path, default=None, help="write totals and tables to it")
    parser.add_argument("--raw", action="store_true", help="and every run, sample by sample")
    chosen = parser.parse_args(arguments)
    chosen.solvers = chosen.solvers or (DEFAULT_SOLVERS[:3] if chosen.quick else DEFAULT_SOLVERS)
    chosen.dtypes = chosen.dtypes or (["float32"] if chosen.quick else ["float32", "float64"])
    chosen.rtol = chosen.rtol or ([1e-5] if chosen.quick else [1e-4, 1e-6])
    chosen.max_steps = chosen.max_steps or (300 if chosen.quick else 1000)
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and return 1 if a promise is broken."""
    chosen = parse_arguments(arguments)
    torch.set_num_threads(1)
    prefixes = tuple(chosen.problems or [""])
    wanted = [name for name in names() if name.startswith(prefixes)]
    todo = [(d, rtol, n) for d in chosen.dtypes for rtol in chosen.rtol for n in wanted]
    runs: list[Run] = []
    for dtype, rtol, name in tqdm(todo, unit="problem", disable=not sys.stderr.isatty()):
        p = problem(name, DTYPES[dtype])
        for label in chosen.solvers:
            runs.append(run(p, label, rtol, chosen.max_steps, chosen.backend, chosen.rowwise))
    against = comparisons(runs)
    for dtype in chosen.dtypes:
        for rtol in chosen.rtol:
            here = [r for r in runs if (r.dtype, r.rtol) == (dtype, rtol)]
            there = [c for c in against if (c.dtype, c.rtol) == (dtype, rtol)]
            if not chosen.no_table:
                print(f"\n{dtype}, rtol {rtol:g}, max_steps {chosen.max_steps}")
                print(table(here, there))
            print(f"\nSUMMARY {dtype} {rtol:g}")
            for label, sums in totals(here, there).items():
                print(f"  {label:24s} " + json.dumps(sums))
    broken = violations(runs, against)
    print("\n".join(broken))
    summary = {"violations": len(broken), "totals": totals(runs, against)}
    print("TOTAL " + json.dumps(summary))
    if chosen.json is not None:
        record = {"arguments": vars(chosen) | {"json": chosen.json.name}, **summary}
        if chosen.raw:
            record["runs"] = [asdict(r) for r in runs]
            record["comparisons"] = [asdict(c) for c in against]
        record["machine"] = machine.describe(torch.device("cpu"), 1, machine.command_line())
        record["readme"] = readme(runs, against, chosen.max_steps)
        write_json(chosen.json, record)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
