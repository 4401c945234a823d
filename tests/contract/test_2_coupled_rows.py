"""Clause 2 and 3: rows that depend on one another are solved as one, and what is reported is true.

Nobody has to say that the rows of g are coupled, and no promise that they are not is needed where
they are not: then every row keeps the bits that it has in any other batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda import coupling
from fpi_cuda.testing import backends_available

F64 = torch.float64
SOLVERS = [fpi.Picard(), fpi.Anderson(m=5), fpi.Broyden(m=10)]
LINEAR_SOLVERS = [*SOLVERS, fpi.GMRES(), fpi.ConjugateGradient()]
Map = Callable[..., Any]


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    """Every test begins without verdicts on maps that it may share code with."""
    coupling.independent_maps.clear()
    coupling.coupled_maps.clear()


def orthogonal(n: int, gain: float) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=F64))[0] * gain


def graph(nodes: int = 40, features: int = 4, sources: int = 2) -> tuple[Map, Tensor]:
    """Messages between nodes; most have no input of their own, so that they rest at first."""
    edges = (torch.rand(nodes, nodes, dtype=F64) < 0.1).double()
    edges = edges / edges.sum(1, keepdim=True).clamp(min=1)
    weight = orthogonal(features, 0.9)
    u = torch.zeros(nodes, features, dtype=F64)
    u[:sources] = torch.randn(sources, features, dtype=F64)
    return lambda x, z=0: torch.tanh(edges @ x @ weight + u + z), torch.zeros_like(u)


def chain(n: int = 30) -> tuple[Map, Tensor]:
    """An unbatched vector in which each number waits for the one before it."""
    p = torch.eye(n, dtype=F64).roll(1, 0) * 0.8
    p[0] = 0
    b = torch.zeros(n, dtype=F64)
    b[0] = 1
    return lambda x, z=0: p @ x + b + z, torch.zeros_like(b)


def dense_vector(n: int = 20) -> tuple[Map, Tensor]:
    p, b = orthogonal(n, 0.7), torch.randn(n, dtype=F64)
    return lambda x, z=0: p @ x + b + z, torch.zeros_like(b)


def attention(n: int = 16, d: int = 6) -> tuple[Map, Tensor]:
    q, k, v = (orthogonal(d, gain) for gain in (1.5, 1.5, 0.9))
    u = torch.randn(n, d, dtype=F64)

    def g(x: Tensor, z: Any = 0) -> Tensor:
        mixed = torch.softmax((x @ q) @ (x @ k).T / 4, -1) @ x @ v
        return 0.5 * mixed + 0.3 * torch.tanh(x @ k) + u + z

    return g, torch.zeros_like(u)


def batch_norm(n: int = 12, d: int = 5) -> tuple[Map, Tensor]:
    weight, u = orthogonal(d, 1.0), torch.randn(n, d, dtype=F64)

    def g(x: Tensor, z: Any = 0) -> Tensor:
        y = nn.functional.batch_norm(x @ weight, None, None, training=True, eps=0.1)
        return torch.tanh(0.5 * y + u + z)

    return g, torch.zeros_like(u)


COUPLED = [graph, chain, dense_vector, attention, batch_norm]


def iterated(g: Map, x: Tensor, *z: Tensor) -> Tensor:
    for _ in range(2000):
        x = g(x, *z)
    return x


def true_residual(g: Map, x: Tensor, *z: Tensor) -> Tensor:
    with torch.no_grad():
        return (g(x, *z) - x).reshape(len(x), -1).norm(dim=1)


def same_as_told(sol: fpi.Solution, residual: Tensor) -> bool:
    return bool(((sol.residual - residual).abs() <= 1e-12 + 1e-6 * residual).all())


@pytest.mark.parametrize("make", COUPLED)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("rtol", [1e-3, 1e-7])
def test_all_rows_are_solved_together(make: Map, grad: bool, solver: Any, rtol: float) -> None:
    g, x0 = make()
    want = iterated(g, x0)
    for _ in range(2):  # what is remembered of the first solve must not hurt the second
        with torch.set_grad_enabled(grad):
            sol = fpi.fixed_point(g, x0, solver=solver, rtol=rtol, max_steps=500)
        assert sol.converged.all()
        residual = true_residual(g, sol.value)
        assert same_as_told(sol, residual)
        assert (residual <= rtol * g(sol.value).reshape(len(x0), -1).norm(dim=1) * (1 + 1e-9)).all()
        assert (sol.value - want).norm() <= 100 * rtol * want.norm()


@pytest.mark.parametrize("backend", backends_available(dtype=F64))
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_on_every_backend(backend: str, solver: Any) -> None:
    g, x0 = graph(12, 3)
    sol = fpi.fixed_point(g, x0, solver=solver, rtol=1e-5, max_steps=300, backend=backend)
    assert sol.converged.all()
    assert same_as_told(sol, true_residual(g, sol.value))


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("make", COUPLED)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_cap_on_the_steps_leaves_a_true_account(make: Map, solver: Any, max_steps: int) -> None:
    g, x0 = make()
    sol = fpi.fixed_point(g, x0, solver=solver, rtol=1e-9, max_steps=max_steps)
    residual = true_residual(g, sol.value)
    assert same_as_told(sol, residual)
    size = g(sol.value).reshape(len(x0), -1).norm(dim=1)
    assert (residual[sol.converged] <= 1e-9 * size[sol.converged] * (1 + 1e-9)).all()
    assert int(sol.num_steps.max()) <= max_steps


def test_a_tuple_state() -> None:
    f, x0 = graph(20, 4)
    weight = orthogonal(4, 0.5)

    def g(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return f(state[1]), torch.tanh(state[0] @ weight)

    sol = fpi.fixed_point(g, (x0, x0), rtol=1e-8, max_steps=400)
    again = g(sol.value)
    residual = torch.cat([a - b for a, b in zip(again, sol.value, strict=True)], 1).norm(dim=1)
    assert sol.converged.all()
    assert same_as_told(sol, residual)


def test_one_bad_row_is_everybodys() -> None:
    edges = torch.full((6, 6), 1 / 6, dtype=F64)
    u = torch.randn(6, 3, dtype=F64)
    u[2] = torch.nan
    sol = fpi.fixed_point(lambda x: 0.5 * torch.tanh(edges @ x) + u, torch.zeros(6, 3, dtype=F64))
    assert not sol.converged.any()


def test_explain_says_how_rows_were_solved() -> None:
    g, x0 = graph()
    layer = fpi.FPILayer(lambda x, z: g(x, z))
    assert "rows that are seen to depend on one another are solved as one" in layer.explain()
    layer(torch.zeros_like(x0))
    assert "rows of g were seen to depend on one another" in layer.explain()
    single = fpi.FPILayer(lambda x, z: g(x, z), batch_dims=0)
    assert "the whole state is one (batch_dims=0)" in single.explain()


# --- derivatives ---------------------------------------------------------------------------------


def dense_gradient(g: Map, x0: Tensor, z: Tensor, v: Tensor) -> Tensor:
    """The gradient of <v, x*> in z by a dense solve; g(x, z) = g(x) + z inside of its last map."""
    x = iterated(g, x0, z)
    n = x.numel()
    by_x = torch.autograd.functional.jacobian(lambda x: g(x, z), x).reshape(n, n)
    by_z = torch.autograd.functional.jacobian(lambda z: g(x, z), z).reshape(n, n)
    c = torch.linalg.solve((torch.eye(n, dtype=F64) - by_x).T, v.reshape(n))
    return (by_z.T @ c).reshape(x.shape)


def masked(v: Tensor) -> Tensor:
    """A loss that reads a few of the nodes."""
    kept = torch.zeros_like(v)
    kept[::5] = v[::5]
    return kept


@pytest.mark.parametrize("make", [graph, chain, attention, batch_norm])
@pytest.mark.parametrize("solver", LINEAR_SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("loss", [lambda v: v, masked], ids=["all", "masked"])
def test_the_gradient(make: Map, solver: Any, loss: Any) -> None:
    g, x0 = make()
    z = (0.1 * torch.randn_like(x0)).requires_grad_()
    v = loss(torch.randn_like(x0))
    adjoint = fpi.Implicit(solver=solver, rtol=1e-9, max_steps=2000)
    sol = fpi.fixed_point(g, x0, z, rtol=1e-11, max_steps=2000, adjoint=adjoint)
    (found,) = torch.autograd.grad(sol.value, z, v)
    want = dense_gradient(g, x0, z.detach(), v)
    assert sol.adjoint_stats is not None
    assert sol.adjoint_stats.converged.all()
    assert (found - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("make", [graph, attention])
@pytest.mark.parametrize("adjoint", [fpi.Unroll(), fpi.Neumann(150), fpi.Phantom(150)], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_the_gradient_of_other_adjoints(make: Map, adjoint: Any, solver: Any) -> None:
    g, x0 = make()
    z = (0.1 * torch.randn_like(x0)).requires_grad_()
    v = torch.randn_like(x0)
    sol = fpi.fixed_point(g, x0, z, solver=solver, rtol=1e-12, max_steps=500, adjoint=adjoint)
    assert sol.converged.all()
    assert same_as_told(sol, true_residual(g, sol.value.detach(), z))
    (found,) = torch.autograd.grad(sol.value, z, v)
    want = dense_gradient(g, x0, z.detach(), v)
    assert (found - want).norm() <= 1e-6 * want.norm()


def test_an_infinite_gradient_reaches_the_rows_that_depend_on_it() -> None:
    g, x0 = dense_vector()
    z = torch.zeros_like(x0).requires_grad_()
    sol = fpi.fixed_point(g, x0, z, rtol=1e-8, max_steps=300)
    v = torch.ones_like(x0)
    v[3] = torch.inf
    (found,) = torch.autograd.grad(sol.value, z, v)
    assert not found.isfinite().any()
    assert sol.adjoint_stats is not None
    assert sol.adjoint_stats.num_zeroed == 0


@pytest.mark.parametrize("solver", LINEAR_SOLVERS, ids=lambda s: type(s).__name__)
def test_the_residual_of_the_adjoint_is_that_of_all_rows(solver: Any) -> None:
    """Where the forward solve had no chance to notice: it begins at the solution."""
    g, x0 = graph()
    x_star = iterated(g, x0)
    t = torch.zeros_like(x0).requires_grad_()
    adjoint = fpi.Implicit(solver=solver, rtol=1e-6)
    sol = fpi.fixed_point(
        lambda x, t: g(x) + t, x_star, t, rtol=1e-4, max_steps=500, adjoint=adjoint
    )
    v = masked(torch.randn_like(x0))
    (c,) = torch.autograd.grad(sol.value, t, v)  # dg/dt = I, so this is the adjoint itself
    _, pull = torch.func.vjp(g, sol.value.detach())
    residual = (pull(c)[0] + v - c).norm(dim=1)
    stats = sol.adjoint_stats
    assert stats is not None
    assert stats.converged.all()
    assert residual.norm() <= 1.001e-6 * v.norm()
    assert (stats.residual - residual).norm() <= 1e-9 * v.norm() + 1e-2 * residual.norm()


@pytest.mark.parametrize("solver", [fpi.GMRES(), fpi.ConjugateGradient()], ids=str)
def test_rows_that_a_krylov_solver_cannot_solve_apart(solver: Any) -> None:
    """They end at a true residual that is no solution, and nothing has moved."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.rand(3, 3, dtype=F64, generator=generator)
    mix = mix / mix.sum(1, keepdim=True)
    weight = torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=generator))[0] * 0.6

    def g(x: Tensor, t: Tensor) -> Tensor:
        return mix @ x @ weight + t

    t = torch.randn(3, 4, dtype=F64, generator=generator).requires_grad_()
    x_star = iterated(g, torch.zeros_like(t), t.detach())
    adjoint = fpi.Implicit(solver=solver, rtol=1e-9, max_steps=500)
    for _ in range(3):
        sol = fpi.fixed_point(g, x_star, t, rtol=1e-3, adjoint=adjoint)
        v = torch.randn(3, 4, dtype=F64, generator=generator)
        (found,) = torch.autograd.grad(sol.value, t, v)
        want = dense_gradient(g, x_star, t.detach(), v)
        assert (found - want).norm() <= 1e-7 * want.norm()


