"""The plan of a lowered cell against the ops that it replaces, bit for bit, and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from lowered_maps import MAPS, contraction, one_layer, two_layers, with_strides
from torch import Tensor

from fpi_cuda import _extension
from fpi_cuda.activations import CODES, DERIVATIVES
from fpi_cuda.autograd.scaling import factor_of
from fpi_cuda.loops.fused.cell_layer import product
from fpi_cuda.loops.fused.cell_loop import run
from fpi_cuda.loops.stepping import depth_of
from fpi_cuda.lowered import Layer, Lowered
from fpi_cuda.norms import row_norm
from fpi_cuda.ops import native
from fpi_cuda.options import Anderson, Picard
from fpi_cuda.solution import SolveResult, Status

if _extension.module_error is not None:
    pytest.skip("no fpi_cuda._C", allow_module_level=True)

from fpi_cuda import _C

DTYPES = [torch.float32, torch.float64]
SOLVERS = [Picard(0.9), Anderson(m=5)]
BATCHES = [1, 5, 300]
RTOL, STEPS = 1e-4, 80
UNFIT = -3


def plan_for(lowered: Lowered, dim: int, dtype: torch.dtype, /, **given: Any) -> _C.CellPlan:
    solver = given.pop("solver", Anderson(m=5))
    names = [layer.activation for layer in lowered.layers]
    names += ["identity"] * (2 - len(names))
    beta, ridge = (
        (solver.damping, 0.0) if isinstance(solver, Picard) else (solver.beta, solver.ridge)
    )
    options: dict[str, Any] = {
        "float64": dtype == torch.float64,
        "dim": dim,
        "hidden": len(lowered.layers[0].weight) if len(lowered.layers) == 2 else 0,
        "activations": tuple(CODES[name] for name in names),
        "derivatives": tuple(CODES[DERIVATIVES[name]] for name in names),
        "carry": lowered.carry,
        "depth": depth_of(solver, dim),
        "beta": beta,
        "ridge": ridge,
        "rtol": RTOL,
        "atol": 1e-6,
        "max_steps": STEPS,
        "precision": 0,
        "adjoint_depth": depth_of(solver, dim),
        "adjoint_beta": beta,
        "adjoint_ridge": ridge,
        "adjoint_rtol": RTOL,
        "adjoint_max_steps": STEPS,
    }
    return _C.CellPlan(**(options | given))


def parts_of(lowered: Lowered) -> tuple[Tensor | None, ...]:
    return (*(t for layer in lowered.layers for t in layer.tensors()), lowered.x_factor)


def weights_of(lowered: Lowered) -> tuple[Tensor, ...]:
    return tuple(layer.weight for layer in lowered.layers)


@dataclass
class Solved:
    """What a plan has written, NaN before."""

    worst: int
    result: SolveResult
    hidden: Tensor | None
    slopes: list[Tensor | None]


def account(x: Tensor) -> SolveResult:
    rows = len(x)
    return SolveResult(
        x,
        torch.full((rows,), 99, dtype=torch.int8),
        torch.full((rows,), -1, dtype=torch.int32),
        torch.full((rows,), torch.nan, dtype=torch.float64),
    )


def poisoned(like: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype)


def solve(plan: _C.CellPlan, lowered: Lowered, x0: Tensor, evaluates: bool = True) -> Solved:
    result = account(poisoned(x0, *x0.shape))
    two = len(lowered.layers) == 2
    hidden: Tensor | None = None
    slopes: list[Tensor | None] = [None] * len(lowered.layers)
    if evaluates:
        hidden = poisoned(x0, len(x0), len(lowered.layers[0].weight)) if two else None
        slopes = [
            poisoned(x0, len(x0), len(layer.weight)) if layer.activation != "identity" else None
            for layer in lowered.layers
        ]
    worst = plan.solve(len(x0), parts_of(lowered), x0, *result, hidden, tuple(slopes))
    return Solved(worst, result, hidden, slopes)


def require_same(result: SolveResult, expected: SolveResult) -> None:
    for mine, other in zip(result, expected, strict=True):
        assert torch.equal(mine, other)


def evaluated(lowered: Lowered, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """What the layers give at x and their slopes, by cell_layer_."""
    values, slopes, h = [], [], x
    for layer in lowered.layers:
        slope = x.new_empty(len(x), len(layer.weight)) if layer.activation != "identity" else None
        h = product(
            native, h, layer.weight, layer.bias, layer.shift, layer.activation,
            DERIVATIVES[layer.activation], slope,
        )  # fmt: skip
        values.append(h)
        slopes.append(slope)
    return values, slopes


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", list(MAPS))
def test_a_solve_is_that_of_the_op(
    name: str, batch: int, solver: Any, dtype: torch.dtype, threads: int
) -> None:
    lowered = with_strides(MAPS[name](batch, 33, dtype))
    x0 = torch.randn(batch, 33, dtype=dtype)
    plan = plan_for(lowered, 33, dtype, solver=solver)
    expected = run(lowered, x0, solver, rtol=RTOL, atol=1e-6, max_steps=STEPS, backend=native)
    free = lowered.x_factor is None and all(layer.factor is None for layer in lowered.layers)
    for _ in range(2):  # memory that was used before
        found = solve(plan, lowered, x0, evaluates=free)
        require_same(found.result, expected)
        assert found.worst == int(expected.status.max())
    if not free:
        return
    values, slopes = evaluated(lowered, expected.x)
    if len(lowered.layers) == 2:
        assert found.hidden is not None
        assert torch.equal(found.hidden, values[0])
    for mine, other in zip(found.slopes, slopes, strict=True):
        assert (mine is None and other is None) or torch.equal(mine, other)


@pytest.mark.parametrize("name", ["one_layer", "two_layers"])
@pytest.mark.parametrize("precision", [1, 2, 3])
def test_slopes_are_not_those_of_rounded_products(name: str, precision: int) -> None:
    lowered, x0 = MAPS[name](5, 33, torch.float32), torch.randn(5, 33)
    given: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-6, "max_steps": STEPS}
    words = ("ieee", "tf32x3", "tf32", "bf16")[precision]
    expected = run(lowered, x0, Anderson(m=5), backend=native, precision=words, **given)
    found = solve(plan_for(lowered, 33, x0.dtype, precision=precision, rtol=1e-2), lowered, x0)
    require_same(found.result, expected)
    for mine, other in zip(found.slopes, evaluated(lowered, expected.x)[1], strict=True):
        assert torch.equal(mine, other)


def test_weights_are_read_anew() -> None:
    lowered, x0 = one_layer(3, 33, torch.float32), torch.randn(3, 33)
    plan = plan_for(lowered, 33, x0.dtype)
    before = solve(plan, lowered, x0).result.x
    lowered.layers[0].weight.data.mul_(0.5)
    after = solve(plan, lowered, x0).result
    require_same(
        after,
        run(lowered, x0, Anderson(m=5), rtol=RTOL, atol=1e-6, max_steps=STEPS, backend=native),
    )
    assert not torch.equal(before, after.x)


@dataclass
class Gradients:
    """What an adjoint is to write, NaN before."""

    deltas: list[Tensor | None]
    weights: list[Tensor | None]

    def places(self) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        return tuple(self.deltas), tuple(self.weights)

    def all(self) -> list[Tensor]:
        return [t for t in (*self.deltas, *self.weights) if t is not None]


def all_gradients(lowered: Lowered, x: Tensor) -> Gradients:
    shapes = [layer.weight.shape for layer in lowered.layers]
    return Gradients(
        [poisoned(x, len(x), rows) for rows, _ in shapes],
        [poisoned(x, *shape) for shape in shapes],
    )


def adjoint(
    plan: _C.CellPlan, lowered: Lowered, solved: Solved, v: Tensor, gradients: Gradients
) -> tuple[int, SolveResult]:
    result = account(poisoned(solved.result.x, *v.shape))
    worst = plan.adjoint(
        len(v), weights_of(lowered), solved.result.x, solved.hidden, tuple(solved.slopes), v,
        *result, *gradients.places(),
    )  # fmt: skip
    return worst, result


def by_ops(lowered: Lowered, solved: Solved, c: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients as the fused evaluation takes them, layer by layer."""
    x, slopes = solved.result.x, solved.slopes
    deltas, weights, above = [], [], c
    for place in reversed(range(len(lowered.layers))):
        h = x if place == 0 else solved.hidden
        assert h is not None
        slope = slopes[place]
        delta = above if slope is None else above * slope
        weight = x.new_empty(delta.shape[1], h.shape[1])
        native.weight_gradient_(weight, delta, h)
        above = product(native, delta, lowered.layers[place].weight.mT)
        deltas, weights = [delta, *deltas], [weight, *weights]
    return deltas, weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["one_layer", "two_layers", "descent"])
