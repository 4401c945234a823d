"""The state as the user sees it, a tensor or a tuple of them, and as solvers do: (B, D)."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpi_cuda.evaluation.dense import NAMES, why_not_dense

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
    return Layout(
        shapes=tuple(shapes),
        is_tuple=isinstance(x0, tuple),
        batch=first.shape[0] if batch_dims else 1,
        dtype=first.dtype,
        device=first.device,
        batch_dims=batch_dims,
    )


def require_floating_tensor(part: object) -> None:
    """Raise unless `part` can be (part of) a state."""
    if type(part) is Tensor and part.dtype in STATE_DTYPES and part.layout == torch.strided:
        asked: Any = part
        if not (part.is_nested or (NAMES and asked.has_names())):
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
