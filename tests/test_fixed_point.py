"""fixed_point as a user meets it: options, states, closures, modes, and a g that misbehaves."""

from __future__ import annotations

import contextlib
import functools
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack

import fpi_cuda as fpi

F64 = torch.float64
B, D = 3, 4
TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 300}
BACKENDS = ["reference", "native"]


def g(x: Tensor, z: Tensor) -> Tensor:
    return 0.6 * torch.sin(x) + z


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*(shape or (B, D)))


class Problem(NamedTuple):
    """tanh(A x + z): its inputs and what a loop of 100 steps makes of them."""

    z: Tensor
    a: Tensor

    def looped(self) -> Tensor:
        x = torch.zeros_like(self.z)
        for _ in range(100):
            x = torch.tanh(x @ self.a.T + self.z)
        return x


@pytest.fixture
def problem() -> Problem:
    a = torch.randn(D, D, dtype=F64)
    a = 0.5 * a / torch.linalg.matrix_norm(a, 2)
    return Problem(torch.randn(B, D, dtype=F64).requires_grad_(), a.requires_grad_())


# --- options and states -----------------------------------------------------------------------

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tol": 1e-3}, TypeError, "unknown option 'tol'. Valid options: solver, rtol, atol, max_steps,"
     " adjoint, backend, batch_dims, rowwise, route, precision, throw"),
    ({"solver": "anderson"}, TypeError, "solver must be one of Picard, Anderson, Broyden, got"),
    ({"solver": fpi.Anderson}, TypeError, "did you mean Anderson()?"),
    ({"solver": fpi.GMRES()}, TypeError, "solver must be one of Picard, Anderson, Broyden, got"),
    ({"solver": None}, TypeError, "solver must be one of Picard, Anderson, Broyden, got None"),
    ({"adjoint": "implicit"}, TypeError, "one of Implicit, JacobianFree, Phantom, Neumann, Unroll"),
    ({"adjoint": fpi.Unroll}, TypeError, "did you mean Unroll()?"),
    ({"rtol": -1e-3}, ValueError, "rtol must be in [0.0, 1.0], got -0.001"),
    ({"rtol": 2.0}, ValueError, "rtol must be in [0.0, 1.0], got 2.0"),
    ({"rtol": float("nan")}, ValueError, "rtol must be in [0.0, 1.0], got nan"),
    ({"rtol": "1e-3"}, TypeError, "rtol must be a number, got '1e-3'"),
    ({"rtol": True}, TypeError, "rtol must be a number, got True"),
    ({"atol": -1.0}, ValueError, "atol must be in [0.0, inf), got -1.0"),
    ({"atol": float("inf")}, ValueError, "atol must be in [0.0, inf), got inf"),
    ({"max_steps": 0}, ValueError, "max_steps must be from 1 to 2147483647, got 0"),
    ({"max_steps": 2**31}, ValueError, "max_steps must be from 1 to 2147483647, got 2147483648"),
    ({"max_steps": 10.0}, TypeError, "max_steps must be an int, got 10.0"),
    ({"backend": "cpu"}, ValueError, "Valid: None, 'reference', 'native', 'cuda', 'triton'"),
    ({"rowwise": 1}, TypeError, "rowwise must be None or a bool, got 1"),
    ({"throw": "yes"}, TypeError, "throw must be a bool, got 'yes'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"), BAD_OPTIONS, ids=[str(case[0]) for case in BAD_OPTIONS]
)
def test_a_bad_option_is_named_with_the_valid_ones(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    calls = []
    with pytest.raises(error, match="fixed_point: .*" + re.escape(message)):
        fpi.fixed_point(lambda x: calls.append(1) or x, zeros(), **options)
    with pytest.raises(error, match="FPILayer: .*" + re.escape(message.partition("Valid")[0])):
        fpi.FPILayer(g, **options)
    assert not calls


BAD_RECORDS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: fpi.Anderson(depth=5), TypeError, "Valid options: m, beta, ridge, history_dtype"),
    (lambda: fpi.Anderson(m=0), ValueError, "Anderson: m must be from 1 to 16, got 0"),
    (lambda: fpi.Anderson(m=17), ValueError, "Anderson: m must be from 1 to 16, got 17"),
    (lambda: fpi.Anderson(m=2.0), TypeError, "Anderson: m must be an int, got 2.0"),
    (lambda: fpi.Anderson(beta=0.0), ValueError, "Anderson: beta must be in (0.0, 2.0], got 0.0"),
    (lambda: fpi.Anderson(ridge=-1.0), ValueError, "Anderson: ridge must be in [0.0, 1.0]"),
    (lambda: fpi.Anderson(history_dtype=torch.int8), ValueError, "torch.bfloat16, got torch.int8"),
    (lambda: fpi.Picard(damping=2.5), ValueError, "Picard: damping must be in (0.0, 2.0], got 2.5"),
    (lambda: fpi.Picard(1.0, 2), TypeError, "takes at most 1 options, got 2"),
    (lambda: fpi.Broyden(m=0), ValueError, "Broyden: m must be from 1 to 16, got 0"),
    (lambda: fpi.GMRES(restart=0), ValueError, "GMRES: restart must be from 1 to 128, got 0"),
    (lambda: fpi.ConjugateGradient(m=3), TypeError, "Valid options: none"),
    (lambda: fpi.Implicit(solver="gmres"), TypeError, "Picard, Anderson, Broyden, GMRES, Conju"),
    (lambda: fpi.Implicit(solver=fpi.GMRES), TypeError, "did you mean GMRES()?"),
    (lambda: fpi.Implicit(rtol=2.0), ValueError, "Implicit: rtol must be in [0.0, 1.0], got 2.0"),
    (lambda: fpi.Implicit(max_steps=0), ValueError, "Implicit: max_steps must be from 1 to"),
    (lambda: fpi.Implicit(atol=0.1), TypeError, "Valid options: solver, rtol, max_steps"),
    (lambda: fpi.Neumann(k=-1), ValueError, "Neumann: k must be at least 0, got -1"),
    (lambda: fpi.Phantom(k=0), ValueError, "Phantom: k must be at least 1, got 0"),
    (lambda: fpi.Phantom(tau=0.0), ValueError, "Phantom: tau must be in (0.0, 1.0], got 0.0"),
    (lambda: fpi.JacobianFree(1), TypeError, "JacobianFree: takes at most 0 options"),
    (lambda: fpi.Unroll(k=3), TypeError, "Unroll: unknown option 'k'. Valid options: none"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_RECORDS)
