"""Plans that wait for their next solve, each lent to one call at a time, not too many of them."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from fpi_cuda.loops.device.graphs import Refused

Key = tuple[Hashable, ...]

MOST_PLANS = 32
MOST_BYTES = 8 * 2**30
# Kept even if they are larger: a solve and its adjoint.
LEAST_PLANS = 2
# A map that was another computation this often in a row is one each time.
MOST_REBUILDS = 3
# A refusal is tried again after this many solves: g may have changed.
RETRY_AFTER = 1000
# What is remembered of keys without a plan.
MOST_KEYS = 1024


class Cached(Protocol):
    """What the cache needs of a plan.

    Attributes:
        key: where it is kept.
        memory: bytes that it holds.
    """

    key: Key

    @property
    def memory(self) -> int: ...

    def close(self) -> None:
        """Give the memory back."""


@dataclass
class Refusal:
    """A key that is not tried for a while."""

    reason: str
    left: int


class PlanCache:
    """Idle plans by key, the least recently used of which makes room.

    A plan that is lent is not in here, so no two calls ever share one. Plans of a module go when
    the module does. Safe to use from any thread.
    """

    def __init__(self, most_plans: int = MOST_PLANS, most_bytes: int = MOST_BYTES) -> None:
        self._lock = threading.Lock()
        self._most_plans = most_plans
        self._most_bytes = most_bytes
        self._idle: OrderedDict[int, Cached] = OrderedDict()
        self._lent: dict[int, Cached] = {}
        self._orphaned: set[int] = set()
        self._refusals: OrderedDict[Key, Refusal] = OrderedDict()
        self._rebuilds: OrderedDict[Key, int] = OrderedDict()
        self._seen: OrderedDict[Key, None] = OrderedDict()
        # Filled by the garbage collector, at any time and on any thread.
        self._dead: deque[Hashable] = deque()
        self._watched: dict[Hashable, weakref.finalize] = {}  # type: ignore[type-arg]

    def take(self, key: Key) -> Cached | None:
        """An idle plan of this key, the caller's until it is given back; None: there is none."""
        with self._lock:
            closing = self._without_dead()
            found = next((p for p in reversed(self._idle.values()) if p.key == key), None)
            if found is not None:
                del self._idle[id(found)]
                self._lent[id(found)] = found
        close(closing)
        return found

    def has(self, key: Key) -> bool:
        """Whether a plan of this key is idle or lent."""
        with self._lock:
            return any(p.key == key for p in (*self._idle.values(), *self._lent.values()))

    def lend(self, plan: Cached) -> None:
        """Count a plan that was just made as the caller's."""
        with self._lock:
            self._lent[id(plan)] = plan

    def give_back(self, plan: Cached, *, fitted: bool = False) -> None:
        """Keep a plan that served its call for the next one; `fitted`: it was there before."""
        with self._lock:
            self._lent.pop(id(plan), None)
            if fitted:
                self._rebuilds.pop(plan.key, None)
            closing = self._without_dead()
            if id(plan) in self._orphaned:
                self._orphaned.discard(id(plan))
                closing.append(plan)
            else:
                self._idle[id(plan)] = plan
                self._watch_module(plan.key)
            while self._too_much():
                closing.append(self._idle.popitem(last=False)[1])
        close(closing)

    def discard(self, plan: Cached) -> None:
        """Drop a lent plan that is of no use any more."""
        with self._lock:
            self._lent.pop(id(plan), None)
            self._orphaned.discard(id(plan))
        plan.close()

    def refuse(self, key: Key, reason: Refused) -> None:
        """Remember for a while that there can be no plan of this key, if that is to last."""
        if reason.passing:
            return
        with self._lock:
            self._refusals[key] = Refusal(str(reason), RETRY_AFTER)
            bound(self._refusals)

    def refusal(self, key: Key) -> str | None:
        """Why there can be no plan of this key, or None where one may be tried."""
        with self._lock:
            refusal = self._refusals.get(key)
            if refusal is None:
                return None
            refusal.left -= 1
            if refusal.left <= 0:
                del self._refusals[key]
            return refusal.reason

    def first_sight(self, key: Key) -> bool:
        """Whether this key was never asked about before."""
        with self._lock:
            if key in self._seen:
                self._seen.move_to_end(key)
                return False
            self._seen[key] = None
            bound(self._seen)
            return True

    def count_rebuild(self, key: Key) -> bool:
        """Note that a plan did not fit its map any more; whether another is worth making."""
        with self._lock:
            count = self._rebuilds.pop(key, 0) + 1
            self._rebuilds[key] = count
            bound(self._rebuilds)
            return count < MOST_REBUILDS

    def clear(self) -> None:
        """Drop every plan and every refusal; plans at work are dropped when they are done."""
        with self._lock:
            closing = list(self._idle.values())
            self._idle.clear()
            self._orphaned.update(self._lent)
            self._refusals.clear()
            self._rebuilds.clear()
            self._seen.clear()
        close(closing)

    def memory(self) -> int:
        """Bytes held by all plans."""
        with self._lock:
            return sum(p.memory for p in (*self._idle.values(), *self._lent.values()))

    def __len__(self) -> int:
        with self._lock:
            return len(self._idle) + len(self._lent)

    def _too_much(self) -> bool:
        count = len(self._idle)
        held = sum(plan.memory for plan in self._idle.values())
        return count > self._most_plans or (count > LEAST_PLANS and held > self._most_bytes)

    def _watch_module(self, key: Key) -> None:
        for module in modules_in(key):
            if id(module) not in self._watched:
                self._watched[id(module)] = weakref.finalize(module, self._died, id(module))
                self._watched[id(module)].atexit = False

    def _died(self, number: int) -> None:
        self._dead.append(number)
        # The collector may run while this very thread holds the lock.
        if self._lock.acquire(blocking=False):
            try:
                closing = self._without_dead()
            finally:
                self._lock.release()
            close(closing)

    def _without_dead(self) -> list[Cached]:
        """Take out the plans of modules that are gone; the lock is held."""
        if not self._dead:
            return []
        while self._dead:
            self._watched.pop(self._dead.popleft(), None)
        gone = [number for number, plan in self._idle.items() if holds_dead(plan.key)]
        self._orphaned.update(number for number, p in self._lent.items() if holds_dead(p.key))
        return [self._idle.pop(number) for number in gone]


def bound(memories: OrderedDict[Key, Any]) -> None:
    """Forget the oldest keys."""
    while len(memories) > MOST_KEYS:
        memories.popitem(last=False)


def references_in(key: Hashable) -> Iterator[weakref.ref[Any]]:
    """Weak references to modules and functions anywhere in a key."""
    if isinstance(key, weakref.ref):
        yield key
    elif isinstance(key, tuple):
        for part in key:
            yield from references_in(part)


def modules_in(key: Hashable) -> list[Any]:
    """The modules and functions of a key that are alive."""
    return [module for module in (ref() for ref in references_in(key)) if module is not None]


def holds_dead(key: Hashable) -> bool:
    """Whether a module or function of the key is gone."""
    return any(ref() is None for ref in references_in(key))


def close(plans: list[Cached]) -> None:
    """Close them, without the lock: that may take a while."""
    for plan in plans:
        plan.close()
