"""Evaluations after the first are checked as it is: what g does only then does not go unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi


class Late:
    """x -> tanh(x / 2 + z), and something else with it in one evaluation.

    Args:
        at: which evaluation.
        does: is given x, z and the value; what it returns is returned, unless it is None.
    """

    def __init__(self, at: int, does: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        self.at, self.does, self.evaluations = at, does, 0

    def __call__(self, x: Tensor, z: Tensor) -> Any:
        self.evaluations += 1
        gx = torch.tanh(0.5 * x + z)
        if self.evaluations != self.at:
            return gx
        other = self.does(x, z, gx)
        return gx if other is None else other


class Hoisted:
    """The same with a prepare, whose value is a `kind` of one tensor."""

    def __init__(self, at: int, kind: Callable[[list[Tensor]], Any]) -> None:
        self.at, self.kind, self.evaluations = at, kind, 0

    def prepare(self, z: Tensor) -> Any:
        return self.kind([2.0 * z])

    def step(self, x: Tensor, prepared: Any) -> Tensor:
        self.evaluations += 1
        if self.evaluations == self.at:
            prepared[0].add_(1.0)
        return torch.tanh(0.5 * x + prepared[0])

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return self.step(x, self.prepare(z))


def in_place(t: Tensor) -> None:
    t.add_(1.0)


WRONG: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], type[Exception], str]] = {
    "z in place": (lambda x, z, gx: in_place(z), ValueError, "must not change z in place"),
    "x in place": (
        lambda x, z, gx: in_place(x), ValueError, "change x in place in some evaluations",
    ),
}  # fmt: skip


# g may change the x that it is given, if it does so from the first evaluation on.
ONCE = [(kind, at) for kind in WRONG for at in (1, 2, 3, 4) if (kind, at) != ("x in place", 1)]


@pytest.mark.parametrize(("kind", "at"), ONCE)
def test_what_g_does_once_is_seen(kind: str, at: int) -> None:
    does, error, message = WRONG[kind]
    z = torch.full((3, 4), 0.3, dtype=torch.float64)
    with pytest.raises(error, match=message), torch.no_grad():
        fpi.fixed_point(Late(at, does), torch.zeros_like(z), z, rtol=0.0, max_steps=6)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("kind", [tuple, list])
def test_what_prepare_returned_stays_as_it_is(kind: Any, at: int) -> None:
    z = torch.full((3, 4), 0.3)
    with pytest.raises(ValueError, match="must not change what prepare returned in place"):
        fpi.fixed_point(Hoisted(at, kind), torch.zeros_like(z), z, rtol=0.0, max_steps=6)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_evaluation_may_return_x_itself(at: int) -> None:
    z = torch.full((3, 4), 0.3, dtype=torch.float64)
    g = Late(at, lambda x, z, gx: x if at > 1 else x.clone())
    with torch.no_grad():
        found = fpi.fixed_point(g, torch.zeros_like(z), z, max_steps=20)
    assert bool(found.converged.all())


def test_autocast_that_g_leaves_on_does_not_round_what_follows() -> None:
    z = torch.full((3, 4), 0.3)
    weight = torch.full((4, 4), 0.1)
    leaves_on = torch.autocast("cpu", torch.bfloat16)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ weight + z)

    def turned_on(x: Tensor, z: Tensor) -> Tensor:
        gx = g(x, z)
        if turned_on.__dict__.setdefault("count", 0) == 1:
            leaves_on.__enter__()
        turned_on.__dict__["count"] += 1
        return gx

    with torch.no_grad():
        expected = fpi.fixed_point(g, torch.zeros_like(z), z, rtol=1e-6, rowwise=True)
        try:
            found = fpi.fixed_point(turned_on, torch.zeros_like(z), z, rtol=1e-6, rowwise=True)
        finally:
            leaves_on.__exit__(None, None, None)
    assert torch.equal(found.value, expected.value)
    assert torch.equal(found.num_steps, expected.num_steps)
