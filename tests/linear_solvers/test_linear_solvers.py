"""GMRES and conjugate gradients on the normal equations, each sample its own system."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fpi_cuda.linear_solvers import conjugate_gradient, gmres
from fpi_cuda.solution import SolveResult, Status

SOLVERS = ["gmres", "gmres_restarted", "conjugate_gradient"]
# Relative tolerance that each dtype reaches on a system of condition number below 100.
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


class System:
    """A (B, D, D) batch of matrices that counts how often each product is evaluated."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.num_products = 0

    def apply(self, c: Tensor) -> Tensor:
        self.num_products += 1
        return torch.einsum("bij,bj->bi", self.matrix, c)

    def apply_transpose(self, c: Tensor) -> Tensor:
        self.num_products += 1
        return torch.einsum("bij,bi->bj", self.matrix, c)


def solve(
    solver: str, system: System, v: Tensor, rtol: float, max_steps: int = 1000
) -> SolveResult:
    atol = rtol * v.double().norm(dim=1)
    if solver == "conjugate_gradient":
        return conjugate_gradient(
            system.apply, system.apply_transpose, v, atol=atol, max_steps=max_steps
        )
    restart = 8 if solver == "gmres_restarted" else 64
    return gmres(system.apply, v, restart=restart, atol=atol, max_steps=max_steps)


