"""Clause 10: nothing outside is disturbed, whatever g, solver, adjoint and route.

Not other threads' random numbers and evaluations, nor global flags and caches.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from choices import ADJOINTS, SOLVERS
from torch import Tensor, nn
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils import _python_dispatch

import fpi_cuda as fpi
from fpi_cuda.evaluation.random_draws import Recording
from fpi_cuda.evaluation.stream_capture import NoRandomNumbers
from fpi_cuda.loops.device.trace import Recorder

F64 = torch.float64
B, D = 4, 5
TIGHT: dict[str, Any] = {"rtol": 1e-9, "max_steps": 300}


def in_thread(function: Callable[[], Any]) -> Any:
    """function(), on another thread, while this one waits."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


class Cell(nn.Module):
    """tanh(A x + B z), with dropout if asked, and a look at what goes on around it."""

    def __init__(self, dropout: float = 0.0, look: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.a = nn.Linear(D, D, dtype=F64)
        self.b = nn.Linear(D, D, dtype=F64)
        nn.init.orthogonal_(self.a.weight, 0.5)
        self.dropout = dropout
        self.look = look

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = torch.tanh(F.dropout(self.a(x), self.dropout) + self.b(z))
        if self.look is not None:
            self.look()
        return y


def derivatives(x: Tensor, wanted: list[Tensor], order: int) -> list[Tensor]:
    """Of the sum of squares, and of the sum of squares of those."""
    first = list(torch.autograd.grad(x.square().sum(), wanted, create_graph=order == 2))
    if order == 1:
        return first
    return first + list(torch.autograd.grad(sum(t.square().sum() for t in first), wanted))


# --- other threads' random numbers -----------------------------------------------------------


def test_other_threads_keep_their_random_numbers() -> None:
    """While one trains, another draws as fast as it can."""
    layer = fpi.FPILayer(Cell(0.3), rtol=1e-7)
    done: list[int] = []

    def work() -> None:
        try:
            for _ in range(15):
                layer(torch.ones(2, D, dtype=F64)).sum().backward()
        finally:
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    drawn = []
    while not done and len(drawn) < 200_000:
        drawn.append(torch.rand(1, dtype=F64).item())
    thread.join()
    assert len(drawn) > 100
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_numbers_drawn_between_evaluations_are_new(solver: Any, adjoint: Any, order: int) -> None:
    drawn: list[float] = []
    cell = Cell(0.3, lambda: drawn.append(in_thread(lambda: torch.rand(1, dtype=F64).item())))
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    for _ in range(2):
        x = fpi.fixed_point(cell, torch.zeros_like(z), z, solver=solver, adjoint=adjoint).value
        derivatives(x, [z], order)
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


KINDS: dict[str, Callable[[], nn.Module]] = {
    "module": Cell,
    "dense": lambda: fpi.cells.Dense(D, D).double(),
    "energy": lambda: fpi.cells.GradientDescent(fpi.cells.MLPEnergy(D, D, 7).double(), 0.1),
    "contract": lambda: contracted(Cell()),
}


def contracted(cell: Cell) -> Cell:
    fpi.contract_(cell.a, 0.5)
    return cell


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


def surroundings() -> dict[str, Any]:
    """All that a solve might change for a while."""
    return {
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "forward level": forward_ad._current_level,
        "levels": len(_functorch.get_interpreter_stack() or ()),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "a mode somewhere": _python_dispatch.is_in_torch_dispatch_mode(),
        "hooks on saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "threads": torch.get_num_threads(),
        "dtype": (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        "warnings": list(warnings.filters),
        "weight cache": (parametrize._cache_enabled, dict(parametrize._cache)),
    }


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("surrounding", ["plain", "cached", "autocast", "inference"])
def test_an_interruption_leaves_nothing_behind(dropout: float, surrounding: str) -> None:
    calls = [0, 0]

    def look() -> None:
        calls[0] += 1
        if calls[0] == calls[1]:
            raise KeyboardInterrupt

    cell = contracted(Cell(dropout, look))
    z = torch.randn(B, D, dtype=F64, requires_grad=surrounding != "inference")
    parameters = dict(cell.named_parameters())
    inside: Any = {
        "plain": contextlib.nullcontext,
        "cached": parametrize.cached,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference": torch.inference_mode,
    }[surrounding]
    import_module("torch._dynamo")  # torch imports it at need, and what it imports sets filters
    before = surroundings()
    state = torch.get_rng_state()
    interrupted = 0
    for calls[1] in range(1, 100):
        calls[0] = 0
        try:
            with inside():
                here = surroundings()
                try:
                    x = fpi.fixed_point(cell, torch.zeros_like(z), z, rtol=1e-2).value
                    if surrounding != "inference":
                        derivatives(x, [z], 2)
                finally:
                    now = surroundings()
                    assert {k: now[k] for k in now if k != "weight cache"} == {
                        k: here[k] for k in here if k != "weight cache"
                    }
        except KeyboardInterrupt:
            interrupted += 1
        else:
            break
        assert surroundings() == before
        assert all(p is parameters[name] for name, p in cell.named_parameters())
    assert interrupted > 4
    assert dropout or torch.equal(torch.get_rng_state(), state)


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