def test_a_bad_solver_or_adjoint_is_refused_when_it_is_made(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


BAD_STATES: list[tuple[Any, str]] = [
    (zeros().long(), "x0 must be floating, got torch.int64; convert it with x0.float()"),
    (zeros().bool(), "x0 must be floating, got torch.bool"),
    (zeros().cfloat(), "got torch.complex64; stack its real and imaginary part"),
    (zeros().to(torch.float8_e4m3fn), "x0 must be floating, got torch.float8_e4m3fn"),
    ([zeros()], "x0 must be a floating tensor or a tuple of them, got list; use a tuple"),
    (0.0, "got float; convert it with torch.as_tensor"),
    (None, "got NoneType"),
    ((), "x0 must hold at least one tensor, got an empty tuple"),
    (torch.zeros(()), "dim 0 of x0 is the batch, got a scalar"),
    (zeros().to_sparse(), "x0 must be dense, got torch.sparse_coo; use x0.to_dense()"),
    ((zeros(), zeros().double()), "share one dtype, got torch.float32 and torch.float64"),
    ((zeros(), zeros().long()), "x0 must be floating, got torch.int64"),
    ((zeros(), zeros().to("meta")), "share one device, got cpu and meta"),
    ((zeros(), zeros(2, D)), "share one batch size in dim 0, got 3 and 2"),
    (zeros().to("meta"), "device meta has none"),
]


@pytest.mark.parametrize(("x0", "message"), BAD_STATES, ids=[case[1] for case in BAD_STATES])
def test_a_bad_state_is_refused(x0: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="fixed_point: .*" + re.escape(message)):
        fpi.fixed_point(lambda x: x, x0)


def test_what_is_no_map_or_no_input_is_refused() -> None:
    with pytest.raises(TypeError, match="g must be a function or module"):
        fpi.fixed_point(3, zeros())  # type: ignore[arg-type]
    for z in (1.0, None, [zeros()]):
        with pytest.raises(TypeError, match=r"z\[1\] of type .*functools\.partial"):
            fpi.fixed_point(g, zeros(), zeros(), z)  # type: ignore[arg-type]


def test_inputs_of_any_shape_and_dtype() -> None:
    labels, scale = torch.tensor([0, 2, 1]), torch.tensor(0.5, dtype=F64)
    table = torch.randn(3, D, dtype=F64, requires_grad=True)

    def look_up(x: Tensor, labels: Tensor, scale: Tensor, table: Tensor) -> Tensor:
        return scale * x + table[labels]

    x0 = torch.zeros(B, D, dtype=F64)
    for rowwise in (False, True):
        # table and scale have no batch: what g reads cannot be compacted.
        sol = fpi.fixed_point(look_up, x0, labels, scale, table, rowwise=rowwise, **TIGHT)
        torch.testing.assert_close(sol.value, 2 * table[labels])
        (found,) = torch.autograd.grad(sol.value[0].sum(), table)
        torch.testing.assert_close(found[0], torch.full((D,), 2.0, dtype=F64))
        assert (found[1:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_every_floating_dtype(dtype: torch.dtype) -> None:
    z = torch.randn(B, D, dtype=dtype, requires_grad=True)
    rtol = 4 * torch.finfo(dtype).eps
    sol = fpi.fixed_point(lambda x, z: 0.5 * x + z, torch.zeros_like(z), z, rtol=rtol)
    assert sol.value.dtype == dtype
    assert sol.residual.dtype == torch.promote_types(dtype, torch.float32)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, 2 * z, rtol=20 * rtol, atol=20 * rtol)
    (found,) = torch.autograd.grad(sol.value.sum(), z)
    torch.testing.assert_close(found, torch.full_like(z, 2.0), rtol=20 * rtol, atol=0)


def test_throw_names_the_samples_and_carries_the_solution() -> None:
    z = torch.randn(20, D)
    z[3] = torch.nan
    with pytest.raises(fpi.ConvergenceError) as raised:
        fpi.fixed_point(g, zeros(20, D), z, throw=True, max_steps=3, rtol=1e-6)
    message = str(raised.value)
    assert message.startswith("fixed_point: 20 of 20 samples did not converge: 0: MAX_STEPS")
    assert "3: NONFINITE" in message
    assert "and 12 more" in message
    assert "raise max_steps" in message
    assert "g returned NaN or Inf" in message
    solution = raised.value.solution
    assert solution.value.shape == (20, D)
    assert not solution.value.requires_grad
    assert solution.status[3] == fpi.Status.NONFINITE
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == message
    assert torch.equal(again.solution.status, solution.status)
    assert fpi.fixed_point(g, zeros(), z[4:7], throw=True).converged.all()


# --- a g that misbehaves ------------------------------------------------------------------------

BAD_VALUES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "shape": (lambda x: x[:, :2], r"must return the shape of x, got x=\(3, 4\), g\(x\)=\(3, 2\)"),
    "batch": (lambda x: x[:1], r"must return the shape of x, got x=\(3, 4\), g\(x\)=\(1, 4\)"),
    "more": (lambda x: x[:, None], r"got x=\(3, 4\), g\(x\)=\(3, 1, 4\)"),
    "wider": (lambda x: x.double(), "the dtype of x, got x=torch.float32, .*=torch.float64"),
    "integer": (lambda x: x.long(), r"the dtype of x, .*torch.int64. Cast in g"),
    "device": (lambda x: x.to("meta"), "must return on the device of x, got x on cpu, .* on meta"),
    "sparse": (lambda x: x.to_sparse(), r"must return dense tensors, .* Use \.to_dense\(\)"),
    "none": (lambda x: None, "must return a tensor like x, got NoneType"),
    "number": (lambda x: 0.0, "must return a tensor like x, got float"),
    "tuple": (lambda x: (x,), "must return a tensor like x, got tuple"),
}


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_g_that_returns_something_else(name: str, backend: str, when: int) -> None:
    change, message = BAD_VALUES[name]
    calls = [0]

    def wrong(x: Tensor, z: Tensor) -> Any:
        calls[0] += 1
        gx = g(x, z)
        return change(gx) if calls[0] > when else gx

    with pytest.raises((TypeError, ValueError), match="fixed_point: g .*" + message):
        fpi.fixed_point(wrong, zeros(), torch.randn(B, D), backend=backend)
    assert calls[0] == when + 1


def test_a_g_that_returns_something_else_in_backward(problem: Problem) -> None:
    z, a = problem
    backward = [False]

    def wrong(x: Tensor, z: Tensor) -> Tensor:
        gx = torch.tanh(x @ a.T + z)
        return gx[:, :2] if backward[0] else gx

    sol = fpi.fixed_point(wrong, torch.zeros_like(z), z, **TIGHT)
    backward[0] = True
    (first,) = torch.autograd.grad(sol.value.sum(), a, retain_graph=True)  # needs no evaluation
    assert torch.isfinite(first).all()
    with pytest.raises(ValueError, match="must return the shape of x"):
        torch.autograd.grad(sol.value.sum(), a, create_graph=True)


def test_a_tuple_state_needs_a_tuple_back() -> None:
    state = (zeros(), zeros(B, 2))
    for change, message in (
        (lambda x: x[0], "must return a tuple of 2 tensors like x, got Tensor"),
        (lambda x: x[:1], "must return a tuple of 2 tensors like x, got 1"),
        (lambda x: (x[1], x[0]), r"got x\[0\]=\(3, 4\), g\(x\)\[0\]=\(3, 2\)"),
        (lambda x: (x[0], x[1].double()), r"got x\[1\]=torch.float32, g\(x\)\[1\]=torch.float64"),
        (lambda x: (x[0], (x[1],)), "must return a tensor like x, got tuple"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fpi.fixed_point(change, state)
    assert isinstance(fpi.fixed_point(list, state).value, tuple)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson(), fpi.Broyden()], ids=str)
def test_a_g_that_works_in_place_on_x(solver: Any, backend: str) -> None:
    z = torch.randn(B, D, requires_grad=True)

    def in_place(x: Tensor, z: Tensor) -> Tensor:
        return x.sin_().mul_(0.6).add_(z)

    x0 = torch.randn(B, D)
    before = x0.clone()
    found = fpi.fixed_point(in_place, x0, z, solver=solver, backend=backend)
    expected = fpi.fixed_point(g, x0, z, solver=solver, backend=backend)
    assert torch.equal(x0, before)
    assert torch.equal(found.value, expected.value)
    assert torch.equal(found.residual, expected.residual)
    (grad,) = torch.autograd.grad(found.value.sum(), z)
    (oracle,) = torch.autograd.grad(expected.value.sum(), z)
    assert torch.equal(grad, oracle)


class Greedy:
    """tanh(z - x / 2) with one part that writes over what it is given."""

    rowwise = True

    def __init__(self, part: str) -> None:
        self.part = part

    def prepare(self, z: Tensor) -> tuple[Tensor]:
        return (z.mul_(2) if self.part == "prepare" else 2 * z,)

    def step(self, x: Tensor, prepared: tuple[Tensor]) -> Tensor:
        (bias,) = prepared
        return torch.tanh(bias.sub_(0.5 * x) if self.part == "step" else bias - 0.5 * x)

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return self.step(x, self.prepare(z))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("g", "message"),
    [
        (lambda x, z: torch.tanh(z.sub_(0.5 * x)), "must not change z in place"),
        (Greedy("prepare"), "must not change z in place"),
        (Greedy("step"), "must not change what prepare returned in place"),
    ],
    ids=["z", "prepare", "step"],
)
def test_a_g_that_writes_over_its_inputs(g: Any, message: str, mode: Any) -> None:
    with mode():
        z = torch.linspace(-2, 2, B)[:, None].repeat(1, D)
        with pytest.raises(ValueError, match=message):
            fpi.fixed_point(g, torch.zeros(B, D), z)
        z = torch.linspace(-2, 2, B)[:, None].repeat(1, D)
        sol = fpi.fixed_point(Greedy(""), torch.zeros(B, D), z, rtol=1e-6)
        torch.testing.assert_close(torch.tanh(2 * z - 0.5 * sol.value), sol.value)


