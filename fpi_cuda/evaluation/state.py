"""The state as the user sees it, a tensor or a tuple of them, and as solvers do: (B, D)."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from fpi_cuda.evaluation.shortcuts import why_not_hoisted

STATE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Layout:
    """How a state with B samples lies in a flat (B, D) tensor.

    Attributes:
        shapes: shape of one sample, for each tensor of the state.
        is_tuple: the state is a tuple of tensors, else a single one.
        batch: B.
        dtype, device: of every tensor of the state.
        batch_dims: 1 where dim 0 counts samples; 0 where the whole state is one, so that B is 1.
        together: how many samples in succession g may couple; None: all of them.
    """

    shapes: tuple[torch.Size, ...]
    is_tuple: bool
    batch: int
    dtype: torch.dtype
    device: torch.device
    batch_dims: int = 1
    together: int | None = None

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of one sample, for each tensor; they add up to D."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @functools.cached_property
    def dim(self) -> int:
        """D."""
        return sum(self.sizes) if self.is_tuple else math.prod(self.shapes[0])

    @functools.cached_property
    def shape(self) -> torch.Size:
        """Of a state that is one tensor."""
        return self.shapes[0] if not self.batch_dims else torch.Size((self.batch, *self.shapes[0]))

    def shape_of(self, n: int) -> torch.Size:
        """The same with n samples."""
        return torch.Size((n, *self.shapes[0])) if self.batch_dims else self.shapes[0]

    @property
    def rows_together(self) -> int:
        """How many samples in succession g may couple: those of a vmap it does not."""
        return self.batch if self.together is None else self.together

    def flatten(self, x: Any) -> Tensor:
        """(n, D) from a state with n samples; a view where that is possible."""
        if not self.is_tuple:
            single: Tensor = x.reshape(x.shape[0] if self.batch_dims else 1, self.dim)
            return single
        flat = [
            part.reshape(part.shape[0] if self.batch_dims else 1, size)
            for part, size in zip(x, self.sizes, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 1)

    def unflatten(self, flat: Tensor, *, writable: bool = False) -> Any:
        """The state with n samples that lies in `flat` (n, D), as views of it.

        Args:
            writable: autograd shall allow in-place operations on each tensor of a tuple.
        """
        if not self.is_tuple:
            return flat.reshape(flat.shape[: self.batch_dims] + self.shapes[0])
        if len(self.shapes) == 1:
            return self._shaped((flat,))
        if not writable:
            return self._shaped(flat.split(self.sizes, 1))
        starts = itertools.accumulate(self.sizes, initial=0)
        return self._shaped(
            [flat.narrow(1, start, size) for start, size in zip(starts, self.sizes, strict=False)]
        )

    def taken_apart(self, flat: Tensor) -> Any:
        """The same of a `flat` that nobody else will use: contiguous tensors of their own."""
        if not self.is_tuple:
            return flat.view(self.shape)
        if len(self.shapes) == 1:
            return self._shaped((flat,))
        parts = flat.unsafe_split_with_sizes(self.sizes, 1)
        return self._shaped([part.contiguous() for part in parts])

    def _shaped(self, parts: Sequence[Tensor]) -> Any:
        state = tuple(
            part.reshape((*part.shape[: self.batch_dims], *shape))
            for part, shape in zip(parts, self.shapes, strict=True)
        )
        return state if self.is_tuple else state[0]

    def require_like(self, gx: object, num_samples: int) -> None:
        """Raise unless gx, the value of g at `num_samples` samples, is such a state again.

        Raises:
            TypeError: not a tensor, or not a tuple of as many tensors.
            ValueError: another shape, layout, dtype or device.
        """
        parts = gx if self.is_tuple else (gx,)
        if not isinstance(parts, (tuple, list)) or len(parts) != len(self.shapes):
            given = len(parts) if isinstance(parts, (tuple, list)) else type(gx).__name__
            raise TypeError(
                f"fixed_point: g must return a tuple of {len(self.shapes)} tensors like x, "
                f"got {given}"
            )
        for index, (part, shape) in enumerate(zip(parts, self.shapes, strict=True)):
            x = f"x[{index}]" if self.is_tuple else "x"
            gx_name = f"g(x)[{index}]" if self.is_tuple else "g(x)"
            if not isinstance(part, Tensor):
                raise TypeError(
                    f"fixed_point: g must return a tensor like x, got {type(part).__name__}"
                )
            if (
                type(part) is not Tensor
                or part.is_nested
                or part.dtype != self.dtype
                or (part.layout != torch.strided)
            ):
                found = why_not_dense(part)
                if found is not None:
                    raise ValueError(
                        f"fixed_point: g must return dense tensors, got {gx_name}={found[0]}. "
                        f"{found[1][0].upper()}{found[1][1:]}"
                    )
            expected = (num_samples, *shape) if self.batch_dims else tuple(shape)
            if tuple(part.shape) != expected:
                raise ValueError(
                    f"fixed_point: g must return the shape of x, got {x}={expected}, "
                    f"{gx_name}={tuple(part.shape)}"
                )
            if part.dtype != self.dtype:
                raise ValueError(
                    f"fixed_point: g must return the dtype of x, got {x}={self.dtype}, "
                    f"{gx_name}={part.dtype}. Cast in g, or pass x0 in that dtype"
                )
            if part.device != self.device:
                raise ValueError(
                    f"fixed_point: g must return on the device of x, got {x} on {self.device}, "
                    f"{gx_name} on {part.device}"
                )


def layout_of(x0: object, batch_dims: int = 1) -> Layout:
    """The layout of x0.

    Raises:
        TypeError: x0 is not a floating tensor or a non-empty tuple of them.
        ValueError: a tensor without a batch dimension; dtypes, devices or batches that differ.
    """
    parts = x0 if isinstance(x0, tuple) else (x0,)
    if not parts:
        raise TypeError("fixed_point: x0 must hold at least one tensor, got an empty tuple")
    for part in parts:
        require_floating_tensor(part)
    first = parts[0]
    shapes = []
    for part in parts:
        if part.dim() < batch_dims:
            raise ValueError(
                "fixed_point: dim 0 of x0 is the batch, got a scalar. Use batch_dims=0, or "
                "x0.reshape(1) for one sample of one number"
            )
        shapes.append(part.shape[batch_dims:])
        if part is first:
            continue
        shared: list[tuple[str, Any, Any]] = [
            ("one dtype", part.dtype, first.dtype),
            ("one device", part.device, first.device),
        ]
        if batch_dims:
            shared.append(("one batch size in dim 0", part.shape[0], first.shape[0]))
        for rule, given, expected in shared:
            if given != expected:
                raise ValueError(
                    f"fixed_point: the tensors of x0 must share {rule}, got {expected} and {given}"
                )
    batch = first.shape[0] if batch_dims else 1
    is_tuple = isinstance(x0, tuple)
    return remembered_layout(tuple(shapes), is_tuple, batch, first.dtype, first.device, batch_dims)


remembered_layout = functools.lru_cache(256)(Layout)
"""One for all states of a kind, with what was computed of it."""


def require_floating_tensor(part: object) -> None:
    """Raise unless `part` can be (part of) a state."""
    if type(part) is Tensor and part.dtype in STATE_DTYPES and part.layout == torch.strided:
        asked: Any = part
        if not (part.is_nested or (NAMED_DIMENSIONS and asked.has_names())):
            return  # as most are
    if not isinstance(part, Tensor):
        remedy = "convert it with torch.as_tensor" if not isinstance(part, list) else "use a tuple"
        raise TypeError(
            "fixed_point: x0 must be a floating tensor or a tuple of them, "
            f"got {type(part).__name__}; {remedy}"
        )
    found = why_not_dense(part, "x0")
    if found is not None:
        raise TypeError(f"fixed_point: x0 must be dense, got {found[0]}; {found[1]}")
    if part.dtype not in STATE_DTYPES:
        remedy = (
            "stack its real and imaginary part: torch.view_as_real"
            if part.is_complex()
            else "convert it with x0.float()"
        )
        raise TypeError(f"fixed_point: x0 must be floating, got {part.dtype}; {remedy}")


REMEDIES = {
    "DTensor": "use {}.to_local(), or {}.full_tensor() for all of it",
    "MaskedTensor": "use {}.to_tensor(0.0), and hand the mask to g",
    "NestedTensor": "use {}.to_padded_tensor(0.0), and hand the lengths to g",
}
"""For subclasses of torch's own."""


