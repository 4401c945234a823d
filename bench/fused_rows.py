"""The rows of bench.fused: problems, sizes, and how a solve is timed at equal true residual."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import fpi_cuda as fpi
from bench.measure import busy_seconds, loosest_tolerance, seconds, spread
from bench.peers import Entry, Peer
from bench.peers.ours import FpiCuda
from bench.problems import Problem
from fpi_cuda.options import FLOORS

RTOL = 1e-4
LIPSCHITZ = 0.9
LONGEST_CALIBRATION = 20.0
"""CPU seconds after which a setting that is looked for a tolerance is left out, by name."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Batch and features of each problem, and how often it is timed.

    Attributes:
        peers: on how many of the problems they are measured, and our Triton kernels.
    """

    bibtex: tuple[int, int, int] = (2515, 159, 600)
    dense: tuple[tuple[int, int], ...] = ((8192, 512), (64, 2048), (65536, 64))
    energy: tuple[int, int, int] = (2515, 159, 600)
    heavy: tuple[int, int] = (4096, 256)
    rounds: int = 7
    peers: int = 5


FULL = Size()
SHORT = Size(
    dense=((512, 512), (64, 1024), (8192, 64)), energy=(512, 159, 600), heavy=(1024, 128),
    rounds=3, peers=1,
)  # fmt: skip
QUARTER = Size(dense=((2048, 512), (64, 2048), (16384, 64)), rounds=3)
"""The large batches cut to a quarter, for a CPU that others use too."""
DEVICE_SHORT = Size(rounds=5, peers=1)
"""On a device it is not the size that costs time, but what is compiled for each problem."""
TINY = Size((16, 9, 12), ((16, 8),), (16, 8, 12), (20, 8), 1, 1)


class Routed(FpiCuda):
    """A layer that goes one route, in one precision, by a backend or the best there is."""

    def __init__(
        self,
        solver: fpi.Anderson | fpi.Picard,
        route: str,
        precision: str = "ieee",
        backend: str | None = None,
    ) -> None:
        super().__init__(solver, route, precision=precision, backend=backend)
        self.name = f"{solver}, route={route}, precision={precision}, backend={backend}"


def ours(device: torch.device) -> list[Entry]:
    """Both solvers by every route, and what tensor cores do to the same tolerance."""
    ways = [("fused", "ieee", None), ("host", "ieee", None)]
    if device.type == "cuda":
        ways += [
            ("device", "ieee", None),
            ("fused", "tf32x3", None),
            ("fused", "ieee", "triton"),
            ("fused", "tf32x3", "triton"),
        ]
    return [
        Entry(
            f"fpi_cuda {type(solver).__name__}, {route}"
            + ("" if backend is None else f" by {backend}")
            + ("" if precision == "ieee" else f" in {precision}"),
            (Routed(solver, route, precision, backend),),
        )
        for route, precision, backend in ways
        for solver in (fpi.Anderson(m=5), fpi.Picard())
    ]


def problems(size: Size, device: torch.device) -> list[Problem]:
    """Cells of Lipschitz constant LIPSCHITZ at their own start, on normal inputs."""
    torch.manual_seed(0)
    found = []
    batch, features, hidden = size.bibtex
    mlp = fpi.cells.MLP(64, features, hidden)
    with torch.no_grad():
        for linear in (mlp.A, mlp.W):
            linear.weight.mul_((LIPSCHITZ / 0.5) ** 0.5)
    found.append(problem(f"FPI_NN {size.bibtex}", mlp, batch))
    for batch, features in size.dense:
        dense = fpi.cells.Dense(64, features)
        with torch.no_grad():
            dense.A.weight.mul_(LIPSCHITZ / 0.5)
        found.append(problem(f"dense {(batch, features)}", dense, batch))
    batch, features, hidden = size.energy
    energy = fpi.cells.MLPEnergy(64, features, hidden)
    found.append(problem(f"FPI_GD {size.energy}", fpi.cells.GradientDescent(energy, 0.2), batch))
    return [item.to(device) for item in found]


def problem(name: str, cell: Any, batch: int) -> Problem:
    """A cell on normal inputs, from zero."""
    return Problem(name, cell, torch.randn(batch, 64), torch.zeros(batch, cell.x_features), RTOL)


CLOCKS = {
    "cpu": "CPU seconds of the process",
    "cuda": "seconds from one idle device to the next; busy, of its work alone",
}


def spent(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, by the clock of this kind of device."""
    if device.type == "cuda":
        return seconds(call, device)
    start = time.process_time()
    call()
    return time.process_time() - start


def rounds(
    calls: Mapping[str, Callable[[], object]], count: int, device: torch.device
) -> dict[str, list[float]]:
    """Each call once per round, after a warm-up."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(count):
        for name, call in calls.items():
            times[name].append(spent(call, device))
    return times


class TooSlow(RuntimeError):
    """A setting that would take the benchmark's time."""


