"""What the full forms would cost here: a few of their own training steps, timed.

python -m bench.paper.cost --data DIR [--device cpu] [--out DIR]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.json_files import write_json
from bench.machine import command_line, describe
from bench.paper import denoise, flow
from bench.paper.checkpoints import Checkpoints
from bench.paper.experiment import OUT, Run
from bench.paper.images import read_folder

STEPS = 2
"""Training steps that are timed, after one that is not."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Time them, write DIR/paper-cost.json and print the section of bench/results/README.md."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper.cost", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default cpu")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the result")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    result: dict[str, Any] = {
        "experiment": "cost",
        "machine": describe(device, torch.get_num_threads(), command_line()),
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few steps solve what they solve
        result["rows"] = [
            *denoising(options.data, device, Path(folder), denoise.SIZES["full"]),
            *optical_flow(options.data, device, Path(folder), flow.SIZES["full"]),
        ]
    result |= tell(result)
    path = options.out / "paper-cost.json"
    result = write_json(path, result)
    print(f"{result['readme']}\n\nWritten: {path}")
    return result


def denoising(
    data: Path, device: torch.device, folder: Path, config: denoise.Config
) -> list[dict[str, Any]]:
    """FPI_NN and its twin; the network of equal time costs what FPI_NN does."""
    images = read_folder(data / "denoise" / "train400")
    seconds = {}
    for method in (denoise.FPI, denoise.STEPS):

        def run_steps(batches: int, method: str = method) -> list[dict[str, float]]:
            few = dataclasses.replace(config, batches=batches)
            model = denoise.make(method, few, 0).to(device)
            run = fresh(data, device, folder / f"denoise {method} {batches}")
            sigma = config.sigmas[-1]
            return denoise.train(method, model, few, run, images, sigma, epochs=1, seed=0)

        seconds[method] = per_step(run_steps)
    steps = config.epochs * config.batches
    trainings = len(config.sigmas) * config.seeds
    return [
        row("image denoising", method, seconds[timed], steps, trainings)
        for method, timed in (
            (denoise.FPI, denoise.FPI),
            (denoise.STEPS, denoise.STEPS),
            (denoise.TIME, denoise.FPI),
        )
    ]


def optical_flow(
    data: Path, device: torch.device, folder: Path, config: flow.Config
) -> list[dict[str, Any]]:
    """Both networks at every width."""
    rows = []
    for width in config.widths:
        for method in (flow.PLAIN, flow.WITH_FPI):

            def run_steps(
                batches: int, method: str = method, width: float = width
            ) -> list[dict[str, float]]:
                few = dataclasses.replace(config, batches=batches, epochs=1, test_pairs=1)
                run = fresh(data, device, folder / f"flow {method} {width} {batches}")
                source = flow.Source(run, few)
                trained = flow.train(method, method, width, few, run, source, 0)
                return list(trained["history"])

            taken = per_step(run_steps)
            name = f"{method}, width {width:g}"
            steps = config.epochs * config.batches
            rows.append(row("optical flow", name, taken, steps, config.seeds))
    return rows


def per_step(run_steps: Any) -> float:
    """Seconds of one training step of `run_steps(number of steps)`, after a warm one."""
    run_steps(1)
    return float(run_steps(STEPS)[0]["seconds"]) / STEPS


def fresh(data: Path, device: torch.device, folder: Path) -> Run:
    """A run that keeps nothing."""
    return Run("cost", data, device, "full", folder, Checkpoints(folder, {}, resume=False))


def row(experiment: str, network: str, seconds: float, steps: int, trainings: int) -> Any:
    """One line of the table."""
    return {
        "experiment": experiment,
        "network": network,
        "seconds_per_step": seconds,
        "steps": steps,
        "trainings": trainings,
        "hours": seconds * steps * trainings / 3600,
    }


def tell(result: dict[str, Any]) -> dict[str, str]:
    """The section of bench/results/README.md: what was not run, and why."""
    where = result["machine"]
    on = where["cpu"] if where["device"] == "cpu" else where["device"]
    total: dict[str, float] = {}
    for line in result["rows"]:
        total[line["experiment"]] = total.get(line["experiment"], 0.0) + line["hours"]
    needs = " and ".join(f"{name} {hours:,.0f} hours" for name, hours in total.items())
    lines = [
        "### The full forms of the denoising and the flow: not run",
        "",
        f"On this machine ({on}, {where['threads']} thread(s)) the full forms would need about "
        f"{needs} of training, so smaller ones stand below. Seconds are the processor's on a CPU. "
        "They are of the first steps of each training, when the solves still take few evaluations: "
        "an estimate from below.",
        "",
        "| experiment | network | seconds per step | steps | trainings | hours |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {line['experiment']} | {line['network']} | {line['seconds_per_step']:.2f} "
        f"| {line['steps']:,} | {line['trainings']} | {line['hours']:.1f} |"
        for line in result["rows"]
    ]
    return {"readme": "\n".join(lines)}


if __name__ == "__main__":
    main()
