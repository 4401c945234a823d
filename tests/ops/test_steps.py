"""One step of every kernel: its schema, its twin in plain torch, and what it must leave alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import MAPS, SOLVERS, advance, arrays, assert_same_step, begin, g, pairs, short
from torch import Tensor

from fpi_cuda import ops
from fpi_cuda.loops.host import iterate
from fpi_cuda.loops.stepping import step
from fpi_cuda.norms import row_norm
from fpi_cuda.ops import reference, rules
from fpi_cuda.ops.solver_state import COUNTERS, NORMS
from fpi_cuda.options import BACKENDS as KNOWN
from fpi_cuda.options import Anderson, Broyden, FixedPointSolver, Picard
from fpi_cuda.solution import Status
from fpi_cuda.testing import backends_available

native = pytest.mark.skipif(
    "native" not in backends_available(), reason="built without the extension"
)

# Triton's interpreter would take minutes here; test_triton.py holds that backend to its twin.
BACKENDS = [name for name in backends_available() if name != "triton"]

DIMS = [1, 31, 33, 129]
LARGE = 40000  # more than one panel of the CPU kernels

every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=short)


@native
@pytest.mark.parametrize(
    ("solver", "dtype"), pairs(torch.float32, torch.float64, torch.bfloat16), ids=short
)
@pytest.mark.parametrize("dim", [*DIMS, LARGE])
def test_native_takes_the_steps_of_the_reference(
    solver: FixedPointSolver, dtype: torch.dtype, dim: int
) -> None:
    """Same status and steps; the same point while rounding has had no time to grow."""
    batch = len(MAPS) if dim == LARGE else 2 * len(MAPS)
    torch.manual_seed(dim)
    one, z = begin(solver, batch, dim, dtype)
    torch.manual_seed(dim)
    other, _ = begin(solver, batch, dim, dtype)
    for _ in range(6):
        advance(one, z, ops.native)
        advance(other, z, reference)
        assert_same_step(one, other)


# Not Broyden at 1e20: products of two differences leave float32 there, and it stays with Picard.
MIXING = [
    (solver, scale)
    for solver in (Anderson(m=3), Anderson(m=3, history_dtype=torch.bfloat16), Broyden(m=3))
    for scale in (1.0, 1e-20, 1e20)
    if scale < 1e10 or isinstance(solver, Anderson)
]


@native
@pytest.mark.parametrize(("solver", "scale"), MIXING, ids=short)
@pytest.mark.parametrize("lost", [0, 11], ids=["finite", "one-nan"])
def test_native_mixes_as_the_reference(solver: FixedPointSolver, scale: float, lost: int) -> None:
    """Past the first Picard phase, where squares leave float32, and after a rejected step."""
    ends = []
    for backend in (ops.native, reference):
        torch.manual_seed(0)
        b, z = begin(solver, 3, 33, torch.float32)
        b.x.mul_(scale)
        accelerated = 0
        for number in range(1, 15):
            gx = (0.9 * b.x + 0.05 * b.x.flip(-1) - 0.2 * b.x.roll(1, -1) + scale * z).clone()
            gx[0] = torch.nan if number == lost else gx[0]
            step(backend, b.solver, b.work, b.x, gx, None, 1e-9, 50)
            accelerated += int(((b.x - gx).abs() > 0.01 * gx.abs()).any())
        assert accelerated >= 3
        ends.append(b.x.double() / scale)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-3)


@every_solver
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stopped_sample_never_moves_again(solver: FixedPointSolver, backend: str) -> None:
    engine = ops.resolve(backend, torch.device("cpu"), torch.float32)
    b, z = begin(solver, 2 * len(MAPS), 33, torch.float32)
    stopped_at: dict[int, dict[str, Tensor]] = {}
    for _ in range(50):
        advance(b, z, engine)
        for i in range(len(b.x)):
            if b.work.status[i] == Status.ACTIVE:
                continue
            now = {name: t[i].clone() for name, t in arrays(b.work).items() if len(t)}
            now["x"] = b.x[i].clone()
            then = stopped_at.setdefault(i, now)
            for name in ("x", "best", "status", "num_steps", "residual"):
                torch.testing.assert_close(now[name], then[name], rtol=0, atol=0, equal_nan=True)
    assert len(stopped_at) == len(b.x)


@every_solver
@pytest.mark.parametrize("backend", BACKENDS)
def test_x_of_a_stopped_sample_is_the_point_to_return(
    solver: FixedPointSolver, backend: str
) -> None:
    engine = ops.resolve(backend, torch.device("cpu"), torch.float32)
    b, z = begin(solver, 2 * len(MAPS), 31, torch.float32)
    for _ in range(50):
        advance(b, z, engine)
    torch.testing.assert_close(b.x, b.work.best, rtol=0, atol=0, equal_nan=True)
    true = (g(b.x, z).double() - b.x.double()).norm(dim=1)
    finite = true.isfinite()
    torch.testing.assert_close(b.work.residual[finite], true[finite], rtol=1e-5, atol=1e-30)


@native
@pytest.mark.parametrize(
    ("solver", "dim"),
    [*((s, 33) for s in SOLVERS), *((s, LARGE) for s in (SOLVERS[1], SOLVERS[3], SOLVERS[-1]))],
    ids=short,
)
def test_a_sample_gets_the_same_bits_in_any_batch(solver: FixedPointSolver, dim: int) -> None:
    """Alone, permuted, in a larger batch, or compacted; on one thread or two."""
    b, z = begin(solver, len(MAPS), dim, torch.float32)
    start = b.x.clone()

    def result(samples: Tensor, threads: int, rowwise: bool = False) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = iterate(
                lambda x, rows: g(x, z, samples if rows is None else samples[rows]),
                start[samples],
                solver,
                rtol=1e-4,
                atol=0.0,
                max_steps=30,
                backend=ops.native,
                rowwise=rowwise,
            )
        finally:
            torch.set_num_threads(before)
        return list(out)

    whole = result(torch.arange(len(MAPS)), 1)
    for samples, threads, rowwise in (
        (torch.tensor([4, 1, 6, 0]), 1, False),
        (torch.tensor([2]), 1, False),
        (torch.tensor([5, 5, 3, 1, 0, 2, 4, 6, 1]), 2, False),
        (torch.tensor([6, 5, 4, 3, 2, 1, 0]), 2, True),
    ):
        part = result(samples, threads, rowwise)
        for one, other in zip(part, whole, strict=True):
            torch.testing.assert_close(one, other[samples], rtol=0, atol=0, equal_nan=True)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(m=3), Broyden(m=3)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_opcheck(solver: FixedPointSolver, dtype: torch.dtype, some: bool) -> None:
    b, z = begin(solver, 3, 17, dtype)
    rows = torch.tensor([2, 0]) if some else None
    advance(b, z, ops.native)
    x = b.x if rows is None else b.x[rows]
    w = b.work
    points = (w.best, w.anchor, w.f_previous, w.partner_previous, w.columns_f, w.columns_g)
    account = (w.control, w.atol, w.status, w.num_steps, w.residual)
    options: dict[str, Any] = {"rtol": 1e-4, "max_steps": 50, "beta": 1.0}
    if isinstance(solver, Broyden):
        op, args = torch.ops.fpi_cuda.broyden_step_.default, (*points, *account)
    else:
        op, args = torch.ops.fpi_cuda.anderson_step_.default, (*points, w.gram, *account)
        options["ridge"] = 1e-3
    torch.library.opcheck(op, (x, g(x, z, rows), rows, *args), options)


def one_step(**changed: Any) -> None:
    """One Anderson step with some arguments replaced."""
    b, z = begin(Anderson(m=2), 3, 4, torch.float32)
    arguments = {"x": b.x, "gx": g(b.x, z), "sample_of": None, **arrays(b.work)}
    arguments["g_previous"] = arguments.pop("partner_previous")
    options = {"rtol": 1e-4, "max_steps": 50, "beta": 1.0, "ridge": 1e-3}
    torch.ops.fpi_cuda.anderson_step_(**{**arguments, **changed}, **options)


@native
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gx": torch.zeros(3, 5)}, r"gx must be \(3, 4\), got \(3, 5\)"),
        ({"gx": torch.zeros(3, 4, dtype=torch.float64)}, "gx must have dtype Float, got Double"),
        ({"gx": torch.zeros(4, 3).T}, "gx must be contiguous"),
        ({"x": torch.zeros(2, 4), "gx": torch.zeros(2, 4)}, "x must hold the whole batch of 3"),
        ({"sample_of": torch.tensor([0, 1, 3])}, "sample_of must name samples below 3, got 3"),
        ({"control": torch.zeros(3, 2, dtype=torch.float64)}, r"control must be \(3, "),
        ({"f_previous": torch.zeros(3, 4)}, r"f_previous must be \(0, 4\)"),
        ({"x": torch.zeros(3, 4, dtype=torch.float16)}, "bfloat16 on the CPU, got Half"),
    ],
    ids=lambda value: None if isinstance(value, dict) else re.sub(r"\W+", "-", value)[:30],
)
def test_ops_check_what_they_index(changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        one_step(**changed)


COMMON = Path(__file__).parents[2] / "csrc" / "common"


def test_control_has_the_same_columns_in_both_languages() -> None:
    row = (COMMON / "control.h").read_text().split("struct Control {")[1].split("};")[0]
    assert tuple(re.findall(r"double (\w+);", row)) == NORMS
    assert tuple(re.findall(r"float (\w+);", row)) == COUNTERS


def test_rules_have_the_same_constants_in_both_languages() -> None:
    text = (COMMON / "decide.h").read_text() + (COMMON / "small_solve.h").read_text()
    found = dict(re.findall(r"constexpr (?:double|int) k(\w+) = ([^;]+);", text))
    assert len(found) >= 16
    for name, value in found.items():
        python = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
        assert getattr(rules, python) == eval(value), name


def test_status_has_the_same_values_in_both_languages() -> None:
    text = (COMMON / "status.h").read_text()
    found = {name: int(value) for name, value in re.findall(r"k(\w+) = (-?\d+)", text)}
    assert {name.upper(): value for name, value in found.items()} == {
        name.replace("_", ""): int(value) for name, value in Status.__members__.items()
    }


# --- the look at samples that have stopped -------------------------------------------------------


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 31, 33, 700])
def test_samples_that_have_moved_are_counted(dtype: torch.dtype, dim: int) -> None:
    """By native code as by its twin, whatever lies in them."""
    x, gx = torch.randn(12, dim).to(dtype), torch.randn(12, dim).to(dtype)
    gx[3], x[4], gx[5, 0] = torch.inf, torch.nan, torch.nan
    large = 1e-3 * torch.finfo(dtype).max
    x[6:8] *= large
    gx[8:10] *= torch.finfo(dtype).tiny
    wide = torch.promote_types(dtype, torch.float32)
    residual = row_norm(gx.to(wide) - x.to(wide))
    residual[10] *= 1 + 1e-6  # another order of the sum
    status = torch.ones(12, dtype=torch.int8)
    for count in (ops.native.num_moved, reference.num_moved):
        assert count(x, gx, status, residual) == 0
        residual[[0, 6, 11]] *= 1.5
        assert count(x, gx, status, residual) == 3
        status[0] = Status.ACTIVE
        assert count(x, gx, status, residual) == 2
        status[0] = Status.CONVERGED
        residual[[0, 6, 11]] /= 1.5


@native
def test_the_look_checks_its_arrays() -> None:
    x = torch.zeros(3, 2)
    status, residual = torch.ones(3, dtype=torch.int8), torch.zeros(3, dtype=torch.float64)
    for wrong, message in (
        ((x, x.double(), status, residual), "num_moved: gx must have dtype"),
        ((x, x[:2], status, residual), "num_moved: gx must be"),
        ((x, x, status.int(), residual), "num_moved: status must have dtype"),
        ((x, x, status, residual.float()), "num_moved: residual must have dtype"),
        ((x.half(), x.half(), status, residual), "num_moved: x must be float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.native.num_moved(*wrong)


def test_what_may_be_asked_for_is_what_there_is() -> None:
    assert ops.NAMES == KNOWN