def test_an_adjoint_is_that_of_the_ops(
    name: str, batch: int, solver: Any, dtype: torch.dtype, threads: int
) -> None:
    lowered = with_strides(MAPS[name](batch, 33, dtype))
    x0, v = torch.randn(2, batch, 33, dtype=dtype)
    plan = plan_for(lowered, 33, dtype, solver=solver)
    solved = solve(plan, lowered, x0)
    expected = run(
        lowered.adjoint(solved.result.x, v, known=solved.slopes), v, solver,
        rtol=0.0, atol=RTOL * row_norm(v), max_steps=STEPS, backend=native,
    )  # fmt: skip
    assert bool((expected.status == Status.CONVERGED).all())
    again = None
    for _ in range(2):
        gradients = all_gradients(lowered, v)
        worst, result = adjoint(plan, lowered, solved, v, gradients)
        assert worst == Status.CONVERGED
        require_same(result, expected)
        deltas, weights = by_ops(lowered, solved, expected.x)
        for mine, other in zip(gradients.deltas, deltas, strict=True):
            assert torch.equal(mine, other)
        for mine, other in zip(gradients.weights, weights, strict=True):
            assert torch.equal(mine, other)
        again = again or gradients
    assert all(map(torch.equal, again.all(), gradients.all()))
    # The same from a c that is given.
    given = all_gradients(lowered, v)
    answer = plan.gradients(
        batch, weights_of(lowered), solved.result.x, solved.hidden, tuple(solved.slopes),
        expected.x, *given.places(),
    )  # fmt: skip
    assert answer != UNFIT
    assert all(map(torch.equal, given.all(), gradients.all()))


