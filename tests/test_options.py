"""Options, solvers and states: a bad one is named with the valid ones."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ways import bent as g
from ways import zeros

import fpi_cuda as fpi

B, D = 3, 4


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
    (zeros().numpy(), "got ndarray; convert it with torch.as_tensor"),
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


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("request", "Options"),
        ("result", "Solution"),
        ("unconverged", "Notice"),
        ("cells.activation", "Activation"),
        ("elementwise", "gelu_derivative"),
        ("cells.dense", "Dense"),
    ],
)
def test_pickles_of_the_first_layout_find_their_classes(module: str, name: str) -> None:
    found = pickle.loads(f"cfpi_cuda.{module}\n{name}\n.".encode())
    assert found.__name__ == name