def calibrated(peer: Peer, task: Problem) -> float:
    """The loosest tolerance at which every sample's true residual is RTOL."""
    start = time.process_time()

    def error(tol: float) -> Tensor:
        if time.process_time() - start > LONGEST_CALIBRATION:
            raise TooSlow(f"{peer.name}: no tolerance found in {LONGEST_CALIBRATION:g} s")
        return task.true_residual(peer.solve(task, tol))

    found = loosest_tolerance(error, task.rtol, peer.first_tolerance(task))
    if found.solved < 1.0:
        raise TooSlow(f"{peer.name}: solves {found.solved:.3f} of the samples")
    return found.tol


class Contest:
    """One problem with the gradient that every row's is held against."""

    def __init__(self, task: Problem, rounds: int) -> None:
        self.task = task
        self.rounds = rounds
        self.v = torch.randn(task.x0.shape, generator=torch.Generator().manual_seed(1)).to(task.x0)

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        """Gradients of the parameters, in float64 by the host loop."""
        peer = Routed(fpi.Anderson(m=10), "host")
        return peer.solve_and_grad(self.task.double(), 1e-9, 1e-9, self.v.double())[1][1:]

    def row(self, peer: Peer) -> dict[str, Any]:
        """Forward, and forward with backward, at equal true residual."""
        task, v = self.task, self.v
        tol = calibrated(peer, task)
        steps = peer.num_steps(task, tol).double()
        _, grads = peer.solve_and_grad(task, tol, tol, v)
        row: dict[str, Any] = {
            "tol": tol,
            "mean_steps": float(steps.mean()),
            "max_steps": int(steps.max()),
            "gradient_error": gradient_error(grads, self.exact),
        }
        calls: dict[str, Callable[[], object]] = {
            "forward": lambda: peer.solve(task, tol),
            "both": lambda: peer.solve_and_grad(task, tol, tol, v),
        }
        for kind, times in rounds(calls, self.rounds, task.x0.device).items():
            row[kind] = {"seconds": times, "median": statistics.median(times)}
        row["iterations_per_second"] = row["mean_steps"] * task.batch / row["forward"]["median"]
        return row

    def busy(self, row: dict[str, Any], peer: Peer) -> float:
        """Seconds that the device works in a row's forward call."""
        return busy_seconds(lambda: peer.solve(self.task, row["tol"]))


RESTLESS = 100.0
"""Weights times this make a map that has no fixed point to find."""
NUM_ROUNDS = (20, 120)
GOING = 0.99


def per_round(
    task: Problem, peer: Routed, count: int, num_rounds: tuple[int, int] = NUM_ROUNDS
) -> dict[str, float]:
    """Seconds of one round of the loop in which hardly a sample stops.

    The slope of the time over the number of rounds: what a call costs besides has no part in it.

    Raises:
        RuntimeError: samples stopped before the last round, or rounds took no time to tell.
    """
    cell = copy.deepcopy(task.cell)
    layers = getattr(cell, "energy", cell)
    with torch.no_grad():
        for name in ("A", "W"):
            if hasattr(layers, name):
                getattr(layers, name).weight.mul_(RESTLESS)
    few, many = (dataclasses.replace(task, cell=cell, max_steps=n) for n in num_rounds)
    taken = peer.num_steps(many, RTOL) - peer.num_steps(few, RTOL)
    going = float((taken == many.max_steps - few.max_steps).double().mean())
    if going < GOING:
        raise RuntimeError(f"{1 - going:.1%} of the samples stop before round {many.max_steps}")
    calls = {name: (lambda t=t: peer.solve(t, RTOL)) for name, t in (("few", few), ("many", many))}
    times = rounds(calls, count, task.x0.device)
    slopes = [
        (late - early) / (many.max_steps - few.max_steps)
        for early, late in zip(times["few"], times["many"], strict=True)
    ]
    if statistics.median(slopes) <= 0.0:
        raise RuntimeError("more rounds take no more time: too short to tell")
    flops = flops_per_step(task.cell) * task.batch
    return {
        **spread(slopes),
        "going": going,
        "gflops": flops / statistics.median(slopes) / 1e9,
    }


