"""Other threads: their random numbers, evaluations and flags while one of them solves."""

from __future__ import annotations

import itertools
import sys
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from choices import ADJOINTS, SOLVERS
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from watched import F64, KINDS, TIGHT, B, Cell, D, derivatives, in_thread, surroundings

import fpi_cuda as fpi
from fpi_cuda.evaluation.random_draws import Recording
from fpi_cuda.evaluation.stream_capture import NoRandomNumbers
from fpi_cuda.loops.device.trace import Recorder


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_numbers_drawn_between_evaluations_are_new(solver: Any, adjoint: Any) -> None:
    drawn: list[float] = []
    cell = Cell(0.3, lambda: drawn.append(in_thread(lambda: torch.rand(1, dtype=F64).item())))
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    for _ in range(2):
        x = fpi.fixed_point(cell, torch.zeros_like(z), z, solver=solver, adjoint=adjoint).value
        derivatives(x, [z], 2)
    assert len(drawn) > 10
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "forward_ad", "inference"])
def test_numbers_drawn_between_evaluations_are_new_in_transforms(transform: str) -> None:
    drawn: list[float] = []
    cell = Cell(0.3, lambda: drawn.append(in_thread(lambda: torch.rand(1, dtype=F64).item())))
    z = torch.randn(B, D, dtype=F64)

    def solve(z: Tensor) -> Tensor:
        return fpi.fixed_point(cell, torch.zeros_like(z), z).value

    if transform == "vmap":
        torch.func.vmap(solve, randomness="different")(torch.stack([z, z]))
    elif transform == "grad":
        torch.func.grad(lambda z: solve(z).sum())(z)
    elif transform == "jvp":
        torch.func.jvp(solve, (z,), (z,))
    elif transform == "forward_ad":
        with forward_ad.dual_level():
            solve(forward_ad.make_dual(z, z))
    else:
        with torch.inference_mode():
            solve(z)
    assert len(drawn) > 5
    assert len(set(drawn)) == len(drawn)


class Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 + 0.1 * torch.rand_like(weight))


def test_asking_whether_a_cell_can_be_fused_takes_no_numbers() -> None:
    cell = fpi.cells.Dense(D, D)
    parametrize.register_parametrization(cell.A, "weight", Noise())
    layer = fpi.FPILayer(cell)
    state = torch.get_rng_state()
    layer.explain()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    layer(torch.ones(B, D))
    after = torch.rand(3)
    torch.manual_seed(1)
    cell(torch.ones(B, D), torch.ones(B, D))
    assert torch.equal(torch.rand(3), after)


# --- other threads' evaluations ----------------------------------------------------------------


def test_a_module_is_whole_while_it_is_evaluated() -> None:
    """A second derivative evaluates g on stand-ins, another thread on the parameters."""
    seen: list[Tensor] = []

    def train() -> None:
        x = torch.ones(1, D, dtype=F64)
        elsewhere = torch.tanh(cell.a(x) + cell.b(x)).sum()
        seen.extend(torch.autograd.grad(elsewhere, parameters))

    cell = Cell(look=lambda: in_thread(train))
    parameters = list(cell.parameters())
    z = torch.randn(B, D, dtype=F64)
    x = fpi.fixed_point(cell, torch.zeros_like(z), z, **TIGHT).value
    derivatives(x, parameters, 2)
    with forward_ad.dual_level():
        fpi.fixed_point(cell, torch.zeros_like(z), forward_ad.make_dual(z, z), **TIGHT)
    assert len(seen) > 40
    for i, grad in enumerate(seen):
        assert torch.equal(grad, seen[i % len(parameters)])


def test_a_second_derivative_counts_tied_parameters_once() -> None:
    cell = Cell()
    cell.b = cell.a
    z = torch.randn(B, D, dtype=F64)
    parameters = list(cell.parameters())
    x = fpi.fixed_point(cell, torch.zeros_like(z), z, **TIGHT).value
    weight, bias = parameters
    y = fpi.fixed_point(
        lambda x, z: torch.tanh(F.linear(x, weight, bias) + F.linear(z, weight, bias)),
        torch.zeros_like(z),
        z,
        **TIGHT,
    ).value
    torch.testing.assert_close(derivatives(x, parameters, 2), derivatives(y, parameters, 2))


