"""Clause 8: a gradient that comes in as Inf or NaN goes out so; zero is for failed solves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda.testing import backends_available

F64 = torch.float64
B, D = 4, 6
ROW = 1
OTHERS = [0, 2, 3]
TIGHT: dict[str, Any] = {"rtol": 1e-10, "max_steps": 300}
ADJOINTS = [
    fpi.Implicit(),
    fpi.Implicit(solver=fpi.Picard()),
    fpi.Implicit(solver=fpi.Broyden()),
    fpi.Implicit(solver=fpi.GMRES()),
    fpi.Implicit(solver=fpi.ConjugateGradient()),
    fpi.JacobianFree(),
    fpi.Phantom(k=3),
    fpi.Neumann(k=5),
    fpi.Unroll(),
]


@pytest.fixture
def weights() -> tuple[Tensor, Tensor]:
    """z and A, leaves that require grad."""
    a = torch.linalg.qr(torch.randn(D, D, dtype=F64))[0] * 0.5
    return torch.randn(B, D, dtype=F64).requires_grad_(), a.requires_grad_()


def layer(z: Tensor, a: Tensor, **options: Any) -> fpi.Solution:
    x0 = torch.zeros_like(z)
    return fpi.fixed_point(lambda x, z: torch.tanh(x @ a + z), x0, z, **TIGHT | options)


def with_overflow(x: Tensor, value: float = torch.inf) -> Tensor:
    """Ones, but for one number of row ROW."""
    v = torch.ones_like(x)
    v[ROW, 2] = value
    return v


def finite_rows(t: Tensor) -> list[bool]:
    return torch.isfinite(t).flatten(1).all(1).tolist()


EXPECTED = [row != ROW for row in range(B)]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_a_row_that_comes_in_infinite(adjoint: Any, value: float, weights: Any) -> None:
    z, a = weights
    sol = layer(z, a, adjoint=adjoint)
    v = with_overflow(sol.value, value)
    grad_z, grad_a = torch.autograd.grad(sol.value, (z, a), v)
    assert finite_rows(grad_z) == EXPECTED
    assert not torch.isfinite(grad_a).all()
    (expected,) = torch.autograd.grad(layer(z, a, adjoint=adjoint).value, z, torch.ones_like(v))
    torch.testing.assert_close(grad_z[OTHERS], expected[OTHERS])
    stats = sol.adjoint_stats
    if stats is not None:
        assert stats.num_zeroed == 0
        assert stats.status[ROW] == fpi.Status.NONFINITE
        assert (stats.status[OTHERS] != fpi.Status.NONFINITE).all()


@pytest.mark.parametrize("backend", [b for b in backends_available() if b != "triton"])
@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson(), fpi.Broyden()], ids=str)
def test_on_every_backend(solver: Any, backend: str, weights: Any) -> None:
    z, a = (t.detach().float().requires_grad_() for t in weights)
    options: dict[str, Any] = {"solver": solver, "backend": backend, "rtol": 1e-4}
    x = layer(z, a, **options).value
    grad_z, grad_a = torch.autograd.grad(x, (z, a), with_overflow(x))
    assert finite_rows(grad_z) == EXPECTED
    assert not torch.isfinite(grad_a).all()


@pytest.mark.usefixtures("tape")
@pytest.mark.parametrize("rows", [[ROW], list(range(B))], ids=["one row", "all rows"])
@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson(), fpi.Broyden()], ids=str)
def test_on_the_device_route(solver: Any, rows: list[int], weights: Any) -> None:
    """On a stand-in for CUDA graphs."""
    z, a = weights
    sol = layer(z, a, solver=solver, route="device")
    assert sol.adjoint_record.adjoint_route.name == "device"
    v = torch.ones_like(sol.value)
    v[rows, 2] = torch.inf
    grad_z, grad_a = torch.autograd.grad(sol.value, (z, a), v)
    assert finite_rows(grad_z) == [row not in rows for row in range(B)]
    assert not torch.isfinite(grad_a).all()
    assert sol.adjoint_stats.num_zeroed == 0


@pytest.mark.parametrize("cell", ["dense", "mlp"])
@pytest.mark.parametrize("adjoint", [fpi.Implicit(), fpi.JacobianFree()], ids=str)
def test_of_a_fused_cell(cell: str, adjoint: Any) -> None:
    g = fpi.cells.Dense(D, D) if cell == "dense" else fpi.cells.MLP(D, D, 8)
    z = torch.randn(B, D, requires_grad=True)
    sol = fpi.FPILayer(g, route="fused", adjoint=adjoint).solve(z)
    sol.value.backward(with_overflow(sol.value))
    assert finite_rows(z.grad) == EXPECTED
    assert any(not torch.isfinite(p.grad).all() for p in g.parameters())
    assert sol.adjoint_stats.num_zeroed == 0


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_with_create_graph(adjoint: Any, weights: Any) -> None:
    z, a = weights
    sol = layer(z, a, adjoint=adjoint)
    v = with_overflow(sol.value).requires_grad_()
    grad_z, grad_a = torch.autograd.grad(sol.value, (z, a), v, create_graph=True)
    assert finite_rows(grad_z.detach()) == EXPECTED
    assert not torch.isfinite(grad_a).all()
    second = torch.autograd.grad(grad_z.sum() + grad_a.sum(), a)[0]
    assert not torch.isfinite(second).all()


@pytest.mark.parametrize("adjoint", [a for a in ADJOINTS if a != fpi.Phantom(k=3)], ids=str)
@pytest.mark.parametrize("way", ["vjp", "jvp", "grads_batched", "forward_ad"])
def test_in_transforms(way: str, adjoint: Any, weights: Any) -> None:
    z, a = weights
    a = a.detach()
    if way == "grads_batched":
        if isinstance(adjoint, fpi.Unroll):
            adjoint = fpi.Implicit()  # the older vmap of torch has no rule for unrolled solves
        x = layer(z, a, adjoint=adjoint).value
        v = torch.stack([torch.ones_like(x), with_overflow(x)])
        (found,) = torch.autograd.grad(x, z, v, is_grads_batched=True)
        assert torch.isfinite(found[0]).all()
        found = found[1]
    elif way == "forward_ad":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(z, with_overflow(z.detach()))
            x = layer(dual, a, adjoint=adjoint).value
            found = torch.autograd.forward_ad.unpack_dual(x).tangent
    else:
        transform = torch.func.vjp if way == "vjp" else torch.func.jvp

        def call(z: Tensor) -> Tensor:
            return layer(z, a, adjoint=adjoint).value

        plain = z.detach()
        if way == "vjp":
            x, pull = transform(call, plain)
            (found,) = pull(with_overflow(x))
        else:
            found = transform(call, (plain,), (with_overflow(plain),))[1]
    assert finite_rows(found.detach()) == EXPECTED


def test_in_a_vmap_of_gradients(weights: Any) -> None:
    z, a = weights
    x, pull = torch.func.vjp(lambda z: layer(z, a.detach()).value, z.detach())
    (found,) = torch.func.vmap(pull)(torch.stack([torch.ones_like(x), with_overflow(x)]))
    assert torch.isfinite(found[0]).all()
    assert finite_rows(found[1]) == EXPECTED


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_beside_a_sample_that_failed(adjoint: Any, weights: Any) -> None:
    """The failed one gives zero, the overflow of another stays."""
    z, a = weights
    bad = z.detach().clone()
    bad[3, 0] = torch.nan
    bad.requires_grad_()
    sol = layer(bad, a, adjoint=adjoint)
    grad_z, grad_a = torch.autograd.grad(sol.value, (bad, a), with_overflow(sol.value))
    assert finite_rows(grad_z) == EXPECTED
    assert (grad_z[3] == 0).all()
    assert not torch.isfinite(grad_a).all()
    assert sol.adjoint_stats.num_zeroed == 1


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("everything", [False, True], ids=["one sample", "all samples"])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
def test_of_a_sample_that_failed(
    adjoint: Any, everything: bool, create_graph: bool, weights: Any
) -> None:
    """The loss is the user's: that it overflows at a failed sample is theirs to see."""
    z, a = weights
    bad = z.detach().clone()
    bad[slice(None) if everything else ROW, 0] = torch.nan
    bad.requires_grad_()
    x = layer(bad, a, adjoint=adjoint).value
    grad_z, grad_a = torch.autograd.grad(x, (bad, a), with_overflow(x), create_graph=create_graph)
    assert not torch.isfinite(grad_a).all()
    assert torch.isfinite(grad_z[OTHERS]).all()
    if not isinstance(adjoint, fpi.Unroll):
        assert not torch.isfinite(grad_z[ROW]).all()