@pytest.mark.parametrize("name", ["one_layer", "two_layers"])
def test_gradients_are_those_of_autograd(name: str) -> None:
    batch, dim, dtype = 7, 9, torch.float64
    lowered = MAPS[name](batch, dim, dtype)
    layers = tuple(
        replace(layer, bias=torch.randn(len(layer.weight), dtype=dtype)) for layer in lowered.layers
    )
    lowered = Lowered(layers, carry=0.1)
    tight: dict[str, Any] = {"rtol": 1e-13, "atol": 0.0, "adjoint_rtol": 1e-13, "max_steps": 500}
    plan = plan_for(lowered, dim, dtype, adjoint_max_steps=500, **tight)
    v = torch.randn(batch, dim, dtype=dtype)
    solved = solve(plan, lowered, torch.zeros(batch, dim, dtype=dtype))
    gradients = all_gradients(lowered, v)
    assert adjoint(plan, lowered, solved, v, gradients)[0] == Status.CONVERGED

    leaves = [layer.weight.clone().requires_grad_() for layer in layers]
    shifts = [
        torch.zeros(batch, len(layer.weight), dtype=dtype, requires_grad=True) for layer in layers
    ]
    differentiated = Lowered(
        tuple(
            Layer(
                weight,
                layer.activation,
                layer.bias,
                shift if layer.shift is None else layer.shift + shift,
            )
            for layer, weight, shift in zip(layers, leaves, shifts, strict=True)
        ),
        carry=0.1,
    )
    x = solved.result.x
    for _ in range(200):
        x = differentiated(x)
    expected = torch.autograd.grad(x, [*leaves, *shifts], v)
    for mine, other in zip((*gradients.weights, *gradients.deltas), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["one_layer", "two_layers"])