def test_derivatives_of_every_order_and_mode() -> None:
    g, x0 = graph(6, 2, sources=1)
    z = (0.1 * torch.randn_like(x0)).requires_grad_()

    def solve(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, x0, z, rtol=1e-12, max_steps=500).value

    assert torch.autograd.gradcheck(solve, (z,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solve, (z,))


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "jvp", "vmap", "hessian"])
def test_inside_of_torch_func(transform: str) -> None:
    g, x0 = graph(6, 2, sources=1)
    z, t = (0.1 * torch.randn_like(x0) for _ in range(2))

    def solve(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, x0, z, rtol=1e-11, max_steps=800).value

    def unrolled(z: Tensor) -> Tensor:
        x = x0
        for _ in range(300):
            x = g(x, z)
        return x

    def loss(of: Map) -> Map:
        return lambda z: of(z)[::2].square().sum()

    func: dict[str, Callable[[Map], Tensor]] = {
        "grad": lambda of: torch.func.grad(loss(of))(z),
        "jacrev": lambda of: torch.func.jacrev(of)(z),
        "jacfwd": lambda of: torch.func.jacfwd(of)(z),
        "jvp": lambda of: torch.func.jvp(of, (z,), (t,))[1],
        "vmap": lambda of: torch.func.vmap(of)(torch.stack([z, t, z + t])),
        "hessian": lambda of: torch.func.hessian(loss(of))(z),
    }
    found, want = func[transform](solve), func[transform](unrolled)
    assert (found - want).abs().max() <= 1e-7 * want.abs().max()


