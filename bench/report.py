"""Tables and plots from the benchmark's JSON: for the terminal, and the pages of results.

python -m bench.report bench/out/throughput.json     # the terminal tables again
python -m bench.report --write    # bench/results/README.md and the table of README.md, anew
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
    """Everything measured, as tables at most 100 columns wide; what it comes to stands last."""
    lines: list[str] = []
    for problem in filter(is_own, results["problems"]):
        if problem["tables"]:
            lines += ["", *wrapped([own_title(problem)]), *aligned(own_table(problem))]
        lines += wrapped(compiling(problem) + beyond(problem) + not_run(problem))
    if "overhead" in results:
        lines += ["", *wrapped([OVERHEAD]), *aligned(overhead_table(results["overhead"]))]
    if "scaling" in results:
        lines += ["", *wrapped([SCALING]), *aligned(scaling_table(results["scaling"]))]
    lines.append("")
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
    for problem in (problem for problem in results["problems"] if not is_own(problem)):
        for table in problem["tables"]:
            lines += ["", title(problem, table["batch"]), *aligned(fitting_table(table))]
            lines += wrapped(left_out(table))
        lines += wrapped(compiling(problem) + not_run(problem))
        if problem.get("contamination"):
            lines += ["", CONTAMINATION, *aligned(contamination_table(problem))]
            lines += ["", LOSS_SCALE, *aligned(loss_scale_table(problem))]
    lines += ["", *wrapped(skipped_lines(results["skipped"]))]
    if "total_seconds" in results:
        lines.append(
            f"{results['training_seconds']:.0f} s of training, "
            f"{results['total_seconds']:.0f} s in all"
        )
    return "\n".join([*lines, "", *verdicts(results)])


def markdown(results: dict[str, Any]) -> str:
    """The same for the page: the main tables, and where it was measured."""
    where = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    commits = {problem.get("commit", where["commit"]): None for problem in results["problems"]}
    parts = [
        f"### Throughput against other libraries on {where['device']}",
        f"Measured on {where['cpu'] if where['device'] == 'cpu' else where['device']}, "
        f"{where['threads']} thread(s), Python {where['python']}, {versions}, commit "
        f"{' and '.join(commits)}, {where['date']}: `{where['command']}`.",
    ]
    for problem in filter(is_own, results["problems"]):
        if problem["tables"]:
            parts += [f"**{own_title(problem)}**", piped(own_table(problem))]
        parts += [*compiling(problem), *beyond(problem), *not_run(problem)]
    if "overhead" in results:
        parts += [f"**{OVERHEAD}**", piped(overhead_table(results["overhead"]))]
    if "scaling" in results:
        parts += [f"**{SCALING}**", piped(scaling_table(results["scaling"]))]
    parts.append(LEGEND)
    for problem in (problem for problem in results["problems"] if not is_own(problem)):
        if not problem["tables"]:
            parts += not_run(problem)
            continue
        table = main_table(problem)
        parts += [f"**{title(problem, table['batch'])}**", piped(throughput_table(table))]
        parts += [*faster(problem), *compiling(problem), *not_run(problem), *beyond(problem)]
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
    "is faster than it; MB: peak memory beyond the inputs; -: no backward ran; *: some samples "
    "miss a target, and the row is compared with nothing. torch loops write the cell out in addmm."
)
OVERHEAD = (
    "Besides the arithmetic: layer(z) at B=1, d=128 over one call of the op, and Python calls "
    "inside fpi_cuda, forward and with backward"
)
SCALING = "ns for a step of one sample, dense cell, d=32"
CAPTION = "The pictures show each library at its best settings."
CONTAMINATION = "Batch contamination: how 32 easy samples fare beside 32 hard or NaN ones"
LOSS_SCALE = "Largest gradient error of a sample, by loss scale"


def is_own(problem: dict[str, Any]) -> bool:
    """Whether its map is a user's."""
    return bool(problem.get("own"))


def met(row: dict[str, Any], key: str) -> bool:
    """Whether all samples meet the targets: of the residual, with the backward the gradient's."""
    return row["solved"] == 1.0 and (key == "forward" or row.get("gradient_solved") == 1.0)


def ratio(row: dict[str, Any], key: str) -> float | None:
    """Its time over ours, where both can be compared."""
    timed = row.get(key, {}).get("time_over_baseline")
    return timed["median"] if timed and met(row, key) else None


