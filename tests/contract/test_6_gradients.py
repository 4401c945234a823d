"""Clause 6: a gradient is right, or refused, or a warning says that it is not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda.testing import backends_available

F64 = torch.float64
B, D = 4, 6
TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 400}
ADJOINTS = [
    fpi.Implicit(),
    fpi.Implicit(solver=fpi.GMRES()),
    fpi.JacobianFree(),
    fpi.Phantom(k=3),
    fpi.Neumann(k=5),
]
SOLVERS = [fpi.Picard(), fpi.Anderson(), fpi.Broyden()]
REFUSED = "in place|inplace|another value|other tensors"


def orthogonal(gain: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.linalg.qr(torch.randn(D, D, dtype=F64))[0].to(dtype) * gain


def zeros() -> Tensor:
    return torch.zeros(B, D, dtype=F64)


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


# --- a g that cuts the graph of x ----------------------------------------------------------------


def by_detach(x: Tensor) -> Tensor:
    return x.detach()


def by_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 1.0


def by_data(x: Tensor) -> Tensor:
    return x.data


def by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy() * 1.0)


def by_a_new_tensor(x: Tensor) -> Tensor:
    return torch.tensor(x.tolist(), dtype=x.dtype)


CUTS = [by_detach, by_no_grad, by_data, by_numpy, by_a_new_tensor]


def cut_map(cut: Callable[[Tensor], Tensor], a: Tensor) -> Any:
    """A g that nobody has been warned of: it is told by its code."""
    namespace = {"torch": torch, "cut": cut, "a": a}
    return eval("lambda x, z: torch.tanh(cut(x) @ a + z)", namespace)


WARNING = "graph does not lead to x"
LOSING = [*ADJOINTS[:2], *ADJOINTS[3:], fpi.Unroll()]
"""The adjoints that differentiate g in x."""


@pytest.mark.parametrize("adjoint", LOSING, ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_graph_is_said_with_the_line(cut: Callable[[Tensor], Tensor], adjoint: Any) -> None:
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    g = cut_map(cut, orthogonal(0.5))
    first = cut.__code__.co_firstlineno
    line = rf"{re.escape(__file__)}:({first + 1}|{first + 2}):"
    with pytest.warns(fpi.FixedPointWarning, match=WARNING) as seen:
        fpi.fixed_point(g, zeros(), z, adjoint=adjoint, rtol=1e-8)
    assert len(seen) == 1
    assert re.search(line, str(seen[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fpi.fixed_point(g, zeros(), z, adjoint=adjoint, rtol=1e-8)  # once is enough


def run_transformed(way: str, call: Callable[[Tensor], Tensor], z: Tensor) -> None:
    """A derivative of call(z) by one of the ways that are not plain backward."""
    grad = torch.func.grad(lambda z: call(z).sum())
    if way == "grad":
        grad(z)
    elif way == "grad of grad":
        torch.func.grad(lambda z: grad(z).square().sum())(z)
    elif way == "jvp":
        torch.func.jvp(call, (z,), (z,))
    elif way == "vmap":
        torch.func.vmap(grad)(torch.stack([z, 2 * z]))
    else:
        with torch.autograd.forward_ad.dual_level():
            call(torch.autograd.forward_ad.make_dual(z, z))


WAYS = [
    (way, adjoint)
    for way in ("grad", "grad of grad", "jvp", "vmap", "forward_ad")
    for adjoint in LOSING
    if way != "vmap" or not isinstance(adjoint, fpi.Unroll)  # refused
]


def parts(cut: int, a: Tensor) -> Any:
    """A g of two tensors, whose part `cut` is off the graph; -1: neither."""

    def g(s: tuple[Tensor, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        s = tuple(t.detach() if i == cut else t for i, t in enumerate(s))  # type: ignore
        return torch.tanh(s[1] @ a + z), torch.tanh(0.5 * s[0] @ a + 0.1 * z)

    return eval_copy(g)


@pytest.mark.parametrize("state", ["tensor", "first part", "second part"])
@pytest.mark.parametrize(("way", "adjoint"), WAYS, ids=str)
def test_a_cut_graph_in_transforms(way: str, state: str, adjoint: Any) -> None:
    z, a = torch.randn(B, D, dtype=F64), orthogonal(0.5)
    g = cut_map(by_detach, a) if state == "tensor" else parts(state == "second part", a)
    x0: Any = zeros() if state == "tensor" else (zeros(), zeros())

    def call(z: Tensor) -> Tensor:
        value = fpi.fixed_point(g, x0, z, adjoint=adjoint, rtol=1e-8).value
        return value if state == "tensor" else value[0]

    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        run_transformed(way, call, z)


@pytest.mark.parametrize(("way", "adjoint"), WAYS, ids=str)
def test_a_whole_graph_in_transforms(way: str, adjoint: Any) -> None:
    z, g = torch.randn(B, D, dtype=F64), parts(-1, orthogonal(0.5))

    def call(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, (zeros(), zeros()), z, adjoint=adjoint, rtol=1e-8).value[0]

    run_transformed(way, call, z)


@pytest.mark.parametrize("adjoint", LOSING, ids=str)
@pytest.mark.parametrize("part", [0, 1])
def test_one_part_of_a_tuple_is_cut(part: int, adjoint: Any) -> None:
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    g = parts(part, orthogonal(0.5))
    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        fpi.fixed_point(g, (zeros(), zeros()), z, adjoint=adjoint, rtol=1e-8)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_cut_beside_what_is_large(size: float, dtype: torch.dtype) -> None:
    """In another row, or in another part of the state."""
    a = orthogonal(0.5, dtype)
    z = torch.randn(B, D, dtype=dtype)
    z[0] *= size
    z.requires_grad_()
    x0 = torch.zeros_like(z)

    def rows(x: Tensor, z: Tensor) -> Tensor:
        return z + 0.9 * torch.tanh(x.detach() @ a)

    def second(s: tuple[Tensor, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        first, cut = s
        return 0.3 * first + size * torch.tanh(z), torch.tanh(cut.detach() @ a + first / size)

    for g, start in ((rows, x0), (second, (x0, x0))):
        with pytest.warns(fpi.FixedPointWarning, match=WARNING):
            fpi.fixed_point(eval_copy(g), start, z, rtol=1e-5)


@pytest.mark.parametrize("slope", [0.1, 1e-3])
def test_a_cut_with_a_small_slope(slope: float) -> None:
    a, z = orthogonal(1.0), torch.randn(B, D, dtype=F64, requires_grad=True)
    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        fpi.fixed_point(
            eval_copy(lambda x, z: z + slope * torch.tanh(x.detach() @ a)), zeros(), z, rtol=1e-8
        )


def eval_copy(g: Any) -> Any:
    """g with a code object of its own."""
    return type(g)(
        g.__code__.replace(co_name=g.__name__ + "_copy"),
        g.__globals__,
        None,
        g.__defaults__,
        g.__closure__,
    )


WITHOUT_SLOPE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "constant": lambda x, z: torch.tanh(z),
    "shape": lambda x, z: 0.1 * x.shape[0] * z,
    "sign": lambda x, z: 0.3 * torch.sign(x) + z,
    "round": lambda x, z: torch.round(0.3 * x) + z,
    "comparison": lambda x, z: 0.3 * (x > 0).to(x.dtype) + z,
    "argmax": lambda x, z: nn.functional.one_hot(x.argmax(1), D) + torch.tanh(z),
    "dead relu": lambda x, z: torch.relu(x - 100) + z,
    "clamped": lambda x, z: x.clamp(5, 6) + torch.tanh(z),
}


@pytest.mark.parametrize("adjoint", [*ADJOINTS, fpi.Unroll()], ids=str)
@pytest.mark.parametrize("name", WITHOUT_SLOPE)
def test_a_g_without_a_slope_is_not_warned_of(name: str, adjoint: Any) -> None:
    z = torch.randn(B, D, dtype=F64, requires_grad=True)
    for solver in (fpi.Picard(damping=0.5), fpi.Anderson()):
        fpi.fixed_point(WITHOUT_SLOPE[name], zeros(), z, solver=solver, adjoint=adjoint)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cut_or_not_in_other_arithmetic(dtype: torch.dtype) -> None:
    a = orthogonal(0.5, dtype)
    z = torch.randn(B, D).to(dtype).requires_grad_()
    x0 = torch.zeros(B, D, dtype=dtype)
    options: dict[str, Any] = {"rtol": 0.05}
    fpi.fixed_point(lambda x, z: torch.tanh(z), x0, z, **options)
    fpi.fixed_point(lambda x, z: 0.3 * (x > 0).to(x.dtype) + z, x0, z, **options)
    fpi.fixed_point(lambda x, z: 0.3 * x.detach().round() + z, x0, z, **options)
    table = torch.randn(9, D).to(dtype)
    fpi.fixed_point(lambda x, z: table[(3 * x[:, 0]).clamp(-4, 4).long()] + z, x0, z, **options)
    with pytest.warns(fpi.FixedPointWarning, match=WARNING):
        fpi.fixed_point(cut_map(by_detach, a), x0, z, **options)


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