@pytest.mark.parametrize("adjoint", [fpi.Implicit(), fpi.Implicit(solver=fpi.GMRES())], ids=str)
def test_samples_of_a_vmap_are_not_coupled(adjoint: Any) -> None:
    """One of them has no fixed point that the iteration finds; the others have theirs."""
    mix = torch.softmax(torch.randn(5, 5, dtype=F64), 1)
    z = torch.randn(3, 5, 2, dtype=F64)
    k = torch.tensor([0.5, 1.5, 0.6], dtype=F64)
    options: dict[str, Any] = {"solver": fpi.Picard(), "rtol": 1e-10, "max_steps": 200}

    def solve(k: Tensor, z: Tensor) -> fpi.Solution:
        g = lambda x, k, z: k * (mix @ x) + z  # noqa: E731
        return fpi.fixed_point(g, torch.zeros_like(z), k, z, adjoint=adjoint, **options)

    def loss(k: Tensor, z: Tensor) -> Tensor:
        return solve(k, z).value.square().sum()

    status, value = torch.func.vmap(lambda k, z: (solve(k, z).status, solve(k, z).value))(k, z)
    grads = torch.func.vmap(torch.func.grad(loss, (0, 1)))(k, z)
    for i in (0, 2):
        sol = solve(k[i], z[i])
        assert (status[i] == fpi.Status.CONVERGED).all()
        assert (value[i] - sol.value).abs().max() < 1e-9
        alone = torch.func.grad(loss, (0, 1))(k[i], z[i])
        for found, want in zip(grads, alone, strict=True):
            assert (found[i] - want).norm() <= 1e-7 * want.norm()
    assert not (status[1] == fpi.Status.CONVERGED).any()


