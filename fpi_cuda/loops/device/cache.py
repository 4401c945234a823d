"""Plans that wait for their next solve, each lent to one call at a time, not too many of them."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from fpi_cuda.loops.device.cuda_graphs import Refused, errors_refused
from fpi_cuda.loops.device.plan import Key, Plan
from fpi_cuda.solution import SolveResult

MOST_PLANS = 32
MOST_BYTES = 8 * 2**30
# Kept even if they are larger: a solve and its adjoint.
LEAST_PLANS = 2
# A map that was another computation this often in a row is one each time.
MOST_REBUILDS = 3
# A refusal is tried again after this many solves: g may have changed.
RETRY_AFTER = 1000
# What is remembered of keys, with a plan or without.
MOST_KEYS = 1024


@dataclass
class KeyRecord:
    """What is remembered of a key.

    Attributes:
        refusal: why there can be no plan, for as many solves as are left.
        rebuilds: how often in a row a plan did not fit its map any more.
    """

    refusal: str = ""
    left: int = 0
    rebuilds: int = 0


class PlanCache:
    """Idle plans by key, the least recently used of which makes room.

    A plan that is lent is no idle one, so no two calls ever share one. Plans of a module go when
    the module does. Safe to use from any thread.
    """

    def __init__(self, most_plans: int = MOST_PLANS, most_bytes: int = MOST_BYTES) -> None:
        self._lock = threading.Lock()
        self._most_plans = most_plans
        self._most_bytes = most_bytes
        self._idle: list[Plan] = []
        # And whether to keep them when they come back.
        self._lent: dict[Plan, bool] = {}
        self._records: OrderedDict[Key, KeyRecord] = OrderedDict()
        # By id, the modules and functions of keys. The garbage collector calls _died at any time
        # and on any thread.
        self._watched: dict[int, weakref.finalize] = {}  # type: ignore[type-arg]
        self._any_died = False

    def take(self, key: Key) -> Plan | None:
        """An idle plan of this key, the caller's until it is given back; None: there is none."""
        with self._lock:
            found = next((plan for plan in reversed(self._idle) if plan.key == key), None)
            if found is not None:
                self._idle.remove(found)
                self._lent[found] = True
            return found

    def has(self, key: Key) -> bool:
        """Whether a plan of this key is idle or lent."""
        with self._lock:
            return any(plan.key == key for plan in (*self._idle, *self._lent))

    def give_back(self, plan: Plan) -> None:
        """Keep a plan that served its call for the next one."""
        with self._lock:
            closing = self._without_dead()
            if self._lent.pop(plan):
                self._idle.append(plan)
                self._watch(plan.key)
            else:
                closing.append(plan)
            while len(self._idle) > self._most_plans or (
                len(self._idle) > LEAST_PLANS
                and sum(idle.memory for idle in self._idle) > self._most_bytes
            ):
                closing.append(self._idle.pop(0))
        close(closing)

    def discard(self, plan: Plan) -> None:
        """Drop a lent plan that is of no use any more."""
        with self._lock:
            del self._lent[plan]
        plan.close()

    def solve(self, key: Key, *arguments: Any) -> SolveResult | None:
        """By an idle plan of this key; None: there is none that fits, and one is worth making.

        Raises:
            Refused: there was one too often that did not fit.
        """
        plan = self.take(key)
        if plan is None:
            return None
        try:
            result = plan.solve(*arguments)
        except Refused as reason:
            if self.outgrown(plan, reason):
                return None
            raise
        except BaseException:
            self.discard(plan)
            raise
        with self._lock:
            record = self._records.get(key)
            if record is not None:
                record.rebuilds = 0
        self.give_back(plan)
        return result

    @contextlib.contextmanager
    def made(self, plan: Plan) -> Iterator[None]:
        """Lend a plan to who builds it, and keep it where that succeeds.

        Raises:
            Refused: for any error. g works, so it comes of its being recorded and captured; if not,
                the host loop will meet it too.
        """
        with self._lock:
            self._lent[plan] = True
        try:
            with errors_refused("g fails while it is captured: ", Exception):
                yield
        except BaseException as error:
            self.discard(plan)
            if isinstance(error, Refused):
                self.refuse(plan.key, error)
            raise
        self.give_back(plan)

    def outgrown(self, plan: Plan, reason: Refused) -> bool:
        """Drop a lent plan that does not fit its map any more; whether another is worth making."""
        self.discard(plan)
        with self._lock:
            record = self._record(plan.key)
            record.rebuilds += 1
        if record.rebuilds < MOST_REBUILDS:
            return True
        self.refuse(plan.key, reason)
        return False

    def refuse(self, key: Key, reason: Refused) -> None:
        """Remember for a while that there can be no plan of this key, if that is to last."""
        if not reason.passing:
            with self._lock:
                record = self._record(key)
                record.refusal, record.left = str(reason), RETRY_AFTER

    def refusal(self, key: Key) -> str | None:
        """Why there can be no plan of this key, or None where one may be tried."""
        with self._lock:
            record = self._records.get(key)
            if record is None or record.left == 0:
                return None
            record.left -= 1
            return record.refusal

    def first_sight(self, key: Key) -> bool:
        """Whether this key was never asked about before."""
        with self._lock:
            first = key not in self._records
            self._record(key)
            return first

    def clear(self) -> None:
        """Drop every plan and every refusal; plans at work are dropped when they are done."""
        with self._lock:
            closing, self._idle = self._idle, []
            self._lent = dict.fromkeys(self._lent, False)
            self._records.clear()
        close(closing)

    def memory(self) -> int:
        """Bytes held by all plans."""
        with self._lock:
            return sum(plan.memory for plan in (*self._idle, *self._lent))

    def __len__(self) -> int:
        with self._lock:
            return len(self._idle) + len(self._lent)

    def _record(self, key: Key) -> KeyRecord:
        """What is remembered of a key, the oldest of which is forgotten; the lock is held."""
        record = self._records.setdefault(key, KeyRecord())
        self._records.move_to_end(key)
        if len(self._records) > MOST_KEYS:
            self._records.popitem(last=False)
        return record

    def _watch(self, key: Key) -> None:
        for reference in references_in(key):
            module = reference()
            if module is not None and id(module) not in self._watched:
                self._watched[id(module)] = weakref.finalize(module, self._died)
                self._watched[id(module)].atexit = False

    def _died(self) -> None:
        self._any_died = True
        # The collector may run while this very thread holds the lock.
        if self._lock.acquire(blocking=False):
            try:
                closing = self._without_dead()
            finally:
                self._lock.release()
            close(closing)

    def _without_dead(self) -> list[Plan]:
        """Take out the plans of modules that are gone; the lock is held."""
        if not self._any_died:
            return []
        self._any_died = False
        self._watched = {n: watch for n, watch in self._watched.items() if watch.alive}
        self._lent = {p: keep and not holds_dead(p.key) for p, keep in self._lent.items()}
        gone = [plan for plan in self._idle if holds_dead(plan.key)]
        self._idle = [plan for plan in self._idle if plan not in gone]
        return gone


def references_in(key: Hashable) -> Iterator[weakref.ref[Any]]:
    """Weak references to modules and functions anywhere in a key."""
    if isinstance(key, weakref.ref):
        yield key
    elif isinstance(key, tuple):
        for part in key:
            yield from references_in(part)


def holds_dead(key: Hashable) -> bool:
    """Whether a module or function of the key is gone."""
    return any(reference() is None for reference in references_in(key))


def close(plans: list[Plan]) -> None:
    """Close them, without the lock: that may take a while."""
    for plan in plans:
        plan.close()
