"""What the tests of the contract share."""

from __future__ import annotations

import pytest

from fpi_cuda import coupling


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    """Every test begins without verdicts on maps that it may share code with."""
    for verdicts in (coupling.independent_maps, coupling.coupled_maps, coupling.kept_promises):
        verdicts.clear()
