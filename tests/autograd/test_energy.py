"""An energy, whose gradient makes a leaf of what does not require grad."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_state import F64, B, D, zeros
from torch import Tensor

import fpi_cuda as fpi

# --- an energy, whose gradient makes a leaf of what does not require grad ------------------------

ONE_STEP = [fpi.JacobianFree(), fpi.Phantom(3, 0.5), fpi.Neumann(0)]


def energy(x: Tensor, z: Tensor) -> Tensor:
    return 0.5 * (x - z).square().sum(1) + 0.3 * torch.cos(x).sum(1)


def descent_by_hand(x: Tensor, z: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(y, z).sum(), y, create_graph=True)
    return x - 0.3 * slope


@pytest.mark.parametrize("adjoint", ONE_STEP, ids=str)
@pytest.mark.parametrize(
    "g", [descent_by_hand, fpi.cells.GradientDescent(energy, 0.3)], ids=["by hand", "cell"]
)
def test_every_order_and_mode_of_an_energy(g: Any, adjoint: Any) -> None:
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    cell = fpi.cells.GradientDescent(energy, 0.3)  # by hand, torch.func cannot make leaves

    def call(z: Tensor, g: Any = cell) -> Tensor:
        sol = fpi.fixed_point(g, zeros(), z, adjoint=adjoint, rtol=1e-10, max_steps=500)
        value: Tensor = sol.value
        return value

    def loss(z: Tensor) -> Tensor:
        return call(z).square().sum()

    with torch.autograd.forward_ad.dual_level():
        dual = call(torch.autograd.forward_ad.make_dual(z.detach(), torch.ones_like(z)), g)
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    ones = torch.ones_like(z.detach())
    torch.testing.assert_close(tangent, torch.func.jvp(call, (z.detach(),), (ones,))[1])
    (first,) = torch.autograd.grad(call(z, g).square().sum(), z, create_graph=True)
    torch.testing.assert_close(first, torch.func.grad(loss)(z))
    (second,) = torch.autograd.grad(first.sum(), z)
    want = torch.func.grad(lambda z: torch.func.grad(loss)(z).sum())(z.detach())
    torch.testing.assert_close(second, want)
