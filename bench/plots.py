"""The benchmark's pictures: throughput over batch size, steps, residual traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

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


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write throughput.png, steps.png and traces.png to `folder`."""
    return [
        throughput(results, folder / "throughput.png"),
        steps(results, folder / "steps.png"),
        traces(results, folder / "traces.png"),
    ]


def throughput(results: dict[str, Any], path: Path) -> Path:
    """Samples converged per second over the batch size, log-log: forward above, both below."""
    problems = results["problems"]
    figure, grid = plt.subplots(
        2, len(problems), figsize=(4.2 * len(problems) + 3, 7.5), squeeze=False, sharex="col"
    )
    named: dict[str, Any] = {}
    ranks = ranks_of(problems)
    for column, problem in zip(grid.T, problems, strict=True):
        for axes, key in zip(column, ("forward", "both"), strict=True):
            for label, style, batches, rates in curves(problem, key, ranks):
                (named[label],) = axes.loglog(batches, rates, **style)
            axes.grid(True, which="major", alpha=0.3)
            batches = [table["batch"] for table in problem["tables"]]
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.minorticks_off()
        column[0].set_title(f"{problem['name']}, residual {problem['rtol']:g}")
        column[1].set_xlabel("batch size")
    grid[0, 0].set_ylabel("forward: samples converged / s")
    grid[1, 0].set_ylabel("forward + backward: samples / s")
    figure.legend(named.values(), named.keys(), loc="center right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1 - 2.6 / figure.get_figwidth(), 1))
    return saved(figure, path)


Curve = tuple[str, dict[str, Any], list[int], list[float]]


def ranks_of(problems: list[dict[str, Any]]) -> dict[str, int]:
    """Which row of its library each label is, over all problems: its line style everywhere."""
    rows = [row for p in problems for table in p["tables"] for row in table["rows"]]
    libraries = {row["label"]: row["library"] for row in rows}
    seen: dict[str, int] = {}
    ranks = {}
    for label in sorted(libraries):
        library = libraries[label]
        ranks[label] = seen.setdefault(library, 0)
        seen[library] += 1
    return ranks


def curves(problem: dict[str, Any], key: str, ranks: dict[str, int]) -> list[Curve]:
    """Label, line style, batch sizes and rates of every library that has such a timing."""
    points: dict[str, tuple[str, list[int], list[float]]] = {}
    for table in problem["tables"]:
        for row in table["rows"]:
            if key in row and row[key]["solved_per_second"] > 0:
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
    figure, row = plt.subplots(1, len(problems), figsize=(4.6 * len(problems), 3.6), squeeze=False)
    for axes, problem in zip(row[0], problems, strict=True):
        histogram(axes, problem["steps"])
        axes.set_title(f"{problem['name']}, residual {problem['rtol']:g}")
        axes.set_xlabel("evaluations of g per sample")
    row[0, 0].set_ylabel("samples")
    figure.tight_layout()
    return saved(figure, path)


def histogram(axes: Axes, counts: dict[str, list[int]]) -> None:
    """Bars where samples differ; a line where a library gives all samples the same number."""
    every = [count for values in counts.values() for count in values]
    width = max(1, (max(every) - min(every)) // 60 + 1)
    bins = range(min(every), max(every) + 2 * width, width)
    palette = ("#c1121f", "#f4a6a6", "#1d6fb8", "#2a9d43")
    for colour, (label, values) in zip(palette, counts.items(), strict=False):
        if min(values) == max(values):
            axes.axvline(values[0], color=colour, label=f"{label} (all)")
        else:
            axes.hist(values, bins=bins, align="left", color=colour, alpha=0.8, label=label)
    axes.margins(x=0.05)
    axes.legend(fontsize=8, framealpha=0.9)


def traces(results: dict[str, Any], path: Path) -> Path:
    """Relative residual of each sample over evaluations: one row a problem, one panel a solver."""
    problems = results["problems"]
    columns = max(len(problem["traces"]) for problem in problems)
    figure, grid = plt.subplots(
        len(problems),
        columns,
        figsize=(3.6 * columns, 2.7 * len(problems)),
        squeeze=False,
        sharey="row",
        sharex="row",
    )
    for row, problem in zip(grid, problems, strict=True):
        for axes, (label, samples) in zip(row, problem["traces"].items(), strict=False):
            for sample in samples:
                axes.semilogy(range(1, len(sample) + 1), sample, linewidth=0.8, alpha=0.7)
            axes.axhline(problem["rtol"], color="black", linewidth=0.8, linestyle="--")
            axes.set_title(f"{problem['name']}: {label}", fontsize=8)
            axes.grid(True, alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        row[0].set_ylabel("||g(x) - x|| / ||g(x)||", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("evaluations of g", fontsize=8)
    figure.tight_layout()
    return saved(figure, path)


def saved(figure: Any, path: Path) -> Path:
    """Write and close a figure."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