@pytest.mark.parametrize("part", ["deltas", "weights"])
def test_only_what_is_asked_for_is_written(name: str, part: str) -> None:
    lowered, v = MAPS[name](5, 33, torch.float32), torch.randn(5, 33)
    plan = plan_for(lowered, 33, v.dtype)
    solved = solve(plan, lowered, v)
    whole = all_gradients(lowered, v)
    adjoint(plan, lowered, solved, v, whole)
    for place in range(len(lowered.layers)):
        nothing: list[Tensor | None] = [None] * len(lowered.layers)
        some = Gradients(list(nothing), list(nothing))
        expected = getattr(whole, part)[place]
        getattr(some, part)[place] = torch.full_like(expected, torch.nan)
        adjoint(plan, lowered, solved, v, some)
        (only,) = some.all()
        assert torch.equal(only, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_hand_side_that_is_to_be_scaled_is_left_alone(dtype: torch.dtype) -> None:
    lowered = one_layer(3, 33, dtype)
    plan = plan_for(lowered, 33, dtype)
    solved = solve(plan, lowered, torch.zeros(3, 33, dtype=dtype))
    edge = {torch.float32: 30, torch.float64: 254}[dtype]
    sizes = [2.0**e for e in (-2 * edge, -edge - 1, -edge, 0, edge, edge + 1, 2 * edge)]
    below, above = sizes[2] * (1 - 1e-6), sizes[4] * (1 + 1e-6)
    done = 0
    for size in (*sizes, below, above, torch.inf, -torch.inf, torch.nan):
        v = torch.zeros(3, 33, dtype=dtype)
        v[:, 4] = 1
        v[1, 4], v[1, 7] = 0, size
        gradients = all_gradients(lowered, v)
        worst, result = adjoint(plan, lowered, solved, v, gradients)
        assert (worst == -1) == (factor_of(v, dtype, False) is not None)
        if worst == -1:
            assert all(t.isnan().all() for t in (result.x, result.residual, *gradients.all()))
            assert bool((result.status == 99).all())
        done += worst != -1
    assert done == 3
    # A row of zeros has a solution that needs no scale.
    v[1] = 0
    worst, result = adjoint(plan, lowered, solved, v, all_gradients(lowered, v))
    assert worst == Status.CONVERGED
    assert not bool(result.x[1].any())


def test_an_adjoint_of_rounded_products_is_left_alone() -> None:
    lowered, v = one_layer(3, 33, torch.float32), torch.randn(3, 33)
    plan = plan_for(lowered, 33, v.dtype, precision=2, rtol=1e-2)
    solved = solve(plan, lowered, v)
    worst, result = adjoint(plan, lowered, solved, v, all_gradients(lowered, v))
    assert worst == -1
    assert bool(result.x.isnan().all())


def test_a_failed_adjoint_leaves_gradients_alone() -> None:
    lowered = Lowered((Layer(contraction(33, 33, torch.float32, 9.0), "tanh"),))
    plan = plan_for(lowered, 33, torch.float32, solver=Picard(1.0))
    x0, v = torch.zeros(5, 33), torch.randn(5, 33)
    v[3] = 0
    solved = solve(plan, lowered, x0)  # zero, which is unstable
    gradients = all_gradients(lowered, v)
    worst, result = adjoint(plan, lowered, solved, v, gradients)
    assert worst == int(result.status.max()) == Status.DIVERGED
    assert int(result.status[3]) == Status.CONVERGED
    assert all(bool(t.isnan().all()) for t in gradients.all())


def test_no_samples() -> None:
    lowered, v = two_layers(0, 33, torch.float32), torch.randn(0, 33)
    plan = plan_for(lowered, 33, v.dtype)
    solved = solve(plan, lowered, v)
    gradients = all_gradients(lowered, v)
    assert solved.worst == adjoint(plan, lowered, solved, v, gradients)[0] == Status.CONVERGED
    assert not any(bool(t.any()) for t in gradients.all())


def test_linear_layers_have_no_slopes_and_yet_gradients() -> None:
    first = Layer(contraction(37, 33, torch.float32, 0.8), bias=torch.randn(37))
    lowered = Lowered((first, Layer(contraction(33, 37, torch.float32, 0.8))))
    x0, v = torch.randn(2, 5, 33)
    plan = plan_for(lowered, 33, v.dtype)
    solved = solve(plan, lowered, x0)
    assert solved.slopes == [None, None]
    values, _ = evaluated(lowered, solved.result.x)
    assert torch.equal(solved.hidden, values[0])
    gradients = all_gradients(lowered, v)
    worst, result = adjoint(plan, lowered, solved, v, gradients)
    assert worst == Status.CONVERGED
    for mine, other in zip(gradients.weights, by_ops(lowered, solved, result.x)[1], strict=True):
        assert torch.equal(mine, other)


def test_memory_is_kept_until_it_is_given_back() -> None:
    lowered = two_layers(64, 33, torch.float32)
    x0, v = torch.randn(2, 64, 33)
    plan = plan_for(lowered, 33, v.dtype)
    assert plan.bytes() == 0
    solved = solve(plan, lowered, x0)
    adjoint(plan, lowered, solved, v, all_gradients(lowered, v))
    held = plan.bytes()
    assert held > 4 * 37 * 33
    for _ in range(3):
        solved = solve(plan, lowered, x0)
        adjoint(plan, lowered, solved, v, all_gradients(lowered, v))
    assert plan.bytes() == held
    plan.clear()
    assert plan.bytes() == 0
    require_same(solve(plan, lowered, x0).result, solved.result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_left_of_another_batch(dtype: torch.dtype) -> None:
    lowered = two_layers(300, 33, dtype)
    plan = plan_for(lowered, 33, dtype)
    poison = replace(lowered.layers[0], bias=torch.full((37,), torch.nan, dtype=dtype))
    many = Lowered((poison, lowered.layers[1]))
    for batch in (5, 1):
        assert solve(plan, many, torch.randn(300, 33, dtype=dtype)).worst == Status.NONFINITE
        few = lowered.rows(batch)
        x0, v = torch.randn(2, batch, 33, dtype=dtype)
        fresh = plan_for(few, 33, dtype)
        found = []
        for which in (plan, fresh):
            solved, gradients = solve(which, few, x0), all_gradients(few, v)
            _, result = adjoint(which, few, solved, v, gradients)
            found.append((*solved.result, *result, *gradients.all()))
        assert all(map(torch.equal, *found))


def test_threads_share_a_plan() -> None:
    lowered = two_layers(40, 33, torch.float32)
    plan = plan_for(lowered, 33, torch.float32)
    x0, v = torch.randn(2, 40, 33)

    def once(clears: bool) -> tuple[Tensor, ...]:
        solved = solve(plan, lowered, x0)
        gradients = all_gradients(lowered, v)
        worst, result = adjoint(plan, lowered, solved, v, gradients)
        assert worst == Status.CONVERGED
        if clears:
            plan.clear()
        assert plan.bytes() >= 0
        return (*solved.result, *result, *gradients.all())

    expected = once(False)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(once, [i % 7 == 0 for i in range(60)]):
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"dim": 0}, "dim must be from 1"),
        ({"hidden": -1}, "hidden must be from 0"),
        ({"depth": 17}, "depth must be from 0 to 16, got 17"),
        ({"adjoint_depth": -1}, "depth must be from 0 to 16, got -1"),
        ({"activations": (11, 0)}, "activations must be from 0 to 10, got 11"),
        ({"derivatives": (0, -1)}, "derivatives must be"),
        ({"precision": 4}, "precision must be from 0 to 3"),
        ({"precision": 2, "float64": True}, "precision must be 0 for float64"),
        ({"max_steps": 0}, "max_steps must be"),
        ({"adjoint_max_steps": 0}, "max_steps must be"),
        ({"rtol": -1.0}, "tolerances must not be negative"),
        ({"adjoint_rtol": float("nan")}, "tolerances must not be negative"),
        ({"beta": float("inf")}, "beta must be finite"),
        ({"carry": float("nan")}, "carry must be finite"),
    ],
    ids=str,
)
def test_nonsense_is_refused(given: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        plan_for(one_layer(1, 33, torch.float32), 33, torch.float32, **given)


def test_calls_without_what_they_need_are_refused() -> None:
    lowered, x = two_layers(3, 33, torch.float32), torch.randn(3, 33)
    plan = plan_for(lowered, 33, x.dtype)
    parts, weights = parts_of(lowered), weights_of(lowered)
    solved = solve(plan, lowered, x)
    result, hidden, both, none = solved.result, solved.hidden, tuple(solved.slopes), (None, None)
    rest = result[1:]
    scaled = (*parts[:-1], x)
    bad: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((3, parts[:4], x, *result, None, none), ValueError, "a tuple of 9 items"),
        ((3, list(parts), x, *result, None, none), ValueError, "a tuple of 9 items"),
        ((3, (None, *parts[1:]), x, *result, None, none), ValueError, "its weight"),
        ((3, parts, x, None, *rest, None, none), ValueError, "x, status, num_steps"),
        ((3, parts, x, result.x, *rest[:2], None, None, none), ValueError, "x, status, num_steps"),
        ((3, parts, x, *result, None, both), ValueError, "hidden is needed"),
        ((3, scaled, x, *result, hidden, both), ValueError, "without factors"),
        ((3, parts, x, *result, None, (x, x, x)), ValueError, "a tuple of 2 items"),
        ((3, parts, x, "x", *rest, None, none), AttributeError, "data_ptr"),
    ]
    for arguments, error, words in bad:
        with pytest.raises(error, match=words):
            plan.solve(*arguments)
    wanted = (None, torch.empty_like(weights[1]))
    with pytest.raises(ValueError, match="hidden is needed for the gradient"):
        plan.gradients(3, weights, x, None, both, x, none, wanted)
    with pytest.raises(ValueError, match="c is needed"):
        plan.gradients(3, weights, x, None, both, None, none, none)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="v, status, num_steps"):
        plan.adjoint(3, weights, x, None, both, None, x, *rest, none, none)  # type: ignore[arg-type]