@pytest.mark.parametrize("as_module", [True, False], ids=["module", "closure"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_weight_cache_that_others_use_keeps_its_gradients(order: int, as_module: bool) -> None:
    """parametrize.cached() keeps one cache for all threads."""
    cell = Cell()
    fpi.contract_(cell.a, 0.5)
    raw = cell.a.parametrizations.weight.original  # type: ignore[union-attr, index]
    found: list[Tensor] = []

    def read() -> Tensor:
        return torch.autograd.grad(cell.a.weight.sum(), raw, retain_graph=True)[0]

    def look() -> None:
        found.append(in_thread(read))

    z = torch.randn(B, D, dtype=F64)
    g: Any = cell if as_module else lambda x, z: cell(x, z)
    expected = read()
    with parametrize.cached():
        cell.look = look if order == 1 else None
        x = fpi.fixed_point(g, torch.zeros_like(z), z, **TIGHT).value
        cell.look = look
        derivatives(x, [raw], order)
    assert found
    assert all(torch.equal(grad, expected) for grad in found)


@pytest.mark.parametrize("kind", KINDS)
def test_solves_of_one_module_on_several_threads_are_those_of_one(kind: str) -> None:
    cell = KINDS[kind]()
    layer = fpi.FPILayer(cell, **TIGHT)
    parameters = list(cell.parameters())
    jobs = [(torch.randn(B, D, dtype=F64), order) for order in (1, 2, 2)]

    def run(job: tuple[Tensor, int]) -> list[Tensor]:
        x = layer(job[0])
        return [x.detach(), *derivatives(x, parameters, job[1])]

    expected = [run(job) for job in jobs]
    differ: list[Any] = []
    start = threading.Barrier(len(jobs))

    def work(index: int) -> None:
        start.wait()
        for _ in range(4):
            try:
                if not all(map(torch.equal, run(jobs[index]), expected[index])):
                    differ.append(index)
            except RuntimeError as error:
                differ.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not differ


def test_one_mask_per_solve_on_each_thread() -> None:
    masks: dict[int, list[Tensor]] = {}
    cell = Cell()

    def g(x: Tensor, z: Tensor) -> Tensor:
        mask = F.dropout(torch.ones_like(x), 0.5)
        masks.setdefault(threading.get_ident(), []).append(mask.detach().clone())
        return cell(x * mask, z)

    z = torch.randn(B, D, dtype=F64, requires_grad=True)

    def work() -> int:
        for _ in range(3):
            x = fpi.fixed_point(g, torch.zeros_like(z), z, **TIGHT).value
            derivatives(x, [z], 2)
        return threading.get_ident()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changes = [
        sum(not torch.equal(a, b) for a, b in itertools.pairwise(seen)) for seen in masks.values()
    ]
    # The very first evaluation of a g may be repeated with the numbers that then count.
    assert all(2 <= change <= 5 for change in changes), changes


# --- flags, stacks and caches of the process and the thread --------------------------------------


def traced() -> Recorder:
    return Recorder(torch.device("cpu"), ())


@pytest.mark.parametrize(
    "mode", [NoRandomNumbers, Recording, traced], ids=["capture", "draws", "trace"]
)
def test_modes_that_overlap_leave_no_flag_of_torch_set(mode: Any) -> None:
    """torch keeps for the whole process whether a dispatch mode is entered, and no count."""
    before = surroundings()
    entered, other_entered, left = (threading.Event() for _ in range(3))

    def other() -> None:
        entered.wait(10)
        with mode():
            other_entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    with mode():
        entered.set()
        other_entered.wait(10)
    left.set()
    thread.join()
    assert surroundings() == before


def test_overlapping_solves_leave_no_flag_of_torch_set() -> None:
    before = surroundings()
    turns = [threading.Event() for _ in range(3)]

    def first_in_first_out(x: Tensor, z: Tensor) -> Tensor:
        mask = F.dropout(x, 0.5)
        turns[0].set()
        turns[1].wait(10)
        return 0.5 * mask + z

    def last_in_last_out(x: Tensor, z: Tensor) -> Tensor:
        mask = F.dropout(x, 0.5)
        turns[1].set()
        turns[2].wait(10)
        return 0.5 * mask + z

    def solve(g: Any, after: threading.Event | None) -> None:
        with torch.no_grad():
            if after is not None:
                after.wait(10)
            fpi.fixed_point(g, torch.zeros(B, D), torch.ones(B, D), max_steps=3)

    threads = [
        threading.Thread(target=solve, args=(first_in_first_out, None)),
        threading.Thread(target=solve, args=(last_in_last_out, turns[0])),
    ]
    for thread in threads:
        thread.start()
    threads[0].join()
    turns[2].set()
    threads[1].join()
    assert surroundings() == before
