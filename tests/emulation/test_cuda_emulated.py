"""The CUDA step kernels without a GPU: emulated under ASan and UBSan, against the reference."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation.emulated import Emulated, compile_driver, compiled_once, started
from stepping import (
    MAPS,
    SOLVERS,
    advance,
    assert_same_step,
    begin,
    end_first_phase,
    g,
    pairs,
    short,
    slack,
)
from torch import Tensor

from fpi_cuda.loops.host import iterate
from fpi_cuda.loops.stepping import step
from fpi_cuda.ops import reference
from fpi_cuda.options import Anderson, Broyden, FixedPointSolver, Picard
from fpi_cuda.solution import Status

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None,
    reason="the emulation needs Linux and g++",
)

SPLIT = 16384 + 37  # more than one block holds
NARROW = Anderson(m=4, history_dtype=torch.bfloat16)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled kernels."""
    return compiled_once(tmp_path_factory, "emulation", compile_driver)


Start = Callable[..., Emulated]


@pytest.fixture
def start(driver: Path) -> Iterator[Start]:
    """Starts emulated backends, and sees that each ends well."""
    yield from started(lambda **options: Emulated(driver, **options))


def assert_same_steps(
    backend: Emulated, solver: FixedPointSolver, batch: int, dim: int, dtype: torch.dtype
) -> None:
    """Six steps, the second of them out of the first phase."""
    torch.manual_seed(dim)
    one, z = begin(solver, batch, dim, dtype)
    torch.manual_seed(dim)
    other, _ = begin(solver, batch, dim, dtype)
    one.work.scratch = backend.scratch(one.x)
    assert (one.work.scratch is not None) == (dim == SPLIT)
    for number in range(6):
        advance(one, z, backend)
        advance(other, z, reference)
        assert_same_step(one, other, slack(solver, dtype))
        if number == 0:
            end_first_phase(one)
            end_first_phase(other)


@pytest.mark.parametrize(("solver", "dtype"), pairs(*DTYPES), ids=short)
@pytest.mark.parametrize("dim", [1, 31, 33, 132, 513])
def test_emulated_kernels_take_the_steps_of_the_reference(
    start: Start, solver: FixedPointSolver, dtype: torch.dtype, dim: int
) -> None:
    assert_same_steps(start(seed=dim), solver, len(MAPS), dim, dtype)


@pytest.mark.parametrize("dim", [5000, SPLIT], ids=["block", "split"])
@pytest.mark.parametrize(
    ("solver", "dtype"),
    [
        (Picard(), torch.float64),
        (Anderson(m=2), torch.float32),
        (NARROW, torch.float32),
        (Broyden(m=2), torch.float32),
    ],
    ids=short,
)
def test_large_samples_take_the_steps_of_the_reference(
    start: Start, solver: FixedPointSolver, dtype: torch.dtype, dim: int
) -> None:
    assert_same_steps(start(seed=1), solver, 4, dim, dtype)


