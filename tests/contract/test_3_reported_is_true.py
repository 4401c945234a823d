"""Clause 3: what is reported is true. How a solve is said to have ended, and where its floor is."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda.testing import backends_available

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Map = Callable[[Tensor], Tensor]
Solver = fpi.Picard | fpi.Anderson | fpi.Broyden

# The fastest there is; test_every_backend_has_the_same_rules holds the others to it.
BACKENDS = [None]
SOLVERS: list[Solver] = [fpi.Picard(), fpi.Anderson(m=5), fpi.Broyden(m=5)]
FLOOR = 64.0
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)


def short(value: object) -> str:
    """An id without spaces."""
    return re.sub(r"\s|torch\.", "", str(value))


def orthogonal(n: int, gain: float, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    square = torch.randn(n, n, dtype=F64, generator=generator)
    return (torch.linalg.qr(square)[0] * gain).to(dtype)


def size(x: Tensor) -> Tensor:
    """(B,) 2-norms, in float64 so that small ones do not vanish."""
    return x.double().norm(dim=1)


def by_hand(g: Map, x: Tensor, rtol: float, max_steps: int) -> Tensor:
    """The ten lines that a user writes instead."""
    for _ in range(max_steps):
        gx = g(x)
        if bool((size(gx - x) <= rtol * size(gx)).all()):
            return x
        x = gx
    raise AssertionError("the loop by hand does not finish")


# --- growth from a small start ---


def ricker(x: Tensor) -> Tensor:
    """Growth to 1; 0 repels."""
    return x * torch.exp(0.5 * (1 - x))


def logistic(x: Tensor) -> Tensor:
    """Growth to 7, by up to a half each step."""
    return x + 0.5 * x * (1 - x / 7)


def late(x: Tensor) -> Tensor:
    """Growth to 1, a hundred and 1e4, the last at a fifth of the pace."""
    pace, size = x.new_tensor([0.5, 0.5, 0.1]), x.new_tensor([1.0, 100.0, 1e4])
    return x + pace * x * (1 - x / size)


def cell(x: Tensor) -> Tensor:
    """A tanh cell of spectral radius 2.5 with an input of 1e-6."""
    return torch.tanh(2.5 * x.roll(1, -1) + 1e-6)


GROWING = [ricker, logistic, late, cell]


@each_backend
@pytest.mark.parametrize("dtype", [F32, F64], ids=short)
@pytest.mark.parametrize("start", [1e-5, 1e-10, 1e-30])
@pytest.mark.parametrize("g", GROWING, ids=lambda g: g.__name__)
@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_picard_solves_what_a_loop_by_hand_solves(
    backend: str | None, dtype: torch.dtype, start: float, g: Map, damping: float
) -> None:
    x0 = torch.full((1, 3), start, dtype=dtype)
    x = by_hand(lambda x: x + damping * (g(x) - x), x0, 1e-4, 3000)
    solver = fpi.Picard(damping=damping)
    sol = fpi.fixed_point(g, x0, solver=solver, rtol=1e-4, max_steps=3000, backend=backend)
    assert sol.converged.all(), sol
    assert (sol.value - x).norm() <= 1e-2 * x.norm()
    true = size(g(sol.value) - sol.value)
    torch.testing.assert_close(sol.residual.double(), true, rtol=1e-3, atol=0)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("start", [1e-5, 1e-3])
@pytest.mark.parametrize("rate", [1.5, 1.8, 2.5, 2.9])
def test_growth_in_16_bits_ends_where_rounding_lets_it(
    backend: str | None, dtype: torch.dtype, start: float, rate: float
) -> None:
    """At the fixed point a residual is zero or some roundings, perhaps over 1% of its peak."""

    def g(x: Tensor) -> Tensor:
        return rate * x * (1 - x)

    x0 = torch.full((2, 3), start, dtype=dtype)
    solver = fpi.Picard()
    sol = fpi.fixed_point(g, x0, solver=solver, rtol=0.02, max_steps=500, backend=backend)
    assert sol.converged.all(), sol
    assert (sol.value.double() - (1 - 1 / rate)).abs().max() < 0.03


@pytest.mark.parametrize("backend", backends_available())
def test_every_backend_has_the_same_rules(backend: str) -> None:
    """Growth, then a fixed point; a cycle; a drift; divergence: by Triton's interpreter too."""
    rows: list[Map] = [
        ricker,
        lambda x: x * torch.exp(2.2 * (1 - x)),
        lambda x: x + 1,
        lambda x: 1.7 * x + 1e-9,
    ]

    def g(x: Tensor) -> Tensor:
        return torch.cat([row(x[i : i + 1]) for i, row in enumerate(rows)])

    x0 = torch.full((len(rows), 1), 1e-5)
    options = {"solver": fpi.Picard(), "rtol": 1e-2, "max_steps": 45}
    sol = fpi.fixed_point(g, x0, backend=backend, **options)
    want = fpi.fixed_point(g, x0, backend="reference", **options)
    assert sol.status.tolist() == want.status.tolist()
    assert sol.num_steps.tolist() == want.num_steps.tolist()
    S = fpi.Status
    assert sol.status.tolist() == [S.CONVERGED, S.MAX_STEPS, S.MAX_STEPS, S.DIVERGED]