class Own(Tensor):
    """A class of somebody's."""


STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": lambda t: t[..., 1:],
    "rank": lambda t: t[None],
    "dtype": lambda t: t.double(),
    "device": lambda t: t.to("meta"),
    "class": lambda t: t.as_subclass(Own),
    "sparse": lambda t: t.to_sparse(),
}


@pytest.mark.parametrize("change", list(STRANGE.values()), ids=list(STRANGE))
def test_tensors_of_another_kind_are_left_alone(change: Callable[[Tensor], Tensor]) -> None:
    lowered, x = two_layers(3, 33, torch.float32), torch.randn(3, 33)
    plan = plan_for(lowered, 33, x.dtype)
    parts, weights = parts_of(lowered), weights_of(lowered)
    solved = solve(plan, lowered, x)
    none, slopes = (None, None), tuple(solved.slopes)
    assert plan.fits(3, parts)
    for place, t in enumerate(parts):
        if t is not None:
            others = (*parts[:place], change(t), *parts[place + 1 :])
            assert not plan.fits(3, others)
            result = account(poisoned(x, 3, 33))
            assert plan.solve(3, others, x, *result, None, none) == UNFIT
            assert bool(result.x.isnan().all())
    assert plan.solve(3, parts, change(x), *account(x.clone()), None, none) == UNFIT
    result = account(poisoned(x, 3, 33))
    given = (x, solved.hidden, slopes)
    assert plan.adjoint(3, weights, *given, change(x), *result, none, none) == UNFIT
    others = (change(weights[0]), weights[1])
    assert plan.adjoint(3, others, *given, x, *result, none, none) == UNFIT
    assert plan.gradients(3, weights, *given, change(x), none, none) == UNFIT
    assert bool(result.x.isnan().all())