def own_title(problem: dict[str, Any]) -> str:
    """What the table of a user's map shows."""
    return (
        f"{problem['name']}, {problem['dtype']}, true residual {problem['rtol']:g}, gradient error "
        f"{problem['gradient_rtol']:.1g}: time over fpi_cuda Anderson's, forward / with backward"
    )


def own_table(problem: dict[str, Any]) -> Table:
    """A row for each library, a column for each batch; of the first row the time itself."""
    tables = problem["tables"]
    rows: Table = [("library", "g", *(f"B={table['batch']}" for table in tables))]
    by_batch = [{row["label"]: row for row in table["rows"]} for table in tables]
    for label in dict.fromkeys(label for held in by_batch for label in held):
        cells = [own_cell(held[label]) if label in held else "-" for held in by_batch]
        way = next(held[label]["way"] for held in by_batch if label in held)
        rows.append((label, way, *cells))
    if len(rows) > 1:
        first = [held.get(rows[1][0]) for held in by_batch]
        rows.insert(1, ("", "", *("" if row is None else own_seconds(row) for row in first)))
    return rows


def own_cell(row: dict[str, Any]) -> str:
    """Both ratios; * where a target is missed."""
    cells = []
    for key in ("forward", "both"):
        timed = row.get(key, {}).get("time_over_baseline")
        cells.append(two(timed["median"]) + ("" if met(row, key) else "*") if timed else "-")
    return " / ".join(cells)


def own_seconds(row: dict[str, Any]) -> str:
    """Both times of ours."""
    return (
        " / ".join(f"{1e6 * row[key]['seconds']:,.0f}" for key in ("forward", "both") if key in row)
        + " µs"
    )


def compiling(problem: dict[str, Any]) -> list[str]:
    """How long compilers took before the first solve, at the batch where that was longest."""
    found: dict[str, float] = {}
    for table in problem["tables"]:
        for row in table["rows"]:
            if "compile_seconds" in row:
                label = row["label"]
                found[label] = max(found.get(label, 0.0), row["compile_seconds"])
    told = ", ".join(f"{label} {seconds:.0f} s" for label, seconds in found.items())
    return [f"compiled before, for one batch size: {told}"] if told else []


def overhead_table(rows: list[dict[str, Any]]) -> Table:
    """A line for each g and solver."""
    table: Table = [("g", "solver", "op, µs", "layer, µs", "layer / op", "calls", "with backward")]
    return table + [
        (
            row["g"],
            row["solver"],
            f"{1e6 * row['op_seconds']:.0f}",
            f"{1e6 * row['seconds']:.0f}",
            two(row["over_op"]),
            str(row["calls"]),
            str(row["calls_with_backward"]),
        )
        for row in rows
    ]


def scaling_table(rows: list[dict[str, Any]]) -> Table:
    """A line for each solver, a column for each batch."""
    table: Table = [("solver", *(f"B={row['batch']:,}" for row in rows))]
    return table + [
        (name, *(f"{1e9 * row[name]:.1f}" for row in rows)) for name in ("Picard", "Anderson")
    ]


MOST_VERDICTS = 10