def contractive(batch: int, dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[System, Tensor]:
    """I - J with J non-normal and of norm 0.9, and right-hand sides of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(batch, dim, dim, generator=generator, dtype=torch.float64)
    jacobian = 0.9 * jacobian / torch.linalg.matrix_norm(jacobian, 2)[:, None, None]
    matrix = torch.eye(dim, dtype=torch.float64) - jacobian
    size = torch.logspace(-6, 4, batch, dtype=torch.float64)[:, None]
    v = size * torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    return System(matrix.to(dtype)), v.to(dtype)


def true_residual(system: System, v: Tensor, c: Tensor) -> Tensor:
    return (v - torch.einsum("bij,bj->bi", system.matrix, c)).double().norm(dim=1)


@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
@pytest.mark.parametrize("dim", [1, 2, 31, 33])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solves_to_tolerance(solver: str, dim: int, dtype: torch.dtype) -> None:
    system, v = contractive(5, dim, dtype)
    result = solve(solver, system, v, RTOL[dtype])
    assert result.status.tolist() == [Status.CONVERGED] * 5
    assert result.status.dtype == torch.int8
    assert result.num_steps.dtype == torch.int32
    assert result.residual.dtype == torch.float64
    assert result.x.dtype == dtype
    torch.testing.assert_close(
        result.residual, true_residual(system, v, result.x), rtol=1e-2, atol=0
    )
    assert bool((result.residual <= RTOL[dtype] * v.double().norm(dim=1)).all())
    exact = torch.linalg.solve(system.matrix.double(), v.double())
    error = (result.x.double() - exact).norm(dim=1) / exact.norm(dim=1)
    # ||A^-1|| <= 10 and ||A|| < 2, so the error is at most 20 times the residual.
    assert bool((error <= 20 * RTOL[dtype]).all())


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("solver", SOLVERS)
def test_ends_after_as_many_steps_as_there_are_eigenvalues(solver: str, count: int) -> None:
    values = torch.linspace(0.5, 1.5, count, dtype=torch.float64).repeat(20)[:20]
    basis, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    system = System((basis * values @ basis.T)[None])
    v = torch.randn(1, 20, dtype=torch.float64)
    result = solve(solver, system, v, 1e-10)
    assert result.status.tolist() == [Status.CONVERGED]
    # GMRES: a product per step; CG: A^T r first, then two per step but for the last. One check.
    expected = 2 * count + 1 if solver == "conjugate_gradient" else count + 1
    assert result.num_steps.tolist() == [expected]
    assert system.num_products == expected


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_right_hand_side_costs_nothing(solver: str) -> None:
    system, v = contractive(3, 7, torch.float64)
    v[1] = 0
    result = solve(solver, system, v, 1e-10)
    assert result.status.tolist() == [Status.CONVERGED] * 3
    assert result.num_steps[1] == 0
    assert result.residual[1] == 0
    assert not bool(result.x[1].any())


@pytest.mark.parametrize("solver", SOLVERS)
def test_nobody_active_evaluates_nothing(solver: str) -> None:
    system, v = contractive(3, 7, torch.float64)
    result = solve(solver, system, torch.zeros_like(v), 1e-10)
    assert system.num_products == 0
    assert result.status.tolist() == [Status.CONVERGED] * 3


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_bad_sample_leaves_the_others_alone(solver: str) -> None:
    system, v = contractive(6, 13, torch.float64)
    alone = solve(solver, system, v, 1e-10)
    faulty = System(system.matrix.clone())
    faulty.matrix[1] = float("nan")
    faulty.matrix[4, 0, 0] = float("inf")
    v = v.clone()
    v[2, 3] = float("nan")
    v[3, 0] = float("inf")
    result = solve(solver, faulty, v, 1e-10)
    bad = [1, 2, 3, 4]
    assert result.status[bad].tolist() == [Status.NONFINITE] * 4
    assert bool(torch.isfinite(result.x).all())
    assert result.num_steps[[2, 3]].tolist() == [0, 0]
    for i in (0, 5):
        assert result.status[i] == Status.CONVERGED
        assert result.num_steps[i] == alone.num_steps[i]
        torch.testing.assert_close(result.x[i], alone.x[i], rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch(solver: str) -> None:
    system, v = contractive(7, 24, torch.float64)
    whole = solve(solver, system, v, 1e-10)
    assert whole.num_steps.unique().numel() > 1, "the samples must stop at different steps"
    for i in range(7):
        single = solve(solver, System(system.matrix[i : i + 1]), v[i : i + 1], 1e-10)
        assert single.num_steps[0] == whole.num_steps[i]
        assert float((single.x[0] - whole.x[i]).norm()) <= 1e-11 * float(whole.x[i].norm())


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_stopped_sample_does_not_move(solver: str) -> None:
    system, v = contractive(2, 24, torch.float64)
    system.matrix[0] = torch.eye(24, dtype=torch.float64)
    early = solve(solver, system, v, 1e-10, max_steps=5)
    late = solve(solver, system, v, 1e-10)
    assert early.status.tolist() == [Status.CONVERGED, Status.MAX_STEPS]
    assert late.status.tolist() == [Status.CONVERGED, Status.CONVERGED]
    assert torch.equal(early.x[0], late.x[0])
    assert early.residual[0] == late.residual[0]
    assert early.num_steps[0] == late.num_steps[0]


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_cap_is_kept_and_the_best_iterate_returned(solver: str, max_steps: int) -> None:
    system, v = contractive(4, 40, torch.float64)
    result = solve(solver, system, v, 1e-14, max_steps=max_steps)
    assert result.status.tolist() == [Status.MAX_STEPS] * 4
    assert int(result.num_steps.max()) <= max_steps
    assert system.num_products <= max_steps
    torch.testing.assert_close(result.residual, true_residual(system, v, result.x))
    assert bool((result.residual <= (1 + 1e-14) * v.norm(dim=1)).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tolerance_below_the_floor_stalls(solver: str, dtype: torch.dtype) -> None:
    system, v = contractive(4, 33, dtype)
    result = solve(solver, system, v, 0.0)
    assert result.status.tolist() == [Status.STALLED] * 4
    assert int(result.num_steps.max()) < 1000
    exact = torch.linalg.solve(system.matrix.double(), v.double())
    error = (result.x.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert bool((error <= 1e3 * torch.finfo(dtype).eps).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_singular_but_consistent_is_solved(solver: str) -> None:
    values = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    system = System((basis * values @ basis.T)[None])
    v = system.apply(torch.randn(1, 5, dtype=torch.float64))
    result = solve(solver, system, v, 1e-10)
    assert result.status.tolist() == [Status.CONVERGED]


@pytest.mark.parametrize("solver", SOLVERS)
def test_singular_and_inconsistent_is_never_converged(solver: str) -> None:
    matrix = torch.zeros(2, 4, 4, dtype=torch.float64)
    matrix[0] = torch.diag(torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64))
    v = torch.ones(2, 4, dtype=torch.float64)
    result = solve(solver, System(matrix), v, 1e-6, max_steps=60)
    assert result.status.tolist() == [Status.MAX_STEPS] * 2
    # The component outside the range, and nothing but it, is left.
    torch.testing.assert_close(result.residual, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_gmres_that_stagnates_says_so() -> None:
    # Against a cyclic shift GMRES gains nothing before the last step of a full basis.
    shift = torch.eye(6, dtype=torch.float64).roll(1, 0)[None]
    v = torch.zeros(1, 6, dtype=torch.float64)
    v[0, 0] = 1
    atol = torch.full((1,), 1e-10, dtype=torch.float64)
    short = gmres(System(shift).apply, v, restart=5, atol=atol, max_steps=50)
    assert short.status.tolist() == [Status.MAX_STEPS]
    torch.testing.assert_close(short.residual, torch.ones(1, dtype=torch.float64))
    full = gmres(System(shift).apply, v, restart=6, atol=atol, max_steps=50)
    assert full.status.tolist() == [Status.CONVERGED]
    assert full.num_steps.tolist() == [7]


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**16, 2.0**100])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scale_of_v_changes_nothing(solver: str, factor: float) -> None:
    system, v = contractive(3, 20, torch.float64)
    base = solve(solver, system, v, 1e-10)
    scaled = solve(solver, system, v * factor, 1e-10)
    assert torch.equal(base.num_steps, scaled.num_steps)
    torch.testing.assert_close(scaled.x / factor, base.x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_huge_and_tiny_float64_neither_overflow_nor_vanish(solver: str) -> None:
    system, v = contractive(2, 9, torch.float64)
    v = v / v.norm(dim=1, keepdim=True) * torch.tensor([[1e200], [1e-200]], dtype=torch.float64)
    atol = torch.tensor([1e190, 1e-210], dtype=torch.float64)
    if solver == "conjugate_gradient":
        result = conjugate_gradient(
            system.apply, system.apply_transpose, v, atol=atol, max_steps=200
        )
    else:
        result = gmres(system.apply, v, restart=8, atol=atol, max_steps=200)
    assert result.status.tolist() == [Status.CONVERGED] * 2
    exact = torch.linalg.solve(system.matrix, v)
    torch.testing.assert_close(result.x / exact, torch.ones_like(exact), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_empty(solver: str, shape: tuple[int, int]) -> None:
    system = System(torch.eye(shape[1]).expand(shape[0], -1, -1))
    result = solve(solver, system, torch.zeros(shape), 1e-6)
    assert result.x.shape == shape
    assert result.status.tolist() == [Status.CONVERGED] * shape[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_non_contiguous_v_is_read_right_and_left_alone(solver: str) -> None:
    system, v = contractive(5, 12, torch.float64)
    strided = v.T.contiguous().T
    before = strided.clone()
    result = solve(solver, system, strided, 1e-10)
    torch.testing.assert_close(result.x, solve(solver, system, v, 1e-10).x, rtol=1e-10, atol=0)
    assert torch.equal(strided, before)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_graph_is_built(solver: str) -> None:
    system, v = contractive(2, 5, torch.float64)
    system.matrix.requires_grad_()
    result = solve(solver, system, v.requires_grad_(), 1e-10)
    assert not result.x.requires_grad


def good(c: Tensor) -> Tensor:
    return c


@pytest.mark.parametrize(
    ("apply", "v", "atol", "message"),
    [
        (good, torch.ones(2, 3, 4), torch.ones(2), r"of shape \(B, D\), got \(2, 3, 4\)"),
        (good, torch.ones(2, 3, dtype=torch.int64), torch.ones(2), "floating"),
        (good, torch.ones(2, 3), torch.ones(3), r"per sample, got v=\(2, 3\), atol=\(3,\)"),
        (lambda c: c[:, :2], torch.ones(2, 3), torch.zeros(2), r"A c=\(2, 2\)"),
    ],
    ids=["three_dims", "integer", "atol", "operator"],
)
def test_bad_input_is_named(
    apply: Callable[[Tensor], Tensor], v: Tensor, atol: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match="gmres: .*" + message):
        gmres(apply, v, restart=4, atol=atol, max_steps=9)
    with pytest.raises(ValueError, match="conjugate_gradient: .*" + message):
        conjugate_gradient(apply, apply, v, atol=atol, max_steps=9)
