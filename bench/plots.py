"""The benchmark's pictures: throughput over batch size, and steps."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

DPI = 75
NUM_COLOURS = 32

COLOURS = {
    "fpi_cuda": "#c1121f",
    "torch loop": "#6c757d",
    "torch.compile": "#212529",
    "torchdeq": "#1d6fb8",
    "xitorch": "#7b2cbf",
    "jaxopt": "#2a9d43",
    "optimistix": "#e08e00",
}
LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "v", "D", "x")


def plot(results: dict[str, Any], path: Path) -> list[Path]:
    """Write the pictures of a results file beside it: <its name>-throughput.png and so on.

    Of cells; users' own maps are in the tables.
    """
    cells = [p for p in results["problems"] if p["tables"] and not p.get("own")]
    results = results | {"problems": cells}
    if not results["problems"]:
        return []
    return [
        picture(results, path.with_name(f"{path.stem}-{picture.__name__}.png"))
        for picture in (throughput, steps)
    ]


def throughput(results: dict[str, Any], path: Path) -> Path:
    """Samples converged per second over the batch size, log-log: one row of panels a problem."""
    problems = results["problems"]
    figure, grid = plt.subplots(
        len(problems), 2, figsize=(10.5, 3.1 * len(problems) + 1.4), squeeze=False, sharex="row"
    )
    named: dict[str, Any] = {}
    ranks = ranks_of(problems)
    for row, problem in zip(grid, problems, strict=True):
        for axes, key in zip(row, ("forward", "both"), strict=True):
            for label, style, batches, rates in curves(problem, key, ranks):
                (named[label],) = axes.loglog(batches, rates, **style)
            axes.grid(True, which="major", alpha=0.3)
            batches = [table["batch"] for table in problem["tables"]]
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
            axes.yaxis.set_minor_locator(NullLocator())
            what = "forward" if key == "forward" else "forward + backward"
            axes.set_title(f"{problem['name']}, residual {problem['rtol']:g}: {what}", fontsize=9)
            axes.tick_params(labelsize=8)
        row[0].set_ylabel("samples converged / s", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("batch size", fontsize=8)
    labels = sorted(named, key=lambda label: list(ranks).index(label))
    legend = figure.legend(
        [named[label] for label in labels],
        labels,
        loc="upper center",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    figure.canvas.draw()
    top = legend.get_window_extent().y0 / figure.bbox.height
    figure.tight_layout(rect=(0, 0, 1, top))
    return saved(figure, path)


def is_drawn(label: str, labels: Iterable[str]) -> bool:
    """A library's defaults are in the tables; the plot has its best settings where it has any."""
    return label.replace("(default)", "(best)") == label or (
        label.replace("(default)", "(best)") not in labels
    )


Curve = tuple[str, dict[str, Any], list[int], list[float]]


def ranks_of(problems: list[dict[str, Any]]) -> dict[str, int]:
    """Which row of its library each drawn label is: its line style everywhere."""
    rows = [row for p in problems for table in p["tables"] for row in table["rows"]]
    libraries = {row["label"]: row["library"] for row in rows}
    seen: dict[str, int] = {}
    ranks = {}
    for label, library in libraries.items():
        if is_drawn(label, libraries):
            ranks[label] = seen.setdefault(library, 0)
            seen[library] += 1
    return ranks


def curves(problem: dict[str, Any], key: str, ranks: dict[str, int]) -> list[Curve]:
    """Label, line style, batch sizes and rates of every library that has such a timing."""
    points: dict[str, tuple[str, list[int], list[float]]] = {}
    for table in problem["tables"]:
        for row in table["rows"]:
            if row["label"] in ranks and key in row and row[key]["solved_per_second"] > 0:
                _, batches, rates = points.setdefault(row["label"], (row["library"], [], []))
                batches.append(table["batch"])
                rates.append(row[key]["solved_per_second"])
    drawn = []
    for label, (library, batches, rates) in points.items():
        index = ranks[label] % len(LINES)
        style = {
            "color": COLOURS.get(library, "black"),
            "linestyle": LINES[index],
            "marker": MARKERS[index],
            "markersize": 4,
            "linewidth": 2.6 if library == "fpi_cuda" and index == 0 else 1.2,
        }
        drawn.append((label, style, batches, rates))
    return drawn


def steps(results: dict[str, Any], path: Path) -> Path:
    """Histogram of evaluations per sample, one panel for each problem."""
    problems = results["problems"]
    columns = min(3, len(problems))
    rows = -(-len(problems) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.3 * rows), squeeze=False)
    panels = list(grid.flat)
    for axes, problem in zip(panels, problems, strict=False):
        histogram(axes, problem["steps"])
        axes.set_title(f"{problem['name']}, residual {problem['rtol']:g}", fontsize=10)
        axes.set_xlabel("evaluations of g per sample", fontsize=9)
        axes.set_ylabel("samples", fontsize=9)
    for axes in panels[len(problems) :]:
        axes.set_axis_off()
    figure.tight_layout()
    return saved(figure, path)


WIDE = 20
"""Evaluations are drawn on a log axis where the most are this many times the fewest."""


def histogram(axes: Axes, counts: dict[str, list[int]]) -> None:
    """Bars where samples differ; a line where a library gives all samples the same number."""
    every = [count for values in counts.values() for count in values]
    least, most = min(every), max(every)
    bins: list[float]
    if most > WIDE * least:
        # Between whole numbers, so that no bar stands for none of them.
        bins = sorted({int(least * (most / least) ** (k / 40)) - 0.5 for k in range(40)})
        bins.append(most + 0.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        width = max(1, (most - least) // 60 + 1)
        bins = [edge - width / 2 for edge in range(least, most + 2 * width, width)]
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    palette = ("#c1121f", "#f4a6a6", "#1d6fb8", "#2a9d43")
    for colour, (label, values) in zip(palette, counts.items(), strict=False):
        if min(values) == max(values):
            axes.axvline(values[0], color=colour, label=f"{label} (all)")
        else:
            axes.hist(values, bins=bins, color=colour, alpha=0.8, label=label)
    axes.margins(x=0.05)
    axes.set_ylim(top=1.45 * axes.get_ylim()[1])  # room for the legend
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, framealpha=0.9, loc="upper right")


def saved(figure: Any, path: Path) -> Path:
    """Write a figure, in few colours so that it is small, and close it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    plt.close(figure)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(NUM_COLOURS).save(path, optimize=True)
    return path
