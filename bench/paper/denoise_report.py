"""Denoising: the pictures, the table and the finding, from the figures of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from bench.paper.experiment import section, stem_of
from bench.paper.images import psnr
from bench.plots import plt, saved

PAPER_GAPS = {"15": 0.25, "20": 0.56, "25": 0.65}
CROP = 128
PICKED = {
    "medium": " Rate and norm bound were picked for FPI_NN at sigma 25, on 20 training images held "
    "out; the rate was the best of three for the feedforward network, too."
}
"""How the settings of a size were chosen, where they are not the full form's."""


def interval_text(values: dict[str, float], sign: str = "") -> str:
    """28.31 [27.50, 29.20]."""
    return f"{values['mean']:{sign}.2f} [{values['low']:{sign}.2f}, {values['high']:{sign}.2f}]"


def tell(result: dict[str, Any]) -> dict[str, str]:
    """The finding, and the section of bench/results/README.md with it."""
    size = result["size"]
    found = finding(result, size)
    stem = stem_of("denoise", size)
    worst = max(result["levels"], key=int)
    pictures = {
        f"{stem}-sigma{worst}": f"before and after, sigma {worst}",
        stem: "training PSNR over epochs and seconds, and steps",
    }
    shown = table(result, size, result["config"])
    title = "The paper's image denoising"
    return {"finding": found, "readme": section(title, found, shown, pictures, result["machine"])}


def table(result: dict[str, Any], size: str, config: dict[str, Any]) -> str:
    """A markdown table: one row per noise level, test set and network."""
    lines = [
        "| sigma | test set | network | PSNR, dB | FPI_NN minus this | solves at the cap | steps "
        "| training, s | parameters |",
        "| --- " * 9 + "|",
    ]
    for sigma, level in result["levels"].items():
        for folder, methods in level["psnr"].items():
            lines.append(
                f"| {sigma} | {folder} | noisy | {level['before'][folder]:.2f} | | | | | |"
            )
            for method, values in methods.items():
                trained = [training[method] for training in level["trainings"]]
                solves = trained[0]["sets"][folder]["solves"]
                gap = level["gaps"][folder].get(method)
                lines.append(
                    f"| {sigma} | {folder} | {method} | {interval_text(values)} | "
                    + ("" if gap is None else interval_text(gap, "+"))
                    + (f" | {solves['at_cap']:.1%} | {solves['steps']:.1f}" if solves else " | | ")
                    + f" | {sum(entry['seconds'] for entry in trained[0]['history']):.0f} "
                    + f"| {trained[0]['parameters']:,} |"
                )
    steps = config["epochs"] * config["batches"]
    lines += [
        "",
        f"Size: {size} ({config['channels']} channels, {config['depth'] + 1} convolutions in g, "
        f"{steps:,} steps of {config['batch']} crops of {config['patch']} x {config['patch']} "
        f"pixels, {config['seeds']} seed{'s' if config['seeds'] > 1 else ''}). 95% bootstrap "
        f"intervals over test images and seeds; gaps are paired by image.{PICKED.get(size, '')}",
    ]
    return "\n".join(lines)


def finding(result: dict[str, Any], size: str) -> str:
    """What was found, said plainly; every word that judges depends on a figure."""
    if size == "smoke":
        return "This is the smoke form: it shows that the experiment runs, and settles nothing."
    parts = [] if size == "full" else [f"At the {size} size, far below the paper's:"]
    for sigma, level in result["levels"].items():
        for method in ("feedforward, equal steps", "feedforward, equal time"):
            gaps = {folder: methods[method] for folder, methods in level["gaps"].items()}
            text = " and ".join(
                f"{interval_text(gap, '+')} dB on {folder}" for folder, gap in gaps.items()
            )
            parts.append(f"sigma {sigma}: FPI_NN minus {method}: {text};")
        at_cap = {
            folder: entry["solves"]["at_cap"]
            for folder, entry in level["trainings"][0]["FPI_NN"]["sets"].items()
        }
        last = level["trainings"][0]["FPI_NN"]["history"][-1]
        parts.append(
            f"{last['at_cap']:.1%} of the last epoch's solves hit the cap, in the test "
            + ", ".join(f"{share:.1%} on {folder}" for folder, share in at_cap.items())
            + "."
        )
        parts.append(verdict(sigma, level))
    if result.get("unfinished"):
        missing = " and ".join(str(sigma) for sigma in sorted(result["unfinished"]))
        parts.append(f"**Not run to its end**, for want of time: sigma {missing}.")
    return " ".join(parts)