@each_backend
@pytest.mark.parametrize("dtype", [F32, F64], ids=short)
@pytest.mark.parametrize("solver", SOLVERS[1:], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("g", GROWING, ids=lambda g: g.__name__)
def test_growth_is_no_divergence_for_accelerated_solvers(
    backend: str | None, dtype: torch.dtype, solver: Solver, g: Map
) -> None:
    x0 = torch.full((1, 3), 1e-5, dtype=dtype)
    sol = fpi.fixed_point(g, x0, solver=solver, rtol=1e-4, max_steps=300, backend=backend)
    assert sol.status.item() not in (fpi.Status.DIVERGED, fpi.Status.STALLED), sol


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("size_of_input", [1e-6, 1e-9])
def test_growth_in_the_fused_loop(precision: str, size_of_input: float) -> None:
    """tanh(2.5 x + z), whose fixed point is 0.985 beside an input of 1e-6."""
    dense = fpi.cells.Dense(6, 6)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
        dense.A.weight.copy_(2.5 * torch.eye(6))
        dense.B.weight.copy_(torch.eye(6))
        z = torch.full((3, 6), size_of_input)
        options = {"solver": fpi.Picard(), "route": "fused", "precision": precision}
        sol = fpi.fixed_point(dense, torch.zeros(3, 6), z, rtol=2e-2, max_steps=200, **options)
    assert sol.converged.all(), sol
    assert (sol.value > 0.9).all()


def test_growth_in_a_row_of_a_batch_is_that_rows_alone() -> None:
    x0 = torch.tensor([[1e-9] * 3, [0.9] * 3, [1e3] * 3], dtype=F64)
    sol = fpi.fixed_point(ricker, x0, solver=fpi.Picard(), rtol=1e-6, max_steps=500)
    for i in range(3):
        one = fpi.fixed_point(ricker, x0[i : i + 1], solver=fpi.Picard(), rtol=1e-6, max_steps=500)
        assert sol.status[i] == one.status[0]
        assert sol.num_steps[i] == one.num_steps[0]


def test_the_adjoint_of_a_state_that_grew() -> None:
    z = torch.full((2, 3), 0.5, dtype=F64, requires_grad=True)
    x0 = torch.full((2, 3), 1e-10, dtype=F64)
    options = {"solver": fpi.Picard(), "rtol": 1e-10, "max_steps": 500}
    sol = fpi.fixed_point(lambda x, z: x * torch.exp(0.5 * (2 * z - x)), x0, z, **options)
    sol.value.sum().backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, 2.0))


def test_an_adjoint_may_grow_before_it_falls() -> None:
    """A product with a nilpotent Jacobian grows by a million, and is then exactly zero."""
    J = torch.diag(torch.full((5,), 30.0, dtype=F64), -1)
    z = torch.ones(1, 6, dtype=F64, requires_grad=True)
    options = {"solver": fpi.Picard(), "rtol": 1e-10, "max_steps": 50}
    sol = fpi.fixed_point(lambda x, z: x @ J.T + z, torch.zeros(1, 6, dtype=F64), z, **options)
    sol.value.sum().backward()
    want = torch.linalg.solve((torch.eye(6, dtype=F64) - J).T, torch.ones(6, dtype=F64))
    torch.testing.assert_close(z.grad[0], want)
    assert sol.adjoint_stats is not None
    assert sol.adjoint_stats.num_zeroed == 0


# --- maps without a fixed point ---


