"""Small maps of many forms, drawn at random: captured, they are what the host has of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fpi_cuda as fpi
from fpi_cuda.loops.fused.forms import forms
from fpi_cuda.lowered import NotLowered

pytestmark = pytest.mark.skipif(not fpi.native_available(), reason="no native library")

F64 = torch.float64
B, D, HIDDEN = 4, 5, 3
TIGHT: dict[str, Any] = {"rtol": 1e-11, "max_steps": 300}
NUM_MAPS = 20

ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    torch.tanh, Tensor.tanh, torch.sigmoid, F.relu, torch.relu, F.gelu, F.softplus,
    lambda u: u, lambda u: F.relu(u, inplace=True), lambda u: u.tanh_(), lambda u: u.sigmoid_(),
    lambda u: F.dropout(u, 0.5, training=False).tanh(), lambda u: u.clone().tanh(),
]  # fmt: skip


class Drawn(nn.Module):
    """One or two layers, with terms, factors, residuals and in-place forms as drawn."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        widths = draw.choice([[D], [D], [HIDDEN, D], [D, D]])
        self.products, self.acts, self.terms, self.factors = [], [], [], []
        inputs = D
        for outputs in widths:
            layer = nn.Linear(inputs, outputs, bias=draw.random() < 0.5, dtype=F64)
            nn.init.orthogonal_(layer.weight, 0.5)
            self.layers.append(layer)
            self.products.append(draw.randrange(7))
            self.acts.append(draw.choice(ACTIVATIONS))
            self.terms.append(draw.randrange(9))
            self.factors.append(draw.randrange(7))
            inputs = outputs
        self.of_z = nn.Linear(D, D, dtype=F64)
        self.narrow = nn.Linear(D, HIDDEN, dtype=F64)
        self.gate = nn.Parameter(torch.rand(D, dtype=F64))
        self.size = draw.choice([1.0, 0.5, -0.7])
        self.carry = draw.choice([0.0, 0.0, 0.2, -0.3])
        self.ending = draw.randrange(5)

    def product(self, kind: int, layer: nn.Linear, x: Tensor) -> Tensor:
        w, b = layer.weight, 0.0 if layer.bias is None else layer.bias
        if kind == 0:
            return x @ w.mT + b
        if kind == 1:
            return F.linear(x, w, layer.bias)
        if kind == 2 and layer.bias is not None:
            return torch.addmm(layer.bias, x, w.t())
        if kind == 3:
            return torch.mm(x, w.transpose(0, 1)).add_(b)
        if kind == 4:
            return x.matmul(0.5 * (w + w.tanh()).T) - b
        return layer(x)

    def term(self, kind: int, u: Tensor, z: Tensor) -> Tensor:
        shift = self.of_z(z) if u.shape[1] == D else self.narrow(z)
        if kind == 0:
            return u
        if kind == 1:
            return u + shift
        if kind == 2:
            return shift - u
        if kind == 3:
            u += shift.tanh()
            return u
        if kind == 4:
            return 0.5 * u + (shift.mean(0) + 1)
        if kind == 5:
            return u / 2 + shift[:1] - 0.1
        if kind == 6:
            return u.sub(shift.mean(1, keepdim=True)) * 0.9
        if kind == 7:
            p = shift * 1.0
            p.relu_().mul_(0.3)
            return p.add(u)
        return -u + z.sum() * 0.01

    def factor(self, kind: int, h: Tensor, z: Tensor) -> Tensor:
        gate = torch.sigmoid(z @ self.gate)[:, None]
        if kind == 1:
            return h * self.size
        if kind == 2:
            return gate * h
        if kind == 3:
            return h.mul(torch.sigmoid(z).mean(0)[: h.shape[1]])
        if kind == 4:
            return h / (1 + gate)
        return h

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = x
        for i, layer in enumerate(self.layers):
            u = self.term(self.terms[i], self.product(self.products[i], layer, h), z)
            h = self.factor(self.factors[i], self.acts[i](u), z)
        if self.ending == 1:
            return h + self.carry * x
        if self.ending == 2:
            return self.carry * x - h
        if self.ending == 3:
            return (0.9 * h).contiguous() + x * self.carry
        return h


def solved(g: Any, z: Tensor, route: str | None) -> list[Tensor]:
    """Value, gradients, second derivatives and many gradients at once, in one list."""
    z = z.detach().requires_grad_()
    layer = fpi.FPILayer(g, route=route, **TIGHT)
    leaves = [z, *g.parameters()]
    solution = layer.solve(z)
    v = torch.linspace(-1, 1, z.numel(), dtype=F64).view_as(z)
    given: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
    first = torch.autograd.grad(solution.value, leaves, v, **given)
    with_graph = torch.autograd.grad(
        solution.value, leaves, v, create_graph=True, materialize_grads=True
    )
    size = sum((t * t).sum() for t in with_graph)
    second = torch.autograd.grad(size, leaves, **given) if size.requires_grad else ()
    many = torch.autograd.grad(
        solution.value, leaves, torch.stack([v, 2 * v]), is_grads_batched=True, **given
    )
    huge = torch.autograd.grad(solution.value, leaves, 1e200 * v, **given)
    tiny = torch.autograd.grad(solution.value, leaves, 1e-200 * v, **given)
    with torch.no_grad():
        calm = layer(z)
    _, pull = torch.func.vjp(fpi.FPILayer(g, **TIGHT), z.detach())
    status = solution.status.to(F64)
    scaled = [*(1e-200 * t for t in huge), *(1e200 * t for t in tiny)]
    return [
        status, solution.value, calm, *first, *with_graph, *second, *many, *scaled, *pull(v)
    ]  # fmt: skip


def capture_is_refused(g: nn.Module, z: Tensor) -> bool:
    """Whether the fused loop has no form for g."""
    try:
        forms.of(g, torch.zeros_like(z), (z,))
    except NotLowered:
        return True
    return False


def compared(number: int) -> bool:
    """Compare one map on two routes; False where it has none of the kernels' forms."""
    draw = random.Random(number)
    torch.manual_seed(number)
    g, z = Drawn(draw), torch.randn(B, D, dtype=F64)
    if number % 3 == 0:
        z[1] = torch.nan
    if capture_is_refused(g, z):
        return False
    expected = solved(g, z, "host")
    for _ in range(2):
        found = solved(g, z, None)
        for place, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(
                mine, theirs, rtol=1e-6, atol=1e-7, equal_nan=True,
                msg=lambda said, place=place: f"{place}: {said}",
            )  # fmt: skip
    return True


@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_drawn_maps_are_solved_as_by_the_host() -> None:
    forms.clear()
    assert sum(map(compared, range(NUM_MAPS))) > NUM_MAPS // 2