@pytest.mark.parametrize("adjoint", [fpi.Implicit(), fpi.Neumann(k=5)], ids=str)
@pytest.mark.parametrize("way", ["backward", "create_graph", "vjp"])
def test_what_overflows_float16_comes_out_infinite(way: str, adjoint: Any) -> None:
    """(I - 0.9)^-1 v is 10 v: more than 65504, and no failure of the solve."""
    z = torch.ones(3, D, dtype=torch.float16)
    z[2] = 0.5

    def call(z: Tensor) -> fpi.Solution:
        x0 = torch.zeros_like(z)
        options: dict[str, Any] = {"rtol": 2e-3, "max_steps": 200, "adjoint": adjoint}
        return fpi.fixed_point(lambda x, z: 0.9 * x + 0.1 * z, x0, z, **options)

    v = torch.full((3, D), 3e4, dtype=torch.float16)
    v[2] = 1.0
    if way == "vjp":
        (scaled,) = torch.func.vjp(lambda z: call(10 * z).value, z)[1](v)
        assert scaled.isinf()[:2].all()
        assert scaled.isfinite()[2].all()
        return
    leaf = z.requires_grad_()
    sol = call(leaf)
    steep = torch.autograd.grad(sol.value, leaf, v, create_graph=way == "create_graph")[0]
    # The last factor, 0.1, is that of the input: Inf before it is Inf after it.
    assert steep.isinf()[:2].all()
    assert steep.isfinite()[2].all()
    assert sol.adjoint_stats.num_zeroed == 0


class Scaled(torch.nn.Module):
    """A layer between two others, all small enough for float32 losses to be ordinary."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = torch.nn.Linear(D, D), torch.nn.Linear(D, 1)
        self.fixed = fpi.FPILayer(fpi.cells.Dense(D, D))

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.fixed(self.into(z)))


def test_a_gradient_scaler_backs_off_and_training_goes_on() -> None:
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    z = torch.randn(16, D)
    target = 5 * z.sum(1, keepdim=True)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(z) - target).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() < 2.0**126
    assert losses[0] == losses[1]  # the first step was skipped
    assert losses[-1] < 0.9 * losses[0]
