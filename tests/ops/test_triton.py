"""The Triton kernels against their twin in plain torch: compiled on a GPU, else interpreted.

The interpreter takes some 30 ms for a step of one sample: hence the small batches.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda import ops
from fpi_cuda.loops.host import iterate
from fpi_cuda.loops.stepping import allocate, step
from fpi_cuda.ops import reference
from fpi_cuda.ops import triton as engine
from fpi_cuda.ops.solver_state import column
from fpi_cuda.ops.triton.shape import SPLIT, shape_of
from fpi_cuda.options import Anderson, Broyden, FixedPointSolver, Picard
from fpi_cuda.solution import Status

ROOT = Path(__file__).parents[2]
WHY_NOT = engine.why_not(torch.device("cpu"), torch.float32)
device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)

# What one rounding of the state may make of a few steps, relative to the largest element.
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2, torch.float16: 5e-3}
# A last bit of a difference may round to another bfloat16 of the history.
NARROW_CLOSE = 1e-3
STEPS = 13  # the first Picard phase takes 9


def cosine_map(x: Tensor, z: Tensor) -> Tensor:
    """A contraction with fixed point away from 0."""
    return 0.6 * torch.cos(x) + 0.3 * x.roll(1, -1) + z


MAPS: list[Callable[[Tensor, Tensor], Tensor]] = [
    cosine_map,
    lambda x, z: -1.3 * x + z,  # diverges under Picard
    lambda x, z: torch.where(x.abs().amax(-1, keepdim=True) > 1.5, torch.nan, 1.5 * x + z),
    lambda x, z: x + 0 * z,  # solved from the start
    lambda x, z: z + 0 * x,  # solved at the second evaluation
]


def g(x: Tensor, z: Tensor, samples: list[int]) -> Tensor:
    """Sample i by map i, modulo their number."""
    rows = [MAPS[s % len(MAPS)](x[i : i + 1], z[s : s + 1]) for i, s in enumerate(samples)]
    return torch.cat(rows).contiguous()


def short(value: object) -> str:
    """An id without spaces."""
    noise = r"\s|torch\.|history_dtype=None|,?ridge=0.001|,?beta=1.0,?|damping=1.0"
    return re.sub(noise, "", str(value) if isinstance(value, torch.dtype) else repr(value))


def closeness(solver: FixedPointSolver, dtype: torch.dtype) -> float:
    """How near two correct roundings of the same steps stay."""
    return NARROW_CLOSE if getattr(solver, "history_dtype", None) else CLOSE[dtype]


# (solver, state, dim): every dtype, every depth of tile, and sizes that fill no block.
CASES = [
    (Picard(), torch.float32, 1),
    (Picard(damping=0.7), torch.float16, 33),
    (Anderson(m=1), torch.float64, 31),
    (Anderson(m=5), torch.float32, 33),
    (Anderson(m=16, beta=0.6), torch.float64, 129),
    (Anderson(m=4, history_dtype=torch.bfloat16), torch.float32, 129),
    (Anderson(m=5), torch.bfloat16, 31),
    (Anderson(m=3), torch.float16, 700),
    (Anderson(m=8), torch.float32, 1),
]


@device
@pytest.mark.parametrize(("solver", "dtype", "dim"), CASES, ids=short)
def test_triton_takes_the_steps_of_the_reference(
    solver: FixedPointSolver, dtype: torch.dtype, dim: int, device: str
) -> None:
    """Same status and steps; the same point, past the first accelerated steps."""
    samples = list(range(len(MAPS)))
    start = torch.randn(len(MAPS), dim).to(dtype)
    z = (0.3 * torch.randn(len(MAPS), dim)).to(dtype)
    compare(
        solver, start, lambda x, _: g(x, z.to(x.device), samples), device, closeness(solver, dtype)
    )


@device
@pytest.mark.parametrize(
    "solver",
    [Picard(), Anderson(m=2), Anderson(m=2, history_dtype=torch.bfloat16)],
    ids=short,
)
def test_large_samples_are_stepped_in_splits(solver: FixedPointSolver, device: str) -> None:
    dim = SPLIT + 700
    start = torch.randn(3, dim)
    z = 0.3 * torch.randn(len(MAPS), dim)

    def lost_once(x: Tensor, number: int) -> Tensor:
        gx = g(x, z.to(x.device), [0, 3, 0])
        gx[2, -1] = torch.nan if number == 11 else gx[2, -1]
        return gx

    compare(solver, start, lost_once, device, closeness(solver, torch.float32))


SCALES = [
    (Anderson(m=3), torch.float32, 1e-20),
    (Anderson(m=3), torch.float32, 1e20),
    (Anderson(m=3, history_dtype=torch.bfloat16), torch.float32, 1e20),
    (Anderson(m=3), torch.float64, 1e-150),
    (Picard(), torch.float64, 1e170),
    (Picard(), torch.float64, 1e-170),
]


@device
@pytest.mark.parametrize(("solver", "dtype", "scale"), SCALES, ids=short)
def test_no_scale_overflows_or_vanishes(
    solver: FixedPointSolver, dtype: torch.dtype, scale: float, device: str
) -> None:
    """Squares leave the dtype's range; one evaluation of the second sample is not finite."""
    z = scale * torch.randn(2, 33, dtype=dtype)

    def linear(x: Tensor, number: int) -> Tensor:
        gx = 0.9 * x + 0.05 * x.flip(-1) - 0.2 * x.roll(1, -1) + z.to(x.device)
        gx[1] = torch.inf if number == 11 else gx[1]
        return gx

    compare(solver, torch.zeros_like(z), linear, device, 1e-3, scale)


