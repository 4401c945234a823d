"""What the experiments share: the command line, the checkpoints' folder and the JSON result."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.json_files import write_json
from bench.machine import describe
from bench.paper.checkpoints import Checkpoints

RESULTS = Path(__file__).parents[1] / "results"
OUT = Path(__file__).parents[1] / "out"


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of an experiment.

    Attributes:
        name: of the experiment; its files are called paper-<name>.
        data: the folder with the data sets.
        size: "full", "small" or "smoke".
        out: where the result and the pictures go.
    """

    name: str
    data: Path
    device: torch.device
    size: str
    out: Path
    checkpoints: Checkpoints

    def picture(self, suffix: str = "") -> Path:
        """Where a picture goes."""
        return self.out / f"{self.stem}{suffix}.png"

    @property
    def stem(self) -> str:
        """What file names start with."""
        return stem_of(self.name, self.size)


Experiment = Callable[[Run, Any], dict[str, Any]]
Teller = Callable[[dict[str, Any]], dict[str, str]]


def main(
    name: str,
    experiment: Experiment,
    tell: Teller,
    sizes: dict[str, Any],
    arguments: list[str] | None = None,
) -> dict[str, Any]:
    """Run an experiment from the command line; write, print and return its result.

    Args:
        experiment: (run, config) -> figures; writes the pictures.
        tell: the whole result -> "finding" and "readme", from the figures alone.
        sizes: a dataclass config for each of "full", "small" (where there is one) and "smoke".
        arguments: of the command line; None takes those of this process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    options = parser(name, sizes).parse_args(given)
    size = "smoke" if options.smoke else options.size
    config = sizes[size]
    device = torch.device(options.device)
    threads = torch.get_num_threads()
    folder = OUT / f"paper-{name}-{size}" if options.checkpoints is None else options.checkpoints
    fingerprint = {"size": size, **dataclasses.asdict(config)}
    run = Run(
        name,
        options.data,
        device,
        size,
        OUT if options.out is None else options.out,
        Checkpoints(folder, fingerprint, resume=options.resume, finished_only=options.finished),
    )
    run.out.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", f"bench.paper.{name}", *given]
    began = time.perf_counter()
    result = {
        "experiment": name,
        "size": size,
        "machine": describe(device, threads, command),
        "config": dataclasses.asdict(config),
    }
    result |= experiment(run, config)
    result["seconds"] = time.perf_counter() - began
    result |= tell(result)
    path = run.out / f"{run.stem}.json"
    kept = write_json(path, result)
    if not options.finished:
        run.checkpoints.clear()
    print(f"\n{result['readme']}\n\nWritten: {path}")
    return dict(kept)


def section(
    title: str, finding: str, table: str, pictures: dict[str, str], machine: dict[str, Any]
) -> str:
    """A part of bench/results/README.md: markdown with a heading, and pictures beside it.

    Args:
        pictures: by file name without .png, what they show.
        machine: where the figures are from.
    """
    shown = [f"![{title}: {what}]({stem}.png)" for stem, what in pictures.items()]
    where = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    measured = (
        f"Measured on {where}, torch {machine['versions']['torch']}, commit {machine['commit']}, "
        f"{machine['date']}: `{machine['command']}`."
    )
    return "\n\n".join([f"### {title}", finding, table, measured, *shown])


def stem_of(name: str, size: str) -> str:
    """File names start so; only the full form has the plain name."""
    return f"paper-{name}" + ("" if size == "full" else f"-{size}")


def parser(name: str, sizes: dict[str, Any]) -> argparse.ArgumentParser:
    """The options that all experiments have."""
    options = argparse.ArgumentParser(
        prog=f"python -m bench.paper.{name}", description=f"The paper's experiment: {name}."
    )
    options.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    options.add_argument("--device", default="cpu", help="cpu or cuda; default cpu")
    options.add_argument("--smoke", action="store_true", help="a few minutes on a CPU at most")
    options.add_argument("--size", choices=sorted(sizes), default="full")
    options.add_argument("--resume", action="store_true", help="go on where a run was broken off")
    options.add_argument(
        "--finished", action="store_true", help="train nothing; report what a run has finished"
    )
    options.add_argument("--out", type=Path, help="folder for the result; default bench/out")
    options.add_argument("--checkpoints", type=Path, help="folder; default below bench/out")
    return options
