"""Awkward input and faults of g: a status for the sample, or the right result."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda import Status

F64 = torch.float64
SOLVERS = {
    "picard": fpi.Picard(),
    "damped": fpi.Picard(damping=0.6),
    "anderson": fpi.Anderson(),
    "anderson2": fpi.Anderson(m=2),
    "broyden": fpi.Broyden(),
}
BACKENDS = ["reference", "native"]
WAYS = [
    pytest.param({"solver": solver, "backend": backend}, id=f"{name}-{backend}")
    for (name, solver), backend in itertools.product(SOLVERS.items(), BACKENDS)
]
every_way = pytest.mark.parametrize("way", WAYS)


def halved(x: Tensor, z: Tensor) -> Tensor:
    """Its fixed point is 2z, its derivative 2."""
    return 0.5 * x + z


def bent(x: Tensor, z: Tensor) -> Tensor:
    return 0.6 * torch.sin(x) + z


def bent_loop(z: Tensor) -> Tensor:
    x = torch.zeros_like(z)
    for _ in range(120):
        x = bent(x, z)
    return x


# --- sizes and memory formats ---------------------------------------------------------------


@every_way
@pytest.mark.parametrize(
    "shape", [(0, 4), (1, 4), (1, 1), (5, 1), (3, 2), (2, 0), (0, 0), (3,), (0,), (2, 3, 1, 2)]
)
def test_small_and_empty_states(shape: tuple[int, ...], way: Any) -> None:
    z = torch.randn(shape, dtype=F64, requires_grad=True)
    sol = fpi.fixed_point(bent, torch.zeros(shape, dtype=F64), z, rtol=1e-10, max_steps=300, **way)
    expected = bent_loop(z)
    assert sol.value.shape == shape
    assert sol.status.shape == sol.num_steps.shape == sol.residual.shape == shape[:1]
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, expected, rtol=1e-8, atol=1e-9)
    weight = torch.randn(shape, dtype=F64)
    (found,) = torch.autograd.grad(sol.value, z, weight)
    (oracle,) = torch.autograd.grad(expected, z, weight)
    torch.testing.assert_close(found, oracle, rtol=1e-8, atol=1e-9)


def formats(x: Tensor) -> dict[str, Tensor]:
    """The numbers of x (4, 3, 5, 2), all rows the same, in other places of memory."""
    scattered = torch.full((4, 6, 5, 2), torch.nan, dtype=x.dtype)[:, ::2]
    return {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
        "every other": scattered.copy_(x),
        "expanded": x[:1].expand(4, 3, 5, 2),
        "offset": torch.cat([x[:1], x])[1:],
        "negative view": torch._neg_view(-x),
        "parameter": nn.Parameter(x.clone()),
    }


@every_way
def test_any_memory_format_gives_the_same_numbers(way: Any) -> None:
    start = torch.randn(1, 3, 5, 2).repeat(4, 1, 1, 1)
    offset = torch.randn(1, 3, 5, 2).repeat(4, 1, 1, 1)
    plain = fpi.fixed_point(bent, start, offset, rtol=1e-5, **way)
    for (name, x0), z in zip(formats(start).items(), formats(offset).values(), strict=True):
        before = x0.detach().clone()
        sol = fpi.fixed_point(bent, x0, z, rtol=1e-5, **way)
        assert torch.equal(sol.value, plain.value), name
        assert torch.equal(sol.num_steps, plain.num_steps), name
        assert torch.equal(x0, before), name


# One of the formats is a parameter, which has no graph.
@pytest.mark.filterwarnings("ignore:.*graph does not lead to x:fpi_cuda.FixedPointWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_g_returns_may_lie_anywhere(backend: str) -> None:
    z = torch.randn(4, 3, 5, 2)
    plain = fpi.fixed_point(bent, torch.zeros_like(z), z, rtol=1e-5, backend=backend)
    for name in formats(z):

        def g(x: Tensor, z: Tensor, name: str = name) -> Tensor:
            gx = bent(x, z)
            return gx if name == "expanded" else formats(gx)[name]

        sol = fpi.fixed_point(g, torch.zeros_like(z), z, rtol=1e-5, backend=backend)
        assert torch.equal(sol.value, plain.value), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_g_that_returns_x_or_a_view_of_it(backend: str) -> None:
    x0 = torch.randn(3, 4)
    sol = fpi.fixed_point(lambda x: x, x0, backend=backend)
    assert torch.equal(sol.value, x0)
    assert (sol.num_steps == 1).all()
    swapped = fpi.fixed_point(lambda x: x.flip(1).flip(1)[:, :], x0, backend=backend)
    assert torch.equal(swapped.value, x0)
    constant = torch.randn(4)
    sol = fpi.fixed_point(lambda x: constant.expand(3, 4), x0, backend=backend)
    assert torch.equal(sol.value, constant.expand(3, 4))
    assert (sol.num_steps == 2).all()


def test_a_state_of_a_million_elements() -> None:
    z = torch.randn(1, 10**6, requires_grad=True)
    sol = fpi.fixed_point(bent, torch.zeros(1, 10**6), z, rtol=1e-5)
    assert sol.converged.all()
    sol.value.sum().backward()
    expected = 1 / (1 - 0.6 * torch.cos(sol.value.detach()))
    torch.testing.assert_close(z.grad, expected, rtol=1e-3, atol=1e-3)


@every_way
def test_a_tuple_of_different_trailing_shapes(way: Any) -> None:
    z = torch.randn(3, 4, dtype=F64, requires_grad=True)
    x0 = (
        torch.zeros(3, dtype=F64),
        torch.zeros(3, 2, 2, dtype=F64),
        torch.zeros(3, 0, dtype=F64),
    )

    def g(state: tuple[Tensor, ...], z: Tensor) -> tuple[Tensor, ...]:
        a, b, c = state
        return 0.3 * torch.sin(b).sum((1, 2)), 0.2 * a[:, None, None] + z.view(3, 2, 2), c

    sol = fpi.fixed_point(g, x0, z, rtol=1e-12, max_steps=300, **way)
    a, b, c = sol.value
    assert (a.shape, b.shape, c.shape) == ((3,), (3, 2, 2), (3, 0))
    assert sol.converged.all()
    torch.testing.assert_close(a, 0.3 * torch.sin(b).sum((1, 2)))
    change = [new - old for new, old in zip(g(sol.value, z), sol.value, strict=True)]
    joint = torch.linalg.vector_norm(
        torch.cat([t.reshape(3, t.numel() // 3) for t in change], 1), dim=1
    )
    torch.testing.assert_close(sol.residual, joint, rtol=1e-3, atol=1e-15)
    found = torch.autograd.grad(a.sum(), z)[0]

    state: tuple[Tensor, ...] = x0
    for _ in range(100):
        state = g(state, z)
    torch.testing.assert_close(found, torch.autograd.grad(state[0].sum(), z)[0])


# --- numbers that are not finite, and maps without a fixed point ------------------------------


@every_way
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x0", "z"])
def test_a_poisoned_sample_hurts_no_other(where: str, poison: float, way: Any) -> None:
    x0, z = torch.randn(5, 4), torch.randn(5, 4)
    plain = fpi.fixed_point(bent, x0, z, rtol=1e-5, **way)
    bad = {"x0": x0, "z": z}
    bad[where] = bad[where].clone()
    bad[where][2, 1] = poison
    sol = fpi.fixed_point(bent, bad["x0"], bad["z"], rtol=1e-5, **way)
    others = [0, 1, 3, 4]
    assert not sol.converged[2]
    assert sol.status[2] == Status.NONFINITE
    for field in ("value", "status", "num_steps", "residual"):
        assert torch.equal(getattr(sol, field)[others], getattr(plain, field)[others]), field


@every_way
def test_a_g_that_turns_nan_on_the_way_ends_at_the_best_point(way: Any) -> None:
    calls = [0]

    def g(x: Tensor, z: Tensor) -> Tensor:
        calls[0] += 1
        gx = bent(x, z)
        if calls[0] > 3:
            gx = torch.where(torch.arange(3)[:, None] == 1, torch.nan, gx)
        return gx

    z = torch.randn(3, 4)
    sol = fpi.fixed_point(g, torch.zeros(3, 4), z, rtol=1e-6, max_steps=60, **way)
    assert sol.converged[[0, 2]].all()
    assert sol.status[1] == Status.NONFINITE
    assert torch.isfinite(sol.value).all()
    residual = torch.linalg.vector_norm(bent(sol.value, z) - sol.value, dim=1)
    torch.testing.assert_close(sol.residual, residual, rtol=1e-3, atol=1e-5)
    assert sol.residual[1] <= torch.linalg.vector_norm(z[1])  # the residual at x0


@every_way
def test_maps_without_a_fixed_point_never_converge(way: Any) -> None:
    x0 = torch.zeros(3, 4)
    for g in (lambda x: x + 1, lambda x: 3 * x.abs() + 1, lambda x: 1.5 * torch.exp(x)):
        sol = fpi.fixed_point(g, x0, max_steps=300, **way)
        assert not sol.converged.any()
        assert (sol.num_steps <= 300).all()
        gx = g(sol.value)
        expected = torch.linalg.vector_norm(gx - sol.value, dim=1)
        torch.testing.assert_close(sol.residual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_two_cycle(backend: str) -> None:
    """-x + z jumps between 0 and z; the fixed point is z / 2."""
    z = torch.randn(3, 4, requires_grad=True)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return z - x

    picard = fpi.fixed_point(g, torch.zeros(3, 4), z, solver=fpi.Picard(), backend=backend)
    assert (picard.status == Status.MAX_STEPS).all()
    for solver in (fpi.Picard(damping=0.5), fpi.Anderson(), fpi.Broyden()):
        sol = fpi.fixed_point(g, torch.zeros(3, 4), z, solver=solver, backend=backend, rtol=1e-6)
        assert sol.converged.all(), solver
        torch.testing.assert_close(sol.value, z / 2, rtol=1e-4, atol=1e-5)
        (found,) = torch.autograd.grad(sol.value.sum(), z)
        torch.testing.assert_close(found, torch.full_like(z, 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_divergence_is_called_so(backend: str) -> None:
    sol = fpi.fixed_point(
        lambda x: 3 * x + 1, torch.ones(3, 4), solver=fpi.Picard(), backend=backend
    )
    assert (sol.status == Status.DIVERGED).all()
    assert torch.isfinite(sol.value).all()
    # The best point is the first one.
    assert torch.equal(sol.value, torch.ones(3, 4))


@every_way
def test_a_sample_that_stops_stays_where_it_is(way: Any) -> None:
    """The slow sample takes many more steps; the fast one's points are those of a solve alone."""
    slope = torch.tensor([[0.1], [0.97]], dtype=F64)

    def g(x: Tensor, z: Tensor, slope: Tensor) -> Tensor:
        return slope * torch.sin(x) + z

    z = torch.randn(2, 1, dtype=F64).repeat(1, 3)
    both = fpi.fixed_point(g, torch.zeros(2, 3, dtype=F64), z, slope, max_steps=500, **way)
    alone = fpi.fixed_point(g, torch.zeros(1, 3, dtype=F64), z[:1], slope[:1], max_steps=500, **way)
    assert both.num_steps[1] >= both.num_steps[0]
    assert both.num_steps[0] == alone.num_steps[0]
    torch.testing.assert_close(both.value[:1], alone.value, rtol=0, atol=1e-15)
    torch.testing.assert_close(both.residual[:1], alone.residual, rtol=1e-6, atol=1e-15)