def gradient_error(grads: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of a parameter's gradient."""
    return max(
        float((given.double() - true).norm() / true.norm().clamp_min(1e-30))
        for given, true in zip(grads[1:], exact, strict=True)
    )


def flops_per_step(cell: Any) -> int:
    """Multiplications and additions of one evaluation of g on one sample, products alone."""
    hidden = getattr(getattr(cell, "energy", cell), "hidden_features", None)
    return 2 * cell.x_features**2 if hidden is None else 4 * cell.x_features * hidden


def floor(task: Problem, row: dict[str, Any], roof: float | None) -> dict[str, float | None]:
    """The rate of a solve's products, and its share of what the core can do."""
    rate = flops_per_step(task.cell) * row["iterations_per_second"] / 1e9
    return {"gflops": rate, "of_roof": None if roof is None else rate / roof}


def two_threads(task: Problem, count: int) -> dict[str, dict[str, float]]:
    """CPU seconds of the fused loop on two threads over those on one.

    A thread that waits spins, and counts: only on an idle machine does this say anything.
    """
    v = torch.ones_like(task.x0)
    kept = torch.get_num_threads()
    times: dict[int, dict[str, list[float]]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for solver in (fpi.Picard(), fpi.Anderson(m=5)):
        peer = Routed(solver, "fused")
        name = type(solver).__name__
        calls[f"{name} forward"] = lambda peer=peer: peer.solve(task, RTOL)
        calls[f"{name} both"] = lambda peer=peer: peer.solve_and_grad(task, RTOL, RTOL, v)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            times[threads] = rounds(calls, count, task.x0.device)
    finally:
        torch.set_num_threads(kept)
    return {
        name: {
            kind: statistics.median(times[2][f"{name} {kind}"])
            / statistics.median(times[1][f"{name} {kind}"])
            for kind in ("forward", "both")
        }
        for name in ("Picard", "Anderson")
    }


def mm_gflops(device: torch.device, tries: int = 8) -> float:
    """The best rate of torch.mm on square matrices in IEEE float32, by the device's clock."""
    dimension = 1024 if device.type == "cpu" else 8192
    a = torch.randn(dimension, dimension, device=device)
    best = min(spent(lambda: a @ a, device) for _ in range(tries))
    return 2 * dimension**3 / best / 1e9


def early_exit(size: Size, device: torch.device, count: int) -> dict[str, Any]:
    """A batch with 10% hard samples, against the cost of its samples among their like.

    Inputs far from zero saturate the tanh, and the sample is solved in a few steps.
    """
    torch.manual_seed(0)
    batch, features = size.heavy
    cell = fpi.cells.Dense(64, features).to(device)
    with torch.no_grad():
        cell.A.weight.mul_(0.98 / 0.5)
        cell.B.bias.zero_()
    hard = torch.rand(batch, device=device) < 0.1
    directions = torch.randn(batch, 64, device=device)
    inputs = {
        "mixed": directions * torch.where(hard, 0.05, 20.0)[:, None],
        "easy": directions * 20.0,
        "hard": directions * 0.05,
    }
    result: dict[str, Any] = {"batch": batch, "features": features}
    for solver in (fpi.Picard(), fpi.Anderson(m=5)):
        row: dict[str, Any] = {"share_hard": float(hard.double().mean())}
        for route in ("fused", "host"):
            peer = Routed(solver, route)
            tasks = {
                name: Problem(name, cell, z, z.new_zeros(batch, features), RTOL)
                for name, z in inputs.items()
            }
            calls = {
                n: (lambda task=task, peer=peer: peer.solve(task, RTOL))
                for n, task in tasks.items()
            }
            times = {n: statistics.median(s) for n, s in rounds(calls, count, device).items()}
            share = row["share_hard"]
            ideal = share * times["hard"] + (1 - share) * times["easy"]
            row[route] = {"seconds": times, "ideal": ideal, "of_ideal": times["mixed"] / ideal}
            if route == "fused":
                row["mean_steps"] = {
                    n: float(peer.num_steps(t, RTOL).double().mean()) for n, t in tasks.items()
                }
        result[type(solver).__name__] = row
    return result


def precisions(task: Problem, count: int) -> dict[str, dict[str, float]]:
    """Forward solves to a tolerance that every precision reaches: seconds, steps, true residual.

    Raises:
        RuntimeError: a true residual is beyond the tolerance.
    """
    rtol = max(FLOORS.values())
    peers = {name: Routed(fpi.Anderson(m=5), "fused", name) for name in FLOORS}
    calls = {name: (lambda peer=peer: peer.solve(task, rtol)) for name, peer in peers.items()}
    times = rounds(calls, count, task.x0.device)
    found = {
        name: {
            "rtol": rtol,
            "median": statistics.median(times[name]),
            "mean_steps": float(peer.num_steps(task, rtol).double().mean()),
            "worst_residual": float(task.true_residual(peer.solve(task, rtol)).max()),
        }
        for name, peer in peers.items()
    }
    for name, row in found.items():
        if not row["worst_residual"] <= 1.01 * rtol:
            raise RuntimeError(f"{name} ends at {row['worst_residual']:.1e}, asked for {rtol:g}")
    return found
