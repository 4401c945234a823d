"""The host loop without ops: it takes the same steps, and what it leaves out is not needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda import _extension, ops
from fpi_cuda.autograd.scaling import sizes_of
from fpi_cuda.evaluation.state import layout_of
from fpi_cuda.loops import host, plan_of, plans, stepping
from fpi_cuda.norms import row_norm
from fpi_cuda.ops.solver_state import CONTROL_SIZE

pytestmark = pytest.mark.skipif(_extension.module_error is not None, reason="no compiled module")

SOLVERS = [
    fpi.Picard(),
    fpi.Picard(damping=0.7),
    fpi.Anderson(m=3),
    fpi.Anderson(m=5, beta=0.8, ridge=0.0),
    fpi.Anderson(m=4, history_dtype=torch.bfloat16),
    fpi.Broyden(m=4),
]


def history_fits(solver: Any, dtype: torch.dtype) -> bool:
    history = getattr(solver, "history_dtype", None)
    return history is None or dtype == torch.float32


@pytest.mark.parametrize("dim", [1, 3, 33, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_steps_are_those_of_the_op(solver: Any, dtype: torch.dtype, dim: int) -> None:
    """Every bit of what a solve returns or remembers, with rows that stop, fail and leave."""
    if not history_fits(solver, dtype):
        pytest.skip("such a history is for float32")
    batch = 7
    slope = torch.tensor([0.1, 0.5, 0.9, 0.97, 3.0, 0.3, 0.0], dtype=dtype)[:, None]
    z = torch.randn(batch, dim).to(dtype)
    z[5] = torch.nan

    def g(x: Tensor, rows: Tensor | None) -> Tensor:
        part = slice(None) if rows is None else rows
        return slope[part] * x + z[part]

    x0 = torch.randn(batch, dim).to(dtype)
    atol = torch.linspace(0.0, 1e-3, batch, dtype=torch.float64)
    by_op, mine = x0.clone(), x0.clone()
    work = stepping.allocate(x0, solver, atol)
    told = stepping.HostWork(mine, solver, atol, 1e-3, 30)
    op, arrays, numbers = stepping.step_of(ops.native, solver, work, 1e-3, 30)
    rows: Tensor | None = None
    for number in range(30):
        op(by_op, g(by_op, rows), rows, *arrays, **numbers)
        gx = g(mine, rows)
        left = told.steps.step(gx.data_ptr())
        active = work.status == fpi.Status.ACTIVE
        assert left == int(active.sum())
        assert torch.equal(by_op.nan_to_num(), mine.nan_to_num())
        for name in ("best", "status", "num_steps", "residual", "control", "atol"):
            ours, theirs = getattr(told, name), getattr(work, name)
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), (number, name)
        if not left:
            break
        if number % 4 == 3:
            kept = torch.empty((left, dim), dtype=dtype)
            names = torch.empty(left, dtype=torch.int64)
            told.steps.gather(kept.data_ptr(), names.data_ptr())
            mine, rows = kept, names
            assert torch.equal(names, torch.nonzero(active).flatten())
            by_op = mine.clone()
    assert number > 4


def test_what_is_remembered_outlives_the_history() -> None:
    x = torch.randn(3, 5)
    work = stepping.HostWork(x, fpi.Anderson(), 1e-3, 1e-4, 10)
    work.steps.step(torch.randn(3, 5).data_ptr())
    control, atol = work.control.clone(), work.atol.clone()
    work.forget()
    assert torch.equal(work.control, control)
    assert torch.equal(work.atol, atol)
    assert control.shape == (3, CONTROL_SIZE)
    assert bool((control[:, 0] > 0).all())
    assert atol.tolist() == [1e-3] * 3


@pytest.mark.parametrize("dim", [1, 7, 300])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_sizes_of_few_rows(dim: int, scale: float) -> None:
    b = torch.randn(5, dim) * scale
    b[2] *= 0.01
    found = sizes_of(b, 1e-3)
    assert found is not None
    (low, high), atol = found
    largest = b.abs().amax(1)
    assert (low, high) == (float(largest.min()), float(largest.max()))
    torch.testing.assert_close(atol, 1e-3 * row_norm(b), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (0, 2), (1, 0), (2, 2)])
def test_a_number_that_is_not_finite_shows(bad: float, place: tuple[int, int]) -> None:
    b = torch.ones(3, 3)
    b[place] = bad
    found = sizes_of(b, 1e-3)
    assert found is not None
    high = torch.tensor(found[0][1])
    assert not torch.isfinite(high)
    assert bool(torch.isnan(high)) == (bad != bad)


# --- what is left out of later evaluations -------------------------------------------------------


def solve(g: Any, z: Tensor, **options: Any) -> fpi.Solution:
    with torch.no_grad():
        return fpi.fixed_point(g, torch.zeros_like(z), z, route="host", **options)


@pytest.mark.parametrize("when", [1, 2, 3, 5])
def test_a_g_that_changes_z_in_any_evaluation_is_told(when: int) -> None:
    calls = [-99]

    def g(x: Tensor, z: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == when:
            z.mul_(1.0)
        return 0.9 * torch.sin(x) + z

    z = torch.randn(3, 4)
    solve(g, z, max_steps=20, rtol=0.0)  # which shows that g is nothing but called
    calls[0] = 0
    with pytest.raises(ValueError, match="must not change z in place"):
        solve(g, z, max_steps=20, rtol=0.0)
    assert calls[0] == when


@pytest.mark.parametrize("when", [2, 3, 5])
def test_a_g_that_changes_x_in_later_evaluations_is_told(when: int) -> None:
    calls = [-99]

    def g(x: Tensor, z: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == when:
            x.mul_(1.0)
        return 0.9 * torch.sin(x) + z

    z = torch.randn(3, 4)
    solve(g, z, max_steps=20, rtol=0.0)
    calls[0] = 0
    with pytest.raises(ValueError, match="must not change x in place"):
        solve(g, z, max_steps=20, rtol=0.0)


def test_a_g_that_begins_to_change_x_from_solve_to_solve() -> None:
    inside = [False]

    def g(x: Tensor, z: Tensor) -> Tensor:
        return x.mul_(0.5).add_(z) if inside[0] else 0.5 * x + z

    z = torch.randn(3, 4)
    first = solve(g, z)
    inside[0] = True
    second = solve(g, z)
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.num_steps, second.num_steps)


def test_a_g_that_begins_to_draw_from_solve_to_solve() -> None:
    """It is given the same numbers in every evaluation, and the generator moves on once."""
    drawing = [False]

    def g(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * x + z + (torch.rand_like(x) if drawing[0] else 0.0)

    z = torch.randn(3, 4)
    solve(g, z, rtol=1e-6)
    drawing[0] = True
    torch.manual_seed(3)
    found = solve(g, z, rtol=1e-6)
    after = torch.rand(())
    torch.manual_seed(3)
    drawn = torch.rand_like(z)
    assert found.converged.all()
    torch.testing.assert_close(found.value, 2 * (z + drawn), rtol=1e-5, atol=1e-5)
    assert torch.equal(after, torch.rand(()))


SHAPES: dict[str, Any] = {
    "itself": lambda x: x,
    "a view of itself": lambda x: x.view(-1).view(x.shape),
    "strided": lambda x: (0.5 * x.mT.contiguous()).mT + 0.5 * x,
    "a negative view": lambda x: torch._neg_view(-x),
    "with a graph": lambda x: torch.enable_grad()(lambda y: y * 1.0)(x.detach().requires_grad_()),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shape", [(4, 4), (4, 2, 3)], ids=str)
def test_values_of_g_in_any_memory(name: str, shape: tuple[int, ...]) -> None:
    """x + (z - x) / 2 in later evaluations, by way of tensors that lie in memory in all ways."""
    change = SHAPES[name]

    def g(x: Tensor, z: Tensor) -> Tensor:
        return change(0.5 * x + 0.5 * z)

    def same(x: Tensor, z: Tensor) -> Tensor:
        return change(x)

    z = torch.randn(shape)
    for _ in range(2):
        found = solve(g, z, rtol=1e-6)
        assert found.converged.all()
        torch.testing.assert_close(found.value, z, rtol=1e-5, atol=1e-5)
        still = solve(same, z)
        assert (still.num_steps == 1).all()
        assert (still.value == 0).all()


def test_what_g_does_to_its_x_stays_with_it() -> None:
    def g(x: Tensor, z: Tensor) -> Tensor:
        x.requires_grad_()
        x.unsqueeze_(0)
        return (0.5 * x.detach()).squeeze(0) + z

    z = torch.randn(3, 4)
    for _ in range(2):
        found = solve(g, z, rtol=1e-6)
        torch.testing.assert_close(found.value, 2 * z, rtol=1e-5, atol=1e-5)
    assert not found.value.requires_grad


# --- plans that are remembered --------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.1 * torch.tanh(self.inside(x)) + z


def test_a_plain_map_is_planned_once() -> None:
    layer, x0 = fpi.FPILayer(Plain()), torch.zeros(2, 4)
    first = plan_of(layer.g, layout_of(x0), layer.options)
    assert plan_of(layer.g, layout_of(x0 + 1), layer.options) is first
    assert plan_of(Plain(), layout_of(x0), layer.options) is first
    other = plan_of(layer.g, layout_of(torch.zeros(3, 4)), layer.options)
    assert other is not first
    assert other.layout.batch == 3


@pytest.mark.parametrize("where", ["class", "instance", "module", "buffer", "parameter"])
def test_a_plan_is_not_kept_where_a_map_gets_more_than_a_call(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, layout = fpi.FPILayer(Plain()), layout_of(torch.zeros(2, 4))
    first = plan_of(layer.g, layout, layer.options)
    assert not first.rowwise
    if where == "class":
        monkeypatch.setattr(Plain, "rowwise", True, raising=False)
    elif where == "instance":
        layer.g.rowwise = True
    elif where == "module":
        layer.g.rowwise = nn.Identity()
    elif where == "buffer":
        layer.g.register_buffer("rowwise", torch.ones(()))
    else:
        layer.g.rowwise = nn.Parameter(torch.ones(()))
    assert plan_of(layer.g, layout, layer.options).rowwise


def test_other_options_have_plans_of_their_own() -> None:
    layer, x0 = fpi.FPILayer(Plain()), torch.zeros(2, 4)
    plan_of(layer.g, layout_of(x0), layer.options)
    for solver in (fpi.Picard(), fpi.Broyden()):
        other = fpi.FPILayer(Plain(), solver=solver)
        assert plan_of(layer.g, layout_of(x0), other.options).options.solver == solver
    assert len(plans) <= 256


def test_a_loop_without_the_module_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(6, 5)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return 0.8 * torch.sin(x) + z

    found = solve(g, z, rtol=1e-6)
    monkeypatch.setattr(host, "is_native", lambda backend: False)
    expected = solve(g, z, rtol=1e-6)
    for name in ("value", "status", "num_steps", "residual"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_default_device_is_not_that_of_the_state(device: str) -> None:
    z = torch.rand(64, 160) + torch.arange(64).unsqueeze(1)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.sin(0.5 * x + z)

    expected = solve(g, z, rowwise=True)
    with torch.device(device):
        x0 = torch.zeros(z.shape, device="cpu")
        with torch.no_grad():
            found = fpi.fixed_point(g, x0, z, route="host", rowwise=True)
    assert torch.equal(found.value, expected.value)
    assert found.status.device == found.residual.device == z.device
