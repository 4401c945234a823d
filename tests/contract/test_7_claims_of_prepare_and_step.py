"""Contract clause 7: prepare and step stand for g only where they say the same."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hooked_maps import (
    CLOSE,
    TIGHT,
    D,
    by_hand,
    inputs,
    start,
)
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda.implicit import hoisting
from fpi_cuda.state import layout_of

# --- prepare and step that say something else than the call -------------------------------------


class Disagreeing(nn.Module):
    """prepare and step forget a bias, which the call adds."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Linear(D, D, bias=False)
        nn.init.orthogonal_(self.A.weight, 0.5)
        self.bias = nn.Parameter(torch.zeros(D))

    def prepare(self, z: Tensor) -> Tensor:
        return z

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return torch.tanh(self.A(x) + prepared)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.A(x) + z + self.bias)


def test_a_claim_of_prepare_and_step_is_compared() -> None:
    g, z = Disagreeing().double(), inputs()
    layer = fpi.FPILayer(g, **TIGHT)
    torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)
    assert "runs once per solve" in layer.explain()
    with torch.no_grad():
        g.bias.fill_(1.0)
    torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)
    assert "step(x, prepare(*z)) is not what g(x, *z) is" in layer.explain()


def test_the_claim_is_compared_once() -> None:
    calls = []

    class Claiming(Disagreeing):
        def prepare(self, z: Tensor) -> Tensor:
            calls.append("prepare")
            return super().prepare(z) + self.bias

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            calls.append("forward")
            return super().forward(x, z)

    g, z = Claiming().double(), inputs()
    layer = fpi.FPILayer(g, **TIGHT)
    layer(z)
    assert calls.count("forward") == 1
    calls.clear()
    layer(z)
    assert calls == ["prepare"]
    with torch.no_grad():
        g.bias.fill_(0.5)
    torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)
    g.step = lambda x, prepared: 0.5 * prepared  # type: ignore[method-assign]
    torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)


class Raising(Disagreeing):
    """Its prepare and step are for something else."""

    def prepare(self) -> None:  # type: ignore[override]
        pass

    def step(self) -> None:  # type: ignore[override]
        pass

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return super().forward(x, z)


class Callable_:
    """No module."""

    def prepare(self, z: Tensor) -> Tensor:
        return z

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return 0.3 * torch.sin(x) + prepared

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.6 * torch.sin(x) + z


class Inheriting(Callable_):
    __slots__ = ()

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * super().__call__(x, z)


def function() -> Any:
    def g(x: Tensor, z: Tensor) -> Tensor:
        return 0.6 * torch.sin(x) + z

    g.prepare = lambda z: z  # type: ignore[attr-defined]
    g.step = lambda x, prepared: 0.3 * torch.sin(x) + prepared  # type: ignore[attr-defined]
    return g


@pytest.mark.parametrize("make", [Raising, Callable_, Inheriting, function])
def test_the_call_is_right_where_they_disagree(make: Callable[[], Any]) -> None:
    g, z = make(), inputs()
    g = g.double() if isinstance(g, nn.Module) else g
    expected = by_hand(g, z)
    sol = fpi.fixed_point(g, start(g), z, **TIGHT)
    torch.testing.assert_close(sol.value.detach(), expected.detach(), **CLOSE)
    # What cannot be compared is called, too.
    hoisting._verdicts.pop(g, None)
    found = torch.func.jvp(lambda z: fpi.fixed_point(g, start(g), z, **TIGHT).value, (z,), (z,))
    torch.testing.assert_close(found[0].detach(), expected.detach(), **CLOSE)


def test_comparing_leaves_no_trace() -> None:
    class Normed(Disagreeing):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(D)

        def step(self, x: Tensor, prepared: Tensor) -> Tensor:
            return 0.5 * self.norm(super().step(x, prepared))

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return 0.5 * self.norm(torch.tanh(self.A(x) + z))

    g, z = Normed().double(), inputs()
    before = copy.deepcopy(g.state_dict())
    random = torch.get_rng_state()
    assert hoisting.why_whole(g, layout_of(start(g)), (z,)) is None
    torch.testing.assert_close(g.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    gone = weakref.ref(g)
    del g
    gc.collect()
    assert gone() is None