# --- tolerances and caps ----------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_tolerance_below_the_floor_of_the_dtype(dtype: torch.dtype, way: Any) -> None:
    z = torch.randn(4, 6, dtype=dtype)
    x0 = torch.zeros_like(z)
    sol = fpi.fixed_point(bent, x0, z, rtol=0.0, max_steps=2000, **way)
    assert ((sol.status == Status.STALLED) | (sol.residual == 0)).all()
    floor = 64 * torch.finfo(dtype).eps * torch.linalg.vector_norm(sol.value, dim=1)
    assert (sol.residual <= floor).all()
    torch.testing.assert_close(sol.value, bent_loop(z.double()).to(dtype))


@every_way
def test_an_x0_that_solves_already(way: Any) -> None:
    z = torch.randn(4, 6, dtype=F64, requires_grad=True)
    x0 = 2 * z.detach()
    sol = fpi.fixed_point(halved, x0, z, **way)
    assert (sol.status == Status.CONVERGED).all()
    assert (sol.num_steps == 1).all()
    assert (sol.residual == 0).all()
    assert torch.equal(sol.value, x0)
    (found,) = torch.autograd.grad(sol.value.sum(), z)
    torch.testing.assert_close(found, torch.full_like(z, 2.0), rtol=1e-3, atol=1e-3)


