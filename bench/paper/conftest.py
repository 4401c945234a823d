"""The paper's tests, as those of tests/: the same numbers in each, and warnings heard there."""

from __future__ import annotations

from tests.conftest import pytest_collection_modifyitems, seed

__all__ = ["pytest_collection_modifyitems", "seed"]