def test_a_row_that_is_skipped_by_the_loss_gets_its_gradient() -> None:
    """b is zero in most rows, and so is their own tolerance; the sum of them all counts."""
    g, x0 = chain(12)
    z = torch.zeros_like(x0).requires_grad_()
    x = fpi.fixed_point(g, x0, z, rtol=1e-10, max_steps=400).value
    (found,) = torch.autograd.grad(x[-1], z)
    want = 0.8 ** torch.arange(11, -1, -1, dtype=F64)
    assert (found - want).abs().max() < 1e-8


# --- rows that are independent -------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_rows_that_are_independent_keep_every_bit(solver: Any, dtype: torch.dtype) -> None:
    """With failures of every kind among them."""
    scale = torch.tensor([0.1, 0.5, 0.9, 1.0, 3.0, 0.99, 0.0, 0.3], dtype=dtype)[:, None]
    z = torch.randn(8, 5, dtype=dtype)
    z[3], z[7, 2] = 1.0, torch.nan  # x + 1 has no fixed point

    def g(x: Tensor, z: Tensor) -> Tensor:
        return scale[: len(x)] * x + z

    options: dict[str, Any] = {"solver": solver, "rtol": 1e-4, "max_steps": 60}
    sols = [fpi.fixed_point(g, torch.zeros_like(z), z, **options) for _ in range(2)]

    def alone(i: int) -> fpi.Solution:
        row = z[i : i + 1]
        return fpi.fixed_point(lambda x, z: scale[i] * x + z, torch.zeros_like(row), row, **options)

    single = [alone(i) for i in range(8)]
    for sol in sols:
        for name in ("value", "status", "num_steps", "residual"):
            want = torch.cat([getattr(one, name) for one in single])
            assert torch.equal(getattr(sol, name).nan_to_num(), want.nan_to_num()), name