def numpy_mask() -> Callable[[Tensor, Tensor], Tensor]:
    random = numpy.random.default_rng(0)
    return lambda x, z: 0.5 * x * torch.from_numpy(random.random(x.shape) > 0.5) + z


def centred() -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, z: 0.5 * (x - x.mean(0)) + z


@pytest.mark.parametrize("adjoint", [fpi.Implicit(), fpi.JacobianFree(), fpi.Phantom(k=3, tau=0.5)])
@pytest.mark.parametrize(
    ("make", "rowwise"),
    [(numpy_mask, False), (centred, True)],
    ids=["numpy", "not row-wise"],
)
def test_a_g_that_is_another_function_when_evaluated_again(
    make: Any, rowwise: bool, adjoint: Any
) -> None:
    z = torch.randn(40, D) * torch.logspace(-3, 1, 40)[:, None]
    match = "has another value at the solution" + " for all rows together" * rowwise
    with pytest.raises(RuntimeError, match=match):
        fpi.fixed_point(
            make(), zeros(40, D), z.requires_grad_(), rowwise=rowwise, adjoint=adjoint, atol=1e-3
        )


def test_a_g_that_couples_samples_is_solved_where_nothing_else_is_claimed() -> None:
    z = torch.randn(40, D, dtype=F64, requires_grad=True)
    sol = fpi.fixed_point(centred(), torch.zeros(40, D, dtype=F64), z, **TIGHT)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, 2 * z - z.mean(0))


