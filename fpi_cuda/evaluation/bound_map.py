"""The user's g with its inputs bound, as a map of flat (B, D) tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.evaluation import transforms
from fpi_cuda.evaluation.buffers import MovingBuffers
from fpi_cuda.evaluation.context import UNSEEN_YET, EvaluationContext, WeightCache, weight_cache
from fpi_cuda.evaluation.modules import modules_of, whose_buffers_may_move
from fpi_cuda.evaluation.same_value import counted_version, same_value
from fpi_cuda.evaluation.state import Layout, why_not_dense

Watch = Callable[[int, Tensor, Tensor], None]
"""watch(step, x, gx): looks at one of the steps that a call has made."""

Recording = Callable[[Callable[[Any], Any], Any], Any]
"""record(g, state): g(state), written down."""

StandIn = Callable[[Tensor], "Callable[[Tensor], Any] | None"]
"""stand_in(state): what gives g of such states as well; None: g alone does."""


CHANGES_X_AT_TIMES = (
    "fixed_point: g must not change x in place in some evaluations only. Use out-of-place "
    "operations on it"
)
NOT_ROW_BY_ROW = (
    "fixed_point: with rowwise=True g is evaluated on some of the rows, and fails there: {}. Use "
    "rowwise=None, and rows that depend on one another are solved as one sample; or batch_dims=0, "
    "which makes the whole state one from the start"
)


class BoundMap:
    """x (B, D) -> g(x, *z) (B, D), checked at every evaluation.

    Args:
        hoisted: prepare and step stand for g: prepare(*z) is called once, here.
    Attributes:
        g, layout, z, hoisted: as given.
        context: what surrounds evaluations of g.
        modules: that g is or holds.
        buffers: that evaluations of g, and of its prepare, may move; none where there are none.
        read: what g reads besides x: what prepare returned, else z; of failed samples, perhaps,
            that of another.
        damping: steps of g in one evaluation, and how long each is.
        arithmetic: what products in g are rounded to: autocast's dtype, else that of the state.
    """

    def __init__(
        self,
        g: Any,
        layout: Layout,
        z: tuple[Tensor, ...],
        *,
        hoisted: bool = False,
    ) -> None:
        self.context = context = EvaluationContext(layout.device, g)
        of_prepare = EvaluationContext(layout.device, g, "prepare") if hoisted else context
        self.g = g
        self.layout = layout
        self.z = z
        self.hoisted = hoisted
        self.arithmetic = context.autocast_dtype or layout.dtype
        self.modules = modules_of(g)
        self.buffers: tuple[MovingBuffers, ...] = ()
        moving = whose_buffers_may_move(self.modules)
        if moving:
            self.buffers = (MovingBuffers(moving, context), MovingBuffers(moving, of_prepare))
        runs: Sequence[Callable[..., Any]] = self.buffers or (context, of_prepare)
        self._run, self._prepared = runs
        self._named = "what prepare returned" if hoisted else "z"
        self._read_only = ReadOnly("z", z)
        self._recording: Recording | None = None
        self.read = self._read_of(z)
        self._selection: tuple[Tensor | None, Any] = (None, None)
        self._whole: Tensor | None = None
        self._failed: Tensor | None = None
        self.damping = (1, 1.0)
        self._watch: Watch | None = None

    def reading(self, read: Any) -> BoundMap:
        """This map with other numbers in the place of `read`."""
        return self._but(_selection=(None, None), read=read)

    def bound(self, z: Sequence[Tensor]) -> BoundMap:
        """This map with other tensors in the place of z."""
        z = given = tuple(z)
        if self._failed is not None:
            batch = self.layout.batch
            given = tuple(replace_rows(t, self._failed) if has_rows(t, batch) else t for t in z)
        return self.reading(self._read_of(given))._but(z=z)

    def replace_failed(self, bad: Tensor) -> BoundMap:
        """This map with a good sample's x and z in the place of those of the bad ones.

        Args:
            bad: (B,) bool, not all True.
        """
        return self._but(_failed=bad).bound(self.z)

    def replace_failed_if_batchwise(self, x: Tensor, bad: Tensor) -> BoundMap:
        """The same, if that leaves the good samples alone; else this map.

        The derivative of bad ones is zero times whatever g's derivative is there, which may be NaN.
        """
        replaced = self.replace_failed(bad)
        # Not under no_grad: autocast would cache weights without their graph.
        with torch.enable_grad():
            moved, expected = replaced(x.detach())[~bad], self(x.detach())[~bad]
        return replaced if same_value(moved, expected, x.dtype, self.layout.sizes) else self

    def recorded(self, record: Recording) -> BoundMap:
        """This map with every call of g, or of what stands for it, made by `record`."""
        return self._but(_recording=record)

    def damped(self, steps: int, damping: float, watch: Watch | None = None) -> BoundMap:
        """The map x <- x + damping (g(x) - x), so many times; watch, if any, looks on."""
        return self._but(damping=(steps, damping), _watch=watch)

    def _but(self, **other: Any) -> BoundMap:
        """This map with some attributes other ones."""
        again = BoundMap.__new__(BoundMap)
        again.__dict__ = self.__dict__ | other
        return again

    def _read_of(self, z: tuple[Tensor, ...]) -> Any:
        """What evaluations read where g is given z."""
        if not self.hoisted:
            return z
        prepare = functools.partial(self.g.prepare, *z)
        if self._recording is not None:
            prepare = functools.partial(self._recording, lambda z: self.g.prepare(*z), z)
        read_only = self._read_only if self._read_only.read is z else ReadOnly("z", z)
        return read_only.during(functools.partial(self._prepared, prepare))

    def selectable(self) -> bool:
        """Whether rows of a row-wise g can be evaluated alone: all it reads has the batch."""
        return all(has_rows(part, self.layout.batch) for part in parts_of(self.read))

    def evaluate(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """g for a solver, without a graph; see fpi_cuda.loops.stepping.Evaluate."""
        if rows is None:
            self._whole = x
            return self._checked(x, self.read)
        assert self._whole is not None
        if self.context.stochastic:
            # Fewer rows would draw other random numbers.
            self._whole = self._whole.index_copy(0, rows, x)
            return self._checked(self._whole, self.read)[rows]
        if self._selection[0] is not rows:
            self._selection = (rows, select(self.read, rows))
        try:
            return self._checked(x, self._selection[1])
        except (RuntimeError, ValueError, IndexError) as error:
            self._checked(self._whole, self.read)  # or it fails here too
            said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise RuntimeError(NOT_ROW_BY_ROW.format(said)) from error

    def evaluator(
        self, x0: Tensor, stand_in: StandIn | None = None
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """`evaluate` for the steps of a solve from x0; it may leave g(x) in the shape of the state.

        Once an evaluation has shown that it is a call of g, later ones at the same x, whose numbers
        the solver overwrites, look only whether anything has changed that could make it more.

        Args:
            stand_in: asked then for what may be called in the place of g.
        """
        layout, context, careful = self.layout, self.context, self.evaluate
        if layout.is_tuple:
            return careful
        call = self.g.step if self.hoisted else self.g
        others = context.device_types[1:]
        autocast_is_on, strided = torch.is_autocast_enabled, torch.strided
        shape, dtype, device = layout.shape, layout.dtype, layout.device
        known: Tensor | None = None
        instead: Callable[[Tensor], Any] | None = None
        state: Any = None
        read = (self.read,) if self.hoisted else self.read
        read_only, versions = self._read_only, [0]

        def again() -> Any:
            return call(x0.clone().view(shape), *read)

        def first(x: Tensor) -> Any:
            """g(x), where that is seen to be all that there is to do; else UNSEEN_YET."""
            looked_after = self.hoisted or self.buffers or read_only.read is not read
            if looked_after or read_only.uncounted or x.is_inference():
                return UNSEEN_YET
            version = counted_version(x)
            gx = context.look_on(functools.partial(call, x.view(shape), *read), again)
            if gx is not UNSEEN_YET:
                context.changes_x = counted_version(x) != version
                self._whole = x
                if context.changes_x:
                    gx = gx.clone() if isinstance(gx, Tensor) else gx
                    x.copy_(x0)
            return gx

        def evaluate(x: Tensor, rows: Tensor | None) -> Any:
            nonlocal instead, known, stand_in, state, read_only, versions, read
            if (
                x is not known
                or type(weight_cache()) is not WeightCache
                or autocast_is_on("cpu")
                or (others and any(map(autocast_is_on, others)))
            ):
                versions = [*map(counted_version, read_only.counted)]
                gx = first(x) if known is None and rows is None else UNSEEN_YET
                careless = gx is not UNSEEN_YET
                if not careless:
                    gx = careful(x, rows)
                elif [*map(counted_version, read_only.counted)] != versions:
                    read_only.require(versions)
                plain = context.is_plain and context.changes_x is False and not self.buffers
                if plain and rows is None and not (self._read_only.uncounted or x.is_inference()):
                    known, state, read_only = x, x.view(shape), self._read_only
                    read = (self.read,) if self.hoisted else self.read
                    versions = [*map(counted_version, read_only.counted)]
                if not careless:
                    return gx
            else:
                if stand_in is not None:  # now that there is a second evaluation
                    instead, stand_in = stand_in(state), None
                version = counted_version(x)  # which steps by torch's own operations raise
                # A view of its own each time: g may do to it what is not done to its numbers.
                gx = instead(state.detach()) if instead else call(state.detach(), *read)
                if [*map(counted_version, read_only.counted)] != versions:
                    read_only.require(versions)
                if counted_version(x) != version:
                    raise ValueError(CHANGES_X_AT_TIMES)
            if (
                type(gx) is not Tensor
                or gx.is_nested
                or gx.layout is not strided
                or gx.dtype is not dtype
                or gx.shape != shape
                or gx.device != device
                or gx.requires_grad
            ):
                return self._flattened(gx, x)
            return gx

        return evaluate

    def __call__(self, x: Tensor) -> Tensor:
        """g of the whole batch, with the graph that the grad mode allows."""
        if self._failed is not None:
            x = replace_rows(x, self._failed)
        steps, damping = self.damping
        for step in range(steps):
            gx = self._checked(x, self.read)
            if self._watch is not None:
                self._watch(step, x, gx)
            x = gx if damping == 1.0 else x + damping * (gx - x)
        return x

    def _direct(self, state: Any, read: Any) -> Any:
        if self._recording is not None:
            plain = self._but(_recording=None)
            return self._recording(functools.partial(plain._direct, read=read), state)
        if self.hoisted:
            return self.g.step(state, read)
        return self.g(state, *read)

    def _checked(self, x: Tensor, read: Any) -> Tensor:
        """g at the state in x, laid out flat again; it must not change what it reads.

        A solver comes here at every step. What an evaluation may need besides a call of g is
        known from the first one, and from the two switches that somebody may have turned since.
        """
        read_only, context = self._read_only, self.context
        if read_only.read is not read:
            read_only = self._read_only = ReadOnly(self._named, read)
        if (
            context.changes_x is not False
            or not context.is_plain
            or self.buffers
            or read_only.uncounted
            or x.is_inference()
            or type(weight_cache()) is not WeightCache
            or any(map(torch.is_autocast_enabled, context.device_types))
        ):
            return self._looked_after(x, read, read_only)
        counted = read_only.counted
        version, versions = counted_version(x), [*map(counted_version, counted)]
        state = self._state_in(x, writable=False)
        if self._recording is None and not self.hoisted:
            gx = self.g(state, *read)
        else:
            gx = self._direct(state, read)
        if [*map(counted_version, counted)] != versions:
            read_only.require(versions)
        if counted_version(x) != version:
            raise ValueError(CHANGES_X_AT_TIMES)
        return self._flattened(gx, x)

    def _looked_after(self, x: Tensor, read: Any, read_only: ReadOnly) -> Tensor:
        """The same with everything seen to that an evaluation may need besides a call of g."""
        context = self.context
        # Inference tensors do not count how often they were changed.
        copies = context.changes_x is not False or x.is_inference()
        given = x.clone() if copies else x
        version = None if given.is_inference() else counted_version(given)
        call = functools.partial(self._direct, read=read)

        def again() -> Any:
            return call(self._state_in(x.clone() if copies else x, writable=copies))

        evaluation = functools.partial(call, self._state_in(given, writable=copies))
        gx = read_only.during(functools.partial(self._run, evaluation, again))
        changed = version is not None and counted_version(given) != version
        if changed and not copies:
            raise ValueError(CHANGES_X_AT_TIMES)
        if context.changes_x is None:
            context.changes_x = changed
        return self._flattened(gx, x)

    def _state_in(self, x: Tensor, *, writable: bool) -> Any:
        """The user's state that lies in x (n, D), at every step; most are one tensor."""
        layout = self.layout
        if layout.is_tuple:
            return layout.unflatten(x, writable=writable)
        n = x.shape[0]
        return x.view(layout.shape if n == layout.batch else layout.shape_of(n))

    def _flattened(self, gx: Any, x: Tensor) -> Tensor:
        """gx (n, D), if it is like the state in x; what autocast made of its dtype is undone."""
        layout, n = self.layout, x.shape[0]
        if self.context.autocast_dtype is not None:
            gx = self._widened(gx)
        if (
            type(gx) is not Tensor
            or layout.is_tuple
            or gx.layout != torch.strided
            or gx.is_nested
            or gx.shape != (layout.shape if n == layout.batch else layout.shape_of(n))
            or gx.dtype != layout.dtype
            or gx.device != layout.device
        ):
            layout.require_like(gx, n)
            return layout.flatten(gx)
        return gx if gx.shape == x.shape and not gx.requires_grad else gx.reshape(x.shape)

    def _widened(self, gx: Any) -> Any:
        """gx, what products under autocast made of it in the dtype of the state."""
        if isinstance(gx, (tuple, list)):
            return tuple(map(self._widened, gx))
        low = isinstance(gx, Tensor) and gx.dtype == self.context.autocast_dtype
        return gx.to(self.layout.dtype) if low else gx


