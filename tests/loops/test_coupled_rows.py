"""Clause 2 and 3: rows that depend on one another are solved as one, and what is reported is true.

Nobody has to say that the rows of g are coupled, and no promise that they are not is needed where
they are not: then every row keeps the bits that it has in any other batch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from coupled_maps import COUPLED, F64, SOLVERS, Map, graph, orthogonal, same_as_told, true_residual
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda.loops import host
from fpi_cuda.loops.coupled import LEVELS, rows_mix


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


@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson()], ids=str)
@pytest.mark.parametrize("how", ["buffer", "data", "closure", "z"])
def test_a_promise_is_held_to_in_every_solve(how: str, solver: Any) -> None:
    """Also where no version counter, and nothing that names g, tells that it is another map."""
    z = torch.arange(5.0, dtype=F64)[:, None]
    box = [torch.zeros((), dtype=F64)]

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.zeros((), dtype=F64))
            self.c = nn.Parameter(torch.zeros((), dtype=F64))

        def forward(self, x: Tensor, z: Tensor, d: Tensor) -> Tensor:
            return torch.tanh(0.4 * x + (self.a + self.c + box[0] + d) * x.mean(0) + z)

    g, d = Mixing(), torch.zeros((), dtype=F64)
    options: dict[str, Any] = {"rowwise": True, "rtol": 1e-8, "max_steps": 300, "solver": solver}
    with torch.no_grad():
        fpi.fixed_point(g, torch.zeros_like(z), z, d, **options)
        half = torch.full((), 0.5, dtype=F64)
        if how == "buffer":
            g.a.fill_(0.5)
        elif how == "data":
            g.c.data = half
        elif how == "closure":
            box[0] = half
        else:
            d = half
        with pytest.raises(RuntimeError, match="rowwise=None"):
            fpi.fixed_point(g, torch.zeros_like(z), z, d, **options)


@pytest.mark.parametrize(
    ("adjoint", "grad"),
    [(fpi.Implicit(), False), (fpi.Implicit(), True), (fpi.Unroll(), True)],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3), (F64, 2e-15)],
)
def test_tolerances_near_rounding(
    dtype: torch.dtype, rtol: float, adjoint: Any, grad: bool
) -> None:
    """A row that others have moved out of its tolerance by a few roundings has not converged."""
    for seed in range(4):
        torch.manual_seed(seed)
        b = (torch.randn(4, 3) * 10.0 ** torch.randint(-2, 3, (4, 1))).to(dtype)
        b.requires_grad_(grad)

        def g(x: Tensor, b: Tensor) -> Tensor:
            return 0.7 * x.mean(0) + b

        for solver in (fpi.Picard(), fpi.Anderson(), fpi.Broyden()):
            sol = fpi.fixed_point(
                g, torch.zeros_like(b), b, solver=solver, rtol=rtol, max_steps=300, adjoint=adjoint
            )
            x = sol.value.detach()
            gx = g(x, b).detach().double()
            residual = (gx - x.double()).norm(dim=1)
            torch.testing.assert_close(sol.residual.double(), residual, rtol=1e-4, atol=0)
            within = residual <= rtol * gx.norm(dim=1) * (1 + 1e-5)
            assert bool(within[sol.converged].all())


TRANSFORMS: dict[str, Any] = {
    "grad": lambda call, z: torch.func.grad(lambda z: call(z).sum())(z),
    "jvp": lambda call, z: torch.func.jvp(call, (z,), (z,)),
    "vmap": lambda call, z: torch.func.vmap(call)(torch.stack([z, 2 * z])),
    "backward": lambda call, z: call(z.clone().requires_grad_()),
}


@pytest.mark.parametrize("way", TRANSFORMS)
@pytest.mark.parametrize("adjoint", [fpi.Implicit(), fpi.JacobianFree(), fpi.Unroll()], ids=str)
def test_a_broken_promise_under_derivatives(way: str, adjoint: Any) -> None:
    z = torch.arange(5.0, dtype=F64)[:, None]

    def call(z: Tensor) -> Tensor:
        sol = fpi.fixed_point(
            lambda x, z: torch.tanh(0.4 * x + 0.5 * x.mean(0) + z),
            torch.zeros_like(z), z, rowwise=True, rtol=1e-8, max_steps=300, adjoint=adjoint,
        )  # fmt: skip
        value: Tensor = sol.value
        return value

    with pytest.raises(RuntimeError, match="rowwise=None"):
        TRANSFORMS[way](call, z)


@pytest.mark.parametrize("mode", ["no_grad", "grad", "Unroll"])
@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson()], ids=str)
def test_a_promise_that_is_all_but_kept_has_a_true_account(solver: Any, mode: str) -> None:
    """Rows too little coupled for an error are told as g has them, all together."""
    z = torch.linspace(0.5, 3.0, 6, dtype=F64)[:, None]

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(0.5 * x + 6e-9 * x.mean(0) + z)

    options: dict[str, Any] = {"rowwise": True, "rtol": 1e-8, "max_steps": 300, "solver": solver}
    if mode == "Unroll":
        options["adjoint"] = fpi.Unroll()

    def call(z: Tensor) -> Any:
        return fpi.fixed_point(g, torch.zeros_like(z), z, **options)

    with torch.set_grad_enabled(mode != "no_grad"):
        sol = call(z.clone().requires_grad_(mode != "no_grad"))
    x = sol.value.detach()
    residual = true_residual(lambda x: g(x, z), x)
    torch.testing.assert_close(sol.residual, residual, rtol=1e-3, atol=1e-12)
    within = residual <= 1e-8 * g(x, z).norm(dim=1) * (1 + 1e-6)
    assert bool(within[sol.converged].all())


def test_a_kept_promise_keeps_its_statuses_under_autocast() -> None:
    """Kernels for fewer rows, or under grad mode, round otherwise; that is no broken promise."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    z = torch.randn(33, 5, 16)
    found = []
    for rowwise in (None, True):
        for grad in (False, True):
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
                sol = fpi.fixed_point(
                    lambda x, z: layer(0.5 * x + z), torch.zeros_like(z), z,
                    rowwise=rowwise, rtol=2e-3, max_steps=100,
                )  # fmt: skip
            found.append(int(sol.converged.sum()))
    # How many get there depends on the kernels of the machine; a promise changes little in it.
    assert min(found) > max(found) // 2


