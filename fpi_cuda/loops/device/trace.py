"""What one evaluation computes, op by op: the test of whether a captured graph still is g.

A captured graph keeps the addresses, shapes and Python numbers of the evaluation that it was made
from, and g may be any Python. So every solve evaluates g once eagerly, which is its first step
anyway, and a graph is replayed only if that evaluation asked torch for exactly the same: the same
ops, on the same memory, with the same numbers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from fpi_cuda.autograd import BoundMap
from fpi_cuda.evaluation.dispatch_modes import EagerMode
from fpi_cuda.evaluation.same_value import version_of
from fpi_cuda.loops.device.cuda_graphs import Refused

Call = tuple[Any, ...]
"""(op, tokens of its arguments): equal for two calls that compute the same from the same."""

MOST_HOST_NUMBERS = 64
"""Host tensors up to this size are compared by value."""

PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
VALUES = (type(None), bool, int, str, torch.dtype, torch.device, torch.layout, torch.memory_format)

# Their schemas do not say that training changes the running statistics.
BATCH_NORMS = tuple(f"aten::{kind}_batch_norm" for kind in ("native", "cudnn", "miopen"))

UNREPEATABLE = {
    torch.Tag.data_dependent_output: "g reads numbers on the host ({})",
    torch.Tag.dynamic_output_shape: "g makes tensors whose shape depends on numbers ({})",
    torch.Tag.cudagraph_unsafe: "g calls an op that cannot be captured ({})",
}


class Recorder(EagerMode):
    """Writes down the calls of an evaluation, or of several that build on each other.

    Args:
        device: where the state is; numbers elsewhere are the host's.
        inputs: tensors that stand for the same in every evaluation, wherever they lie.
        launches: how many kernels were captured up to now; None: they are not counted.
    Attributes:
        calls: what was computed.
        refusal: why this cannot be repeated by a graph, or None.
        externals: tensors that the evaluation read besides the state, with their version.
    """

    def __init__(
        self,
        device: torch.device,
        inputs: Iterable[Tensor],
        launches: Callable[[], int] | None = None,
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.refusal: str | None = None
        self.externals: list[tuple[Tensor, int]] = []
        self._device = device
        self._launches = launches
        self._launched = 0
        # By storage: what it stands for, and where in it that begins.
        self._known: dict[int, tuple[tuple[str, int], int]] = {}
        # A weak reference keeps the number of a storage from being given to another one.
        self._storages: list[StorageWeakRef] = []
        for index, t in enumerate(inputs):
            self._know(t, ("input", index))
            self.externals.append((t, version_of(t)))

    def record(self, evaluate: Callable[..., Any], *state: Any) -> Any:
        """evaluate(*state), written down, with what it returns.

        Args:
            state: tensors, or tuples of them, whose numbers change from evaluation to evaluation.
        """
        for t in pytree.tree_leaves(state):
            self._know(t, ("state", len(self._storages)))
        if self._launches is not None:
            self._launched = self._launches()
        with casts_repeated(), self:
            result = evaluate(*state)
        self.between_calls()
        self.calls.append(("returned", self._token(result)))
        return result

    def fork(self) -> Recorder:
        """A recorder that goes on from here, leaving this one as it is."""
        other = Recorder(self._device, (), self._launches)
        for name in ("calls", "refusal", "externals", "_known", "_storages"):
            setattr(other, name, copy.copy(getattr(self, name)))
        return other

    def changed(self) -> bool:
        """Whether a tensor was changed in place since it was read."""
        return any(version_of(t) != version for t, version in self.externals)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note the call, then make it."""
        kwargs = kwargs or {}
        self.between_calls()
        tokens = tuple(map(self._token, args))
        if kwargs:
            tokens += tuple((name, self._token(value)) for name, value in kwargs.items())
        self.calls.append((func, *tokens))
        self._judge(func, args, kwargs)
        out = func(*args, **kwargs)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self._meet(t)
        if self._launches is not None:
            self._launched = self._launches()
        return out

    def between_calls(self) -> None:
        """Refuse kernels that were launched since the latest call, behind torch's back."""
        if self._launches is not None and self._launches() != self._launched:
            self._refuse(
                "g launches kernels that torch does not see; wrap them with "
                "torch.library.custom_op or triton_op"
            )

    def knows(self, t: Tensor) -> bool:
        """Whether t is an input or state, or was computed by what is recorded."""
        return t.untyped_storage()._cdata in self._known

    def _refuse(self, reason: str) -> None:
        if self.refusal is None:
            self.refusal = reason

    def _know(self, t: Tensor, name: tuple[str, int]) -> None:
        storage = t.untyped_storage()
        self._known[storage._cdata] = (name, int(t.storage_offset()))
        self._storages.append(StorageWeakRef(storage))

    def _meet(self, t: Tensor) -> None:
        """Number a tensor that a call returned, unless its memory is known."""
        try:
            if not self.knows(t):
                self._know(t, ("made", len(self._storages)))
        except (NotImplementedError, RuntimeError):
            self._refuse(f"g computes with {described(t)}")

    def _token(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor_token(value)
        if isinstance(value, (list, tuple)):
            return (type(value).__name__, *map(self._token, value))
        kind = type(value).__name__
        if isinstance(value, (float, complex)):
            # hex tells -0.0 from 0.0; the type tells 1.0 from 1, for these promote differently.
            return (kind, value.real.hex(), value.imag.hex())
        if isinstance(value, VALUES):
            return (kind, value)
        drawn = isinstance(value, torch.Generator)
        unknown = f"g calls an op with an argument of type {kind}"
        self._refuse("g draws random numbers" if drawn else unknown)
        return None

    def _tensor_token(self, t: Tensor) -> Any:
        if type(t) not in PLAIN_TENSORS or t.layout != torch.strided or t.is_quantized:
            self._refuse(f"g computes with {described(t)}")
            return None
        storage = t.untyped_storage()
        form = (t.dtype, tuple(t.shape), t.stride(), t.is_conj(), t.is_neg())
        known = self._known.get(storage._cdata)
        if known is not None:
            name, begin = known
            # Where an op puts what it makes follows from the op. The seeds of attention, which it
            # ignores without dropout, lie on the host but for a capture.
            place = () if name[0] == "made" else (t.device,)
            return (*name, t.storage_offset() - begin, *place, *form)
        if t.device.type == self._device.type:
            self.externals.append((t, version_of(t)))
            return ("external", t.data_ptr(), t.device, *form)
        if t.device.type == "cpu" and t.numel() <= MOST_HOST_NUMBERS:
            return ("host", t.device, *form, repr(t.tolist()))
        self._refuse(f"g reads {described(t)} while the state is on {self._device}")
        return None

    def _judge(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func.name() if hasattr(func, "name") else str(func)
        for tag in func.tags:
            if tag in UNREPEATABLE:
                self._refuse(UNREPEATABLE[tag].format(name))
        if name == "aten::lift_fresh" and self._device.type != "cpu":
            self._refuse("g makes a tensor of Python numbers in each evaluation; make it once")
        if name in BATCH_NORMS:
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            if named.get("training") and isinstance(named.get("running_mean"), Tensor):
                self._refuse("g changes running statistics; use eval()")
        if not func._schema.is_mutable:
            return
        # Changes to tensors that outlive the evaluation.
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for t in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(t, Tensor) and not self.knows(t):
                    self._refuse("g changes a tensor of its own in place")


def described(t: Tensor) -> str:
    """A tensor that the recorder cannot follow, in words."""
    if type(t) not in PLAIN_TENSORS:
        return f"a {type(t).__name__}"
    if t.layout != torch.strided:
        return f"a tensor of layout {t.layout}"
    return f"a tensor {tuple(t.shape)} on {t.device}"


def difference(calls: list[Call], expected: list[Call]) -> str | None:
    """Where two evaluations part, in words; None if they do not."""
    if calls == expected:
        return None
    for index, (call, other) in enumerate(zip(calls, expected, strict=False)):
        if call != other:
            return f"op {index + 1} is {spelled(call)}, was {spelled(other)}"
    return f"{len(calls)} ops, were {len(expected)}"


def require_repeatable(recorder: Recorder, bound_map: BoundMap) -> None:
    """Raise Refused if what was recorded of this map cannot be repeated by a graph."""
    reason = "g draws random numbers" if bound_map.context.stochastic else recorder.refusal
    if reason is not None:
        raise Refused(reason)


def require_same(recorder: Recorder, calls: list[Call]) -> None:
    """Raise Refused unless exactly `calls` were recorded."""
    if recorder.refusal is not None:
        raise Refused(recorder.refusal)
    found = difference(recorder.calls, calls)
    if found is not None:
        raise Refused(f"g is another computation than when it was captured: {found}")


def spelled(call: Call) -> str:
    """A call in words."""
    func, *tokens = call
    return f"{func}({', '.join(map(str, tokens))})"


@contextlib.contextmanager
def casts_repeated() -> Iterator[None]:
    """Autocast casts a weight in every evaluation: a cast one would not outlive the call."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
