"""The zoo is what it says, and the solvers keep their promises on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from zoo_runs import MAX_STEPS, every_problem, settings, solved

from bench.zoo import missed_samples, parse_solver
from fpi_cuda import ops
from fpi_cuda.loops.host import iterate
from fpi_cuda.options import Anderson, Picard
from fpi_cuda.solution import SolveResult, Status
from fpi_cuda.testing import NUM_SAMPLES, Problem, backends_available, names, problem

SOLVERS = ["picard", "anderson:m=5", "anderson:m=10", "broyden"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The problems are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def solve_with(p: Problem, solver: str, rtol: float, max_steps: int = MAX_STEPS) -> SolveResult:
    backend = ops.resolve(None, p.x0.device, p.x0.dtype)
    options = {"rtol": rtol, "atol": 0.0, "max_steps": max_steps, "backend": backend}
    return iterate(p.evaluate, p.flat_x0, parse_solver(solver), **options)


@settings
@pytest.mark.parametrize("solver", SOLVERS)
@every_problem
def test_what_is_reported_is_true(name: str, solver: str, dtype: torch.dtype, rtol: float) -> None:
    """Neither a label without a fixed point, nor a residual that is another one."""
    run = solved(name, solver, dtype, rtol)
    assert (run.imagined, run.missed) == ([], [])


WITH_SOLUTION = [name for name in names() if problem(name).x_star is not None]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", WITH_SOLUTION)
def test_x_star_is_reached(name: str, solver: str) -> None:
    """||x - x_star|| <= kappa ||g(x) - x||; twice that leaves room for a nonlinear g."""
    p = problem(name, torch.float64)
    result = solve_with(p, solver, 1e-8)
    assert p.x_star is not None
    assert p.kappa is not None
    distance = (result.x - p.x_star.flatten(1)).norm(dim=1)
    rounding = 1e-13 * p.x_star.flatten(1).norm(dim=1)
    reached = distance <= p.kappa * (2 * result.residual + rounding)
    assert reached[result.status == Status.CONVERGED].all()


def test_size() -> None:
    assert len(names()) >= 34
    assert {p.x0.shape[0] for p in map(problem, names())} == {NUM_SAMPLES}


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown name 'linear/nothing'.*linear/positive"):
        problem("linear/nothing")


@pytest.mark.parametrize("name", ["linear/ginibre", "energy/logistic-1.9", "convolution/tanh"])
def test_a_problem_is_the_same_every_time(name: str) -> None:
    first, second = problem(name), problem(name)
    torch.testing.assert_close(first.z, second.z, rtol=0, atol=0)
    coarse = problem(name, torch.float32)
    torch.testing.assert_close([t.float() for t in first.z], list(coarse.z), rtol=1e-6, atol=1e-7)


@every_problem
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    """To the bit where the problem claims so, to rounding elsewhere."""
    for dtype in (torch.float32, torch.float64):
        p = problem(name, dtype)
        x = p.flat_x0
        for _ in range(4):
            whole = p.evaluate(x, None)
            for rows in (torch.tensor([3]), torch.tensor([6, 1, 4])):
                assert_rows_equal(p.evaluate(x[rows], rows), whole[rows], p.bitwise)
            x = whole


def assert_rows_equal(part: Tensor, whole: Tensor, bitwise: bool) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if bitwise else {}
    torch.testing.assert_close(part, whole, equal_nan=True, **tolerance)


@pytest.mark.parametrize("name", WITH_SOLUTION)
def test_x_star_is_a_fixed_point(name: str) -> None:
    p = problem(name)
    assert p.x_star is not None
    x = p.x_star.flatten(1)
    error = (p.evaluate(x, None) - x).norm(dim=1)
    assert (error <= 1e-12 * x.norm(dim=1)).all()


CONTRACTIVE = [name for name in names() if problem(name).contractive]


@pytest.mark.parametrize("name", CONTRACTIVE)
def test_picard_solves_what_is_called_contractive(name: str) -> None:
    result = solve_with(problem(name), "picard", 1e-3, max_steps=20000)
    assert (result.status == Status.CONVERGED).all()


@pytest.mark.parametrize("name", names("no-fixed-point"))
def test_residual_stays_above_a_tenth_of_the_starting_scale(name: str) -> None:
    """Along Picard's way, and at random points near and far."""
    p = problem(name)
    x = p.flat_x0
    scale0 = torch.maximum(x.norm(dim=1), p.evaluate(x, None).norm(dim=1))
    points = [torch.randn_like(x) * 10**k for k in range(-3, 6) for _ in range(20)]
    for _ in range(50):
        points.append(x)
        x = p.evaluate(x, None)
    for point in points:
        residual = (p.evaluate(point, None) - point).norm(dim=1)
        assert not (residual <= 0.1 * scale0).any()


@pytest.mark.skipif("native" not in backends_available(), reason="built without the extension")
@pytest.mark.parametrize("rowwise", [False, True], ids=["whole", "compacted"])
@pytest.mark.parametrize("solver", ["picard", "anderson:m=5", "broyden"])
@pytest.mark.parametrize("name", [name for name in names() if problem(name).bitwise])
def test_native_gives_a_sample_the_same_bits_in_any_batch(
    name: str, solver: str, rowwise: bool
) -> None:
    p = problem(name, torch.float32)
    native = ops.resolve("native", p.x0.device, p.x0.dtype)
    options = {"rtol": 1e-5, "atol": 0.0, "max_steps": 60, "backend": native}
    whole = iterate(p.evaluate, p.flat_x0, parse_solver(solver), **options, rowwise=rowwise)
    part = torch.tensor([7, 2, 5])

    def evaluate(x: Tensor, rows: Tensor | None) -> Tensor:
        return p.evaluate(x, part if rows is None else part[rows])

    alone = iterate(evaluate, p.flat_x0[part], parse_solver(solver), **options)
    for one, other in zip(whole, alone, strict=True):
        torch.testing.assert_close(one[part], other, rtol=0, atol=0, equal_nan=True)


def test_a_false_residual_is_caught() -> None:
    p = problem("tanh/norm-0.9")
    result = solve_with(p, "picard", 1e-6)
    arguments = (p, result.x, result.status)
    assert not missed_samples(*arguments, result.residual, 1e-6).any()
    assert missed_samples(*arguments, 1.01 * result.residual, 1e-6).all()
    assert missed_samples(*arguments, result.residual, 1e-8).all()


def test_solvers_are_parsed() -> None:
    assert parse_solver("picard:damping=0.5") == Picard(damping=0.5)
    assert parse_solver("anderson:m=7,ridge=0.01") == Anderson(m=7, ridge=0.01)
    with pytest.raises(ValueError, match=r"picard, anderson, broyden, got 'newton'"):
        parse_solver("newton")