NAMED_DIMENSIONS = hasattr(Tensor, "has_names")
"""Whether dimensions may have names, which torch 2.13 did away with."""


def why_not_dense(t: Tensor, name: str = "") -> tuple[str, str] | None:
    """What t, called `name`, is, and the remedy, unless it is dense; tracers' tensors count as so.

    A subclass that only overrides __torch_function__ holds its own numbers, and is dense.
    """
    # Most are; and Dynamo, which looks into a layer's start, knows no more.
    asked: Any = t
    plain = type(t) is Tensor and not (t.is_nested or t.is_quantized)
    plain = plain and not (NAMED_DIMENSIONS and asked.has_names())
    if (plain and t.layout == torch.strided) or torch.compiler.is_dynamo_compiling():
        return None
    found = _found(t)
    return None if found is None else (found[0], found[1].replace("{}", name))


def _found(t: Tensor) -> tuple[str, str] | None:
    """The same with a place for the name in the remedy."""
    if is_lazy(t):
        return "an uninitialized parameter", "call the module that it belongs to first"
    cls = type(t)
    # A nested or sparse tensor may refuse to be asked anything else.
    if t.is_nested:
        return "a nested tensor", REMEDIES["NestedTensor"]
    if cls.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not isinstance(t, FakeTensor):
        name = cls.__name__
        return f"a {name}", REMEDIES.get(name, "unwrap it, and wrap it again in g")
    if t.layout != torch.strided:
        return str(t.layout), "use {}.to_dense()"
    if t.is_quantized:
        return str(t.dtype), "use {}.dequantize()"
    asked: Any = t
    if NAMED_DIMENSIONS and asked.has_names():
        return "a tensor of dimensions with names", "use {}.rename(None)"
    return None


