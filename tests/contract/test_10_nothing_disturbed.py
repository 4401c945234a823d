"""Contract, 10: nothing outside is disturbed, whatever g, solver, adjoint and route.

Not other threads' random numbers and evaluations, nor global flags and caches.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from choices import ADJOINTS, SOLVERS
from torch import Tensor, nn
from torch.nn.utils import parametrize
from watched import F64, B, Cell, D, contracted, derivatives, surroundings

import fpi_cuda as fpi

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


class Raising(nn.Module):
    """0.5 tanh(W x) + z with dropout, which raises in its n-th evaluation."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = fpi.contract_(nn.Linear(D, D, bias=False), 0.9)
        self.error = error
        self.left = 0

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return 0.5 * torch.tanh(torch.dropout(self.linear(x), 0.2, True)) + z

    def weight_gradient(self) -> Tensor:
        """Of the parameter behind the weight, which autocast and cached() keep a copy of."""
        (grad,) = torch.autograd.grad(self.linear(torch.ones(1, D)).sum(), self.parameters())
        return grad


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def solve(module: Raising, z: Tensor, **options: Any) -> Tensor:
    return fpi.fixed_point(module, torch.zeros_like(z), z, rtol=1e-2, **options).value


def loss(module: Raising, z: Tensor, **options: Any) -> Tensor:
    return (solve(module, z, **options) ** 2).sum()


def twice(module: Raising, z: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss(module, z), z, create_graph=True)
    return torch.autograd.grad(grad.sum(), z)[0]


PLACES: dict[str, Callable[[Raising, Tensor], Tensor]] = {
    "plain": solve,
    "unrolled": lambda m, z: solve(m, z, adjoint=fpi.Unroll()),
    "backward": lambda m, z: torch.autograd.grad(loss(m, z), z)[0],
    "double backward": twice,
    "func.grad": lambda m, z: torch.func.grad(functools.partial(loss, m))(z.detach()),
    "func.jvp": lambda m, z: torch.func.jvp(
        functools.partial(solve, m), (z.detach(),), (z.detach(),)
    )[1],
    "vmap": lambda m, z: torch.func.vmap(functools.partial(solve, m), randomness="same")(
        z.detach()[None]
    ),
    "hessian": lambda m, z: torch.func.jacrev(torch.func.grad(functools.partial(loss, m)))(
        z.detach()
    ),
}
CONTEXTS = {
    "": contextlib.nullcontext,
    "autocast": autocast,
    "cached": parametrize.cached,
}


# An interrupt is no Exception, and what nobody may swallow is one.
ERRORS = [KeyboardInterrupt(), ZeroDivisionError(), KeyboardInterrupt()]


@pytest.mark.parametrize(("context", "error"), list(zip(CONTEXTS, ERRORS, strict=True)))
@pytest.mark.parametrize("place", PLACES)
def test_a_g_that_raises_leaves_nothing_behind(
    place: str, context: str, error: BaseException
) -> None:
    call = PLACES[place]
    module = Raising(error)
    z = torch.randn(B, D, requires_grad=True)
    with CONTEXTS[context]():
        call(module, z)  # the first solve of a map probes it
    with CONTEXTS[context]():
        torch.manual_seed(1)
        module.left = 0
        expected = call(module, z)
        evaluations = -module.left
    with CONTEXTS[context]():
        weight_gradient = module.weight_gradient()
    for stop in sorted({1, 2, 4, evaluations - 1, evaluations}):
        with CONTEXTS[context]():
            torch.manual_seed(1)
            before = surroundings()
            module.left = stop
            with pytest.raises(type(error)):
                call(module, z)
            after = surroundings()
            # A cache may keep a weight, but none without its graph.
            before.pop("weight cache"), after.pop("weight cache")
            assert after == before
            assert torch.equal(module.weight_gradient(), weight_gradient)
    assert z.grad is None
    with CONTEXTS[context]():
        torch.manual_seed(1)
        module.left = 0
        assert torch.equal(call(module, z), expected)


def test_a_solve_in_inference_mode_or_no_grad_that_raises() -> None:
    module = Raising(KeyboardInterrupt())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            before = surroundings()
            module.left = 1
            with pytest.raises(KeyboardInterrupt):
                solve(module, torch.randn(B, D))
            assert surroundings() == before
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("is_pair", [False, True], ids=["tensor", "pair"])
@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_the_tensors_given_are_left_alone(
    is_pair: bool, backend: str | None, solver: Any, adjoint: Any
) -> None:
    x0 = torch.randn(B, D, dtype=F64)
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    weight = (0.1 * torch.randn(D, D, dtype=F64)).requires_grad_()
    given = [x0, z, weight]
    before = [t.detach().clone() for t in given]
    versions = [t._version for t in given]

    def g(x: Any, z: Tensor) -> Any:
        if is_pair:
            return torch.tanh(x[1] @ weight + z), x[0]
        x.mul_(0.9)  # its own copy
        return torch.tanh(x @ weight + z)

    start = (x0, x0) if is_pair else x0
    sol = fpi.fixed_point(g, start, z, solver=solver, adjoint=adjoint, backend=backend)
    value = sum(sol.value) if is_pair else sol.value
    torch.autograd.grad(value.square().sum(), [z, weight])
    assert [t._version for t in given] == versions
    assert all(map(torch.equal, given, before))
    assert all(t.grad is None for t in given)
    assert not x0.requires_grad
    value = fpi.fixed_point(g, start, z, adjoint=adjoint).value
    (value[0] if is_pair else value).sum().backward()
    assert x0.grad is None
    assert z.grad is not None