def test_another_batch_does_not_fit() -> None:
    lowered = one_layer(3, 33, torch.float32)
    plan = plan_for(lowered, 33, torch.float32)
    for batch in (-1, 2, 4):
        assert not plan.fits(batch, parts_of(lowered))


MEMORIES: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() == 2 else t,
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "negative": lambda t: torch._neg_view(-t),
}


def plainly(t: Tensor) -> Tensor:
    return t.contiguous().resolve_neg()


@pytest.mark.parametrize("lie", list(MEMORIES.values()), ids=list(MEMORIES))
def test_tensors_may_lie_in_any_way(lie: Callable[[Tensor], Tensor]) -> None:
    plain, x, v = two_layers(3, 33, torch.float32), *torch.randn(2, 3, 33)
    layers = tuple(
        replace(
            layer,
            weight=lie(layer.weight) if lie is not MEMORIES["expanded"] else layer.weight,
            bias=lie(torch.randn(len(layer.weight))),
            shift=lie(torch.randn(3, len(layer.weight))),
        )
        for layer in plain.layers
    )
    lowered, x, v = Lowered(layers), lie(x), lie(v)
    same = Lowered(
        tuple(
            Layer(
                layer.weight.clone().resolve_neg(),
                layer.activation,
                *(None if t is None else plainly(t) for t in layer.tensors()[1:3]),
            )
            for layer in layers
        )
    )
    found = []
    for which, start, b in (
        (lowered, x, v),
        (same, plainly(x), plainly(v)),
    ):
        plan = plan_for(which, 33, x.dtype)
        solved = solve(plan, which, start)
        gradients = all_gradients(which, solved.result.x)
        worst, result = adjoint(plan, which, solved, b, gradients)
        assert worst == Status.CONVERGED
        found.append((*solved.result, *result, *gradients.all()))
    assert all(map(torch.equal, *found))