def compare(
    solver: FixedPointSolver,
    start: Tensor,
    evaluate: Callable[[Tensor, int], Tensor],
    device: str,
    close: float,
    scale: float = 1.0,
) -> None:
    """Take the same steps with both, and hold one to the other after each."""
    x = {name: start.to(device).clone() for name in ("triton", "reference")}
    work = {name: allocate(t, solver, 0.0) for name, t in x.items()}
    for number in range(1, STEPS + 1):
        for name, backend in (("triton", engine), ("reference", reference)):
            gx = evaluate(x[name], number)
            step(backend, solver, work[name], x[name], gx, None, 1e-4, 50)
        ours, theirs = work["triton"], work["reference"]
        assert ours.status.tolist() == theirs.status.tolist()
        assert ours.num_steps.tolist() == theirs.num_steps.tolist()
        for what, a, b in (
            ("x", x["triton"], x["reference"]),
            ("best", ours.best, theirs.best),
            ("residual", ours.residual[:, None], theirs.residual[:, None]),
        ):
            a, b = a.double() / scale, b.double() / scale
            size = b.abs().amax(-1, keepdim=True).nan_to_num().clamp(min=1)
            error = ((a - b) / size).abs()
            agrees = (error <= close) | (a.isnan() & b.isnan()) | (a == b)
            assert agrees.all(), f"step {number}: {what} is off by {error.max():.1e}"
        active = theirs.status == Status.ACTIVE
        for field in ("columns", "head", "picard_left", "rejections", "anchored"):
            torch.testing.assert_close(
                column(ours.control, field)[active],
                column(theirs.control, field)[active],
                rtol=1e-2,
                atol=0.0,
            )


@device
@pytest.mark.parametrize(
    ("solver", "dim"),
    [(Anderson(m=3), 33), (Anderson(m=2), SPLIT + 1)],
    ids=short,
)
def test_a_sample_gets_the_same_bits_in_any_batch(
    solver: FixedPointSolver, dim: int, device: str
) -> None:
    """Alone, permuted, repeated, or in a batch that shrinks as samples stop."""
    maps = [0, 2, 4] if dim > SPLIT else [0, 1, 2, 3, 4]
    z = (0.3 * torch.randn(5, dim)).to(device)
    start = torch.randn(5, dim).to(device)

    def result(samples: list[int], rowwise: bool = False) -> list[Tensor]:
        def evaluate(x: Tensor, rows: Tensor | None) -> Tensor:
            return g(x, z, samples if rows is None else [samples[i] for i in rows.tolist()])

        out = iterate(
            evaluate,
            start[samples],
            solver,
            rtol=1e-3,
            atol=0.0,
            max_steps=12,
            backend=engine,
            rowwise=rowwise,
        )
        return list(out)

    whole = dict(zip(maps, zip(*result(maps), strict=True), strict=True))
    others = [([0], False), (maps[::-1], True)]
    for samples, rowwise in others:
        part = result(samples, rowwise)
        for i, sample in enumerate(samples):
            for one, other in zip(part, whole[sample], strict=True):
                torch.testing.assert_close(one[i], other, rtol=0, atol=0, equal_nan=True)


