"""Counts the solves that run as one loop."""

from __future__ import annotations

from typing import Any

import pytest

from fpi_cuda.ops import native


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each solve that runs as one loop."""
    calls: list[int] = []
    op = native.cell_loop_

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        op(*args, **kwargs)

    monkeypatch.setattr(native, "cell_loop_", counted)
    return calls


@pytest.fixture(autouse=True)
def capturing(nothing_known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a g be captured, as outside of the tests."""
    monkeypatch.setenv("FPI_CUDA_CAPTURE", "1")