def has_rows(part: Any, batch: int) -> bool:
    """Whether part is a tensor with one row for each sample, which can be taken one by one."""
    dense = isinstance(part, Tensor) and why_not_dense(part) is None
    return dense and part.shape[:1] == (batch,)


def select(read: Any, rows: Tensor) -> Any:
    """These rows of a tensor, or of each tensor in a tuple, list or named tuple."""
    if isinstance(read, Tensor):
        return read.index_select(0, rows)
    selected = [t.index_select(0, rows) for t in read]
    return read._make(selected) if hasattr(read, "_make") else type(read)(selected)


def replace_rows(t: Tensor, bad: Tensor) -> Tensor:
    """t with its first good row, as a constant, in the place of its bad ones (B,)."""
    good = torch.argmin(bad.to(torch.uint8), keepdim=True)
    mask = bad.reshape(-1, *[1] * (t.dim() - 1))
    return torch.where(mask, t.detach().index_select(0, good), t)


class ReadOnly:
    """The tensors that evaluations read, and must not change in place.

    Args:
        name: of what is read.
        read: a tensor, or a tuple or list of them; other values are not looked into.
    Attributes:
        read: as given; nothing that anybody has, for a list, whose tensors may be exchanged.
        counted: the tensors that count how often they are changed.
        uncounted: those that do not (inference mode): only a comparison with a copy tells.
        to_copy: in how many evaluations that is done: from x = 0 the first may change nothing.
    """

    __slots__ = ("_name", "_tensors", "counted", "read", "to_copy", "uncounted")

    def __init__(self, name: str, read: Any) -> None:
        self._name = name
        self.read = object() if isinstance(read, list) else read
        self._tensors = [t for t in parts_of(read) if isinstance(t, Tensor)]
        self.counted = [t for t in self._tensors if not t.is_inference()]
        self.uncounted = [t for t in self._tensors if t.is_inference()]
        self.to_copy = 2 if self.uncounted else 0

    def during(self, run: Callable[[], Any]) -> Any:
        """run(), which must not change them."""
        versions, copies = [*map(counted_version, self.counted)], []
        if self.to_copy:
            self.to_copy -= 1
            copies = [(t, t.clone()) for t in self.uncounted if t.layout == torch.strided]
        result = run()
        if copies or [*map(counted_version, self.counted)] != versions:
            self.require(versions, copies)
        return result

    def require(self, versions: list[int], copies: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """Raise unless all are what they were when copies, and versions of `counted`, were taken.

        Raises:
            ValueError: one was changed.
        """
        changed = [
            t for t, v in zip(self.counted, versions, strict=True) if counted_version(t) != v
        ]
        changed += [t for t, copied in copies if not torch.equal(bits_of(t), bits_of(copied))]
        for place, t in enumerate(self._tensors):
            if any(t is other for other in changed):
                raise ValueError(
                    f"fixed_point: g must not change {self._name} in place, tensor {place} of it "
                    "was changed. Use out-of-place operations on it"
                )


def bits_of(t: Tensor) -> Tensor:
    """The numbers in t, whatever transforms it is wrapped for; NaN is like itself in them."""
    return transforms.numbers(t).flatten().view(torch.uint8)


def parts_of(read: Any) -> Sequence[Any]:
    """What g reads, one by one."""
    return read if isinstance(read, (tuple, list)) else (read,)