@every_way
@pytest.mark.parametrize("max_steps", [1, 2])
def test_few_steps(max_steps: int, way: Any) -> None:
    z = torch.randn(4, 6, dtype=F64, requires_grad=True)
    x0 = torch.randn(4, 6, dtype=F64)
    calls = [0]

    def g(x: Tensor, z: Tensor) -> Tensor:
        calls[0] += not torch.is_grad_enabled()
        return bent(x, z)

    fpi.fixed_point(g, x0, z, rtol=1e-12, max_steps=max_steps, **way)  # probes the map
    calls[0] = 0
    sol = fpi.fixed_point(g, x0, z, rtol=1e-12, max_steps=max_steps, **way)
    assert calls[0] == max_steps
    assert (sol.status == Status.MAX_STEPS).all()
    assert (sol.num_steps == max_steps).all()
    residual = torch.linalg.vector_norm(bent(sol.value, z) - sol.value, dim=1)
    torch.testing.assert_close(sol.residual, residual.detach())
    if max_steps == 1:
        assert torch.equal(sol.value, x0)
    (found,) = torch.autograd.grad(sol.value.sum(), z)
    assert torch.isfinite(found).all()
    assert sol.adjoint_stats is not None
    assert (sol.adjoint_stats.num_steps <= max_steps).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_states_whose_squares_leave_float32(scale: float, backend: str) -> None:
    z = scale * torch.randn(3, 4)
    sol = fpi.fixed_point(halved, torch.zeros(3, 4), z, rtol=1e-6, backend=backend)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value / scale, 2 * z / scale, rtol=1e-4, atol=1e-4)


