"""The command line that the benchmarks of solves and steps share."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from bench import checkout, machine
from bench.measure import use_threads
from bench.record import Record

WHEELS = "FPI_BENCH_WHEELS"
NOT_ASKED = "not asked for"
SHORT_SECONDS = 65.0
"""Of a short form on a device: with imports, and the row under way at its end, below 90."""


def parse(
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    peers: tuple[str, ...],
    *,
    device: str = "cpu",
    out: str = "bench/out",
) -> argparse.Namespace:
    """The common options and the parser's own, checked; the process is set up as they say.

    Args:
        peers: names that --peers and --skip take; all are measured by default.
    Returns:
        device as a torch.device, peers as a tuple of those asked for, and path, the results file:
        <benchmark>.json for a CPU, <benchmark>-<device>.json for any other device.
    """
    parser.add_argument("--device", default=device, help="cpu, cuda or cuda:N")
    parser.add_argument("--short", action="store_true", help="fewer rounds, settings and sizes")
    parser.add_argument("--seconds", type=float, help="after which no row is begun")
    parser.add_argument("--threads", type=int, default=1, help="threads and cores on the CPU")
    parser.add_argument("--peers", default=",".join(peers), help="libraries, by commas")
    parser.add_argument("--skip", default="", help="libraries to leave out, by commas")
    parser.add_argument(
        "--wheels", type=Path, default=os.environ.get(WHEELS), help="folder of peers' wheels"
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="results folder")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.seconds is None:
        brief = options.short and not options.device.startswith("cpu")
        options.seconds = SHORT_SECONDS if brief else math.inf
    if not options.seconds > 0:
        parser.error(f"--seconds must be above 0, got {options.seconds:g}")
    given, left_out = (tuple(filter(None, s.split(","))) for s in (options.peers, options.skip))
    for name in (*given, *left_out):
        if name not in peers:
            parser.error(f"--peers, --skip: unknown {name!r}; there are {', '.join(peers)}")
    options.peers = tuple(n for n in peers if n in given and n not in left_out)
    options.not_asked = {name: NOT_ASKED for name in peers if name not in options.peers}
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: there is no CUDA device here")
    if options.device.type == "cpu":
        use_threads(options.threads)
    name = parser.prog.removeprefix("bench.")
    called = machine.device_name(options.device)
    on = "" if called == "cpu" else f"-{checkout.slug(called)}"
    options.path = options.out / f"{name}{on}.json"
    if options.wheels is not None:
        offer_wheels(options.wheels.resolve())
    return options


def offer_wheels(folder: Path) -> None:
    """Let pure-Python wheels be imported where the library is not installed."""
    sys.path += [str(wheel) for wheel in sorted(folder.glob("*-none-any.whl"))]


def record_of(options: argparse.Namespace, **head: Any) -> Record:
    """The results file of this run, begun; its time, too."""
    where = machine.describe(options.device, torch.get_num_threads(), machine.command_line())
    kind = options.path.stem.split("-")[0]
    record = Record(options.path, {"kind": kind, "machine": where, **head}, options.seconds)
    record.skipped.update(options.not_asked)
    return record
