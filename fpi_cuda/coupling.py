"""What is known of whether the rows of a state depend on one another."""

from __future__ import annotations

import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from typing import Any

from torch import nn

from fpi_cuda.evaluation.bound_map import BoundMap
from fpi_cuda.evaluation.same_value import version_of
from fpi_cuda.options import Options, Picard

MOST_VERDICTS = 1024


class Coupling:
    """What one call of fixed_point has found out, shared by its solve and its derivatives.

    Args:
        key: equal for solves of the same map with states of the same shape.
        together: how many rows in succession may depend on one another, at least 2: the samples of
            vmaps do not.
    Attributes:
        together: as given.
        joint: the rows depend on one another, so all of them are solved as one sample.
        independent: an earlier solve of the same map showed no sign of that. It spares the next
            one the probe and the early looks, not the last look.
        suspected: the latest solve of the same map did.
    """

    def __init__(self, key: Hashable, together: int) -> None:
        self._key = key
        self.together = together
        self.joint = False
        self.independent = key in independent_maps
        self.suspected = key in coupled_maps

    def depends(self) -> None:
        """Note that a row was seen to depend on others."""
        self.joint = True
        if not self.suspected:
            self.independent = False
            independent_maps.discard(self._key)
            coupled_maps.add(self._key)

    def is_independent(self) -> None:
        """Note that a solve has ended without any sign of that."""
        if not self.independent:
            self.independent = True
            independent_maps.add(self._key)
            coupled_maps.discard(self._key)


class Verdicts:
    """Keys of maps of which something was found; the oldest is forgotten first."""

    def __init__(self, most: int = MOST_VERDICTS) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._known: OrderedDict[Hashable, None] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._known

    def add(self, key: Hashable) -> None:
        """Remember the key."""
        with self._lock:
            self._known[key] = None
            while len(self._known) > self._most:
                self._known.popitem(last=False)

    def discard(self, key: Hashable) -> None:
        """Forget the key."""
        with self._lock:
            self._known.pop(key, None)

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._known.clear()


independent_maps = Verdicts()
"""Maps of this process whose latest solve showed no dependence between rows."""

coupled_maps = Verdicts()
"""Those whose latest solve did. Every solve finds that out anew, for it costs one evaluation, and a
map that no longer does so must get its samples apart."""


kept_promises = Verdicts()
"""Maps that were promised to be row-wise, and seen to be."""


def exactly(g: Any) -> Hashable:
    """Equal for the very g, as far as that shows, with the weights that it has."""
    if isinstance(g, partial):
        return ("partial", exactly(g.func))
    if isinstance(g, types.MethodType):
        return ("method", weakref.ref(g.__func__), exactly(g.__self__))
    if isinstance(g, nn.Module):
        versions = sum(map(version_of, g.parameters()))
        return ("module", weakref.ref(g), getattr(g, "training", None), versions)
    try:
        return weakref.ref(g)
    except TypeError:
        return object()  # equal to nothing


def site_of(g: Any) -> Hashable:
    """What stays the same from solve to solve of one layer."""
    if isinstance(g, partial):
        return ("partial", site_of(g.func))
    if isinstance(g, types.MethodType):
        return ("method", site_of(g.__func__), site_of(g.__self__))
    if isinstance(g, types.FunctionType):
        return ("function", weakref.ref(g.__code__))
    if isinstance(g, nn.Module):
        return ("module", weakref.ref(g), getattr(g, "training", None))
    return ("object", type(g))


def coupling_of(bound_map: BoundMap, options: Options) -> Coupling | None:
    """What is known of whether rows depend on one another; None where they cannot."""
    layout = bound_map.layout
    # Those of a vmap g does not couple.
    rows = layout.batch if layout.together is None else layout.together
    return None if rows < 2 else Coupling(key_of(bound_map, options), rows)


def key_of(bound_map: BoundMap, options: Options) -> tuple[Hashable, ...]:
    """Equal for solves of the same map with states of the same shape, by solvers that probe it."""
    layout = bound_map.layout
    shapes = (layout.batch, layout.shapes, *[None if t.is_nested else t.shape for t in bound_map.z])
    probed = not isinstance(options.solver, Picard)
    return site_of(bound_map.g), shapes, layout.dtype, layout.device, probed
