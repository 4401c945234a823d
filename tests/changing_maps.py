"""Maps, each solved until a plan of it is kept, and loops by hand to compare later solves with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fpi_cuda as fpi
from fpi_cuda import cells
from fpi_cuda.loops.fused import kept

F64 = torch.float64
B, D = 3, 4
TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 200}
STEPS = 36
"""Of a loop by hand: the maps contract by one half."""

SIZE = 1.0
SIZES = {"all": 1.0}


class Holder:
    """An object that is no module, with a number and a method."""

    def __init__(self) -> None:
        self.size = 1.0

    def sized(self, u: Tensor) -> Tensor:
        return self.size * u


class AnyObject:
    def kept(self, u: Tensor) -> Tensor:
        return u


class ByName(AnyObject):
    """An object that maps know by a name of this module."""

    def sized(self, u: Tensor) -> Tensor:
        return u

    @staticmethod
    def doubled(u: Tensor) -> Tensor:
        return 2 * u


named = ByName()


def moved(u: Tensor, by: float = 0.0) -> Tensor:
    """A function that maps call by a name of this module."""
    return u + by


def bent(u: Tensor) -> Tensor:
    return torch.tanh(0.5 * ByName.doubled(named.kept(named.sized(moved(u)))))


class Base(nn.Module):
    """Whose methods a map inherits."""

    of_the_base = 1.0

    def sized_by_map(self) -> float:
        return 0.5

    def inherited(self, u: Tensor) -> Tensor:
        return u

    @property
    def size_by_property(self) -> float:
        return 1.0

    @staticmethod
    def size_by_class() -> float:
        return 1.0

    def forward(self, x: Tensor, z: Tensor, times: float = 1.0) -> Tensor:
        size = self.size * self.sizes[0] * self.named["a"] * self.shared * self.table["a"]
        size *= SIZE * SIZES["all"] * times * self.sized_by_map() * self.of_the_base
        size *= self.size_by_property * self.size_by_class()
        h = z
        for part in self.inputs:
            h = part(h)
        return self.out(self.inherited(self.holder.sized(self.first(x)) * size + self.drop(h)))


class Bent(nn.Module):
    """A module of the user's own inside a map."""

    def forward(self, u: Tensor) -> Tensor:
        return bent(u)


class Map(Base):
    """tanh(A x + tanh(B z + b)), with numbers, tables and parts of many kinds in it."""

    shared = 1.0

    def sized_by_map(self) -> float:
        return 1.0

    table = {"a": 1.0}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.inputs = nn.ModuleList([nn.Linear(D, D), nn.Tanh()])
        self.drop = nn.Dropout(0.5)
        self.out = Bent()
        self.holder = Holder()
        self.size, self.sizes, self.named = 1.0, [1.0], {"a": 1.0}
        nn.init.orthogonal_(self.first.weight, 0.5)
        self.to(F64).eval()


def function_of(weight: Tensor, size: float = 1.0) -> Callable[..., Tensor]:
    """A g that closes over its weight and a number."""

    def g(x: Tensor, z: Tensor, times: float = 1.0) -> Tensor:
        return bent(x @ weight * (size * times * SIZE * SIZES["all"]) + z)

    return g


def orthogonal() -> Tensor:
    return nn.init.orthogonal_(torch.empty(D, D, dtype=F64), 0.5).requires_grad_()


class Case:
    """One g, solved until its plan is kept.

    Attributes:
        g: the map. z: its input. weight: of x, a leaf. first: the module that holds it.
        patch, stack: for what has to be undone.
        leaves: what gradients are compared in; None: parameters of g, the weight and z.
        call: solves now. loop: the same by hand.
    """

    def __init__(self, kind: str, route: str | None, patch: Any, stack: ExitStack) -> None:
        torch.manual_seed(0)
        self.kind, self.route, self.patch, self.stack = kind, route, patch, stack
        self.g: Any
        self.first: Any = None
        if kind == "module":
            self.g = Map()
            self.first = self.g.first
        elif kind == "cell":
            self.g = cells.Dense(D, D, dtype=F64)
            self.first = self.g.A
        else:
            self.g = function_of(orthogonal())
        self.z = torch.randn(B, D, dtype=F64, requires_grad=True)
        self.layer: Any = self.layer_of(self.g)
        self.leaves: list[Tensor] | None = None
        self.call: Callable[[], Tensor] = lambda: self.layer(self.z)
        self.loop: Callable[[], Tensor] = lambda: by_hand(self.g, self.z)

    def layer_of(self, g: Any) -> Any:
        if isinstance(g, nn.Module):
            return fpi.FPILayer(g, route=self.route, **TIGHT)
        return lambda z: fpi.fixed_point(g, torch.zeros_like(z), z, route=self.route, **TIGHT).value

    @property
    def weight(self) -> Tensor:
        if self.kind == "function":
            return self.cell("weight").cell_contents
        return self.first.weight

    def cell(self, name: str) -> Any:
        """The cell of a closure."""
        return self.g.__closure__[self.g.__code__.co_freevars.index(name)]

    def all_leaves(self) -> list[Tensor]:
        if self.leaves is not None:
            return self.leaves
        held = [*self.g.parameters()] if isinstance(self.g, nn.Module) else [self.weight]
        return [t for t in (*held, self.z) if t.requires_grad and t.is_leaf]

    def keeps(self) -> bool:
        """Whether the next solve goes by a plan."""
        options = fpi.FPILayer(self.g, route=self.route, **TIGHT).options
        z = self.z
        return kept.kept_solution(self.g, torch.zeros_like(z), (z,), options) is not None

    def why(self) -> str:
        """Which way a solve has gone."""
        layer = fpi.FPILayer(self.g, **TIGHT)
        layer(self.z, x0=torch.zeros_like(self.z))
        return layer.explain().splitlines()[0]

    def warm(self) -> None:
        if self.route == "host":
            self.call()
            return
        for _ in range(2):
            self.compare()
        assert self.keeps(), self.why()

    @contextmanager
    def unless_unavailable(self) -> Iterator[None]:
        """Let the fused loop say that it is none for such a g."""
        try:
            yield
        except RuntimeError as error:
            if self.route != "fused" or 'route="fused" was asked for' not in str(error):
                raise

    def compare(self) -> bool:
        """Compare a solve with the loop; False where the route cannot be had."""
        leaves = self.all_leaves()
        expected = self.loop()
        value = None
        with self.unless_unavailable():
            value = self.call()
        if value is None:
            return False
        close(value, expected)
        if expected.requires_grad and leaves:
            v = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
            given: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
            wanted = torch.autograd.grad(expected, leaves, v, **given)
            found = torch.autograd.grad(value, leaves, v, **given)
            for mine, theirs in zip(found, wanted, strict=True):
                close(mine, theirs)
        else:
            assert value.requires_grad == expected.requires_grad
        return True


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def by_hand(g: Any, *z: Tensor, steps: int = STEPS) -> Tensor:
    """The fixed point by a loop that autograd follows."""
    x = torch.zeros_like(z[0], requires_grad=torch.is_grad_enabled())  # as hooks expect
    for _ in range(steps):
        x = g(x, *z)
    return x
