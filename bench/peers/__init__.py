"""The libraries that the benchmark compares, one file each, behind one small protocol."""

from __future__ import annotations

import importlib
import os

from bench.peers.base import Entry, Peer
from bench.record import reason

MODULES = ("ours", "loop", "compiled", "torchdeq", "xitorch", "jaxopt", "optimistix")
WORTH = (
    "fpi_cuda", "torch loop", "CUDA graph", "torchdeq", "jaxopt", "torch.compile", "optimistix",
    "xitorch",
)  # fmt: skip
"""Libraries in the order in which they are measured where time may run out."""

__all__ = ["MODULES", "Entry", "Peer", "by_worth", "load_entries"]

# JAX would take most of the card at its first array; it reads this when it is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def load_entries(modules: tuple[str, ...] = MODULES) -> tuple[list[Entry], dict[str, str]]:
    """The rows of every library that can be used here, and why one cannot."""
    entries: list[Entry] = []
    skipped: dict[str, str] = {}
    for name in modules:
        try:
            entries += importlib.import_module(f"bench.peers.{name}").entries()
        except ImportError as error:
            skipped[name] = f"not installed ({error})"
        except Exception as error:  # an old library on a new JAX
            skipped[name] = reason(error)
    return entries, skipped


def by_worth(entries: list[Entry]) -> list[Entry]:
    """The same in the order to measure them: ours first, the libraries' defaults last."""

    def rank(entry: Entry) -> tuple[bool, int]:
        default = entry.label.endswith("(default)")
        return default, WORTH.index(entry.library) if entry.library in WORTH else len(WORTH)

    return sorted(entries, key=rank)