def test_residuals_are_rounded_where_they_are_asked_for_so() -> None:
    lowered, x = one_layer(3, 33, torch.float32), torch.randn(3, 33)
    plan = plan_for(lowered, 33, x.dtype)
    solved, gradients = solve(plan, lowered, x), all_gradients(lowered, x)
    told, rounded = solved.result, account(x.clone())._replace(residual=torch.empty(3))
    plan.solve(3, parts_of(lowered), x, *rounded, None, (None,))
    require_same(rounded, told._replace(residual=told.residual.float()))
    _, told = adjoint(plan, lowered, solved, x, gradients)
    rounded = account(x.clone())._replace(residual=torch.empty(3))
    given = (solved.result.x, None, tuple(solved.slopes), x)
    plan.adjoint(3, weights_of(lowered), *given, *rounded, *gradients.places())
    require_same(rounded, told._replace(residual=told.residual.float()))


def test_a_class_that_is_changed_has_a_newer_version() -> None:
    class Above:
        pass

    class Below(Above):
        pass

    class Apart:
        pass

    def version() -> int:
        _ = Below().__doc__, Apart().__doc__  # Python numbers what it looks names up in
        return _C.newest_version((Below, Apart))

    for change in (
        lambda: setattr(Above, "name", 1),
        lambda: setattr(Above, "name", 2),
        lambda: delattr(Above, "name"),
        lambda: setattr(Apart, "__call__", print),
        lambda: setattr(Below, "__bases__", (Apart,)),
    ):
        before = version()
        assert before == version() > 0
        change()
        assert _C.newest_version((Below, Apart)) != before
        assert version() > before
