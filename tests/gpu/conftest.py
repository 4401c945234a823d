"""Plans of each test alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fpi_cuda.loops import device as device_loop
from fpi_cuda.loops.device import PlanCache


@pytest.fixture
def own_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlanCache]:
    """Plans of this test alone, freed when it ends."""
    plans = PlanCache()
    monkeypatch.setattr(device_loop, "plans", plans)
    yield plans
    plans.clear()
