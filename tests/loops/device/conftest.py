"""Solves on the CPU may be captured by a stand-in for CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tape import TapeGraphs

from fpi_cuda.loops import device as device_loop
from fpi_cuda.loops.device.cache import PlanCache


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[TapeGraphs]:
    """Let states on the CPU be captured, in a process that has captured nothing yet."""
    graphs = TapeGraphs()
    monkeypatch.setitem(device_loop.GRAPHS, "cpu", graphs)
    monkeypatch.setattr(device_loop, "plans", PlanCache())
    yield graphs
    assert graphs.open == 0
