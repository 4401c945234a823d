"""The user's g with its inputs bound, as a map of flat (B, D) tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from fpi_cuda.autograd.untouched import Untouched, parts_of
from fpi_cuda.dense import why_not_dense
from fpi_cuda.faithful import Replay
from fpi_cuda.moving_buffers import modules_of, moving_buffers
from fpi_cuda.shortcuts import why_not_hoisted
from fpi_cuda.state import Layout
from fpi_cuda.tensor_version import counted_version
from fpi_cuda.weight_cache import WeightCache

Watch = Callable[[Tensor, Tensor], None]
"""watch(x, gx): looks at an evaluation that was made."""

Recording = Callable[[Callable[[Any], Any], Any], Any]
"""record(g, state): g(state), written down."""


CHANGES_X_AT_TIMES = (
    "fixed_point: g must not change x in place in some evaluations only. Use out-of-place "
    "operations on it"
)
NOT_ROW_BY_ROW = (
    "fixed_point: with rowwise=True g is evaluated on some of the rows, and fails there: {}. Use "
    "rowwise=None, and rows that depend on one another are solved as one sample; or batch_dims=0, "
    "which makes the whole state one from the start"
)


@dataclass
class Habit:
    """What evaluations of a g have shown of it.

    Attributes:
        changes_x: g changes the x it is given, so each evaluation gets a copy; None: unknown.
        looked_after: how many of them were made by FlatMap._looked_after.
    """

    changes_x: bool | None = None
    looked_after: int = 0


class FlatMap:
    """x (B, D) -> g(x, *z) (B, D), checked at every evaluation.

    A g that offers `prepare(*z)` and `step(x, prepared)` has the first called once, here, where
    that is what calling it does.

    Attributes:
        g, layout, z, replay: as given.
        source_z: z, also where a mended map evaluates g on something else.
        hoisted: prepare and step stand for g.
        modules: that g is or holds.
        leaves_traces: g has buffers that may move; see over.
        whole: why they do not, so that g(x, *z) is called in every evaluation; None if they do.
            Asked of g where nobody has: "".
        read: what g reads besides x: what prepare returned, else z.
        damping: steps of g in one evaluation, and how long each is.
        arithmetic: what products in g are rounded to: autocast's dtype, else that of the state.
    """

    def __init__(
        self,
        g: Any,
        layout: Layout,
        z: tuple[Tensor, ...],
        replay: Replay,
        whole: str | None = "",
    ) -> None:
        self.g = g
        self.layout = layout
        self.z = z
        self.source_z = z
        self.replay = replay
        self.whole = why_not_hoisted(g) if whole == "" else whole
        self.hoisted = self.whole is None
        self.arithmetic = replay.autocast_dtype or layout.dtype
        # Shared by all maps that evaluate this g.
        self._habit = Habit()
        if self.hoisted:
            self._prepare_replay = Replay(layout.device, g, "prepare")
        self.modules = modules_of(g)
        self._buffers, self._prepare_buffers = moving_buffers(self.modules)
        self.leaves_traces = self._buffers is not None
        self._untouched = Untouched("z", z)
        self.read: Any = z
        if self.hoisted:
            untouched = self._untouched
            versions, copies = untouched.versions(), untouched.copies()
            self.read = self._prepare(z)
            untouched.require(versions, copies)
        self._selection: tuple[Tensor | None, Any] = (None, None)
        self._whole: Tensor | None = None
        self._mend: tuple[Tensor, int] | None = None
        self.damping = (1, 1.0)
        self._watch: Watch | None = None
        self._second_watch: Watch | None = None
        self._recording: Recording | None = None

    def reading(self, read: Any) -> FlatMap:
        """This map with other numbers in the place of `read`."""
        z = {} if self.hoisted else {"z": read, "source_z": read}
        return self._but(_selection=(None, None), read=read, **z)

    def part(self, begin: int, end: int) -> FlatMap:
        """This map for some of the samples, where g is row-wise and selectable."""
        read = self.read
        if isinstance(read, Tensor):
            rows: Any = read[begin:end]
        else:
            rows = type(read)(t[begin:end] for t in read)
        return self.reading(rows)._but(layout=replace(self.layout, batch=end - begin))

    def recorded(self, record: Recording) -> FlatMap:
        """This map with every evaluation of g on the whole batch made by `record`."""
        return self._but(_recording=record)

    def selectable(self) -> bool:
        """Whether rows of a row-wise g can be evaluated alone: all it reads has the batch."""
        return all(has_rows(part, self.layout.batch) for part in parts_of(self.read))

    def evaluate(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """g for a solver, without a graph; see fpi_cuda.solvers.loop.FlatMap."""
        if rows is None:
            self._whole = x
            return self._checked(x, self._call, self.read)
        if self.replay.stochastic:
            # Fewer rows would draw other random numbers.
            assert self._whole is not None
            whole = self._whole.index_copy(0, rows, x)
            self._whole = whole
            return self._checked(whole, self._call, self.read)[rows]
        if self._selection[0] is not rows:
            self._selection = (rows, select(self.read, rows))
        return self._of_some(x, self._selection[1])

    def _of_some(self, x: Tensor, selected: Any) -> Tensor:
        """g of some rows of a row-wise map, given as much of what it reads."""
        try:
            if self.hoisted:
                return self._checked(x, lambda state: self.g.step(state, selected), selected)
            return self._checked(x, lambda state: self.g(state, *selected), selected)
        except (RuntimeError, ValueError, IndexError) as error:
            assert self._whole is not None
            self._checked(self._whole, self._call, self.read)  # or it fails here too
            raise RuntimeError(NOT_ROW_BY_ROW.format(first_line(error))) from error

    def __call__(self, x: Tensor) -> Tensor:
        """g of the whole batch, with the graph that the grad mode allows."""
        return self._iterated(x, self._call, self.read)

    def with_inputs(self, x: Tensor, z: Sequence[Tensor]) -> Tensor:
        """g(x, *z) once more, x (B, D), with other tensors in the place of z."""

        def call(state: Any) -> Any:
            if self.hoisted:
                return self.g.step(state, self._prepare(z))
            return self.g(state, *z)

        if self._mend is not None:
            z = self._mended_inputs(z, *self._mend)
        return self._iterated(x, call, z)

    def bound(self, z: Sequence[Tensor]) -> FlatMap:
        """This map with other tensors in the place of z."""
        z = tuple(z)
        read = self._prepare(z) if self.hoisted else z
        return self._but(_selection=(None, None), z=z, source_z=z, read=read)

    def called_by(self, call: Callable[..., Any]) -> FlatMap:
        """This map, where each call of g, or of what stands for it, is call(function, *args)."""
        return self._but(g=Called(self.g, call))

    def damped(self, steps: int, damping: float) -> FlatMap:
        """The map x <- x + damping (g(x) - x), so many times."""
        return self._but(damping=(steps, damping))

    def watched(self, watch: Watch) -> FlatMap:
        """This map, whose calls show `watch` the x that they are given and g at it."""
        return self._but(_watch=watch)

    def watched_twice(self, watch: Watch) -> FlatMap:
        """This map, damped, whose second step in one evaluation is shown to `watch`."""
        return self._but(_second_watch=watch)

    def mended(self, bad: Tensor) -> FlatMap:
        """This map with a good sample's x and z in the place of those of the bad ones.

        Args:
            bad: (B,) bool, not all True.
        """
        good = first_good(bad)
        z = tuple(self._mended_inputs(self.source_z, bad, good))
        return self._but(_mend=(bad, good), z=z, read=self._prepare(z) if self.hoisted else z)

    def _but(self, **other: Any) -> FlatMap:
        """This map with some attributes other ones."""
        again = FlatMap.__new__(FlatMap)
        again.__dict__ = self.__dict__ | other
        return again

    def _mended_inputs(self, z: Sequence[Tensor], bad: Tensor, good: int) -> list[Tensor]:
        batch = self.layout.batch
        return [replace_rows(t, bad, good) if has_rows(t, batch) else t for t in z]

    def over(self) -> None:
        """The call has ended: evaluations from now on leave no trace in g."""
        for buffers in (self._buffers, self._prepare_buffers):
            if buffers is not None:
                buffers.over()

    def _prepare(self, z: Sequence[Tensor]) -> Any:
        prepare = functools.partial(self.g.prepare, *z)
        if self._prepare_buffers is None:
            return self._prepare_replay(prepare)
        with self._prepare_buffers.one_evaluation():
            return self._prepare_replay(prepare)

    def _iterated(self, x: Tensor, call: Callable[[Any], Any], read: Any) -> Tensor:
        if self._mend is not None:
            x = replace_rows(x, *self._mend)
        steps, damping = self.damping
        for step in range(steps):
            gx = self._checked(x, call, read)
            if self._watch is not None and step == 0:
                self._watch(x, gx)
            if self._second_watch is not None and step == 1:
                self._second_watch(x, gx)
            x = gx if damping == 1.0 else x + damping * (gx - x)
        return x

    def _call(self, state: Any) -> Any:
        if self._recording is not None:
            return self._recording(self._direct, state)
        return self._direct(state)

    def _direct(self, state: Any) -> Any:
        if self.hoisted:
            return self.g.step(state, self.read)
        return self.g(state, *self.read)

    def _checked(self, x: Tensor, call: Callable[[Any], Any], read: Any) -> Tensor:
        """`call` on the state in x, laid out flat again; it must not change what it reads.

        A solver comes here at every step. What an evaluation may need besides a call of g is
        known from the first one, and from the two switches that somebody may have turned since.
        """
        untouched = self._untouched
        if untouched.read is not read:
            name = "what prepare returned" if self.hoisted else "z"
            untouched = self._untouched = Untouched(name, read)
        if (
            self._habit.changes_x is not False
            or self._buffers is not None
            or untouched.uncounted
            or not self.replay.is_plain
            or x.is_inference()
            or type(parametrize._cache) is not WeightCache
            or any(map(torch.is_autocast_enabled, self.replay.device_types))
        ):
            return self._looked_after(x, call, untouched)
        version, versions = counted_version(x), [*map(counted_version, untouched.counted)]
        gx = call(self._state_in(x, writable=False))
        if [*map(counted_version, untouched.counted)] != versions:
            untouched.require(versions)
        if counted_version(x) != version:
            raise ValueError(CHANGES_X_AT_TIMES)
        return self._flattened(gx, x)

    def _looked_after(self, x: Tensor, call: Callable[[Any], Any], untouched: Untouched) -> Tensor:
        """The same with everything seen to that an evaluation may need besides a call of g."""
        habit = self._habit
        # Inference tensors do not count how often they were changed.
        copies = habit.changes_x is not False or x.is_inference()
        given = x.clone() if copies else x
        counted = [*untouched.counted] if given.is_inference() else [*untouched.counted, given]
        before = [*map(counted_version, counted)]
        # From x = 0 the first evaluation may change nothing.
        kept = untouched.copies() if untouched.uncounted and habit.looked_after < 2 else []
        evaluation = functools.partial(call, self._state_in(given, writable=copies))

        def again() -> Any:
            return call(self._state_in(x.clone() if copies else x, writable=copies))

        if self._buffers is None:
            gx = self.replay(evaluation, again)
        else:
            with self._buffers.one_evaluation():
                gx = self.replay(evaluation, again)
        after = [*map(counted_version, counted)]
        if kept or after != before:
            untouched.require(before[: len(untouched.counted)], kept)
        changed = after != before
        if changed and not copies:
            raise ValueError(CHANGES_X_AT_TIMES)
        if habit.changes_x is None:
            habit.changes_x = changed
        habit.looked_after += 1
        return self._flattened(gx, x)

    def _state_in(self, x: Tensor, *, writable: bool) -> Any:
        """The user's state that lies in x (n, D)."""
        layout = self.layout
        if layout.is_tuple:
            return layout.unflatten(x, writable=writable)
        return x.reshape(x.shape[: layout.batch_dims] + layout.shapes[0])

    def _flattened(self, gx: Any, x: Tensor) -> Tensor:
        """gx (n, D), if it is like the state in x; what autocast made of its dtype is undone."""
        layout, low = self.layout, self.replay.autocast_dtype
        if low is not None:
            if isinstance(gx, Tensor):
                gx = self._widened(gx, low)
            elif isinstance(gx, (tuple, list)):
                gx = tuple(self._widened(t, low) if isinstance(t, Tensor) else t for t in gx)
        if (
            type(gx) is not Tensor
            or layout.is_tuple
            or gx.layout != torch.strided
            or gx.is_nested
            or gx.shape != x.shape[: layout.batch_dims] + layout.shapes[0]
            or gx.dtype != layout.dtype
            or gx.device != layout.device
        ):
            layout.require_like(gx, x.shape[0])
            return layout.flatten(gx)
        return gx if gx.shape == x.shape and not gx.requires_grad else gx.reshape(x.shape)

    def _widened(self, gx: Tensor, low: torch.dtype) -> Tensor:
        return gx.to(self.layout.dtype) if gx.dtype == low else gx