def test_a_g_whose_first_evaluation_hides_that_it_works_in_place() -> None:
    """x *= 0.5 changes nothing at x = 0."""
    z = torch.randn(B, D)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(ValueError, match="x in place in some evaluations only"):
            fpi.fixed_point(lambda x, z: x.mul_(0.5) + z if x.any() else z.clone(), zeros(), z)
        with mode():
            sol = fpi.fixed_point(lambda x, z: x.mul_(0.5) + z, zeros(), z, rtol=1e-6)
        torch.testing.assert_close(sol.value, 2 * z, rtol=1e-4, atol=1e-4)


def surroundings() -> dict[str, Any]:
    """All that a solve changes for a while."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "forward level": forward_ad._current_level,
        "forward mode": torch._C._is_fwd_grad_enabled(),
        "levels": len(_functorch.get_interpreter_stack() or ()),
        "single level": torch._C._get_autograd_function_extension_enabled()
        if hasattr(torch._C, "_get_autograd_function_extension_enabled")
        else None,
        "inplace": _functorch.get_inplace_requires_grad_allowed(),
        "function modes": len(_get_current_function_mode_stack()),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "hooks": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "random": torch.get_rng_state().tolist(),
    }


class Raising(nn.Module):
    """0.5 tanh(W x) + z with dropout, which raises in its n-th evaluation."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = fpi.contract_(nn.Linear(D, D, bias=False), 0.9)
        self.error = error
        self.left = 0

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return 0.5 * torch.tanh(torch.dropout(self.linear(x), 0.2, True)) + z

    def weight_gradient(self) -> Tensor:
        """Of the parameter behind the weight, which autocast and cached() keep a copy of."""
        (grad,) = torch.autograd.grad(self.linear(torch.ones(1, D)).sum(), self.parameters())
        return grad


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def solve(module: Raising, z: Tensor, **options: Any) -> Tensor:
    return fpi.fixed_point(module, torch.zeros_like(z), z, rtol=1e-2, **options).value