@device
def test_fixed_point_and_its_gradient(device: str) -> None:
    cell = fpi.cells.Dense(3, 4).double().to(device)
    z = torch.randn(2, 3, dtype=torch.float64, device=device)
    x0 = torch.zeros(2, 4, dtype=torch.float64, device=device)
    results = []
    for backend in ("triton", "reference"):
        cell.zero_grad()
        sol = fpi.fixed_point(cell, x0, z, solver=Anderson(m=3), rtol=1e-10, backend=backend)
        sol.value.square().sum().backward()
        assert sol.converged.all()
        assert sol.adjoint_stats.converged.all()
        results.append([sol.value.detach(), *(p.grad.clone() for p in cell.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@device
@pytest.mark.parametrize("solver", [Picard(), Anderson(m=2)], ids=short)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_a_state_without_elements(
    solver: FixedPointSolver, shape: tuple[int, int], device: str
) -> None:
    x = torch.zeros(shape, device=device)
    work = allocate(x, solver, 0.0)
    step(engine, solver, work, x, x.clone(), None, 1e-4, 50)
    assert work.status.tolist() == [Status.CONVERGED] * shape[0]


WRONG = {
    "gx": torch.zeros(3, 5),
    "best": torch.zeros(4, 3).T,
    "columns_f": torch.zeros(3, 2, 5),
    "control": torch.zeros(3, 5, dtype=torch.float64),
    "status": torch.zeros(3, dtype=torch.int32),
    "sample_of": torch.zeros(2, dtype=torch.int64),
}


@device
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_array_is_refused(name: str, device: str) -> None:
    x = torch.zeros(3, 4, device=device)
    work = vars(allocate(x, Anderson(m=2), 0.0))
    work["g_previous"] = work.pop("partner_previous")
    arguments = {"x": x, "gx": x.clone(), "sample_of": None, **work}
    options = {"rtol": 1e-4, "max_steps": 9, "beta": 1.0, "ridge": 0.0}
    engine.anderson_step_(**arguments, **options)
    with pytest.raises(RuntimeError, match=rf"^anderson_step_: {name} must be contiguous, \("):
        engine.anderson_step_(**{**arguments, name: WRONG[name].to(device)}, **options)


def resolve(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The Triton backend for such states."""
    return ops.resolve("triton", torch.device(device), dtype)


def test_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"on cpu.* set TRITON_INTERPRET=1 before Triton is"):
        resolve()


@pytest.mark.parametrize(
    ("dtype", "device", "message"),
    [
        (torch.complex64, "cpu", "no kernels for torch.complex64"),
        (torch.float32, "meta", "the state is on meta"),
    ],
    ids=short,
)
def test_a_state_that_it_cannot_take(dtype: torch.dtype, device: str, message: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=message):
        resolve(dtype, device)


def test_an_interpreter_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    if WHY_NOT is not None:
        pytest.skip(WHY_NOT)
    versions = {"triton": (3, 6), "numpy": (2, 4)}
    monkeypatch.setattr(engine, "version_of", versions.get)
    with pytest.raises(ValueError, match=r"Triton 3.6 fails under NumPy 2.4. pip install 'numpy<"):
        resolve()


@device
@pytest.mark.parametrize(
    "options",
    [{"solver": Broyden(m=3)}, {"adjoint": fpi.Implicit(solver=Broyden(m=3))}],
    ids=["forward", "adjoint"],
)
def test_broyden_is_refused(options: dict[str, Any], device: str) -> None:
    """It runs on every other backend; None takes one of those."""
    cell = fpi.cells.Dense(3, 4).to(device)
    x0, z = torch.zeros(2, 4, device=device), torch.randn(2, 3, device=device)
    message = r"^fixed_point: backend=\"triton\" .* got Broyden\(m=3, .* backend=None"
    with pytest.raises(ValueError, match=message):
        fpi.fixed_point(cell, x0, z, backend="triton", **options)
    assert fpi.fixed_point(cell, x0, z, **options).converged.all()


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"Triton is not installed. pip install triton"):
        resolve()


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_package_does_not_import_triton() -> None:
    code = "import torch, sys; a = 'triton' in sys.modules; import fpi_cuda; "
    assert run_python(code + "print(a == ('triton' in sys.modules))") == "True"


def test_the_interpreter_asked_for_too_late() -> None:
    pytest.importorskip("triton")
    code = (
        "import os, triton.language, torch\nos.environ['TRITON_INTERPRET'] = '1'\n"
        "from fpi_cuda import ops\n"
        "try: ops.resolve('triton', torch.device('cpu'), torch.float32)\n"
        "except ValueError as e: print(e)"
    )
    assert "was set after Triton had been imported" in run_python(code)


@pytest.mark.parametrize("dim", [1, 31, 32, 33, 700, SPLIT, SPLIT + 1, 65536, 10**7])
@pytest.mark.parametrize("depth", [0, 1, 5, 16])
@pytest.mark.parametrize("compute_bytes", [4, 8])
def test_shapes(dim: int, depth: int, compute_bytes: int) -> None:
    shape = shape_of(dim, depth, compute_bytes)
    assert shape.block & (shape.block - 1) == 0
    assert max(depth, 1) <= shape.tile_rows <= 2 * max(depth, 1)
    assert shape.num_warps in (1, 2, 4, 8)
    assert (shape.splits - 1) * SPLIT < dim <= shape.splits * SPLIT
    assert SPLIT % shape.block == 0
    # Registers of a thread that hold the running sums by column.
    running = shape.block * shape.tile_rows * compute_bytes * 2 / 4
    assert running <= 96 * 32 * shape.num_warps