class Called:
    """g, every call of which, or of what stands for it, is made by somebody else."""

    def __init__(self, g: Any, call: Callable[..., Any]) -> None:
        self._g = g
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(self._g, *args)

    def prepare(self, *z: Tensor) -> Any:
        return self._call(self._g.prepare, *z)

    def step(self, state: Any, prepared: Any) -> Any:
        return self._call(self._g.step, state, prepared)


def first_line(error: Exception) -> str:
    """What an error says, without what follows."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def has_rows(part: object, batch: int) -> bool:
    """Whether part is a tensor with one row for each sample, which can be taken one by one."""
    if not isinstance(part, Tensor) or why_not_dense(part) is not None:
        return False
    return part.dim() > 0 and part.shape[0] == batch


def select(read: Any, rows: Tensor) -> Any:
    """Rows of a tensor, or of each tensor in a tuple, list or named tuple."""
    if isinstance(read, Tensor):
        return read.index_select(0, rows)
    selected = (part.index_select(0, rows) for part in read)
    return read._make(selected) if hasattr(read, "_make") else type(read)(selected)


def first_good(bad: Tensor) -> int:
    """The first sample that is not bad (B,); 0 where all are."""
    return int(torch.argmin(bad.to(torch.uint8)))


def replace_rows(t: Tensor, bad: Tensor, good: int) -> Tensor:
    """t with row `good`, as a constant, in the place of its bad rows."""
    mask = bad.reshape(-1, *[1] * (t.dim() - 1))
    return torch.where(mask, t[good].detach(), t)