@pytest.mark.parametrize("dim", [3, 260])
@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != NARROW], ids=short)
def test_whole_solves_agree_with_the_reference(
    start: Start, solver: FixedPointSolver, dim: int
) -> None:
    """On smooth maps rounding decides nothing: the same steps to the end, compacted or not."""
    scale = torch.linspace(-0.6, 0.9, dim, dtype=torch.float64)
    z = torch.randn(2, dim, dtype=torch.float64)

    def run(backend: Any, rowwise: bool) -> list[Tensor]:
        return list(
            iterate(
                lambda x, rows: scale * x + torch.tanh(0.1 * x) + (z if rows is None else z[rows]),
                0 * z,
                solver,
                rtol=1e-7,
                atol=0.0,
                max_steps=60,
                backend=backend,
                rowwise=rowwise,
            )
        )

    expected = run(reference, False)
    for rowwise in (False, True):
        value, status, num_steps, residual = run(start(), rowwise)
        assert status.tolist() == expected[1].tolist()
        assert num_steps.tolist() == expected[2].tolist()
        torch.testing.assert_close(value, expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(residual, expected[3], rtol=1e-4, atol=1e-12)


SCALES = [
    (solver, dtype, scale)
    for solver in (Anderson(m=3), NARROW, Broyden(m=3))
    for dtype, scale in (
        (torch.float32, 1e-20),
        (torch.float32, 1e20),
        (torch.float64, 1e-170),
        (torch.float64, 1e150),
    )
    # Products of two of Broyden's differences leave the range there, and it stays with Picard.
    if not (isinstance(solver, Broyden) and (scale > 1 or dtype == torch.float64))
    if dtype == torch.float32 or getattr(solver, "history_dtype", None) is None
]


# Blocks that share a sample sum alike for a narrow history, which has the range of float32.
IN_PARTS = [case for case in SCALES if case[0] != NARROW]


@pytest.mark.parametrize(
    ("solver", "dtype", "scale", "dim"),
    [*((*case, 33) for case in SCALES), *((*case, SPLIT) for case in IN_PARTS)],
    ids=short,
)
def test_squares_out_of_range_change_nothing(
    start: Start, solver: FixedPointSolver, dtype: torch.dtype, scale: float, dim: int
) -> None:
    if dtype == torch.float64 and isinstance(solver, Anderson):
        solver = Picard()  # its Gram matrix has nothing wider than double
    backend = start()
    ends = []
    for engine in (backend, reference):
        torch.manual_seed(0)
        b, z = begin(solver, 2, dim, dtype)
        b.work.scratch = engine.scratch(b.x)
        b.x.mul_(scale)
        for number in range(1, 11):
            gx = 0.9 * b.x + 0.05 * b.x.flip(-1) - 0.2 * b.x.roll(1, -1) + scale * z
            gx[0] = torch.nan if number == 8 else gx[0]
            step(engine, b.solver, b.work, b.x, gx, None, 1e-9, 50)
            if number == 1:
                end_first_phase(b)
        ends.append((b.x.double() / scale, b.work.residual / scale))
    for one, other in zip(*ends, strict=True):
        # One rounding of a narrow history that falls the other way is a step of 2^-8.
        tolerance = 1e-2 if solver == NARROW else 1e-3
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def bits(backend: Emulated, solver: FixedPointSolver, start: Tensor, z: Tensor,
         samples: Tensor, rowwise: bool = False) -> list[Tensor]:  # fmt: skip
    """The account of some samples of one problem, in the order asked for."""
    return list(
        iterate(
            lambda x, rows: g(x, z, samples if rows is None else samples[rows]),
            start[samples],
            solver,
            rtol=1e-4,
            atol=0.0,
            max_steps=9,
            backend=backend,
            rowwise=rowwise,
        )
    )


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


INVARIANT = [Picard(), Anderson(m=3), Broyden(m=2)]


@pytest.mark.parametrize("dim", [36, 777, SPLIT], ids=["warp", "block", "split"])
@pytest.mark.parametrize("solver", INVARIANT, ids=short)
def test_a_sample_gets_the_same_bits_in_any_batch(
    start: Start, solver: FixedPointSolver, dim: int
) -> None:
    """Alone, permuted, repeated or compacted; whatever order blocks and threads run in."""
    batch = 3 if dim == SPLIT else len(MAPS)
    b, z = begin(solver, batch, dim, torch.float32)
    whole = bits(start(), solver, b.x, z, torch.arange(batch))
    for samples, seed, rowwise in (
        (torch.tensor([2]), 1, False),
        (torch.arange(batch).flip(0), 2, True),
    ):
        part = bits(start(seed=seed), solver, b.x, z, samples, rowwise)
        assert_same_bits(part, [t[samples] for t in whole])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_alignment_costs_no_bits(start: Start, dtype: torch.dtype) -> None:
    solver = Anderson(m=2)
    b, z = begin(solver, 3, 516, dtype)
    every = torch.arange(3)
    aligned = bits(start(), solver, b.x, z, every)
    shifted = bits(start(offset=b.x.element_size()), solver, b.x, z, every)
    assert_same_bits(shifted, aligned)


@pytest.mark.parametrize("dim", [33, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("solver", INVARIANT, ids=short)
def test_a_stopped_sample_never_moves_again(
    start: Start, solver: FixedPointSolver, dim: int
) -> None:
    backend = start()
    b, z = begin(solver, 3, dim, torch.float32)
    b.work.scratch = backend.scratch(b.x)
    b.work.status[0] = Status.MAX_STEPS
    b.work.best[0] = 7.0
    before = [t[0].clone() for t in (b.x, b.work.best, b.work.control)]
    for _ in range(3):
        advance(b, z, backend)
    assert_same_bits(before, [t[0] for t in (b.x, b.work.best, b.work.control)])
    assert b.work.num_steps.tolist() == [0, 3, 3]


def test_samples_that_blocks_share_need_scratch(start: Start) -> None:
    b, z = begin(Picard(), 1, SPLIT, torch.float32)
    with pytest.raises(RuntimeError, match="need scratch, and none was given"):
        advance(b, z, start())


def test_an_empty_batch_and_samples_without_elements_pass(start: Start) -> None:
    backend = start()
    for shape in ((0, 5), (2, 0)):
        b, z = begin(Anderson(m=2), *shape, torch.float32)
        advance(b, z, backend)
        assert b.work.status.tolist() == [Status.CONVERGED] * shape[0]
