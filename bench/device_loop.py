"""What the loop on the device saves: time per iteration, whole solves, and waits of the host.

    python -m bench.device_loop [--device cuda] [--short] [--seconds N] [--threads N]
                                [--peers A,B] [--skip A,B] [--wheels DIR] [--out DIR]

Without a CUDA device the rows of the device loop are left out, and the output says so. Results go
to DIR/device_loop.json, on a device to DIR/device_loop-<device>.json, row by row, and a table to
the terminal.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fpi_cuda as fpi
from bench import options
from bench.compare import Comparison
from bench.json_files import finite
from bench.measure import loosest_tolerance, paired_rounds, spread
from bench.peers import Entry, Peer, by_worth, load_entries
from bench.peers.ours import BASELINE, FpiCuda
from bench.problems import Problem, tanh_cell
from bench.record import Record, skipped_lines
from bench.report import wrapped

WAITS = ("Synchronize", "DtoH")
"""What the name of a profiler event holds where the host waits for the device."""
PEERS = ("loop", "compiled", "torchdeq", "jaxopt", "optimistix")
ROUTES = ("host", "device")


@dataclasses.dataclass(frozen=True)
class Size:
    """How much to measure.

    Attributes:
        tanh: batch and features of the small cell. conv: batch, channels and side of the large.
        steps: the time per iteration is the slope between these two numbers of steps.
        most_settings: settings tried for each "best" row of a peer; None tries all.
    """

    tanh: tuple[int, int] = (256, 128)
    conv: tuple[int, int, int] = (128, 48, 32)
    steps: tuple[int, int] = (50, 250)
    rounds: int = 11
    most_settings: int | None = 3


FULL = Size()
SHORT = Size(conv=(4, 8, 12), steps=(20, 60), rounds=3, most_settings=1)
DEVICE_SHORT = Size(rounds=5, most_settings=1)
"""On a device it is not the size that costs time."""


class ConvCell(nn.Module):
    """norm(relu(x + norm(z + conv(norm(relu(conv(x))))))) on flat states, after Bai et al. 2020."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.shape = (channels, side, side)
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(3))
        with torch.no_grad():
            for conv in (self.first, self.second):
                conv.weight.mul_(0.3)

    def prepare(self, z: Tensor) -> Tensor:
        return z.view(-1, *self.shape)

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        state = x.view(-1, *self.shape)
        inner = self.second(self.norms[0](torch.relu(self.first(state))))
        return self.norms[2](torch.relu(state + self.norms[1](prepared + inner))).flatten(1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.step(x, self.prepare(z))


def conv_problem(batch: int, channels: int, side: int) -> Problem:
    """The conv cell with random weights and inputs."""
    torch.manual_seed(0)
    cell = ConvCell(channels, side)
    z = torch.randn(batch, channels * side * side)
    return Problem("conv", cell, z, torch.zeros_like(z), rtol=1e-3, max_steps=200)


# Time per iteration.


def nothing(x: Tensor, z: Tensor) -> Tensor:
    """The map whose iteration costs a copy, and that Picard never solves."""
    return -x


def eager_loop(x: Tensor, z: Tensor, steps: int, step: Callable[..., Any]) -> None:
    """The loop that people write, with its stop test."""
    for _ in range(steps):
        x, done = step(x, z)
        if bool(done):
            break


def picard_step(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    gx = nothing(x, z)
    return gx, ((gx - x).norm(dim=1) <= 1e-6 * gx.norm(dim=1)).all()


Loop = Callable[[int], Any]


def our_loops(size: Size, device: torch.device) -> dict[str, Loop]:
    """Each solver by each route, on a g that is next to nothing."""
    x = torch.ones(size.tanh, device=device)
    loops: dict[str, Loop] = {}
    for route in routes_on(device):
        for solver in (fpi.Picard(), fpi.Anderson()):
            # -x is no trouble for Anderson, but nothing fixes x + 1.
            g = nothing if isinstance(solver, fpi.Picard) else lambda x, z: x + z
            given = {"solver": solver, "rtol": 0.0, "route": route, "rowwise": False}
            loops[f"{route} loop, {type(solver).__name__}"] = lambda steps, g=g, given=given: (
                fpi.fixed_point(g, x, torch.ones_like(x), max_steps=steps, **given)
            )
    return loops


def torch_loop(size: Size, device: torch.device, step: Callable[..., Any]) -> Loop:
    """The same by hand."""
    x = torch.ones(size.tanh, device=device)
    return lambda steps: eager_loop(x, x, steps, step)


def compiled_step() -> Callable[..., Any]:
    return torch.compile(picard_step, dynamic=False, fullgraph=True)


def seconds_per_iteration(loop: Loop, size: Size, device: torch.device) -> dict[str, float]:
    """The slope of the time over the number of steps.

    Raises:
        RuntimeError: the loop ended before it had taken them.
    """
    few, many = size.steps
    calls = {"few": lambda: loop(few), "many": lambda: loop(many)}
    with torch.no_grad():
        for call, asked in zip(calls.values(), size.steps, strict=True):
            result = call()
            if isinstance(result, fpi.Solution) and int(result.num_steps.min()) < asked:
                raise RuntimeError(f"{int(result.num_steps.min())} steps taken, {asked} asked for")
        times = paired_rounds(calls, size.rounds, device)
    pairs = zip(times["few"], times["many"], strict=True)
    return spread([(late - early) / (many - few) for early, late in pairs])


# Whole solves.


def routed(route: str) -> FpiCuda:
    return FpiCuda(fpi.Anderson(m=5), route=route)


def routes_on(device: torch.device) -> tuple[str, ...]:
    return ROUTES if device.type == "cuda" else ("host",)


def entry_of(route: str) -> Entry:
    label = BASELINE if route == "host" else f"{BASELINE}, device loop"
    return Entry(label, (routed(route),))


class LargeCell:
    """The conv cell, at equal true residual; its gradient is checked against float64."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.problem = conv_problem(*size.conv).to(device)
        self.rounds = size.rounds
        self.v = torch.randn_like(self.problem.x0)

    @functools.cached_property
    def exact(self) -> Tensor:
        """The gradient in z."""
        exact = self.problem.double()
        return routed("host").solve_and_grad(exact, 1e-9, 1e-9, self.v.double())[1][0]

    def row(self, name: str, peer: Peer) -> dict[str, Any]:
        problem, v = self.problem, self.v
        found = loosest_tolerance(
            lambda tol: problem.true_residual(peer.solve(problem, tol)),
            problem.rtol,
            peer.first_tolerance(problem),
        )
        z_grad = peer.solve_and_grad(problem, found.tol, found.tol, v)[1][0].double()
        calls = {
            "forward": lambda: peer.solve(problem, found.tol),
            "both": lambda: peer.solve_and_grad(problem, found.tol, found.tol, v),
        }
        times = paired_rounds(calls, self.rounds, v.device)
        return {
            "label": name,
            "tol": found.tol,
            "solved": found.solved,
            "worst_residual": found.worst,
            "gradient_error": float((z_grad - self.exact).norm() / self.exact.norm()),
            "steps_max": int(peer.num_steps(problem, found.tol).max()),
            **{kind: spread(taken) for kind, taken in times.items()},
        }


def torchdeq_on(problem: Problem) -> dict[str, Peer]:
    """What it has for a cell that no other peer has."""
    from bench.peers.torchdeq import TorchDEQ

    rel = {"stop_mode": "rel", "max_iter": problem.max_steps}
    return {
        "torchdeq Anderson": TorchDEQ("rel", "anderson", "anderson", m=6, lam=1e-8, **rel),
        "torchdeq Picard": TorchDEQ("rel", "fixed_point_iter", "fixed_point_iter", **rel),
    }


# Waits of the host.


def waits(size: Size, device: torch.device) -> dict[str, dict[str, int]]:
    """How often the host waited for the device in one later solve, by the profiler's account."""
    problem = tanh_cell(*size.tanh).to(device)
    v = torch.randn_like(problem.x0)
    found = {}
    for route in ROUTES:
        peer = routed(route)
        calls = {
            "forward": lambda peer=peer: peer.solve(problem, 1e-6),
            "forward and backward": lambda peer=peer: peer.solve_and_grad(problem, 1e-6, 1e-6, v),
        }
        found[route] = {name: waits_in(call) for name, call in calls.items()}
    return found


def waits_in(call: Callable[[], object]) -> int:
    """Waits in the third of three calls."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    call()
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("the call"):
            call()
        torch.cuda.synchronize()
    events = profile.events() or []
    whole = next(event.time_range for event in events if event.name == "the call")
    return sum(
        any(wait in event.name for wait in WAITS)
        and whole.start <= event.time_range.start <= whole.end
        for event in events
    )


def run(record: Record, size: Size, device: torch.device, modules: tuple[str, ...]) -> None:
    """Measure everything, ours first, into `record`."""
    results = record.results
    results["size"] = dataclasses.asdict(size)
    per_iteration = results["seconds_per_iteration"] = {}
    entries, missing = load_entries(modules)
    record.skipped.update(missing)
    ours = [entry_of(route) for route in routes_on(device)]
    small = Comparison(
        tanh_cell(*size.tanh).to(device),
        [*ours, *entries],
        (size.tanh[0],),
        size.tanh[0],
        size.rounds,
        size.most_settings,
    )
    large = LargeCell(size, device)
    results["tanh"] = small.result
    results["conv"] = {"rows": [], "shape": list(size.conv)}

    def slope(name: str, loop: Callable[[], Loop]) -> None:
        measure = lambda: seconds_per_iteration(loop(), size, device)  # noqa: E731
        record.row(name, measure, functools.partial(per_iteration.__setitem__, name))

    def solves(entry: Entry) -> None:
        measure = functools.partial(small.measure, entry)
        keep = functools.partial(small.keep, entry.label)
        compiles = entry.candidates[0].compiles
        record.row(f"tanh: {entry.label}", measure, keep, compiles=compiles)

    def conv(name: str, peer: Peer) -> None:
        row = functools.partial(large.row, name, peer)
        record.row(f"conv: {name}", row, results["conv"]["rows"].append)

    for name, loop in our_loops(size, device).items():
        slope(name, lambda loop=loop: loop)
    slope("eager loop", lambda: torch_loop(size, device, picard_step))
    for entry in ours:
        solves(entry)
    for route in routes_on(device):
        conv(f"fpi_cuda, {route} loop", routed(route))
    if device.type == "cuda":
        keep = functools.partial(results.__setitem__, "waits")
        record.row("waits", functools.partial(waits, size, device), keep)
    else:
        results["not_run"] = "the device loop, waits of the host: no CUDA device"
    if "torchdeq" in modules and "torchdeq" not in missing:
        for name, peer in torchdeq_on(large.problem).items():
            conv(name, peer)
    for entry in by_worth(entries):
        if entry.library == "torch.compile":
            slope("torch.compile loop", lambda: torch_loop(size, device, compiled_step()))
        solves(entry)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    given = parse(arguments)
    record = options.record_of(given)
    short = SHORT if given.device.type == "cpu" else DEVICE_SHORT
    run(record, short if given.short else FULL, given.device, given.peers)
    if given.device.type == "cuda":
        where = record.results["machine"]
        tables = text(finite(record.results), 4)
        record.results["readme"] = (
            f"### The device loop on {where['device']}\n\n```\n{tables}\n```\n\n"
            f"Commit {where['commit']}, {where['date']}: `{where['command']}`."
        )
    print(text(finite(record.finish())))
    print("written:", record.path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="bench.device_loop", description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return options.parse(parser, arguments, PEERS, device=default)


def text(results: dict[str, Any], most: float = math.inf) -> str:
    """The tables of the terminal; over `most` skipped rows of one reason are counted."""
    lines = [f"device: {results['machine']['device']}", "", "µs per iteration, empty g"]
    for name, times in results["seconds_per_iteration"].items():
        lines.append(f"  {1e6 * times['median']:10.2f}  {name}")
    tables = results["tanh"]["tables"]
    for name, rows in (
        ("tanh", tables[0]["rows"] if tables else []),
        ("conv", results["conv"]["rows"]),
    ):
        lines += ["", f"{name}: ms forward, ms forward+backward, solved"]
        for row in rows:
            shown = [seconds_in(row.get(key)) for key in ("forward", "both")]
            lines.append(f"  {shown[0]} {shown[1]}  {row['solved']:6.1%}  {row['label']}")
    failed = {f"tanh: {label}": why for label, why in results["tanh"]["failed"].items()}
    lines += wrapped(skipped_lines({**results["skipped"], **failed}, most))
    if "waits" in results:
        lines += ["", "waits of the host in one solve"]
        for route, counts in results["waits"].items():
            lines += [f"  {count:6}  {route} loop, {what}" for what, count in counts.items()]
    if "not_run" in results:
        lines += ["", f"NOT RUN: {results['not_run']}"]
    return "\n".join(lines)


def seconds_in(timing: dict[str, Any] | None) -> str:
    """The median of a row in milliseconds."""
    if timing is None:
        return f"{'-':>10}"
    median = timing["seconds"] if "seconds" in timing else timing["median"]
    return f"{1e3 * median:10.3f}"


if __name__ == "__main__":
    main()
