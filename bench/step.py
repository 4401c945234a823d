"""Measures one Anderson step, g excluded, against its memory traffic and against peers.

    python -m bench.step [--device cpu] [--short] [--threads N] [--rounds N] [--out DIR]

A step moves 2m + 4 times the state at least: that traffic over the time is set against a copy's,
measured in the same run. Rows are timed in turn, round after round; each timed step starts from
the same accelerated state. Results go to DIR/step.json, and a table to the terminal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from bench import machine
from bench.measure import spread, use_threads
from bench.report import aligned, piped
from bench.step_rows import Case, Ours, Row, rows_of, snapshot
from fpi_cuda import backends

FULL = ((128, 65536, 5), (4096, 159, 5), (256, 128, 5), (1, 10**7, 5), (16384, 1024, 8))
SHORT = ((16, 16384, 5), (256, 159, 5), (64, 128, 5), (1, 10**6, 5), (512, 1024, 8))
DTYPES = (torch.float32, torch.bfloat16)
BEST_FIRST = ("cuda", "native", "triton", "reference")
# Two of these do not fit in any cache.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
# Longer than the host takes to issue a step, so that the device never waits for it.
SLEEP_CYCLES = 5_000_000

Clock = Callable[[Callable[[], None]], tuple[float, float]]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = parse(arguments)
    use_threads(options.threads)
    device = torch.device(options.device)
    shapes = SHORT if options.short else FULL
    cases = [Case(*shape, dtype) for shape in shapes for dtype in DTYPES]
    num_compiled = 1 if options.short else len(cases)
    results = run(cases, device, options.rounds, num_compiled)
    results["machine"] = machine.describe(device, options.threads, machine.command_line())
    results["readme"] = markdown(results)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "step.json"
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    print(text(results))
    print("written:", path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="bench.step", description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="small shapes, compile one of them")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="threads and cores of torch")
    parser.add_argument("--rounds", type=int, default=15, help="timings of every row")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="results folder")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return options


def run(cases: list[Case], device: torch.device, rounds: int, num_compiled: int) -> dict[str, Any]:
    """Measure every case, and return all that the table shows.

    Args:
        num_compiled: cases, from the first, in which the step by hand is compiled too.
    """
    clock = cuda_clock if device.type == "cuda" else cpu_clock
    copied = copy_bandwidth(device, clock)
    measured = [
        measure(case, device, clock, rounds, copied, number < num_compiled)
        for number, case in enumerate(tqdm(cases, desc="step", unit="case"))
    ]
    return {"kind": "step", "copy_bytes_per_second": copied, "cases": measured}


def measure(
    case: Case, device: torch.device, clock: Clock, rounds: int, copied: float, compiles: bool
) -> dict[str, Any]:
    """All rows of one case; `ratio` is the time over that of the first row, round by round."""
    start = snapshot(case, device, backends.reference)
    rows, missing = rows_of(case, start, available(device, case.dtype), compiles)
    times: dict[str, list[tuple[float, float]]] = {row.name: [] for row in rows}
    for row in rows:  # not counted: caches fill, kernels load
        row.seconds(clock)
    for _ in range(rounds):
        for row in rows:
            times[row.name].append(row.seconds(clock))
    ours = [seconds for seconds, _ in times[rows[0].name]]
    return {
        "batch": case.batch,
        "dim": case.dim,
        "depth": case.depth,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.bytes,
        "missing": missing,
        "rows": [account(row, times[row.name], ours, case, copied) for row in rows],
    }


def account(
    row: Row, times: list[tuple[float, float]], ours: list[float], case: Case, copied: float
) -> dict[str, Any]:
    """What is kept of one row."""
    seconds = [device for device, _ in times]
    rate = case.bytes / statistics.median(seconds)
    return {
        "name": row.name,
        "seconds": spread(seconds),
        "host_seconds": None if row.waits else statistics.median(host for _, host in times),
        "bytes_per_second": rate,
        "share_of_copy": rate / copied,
        "ratio": spread([mine / best for mine, best in zip(seconds, ours, strict=True)]),
        "is_ours": isinstance(row, Ours),
    }


def available(device: torch.device, dtype: torch.dtype) -> list[ModuleType]:
    """Our backends on this device, the best first. Interpreted kernels have no speed."""
    found = []
    for name in BEST_FIRST:
        if name == "triton" and device.type == "cpu":
            continue
        try:
            found.append(backends.resolve(name, device, dtype))
        except ValueError:
            continue
    return found


def copy_bandwidth(device: torch.device, clock: Clock, tries: int = 9) -> float:
    """Bytes read and written per second by a copy too large for any cache."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    return 2 * source.nbytes / statistics.median(clock(copy)[0] for _ in range(tries))


def cpu_clock(call: Callable[[], None]) -> tuple[float, float]:
    """Seconds of one call, twice: host and device are the same."""
    started = time.perf_counter()
    call()
    took = time.perf_counter() - started
    return took, took


def cuda_clock(call: Callable[[], None]) -> tuple[float, float]:
    """Seconds that one call takes the device, and those that the host takes to issue it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    started = time.perf_counter()
    call()
    host = time.perf_counter() - started
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, host


COLUMNS = ("", "us/step", "min", "max", "host us", "GB/s", "of copy", "time / ours")


def text(results: dict[str, Any]) -> str:
    """The table, at most 100 columns wide."""
    lines = [f"copy: {results['copy_bytes_per_second'] / 1e9:.1f} GB/s read and written"]
    for case in results["cases"]:
        lines += ["", "B={batch} d={dim} m={depth} {dtype}".format(**case)]
        table = [COLUMNS]
        for row in case["rows"]:
            taken, host = row["seconds"], row["host_seconds"]
            table.append(
                (
                    row["name"],
                    *(f"{1e6 * taken[key]:.1f}" for key in ("median", "min", "max")),
                    "waits" if host is None else f"{1e6 * host:.1f}",
                    f"{row['bytes_per_second'] / 1e9:.1f}",
                    f"{row['share_of_copy']:.0%}",
                    f"{row['ratio']['median']:.2f}",
                )
            )
        lines += aligned(table)
        lines += [f"  {name}: not measured, {why}" for name, why in case["missing"].items()]
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """The same for README, a line for each row."""
    where = results["machine"]
    table = [("step", "row", "us/step", "of copy", "time / ours")]
    for case in results["cases"]:
        title = "B={batch} d={dim} m={depth} {dtype}".format(**case)
        for row in case["rows"]:
            taken, ratio = 1e6 * row["seconds"]["median"], row["ratio"]["median"]
            figures = (f"{taken:.1f}", f"{row['share_of_copy']:.0%}", f"{ratio:.2f}")
            table.append((title, row["name"], *figures))
            title = ""
    return (
        f"One Anderson step on {where['cpu'] if where['device'] == 'cpu' else where['device']}, "
        f"g excluded; a copy moves {results['copy_bytes_per_second'] / 1e9:.1f} GB/s. torch "
        f"{where['versions']['torch']}, commit {where['commit']}, {where['date']}: "
        f"`{where['command']}`.\n\n{piped(table)}"
    )


if __name__ == "__main__":
    main()
