"""Tables, plots and the README's results section, from the benchmark's JSON.

python -m bench.report bench/out/throughput.json     # the terminal tables again
python -m bench.report --readme                      # README.md from bench/results/*.json
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from bench.record import skipped_lines

WIDTH = 100
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COLUMNS = (
    "library", "solved", "steps", "fwd/s", "time / ours", "grad.", "fwd+bwd/s", "time / ours", "MB",
)  # fmt: skip

Table = list[tuple[str, ...]]


def text(results: dict[str, Any]) -> str:
    """Everything measured, as tables at most 100 columns wide."""
    lines: list[str] = []
    for layer in results["training"]:
        last = layer["history"][-1]
        lines += wrapped(
            [
                f"{layer['name']}: {len(layer['history'])} epochs, train loss {last['loss']:.3f}, "
                f"test {layer['metric']} {layer['score']:.3f}, {last['solved']:.1%} of solves "
                f"converged, {last['steps']:.1f} steps per sample"
            ]
        )
    lines += ["", *wrapped([LEGEND])]
    for problem in results["problems"]:
        for table in problem["tables"]:
            lines += ["", title(problem, table["batch"]), *aligned(fitting_table(table))]
            lines += wrapped(left_out(table))
        ran = settings(problem) if problem["tables"] else []
        lines += wrapped(ran + faster(problem) + not_run(problem))
        if problem.get("contamination"):
            lines += ["", CONTAMINATION, *aligned(contamination_table(problem))]
            lines += ["", LOSS_SCALE, *aligned(loss_scale_table(problem))]
    lines += ["", *wrapped(skipped_lines(results["skipped"]))]
    if "total_seconds" in results:
        lines.append(
            f"{results['training_seconds']:.0f} s of training, "
            f"{results['total_seconds']:.0f} s in all"
        )
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """The same for README: the main tables, the settings, and where it was measured."""
    where = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    commits = {problem.get("commit", where["commit"]): None for problem in results["problems"]}
    parts = [
        f"### Throughput against other libraries on {where['device']}",
        f"Measured on {where['cpu'] if where['device'] == 'cpu' else where['device']}, "
        f"{where['threads']} thread(s), Python {where['python']}, {versions}, commit "
        f"{' and '.join(commits)}, {where['date']}: `{where['command']}`.",
        LEGEND,
    ]
    for problem in results["problems"]:
        if not problem["tables"]:
            parts += not_run(problem)
            continue
        table = main_table(problem)
        parts += [f"**{title(problem, table['batch'])}**", piped(throughput_table(table))]
        parts += [*faster(problem), *not_run(problem), *beyond(problem)]
        if problem.get("contamination"):
            parts += [f"**{CONTAMINATION}**", piped(contamination_table(problem))]
            parts += [f"**{LOSS_SCALE}**", piped(loss_scale_table(problem))]
    parts += skipped_lines(results["skipped"], 8)
    return "\n\n".join(parts)


LEGEND = (
    "solved: share of samples whose residual, recomputed in float64, meets the target; steps: "
    "evaluations of g per sample, mean/most; grad.: share of samples whose gradient meets the "
    "gradient error named above the table; fwd/s and fwd+bwd/s: samples per second that do; time / "
    "ours: the row's time over fpi_cuda Anderson's, median (least-most) of paired rounds, below 1 "
    "is faster than it; MB: peak memory beyond the inputs; -: no backward ran."
)
CAPTION = (
    "The pictures show each library at its best settings. A residual trace ends at the last "
    "evaluation of g, whose value is what some libraries return: one step beyond the line."
)
CONTAMINATION = "Batch contamination: how 32 easy samples fare beside 32 hard or NaN ones"
LOSS_SCALE = "Largest gradient error of a sample, by loss scale"


def main_table(problem: dict[str, Any]) -> dict[str, Any]:
    """The batch size at which settings were chosen and memory was measured."""
    tables: list[dict[str, Any]] = problem["tables"]
    return max(tables, key=lambda table: "peak_bytes" in table["rows"][0])


def title(problem: dict[str, Any], batch: int) -> str:
    """What one table shows."""
    return (
        f"{problem['name']}: B={batch}, d={problem['features']}, {problem['dtype']}, "
        f"true residual {problem['rtol']:g}, gradient error {problem['gradient_rtol']:.1g}"
    )


def fitting_table(table: dict[str, Any]) -> Table:
    """The same without the ranges where they would make it too wide for the terminal."""
    full = throughput_table(table)
    fits = max(map(len, aligned(full))) <= WIDTH
    return full if fits else throughput_table(table, ranges=False)


def throughput_table(table: dict[str, Any], *, ranges: bool = True) -> Table:
    """Rows of COLUMNS: samples converged per second, and time over fpi_cuda Anderson's."""
    rows: Table = [COLUMNS]
    rows += [
        (
            row["label"],
            share(row["solved"]),
            f"{row['steps_mean']:.0f}/{row['steps_max']:.0f}",
            *_timing(row["forward"], ranges),
            share(row["gradient_solved"]) if "both" in row else "-",
            *_timing(row.get("both"), ranges),
            f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else "",
        )
        for row in table["rows"]
    ]
    return rows if any(row[-1] for row in rows[1:]) else [row[:-1] for row in rows]


