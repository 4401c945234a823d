"""Clause 10: a g that holds its own fixed point is collected, and what comes back is the user's."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from one_state import ADJOINTS, F64, B, D
from torch import Tensor, nn

import fpi_cuda as fpi

TIGHT: dict[str, Any] = {"rtol": 1e-10, "max_steps": 300}
EVERY_ADJOINT = [*ADJOINTS, fpi.Unroll()]


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """What was there before needs no looking at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


KINDS = ["flat", "image", "tuple", "tuple of one"]


def start(kind: str) -> Any:
    if kind == "tuple":
        return torch.zeros(B, D, dtype=F64), torch.zeros(B, 2, 3, dtype=F64)
    if kind == "tuple of one":
        return (torch.zeros(B, 2, 3, dtype=F64),)
    return torch.zeros((B, D) if kind == "flat" else (B, 2, 3), dtype=F64)


def contracted(state: Any, a: Tensor) -> Any:
    """0.5 tanh of each tensor of a state plus a (B, D), the tensors of a tuple mixed."""
    if not isinstance(state, tuple):
        return 0.5 * torch.tanh(state) + a.reshape(state.shape)
    total = sum(t.reshape(B, D) for t in state)
    return tuple((0.3 * torch.tanh(total) + a).reshape(t.shape) for t in state)


class Held:
    """Solves in its constructor, by a method of its own, and keeps everything."""

    def __init__(self, kind: str, adjoint: Any, keep: str) -> None:
        self.a = torch.randn(B, D, dtype=F64, requires_grad=True)
        solution = fpi.fixed_point(self.step, start(kind), adjoint=adjoint, **TIGHT)
        self.solution = solution if keep == "solution" else None
        self.x = solution.value

    def step(self, x: Any) -> Any:
        return contracted(x, self.a)


class HeldModule(nn.Module):
    """The same as a module, which is its own g."""

    def __init__(self, kind: str, adjoint: Any, keep: str) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(B, D, dtype=F64))
        self.solution = fpi.fixed_point(self, start(kind), adjoint=adjoint, **TIGHT)
        self.x = self.solution.value

    def forward(self, x: Any) -> Any:
        return contracted(x, self.a)


def total(x: Any) -> Tensor:
    return sum(t.square().sum() for t in (x if isinstance(x, tuple) else (x,)))  # type: ignore


def nothing(held: Any) -> None:
    pass


def backward(held: Any) -> None:
    total(held.x).backward()


def twice(held: Any) -> None:
    (grad,) = torch.autograd.grad(total(held.x), held.a, create_graph=True)
    torch.autograd.grad(grad.sum(), held.a)


@pytest.mark.parametrize("adjoint", EVERY_ADJOINT, ids=str)
@pytest.mark.parametrize(
    ("make", "kind", "use"),
    [
        *itertools.product([Held], ["flat", "tuple"], [nothing, backward, twice]),
        *itertools.product([Held], ["image", "tuple of one"], [twice]),
        (HeldModule, "flat", twice),
    ],
)
def test_a_holder_of_its_own_fixed_point_is_collected(
    make: Callable[..., Any], kind: str, adjoint: Any, use: Callable[[Any], None]
) -> None:
    held = make(kind, adjoint, "value")
    use(held)
    ref = weakref.ref(held)
    del held
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("kind", KINDS)
def test_with_its_solution_kept(kind: str) -> None:
    held = Held(kind, fpi.Implicit(), "solution")
    ref = weakref.ref(held)
    del held
    gc.collect()
    assert ref() is None


def test_a_layer_that_holds_its_fixed_point() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fpi.FPILayer(fpi.cells.Dense(D, D))
            self.x: Any = None

        def forward(self, z: Tensor) -> Tensor:
            self.x = self.layer(z)
            return self.x

    net = Net()
    net(torch.randn(B, D)).sum().backward()
    ref = weakref.ref(net)
    del net
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("kind", ["flat", "tuple"])
def test_one_tensor_of_a_tuple_is_enough_for_every_derivative(kind: str) -> None:
    """What the others held is not needed."""
    a = torch.randn(B, D, dtype=F64, requires_grad=True)

    def first(a: Tensor) -> Tensor:
        x = fpi.fixed_point(lambda x: contracted(x, a), start(kind), **TIGHT).value
        return x[0] if isinstance(x, tuple) else x

    def slope(a: Tensor) -> Tensor:
        x = first(a)
        loss = x.square().sum()
        del x
        (grad,) = torch.autograd.grad(loss, a, create_graph=True)
        del loss
        return grad

    assert torch.autograd.gradcheck(first, a, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradcheck(slope, a, fast_mode=True)


@pytest.mark.parametrize(
    ("mode", "adjoint"),
    [
        *itertools.product(["grad"], EVERY_ADJOINT),
        *itertools.product(["no_grad", "inference"], [fpi.Implicit(), fpi.Unroll()]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_in_place_operations_on_what_comes_back(kind: str, adjoint: Any, mode: str) -> None:
    a = torch.randn(B, D, dtype=F64, requires_grad=mode == "grad")
    g = lambda x: contracted(x, a)  # noqa: E731
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad}
    with context.get(mode, torch.inference_mode)():
        x = fpi.fixed_point(g, start(kind), adjoint=adjoint, **TIGHT).value
        y = fpi.fixed_point(g, start(kind), adjoint=adjoint, **TIGHT).value
        if not isinstance(x, tuple):
            x, y = (x,), (y,)
        changed = [nn.ReLU(inplace=True)(t.add_(0.1)) for t in x]
        plain = [torch.relu(t + 0.1) for t in y]
        torch.testing.assert_close(changed, plain, rtol=0, atol=0)
    if mode != "grad":
        return
    for create_graph in (False, True):
        got, want = (
            torch.autograd.grad(total(tuple(t)), a, retain_graph=True, create_graph=create_graph)[0]
            for t in (changed, plain)
        )
        torch.testing.assert_close(got, want)
    assert not torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_in_an_in_place_operation_on_a_constant_value(kind: str) -> None:
    """Views of one tensor would refuse it, or hand the graph to one another."""
    w = torch.tensor(2.0, dtype=F64, requires_grad=True)
    with torch.no_grad():
        x = fpi.fixed_point(lambda x: contracted(x, torch.ones(B, D, dtype=F64)), start(kind)).value
    parts = x if isinstance(x, tuple) else (x,)
    parts[0].mul_(w)
    assert parts[0].requires_grad
    parts[0].sum().backward()
    assert w.grad is not None


@pytest.mark.parametrize("adjoint", EVERY_ADJOINT, ids=str)
def test_a_g_that_changes_its_tuple_in_place(adjoint: Any) -> None:
    a = torch.randn(B, D, dtype=F64, requires_grad=True)
    zero = torch.zeros(B, D, dtype=F64)

    def in_place(s: Any) -> Any:
        s[0].mul_(0.3)
        return torch.tanh(s[0] + s[1]) * 0.5 + a, s[0]

    def plain(s: Any) -> Any:
        first = 0.3 * s[0]
        return torch.tanh(first + s[1]) * 0.5 + a, first

    got, want = (
        torch.autograd.grad(
            total(fpi.fixed_point(g, (zero, zero), adjoint=adjoint, **TIGHT).value), a
        )[0]
        for g in (in_place, plain)
    )
    torch.testing.assert_close(got, want)