def verdicts(results: dict[str, Any]) -> list[str]:
    """Ten lines: who is ahead, our fastest row or the fastest of all others, and by how much."""
    own = [problem for problem in results["problems"] if is_own(problem)][: MOST_VERDICTS // 2 - 1]
    cells = [problem for problem in results["problems"] if not is_own(problem)]
    lines = []
    for problem in own + cells:
        tables = {table["batch"]: table for table in problem["tables"]}
        chosen = {min(tables), MIDDLE if MIDDLE in tables else max(tables)} if tables else set()
        for batch in sorted(chosen):
            said = [
                f"{what} {verdict(tables[batch], key)}"
                for key, what in (("forward", "fwd"), ("both", "fwd+bwd"))
            ]
            name = problem["name"].split(",")[0]
            name = name if is_own(problem) else f"cell, {name}"
            lines.append(f"{name}, B={batch}: {'; '.join(said)}")
    return lines[:MOST_VERDICTS]


def verdict(table: dict[str, Any], key: str) -> str:
    """Our fastest row over the fastest of the others, rows that miss a target left out."""
    rows = [(ratio(row, key), row) for row in table["rows"]]
    ours = [found for found, row in rows if found and row["library"] == "fpi_cuda"]
    theirs = [
        (found, row["library"]) for found, row in rows if found and row["library"] != "fpi_cuda"
    ]
    if not ours or not theirs:
        return "not compared"
    found, library = min(theirs)
    times = found / min(ours)
    if FASTER < times < 1 / FASTER:
        return f"level with {library}"
    return f"{two(max(times, 1 / times))}x {'faster' if times > 1 else 'slower'} than {library}"


def main_table(problem: dict[str, Any]) -> dict[str, Any]:
    """The batch size at which settings were chosen and memory was measured."""
    tables: list[dict[str, Any]] = problem["tables"]
    return max(tables, key=lambda table: any("peak_bytes" in row for row in table["rows"]))


def title(problem: dict[str, Any], batch: int) -> str:
    """What one table shows."""
    return (
        f"{problem['name']}: B={batch}, d={problem['features']}, {problem['dtype']}, "
        f"true residual {problem['rtol']:g}, gradient error {problem['gradient_rtol']:.1g}"
    )


def fitting_table(table: dict[str, Any]) -> Table:
    """The same without ranges, the cell's name (it is the problem's) and memory, until it fits."""
    forms = [
        throughput_table(table),
        throughput_table(table, ranges=False),
        throughput_table(table, ranges=False, cells=False),
    ]
    forms.append([row[: COLUMNS.index("MB")] for row in forms[-1]])
    return next((f for f in forms if max(map(len, aligned(f))) <= WIDTH), forms[-1])


def throughput_table(table: dict[str, Any], *, ranges: bool = True, cells: bool = True) -> Table:
    """Rows of COLUMNS: samples converged per second, and time over fpi_cuda Anderson's.

    Rows that miss a target on some samples are marked, and stand last.
    """
    rows: Table = [COLUMNS]
    rows += [
        (
            labelled(row, cells),
            share(row["solved"]),
            f"{row['steps_mean']:.0f}/{row['steps_max']:.0f}",
            *_timing(row["forward"], ranges),
            share(row["gradient_solved"]) if "both" in row else "-",
            *_timing(row.get("both"), ranges),
            f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else "",
        )
        for row in sorted(table["rows"], key=misses)
    ]
    return rows if any(row[-1] for row in rows[1:]) else [row[:-1] for row in rows]


def misses(row: dict[str, Any]) -> bool:
    """Whether some sample misses a target that was measured."""
    return not met(row, "both" if "both" in row else "forward")


def labelled(row: dict[str, Any], cells: bool = True) -> str:
    """The row's name; of ours the route and the cell, too."""
    way = f", {row['way']}" if row["library"] == "fpi_cuda" and "way" in row else ""
    way = way if cells else way.partition(":")[0]
    return f"{row['label']}{way}{' *' if misses(row) else ''}"


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
                row["label"]: times
                for row in table["rows"]
                if row["library"] != "fpi_cuda" and (times := ratio(row, key)) is not None
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


def update_pages(root: Path) -> None:
    """Write bench/results/README.md, and the table between the markers of README.md.

    Raises:
        ValueError: README.md has no markers.
    """
    readme, folder = root / "README.md", root / "bench" / "results"
    old = readme.read_text()
    if BEGIN not in old or END not in old:
        raise ValueError(f"update_pages: {readme} must hold {BEGIN} and {END}")
    before, rest = old.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    readme.write_text(f"{before}{BEGIN}\n\n{summary(folder)}\n\n{END}{after}")
    (folder / "README.md").write_text(page(folder))


def page(folder: Path) -> str:
    """All sections of `folder`/*.json: of the throughput benchmark, then what others brought.

    A result brings its own section as "readme", or is one of the throughput benchmark.
    """
    sections: list[str] = []
    told: list[str] = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        if results.get("kind") == "throughput":
            shown = pictures(path)
            sections += [markdown(results), *([CAPTION, *shown] if shown else [])]
        elif "readme" in results:
            told.append(results["readme"].strip())
    return "\n\n".join([HEAD, *sections, *told]) + "\n"


HEAD = (
    "# Results\n\nWritten from the json files beside it by `python -m bench.report --write`; each "
    "section names the machine, the commit and the command. The state is x and the input z."
)


def pictures(results: Path) -> list[str]:
    """Markdown for the plots that lie beside a result as <its name>-<what>.png."""
    found = sorted(results.parent.glob(f"{results.stem}-*.png"))
    names = [(path.stem.removeprefix(f"{results.stem}-"), path.name) for path in found]
    return [f"![{name} of {results.stem}]({file})" for name, file in names]


SHOWN = {
    "PyTorch loop": ("torch loop",),
    "torch.compile'd loop": ("torch.compile",),
    "torchdeq": ("torchdeq",),
    "jaxopt": ("jaxopt",),
    "optimistix": ("optimistix",),
}
"""Rows of README's table: what it calls them, and their "library" in the results."""
FEWEST, MIDDLE, MOST = 1, 256, 4096
"""Batch sizes of README's table."""
OWN_SHOWN = ("your tanh, d=128", "your attention, 16x32")
"""Users' maps in README's table."""


def summary(folder: Path) -> str:
    """README's table: times over ours on every machine, users' maps first, and who is faster where.

    A cell is of the fastest row of that library that meets the targets on every sample.
    """
    columns: list[tuple[str, dict[str, Any]]] = []
    lines = []
    for path in sorted(folder.glob("throughput-*.json")):
        results = json.loads(path.read_text())
        device = results["machine"]["device"].removeprefix("NVIDIA ").replace("cpu", "CPU")
        named = {problem["name"]: problem for problem in results["problems"]}
        own = [name for name in OWN_SHOWN if name in named]
        for name in (*own, "tanh"):
            shown = (FEWEST, MIDDLE) if own else (FEWEST, MIDDLE, MOST)
            called = name.split(",")[0] if name in own else "cell"
            columns += [
                (f"{called}, {device}, B={table['batch']}", table)
                for table in named[name]["tables"]
                if table["batch"] in shown
            ]
        lines += ahead(results["problems"], device)
    rows: Table = [("time over fpi_cuda's", *(name for name, _ in columns))]
    rows += [
        (name, *(" / ".join(fastest(table, libraries)) for _, table in columns))
        for name, libraries in SHOWN.items()
    ]
    tanh = named["tanh"]
    legend = (
        "Forward / forward and backward, each library at its best settings, at equal error of "
        f"solution and gradient. Yours: modules of plain torch; cell: `cells.Dense`, "
        f"d={tanh['features']}, {tanh['dtype']}, to a true residual of {tanh['rtol']:g}. "
        "Above 1 fpi_cuda (Anderson) is faster; -: not measured."
    )
    return "\n\n".join([legend, piped(rows), *lines])


def fastest(table: dict[str, Any], libraries: tuple[str, ...]) -> list[str]:
    """The least time over ours, forward and with backward, of rows that meet the targets."""
    rows = [row for row in table["rows"] if row["library"] in libraries]
    found = [
        [times for row in rows if (times := ratio(row, key)) is not None]
        for key in ("forward", "both")
    ]
    return [two(min(some)) if some else "-" for some in found]


def ahead(problems: list[dict[str, Any]], device: str) -> list[str]:
    """Who is faster than fpi_cuda Anderson at the least and the middle batch, over all problems."""
    found = []
    for batch in (FEWEST, MIDDLE):
        tables = [t for problem in problems for t in problem["tables"] if t["batch"] == batch]
        said = []
        for name, libraries in SHOWN.items():
            cells = [fastest(table, libraries) for table in tables]
            counts = [
                sum(cell[i] != "-" and float(cell[i]) < FASTER for cell in cells) for i in (0, 1)
            ]
            if any(counts):
                said.append(f"{name} ({counts[0]} / {counts[1]})")
        if said:
            found.append(f"B={batch}, {len(tables)} problems: {', '.join(said)}")
    return [
        f"Faster than fpi_cuda on the {device}, and on how many problems, forward / forward and "
        f"backward: {'; '.join(found)}."
    ] if found else []  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="JSON files to print")
    parser.add_argument("--write", action="store_true", help="write both pages of results anew")
    options = parser.parse_args()
    for path in options.results:
        print(text(json.loads(path.read_text())))
    if options.write:
        update_pages(Path(__file__).parent.parent)


if __name__ == "__main__":
    main()
