"""What every test shares: threads, hypothesis profiles, and the account of GPU tests."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from small_layers import Problem
    from tape import TapeGraphs

NO_GPU = "no CUDA device"

try:
    import hypothesis
except ImportError:  # the tests that need it are skipped by name
    pass
else:
    hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("default")

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels are then made for the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; tests of threading set their own number.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make each test draw the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin each test without verdicts on maps that it may share code with.

    Tracing each small g takes longer than its test: those that are about captures turn them on.
    """
    monkeypatch.setenv("FPI_CUDA_CAPTURE", "0")
    from fpi_cuda import coupling  # not before TRITON_INTERPRET is set

    for verdicts in (coupling.independent_maps, coupling.coupled_maps, coupling.kept_promises):
        verdicts.clear()


@pytest.fixture
def weights() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, A (norm 0.5) and C of the layers in small_layers, leaves that require grad."""
    a = torch.randn(4, 4, dtype=torch.float64)
    a = 0.5 * a / torch.linalg.matrix_norm(a, 2)
    z, c = (torch.randn(n, 2, dtype=torch.float64) for n in (3, 4))
    return z.requires_grad_(), a.requires_grad_(), c.requires_grad_()


@pytest.fixture
def problem() -> Problem:
    """The inputs of tanh(A x + z), leaves that require grad."""
    from small_layers import Problem

    a = torch.randn(4, 4, dtype=torch.float64)
    a = 0.5 * a / torch.linalg.matrix_norm(a, 2)
    return Problem(torch.randn(3, 4, dtype=torch.float64).requires_grad_(), a.requires_grad_())


@pytest.fixture
def heard() -> Iterator[list[warnings.WarningMessage]]:
    """Every warning of the test, under the filter that repeats all of them."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> TapeGraphs:
    """Let states on the CPU be captured, on a stand-in for CUDA graphs."""
    from tape import TapeGraphs  # not before TRITON_INTERPRET is set

    from fpi_cuda.loops import device as device_loop
    from fpi_cuda.loops.device.cache import PlanCache

    graphs = TapeGraphs()
    monkeypatch.setitem(device_loop.GRAPHS, "cpu", graphs)
    monkeypatch.setattr(device_loop, "plans", PlanCache())
    return graphs


# What torch itself says on a device, of this process or of a tool that a test asks for.
TORCH_SAYS = (
    "Attempting to run cuBLAS, but there was no current CUDA context",
    "Synchronization debug mode is a prototype feature",
)


# Tests stop solves early by the hundred, to look at what comes of it. That it is said, and once,
# is what tests/contract/test_9_not_converging_is_seen.py is about; it listens for itself. Samples
# without a gradient stay an error wherever no test expects them.
SAID_ELSEWHERE = "ignore:.* did not converge:fpi_cuda.FixedPointWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu tests where there is no device; let torch have its say where there is one."""
    there_is_one = torch.cuda.is_available()
    for item in items:
        # First in the list, so that what a test says for itself goes before it.
        item.add_marker(pytest.mark.filterwarnings(SAID_ELSEWHERE), append=False)
        if not item.get_closest_marker("gpu"):
            continue
        if not there_is_one:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        for words in TORCH_SAYS:
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{words}:UserWarning"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name every gpu test that was not run: nobody has checked what it would show."""
    skipped = terminalreporter.stats.get("skipped", [])
    names = [report.nodeid for report in skipped if NO_GPU in str(report.longrepr)]
    if names:
        terminalreporter.section(f"gpu tests not run: {NO_GPU}")
        for name in sorted(names):
            terminalreporter.write_line(f"NOT RUN {name}")
