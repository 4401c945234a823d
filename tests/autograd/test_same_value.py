"""Clause 6: a gradient is right, or refused, or a warning says that it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_state import ADJOINTS, F64, B, D, orthogonal, zeros
from torch import Tensor, nn

import fpi_cuda as fpi

TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 400}
REFUSED = "in place|inplace|another value|other tensors"


# --- what changes between forward and backward ---------------------------------------------------


class Gain(nn.Module):
    """tanh(gain x A + t), with everything that a user may change."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(orthogonal(0.5))
        self.register_buffer("offset", torch.randn(D, dtype=F64))
        self.gain = 1.0
        self.closed_over = torch.randn(D, dtype=F64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.gain * x @ self.a + t + self.offset + self.closed_over)


def change_z(g: Gain, t: Tensor, rel: float) -> None:
    t.mul_(1 + rel)


def change_z_by_data(g: Gain, t: Tensor, rel: float) -> None:
    t.data.mul_(1 + rel)


def change_one_number(g: Gain, t: Tensor, rel: float) -> None:
    t[0, 0] *= 1 + rel


def change_buffer(g: Gain, t: Tensor, rel: float) -> None:
    g.offset.mul_(1 + rel)


def exchange_buffer(g: Gain, t: Tensor, rel: float) -> None:
    g.offset = g.offset * (1 + rel)


def change_closure(g: Gain, t: Tensor, rel: float) -> None:
    g.closed_over.mul_(1 + rel)


def change_number(g: Gain, t: Tensor, rel: float) -> None:
    g.gain *= 1 + rel


def change_parameter(g: Gain, t: Tensor, rel: float) -> None:
    with torch.no_grad():
        g.a.mul_(1 + rel)


CHANGES = [
    change_z,
    change_z_by_data,
    change_one_number,
    change_buffer,
    exchange_buffer,
    change_closure,
    change_number,
    change_parameter,
]


@pytest.mark.parametrize(
    ("adjoint", "rel"),
    [(ADJOINTS[0], 1e-9), (ADJOINTS[0], 9e-3), *((adjoint, 1e-3) for adjoint in ADJOINTS[1:])],
    ids=str,
)
@pytest.mark.parametrize("change", CHANGES)
def test_a_small_change_before_create_graph(
    change: Callable[[Gain, Tensor, float], None], adjoint: Any, rel: float
) -> None:
    g, t = Gain(), torch.randn(B, D, dtype=F64)
    x = fpi.fixed_point(g, zeros(), t, adjoint=adjoint, **TIGHT).value
    change(g, t, rel)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(x.square().sum(), g.a, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_change_in_z_in_other_arithmetic(dtype: torch.dtype) -> None:
    """What its rounding would hide, the count of changes shows."""
    w = nn.Parameter(orthogonal(0.5, dtype))
    t = torch.randn(B, D).to(dtype)
    x = fpi.fixed_point(lambda x, t: torch.tanh(x @ w + t), torch.zeros_like(t), t, rtol=0.1).value
    t.mul_(1.001)
    with pytest.raises(RuntimeError, match=r"z.0. .*in place"):
        torch.autograd.grad(x.sum(), w, create_graph=True)


def test_a_change_that_the_value_of_g_cannot_show() -> None:
    """s multiplies what is zero at the solution; its derivative does not vanish there."""
    a = orthogonal(0.5).requires_grad_()
    s = torch.zeros(D, dtype=F64)
    t = torch.randn(B, D, dtype=F64)
    x = fpi.fixed_point(lambda x, t, s: torch.tanh(x @ a + t) * (1 + s), zeros(), t, s, **TIGHT)
    s.add_(0.0)
    with pytest.raises(RuntimeError, match="in place"):
        torch.autograd.grad(x.value.sum(), a, create_graph=True)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("norm", ["batch norm", "spectral norm", "old spectral norm"])
@pytest.mark.filterwarnings("ignore:.*nn.utils.spectral_norm.*:FutureWarning")
def test_buffers_that_g_moves_itself_do_no_harm(norm: str, adjoint: Any) -> None:
    linear = nn.Linear(D, D).double()
    if norm == "spectral norm":
        linear = nn.utils.parametrizations.spectral_norm(linear)
    elif norm == "old spectral norm":
        linear = nn.utils.spectral_norm(linear)
    bn = nn.BatchNorm1d(D).double() if norm == "batch norm" else nn.Identity()

    class G(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bn = linear, bn

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return 0.3 * torch.tanh(self.bn(0.1 * self.linear(x) + z))

    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    # Few steps: power iteration is far from its end.
    x = fpi.fixed_point(G(), zeros(), z, rtol=1e-3, adjoint=adjoint).value
    plain = torch.autograd.grad(x.square().sum(), z, retain_graph=True)[0]
    slope = torch.autograd.grad(x.square().sum(), z, create_graph=True)[0]
    torch.testing.assert_close(slope.detach(), plain, rtol=1e-2, atol=1e-4)
    torch.autograd.grad(slope.square().sum(), z)


def test_first_order_goes_on_where_nothing_is_evaluated_again() -> None:
    g, t = Gain(), torch.randn(B, D, dtype=F64)
    x = fpi.fixed_point(g, zeros(), t, **TIGHT).value
    want = torch.autograd.grad(x.square().sum(), g.a, retain_graph=True)[0]
    g.gain = 3.0
    got = torch.autograd.grad(x.square().sum(), g.a)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("adjoint", [fpi.JacobianFree(), fpi.Implicit()], ids=str)
def test_another_tensor_in_the_place_of_a_closure_is_refused(
    adjoint: Any, requires_grad: bool
) -> None:
    """Though it has the same numbers: the gradient belongs to the one that was there."""
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    held = [orthogonal(0.5).requires_grad_()]
    sol = fpi.fixed_point(lambda x, z: torch.tanh(x @ held[0] + z), zeros(), z, adjoint=adjoint)
    held[0] = held[0].detach().clone().requires_grad_(requires_grad)
    with pytest.raises(RuntimeError, match="depended on other tensors"):
        torch.autograd.grad(sol.value.sum(), z, create_graph=True)


def test_a_change_in_the_small_part_of_a_state_is_refused() -> None:
    a, factor = orthogonal(0.5, torch.float32), [1.0]

    def g(s: tuple[Tensor, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        return 1e5 * torch.tanh(1e-5 * s[0] @ a + z), torch.tanh(factor[0] * s[1] @ a + z)

    z = torch.randn(B, D, requires_grad=True)
    x0 = (torch.zeros(B, D), torch.zeros(B, D))
    sol = fpi.fixed_point(g, x0, z, rtol=1e-6)
    factor[0] = 1.01
    with pytest.raises(RuntimeError, match="another value than in the forward pass"):
        torch.autograd.grad(sol.value[1].sum(), z, create_graph=True)


def test_modules_that_torch_has_made_are_evaluated_again_too() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(D, D, dtype=F64)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.a(x) + z)

    plain, z = Plain(), torch.randn(B, D, dtype=F64, requires_grad=True)
    found = []
    for g in (plain, torch.fx.symbolic_trace(plain)):
        value = fpi.fixed_point(g, zeros(), z, rtol=1e-10).value
        (first,) = torch.autograd.grad(value.sum(), z, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), z)))
    torch.testing.assert_close(*found)


def test_an_optimizer_step_before_backward_is_noticed() -> None:
    cell = fpi.cells.Dense(D, D)
    x = fpi.fixed_point(cell, torch.zeros(B, D), torch.randn(B, D)).value
    with torch.no_grad():
        cell.A.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()
