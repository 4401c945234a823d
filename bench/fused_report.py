"""Tables of bench.fused, for the terminal and for bench/results/README.md."""

from __future__ import annotations

from typing import Any

from bench.record import skipped_lines
from bench.report import Table, piped, rate, two, wrapped

FAMILIES = {
    "fused": ("fpi_cuda Anderson, fused", "fpi_cuda Picard, fused"),
    "host loop": ("fpi_cuda Anderson, host", "fpi_cuda Picard, host"),
    "torch loop": ("torch loop, per-sample stop",),
    "torch.compile": ("torch.compile'd loop (best)",),
    "torchdeq": ("torchdeq Anderson (best)", "torchdeq Picard (best)"),
    "jaxopt": ("jaxopt Anderson (best)", "jaxopt Picard (best)"),
}
"""Columns, and the rows that each is the fastest of."""


def text(results: dict[str, Any]) -> list[str]:
    """Everything measured, for the terminal."""
    lines = []
    for table in results["problems"]:
        lines += [
            table["name"],
            "    s fwd  s fwd+bwd    steps  GFLOP/s  grad err  busy fwd us/round",
        ]
        for label, row in table["rows"].items():
            busy, slope = row.get("busy"), row.get("round")
            lines.append(
                f"  {row['forward']['median']:8.5f}   {row['both']['median']:8.5f} "
                f"{row['mean_steps']:8.1f} {row['gflops']:8.1f} {row['gradient_error']:9.1e}  "
                + ("       -" if busy is None else f"{busy:8.5f}")
                + ("        -" if slope is None else f" {1e6 * slope['median']:8.2f}")
                + f"  {label}"
            )
    for solver in ("Picard", "Anderson"):
        if "early_exit" in results:
            row = results["early_exit"][solver]
            lines.append(
                f"10% hard samples, {solver}: {row['fused']['of_ideal']:.2f} of the ideal fused, "
                f"{row['host']['of_ideal']:.2f} by the host loop"
            )
    if "mm_gflops" in results:
        lines.append(f"torch.mm: {results['mm_gflops']:.0f} GFLOP/s")
    return lines + wrapped(skipped_lines(results["skipped"]))


def readme(results: dict[str, Any]) -> str:
    """The section: seconds of every contender, and what early exit saves."""
    where = results["machine"]
    roof = results.get("fma_gflops")
    on_cpu = where["device"] == "cpu"
    told = "" if roof is None else f", whose roof is {roof:.0f} GFLOP/s per core"
    if on_cpu:
        place, unit = "the CPU", "Milliseconds of CPU"
        machine = f"{where['threads']} thread(s) of {where['cpu']}{told}"
        share = (
            "; of roof is the share of the core's multiply-add rate that the products of those "
            "steps come to over the whole forward call"
        )
    else:
        place = machine = where["device"]
        unit, share = "Milliseconds", ""
    parts = [
        f"### The fused loop on {place}",
        f"{unit} to a true residual of {results['problems'][0]['rtol']:g} in every "
        f"sample, the faster of Picard and Anderson in each column, {machine}. Steps are "
        f"evaluations of g per sample{share}. Peers get the loosest tolerance that reaches the "
        "residual, and what they return may be one step beyond the last that they tested.",
        "**Forward**",
        piped(times(results, "forward")),
        "**Forward and backward**",
        piped(times(results, "both")),
        *faster(results),
        *skipped_lines(results["skipped"], 4),
        *([early_exit(results["early_exit"])] if "early_exit" in results else []),
    ]
    command = f"`{where['command']}`"
    if "--quarter" in command:
        command += ", which cuts the full form's (8192, 512) and (65536, 64) to a quarter"
    parts.append(f"Commit {where['commit']}, {where['date']}: {command}.")
    return "\n\n".join(parts)


def faster(results: dict[str, Any]) -> list[str]:
    """Who takes less time than the fused loop, and what part of its time."""
    found = []
    for kind, words in (("forward", "forward"), ("both", "forward and backward")):
        for table in results["problems"]:
            fused, *others = (fastest(table, labels, kind) for labels in FAMILIES.values())
            for name, row in zip(list(FAMILIES)[1:], others, strict=True):
                if fused and row and row[kind]["median"] < fused[kind]["median"]:
                    part = row[kind]["median"] / fused[kind]["median"]
                    found.append(f"{name} on {table['name']}, {words} ({part:.2f})")
    return [f"Faster than the fused loop: {'; '.join(found)}."] if found else []


def times(results: dict[str, Any], kind: str) -> Table:
    """A row per problem, a column per contender."""
    forward = kind == "forward"
    rows: Table = [("cell", *FAMILIES, *(("steps/s, fused", "of roof") if forward else ()))]
    for table in results["problems"]:
        cells = [fastest(table, labels, kind) for labels in FAMILIES.values()]
        shown = tuple("-" if row is None else two(1000 * row[kind]["median"]) for row in cells)
        fused = cells[0]
        more: tuple[str, ...] = ()
        if forward and fused is not None:
            share = fused["of_roof"]
            per_second = rate(fused["iterations_per_second"])
            more = (per_second, "-" if share is None else f"{share:.0%}")
        rows.append((table["name"], *shown, *more))
    return rows


def fastest(table: dict[str, Any], labels: tuple[str, ...], kind: str) -> dict[str, Any] | None:
    """The row of the least time among these; None where none was measured."""
    rows = [table["rows"][label] for label in labels if label in table["rows"]]
    return min(rows, key=lambda row: row[kind]["median"], default=None)


def early_exit(exits: dict[str, Any]) -> str:
    """What a batch with a few hard samples costs."""
    ratios = [
        f"{exits[solver][route]['of_ideal']:.2f} ({solver}, {name})"
        for solver in ("Picard", "Anderson")
        for route, name in (("fused", "fused"), ("host", "host loop"))
    ]
    steps = exits["Picard"]["mean_steps"]
    return (
        f"A batch of {exits['batch']} tanh cells of {exits['features']} features with 10% hard "
        f"samples ({steps['hard']:.0f} Picard steps; the others take {steps['easy']:.1f}) costs, "
        f"over the same samples solved among their like: {', '.join(ratios)}."
    )
