"""An activation of a user's own, as README has it, and wrong ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda import cells

README = (Path(__file__).parents[1] / "README.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(def softsign_derivative.*?)```", README, re.DOTALL)


@pytest.fixture
def softsign() -> Iterator[None]:
    exec(EXAMPLE, {"torch": torch, "fpi": fpi})
    yield
    del cells.ACTIVATIONS["softsign"]


@pytest.mark.usefixtures("softsign")
@pytest.mark.parametrize("kind", ["Dense", "MLP", "MLPEnergy"])
def test_the_host_takes_it(kind: str) -> None:
    """Same value and gradient as of g written by hand, and the fused loop says why it does not."""
    torch.manual_seed(0)
    cell: Any = {
        "Dense": lambda: cells.Dense(5, 7, "softsign"),
        "MLP": lambda: cells.MLP(5, 7, 11, "softsign", "softsign"),
        "MLPEnergy": lambda: cells.GradientDescent(cells.MLPEnergy(5, 7, 11, "softsign"), 0.3),
    }[kind]()
    cell.double()
    layer = fpi.FPILayer(cell, rtol=1e-10, max_steps=300)
    assert "no kernel computes the activation 'softsign'" in layer.explain(), layer.explain()
    with pytest.raises(RuntimeError, match="no kernel computes the activation 'softsign'"):
        fpi.FPILayer(cell, route="fused")(torch.zeros(2, 5, dtype=torch.float64))
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    act = torch.nn.functional.softsign

    def by_hand(x: Tensor) -> Tensor:
        if kind == "Dense":
            return act(cell.A(x) + cell.B(z))
        if kind == "MLP":
            return act(cell.W(act(cell.A(x) + cell.B(z))))
        e = cell.energy
        leaf = x if x.requires_grad else x.requires_grad_()
        f = (act(e.A(leaf) + e.B(z)) * e.w).sum() + e.quadratic / 2 * leaf.square().sum()
        return leaf - 0.3 * torch.autograd.grad(f, leaf, create_graph=True)[0]

    x = torch.zeros(3, 7, dtype=torch.float64)
    for _ in range(300):
        x = by_hand(x)
    found = layer(z)
    torch.testing.assert_close(found, x, rtol=1e-7, atol=1e-8)
    for p in (z, *cell.parameters()):
        ours, theirs = (
            torch.autograd.grad(y.square().sum(), p, retain_graph=True)[0] for y in (found, x)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_name_that_is_taken_is_refused() -> None:
    def same(u: Tensor) -> Tensor:
        return u

    for name in ("tanh", "sigmoid_derivative"):
        with pytest.raises(ValueError, match=f"name must be a new one, got '{name}'"):
            cells.add_activation(name, cells.Activation(same, torch.ones_like, 1.0))
    if fpi.native_available():
        with pytest.raises(RuntimeError, match="activation1 must be from 0 to"):
            torch.ops.fpi_cuda.cell_loop_(
                torch.zeros(1, 1), None, torch.ones(1, 1), *[None] * 7,
                torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int8),
                torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.float64),
                activation1=11, activation2=0, carry=0.0, depth=0, rtol=0.0, max_steps=1,
                beta=1.0, ridge=0.0, precision=0,
            )  # fmt: skip


def cosine(u: Tensor) -> Tensor:
    return torch.cos(u)


def cosine_without_tails(u: Tensor) -> Tensor:
    return torch.cos(u).masked_fill(u.abs() > 50, torch.nan)


def by_numpy(u: Tensor) -> Tensor:
    return torch.from_numpy(u.detach().numpy() ** 2)


@pytest.mark.parametrize(
    ("name", "activation", "error", "message"),
    [
        (3, cells.Activation(torch.sin, cosine, 1.0), TypeError, "name must be a string, got int"),
        ("my sin", cells.Activation(torch.sin, cosine, 1.0), ValueError, "must be an identifier"),
        ("sine", torch.sin, TypeError, r"must be an Activation\(value, derivative, lipschitz\)"),
        ("sine", cells.Activation(torch.sin, cosine, 0), ValueError, r"lipschitz must be in \(0"),
        ("sine", cells.Activation(torch.sin, cosine, float("inf")), ValueError, "lipschitz"),
        ("sine", cells.Activation(torch.sin, cosine, "1"), TypeError, "lipschitz must be a number"),
        (
            "sine",
            cells.Activation(torch.sin, torch.sin, 1.0),
            ValueError,
            "the derivative of sine must be that of its value, but at .* autograd finds",
        ),
        (
            "sine",
            cells.Activation(torch.sin, cosine_without_tails, 1.0),
            ValueError,
            "the derivative of sine must be that of its value",
        ),
        ("sine", cells.Activation(by_numpy, cosine, 1.0), ValueError, "that autograd can"),
        ("sine", cells.Activation(torch.sum, cosine, 1.0), ValueError, "elementwise"),
        ("sine", cells.Activation(torch.sin, torch.sum, 1.0), ValueError, "must be elementwise"),
        ("sine", cells.Activation(3, cosine, 1.0), TypeError, "value must be a function"),
        ("sine", cells.Activation(torch.sin, None, 1.0), TypeError, "derivative must be a"),
        ("sine", cells.Activation(torch.sin, cosine, 0.5), ValueError, "which is 1 somewhere"),
        ("sine", cells.Activation(torch.sin_, torch.sin, 1.0), ValueError, "must be that of its"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("grad", [True, False])
def test_what_cannot_be_an_activation_is_refused(
    name: Any, activation: Any, error: type[Exception], message: str, grad: bool
) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(error, match="add_activation: .*" + message):
        cells.add_activation(name, activation)
    assert name not in cells.ACTIVATIONS


def test_a_derivative_with_kinks_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells.cell, "ACTIVATIONS", dict(cells.ACTIVATIONS))
    relu6 = cells.Activation(
        torch.nn.functional.relu6, lambda u: ((u > 0) & (u < 6)).to(u.dtype), 1.0
    )
    with torch.no_grad():
        cells.add_activation("relu6", relu6)
