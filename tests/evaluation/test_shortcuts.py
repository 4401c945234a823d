"""Contract clause 7: prepare and step stand for g only where they say the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hooked_maps import CLOSE, TIGHT, D, by_hand, inputs, start
from torch import Tensor, nn

import fpi_cuda as fpi

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


def test_a_call_that_is_written_otherwise_is_made() -> None:
    """However much prepare and step agree with it today."""
    g, z = Disagreeing().double(), inputs()
    layer = fpi.FPILayer(g, **TIGHT)
    torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)
    assert "its call is not written as return self.step(x, self.prepare(*z))" in layer.explain()
    with torch.no_grad():
        g.bias.fill_(1.0)
    torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)


class Changing(fpi.cells.Cell):
    """What its call does besides depends on an attribute, on a buffer and on z."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Linear(D, D, bias=False)
        nn.init.orthogonal_(self.A.weight, 0.5)
        self.register_buffer("alpha", torch.ones(()))
        self.tau = 1.0

    def prepare(self, z: Tensor) -> Tensor:
        return z

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return torch.tanh(self.A(x) + prepared)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = self.tau * self.alpha * self.step(x, self.prepare(z))
        return 0.5 * y if z.mean() > 0 else y


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_call_that_comes_to_differ(grad: bool) -> None:
    g = Changing().double()
    z = inputs().detach()
    z = z - z.mean() - 0.1
    layer = fpi.FPILayer(g, **TIGHT)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)
        torch.testing.assert_close(layer(-z), by_hand(g, -z), **CLOSE)
        g.tau = 0.5
        torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)
        g.alpha.fill_(0.5)
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
    found = torch.func.jvp(lambda z: fpi.fixed_point(g, start(g), z, **TIGHT).value, (z,), (z,))
    torch.testing.assert_close(found[0].detach(), expected.detach(), **CLOSE)
