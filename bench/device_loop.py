"""What the loop on the device saves: time per iteration, whole solves, and waits of the host.

    python -m bench.device_loop [--device cuda] [--short] [--out DIR]

Without a CUDA device the rows of the device loop are left out, and the output says so. Results go
to DIR/device_loop.json and a table to the terminal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fpi_cuda as fpi
from bench import machine, report
from bench.compare import compare
from bench.measure import loosest_tolerance, paired_rounds, spread, use_threads
from bench.peers import Entry, Peer, load_entries
from bench.peers.ours import BASELINE, FpiCuda
from bench.problems import Problem, tanh_cell
from bench.settings import Chosen, choose, make_task
from fpi_cuda.device_loop import chunks

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
        num_candidates: settings tried for each "best" row of a peer; None tries all.
    """

    tanh: tuple[int, int] = (256, 128)
    conv: tuple[int, int, int] = (128, 48, 32)
    steps: tuple[int, int] = (50, 250)
    rounds: int = 11
    num_candidates: int | None = 3


FULL = Size()
SHORT = Size(conv=(4, 8, 12), steps=(20, 60), rounds=3, num_candidates=1)


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


def seconds_per_iteration(size: Size, device: torch.device) -> dict[str, Any]:
    """Seconds of one iteration with an empty g, for each kind of loop."""
    x = torch.ones(size.tanh, device=device)
    loops: dict[str, Callable[[int], Any]] = {}
    for route in routes_on(device):
        for solver in (fpi.Picard(), fpi.Anderson()):
            # -x is no trouble for Anderson, but nothing fixes x + 1.
            g = nothing if isinstance(solver, fpi.Picard) else lambda x, z: x + z
            options = {"solver": solver, "rtol": 0.0, "route": route, "rowwise": False}
            loops[f"{route} loop, {type(solver).__name__}"] = lambda steps, g=g, options=options: (
                fpi.fixed_point(g, x, torch.ones_like(x), max_steps=steps, **options)
            )
    loops["eager loop"] = lambda steps: eager_loop(x, x, steps, picard_step)
    compiled = torch.compile(picard_step, dynamic=False, fullgraph=True)
    loops["torch.compile loop"] = lambda steps: eager_loop(x, x, steps, compiled)
    few, many = size.steps
    calls = {
        (name, steps): (lambda loop=loop, steps=steps: loop(steps))
        for name, loop in loops.items()
        for steps in (few, many)
    }
    with torch.no_grad():
        steps_taken = {key: steps_of(call(), key[1]) for key, call in calls.items()}
        times = paired_rounds(calls, size.rounds, device)  # type: ignore[type-var]
    return {
        name: spread(
            [
                (late - early) / (steps_taken[name, many] - steps_taken[name, few])
                for early, late in zip(times[name, few], times[name, many], strict=True)  # type: ignore[index]
            ]
        )
        for name in loops
    }


def steps_of(result: Any, asked: int) -> int:
    """Iterations of a call: what it reports, else what it was asked for."""
    return int(result.num_steps.max()) if isinstance(result, fpi.Solution) else asked


# Whole solves.


def routed(route: str) -> FpiCuda:
    return FpiCuda(fpi.Anderson(m=5), route=route)


def routes_on(device: torch.device) -> tuple[str, ...]:
    return ROUTES if device.type == "cuda" else ("host",)


def small_cell(size: Size, device: torch.device, modules: tuple[str, ...]) -> dict[str, Any]:
    """Every library on the tanh cell, at equal true residual and gradient error."""
    problem = tanh_cell(*size.tanh).to(device)
    entries, skipped = load_entries(modules)
    ours = [entry_of(route) for route in routes_on(device)]
    task = make_task(problem, ours[0].candidates[0])
    chosen: list[Chosen] = []
    failed: dict[str, str] = {}
    for entry in tqdm([*ours, *entries], desc="tanh: choose settings", unit="row"):
        try:
            chosen.append(choose(entry, task, size.num_candidates))
        except RuntimeError as error:
            failed[entry.label] = str(error)
    rows = compare(chosen, problem, task.v, size.rounds, memory=device.type == "cuda")
    return {"rows": rows, "failed": failed, "skipped": skipped}


def entry_of(route: str) -> Entry:
    label = BASELINE if route == "host" else f"{BASELINE}, device loop"
    return Entry(label, (routed(route),))


