"""Optical flow: the pictures, the table and the finding, from the figures of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.paper.experiment import section, stem_of
from bench.paper.flow_colours import colour_coded
from bench.plots import plt, saved

COLOURS = {"FlowNetS": "#1d6fb8", "FlowNetS + FPI": "#c1121f"}
LEARNED = 0.7
"""A network has learned flow where its error is below this share of that of no motion."""

SETS = {"test": "test pairs", "examples": "Flying Chairs examples"}


def interval_text(values: dict[str, float], sign: str = "") -> str:
    """2.31 [2.10, 2.52]."""
    return f"{values['mean']:{sign}.3f} [{values['low']:{sign}.3f}, {values['high']:{sign}.3f}]"


def tell(result: dict[str, Any]) -> dict[str, str]:
    """The finding, and the section of bench/results/README.md with it."""
    size = result["size"]
    found = finding(result, size)
    shown = table(result, size, result["config"])
    title = "The paper's optical flow"
    stem = stem_of("flow", size)
    pictures = {stem: "aEPE per epoch, and steps"} | {
        f"{stem}-width{float(width):g}": f"flows at width {width}" for width in result["widths"]
    }
    return {"finding": found, "readme": section(title, found, shown, pictures, result["machine"])}


def table(result: dict[str, Any], size: str, config: dict[str, Any]) -> str:
    """A markdown table: one row per width, set of pairs and network."""
    lines = [
        "| width | pairs | network | aEPE, px | FPI minus plain | solved | steps | parameters |",
        "| --- " * 8 + "|",
    ]
    for width, entry in result["widths"].items():
        for key, methods in entry["aepe"].items():
            for method, values in methods.items():
                training = entry["trainings"][method][0]
                last, solves = training["history"][-1], training["solves"]
                gap = entry["fpi_minus_plain"][key] if solves else None
                lines.append(
                    f"| {width} | {SETS[key]} | {method} | {interval_text(values)} | "
                    + ("" if gap is None else interval_text(gap, "+"))
                    + (f" | {last['solved']:.1%} | {last['steps']:.1f}" if solves else " | | ")
                    + f" | {entry['parameters'][method]:,} |"
                )
    steps = config["epochs"] * config["batches"]
    still = next(iter(result["widths"].values()))["no_motion"]["test"]
    lines += [
        "",
        f"Size: {size} ({steps:,} steps of {config['batch']} {result['pairs']} pairs of "
        f"{config['size']} x {config['size']} pixels, {config['seeds']} seeds). Predicting no "
        f"motion has aEPE {still:.3f} on the test pairs. 95% bootstrap intervals over seeds and "
        "pairs; the difference is paired, below zero is better with the layer.",
    ]
    return "\n".join(lines)


def finding(result: dict[str, Any], size: str) -> str:
    """What was found, said plainly; every word that judges depends on a figure."""
    if size == "smoke":
        return "This is the smoke form: it shows that the experiment runs, and settles nothing."
    parts = [] if size == "full" else [f"At the {size} size, far below the paper's:"]
    for width, entry in result["widths"].items():
        best = min(values["mean"] for values in entry["aepe"]["test"].values())
        still = entry["no_motion"]["test"]
        learned = best <= LEARNED * still
        claim = " (the paper's claim is **not reproduced**)" if learned else ""
        for key, gap in entry["fpi_minus_plain"].items():
            if gap["high"] < 0:
                verdict = "lowers the endpoint error"
            elif gap["low"] > 0:
                verdict = f"raises the endpoint error{claim}"
            else:
                verdict = f"makes no difference to tell{claim}"
            parts.append(
                f"at width {width} the fixed-point layer {verdict} on the {SETS[key]}: "
                f"{interval_text(gap, '+')} pixels;"
            )
        if not learned:
            parts.append(
                f"no network has learned much yet (the best aEPE is {best:.3f}, predicting no "
                f"motion has {still:.3f}): the paper's claim is **not reproduced**, nor refuted;"
            )
        solved = [item["history"][-1]["solved"] for item in entry["trainings"]["FlowNetS + FPI"]]
        parts.append(
            f"in every seed at least {min(solved):.1%} of the last epoch's solves converged."
        )
    return " ".join(parts)


def show(rows: list[dict[str, Tensor]], path: Path) -> Path:
    """One pair a row: images, and flows in colours scaled by the longest true vector."""
    figure, grid = plt.subplots(
        len(rows), len(rows[0]), figsize=(2.7 * len(rows[0]), 2.7 * len(rows)), squeeze=False
    )
    for axes_row, row in zip(grid, rows, strict=True):
        truth = row["true flow"]
        longest = float(truth.norm(dim=0).max())
        for axes, (name, picture) in zip(axes_row, row.items(), strict=True):
            title = name
            if picture.shape[0] == 2:
                axes.imshow(colour_coded(picture, longest))
                if name != "true flow":
                    title += f"\naEPE {float((picture - truth).norm(dim=0).mean()):.2f}"
            else:
                axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
            axes.set_title(title, fontsize=9)
            axes.set_axis_off()
    figure.tight_layout(rect=(0.05, 0, 1, 0.97))
    wheel(figure)
    return saved(figure, path)


def wheel(figure: Any) -> None:
    """The key to the colours, in the corner."""
    line = torch.linspace(-1, 1, 101)
    down, right = torch.meshgrid(line, line, indexing="ij")
    key = colour_coded(torch.stack((right, down)), 1.0)
    key[(right**2 + down**2 > 1).numpy()] = 1.0
    axes = figure.add_axes((0.0, 0.45, 0.05, 0.1))
    axes.imshow(key)
    axes.set_axis_off()
    axes.set_title("direction", fontsize=7)


def plot(result: dict[str, Any], path: Path) -> Path:
    """aEPE over epochs, per width and set of pairs; one line a seed."""
    widths = result["widths"]
    keys = list(next(iter(widths.values()))["aepe"])
    figure, grid = plt.subplots(
        len(widths), len(keys) + 1, figsize=(4.2 * (len(keys) + 1), 3.4 * len(widths)),
        squeeze=False,
    )  # fmt: skip
    for row, (width, entry) in zip(grid, widths.items(), strict=True):
        for axes, key in zip(row, keys, strict=False):
            for method, trainings in entry["trainings"].items():
                for number, training in enumerate(trainings):
                    values = [item[f"{key}_aepe"] for item in training["history"]]
                    label = method if number == 0 else None
                    axes.plot(
                        range(1, len(values) + 1), values, color=COLOURS[method], label=label,
                        alpha=0.8, linewidth=1.2,
                    )  # fmt: skip
            axes.set_title(f"width {width}: {SETS[key]}", fontsize=9)
            axes.set_ylabel("aEPE, pixels")
        for number, training in enumerate(entry["trainings"]["FlowNetS + FPI"]):
            values = [item["steps"] for item in training["history"]]
            row[-1].plot(
                range(1, len(values) + 1), values, color=COLOURS["FlowNetS + FPI"],
                label="forward solve" if number == 0 else None,
            )  # fmt: skip
        row[-1].set_ylabel("evaluations per sample")
        for axes in row:
            axes.set_xlabel("epoch")
            axes.grid(True, alpha=0.3)
            axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return saved(figure, path)