def _timing(timing: dict[str, Any] | None, ranges: bool) -> tuple[str, str]:
    if timing is None:
        return "-", "-"
    ratio = timing.get("time_over_baseline")
    shown = two(ratio["median"]) if ratio else ""
    if ratio and ranges:
        shown += f" ({two(ratio['min'])}-{two(ratio['max'])})"
    return rate(timing["solved_per_second"]), shown


def contamination_table(problem: dict[str, Any]) -> Table:
    """How far an easy sample's answer moves, and whether it is still solved."""
    head = ("library", "hard: moved", "solved", "NaN: moved", "solved", "steps", "with NaN")
    rows: Table = [head]
    for item in problem["contamination"]:
        hard, nan, easy = item["hard"], item["nan"], item["easy"]
        rows.append(
            (
                item["label"],
                *_moved(hard),
                *_moved(nan),
                _steps(easy),
                _steps(nan),
            )
        )
    return rows


def _moved(case: dict[str, Any]) -> tuple[str, str]:
    if "error" in case:
        return case["error"], share(0.0)
    return number(case["moved"]), share(case["solved"])


def _steps(case: dict[str, Any]) -> str:
    return f"{case['steps']:.0f}" if "steps" in case else "-"


def loss_scale_table(problem: dict[str, Any]) -> Table:
    """Relative gradient errors, one column for each scale."""
    items = [item for item in problem["loss_scale"] if "setting" in item]
    scales = [key for key in items[0] if key not in ("label", "setting")] if items else []
    rows: Table = [("library", *(f"loss x {scale}" for scale in scales))]
    rows += [(item["label"], *(number(item[scale]) for scale in scales)) for item in items]
    return rows


def settings(problem: dict[str, Any]) -> list[str]:
    """Which settings stand behind each row."""
    lines = []
    for row in main_table(problem)["rows"]:
        line = f"{row['label']}: {row['setting']}, tolerance {row['tol']:.2g}"
        if "both_setting" in row:
            other = "" if row["both_setting"] == row["setting"] else f"{row['both_setting']}, "
            line += (
                f"; backward: {other}tolerance {row['adjoint_tol']:.2g}, "
                f"{share(row['gradient_solved'])} within the gradient error"
            )
        lines.append(line)
    return lines


def not_run(problem: dict[str, Any]) -> list[str]:
    """Which rows there are not, and why; labels with the same reason share a line."""
    reasons: dict[str, list[str]] = {}
    for label, why in problem["failed"].items():
        reasons.setdefault(grouped(why), []).append(label)
    return [f"not run: {', '.join(labels)}: {why}" for why, labels in reasons.items()]


def grouped(why: str) -> str:
    """ "setting: reason; setting: reason" with the settings counted where a reason comes again."""
    settings: dict[str, list[str]] = {}
    for part in why.split("; "):
        setting, colon, reason = part.partition(": ")
        settings.setdefault(reason if colon else part, []).append(setting)
    return (
        "; ".join(
            f"{len(names)} settings: {reason}" if len(names) > 1 else f"{names[0]}: {reason}"
            for reason, names in settings.items()
            if names[0] != reason
        )
        or why
    )


