"""Where a solve stalls: at the floor of the arithmetic that g runs in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from growing_maps import BF16, F16, F32, Map, Solver, each_solver, orthogonal, short
from torch import Tensor, nn

import fpi_cuda as fpi


@pytest.mark.parametrize("dtype", [BF16, F16], ids=short)
def test_a_state_of_16_bits_has_no_floor_at_half_of_itself(dtype: torch.dtype) -> None:
    """A 2-cycle whose residual is a quarter of ||g|| is no rounding."""
    x0 = torch.full((1, 4), 0.44, dtype=dtype)
    sol = fpi.fixed_point(lambda x: 1 - x, x0, solver=fpi.Picard(), rtol=0.0, max_steps=80)
    assert sol.status.item() == fpi.Status.MAX_STEPS


# --- the floor of the arithmetic that g runs in ---

LINEAR = [None, fpi.Picard(), fpi.Broyden(m=5), fpi.GMRES(), fpi.ConjugateGradient()]


def rounded_cell(rho: float, dim: int) -> tuple[Callable[..., Tensor], Tensor]:
    """A cell whose products autocast rounds, and an input."""
    linear = nn.Linear(dim, dim)
    with torch.no_grad():
        linear.weight.copy_(orthogonal(dim, rho, F32))
    z = torch.randn(8, dim, generator=torch.Generator().manual_seed(1))
    return lambda x, z: torch.tanh(linear(x) + z), z


@pytest.mark.parametrize("low", [BF16, F16], ids=short)
@each_solver
@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("dim", [1, 6, 64])
def test_products_in_16_bits_stall_at_their_noise(
    low: torch.dtype, solver: Solver, rho: float, dim: int
) -> None:
    g, z = rounded_cell(rho, dim)
    with torch.autocast("cpu", low), torch.no_grad():
        sol = fpi.fixed_point(g, torch.zeros_like(z), z, rtol=1e-6, max_steps=500, solver=solver)
        gx = g(sol.value, z).float()
    assert not (sol.status == fpi.Status.MAX_STEPS).any(), sol
    assert int(sol.num_steps.max()) < 250
    true = (gx - sol.value).norm(dim=1)
    stalled = sol.status == fpi.Status.STALLED
    assert (true <= 8 * torch.finfo(low).eps * gx.norm(dim=1))[stalled].all()
    torch.testing.assert_close(sol.residual, true, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("solver", LINEAR, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("low", [BF16, F16], ids=short)
def test_an_adjoint_of_such_products_stalls_too(
    solver: Solver | fpi.GMRES | fpi.ConjugateGradient | None, low: torch.dtype
) -> None:
    g, z = rounded_cell(0.9, 32)
    grads = []
    for enabled in (True, False):
        leaf = z.clone().requires_grad_()
        adjoint = fpi.Implicit(solver=solver, rtol=1e-6)
        with torch.autocast("cpu", low, enabled=enabled):
            x0 = torch.zeros_like(z)
            options = {"rtol": 1e-5, "max_steps": 400, "adjoint": adjoint}
            sol = fpi.fixed_point(g, x0, leaf, **options)
        sol.value.square().sum().backward()
        grads.append(leaf.grad)
        stats = sol.adjoint_stats
        assert stats is not None
        assert not (stats.status == fpi.Status.MAX_STEPS).any()
        assert stats.num_zeroed == 0
    got, want = grads
    assert (got - want).norm() <= 20 * torch.finfo(low).eps * want.norm()


@pytest.mark.parametrize(
    "adjoint", [fpi.Unroll(), fpi.Neumann(k=3), fpi.Phantom(), fpi.JacobianFree()], ids=short
)
def test_other_adjoints_know_the_floor(adjoint: fpi.Unroll | fpi.Neumann) -> None:
    g, z = rounded_cell(0.9, 6)
    z.requires_grad_()
    with torch.autocast("cpu", BF16):
        sol = fpi.fixed_point(g, torch.zeros_like(z), z, rtol=1e-6, max_steps=300, adjoint=adjoint)
    sol.value.float().sum().backward()
    assert not (sol.status == fpi.Status.MAX_STEPS).any()
    assert z.grad.isfinite().all()


def test_the_floor_inside_a_transform_and_of_a_tuple() -> None:
    g, z = rounded_cell(0.9, 6)

    def steps(z: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            zero = torch.zeros(1, 6)
            sol = fpi.fixed_point(
                lambda s, z: (g(s[1], z), 0.9 * s[0]),
                (zero, zero),
                z[None],
                rtol=1e-6,
                max_steps=400,
            )
        return sol.num_steps

    assert int(torch.func.vmap(steps)(z).max()) < 250


@pytest.mark.parametrize("rho", [0.9, 0.999])
@pytest.mark.parametrize("z_size", [1e-3, 1.0])
@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
def test_a_map_in_float32_keeps_its_floor_under_autocast(
    rho: float, z_size: float, activation: Map
) -> None:
    A = orthogonal(6, rho, F32)
    z = z_size * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))

    def g(x: Tensor, z: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return activation(x @ A + z)

    ends = []
    for enabled in (True, False):
        with torch.autocast("cpu", BF16, enabled=enabled), torch.no_grad():
            options = {"solver": fpi.Picard(), "rtol": 1e-7, "max_steps": 20_000}
            ends.append(fpi.fixed_point(g, torch.zeros(4, 6), z, **options))
    under, plain = ends
    assert under.status.tolist() == plain.status.tolist()
    assert torch.equal(under.value, plain.value)
    assert torch.equal(under.residual, plain.residual)
    assert (under.num_steps - plain.num_steps <= 5).all()


def test_what_is_measured_is_counted_and_capped() -> None:
    g, z = rounded_cell(0.9, 6)
    calls = 0

    def counted(x: Tensor, z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return g(x, z)

    for max_steps in (18, 21, 25, 45, 46, 47, 100):
        calls = 0
        with torch.autocast("cpu", BF16), torch.no_grad():
            sol = fpi.fixed_point(counted, torch.zeros_like(z), z, rtol=0.0, max_steps=max_steps)
        assert int(sol.num_steps.max()) <= min(calls, max_steps)
        # One more probes the rows, another looks at them in the end.
        assert calls <= max_steps + 5 * (max_steps // 20) + 2