def large_cell(size: Size, device: torch.device) -> dict[str, Any]:
    """The conv cell, at equal true residual; its gradient is checked against float64."""
    problem = conv_problem(*size.conv).to(device)
    peers: dict[str, Peer] = {
        f"fpi_cuda, {route} loop": routed(route) for route in routes_on(device)
    }
    skipped: dict[str, str] = {}
    try:
        from bench.peers.torchdeq import TorchDEQ
    except ImportError as error:
        skipped["torchdeq"] = str(error)
    else:
        rel = {"stop_mode": "rel", "max_iter": problem.max_steps}
        peers["torchdeq Anderson"] = TorchDEQ("rel", "anderson", "anderson", m=6, lam=1e-8, **rel)
        peers["torchdeq Picard"] = TorchDEQ("rel", "fixed_point_iter", "fixed_point_iter", **rel)
    v = torch.randn_like(problem.x0)
    exact = routed("host").solve_and_grad(problem.double(), 1e-9, 1e-9, v.double())[1][0]
    rows, calls = [], {}
    for name, peer in tqdm(peers.items(), desc="conv: tolerances", unit="row"):
        found = loosest_tolerance(
            lambda tol, peer=peer: problem.true_residual(peer.solve(problem, tol)),
            problem.rtol,
            peer.first_tolerance(problem),
        )
        z_grad = peer.solve_and_grad(problem, found.tol, found.tol, v)[1][0].double()
        rows.append(
            {
                "label": name,
                "tol": found.tol,
                "solved": found.solved,
                "worst_residual": found.worst,
                "gradient_error": float((z_grad - exact).norm() / exact.norm()),
                "steps_max": int(peer.num_steps(problem, found.tol).max()),
            }
        )
        calls[f"{name} forward"] = lambda peer=peer, tol=found.tol: peer.solve(problem, tol)
        calls[f"{name} both"] = lambda peer=peer, tol=found.tol: peer.solve_and_grad(
            problem, tol, tol, v
        )
    times = paired_rounds(calls, size.rounds, device)
    for row in rows:
        row["forward"] = spread(times[f"{row['label']} forward"])
        row["both"] = spread(times[f"{row['label']} both"])
    return {"rows": rows, "skipped": skipped, "shape": list(size.conv)}


def whole_and_chunked(size: Size, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of a device loop whose history outgrows the cache, at once and in chunks."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    problem = tanh_cell(16 * size.tanh[0], 16 * size.tanh[1]).to(device)
    peer = routed("device")
    times = {}
    for name, most in (("whole batch", None), ("half the L2", l2 // 2), ("the L2", l2)):
        chunks.CHUNK_BYTES = most
        calls = {name: lambda: peer.solve(problem, 1e-6)}
        times[name] = spread(paired_rounds(calls, size.rounds, device)[name])
    chunks.CHUNK_BYTES = None
    return times


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


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = parse(arguments)
    device = torch.device(options.device)
    use_threads(options.threads)
    size = SHORT if options.short else FULL
    results: dict[str, Any] = {"kind": "device_loop", "size": dataclasses.asdict(size)}
    results["seconds_per_iteration"] = seconds_per_iteration(size, device)
    results["tanh"] = small_cell(size, device, tuple(filter(None, options.peers.split(","))))
    results["conv"] = large_cell(size, device)
    if device.type == "cuda":
        results["waits"] = waits(size, device)
        results["chunks"] = whole_and_chunked(size, device)
    else:
        results["not_run"] = "the device loop, its chunks, waits of the host: no CUDA device"
    results["machine"] = machine.describe(device, options.threads, machine.command_line())
    results = report.finite(results)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "device_loop.json"
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    print(text(results))
    print("written:", path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="bench.device_loop", description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cuda, cuda:N or cpu")
    parser.add_argument("--short", action="store_true", help="small sizes, a few rounds")
    parser.add_argument("--threads", type=int, default=1, help="threads and cores of every library")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="results folder")
    parser.add_argument("--peers", default=",".join(PEERS), help="on the tanh cell, by commas")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    return options


def text(results: dict[str, Any]) -> str:
    """The tables of the terminal."""
    lines = [f"device: {results['machine']['device']}", "", "µs per iteration, empty g"]
    for name, times in results["seconds_per_iteration"].items():
        lines.append(f"  {1e6 * times['median']:10.2f}  {name}")
    for name in ("tanh", "conv"):
        lines += ["", f"{name}: ms forward, ms forward+backward, solved"]
        for row in results[name]["rows"]:
            timings = [row.get(key) for key in ("forward", "both")]
            shown = [seconds_in(t) for t in timings]
            lines.append(f"  {shown[0]} {shown[1]}  {row['solved']:6.1%}  {row['label']}")
        for label, why in {**results[name]["skipped"], **results[name].get("failed", {})}.items():
            lines.append(f"  not run: {label}: {why}")
    if "waits" in results:
        lines += ["", "waits of the host in one solve"]
        for route, counts in results["waits"].items():
            lines += [f"  {count:6}  {route} loop, {what}" for what, count in counts.items()]
    if "chunks" in results:
        lines += ["", "ms of one large solve on the device"]
        lines += [f"  {seconds_in(t)}  {name}" for name, t in results["chunks"].items()]
    if "not_run" in results:
        lines += ["", f"NOT RUN: {results['not_run']}"]
    return "\n".join(lines)


def seconds_in(timing: dict[str, Any] | None) -> str:
    """The median of a row in milliseconds."""
    if timing is None:
        return f"{'-':>10}"
    median = timing.get("seconds", timing)["median"]
    return f"{1e3 * median:10.3f}"


if __name__ == "__main__":
    main()