def verdict(sigma: str, level: dict[str, Any]) -> str:
    """Whether the paper's gap is there, at equal steps and at equal time, with the figures."""
    gaps = level["gaps"]["bsd68"]
    steps, time = (gaps[f"feedforward, equal {what}"] for what in ("steps", "time"))
    paper = PAPER_GAPS[sigma]
    if min(steps["mean"], time["mean"]) >= paper:
        word = "**Reproduced**"
    elif steps["mean"] >= paper:
        word = "**Reproduced at equal steps only**"
    elif steps["low"] > 0:
        word = "**Reproduced in part**"
    else:
        word = "**Not reproduced**"
    return (
        f"{word}: the paper's gain of {paper:+.2f} dB at sigma {sigma} (on other images); here it "
        f"is {steps['mean']:+.2f} dB on bsd68 at equal steps, {time['mean']:+.2f} dB at equal time."
    )


def show(pictures: dict[str, Tensor], path: Path) -> Path:
    """The middle of one test image, clean, noisy and restored, with the PSNR of the whole."""
    clean = pictures["clean"]
    top, left = (max(0, (n - CROP) // 2) for n in clean.shape)
    figure, row = plt.subplots(1, len(pictures), figsize=(2.9 * len(pictures), 3.5))
    for axes, (name, picture) in zip(row, pictures.items(), strict=True):
        part = picture[top : top + CROP, left : left + CROP].clamp(0, 1)
        axes.imshow(part.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        title = name if name == "clean" else f"{name}\n{psnr(picture, clean):.2f} dB"
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return saved(figure, path)


def plot(result: dict[str, Any], path: Path) -> Path:
    """Training PSNR over steps and over time, and the steps of the solves, per noise level."""
    levels = result["levels"]
    figure, grid = plt.subplots(len(levels), 3, figsize=(12.5, 3.3 * len(levels)), squeeze=False)
    for row, (sigma, level) in zip(grid, levels.items(), strict=True):
        for method, colour in COLOURS.items():
            history = level["trainings"][0][method]["history"]
            epochs = range(1, len(history) + 1)
            clock = [sum(entry["seconds"] for entry in history[:k]) for k in epochs]
            quality = [entry["psnr"] for entry in history]
            # On top: the two feedforward networks begin alike.
            style = {"color": colour, "label": method, "zorder": 3 if "steps" in method else 2}
            row[0].plot(epochs, quality, **style)
            row[1].plot(clock, quality, **style)
            if "steps" in history[0]:
                steps = [entry["steps"] for entry in history]
                adjoint = [entry["adjoint_steps"] for entry in history]
                row[2].plot(epochs, steps, color=colour, label="forward")
                row[2].plot(epochs, adjoint, color=colour, linestyle="--", label="adjoint")
        row[0].set_xscale("log")
        row[0].set_xlabel("epoch")
        row[1].set_xlabel("seconds of training")
        row[2].set_xlabel("epoch")
        row[0].set_ylabel("training PSNR, dB")
        row[2].set_ylabel("evaluations per sample")
        for axes in row:
            axes.set_title(f"sigma {sigma}", fontsize=9)
            axes.grid(True, alpha=0.3)
            axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return saved(figure, path)


COLOURS = {
    "FPI_NN": "#c1121f",
    "feedforward, equal steps": "#1d6fb8",
    "feedforward, equal time": "#6c757d",
}
