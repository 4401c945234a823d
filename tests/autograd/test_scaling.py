"""Incoming gradients of very different size in each row, and near the ends of a dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_state import ADJOINTS, F64, D, orthogonal
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda.testing import backends_available

SOLVERS = [fpi.Picard(), fpi.Anderson(), fpi.Broyden()]


# --- rows of very different size -----------------------------------------------------------------

LARGE_AND_SMALL = {torch.float16: (1e4, 1e-3), torch.float32: (1e30, 1e-30), F64: (1e250, 1e-250)}


def row_by_row(dtype: torch.dtype, adjoint: Any, backend: str | None, order: int) -> None:
    w = orthogonal(0.8, dtype)
    z0 = torch.randn(2, D, dtype=F64).to(dtype)
    g = lambda x, z: torch.tanh(x @ w + z)  # noqa: E731
    rtol = {torch.float16: 2e-3, torch.float32: 1e-5, F64: 1e-9}[dtype]

    def grad(v: Tensor, z: Tensor) -> Tensor:
        z = z.clone().requires_grad_()
        options: dict[str, Any] = {"rtol": rtol, "max_steps": 300, "adjoint": adjoint}
        x = fpi.fixed_point(g, torch.zeros_like(z), z, backend=backend, **options).value
        return torch.autograd.grad(x, z, v, create_graph=order == 2)[0].detach().double()

    v = torch.tensor(LARGE_AND_SMALL[dtype], dtype=F64)[:, None].expand(2, D).to(dtype)
    both = grad(v, z0)
    for row in (0, 1):
        alone = grad(v[row : row + 1], z0[row : row + 1])[0]
        assert (both[row] - alone).norm() <= 0.01 * alone.norm()


@pytest.mark.parametrize("dtype", LARGE_AND_SMALL, ids=str)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("adjoint", [a for a in ADJOINTS if a != fpi.Phantom(k=3)], ids=str)
def test_rows_do_not_share_a_scale(adjoint: Any, order: int, dtype: torch.dtype) -> None:
    row_by_row(dtype, adjoint, None, order)


@pytest.mark.parametrize("backend", [b for b in backends_available() if b != "triton"])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_rows_do_not_share_a_scale_on_any_backend(solver: Any, backend: str) -> None:
    row_by_row(torch.float32, fpi.Implicit(solver=solver), backend, 1)


def test_rows_do_not_share_a_scale_under_autocast() -> None:
    """The state is float32, but the products with its Jacobian are float16."""
    w = orthogonal(0.8, torch.float32)
    z0 = torch.randn(2, D)

    def grad(v: Tensor, z: Tensor) -> Tensor:
        z = z.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16):
            x = fpi.fixed_point(
                lambda x, z: torch.tanh(x @ w + z), torch.zeros_like(z), z, rtol=2e-3
            ).value
        return torch.autograd.grad(x, z, v)[0]

    v = torch.tensor([[1e6], [1e-3]]).expand(2, D).contiguous()
    both, alone = grad(v, z0)[1], grad(v[1:], z0[1:])[0]
    assert (both - alone).norm() <= 0.01 * alone.norm()


@pytest.mark.parametrize("adjoint", [fpi.Implicit(solver=fpi.Picard()), fpi.Neumann(k=30)], ids=str)
def test_coupled_rows_of_very_different_size(adjoint: Any) -> None:
    """Row 1 gets from row 0 what dwarfs its own v: rows scaled alone would be another system."""
    mix = torch.tensor([[0.3, 0.2], [0.2, 0.3]]).half()
    z = torch.randn(2, D).half().requires_grad_()
    x = fpi.fixed_point(
        lambda x, z: 0.5 * (mix @ x) + z, torch.zeros_like(z), z, rtol=2e-3, adjoint=adjoint
    ).value
    v = torch.tensor([[1e4], [1e-3]]).half().expand(2, D).contiguous()
    got = torch.autograd.grad(x, z, v)[0].double()
    want = torch.linalg.solve(torch.eye(2, dtype=F64) - 0.5 * mix.double().T, v.double())
    assert (got - want).norm() <= 0.01 * want.norm()
    assert (got[1] - want[1]).norm() <= 0.02 * want[1].norm()
