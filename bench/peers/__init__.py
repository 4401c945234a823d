"""The libraries that the benchmark compares, one file each, behind one small protocol."""

from __future__ import annotations

import importlib

from bench.peers.base import Entry, Peer

MODULES = ("ours", "loop", "compiled", "torchdeq", "xitorch", "jaxopt", "optimistix")

__all__ = ["MODULES", "Entry", "Peer", "load_entries"]


def load_entries(modules: tuple[str, ...] = MODULES) -> tuple[list[Entry], dict[str, str]]:
    """The rows of every library that imports, and the reason for every one that does not."""
    entries: list[Entry] = []
    skipped: dict[str, str] = {}
    for name in modules:
        try:
            module = importlib.import_module(f"bench.peers.{name}")
        except ImportError as error:
            skipped[name] = f"not installed ({error})"
            continue
        entries.extend(module.entries())
    return entries, skipped