@pytest.mark.parametrize("leaving", [False, True], ids=["all_stay", "some_leave"])
def test_one_evaluation_more_where_rows_have_left(
    leaving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all stay, the latest evaluation was that of all rows at the points returned."""
    monkeypatch.setattr(host.CountAtOnce, "idle_below", 0 if leaving else 1 << 30)
    calls = []

    def g(x: Tensor, z: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.tanh(0.5 * x + z)

    z = torch.randn(5, 3, dtype=F64)
    options: dict[str, Any] = {"rowwise": True, "rtol": 1e-8}
    with torch.no_grad():
        sol = fpi.fixed_point(g, torch.zeros_like(z), z, **options)
        assert len(calls) == int(sol.num_steps.max()) + leaving
        assert (min(calls) < 5) == leaving
        calls.clear()
        fpi.fixed_point(g, sol.value, z, **options)
    assert calls == [5]


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


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("batch", [2, 3, LEVELS, LEVELS + 1, 100])
def test_every_pair_of_rows_is_told_apart(batch: int) -> None:
    like = torch.zeros(batch, 2)
    for i in range(batch):
        for j in {(i + 1) % batch, (i + 2) % batch, (i + LEVELS) % batch, batch - 1 - i} - {i}:

            def apply(y: Tensor, i: int = i, j: int = j) -> Tensor:
                out = 0.5 * y
                out[i] += 1e-3 * y[j]
                return out

            assert rows_mix(apply, like, batch)


@pytest.mark.parametrize(
    ("dtype", "inside"),
    [(d, None) for d in DTYPES] + [(torch.float32, d) for d in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_rows_that_stand_alone_do_not_mix(dtype: torch.dtype, inside: torch.dtype | None) -> None:
    weight = torch.randn(33, 33) / 6

    def apply(y: Tensor) -> Tensor:
        low = inside or dtype
        return (y.to(low) @ weight.to(low)).to(dtype)

    for batch in (2, 31, 129):
        assert not rows_mix(apply, torch.zeros(batch, 33, dtype=dtype), batch)


def test_rows_mix_within_a_sample_of_a_vmap_only() -> None:
    """What joins samples that cannot depend on one another is not looked for."""
    like = torch.zeros(12, 2)
    within = torch.block_diag(*[torch.rand(3, 3) for _ in range(4)])
    assert rows_mix(lambda y: within @ y, like, 3)
    assert not rows_mix(lambda y: y, like, 3)


def test_products_that_are_not_finite_show_nothing() -> None:
    def apply(y: Tensor) -> Tensor:
        out = 0.5 * y
        out[1] = torch.nan
        return out

    assert not rows_mix(apply, torch.zeros(4, 2), 4)


@pytest.mark.parametrize(("batch", "products"), [(2, 2), (8, 2), (9, 3), (64, 3), (4096, 5)])
def test_what_it_costs(batch: int, products: int) -> None:
    seen = []
    rows_mix(lambda y: seen.append(1) or y, torch.zeros(batch, 1), batch)  # type: ignore[func-returns-value]
    assert len(seen) == products
