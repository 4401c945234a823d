"""Random small maps by the batch, every sample with its own family, scale and faults.

They are made of elementwise operations and one sum per row, so that a sample gets the same bits
in any batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Parameters(NamedTuple):
    """Numbers that the families draw on: a, u, v, b are (n, D); roll, t are (n, 1)."""

    a: Tensor
    u: Tensor
    v: Tensor
    b: Tensor
    roll: Tensor
    t: Tensor


def affine(y: Tensor, p: Parameters) -> Tensor:
    """Diagonal plus cyclic shift plus rank one, plus b."""
    return p.a * y + p.roll * y.roll(1, -1) + p.u * (p.v * y).sum(-1, keepdim=True) + p.b


def descent(y: Tensor, p: Parameters) -> Tensor:
    """Gradient descent on a separable quadratic; curvatures down to e^-8, steps up to 2.2."""
    return y - 2.2 * p.t * (torch.exp(-8 * p.a.abs().clamp(max=1)) * y - p.b)


def jump(y: Tensor, p: Parameters) -> Tensor:
    """Two lines with a gap between them."""
    return torch.where(y > p.t, -0.5 * y - 1, 0.5 * y + 1)


FAMILIES: dict[str, Callable[[Tensor, Parameters], Tensor]] = {
    "affine": affine,
    "tanh": lambda y, p: torch.tanh(affine(y, p)),
    "relu": lambda y, p: torch.relu(affine(y, p)),
    "cosine": lambda y, p: torch.cos(affine(y, p)),
    "descent": descent,
    "quadratic": lambda y, p: (1 + 3 * p.t) * y * (1 - y),
    "cubic": lambda y, p: p.a * y * y * y + p.b,
    "jump": jump,
    "staircase": lambda y, p: torch.floor(4 * affine(y, p)) / 4,
    "constant": lambda y, p: p.b + torch.zeros_like(y),
    "identity": lambda y, p: y + torch.zeros_like(y),
    "reflection": lambda y, p: p.b - y,
    "reciprocal": lambda y, p: (1 + p.t) / y,
    "square-root": lambda y, p: torch.sqrt(1 + p.t - y),
    "logarithm": lambda y, p: torch.log(y) + 1 + p.t,
    "shift": lambda y, p: y + 1,
    "growing-drift": lambda y, p: y + (0.5 + p.t) * (1 + y.abs()),
    "exponential": lambda y, p: torch.exp(y) + 1,
    "hyperbola": lambda y, p: torch.sqrt(y * y + 1) + 1,
}
"""h(y, parameters) for states of order one."""

NO_FIXED_POINT = frozenset({"shift", "growing-drift", "exponential", "hyperbola"})
"""Families whose ||h(y) - y|| stays above a tenth of the starting scale for every y."""

FAMILIES_PER_BATCH = 3
NEVER, ALWAYS = -1, -2


class RandomMaps(NamedTuple):
    """x -> scale h(x / scale), one h per sample, with faults.

    Attributes:
        families: the names in this batch; `which` (B,) picks one per sample.
        scale: (B, 1) powers of ten.
        fault_step: (B,) evaluation (from 0) at which one element of g is replaced by
            fault_value (B,); ALWAYS or NEVER.
        x0: (B, D).
    """

    families: tuple[str, ...]
    which: Tensor
    parameters: Parameters
    scale: Tensor
    fault_step: Tensor
    fault_value: Tensor
    x0: Tensor

    def family(self, sample: int) -> str:
        """The family of one sample."""
        return self.families[int(self.which[sample])]

    def take(self, index: Tensor) -> RandomMaps:
        """The maps of some samples."""
        taken: RandomMaps = pytree.tree_map_only(Tensor, lambda value: value[index], self)
        return taken

    def __call__(self, x: Tensor, rows: Tensor | None, step: int | None) -> Tensor:
        """g at x (n, D) of samples `rows`, at evaluation `step`; None leaves passing faults out."""
        maps = self if rows is None else self.take(rows)
        y = x / maps.scale
        h = FAMILIES[maps.families[0]](y, maps.parameters)
        for k, name in enumerate(maps.families[1:], start=1):
            h = torch.where(maps.which[:, None] == k, FAMILIES[name](y, maps.parameters), h)
        g = h * maps.scale
        faulty = maps.fault_step == ALWAYS
        if step is not None:
            faulty = faulty | (maps.fault_step == step)
        g[:, 0] = torch.where(faulty, maps.fault_value, g[:, 0])
        return g


def draw_maps(
    generator: torch.Generator, batch: int, d: int, dtype: torch.dtype, max_steps: int
) -> RandomMaps:
    """Random maps on (batch, d) states: a third at extreme scales, a sixth with a fault."""
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    uniform = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
    picks = torch.randperm(len(FAMILIES), generator=generator)[:FAMILIES_PER_BATCH]
    names = list(FAMILIES)
    gain = 2 * uniform(batch, 1)
    parameters = Parameters(
        a=gain * normal(batch, d) / 2,
        u=gain * normal(batch, d) / d**0.5 * (uniform(batch, 1) < 0.5),
        v=normal(batch, d) / d**0.5,
        b=normal(batch, d),
        roll=gain * normal(batch, 1) / 2,
        t=uniform(batch, 1),
    )
    exponent = (60 * uniform(batch, 1) - 30) * (uniform(batch, 1) < 0.3)
    scale = 10**exponent
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e6], dtype=torch.float64)
    value = values[torch.randint(4, (batch,), generator=generator)]
    passing = torch.randint(min(max_steps, 20), (batch,), generator=generator)
    chance = uniform(batch)
    fault_step = torch.full((batch,), NEVER)
    fault_step = torch.where(chance < 0.16, passing, fault_step)
    fault_step = torch.where((chance < 0.02) & ~value.isfinite(), ALWAYS, fault_step)
    x0 = scale * 0.5 * normal(batch, d)
    x0[:, 0] = torch.where((chance > 0.16) & (chance < 0.17), torch.nan, x0[:, 0])
    x0 = torch.where(((chance > 0.17) & (chance < 0.2))[:, None], 0.0, x0)
    return RandomMaps(
        tuple(names[int(k)] for k in picks),
        torch.randint(FAMILIES_PER_BATCH, (batch,), generator=generator),
        Parameters(*(p.to(dtype) for p in parameters)),
        scale.to(dtype),
        fault_step,
        (value * scale[:, 0]).to(dtype),
        x0.to(dtype),
    )