@each_backend
@each_solver
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=short)
@pytest.mark.parametrize(
    "g",
    [
        lambda x: x + 1,
        lambda x: x + 0.5 * (1 + x.abs()),
        lambda x: x + torch.log(2 + x.abs()),
        lambda x: torch.sqrt(x * x + 1) + 0.5,
        lambda x: x + x.abs() / (1e-6 + x.abs()),
        lambda x: x + x.abs() / (1 + x.abs()) + 1e-30,
    ],
    ids=["shift", "growing", "logarithm", "hyperbola", "late-shift", "growth-then-shift"],
)
@pytest.mark.parametrize("start", [0.0, 1e-8])
def test_drifting_off_is_never_convergence(
    backend: str | None, solver: Solver, dtype: torch.dtype, g: Map, start: float
) -> None:
    x0 = torch.full((1, 2), start, dtype=dtype)
    sol = fpi.fixed_point(g, x0, solver=solver, rtol=1e-2, max_steps=400, backend=backend)
    true = (g(sol.value).double() - sol.value.double()).norm(dim=1)
    scale = max(x0.double().norm(), g(x0).double().norm())
    # The smallest that any point has is far below the tolerance where the map starts at rest.
    assert not sol.converged.any() or bool(true <= 0.1 * scale), sol


# --- how a failure is called ---


@each_backend
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=short)
@pytest.mark.parametrize("gain", [3.0, 1e3, -3.0])
def test_growth_to_overflow_fails_with_the_best_point(
    backend: str | None, dtype: torch.dtype, gain: float
) -> None:
    x0 = torch.ones(1, 2, dtype=dtype)
    g = lambda x: gain * x + 1  # noqa: E731
    sol = fpi.fixed_point(g, x0, solver=fpi.Picard(), max_steps=5000, backend=backend)
    if sol.converged.all():  # thrown back from overflow with half the damping
        assert gain < 0
        return
    assert sol.status.item() in (fpi.Status.DIVERGED, fpi.Status.NONFINITE)
    assert torch.equal(sol.value, x0)


def test_growth_to_overflow_in_float16() -> None:
    x0 = torch.ones(1, 2, dtype=F16)
    sol = fpi.fixed_point(lambda x: 3 * x + 1, x0, solver=fpi.Picard(), max_steps=5000)
    assert sol.status.item() in (fpi.Status.DIVERGED, fpi.Status.NONFINITE)
    assert torch.equal(sol.value, x0)


@each_backend
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_at_the_cap_what_still_grows_has_diverged(backend: str | None, scale: float) -> None:
    A = orthogonal(4, 1.5, F32)
    b = scale * torch.ones(1, 4)
    options = {"solver": fpi.Picard(), "max_steps": 60, "backend": backend}
    sol = fpi.fixed_point(lambda x: x @ A + b, torch.zeros(1, 4), **options)
    assert sol.status.item() == fpi.Status.DIVERGED
    assert not sol.value.any()


@each_backend
def test_at_the_cap_what_has_stopped_growing_has_not_diverged(backend: str | None) -> None:
    options = {"solver": fpi.Picard(), "rtol": 1e-9, "backend": backend}
    x0 = torch.full((1, 3), 1e-10, dtype=F64)
    # A 2-cycle between 0.43 and 1.57 of another size than the start.
    cycle = fpi.fixed_point(lambda x: x * torch.exp(2.2 * (1 - x)), x0, max_steps=300, **options)
    assert cycle.status.item() == fpi.Status.MAX_STEPS
    settling = fpi.fixed_point(ricker, x0, max_steps=60, **options)
    assert settling.status.item() == fpi.Status.MAX_STEPS
    begun = fpi.fixed_point(ricker, x0, max_steps=15, **options)
    assert begun.status.item() == fpi.Status.MAX_STEPS


@each_backend
@each_solver
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=short)
def test_stalled_is_at_the_floor_of_the_point_returned(
    backend: str | None, solver: Solver, dtype: torch.dtype
) -> None:
    A = orthogonal(5, 0.9, dtype)
    maps: list[Map] = [
        ricker,
        logistic,
        lambda x: x @ A + 1,
        lambda x: torch.cos(x.roll(1, -1)),
        lambda x: 1 - x,
        lambda x: 1.7 * x.flip(-1) + 1,
    ]
    stalled = 0
    for g in maps:
        for start in (1e-10, 1e-3, 3.0):
            x0 = torch.full((1, 5), start, dtype=dtype)
            sol = fpi.fixed_point(g, x0, solver=solver, rtol=0.0, max_steps=300, backend=backend)
            gx = g(sol.value).double()
            true = (gx - sol.value.double()).norm()
            assert abs(sol.residual.item() - true.item()) <= 1e-5 * true.item() + 1e-100
            if sol.status.item() == fpi.Status.STALLED:
                stalled += 1
                assert true <= FLOOR * torch.finfo(dtype).eps * gx.norm()
    assert stalled or dtype != F32 or not isinstance(solver, fpi.Picard)


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