def loss(module: Raising, z: Tensor, **options: Any) -> Tensor:
    return (solve(module, z, **options) ** 2).sum()


def twice(module: Raising, z: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss(module, z), z, create_graph=True)
    return torch.autograd.grad(grad.sum(), z)[0]


PLACES: dict[str, Callable[[Raising, Tensor], Tensor]] = {
    "plain": solve,
    "unrolled": lambda m, z: solve(m, z, adjoint=fpi.Unroll()),
    "backward": lambda m, z: torch.autograd.grad(loss(m, z), z)[0],
    "double backward": twice,
    "func.grad": lambda m, z: torch.func.grad(functools.partial(loss, m))(z.detach()),
    "func.jvp": lambda m, z: torch.func.jvp(
        functools.partial(solve, m), (z.detach(),), (z.detach(),)
    )[1],
    "vmap": lambda m, z: torch.func.vmap(functools.partial(solve, m), randomness="same")(
        z.detach()[None]
    ),
    "hessian": lambda m, z: torch.func.jacrev(torch.func.grad(functools.partial(loss, m)))(
        z.detach()
    ),
}
CONTEXTS = {
    "": contextlib.nullcontext,
    "autocast": autocast,
    "cached": parametrize.cached,
}


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("place", PLACES)
def test_a_g_that_raises_leaves_nothing_behind(
    place: str, context: str, error: BaseException
) -> None:
    call = PLACES[place]
    module = Raising(error)
    z = torch.randn(B, D, requires_grad=True)
    with CONTEXTS[context]():
        call(module, z)  # the first solve of a map probes it
    with CONTEXTS[context]():
        torch.manual_seed(1)
        module.left = 0
        expected = call(module, z)
        evaluations = -module.left
    with CONTEXTS[context]():
        weight_gradient = module.weight_gradient()
    for stop in sorted({1, 2, 4, evaluations - 1, evaluations}):
        with CONTEXTS[context]():
            torch.manual_seed(1)
            before = surroundings()
            module.left = stop
            with pytest.raises(type(error)):
                call(module, z)
            after = surroundings()
            # One evaluation's worth of random numbers is drawn once it is over.
            before.pop("random"), after.pop("random")
            assert after == before
            # Nor has a cache kept a weight without its graph.
            assert torch.equal(module.weight_gradient(), weight_gradient)
    assert z.grad is None
    with CONTEXTS[context]():
        torch.manual_seed(1)
        module.left = 0
        assert torch.equal(call(module, z), expected)


