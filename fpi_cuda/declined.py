"""How a loop says that it does not run a solve, or its adjoint."""

from __future__ import annotations


class Declined(Exception):
    """The text says why. The next loop is taken, unless this one was asked for by name."""