NO_NUMBERS = "fixed_point: a solve needs the numbers in x0 and z, and {} has none. {}"


def require_known(owner: str, function: Callable[..., Any], unknown: dict[str, Any]) -> None:
    """Raise for an option that `function` does not have."""
    if unknown:
        parameters = inspect.signature(function).parameters.values()
        valid = ", ".join(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        raise TypeError(f"{owner}: unknown option {next(iter(unknown))!r}. Valid options: {valid}")


def require_map(owner: str, g: object) -> None:
    """Raise unless g can be evaluated."""
    if isinstance(g, type) and issubclass(g, nn.Module):
        raise TypeError(
            f"{owner}: g must be a function or a module, got the class {g.__name__}. "
            f"Pass an instance of it: {g.__name__}(...)"
        )
    if not callable(g):
        raise TypeError(f"{owner}: g must be a function or module g(x, *z), got {type(g).__name__}")


def require_arity(g: Callable[..., Any], z: tuple[object, ...]) -> None:
    """Raise where g cannot be called with x and all of z; for when calling it has failed."""
    hoisted = why_not_hoisted(g) is None
    called: Any = getattr(g, "prepare", g) if hoisted else g
    given = z if hoisted else (None, *z)
    try:
        signature = inspect.signature(called.forward if isinstance(called, nn.Module) else called)
    except (TypeError, ValueError):
        return  # written in C: nobody knows
    try:
        signature.bind(*given)
    except TypeError as mismatch:
        name = getattr(called, "__qualname__", type(called).__name__)
        if hoisted and called is not g:  # by the user's class, wherever prepare is inherited from
            name = f"{type(g).__name__}.prepare"
        raise TypeError(
            f"fixed_point: g must take x and every z, but {name}{signature} cannot take the "
            f"{len(z)} z given: {mismatch}. Bind other arguments with "
            "functools.partial(g, name=value)"
        ) from None


def require_g_reads(z: tuple[object, ...], error: Exception) -> None:
    """Name a z that g may not be able to compute with, for when evaluating g has failed."""
    # A class of the user's own passes through as it is.
    torchs = type(error) in (RuntimeError, TypeError, NotImplementedError)
    if not torchs or str(error).startswith("fixed_point: "):
        return
    for index, t in enumerate(z):
        found = why_not_dense(t, f"z[{index}]") if isinstance(t, Tensor) else None
        if found is not None:
            said = str(error).partition("\n")[0][:200]
            raise RuntimeError(
                f"fixed_point: g failed with x a plain tensor and z[{index}] {found[0]} ({said}). "
                f"If that is why, {found[1]}"
            ) from error


def require_batch(g: object, x0: object) -> None:
    """Raise where g names the features of its state, and x0 has no dimension for the batch."""
    features = getattr(g, "x_features", None)
    if isinstance(features, int) and isinstance(x0, Tensor) and x0.dim() < 2:
        raise ValueError(
            f"fixed_point: x0 must be (batch, {features}) for {type(g).__name__}, got "
            f"x0={tuple(x0.shape)}. Give x0 and z a batch dimension: z[None] is a batch of one"
        )


def require_inputs(z: tuple[object, ...]) -> None:
    """Raise unless all z are tensors with something in them; what kind is up to g."""
    for index, t in enumerate(z):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"fixed_point: z must be tensors, got z[{index}] of type {type(t).__name__}. "
                "Bind other arguments with functools.partial(g, name=value)"
            )
        if is_lazy(t):
            raise ValueError(
                f"fixed_point: z[{index}] is an uninitialized parameter; call the module that it "
                "belongs to first"
            )


def require_numbers(*tensors: Tensor) -> None:
    """Raise where tensors only stand for numbers, as those of tracers do.

    Raises:
        ValueError: a tensor on the meta device.
        RuntimeError: fake tensors, or a trace that would hold the steps taken for these data.
    """
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "fixed_point: torch.jit.trace would keep the steps that these data need for all "
            "others. Trace what is around the layer, or call it as it is"
        )
    mode = _get_dispatch_mode(_TorchDispatchModeKey.FAKE)
    for t in tensors:
        if mode is not None or isinstance(t, FakeTensor):
            raise RuntimeError(
                NO_NUMBERS.format("a FakeTensor", "torch.export of a solve is not possible")
            )
        if t.is_meta:
            raise ValueError(NO_NUMBERS.format("device meta", "Pass tensors on a real device"))
    if _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None:
        raise RuntimeError(
            "fixed_point: make_fx and torch.func.linearize cannot trace a solve, whose steps "
            "depend on the data. In the place of linearize use torch.func.jvp"
        )
