"""Solve random small problems by the hundred thousand, and hold every answer to its word.

    python -m bench.fuzz --solves 1000000 --seed 0
    python -m bench.fuzz --seed 0 --only 123        one batch again, to look at a violation
    python -m bench.fuzz --solves 0 --minutes 10    layers with all that users hang on them
    python -m bench.fuzz --seed 0 --only-layer 123  one of those again; see bench/fuzz_layers.py

What is checked, per sample, against norms that this script takes in float64 of x and g(x):

- CONVERGED: the returned x, evaluated again, has ||g - x|| <= atol + min(rtol ||g||, cap); the cap
  is 0.1 s0, or 0.01 of a residual seen where ||g|| was a quarter of this one at least. No earlier
  point was within that of 0.1 s0, but for one so far off that g rounds away more.
- STALLED: ||g - x|| of the returned x is at most FLOOR epsilons of the state's dtype, relative to
  ||g||.
- where g has no fixed point, CONVERGED is a violation, in bfloat16 too, though there x + 1 = x
  from 256 on.
- residual is that of the returned x.
- failed samples: the returned x is the best one seen, or x0 where none was finite.
- num_steps is in [1, max_steps], and within the evaluations that were made.
- a random part of the batch, permuted and solved alone, gives the same bits.

Slack for rounding: the library subtracts and sums in float32 (float64 for float64 states), this
script in float64. SLACK units of that arithmetic's epsilon, relative, are all that is allowed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bench.fuzz_layers import fuzz_layer
from fpi_cuda import ops
from fpi_cuda.loops.host import iterate
from fpi_cuda.options import MAX_DEPTH, Anderson, Broyden, Picard
from fpi_cuda.solution import SolveResult, Status
from fpi_cuda.testing.random_maps import ALWAYS, NEVER, NO_FIXED_POINT, RandomMaps, draw_maps

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
MAX_STEPS = (1, 2, 3, 5, 10, 20, 50, 100, 200)
MAX_DIM = 40
CAP = 0.1
FALL = 0.01
LEAST_FALL, ROUNDINGS = 0.125, 8.0
SETTLED = 4.0
FLOOR = 64.0
SLACK = 4.0
SHOWN = 20


@dataclass(frozen=True)
class Case:
    """One batch of solves, drawn from (seed, index)."""

    index: int
    maps: RandomMaps
    solver: Picard | Anderson | Broyden
    rtol: float
    atol: Tensor
    max_steps: int
    rowwise: bool
    part: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.maps.x0.dtype

    @property
    def epsilon(self) -> float:
        """Of the arithmetic in which the library takes norms."""
        return torch.finfo(torch.promote_types(self.dtype, torch.float32)).eps


@dataclass
class Trace:
    """What a solve was shown: (steps, B) float64 norms, NaN where a sample was left out.

    A residual is inf where ||g - x|| has an element that is not finite.
    """

    residual: Tensor
    norm_gx: Tensor
    steps: int = 0


@dataclass
class Report:
    """Counts over all cases, and the violations."""

    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    solves: int = 0
    resolved: int = 0
    largest_slack: float = 0.0
    violations: list[str] = field(default_factory=list)


def draw_case(seed: int, index: int, batch: int) -> Case:
    """The case called `index`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=generator))

    dtype, m = DTYPES[pick(3)], 1 + pick(MAX_DEPTH)
    beta = 1.0 if pick(2) else uniform(0.2, 1.5)
    history = torch.bfloat16 if dtype == torch.float32 and pick(8) == 0 else None
    ridge = (1e-3, 1e-3, 0.0, 1e-10, 1.0)[pick(5)]
    solvers = (Picard(beta), Anderson(m, beta, ridge, history), Broyden(m, beta))
    solver = solvers[(0, 1, 1, 1, 2)[pick(5)]]
    floor = torch.finfo(dtype).eps
    rtol = 0.0 if pick(12) == 0 else 10 ** uniform(torch.tensor(floor / 100).log10().item(), -1)
    max_steps, d = MAX_STEPS[pick(len(MAX_STEPS))], 1 + pick(MAX_DIM)
    maps = draw_maps(generator, batch, d, dtype, max_steps)
    atol = maps.scale[:, 0].double() * 10 ** uniform(-10, -2) * (pick(3) == 0)
    part = torch.randperm(batch, generator=generator)[: 1 + pick(batch // 4)]
    return Case(index, maps, solver, rtol, atol, max_steps, bool(pick(2)), part)


def run(case: Case, backend_name: str | None) -> tuple[SolveResult, Trace]:
    """Solve, and keep the norms of every evaluation."""
    maps = case.maps
    backend = ops.resolve(backend_name, maps.x0.device, maps.x0.dtype)
    shape = (case.max_steps, maps.x0.shape[0])
    trace = Trace(*(torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2)))

    def evaluate(x: Tensor, rows: Tensor | None) -> Tensor:
        gx = maps(x, rows, trace.steps)
        residual, norm_gx = norms(x, gx)
        if trace.steps < case.max_steps:
            index = slice(None) if rows is None else rows
            trace.residual[trace.steps, index] = residual
            trace.norm_gx[trace.steps, index] = norm_gx
        trace.steps += 1
        return gx

    options = {"rtol": case.rtol, "atol": case.atol, "max_steps": case.max_steps}
    result = iterate(
        evaluate, maps.x0, case.solver, **options, backend=backend, rowwise=case.rowwise
    )
    return result, trace


def norms(x: Tensor, gx: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) float64 ||gx - x|| and ||gx||; inf where the library's arithmetic overflows."""
    arithmetic = torch.promote_types(x.dtype, torch.float32)
    finite = torch.isfinite(gx.to(arithmetic) - x.to(arithmetic)).all(-1)
    residual = scaled_norm(gx.double() - x.double())
    return torch.where(finite, residual, torch.inf), scaled_norm(gx.double())


def scaled_norm(x: Tensor) -> Tensor:
    """(n,) 2-norm of the rows, whose squares neither overflow nor vanish."""
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
    return (x / scale).norm(dim=-1) * scale.squeeze(-1)


def check(case: Case, result: SolveResult, trace: Trace, report: Report) -> None:
    """Hold every sample of the result to the promises; add what is broken to the report."""
    maps, status = case.maps, result.status
    slack = SLACK * case.epsilon
    batch = torch.arange(status.numel())
    converged = status == Status.CONVERGED
    known = (status > Status.ACTIVE) & (status <= max(Status))
    flag(report, case, "unknown status", ~known)
    counted = (result.num_steps >= 1) & (result.num_steps <= min(case.max_steps, trace.steps))
    flag(report, case, "num_steps out of range", ~counted)
    last = (result.num_steps.long() - 1).clamp(0, case.max_steps - 1)

    x0_norm = scaled_norm(maps.x0.double())
    scale0 = torch.maximum(x0_norm, trace.norm_gx[0])

    def tolerance(norm_gx: Tensor) -> Tensor:
        return case.atol + torch.minimum(case.rtol * norm_gx, CAP * scale0)

    residual, norm_gx = norms(result.x, maps(result.x, None, None))
    at_rest = norm_gx <= SETTLED * (1 + slack) * trace.norm_gx
    peaks = torch.where(at_rest & trace.residual.isfinite(), trace.residual, 0.0)
    peaks = torch.where(torch.arange(case.max_steps)[:, None] <= last, peaks, 0.0)
    peak = peaks.amax(0)
    # In 16 bits rounding may keep a residual from falling further.
    rounding = torch.minimum(ROUNDINGS * torch.finfo(case.dtype).eps * norm_gx, LEAST_FALL * peak)
    of_peak = torch.minimum(case.rtol * norm_gx, torch.maximum(FALL * peak, rounding))
    bound = torch.maximum(tolerance(norm_gx), case.atol + of_peak)
    flag(
        report,
        case,
        "CONVERGED above the tolerance",
        converged & ~(residual <= bound * (1 + slack)),
    )

    steps = torch.arange(case.max_steps)[:, None]
    earlier = (steps < last) & (trace.residual < tolerance(trace.norm_gx) * (1 - slack))
    # Where g rounds off more than the cap, a small residual may be refused: it shows nothing.
    earlier &= torch.finfo(case.dtype).eps * trace.norm_gx <= CAP * scale0
    flag(report, case, "went on after an evaluation that passed", earlier.any(0))

    passing_fault = (maps.fault_step != NEVER) & (maps.fault_step != ALWAYS)
    floor = FLOOR * torch.finfo(case.dtype).eps * norm_gx
    stalled = (status == Status.STALLED) & ~passing_fault
    flag(report, case, "STALLED above the floor", stalled & ~(residual <= floor * (1 + slack)))
    same = (result.residual - residual).abs() <= slack * residual
    same |= ~residual.isfinite() & ~result.residual.isfinite()
    flag(report, case, "residual is not that of x", ~same & (converged | ~passing_fault))

    seen = torch.where((steps <= last) & trace.residual.isfinite(), trace.residual, torch.inf)
    best = seen.amin(0)
    is_best = (result.residual - best).abs() <= slack * best
    nothing_finite = ~best.isfinite()
    equal_x0 = same_bits(result.x, maps.x0).all(-1)
    is_best |= nothing_finite & ~result.residual.isfinite() & equal_x0
    flag(report, case, "failed, and x is not the best seen", ~converged & ~is_best)

    hopeless = torch.tensor([name in NO_FIXED_POINT for name in maps.families])[maps.which]
    # A finite fault throws x or the starting scale far away, and with them the tolerance.
    hopeless &= ~(passing_fault & maps.fault_value.isfinite())
    flag(report, case, "CONVERGED without a fixed point", converged & hopeless)

    units = (result.residual - residual).abs() / (residual * case.epsilon)
    units = units[converged & (residual > 0)]
    report.largest_slack = max(report.largest_slack, float(units.max()) if units.numel() else 0.0)
    for i in batch.tolist():
        counts = report.statuses.setdefault(maps.family(i), Counter())
        counts[Status(int(status[i])).name if known[i] else "UNKNOWN"] += 1
    report.solves += status.numel()


def check_part(case: Case, result: SolveResult, backend: str | None, report: Report) -> None:
    """Solve a permuted part of the batch alone, with the other evaluation mode: the same bits."""
    part = case.part
    alone = Case(
        case.index,
        case.maps.take(part),
        case.solver,
        case.rtol,
        case.atol[part],
        case.max_steps,
        not case.rowwise,
        part,
    )
    again, _ = run(alone, backend)
    moved = torch.zeros(result.status.numel(), dtype=torch.bool)
    for whole, piece in zip(result, again, strict=True):
        equal = same_bits(whole[part], piece)
        moved[part] |= ~equal.reshape(part.numel(), -1).all(-1)
    flag(report, case, "moves when solved in another batch", moved)
    report.resolved += part.numel()


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise equality, NaN equal to NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def flag(report: Report, case: Case, what: str, where: Tensor) -> None:
    """One line per sample of `where`."""
    for i in where.nonzero().flatten().tolist():
        dtype = str(case.dtype).removeprefix("torch.")
        report.violations.append(
            f"{what}: case {case.index} sample {i}, {case.maps.family(i)}, {case.solver}, {dtype}, "
            f"d={case.maps.x0.shape[1]}, rtol={case.rtol:.3g}, atol={float(case.atol[i]):.3g}, "
            f"max_steps={case.max_steps}, rowwise={case.rowwise}, "
            f"fault_step={int(case.maps.fault_step[i])}"
        )


def fuzz(
    seed: int, indices: Sequence[int], batch: int, backend: str | None, resolve_every: int
) -> Report:
    """Run the cases; every `resolve_every`-th is also solved in parts."""
    report = Report()
    bitwise = ops.resolve(backend, torch.device("cpu"), torch.float32).name == "native"
    for index in tqdm(indices, unit="batch", disable=not sys.stderr.isatty()):
        case = draw_case(seed, index, batch)
        result, trace = run(case, backend)
        check(case, result, trace, report)
        if bitwise and index % resolve_every == 0:
            check_part(case, result, backend, report)
    return report


def table(report: Report) -> str:
    """Statuses by family, as Markdown."""
    columns = [s.name for s in Status if s != Status.ACTIVE]
    lines = ["| family | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    for family, counts in sorted(report.statuses.items()):
        lines.append(f"| {family} | " + " | ".join(str(counts[c]) for c in columns) + " |")
    return "\n".join(lines)


def layer_indices(count: int, minutes: float, only: int | None) -> Iterator[int]:
    """The layers to call: one, so many, or as many as the time allows."""
    if only is not None:
        yield only
        return
    ends = time.perf_counter() + 60 * minutes
    with tqdm(unit="layer", disable=not sys.stderr.isatty()) as bar:
        for index in itertools.count():
            if index >= count and time.perf_counter() >= ends:
                return
            yield index
            bar.update()


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz, print, and return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description="Hold random solves to their word.")
    parser.add_argument("--solves", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--only", type=int, default=None, help="the one case to run")
    parser.add_argument("--backend", default=None)
    parser.add_argument("--resolve-every", type=int, default=4, help="cases per invariance check")
    parser.add_argument("--layers", type=int, default=0, help="layers to call")
    parser.add_argument("--minutes", type=float, default=0.0, help="of calling layers")
    parser.add_argument("--only-layer", type=int, default=None, help="the one layer to call")
    parser.add_argument("--json", type=Path, default=None)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    indices = range(-(-chosen.solves // chosen.batch)) if chosen.only is None else [chosen.only]
    if chosen.only_layer is not None:
        indices = range(0)
    start = time.perf_counter()
    report = fuzz(chosen.seed, indices, chosen.batch, chosen.backend, chosen.resolve_every)
    layers = 0
    for index in layer_indices(chosen.layers, chosen.minutes, chosen.only_layer):
        report.violations += fuzz_layer(chosen.seed, index)
        layers += 1
    seconds = time.perf_counter() - start
    print(table(report))
    for line in report.violations[:SHOWN]:
        again = f"--batch {chosen.batch} --only {{}} --resolve-every 1"
        if ": layer index=" in line:
            again, place = "--only-layer {}", line.split("layer index=")[1].split(",")[0]
        else:
            place = line.split("case ")[1].split()[0]
        print(
            f"VIOLATION {line}\n  python -m bench.fuzz --seed {chosen.seed} {again.format(place)}"
        )
    kinds = Counter(line.split(":")[0] for line in report.violations)
    summary = {
        "solves": report.solves,
        "layers": layers,
        "seed": chosen.seed,
        "violations": len(report.violations),
        "kinds": dict(kinds),
        "resolved_in_parts": report.resolved,
        "largest_residual_rounding_in_eps": round(report.largest_slack, 3),
        "seconds": round(seconds, 1),
    }
    print("TOTAL " + json.dumps(summary))
    if chosen.json is not None:
        record = summary | {"statuses": report.statuses, "lines": report.violations}
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if report.violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
