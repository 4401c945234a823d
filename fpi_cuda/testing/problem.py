"""The record of one fixed-point problem, and the registry that the zoo is read from."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_SAMPLES = 8
"""Samples of every problem; they differ in z and in conditioning."""

Map = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """x = g(x, *z) for NUM_SAMPLES samples at once.

    Attributes:
        name: "family/variant", unique.
        g: the map, row-wise; g(x, *z) is like x.
        x0: (B, ...) starting point.
        z: inputs of g; dim 0 of each is the batch.
        has_fixed_point: (B,) bool. Where it is False, ||g(x) - x|| stays above a tenth of
            max(||x0||, ||g(x0)||) for every x, so nothing there may pass for converged; or z
            holds NaN.
        contractive: the spectral radius of dg/dx at the fixed point is below 1 on every sample
            and Picard gets there from x0.
        x_star: like x0, float64: the fixed point of the problem as rounded to x0.dtype; None
            where it has no closed form or is not unique.
        kappa: (B,) float64, ||(I - dg/dx)^-1||_2 at x_star: the distance to x_star is at most
            kappa times the residual (for a nonlinear g, to first order).
        bitwise: g gives a sample the same bits whatever batch it is in.
    """

    name: str
    g: Map
    x0: Tensor
    z: tuple[Tensor, ...]
    has_fixed_point: Tensor
    contractive: bool = False
    x_star: Tensor | None = None
    kappa: Tensor | None = None
    bitwise: bool = True

    @property
    def flat_x0(self) -> Tensor:
        """(B, D) x0 as the flat solvers take it."""
        return self.x0.flatten(1)

    def evaluate(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """g on flat states (n, D) that belong to samples `rows` (None: all), as (n, D)."""
        z = self.z if rows is None else tuple(t.index_select(0, rows) for t in self.z)
        return self.g(x.view(-1, *self.x0.shape[1:]), *z).flatten(1)


class Draw:
    """Seeded random numbers for one problem, drawn in float64 and rounded to its dtype.

    The same name gives the same float64 draws for every dtype.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float64."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform on [low, high), float64."""
        unit = torch.rand(*shape, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * unit

    def orthogonal(self, count: int, d: int) -> Tensor:
        """(count, d, d) random orthogonal matrices, float64."""
        return torch.linalg.qr(self.normal(count, d, d)).Q

    def cast(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors rounded to the problem's dtype."""
        return tuple(t.to(self.dtype) for t in tensors)

    def rounded(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same in float64: what a closed form starts from."""
        return tuple(t.double() for t in self.cast(*tensors))

    def problem(
        self,
        g: Map,
        x0: Tensor,
        z: tuple[Tensor, ...],
        *,
        exists: bool | Tensor = True,
        **known: Any,
    ) -> Problem:
        """A Problem over this draw's name and dtype; `exists` is has_fixed_point."""
        has_fixed_point = torch.as_tensor(exists).expand(NUM_SAMPLES)
        x0, *inputs = self.cast(x0, *z)
        return Problem(self.name, g, x0, tuple(inputs), has_fixed_point, **known)


Builder = Callable[..., Problem]
_builders: dict[str, tuple[Builder, tuple[Any, ...]]] = {}


def register(variants: str | dict[str, tuple[Any, ...]]) -> Callable[[Builder], Builder]:
    """Add the problems of a builder (draw, *arguments) to the zoo.

    Args:
        variants: the name of one problem, "family/variant", or the arguments of several by name.
    """
    known = {variants: ()} if isinstance(variants, str) else variants

    def add(builder: Builder) -> Builder:
        twice = sorted(_builders.keys() & known)
        if twice:
            raise ValueError(f"register: problem names must be unique, got {twice} twice")
        _builders.update({name: (builder, arguments) for name, arguments in known.items()})
        return builder

    return add


def names(family: str | None = None) -> list[str]:
    """Names of all problems, or of one family, in the order of registration."""
    return [name for name in _builders if family is None or name.split("/")[0] == family]


def problem(name: str, dtype: torch.dtype = torch.float64) -> Problem:
    """The problem called `name`, rounded to `dtype`; the same every time.

    Raises:
        ValueError: there is no such problem.
    """
    if name not in _builders:
        raise ValueError(f"problem: unknown name {name!r}. Valid names: {', '.join(_builders)}")
    builder, arguments = _builders[name]
    return builder(Draw(name, dtype), *arguments)


def zoo(dtype: torch.dtype = torch.float64, family: str | None = None) -> list[Problem]:
    """Every problem (of one family), rounded to `dtype`."""
    return [problem(name, dtype) for name in names(family)]


def evenly(low: float, high: float) -> Tensor:
    """(B,) float64 values evenly from low to high, one per sample."""
    return torch.linspace(low, high, NUM_SAMPLES, dtype=torch.float64)