FASTER = 0.95
"""A row is called faster where its median time over fpi_cuda Anderson's is below this."""


def faster(problem: dict[str, Any]) -> list[str]:
    """Where another library beats fpi_cuda Anderson: the fastest of them at every batch size."""
    lines = []
    for key, what in (("forward", "forward"), ("both", "forward+backward")):
        found: dict[str, list[str]] = {}
        for table in problem["tables"]:
            ratios = {
                row["label"]: row[key]["time_over_baseline"]["median"]
                for row in table["rows"]
                if key in row and row["library"] != "fpi_cuda" and row["solved"] == 1.0
            }
            label = min(ratios, key=lambda label: ratios[label], default="")
            if label and ratios[label] < FASTER:
                found.setdefault(label, []).append(f"{two(ratios[label])} at B={table['batch']}")
        lines += [
            f"faster than fpi_cuda Anderson, {what}: {label}: {', '.join(where)} of its time"
            for label, where in found.items()
        ]
    return lines


def left_out(table: dict[str, Any]) -> list[str]:
    """The rows that are missing at this batch size only, and why."""
    return [f"left out: {label}: {why}" for label, why in table.get("left_out", {}).items()]


def beyond(problem: dict[str, Any]) -> list[str]:
    """What is left out at the other batch sizes, a line for each size."""
    return [
        f"B={table['batch']}, " + "; ".join(left_out(table))
        for table in problem["tables"]
        if table.get("left_out")
    ]


def rate(value: float) -> str:
    """At most five characters for anything below a million."""
    if value < 9_999.5:
        return f"{value:,.0f}"
    return f"{value / 1000:.1f}k" if value < 99_950 else f"{value / 1000:,.0f}k"


def two(value: float) -> str:
    """Two significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"


def share(value: float) -> str:
    """A percentage that reads 100 only where nothing is missing."""
    return "100%" if value == 1.0 else f"{min(100 * value, 99.9):.3g}%"


def number(value: float | str | None) -> str:
    """A magnitude, or whatever stands in its place; None is not finite."""
    if value is None:
        return "not finite"
    return value if isinstance(value, str) else f"{value:.1e}"


def aligned(table: Table) -> list[str]:
    """Columns padded: the first to the left, the others to the right; closer where it is tight."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else " "
    lines = []
    for first, *rest in table:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append(gap.join([first.ljust(widths[0]), *cells]))
    return lines


def wrapped(lines: list[str]) -> list[str]:
    """Long lines broken at WIDTH, continued with an indent."""
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="    ")]


def piped(table: Table) -> str:
    """A Markdown table."""
    head, *body = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([head, "| --- |" + " ---: |" * (len(table[0]) - 1), *body])


def update_readme(readme: Path, folder: Path) -> None:
    """Replace what lies between the markers of `readme` by the sections of `folder`/*.json.

    A result brings its own section as "readme", or is one of the throughput benchmark.

    Raises:
        ValueError: the markers are missing.
    """
    old = readme.read_text()
    if BEGIN not in old or END not in old:
        raise ValueError(f"update_readme: {readme} must hold {BEGIN} and {END}")
    before, rest = old.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    sections: list[str] = []
    told: list[str] = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        if results.get("kind") == "throughput":
            shown = pictures(path, readme.parent)
            sections += [markdown(results), *([CAPTION, *shown] if shown else [])]
        elif "readme" in results:
            told.append(results["readme"].strip())
    body = "\n\n".join(sections + told)
    readme.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")


def pictures(results: Path, root: Path) -> list[str]:
    """Markdown for the plots that lie beside a result as <its name>-<what>.png."""
    found = sorted(results.parent.glob(f"{results.stem}-*.png"))
    names = [(path.stem.removeprefix(f"{results.stem}-"), path.relative_to(root)) for path in found]
    return [f"![{name} of {results.stem}]({path.as_posix()})" for name, path in names]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="JSON files to print")
    parser.add_argument("--readme", action="store_true", help="regenerate README.md's tables")
    options = parser.parse_args()
    root = Path(__file__).parent.parent
    for path in options.results:
        print(text(json.loads(path.read_text())))
    if options.readme:
        update_readme(root / "README.md", root / "bench" / "results")


if __name__ == "__main__":
    main()