def test_only_the_first_solve_of_a_map_is_probed() -> None:
    calls: list[int] = []

    def g(x: Tensor, z: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.tanh(0.5 * x + z)

    z = torch.randn(6, 3, dtype=F64)
    counts = []
    for _ in range(3):
        calls.clear()
        with torch.no_grad():
            sol = fpi.fixed_point(g, torch.zeros_like(z), z)
        counts.append(len(calls) - int(sol.num_steps.max()))
    assert counts == [1, 0, 0]


# --- promises and their names ------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_broken_promise_names_both_ways_out(grad: bool) -> None:
    g, x0 = graph()
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as raised:
        fpi.fixed_point(g, x0, rtol=1e-6, max_steps=300, rowwise=True)
    assert "rowwise=None" in str(raised.value)
    assert "batch_dims=0" in str(raised.value)


def test_one_kept_promise_says_nothing_of_another_map() -> None:
    z = torch.arange(4.0, dtype=F64)[:, None]

    def make(c: float) -> Map:
        return lambda x, z: 0.5 * x + c * x.mean(0) + z

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Parameter(torch.zeros((), dtype=F64))

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return 0.5 * x + self.c * x.mean(0) + z

    options: dict[str, Any] = {"rowwise": True, "rtol": 1e-8, "max_steps": 300}
    module = Scaled()
    with torch.no_grad():
        fpi.fixed_point(make(0.0), torch.zeros_like(z), z, **options)
        with pytest.raises(RuntimeError, match="rowwise=None"):
            fpi.fixed_point(make(0.3), torch.zeros_like(z), z, **options)
        fpi.fixed_point(module, torch.zeros_like(z), z, **options)
        module.c.fill_(0.3)
        with pytest.raises(RuntimeError, match="rowwise=None"):
            fpi.fixed_point(module, torch.zeros_like(z), z, **options)


@pytest.mark.parametrize("make", COUPLED)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_the_whole_state_as_one_sample(make: Map, solver: Any) -> None:
    g, x0 = make()
    z = (0.1 * torch.randn_like(x0)).requires_grad_()
    sol = fpi.fixed_point(g, x0, z, solver=solver, batch_dims=0, rtol=1e-10, max_steps=2000)
    for field in (sol.status, sol.num_steps, sol.residual, sol.converged):
        assert field.shape == ()
    assert sol.converged
    assert sol.value.shape == x0.shape
    assert abs(sol.residual - true_residual(g, sol.value, z).norm()) <= 1e-12
    v = torch.randn_like(x0)
    (found,) = torch.autograd.grad(sol.value, z, v)
    assert (found - (want := dense_gradient(g, x0, z.detach(), v))).norm() <= 1e-7 * want.norm()
    stats = sol.adjoint_stats
    assert stats is not None
    assert stats.status.shape == stats.num_steps.shape == stats.residual.shape == ()
    assert stats.converged


def test_one_sample_of_any_shapes() -> None:
    def g(state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = state
        return (
            0.5 * torch.cos(b.sum() / 6),
            0.3 * torch.sin(c) * b.new_ones(2, 1) + 0.1 * a,
            0.2 * b.sum(0),
        )

    start = (torch.zeros((), dtype=F64), torch.zeros(2, 3, dtype=F64), torch.zeros(3, dtype=F64))
    sol = fpi.fixed_point(g, start, batch_dims=0, rtol=1e-12)
    assert sol.converged
    assert [t.shape for t in sol.value] == [t.shape for t in start]
    for now, then in zip(g(sol.value), sol.value, strict=True):
        assert (now - then).abs().max() < 1e-10


def test_one_sample_inside_of_vmap() -> None:
    g, x0 = graph(6, 2)
    zs = 0.1 * torch.randn(3, *x0.shape, dtype=F64)

    def solve(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, x0, z, batch_dims=0, rtol=1e-11, max_steps=500).value

    apart = torch.stack([solve(z) for z in zs])
    assert (torch.func.vmap(solve)(zs) - apart).abs().max() < 1e-9
    jacobian = torch.func.vmap(torch.func.jacrev(solve))(zs)
    want = torch.stack([torch.autograd.functional.jacobian(solve, z) for z in zs])
    assert (jacobian - want).abs().max() < 1e-8


def test_a_layer_of_one_sample() -> None:
    g, x0 = graph()
    layer = fpi.FPILayer(g, batch_dims=0, rtol=1e-8, max_steps=300, state_shape=tuple(x0.shape))
    z = 0.1 * torch.randn_like(x0)
    assert layer.solve(z).converged
    assert "batch_dims=0" in repr(layer)
    with pytest.raises(fpi.ConvergenceError, match="1 of 1 samples"):
        fpi.FPILayer(g, batch_dims=0, max_steps=2, throw=True)(z)


def test_one_sample_has_no_independent_rows() -> None:
    with pytest.raises(ValueError, match="batch_dims=0 makes the whole state one sample"):
        fpi.fixed_point(torch.cos, torch.zeros(3), batch_dims=0, rowwise=True)


# --- modules that keep statistics ----------------------------------------------------------------


class Normalised(nn.Module):
    def __init__(self, norm: nn.Module, hoisted: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("weight", orthogonal(5, 0.5))
        if hoisted:
            self.prepare = lambda z: self.norm(z)
            self.step = lambda x, prepared: 0.5 * torch.tanh(x @ self.weight + prepared)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if hasattr(self, "prepare"):
            return self.step(x, self.prepare(z))
        return 0.5 * torch.tanh(self.norm(x @ self.weight + z))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("hoisted", [False, True])
def test_running_statistics_count_one_call(grad: bool, create_graph: bool, hoisted: bool) -> None:
    norm = nn.BatchNorm1d(5, dtype=F64)
    g = Normalised(norm, hoisted)
    layer, z = fpi.FPILayer(g, rtol=1e-9, max_steps=200), torch.randn(16, 5, dtype=F64)
    for call in range(1, 4):
        before = norm.running_mean.clone()  # type: ignore[union-attr]
        with torch.set_grad_enabled(grad):
            x = layer(z.clone().requires_grad_())
        if grad:
            grads = torch.autograd.grad(x.square().sum(), list(g.parameters()), create_graph=True)
            if create_graph:
                sum(t.square().sum() for t in grads).backward()
        assert norm.num_batches_tracked == call
        inner = z if hoisted else x.detach() @ g.weight + z
        want = 0.9 * before + 0.1 * inner.mean(0)
        assert (norm.running_mean - want).abs().max() < 1e-7  # type: ignore[operator]


NORM = nn.BatchNorm1d(5, dtype=F64)


def by_name(x: Tensor, z: Tensor) -> Tensor:
    return 0.5 * torch.tanh(NORM(x)) + z


class Holder:
    def __init__(self, norm: nn.Module) -> None:
        self.norms = [norm]

    def step(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.norms[0](x)) + z


class HeldInATuple(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norms = (norm,)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.norms[0](x)) + z


HOLDERS: dict[str, Callable[[nn.Module], Map]] = {
    "closure": lambda norm: lambda x, z: 0.5 * torch.tanh(norm(x)) + z,
    "list": lambda norm: (lambda held: lambda x, z: 0.5 * torch.tanh(held[0](x)) + z)([norm]),
    "default": lambda norm: lambda x, z, norm=norm: 0.5 * torch.tanh(norm(x)) + z,
    "global": lambda _: by_name,
    "method": lambda norm: Holder(norm).step,
    "tuple of a module": HeldInATuple,
}


@pytest.mark.parametrize("held", HOLDERS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_batch_norm_counts_once_wherever_g_holds_it(held: str, grad: bool) -> None:
    """From x0 = 0 the first evaluation leaves the running mean where it was."""
    NORM.reset_running_stats()
    norm = NORM if held == "global" else nn.BatchNorm1d(5, dtype=F64)
    z = torch.randn(16, 5, dtype=F64)
    for call in (1, 2):
        before = norm.running_mean.clone()  # type: ignore[union-attr]
        with torch.set_grad_enabled(grad):
            sol = fpi.fixed_point(
                HOLDERS[held](norm), torch.zeros_like(z), z, rtol=1e-10, max_steps=200
            )
        assert norm.num_batches_tracked == call
        want = 0.9 * before + 0.1 * sol.value.detach().mean(0)
        assert (norm.running_mean - want).abs().max() < 1e-8  # type: ignore[operator]


def test_statistics_of_a_modules_own_count_once() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(5, dtype=F64))
            self.register_buffer("replaced", torch.zeros((), dtype=F64))

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            self.replaced = self.replaced + 1
            return 0.5 * torch.tanh(x - self.mean) + z

    g, z = Centred(), torch.randn(16, 5, dtype=F64)
    sol = fpi.fixed_point(g, torch.zeros_like(z), z, rtol=1e-10, max_steps=300)
    assert sol.converged.all()
    assert g.replaced == 1
    assert (g.mean - 0.1 * sol.value.detach().mean(0)).abs().max() < 1e-8
    assert true_residual(lambda x: 0.5 * torch.tanh(x - g.mean) + z, sol.value).max() < 1e-8


def test_spectral_norm_is_one_map_in_training_mode() -> None:
    """Its power iteration goes on with every evaluation, and moves the weight."""
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5, dtype=F64))
    z = torch.randn(4, 5, dtype=F64)
    sol = fpi.fixed_point(
        lambda x, z: 0.7 * torch.tanh(linear(x)) + z, torch.zeros_like(z), z, rtol=1e-10
    )
    assert sol.converged.all()
    assert int(sol.num_steps.max()) < 60
    sol.value.sum().backward()
