"""Contract clause 7: what hangs on the parts of g, its class, its energy, and on torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hooked_maps import (
    CELLS,
    CLOSE,
    F64,
    TIGHT,
    B,
    D,
    Own,
    by_hand,
    dense,
    descent,
    halved,
    inputs,
    mlp,
    start,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fpi_cuda as fpi
from fpi_cuda import cells

# --- hooks and patches further in ---------------------------------------------------------------

INSIDE: dict[str, Callable[[nn.Module, pytest.MonkeyPatch], Any]] = {
    "hook": lambda m, _: m.register_forward_hook(lambda m, args, out: 0.5 * out),
    "pre_hook": lambda m, _: m.register_forward_pre_hook(lambda m, args: (0.5 * args[0],)),
    "patched": lambda m, _: setattr(m, "forward", lambda x: 0.5 * functional.linear(x, m.weight)),
    "linear": lambda m, patch: patch.setattr(
        nn.Linear, "forward", lambda s, x: 0.5 * functional.linear(x, s.weight, s.bias)
    ),
    "functional": lambda m, patch: patch.setattr(
        functional, "linear", lambda x, w, b=None: 0.5 * torch._C._nn.linear(x, w, b)
    ),
    "pruned": lambda m, _: prune.l1_unstructured(m, "weight", 0.5),
    "weight_norm": lambda m, _: parametrize.register_parametrization(m, "weight", Doubled()),
}


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def true_step(g: Any, x: Tensor, z: Tensor) -> Tensor:
    """A call of g, a descent taken along the gradient that autograd finds of its energy."""
    if not isinstance(g, cells.GradientDescent):
        return g(x, z)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(g.energy(leaf, z).sum(), leaf)
    return (x - g.step_size * gradient).detach()


@pytest.mark.parametrize("route", [None, "host"])
@pytest.mark.parametrize("how", INSIDE)
@pytest.mark.parametrize("name", ["dense", "mlp", "descent", "own"])
def test_what_hangs_on_a_linear_inside(
    name: str, how: str, route: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, z = CELLS[name]().double(), inputs()
    owner = g.energy if isinstance(g, cells.GradientDescent) else g
    INSIDE[how](owner.M if isinstance(g, Own) else owner.A, monkeypatch)
    x = start(g)
    for _ in range(300):
        x = true_step(g, x, z).detach()
    sol = fpi.fixed_point(g, start(g), z, route=route, **TIGHT)
    torch.testing.assert_close(sol.value.detach(), x, **CLOSE)


def energy_hook(energy: nn.Module, patch: pytest.MonkeyPatch) -> None:
    energy.register_forward_hook(lambda m, args, out: 0.5 * out)


def energy_forward(energy: nn.Module, patch: pytest.MonkeyPatch) -> None:
    old = energy.forward
    energy.forward = lambda x, z: 0.5 * old(x, z)


def energy_value(energy: Any, patch: pytest.MonkeyPatch) -> None:
    old = energy.value
    energy.value = lambda x, prepared: 0.5 * old(x, prepared)


def class_value(energy: Any, patch: pytest.MonkeyPatch) -> None:
    old = cells.MLPEnergy.value
    patch.setattr(cells.MLPEnergy, "value", lambda s, x, prepared: 0.5 * old(s, x, prepared))


def class_forward(energy: Any, patch: pytest.MonkeyPatch) -> None:
    old = cells.MLPEnergy.forward
    patch.setattr(cells.MLPEnergy, "forward", lambda s, x, z: 0.5 * old(s, x, z))


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


def other_linear(energy: Any, patch: pytest.MonkeyPatch) -> None:
    energy.A = Halved(D, 9, bias=False).double()


@pytest.mark.parametrize("route", [None, "host"])
@pytest.mark.parametrize(
    "change",
    [energy_hook, energy_forward, energy_value, class_value, class_forward, other_linear],
)
def test_a_descent_follows_the_energy_that_is_called(
    change: Callable[[Any, pytest.MonkeyPatch], None],
    route: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g, z = descent().double(), inputs()
    change(g.energy, monkeypatch)  # type: ignore[arg-type]
    x = torch.randn(B, D, dtype=F64)
    torch.testing.assert_close(g(x, z), true_step(g, x, z))
    sol = fpi.fixed_point(g, start(g), z, route=route, **TIGHT)
    for _ in range(300):
        x = true_step(g, x, z)
    torch.testing.assert_close(sol.value.detach(), x, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "method", "make"),
    [
        (cells.Dense, "step", dense),
        (cells.Dense, "forward", dense),
        (cells.Cell, "forward", mlp),
        (cells.GradientDescent, "step", descent),
        (nn.Module, "__call__", dense),
        (nn.Module, "_call_impl", mlp),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_patched_classes(
    kind: Any, method: str, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    g, z, old = make().double(), inputs(), getattr(kind, method)

    def other(self: nn.Module, *args: Any) -> Any:
        out = old(self, *args)
        return halved(out) if self is g else out

    monkeypatch.setattr(kind, method, other)
    expected = by_hand(g, z)
    torch.testing.assert_close(fpi.FPILayer(g, **TIGHT)(z), expected.detach(), **CLOSE)


class HalvedTanh(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 0.5 * out if func is torch.tanh else out


class HalvedProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 0.5 * out if func is torch.ops.aten.tanh.default else out


@pytest.mark.parametrize("mode", [HalvedTanh, HalvedProducts])
def test_a_mode_sees_what_torch_computes(mode: Any) -> None:
    g, z = Own().double(), inputs()
    with torch.no_grad(), mode():
        expected = by_hand(g, z)
        value = fpi.fixed_point(g, start(g), z, **TIGHT).value
    torch.testing.assert_close(value, expected, **CLOSE)
    # A default device is one too, and sees nothing.
    with torch.no_grad(), torch.device("cpu"):
        assert fpi.fixed_point(g, start(g), z, route="fused", **TIGHT).converged.all()
