"""Clause 6: a gradient is right, or refused, or a warning says that it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_state import ADJOINTS, F64, B, D, orthogonal, zeros
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda.testing import backends_available

TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 400}
SOLVERS = [fpi.Picard(), fpi.Anderson(), fpi.Broyden()]
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


@pytest.mark.parametrize("rel", [1e-9, 1e-3, 9e-3])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
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


# --- unrolled from where it ends -----------------------------------------------------------------


def one_step(g: Any, x: Any, z: Tensor, weights: Any) -> tuple[Tensor, ...]:
    """The gradient of g at x in z, x held fast."""
    gx = g(x, z)
    parts = gx if isinstance(gx, tuple) else (gx,)
    return torch.autograd.grad(parts, z, weights)


@pytest.mark.parametrize("state", ["tensor", "tuple"])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_unroll_from_the_solution_takes_one_step(solver: Any, state: str) -> None:
    a = orthogonal(0.5)
    z = torch.randn(B, D, dtype=F64, requires_grad=True)

    def g(x: Any, z: Tensor) -> Any:
        if isinstance(x, tuple):
            return torch.tanh(x[1] @ a + z), torch.tanh(0.5 * x[0] @ a + 0.1 * z)
        return torch.tanh(x @ a + z)

    x = zeros() if state == "tensor" else (zeros(), zeros())
    for _ in range(60):
        x = g(x, z.detach())
    sol = fpi.fixed_point(g, x, z, solver=solver, adjoint=fpi.Unroll(), rtol=1e-6)
    assert (sol.num_steps == 1).all()
    torch.testing.assert_close(sol.value, x, rtol=0, atol=0)
    parts = sol.value if state == "tuple" else (sol.value,)
    weights = tuple(torch.randn_like(t) for t in parts)
    got = torch.autograd.grad(parts, z, weights)
    torch.testing.assert_close(got, one_step(g, x, z, weights))
    assert got[0].abs().max() > 0.1


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_unroll_where_some_samples_start_solved(solver: Any) -> None:
    """Each as if it were alone; one fails besides."""
    a = orthogonal(0.5)
    g = lambda x, z: torch.tanh(x @ a + z)  # noqa: E731
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    x0 = zeros()
    for _ in range(60):
        x0[1] = g(x0, z.detach())[1]
    options: dict[str, Any] = {"solver": solver, "adjoint": fpi.Unroll(), "rtol": 1e-8}
    sol = fpi.fixed_point(g, x0, z, **options)
    assert sol.num_steps[1] == 1
    assert (sol.num_steps[[0, 2, 3]] > 1).all()
    torch.testing.assert_close(sol.value[1], x0[1], rtol=0, atol=0)
    got = torch.autograd.grad(sol.value.sum(), z)[0]
    for row in range(B):
        alone = z.detach()[row : row + 1].requires_grad_()
        x = fpi.fixed_point(g, x0[row : row + 1], alone, **options).value
        torch.testing.assert_close(got[row], torch.autograd.grad(x.sum(), alone)[0][0])
    bad = z.detach().clone()
    bad[2, 0] = torch.nan
    bad.requires_grad_()
    sol = fpi.fixed_point(g, x0, bad, **options)
    with pytest.warns(fpi.FixedPointWarning, match="no gradient"):
        found = torch.autograd.grad(sol.value.sum(), bad)[0]
    torch.testing.assert_close(found[[0, 1, 3]], got[[0, 1, 3]])
    assert (found[2] == 0).all()


def test_unroll_from_the_solution_in_its_start_and_to_second_order() -> None:
    a = orthogonal(0.5)
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    g = lambda x, z: torch.tanh(x @ a + z)  # noqa: E731
    x = zeros()
    for _ in range(60):
        x = g(x, z.detach())
    start = x.requires_grad_()
    value = fpi.fixed_point(g, start, z, adjoint=fpi.Unroll(), rtol=1e-6).value
    v = torch.randn_like(x)
    by_start = torch.autograd.grad(value, start, v, retain_graph=True)[0]
    torch.testing.assert_close(by_start, torch.autograd.grad(g(start, z), start, v)[0])
    slope = torch.autograd.grad(value, z, v, create_graph=True)[0]
    want = torch.autograd.grad(g(start, z), z, v, create_graph=True)[0]
    torch.testing.assert_close(
        torch.autograd.grad(slope.square().sum(), z)[0],
        torch.autograd.grad(want.square().sum(), z)[0],
    )
    fixed, tangent = start.detach(), torch.randn_like(x)

    def call(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, fixed, z, adjoint=fpi.Unroll(), rtol=1e-6).value

    pushed = torch.func.jvp(call, (z.detach(),), (tangent,))[1]
    wanted = torch.func.jvp(lambda z: g(fixed, z), (z.detach(),), (tangent,))[1]
    torch.testing.assert_close(pushed, wanted)


def test_unroll_with_one_evaluation() -> None:
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    sol = fpi.fixed_point(
        lambda x, z: 0.5 * torch.tanh(x) + z, zeros(), z, adjoint=fpi.Unroll(), max_steps=1
    )
    assert (torch.autograd.grad(sol.value.sum(), z)[0] == 1).all()
    assert (sol.value == 0).all()


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


@pytest.mark.parametrize("adjoint", [*ONE_STEP, fpi.Implicit()], ids=str)
def test_another_tensor_in_the_place_of_a_closure_is_refused(adjoint: Any) -> None:
    """Though it has the same numbers: the gradient belongs to the one that was there."""
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    held = [orthogonal(0.5).requires_grad_()]
    sol = fpi.fixed_point(lambda x, z: torch.tanh(x @ held[0] + z), zeros(), z, adjoint=adjoint)
    held[0] = held[0].detach().clone().requires_grad_()
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