# --- singular systems -------------------------------------------------------------------------


@every_way
def test_a_jacobian_without_rank(way: Any) -> None:
    matrix = torch.zeros(5, 5, dtype=F64)
    matrix[0, 1] = 0.9
    z = torch.randn(3, 5, dtype=F64, requires_grad=True)
    sol = fpi.fixed_point(
        lambda x, z: x @ matrix.T + z, torch.zeros(3, 5, dtype=F64), z, rtol=1e-10, **way
    )
    assert sol.converged.all()
    inverse = torch.linalg.inv(torch.eye(5, dtype=F64) - matrix)
    torch.testing.assert_close(sol.value, z @ inverse.T)
    (found,) = torch.autograd.grad(sol.value.sum(), z)
    torch.testing.assert_close(found, inverse.sum(0).expand(3, 5))


@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
@pytest.mark.parametrize("solver", [*SOLVERS.values(), fpi.GMRES(), fpi.ConjugateGradient()])
def test_an_adjoint_without_a_solution_is_reported(solver: Any) -> None:
    """Every x solves x = x + 0 z: the adjoint c = c + v has no solution."""
    z = torch.randn(3, 4, requires_grad=True)
    x0 = torch.randn(3, 4)
    sol = fpi.fixed_point(lambda x, z: x + 0.0 * z, x0, z, adjoint=fpi.Implicit(solver=solver))
    assert sol.converged.all()
    (found,) = torch.autograd.grad(sol.value.sum(), z)
    stats = sol.adjoint_stats
    assert stats is not None
    assert not stats.converged.any()
    assert torch.isfinite(found).all()
