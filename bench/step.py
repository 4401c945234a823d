"""Measures one Anderson step, g excluded, against its memory traffic and against peers.

    python -m bench.step [--device cpu] [--short] [--seconds N] [--threads N] [--rounds N]
                         [--peers A,B] [--skip A,B] [--wheels DIR] [--out DIR]

A step moves 2m + 4 times the state at least: that traffic over the time is set against a copy's,
measured in the same run. Each row is timed in turn with the best of ours, round after round; each
timed step starts from the same accelerated state. Results go to DIR/step.json, on a device to
DIR/step-<device>.json, row by row, and a table to the terminal.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from bench import options
from bench.measure import Clock, Timing, cpu_clock, cuda_clock, spread
from bench.record import Record, skipped_lines
from bench.report import aligned, piped, wrapped
from bench.step_rows import Case, Compiled, HandWritten, Ours, Row, TorchDEQ, right, snapshot
from fpi_cuda import ops

FULL = ((128, 65536, 5), (4096, 159, 5), (256, 128, 5), (1, 10**7, 5), (16384, 1024, 8))
SHORT = ((16, 16384, 5), (256, 159, 5), (64, 128, 5), (1, 10**6, 5), (512, 1024, 8))
DTYPES = (torch.float32, torch.bfloat16)
BEST_FIRST = ("cuda", "native", "triton", "reference")
PEERS = {"hand": HandWritten, "torchdeq": TorchDEQ, "compiled": Compiled}
# Two of these do not fit in any cache.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    given = parse(arguments)
    record = options.record_of(given)
    # On a device it is not the size that costs time, but what is compiled.
    shapes = SHORT if given.short and given.device.type == "cpu" else FULL
    cases = [Case(*shape, dtype) for shape in shapes for dtype in DTYPES]
    num_compiled = 1 if given.short else len(cases)
    run(record, cases, given.device, given.rounds, num_compiled, given.peers)
    record.results["readme"] = markdown(record.results)
    print(text(record.finish()))
    print("written:", record.path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="bench.step", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="timings of every row")
    given = options.parse(parser, arguments, tuple(PEERS))
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    return given


def run(
    record: Record,
    cases: list[Case],
    device: torch.device,
    rounds: int,
    num_compiled: int,
    peers: tuple[str, ...] = tuple(PEERS),
) -> None:
    """Measure every case: the best of ours and the step by hand in all, then the other rows.

    Args:
        record: gets all that the table shows.
        num_compiled: cases, from the first, in which the step by hand is compiled too.
    """
    clock = cuda_clock if device.type == "cuda" else cpu_clock
    copied = copy_bandwidth(device, clock)
    tables = [described(case) for case in cases]
    record.results |= {"copy_bytes_per_second": copied, "cases": tables}
    for wave in range(3):
        numbered = enumerate(zip(cases, tables, strict=True))
        for number, (case, table) in tqdm(numbered, "step", len(cases), unit="case"):
            start = functools.cache(functools.partial(snapshot, case, device, ops.reference))
            ours = {
                f"fpi_cuda {backend.name}": functools.partial(ours_of, backend, case, start)
                for backend in available(device, case.dtype)
            }
            best = functools.cache(functools.partial(first_right, list(ours.values())))
            for name, make in waves(ours, case, start, peers)[wave]:
                if name == Compiled.name and number >= num_compiled:
                    record.skipped[f"{name}, but in the first case"] = "compiled once (--short)"
                    continue
                measure = functools.partial(timed, make, best, clock, rounds, case, copied)
                title, keep = f"{case.title}: {name}", table["rows"].append
                record.row(title, measure, keep, compiles=name == Compiled.name)


Maker = Callable[[], Row]


def waves(
    ours: dict[str, Maker], case: Case, start: Callable[[], Any], peers: tuple[str, ...]
) -> tuple[list[tuple[str, Maker]], ...]:
    """The rows in the order of their worth: a wave goes through all cases before the next."""
    first, *others = ours.items()
    made = {
        name: (PEERS[name].name, lambda name=name: PEERS[name](case, start())) for name in peers
    }
    return (
        [first, *(made[name] for name in peers if name == "hand")],
        [*others, *(made[name] for name in peers if name not in ("hand", "compiled"))],
        [made[name] for name in peers if name == "compiled"],
    )


def ours_of(backend: ModuleType, case: Case, start: Callable[[], Any]) -> Ours:
    return right(Ours(backend, case, start()))


def first_right(makers: list[Callable[[], Ours]]) -> Ours:
    """The first row that can be made."""
    *more, last = makers
    for make in more:
        try:
            return make()
        except RuntimeError:  # told where the row itself is measured
            continue
    return last()


def described(case: Case) -> dict[str, Any]:
    return {
        "batch": case.batch,
        "dim": case.dim,
        "depth": case.depth,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.bytes,
        "rows": [],
    }


def timed(
    make: Maker, best: Callable[[], Ours], clock: Clock, rounds: int, case: Case, copied: float
) -> dict[str, Any]:
    """One row; `ratio` is its time over that of the best of ours, round by round."""
    row, ours = make(), best()
    rows = [ours, row] if row.name != ours.name else [row]
    for each in rows:  # not counted: caches fill, kernels load
        each.timing(clock)
    times = [[each.timing(clock) for each in rows] for _ in range(rounds)]
    return account(row, [turn[-1] for turn in times], [turn[0] for turn in times], case, copied)


def account(
    row: Row, times: list[Timing], ours: list[Timing], case: Case, copied: float
) -> dict[str, Any]:
    """What is kept of one row."""
    rate = case.bytes / statistics.median(timing.device for timing in times)
    waits = any(timing.waits for timing in times)
    found = {
        "name": row.name,
        "seconds": spread([timing.device for timing in times]),
        "host_seconds": None if waits else statistics.median(timing.host for timing in times),
        "bytes_per_second": rate,
        "share_of_copy": rate / copied,
        "ratio": spread([mine.device / b.device for mine, b in zip(times, ours, strict=True)]),
        "is_ours": isinstance(row, Ours),
    }
    if isinstance(row, Ours):
        found |= {"active_before": row.active_before, "active_after": row.active_after}
    return found


def available(device: torch.device, dtype: torch.dtype) -> list[ModuleType]:
    """Our backends on this device, the best first. Interpreted kernels have no speed."""
    found = []
    for name in BEST_FIRST:
        if name == "triton" and device.type == "cpu":
            continue
        try:
            found.append(ops.resolve(name, device, dtype))
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
    taken = [clock(copy, lambda: None).device for _ in range(tries)]
    return 2 * source.nbytes / statistics.median(taken)


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
    return "\n".join([*lines, "", *wrapped(skipped_lines(results["skipped"]))])


def markdown(results: dict[str, Any]) -> str:
    """The same for bench/results/README.md, a line for each row."""
    where = results["machine"]
    table = [("step", "row", "us/step", "of copy", "time / ours")]
    for case in results["cases"]:
        title = "B={batch} d={dim} m={depth} {dtype}".format(**case)
        for row in case["rows"]:
            taken, ratio = 1e6 * row["seconds"]["median"], row["ratio"]["median"]
            figures = (f"{taken:.1f}", f"{row['share_of_copy']:.0%}", f"{ratio:.2f}")
            table.append((title, row["name"], *figures))
            title = ""
    machine = where["cpu"] if where["device"] == "cpu" else where["device"]
    return (
        f"### The Anderson step on {machine}\n\nOne Anderson step on {machine}, "
        f"g excluded; a copy moves {results['copy_bytes_per_second'] / 1e9:.1f} GB/s. torch "
        f"{where['versions']['torch']}, commit {where['commit']}, {where['date']}: "
        f"`{where['command']}`.\n\n"
        + "\n\n".join([piped(table), *skipped_lines(results["skipped"], 4)])
    )


if __name__ == "__main__":
    main()