def test_a_solve_in_inference_mode_or_no_grad_that_raises() -> None:
    module = Raising(KeyboardInterrupt())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            before = surroundings()
            module.left = 1
            with pytest.raises(KeyboardInterrupt):
                solve(module, torch.randn(B, D))
            assert surroundings() | {"random": 0} == before | {"random": 0}
        assert torch.is_grad_enabled()


# --- where and how derivatives are asked for ---------------------------------------------------


class Cell(nn.Module):
    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a.detach().clone())

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ self.a.T + z)

    def method(self, x: Tensor, z: Tensor) -> Tensor:
        return self(x, z)


def with_keyword(x: Tensor, z: Tensor, *, a: Tensor) -> Tensor:
    return torch.tanh(x @ a.T + z)


def closures(a: Tensor, z: Tensor) -> dict[str, tuple[Any, Tensor]]:
    """The same g in every form, and the tensor that its derivative is asked for."""
    cell = Cell(a)
    doubled = a * 2
    holder = {"a": [a]}
    return {
        "tensor": (lambda x, z: torch.tanh(x @ a.T + z), a),
        "non-leaf": (lambda x, z: torch.tanh(x @ doubled.T / 2 + z), a),
        "container": (lambda x, z: torch.tanh(x @ holder["a"][0].T + z), a),
        "partial": (functools.partial(with_keyword, a=a), a),
        "partial of a non-leaf": (functools.partial(with_keyword, a=doubled / 2), a),
        "module": (cell, cell.a),
        "module in a lambda": (lambda x, z: cell(x, z), cell.a),
        "bound method": (cell.method, cell.a),
        "partial of a method": (functools.partial(cell.method), cell.a),
        "forward": (cell.forward, cell.a),
        "z as well": (lambda x, _: torch.tanh(x @ a.T + z), a),
        "z in part": (lambda x, y: torch.tanh(x @ a.T + 0.5 * (y + z)), a),
    }


@pytest.mark.parametrize("form", closures(torch.zeros(1), torch.zeros(1)))
def test_whatever_g_closes_over_gets_its_derivatives(form: str, problem: Problem) -> None:
    z, a = problem
    closure, wanted = closures(a, z)[form]
    value = fpi.fixed_point(closure, torch.zeros_like(z), z, **TIGHT).value
    found = torch.autograd.grad((value**2).sum(), (z, wanted), create_graph=True)
    second = torch.autograd.grad((found[0] ** 2).sum() + (found[1] ** 2).sum(), (z, wanted))
    oracle = torch.autograd.grad((problem.looped() ** 2).sum(), (z, a), create_graph=True)
    expected = torch.autograd.grad((oracle[0] ** 2).sum() + (oracle[1] ** 2).sum(), (z, a))
    torch.testing.assert_close(found, oracle, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(second, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("x0_requires_grad", [False, True])
@pytest.mark.parametrize("z_requires_grad", [False, True])
def test_what_requires_grad(x0_requires_grad: bool, z_requires_grad: bool) -> None:
    x0 = zeros().requires_grad_(x0_requires_grad)
    z = torch.randn(B, D).requires_grad_(z_requires_grad)
    expected = fpi.fixed_point(g, x0.detach(), z.detach())
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            sol = fpi.fixed_point(g, x0, z)
            recording = torch.is_grad_enabled()
        assert torch.equal(sol.value, expected.value)
        assert sol.value.requires_grad == (recording and z_requires_grad)
        for field in (sol.status, sol.num_steps, sol.residual):
            assert not field.requires_grad
        assert sol.adjoint_stats is None
    if z_requires_grad:
        fpi.fixed_point(g, x0, z).value.sum().backward()
        assert z.grad is not None
        assert x0.grad is None


def test_an_inference_tensor_from_an_earlier_solve_is_a_start() -> None:
    z = torch.randn(B, D, requires_grad=True)
    with torch.inference_mode():
        start = fpi.fixed_point(g, zeros(), z, rtol=1e-6).value
    sol = fpi.fixed_point(g, start, z, rtol=1e-5)
    assert (sol.num_steps == 1).all()
    sol.value.sum().backward()
    assert z.grad is not None


def test_a_warm_start_does_not_hold_the_graph_of_the_last_solve() -> None:
    z = torch.randn(B, D, requires_grad=True)
    cold = fpi.fixed_point(g, zeros(), z, rtol=1e-5)
    with torch.no_grad():
        moved = z + 1e-3
    warm = fpi.fixed_point(g, cold.value, moved.requires_grad_(), rtol=1e-5)
    assert (warm.num_steps < cold.num_steps).all()
    warm.value.sum().backward()
    assert z.grad is None
    expected = 1 / (1 - 0.6 * torch.cos(warm.value.detach()))
    torch.testing.assert_close(moved.grad, expected, rtol=1e-3, atol=1e-3)


def test_saved_tensor_hooks_around_a_solve(problem: Problem) -> None:
    z, a = problem
    with torch.autograd.graph.save_on_cpu():
        x = fpi.fixed_point(
            lambda x, z: torch.tanh(x @ a.T + z), torch.zeros_like(z), z, **TIGHT
        ).value
    found = torch.autograd.grad((x**2).sum(), (z, a))
    expected = torch.autograd.grad((problem.looped() ** 2).sum(), (z, a))
    torch.testing.assert_close(found, expected)


def test_anomaly_mode_and_deterministic_algorithms(problem: Problem) -> None:
    """The latter fills what is allocated and not written with NaN."""
    z, a = problem
    expected = torch.autograd.grad((problem.looped() ** 2).sum(), (z, a))
    torch.use_deterministic_algorithms(True)
    try:
        for backend in BACKENDS:
            for solver in (fpi.Picard(), fpi.Anderson(), fpi.Broyden()):
                for adjoint in (None, fpi.GMRES(), fpi.ConjugateGradient()):
                    x = fpi.fixed_point(
                        lambda x, z: torch.tanh(x @ a.T + z),
                        torch.zeros_like(z),
                        z,
                        solver=solver,
                        backend=backend,
                        adjoint=fpi.Implicit(solver=adjoint),
                        **TIGHT,
                    ).value
                    found = torch.autograd.grad((x**2).sum(), (z, a))
                    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autograd.set_detect_anomaly(True):
        x = fpi.fixed_point(
            lambda x, z: torch.tanh(x @ a.T + z), torch.zeros_like(z), z, **TIGHT
        ).value
        found = torch.autograd.grad((x**2).sum(), (z, a), create_graph=True)
        torch.autograd.grad(found[1].sum(), a)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


class Prepared(NamedTuple):
    bias: Tensor
    scale: Tensor


@pytest.mark.parametrize("kind", [tuple, list, Prepared, dict])
def test_what_prepare_may_return(kind: Any) -> None:
    class Hoisting:
        rowwise = True

        def prepare(self, z: Tensor) -> Any:
            if kind is dict:
                return {"bias": 2 * z, "scale": z.sigmoid()}
            both = (2 * z, z.sigmoid())
            return Prepared(*both) if kind is Prepared else kind(both)

        def step(self, x: Tensor, prepared: Any) -> Tensor:
            bias, scale = prepared.values() if kind is dict else prepared
            return 0.9 * scale * torch.sin(x) + bias

        def __call__(self, x: Tensor, z: Tensor) -> Tensor:
            return self.step(x, self.prepare(z))

    z = torch.linspace(-4, 4, 8, dtype=F64)[:, None].repeat(1, D).requires_grad_()
    sol = fpi.fixed_point(Hoisting(), torch.zeros_like(z), z, **TIGHT)
    plain = fpi.fixed_point(lambda x, z: Hoisting()(x, z), torch.zeros_like(z), z, **TIGHT)
    torch.testing.assert_close(sol.value, plain.value)
    (found,) = torch.autograd.grad(sol.value.sum(), z)
    (expected,) = torch.autograd.grad(plain.value.sum(), z)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "g",
    [fpi.cells.Dense(3, 4), lambda x, z: x + z, nn.Linear(4, 4)],
    ids=["cell", "function", "module"],
)
def test_a_wrong_number_of_inputs_is_named(g: Any) -> None:
    z = torch.zeros(5, 3)
    with pytest.raises(TypeError, match=r"g must take x and every z, but .* the 3 z given"):
        fpi.fixed_point(g, torch.zeros(5, 4), z, z, z)


def test_a_type_error_of_g_passes_through() -> None:
    def g(x: Tensor) -> Tensor:
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        fpi.fixed_point(g, torch.zeros(5, 4))


def test_an_input_that_is_no_tensor_is_named() -> None:
    layer = fpi.FPILayer(fpi.cells.Dense(3, 4))
    with pytest.raises(TypeError, match=r"got z\[0\] = list. Convert it with torch.as_tensor"):
        layer([[1.0, 2.0, 3.0]])


HISTORIES = [
    (state, history, backend)
    for backend in (None, "reference", "native")
    for state in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for history in (torch.bfloat16, torch.float32, torch.float64)
    if backend != "native" or (fpi.native_available() and state != torch.float16)
]


@pytest.mark.parametrize(("state", "history", "backend"), HISTORIES, ids=str)
@pytest.mark.parametrize("where", ["forward", "adjoint"])
def test_every_history_dtype_is_served_or_refused_by_name(
    state: torch.dtype, history: torch.dtype, backend: str | None, where: str
) -> None:
    solver = fpi.Anderson(history_dtype=history)
    given: dict[str, Any] = {"solver": solver}
    if where == "adjoint":
        given = {"solver": fpi.Picard(), "adjoint": fpi.Implicit(solver=solver)}
    z = torch.ones(3, 4, dtype=state, requires_grad=True)

    def solve() -> fpi.Solution:
        return fpi.fixed_point(
            lambda x, z: 0.5 * torch.tanh(x) + z, torch.zeros_like(z), z, rtol=2e-2,
            backend=backend, **given,
        )  # fmt: skip

    compiled = fpi.native_available() and backend != "reference" and state != torch.float16
    if compiled and state == torch.bfloat16 and history != torch.bfloat16:
        with pytest.raises(ValueError, match=r'history_dtype=.*"native".*backend="reference"'):
            solve()
        return
    sol = solve()
    assert sol.converged.all()
    expected = fpi.fixed_point(
        lambda x, z: 0.5 * torch.tanh(x) + z, torch.zeros_like(z), z, rtol=2e-2, backend=backend
    ).value
    torch.testing.assert_close(sol.value, expected, rtol=4e-2, atol=0.0)
    sol.value.sum().backward()
    assert sol.adjoint_stats is not None
    assert sol.adjoint_stats.converged.all()


def test_a_history_wider_than_the_differences_holds_the_same_numbers() -> None:
    a = torch.linalg.qr(torch.randn(9, 9))[0] * 0.9
    z = torch.randn(5, 9)

    def solve(history: torch.dtype | None, dtype: torch.dtype) -> torch.Tensor:
        g = lambda x: torch.tanh(x @ a.to(dtype) + z.to(dtype))  # noqa: E731
        solver = fpi.Anderson(history_dtype=history)
        return fpi.fixed_point(g, torch.zeros(5, 9, dtype=dtype), solver=solver).value

    assert torch.equal(solve(torch.float64, torch.float32), solve(None, torch.float32))
    assert torch.equal(solve(torch.bfloat16, torch.float64), solve(None, torch.float64))
