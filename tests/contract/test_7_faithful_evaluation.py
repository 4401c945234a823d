"""Contract clause 7: g is evaluated as calling it does, whatever the user hangs on it."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tape import TapeGraphs
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fpi_cuda as fpi
from fpi_cuda import cells, device_loop
from fpi_cuda.device_loop.cache import PlanCache
from fpi_cuda.implicit import hoisting
from fpi_cuda.lowered import Layer, Lowered
from fpi_cuda.state import layout_of

F64 = torch.float64
B, D = 8, 6
TIGHT = {"rtol": 1e-12, "max_steps": 400}
# The fixed point of what a call of g says, to many more digits than any way of passing it over.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def dense() -> cells.Cell:
    return cells.Dense(D, D)


def mlp() -> cells.Cell:
    return cells.MLP(D, D, 9, "tanh", "tanh")


def descent() -> cells.Cell:
    return cells.GradientDescent(cells.MLPEnergy(D, D, 9), 0.4)


class Own(cells.Cell):
    """tanh(M x + z), with lower()."""

    def __init__(self) -> None:
        super().__init__()
        self.x_features = D
        self.M = nn.Linear(D, D, bias=False)
        nn.init.orthogonal_(self.M.weight, 0.5)

    def prepare(self, z: Tensor) -> Tensor:
        return z

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return torch.tanh(self.M(x) + prepared)

    def lower(self, prepared: Tensor) -> Lowered:
        return Lowered((Layer(self.M.weight, "tanh", shift=prepared),))


class Pair(nn.Module):
    """A tuple state, with prepare and step."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Linear(D, D)
        nn.init.orthogonal_(self.A.weight, 0.5)

    def prepare(self, z: Tensor) -> Tensor:
        return 2 * z

    def step(self, x: Any, prepared: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.A(x[1]) + prepared), 0.4 * torch.sin(x[0])

    def forward(self, x: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.step(x, self.prepare(z))


CELLS: dict[str, Callable[[], nn.Module]] = {
    "dense": dense, "mlp": mlp, "descent": descent, "own": Own, "pair": Pair,
}  # fmt: skip


def halved(out: Any) -> Any:
    return tuple(0.5 * t for t in out) if isinstance(out, tuple) else 0.5 * out


def start(g: Any, dtype: torch.dtype = F64) -> Any:
    zero = torch.zeros(B, D, dtype=dtype)
    return (zero, zero) if isinstance(g, Pair) else zero


def by_hand(g: Any, z: Tensor, steps: int = 300) -> Any:
    x = start(g, z.dtype)
    for _ in range(steps):
        x = g(x, z)
    return x


def inputs() -> Tensor:
    return torch.randn(B, D, dtype=F64)


# --- what hangs on the call of g ----------------------------------------------------------------


def forward_hook(g: nn.Module) -> None:
    g.register_forward_hook(lambda m, args, out: halved(out))


def hook_with_kwargs(g: nn.Module) -> None:
    g.register_forward_hook(
        lambda m, args, kwargs, out: halved(out), with_kwargs=True, always_call=True
    )


def pre_hook(g: nn.Module) -> None:
    g.register_forward_pre_hook(lambda m, args: (args[0], 2 * args[1]))


def patched_forward(g: nn.Module) -> None:
    old = g.forward
    g.forward = lambda x, *z: halved(old(x, *z))


def patched_call(g: nn.Module) -> None:
    old = g._call_impl
    g._call_impl = lambda *args: halved(old(*args))  # type: ignore[method-assign]


def compiled(g: nn.Module) -> None:
    # As module.compile() does, whose compiler would make this the slowest test of all.
    old = g._call_impl
    g._compiled_call_impl = lambda *args: halved(old(*args))  # type: ignore[assignment]


def other_class(g: nn.Module) -> None:
    kind = type(g)

    class Half(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Any, *z: Tensor) -> Any:
            return halved(super().forward(x, *z))

    g.__class__ = Half


def other_call(g: nn.Module) -> None:
    kind = type(g)

    class Half(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: Any, *z: Tensor) -> Any:
            return halved(super().__call__(x, *z))

    g.__class__ = Half


HUNG = {
    f.__name__: f
    for f in (
        forward_hook, hook_with_kwargs, pre_hook, patched_forward, patched_call, compiled,
        other_class, other_call,
    )
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("how", HUNG)
@pytest.mark.parametrize("name", CELLS)
def test_what_hangs_on_g_is_evaluated(name: str, how: str, backend: str | None) -> None:
    g, z = CELLS[name]().double(), inputs()
    plain = by_hand(g, z)
    HUNG[how](g)
    expected = by_hand(g, z)
    assert not torch.allclose(torch.stack(parts(plain)), torch.stack(parts(expected)), rtol=1e-3)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            sol = fpi.fixed_point(g, start(g), z, backend=backend, **TIGHT)
        assert sol.converged.all()
        torch.testing.assert_close(parts(sol.value), parts(expected), **CLOSE)


def parts(x: Any) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in (x if isinstance(x, tuple) else (x,)))


@pytest.mark.parametrize("how", HUNG)
@pytest.mark.parametrize("name", CELLS)
def test_the_layer_says_so_and_the_fused_loop_refuses(name: str, how: str) -> None:
    g = CELLS[name]()
    assert "runs once per solve" in fpi.FPILayer(g).explain()
    HUNG[how](g)
    text = fpi.FPILayer(g).explain()
    assert "g(x, *z) runs whole in every step (" in text
    assert "fused loop:" not in text
    assert "has no prepare" not in text
    with pytest.raises(RuntimeError, match='route="fused" was asked for'):
        fpi.fixed_point(g, start(g, torch.float32), torch.randn(B, D), route="fused")


ADJOINTS = {
    "implicit": fpi.Implicit(),
    "gmres": fpi.Implicit(solver=fpi.GMRES()),
    "neumann": fpi.Neumann(k=80),
    "phantom": fpi.Phantom(k=80, tau=1.0),
    "unroll": fpi.Unroll(),
}


def derivatives(value: Any, inputs: list[Tensor], order: int) -> list[Tensor]:
    found: list[Tensor] = []
    scalar = sum(t.square().sum() for t in (value if isinstance(value, tuple) else (value,)))
    for level in range(order):
        last = level == order - 1
        found = list(torch.autograd.grad(scalar, inputs, create_graph=not last))
        scalar = sum((t.square().sum() for t in found), torch.zeros((), dtype=F64))
    return found


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize(
    ("name", "how"),
    [("dense", "forward_hook"), ("descent", "other_class"), ("pair", "patched_forward")],
)
def test_derivatives_are_those_of_the_call(name: str, how: str, adjoint: str, order: int) -> None:
    g, z = CELLS[name]().double(), inputs().requires_grad_()
    HUNG[how](g)
    given = [z, *g.parameters()]
    expected = derivatives(by_hand(g, z, 100), given, order)
    sol = fpi.fixed_point(g, start(g), z, adjoint=ADJOINTS[adjoint], solver=fpi.Picard(), **TIGHT)
    found = derivatives(sol.value, given, order)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_transforms_and_forward_mode_see_it_too() -> None:
    g, z, t = Own().double(), inputs(), inputs()
    forward_hook(g)

    def solve(z: Tensor) -> Tensor:
        return fpi.fixed_point(g, start(g), z, **TIGHT).value

    def loop(z: Tensor) -> Tensor:
        return by_hand(g, z, 100)

    for transform in (
        lambda f: torch.func.jvp(f, (z,), (t,))[1],
        lambda f: torch.func.grad(lambda z: f(z).square().sum())(z),
        lambda f: torch.func.vmap(f)(torch.stack([z, t])),
    ):
        torch.testing.assert_close(transform(solve), transform(loop), rtol=1e-7, atol=1e-8)
    with torch.inference_mode():
        torch.testing.assert_close(solve(z), loop(z), **CLOSE)
    named = {name: 0.5 * p.detach() for name, p in g.named_parameters()}
    layer = fpi.FPILayer(g, **TIGHT)
    found = torch.func.functional_call(layer, {f"g.{n}": p for n, p in named.items()}, (z,))
    x = start(g)
    for _ in range(100):
        x = torch.func.functional_call(g, named, (x, z))
    torch.testing.assert_close(found, x, **CLOSE)


def test_a_hook_counts_from_the_next_solve_on() -> None:
    g, z = dense().double(), inputs()
    layer = fpi.FPILayer(g, **TIGHT)
    before = layer(z)
    handle = g.register_forward_hook(lambda m, args, out: 0.5 * out)
    torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)
    torch.testing.assert_close(copy.deepcopy(layer)(z), by_hand(g, z), **CLOSE)
    handle.remove()
    assert torch.equal(layer(z), before)


@pytest.mark.parametrize("route", [None, "host"])
def test_a_hook_added_before_backward_changes_nothing_or_raises(route: str | None) -> None:
    g, z = dense().double(), inputs().requires_grad_()
    expected = derivatives(by_hand(g, z, 100), [z], 1)
    value = fpi.fixed_point(g, start(g), z, route=route, **TIGHT).value
    g.register_forward_hook(lambda m, args, out: 0.5 * out)
    torch.testing.assert_close(derivatives(value, [z], 1), expected, rtol=1e-7, atol=1e-8)
    value = fpi.fixed_point(g, start(g), z, route=route, **TIGHT).value
    g._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="another value"):
        torch.autograd.grad(value.sum(), z, create_graph=True)


def test_hooks_on_all_modules() -> None:
    z = inputs()
    for make in CELLS.values():
        g = make().double()
        handle = register_module_forward_hook(
            lambda m, args, out, g=g: halved(out) if m is g else None
        )
        try:
            expected = by_hand(g, z)
            value = fpi.fixed_point(g, start(g), z, **TIGHT).value
            assert "hooks on all modules" in fpi.FPILayer(g).explain()
        finally:
            handle.remove()
        torch.testing.assert_close(parts(value), parts(expected), **CLOSE)


# --- hooks and patches further in ---------------------------------------------------------------

INSIDE: dict[str, Callable[[nn.Module, pytest.MonkeyPatch], Any]] = {
    "hook": lambda m, _: m.register_forward_hook(lambda m, args, out: 0.5 * out),
    "pre_hook": lambda m, _: m.register_forward_pre_hook(lambda m, args: (0.5 * args[0],)),
    "patched": lambda m, _: setattr(m, "forward", lambda x: 0.5 * functional.linear(x, m.weight)),
    "linear": lambda m, patch: patch.setattr(
        nn.Linear, "forward", lambda s, x: 0.5 * functional.linear(x, s.weight, s.bias)
    ),
    "functional": lambda m, patch: patch.setattr(
        functional, "linear", lambda x, w, b=None: 0.5 * torch._C._nn.linear(x, w, b)
    ),
    "pruned": lambda m, _: prune.l1_unstructured(m, "weight", 0.5),
    "weight_norm": lambda m, _: parametrize.register_parametrization(m, "weight", Doubled()),
}


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def true_step(g: Any, x: Tensor, z: Tensor) -> Tensor:
    """A call of g, a descent taken along the gradient that autograd finds of its energy."""
    if not isinstance(g, cells.GradientDescent):
        return g(x, z)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(g.energy(leaf, z).sum(), leaf)
    return (x - g.step_size * gradient).detach()


@pytest.mark.parametrize("route", [None, "host"])
@pytest.mark.parametrize("how", INSIDE)
@pytest.mark.parametrize("name", ["dense", "mlp", "descent", "own"])
def test_what_hangs_on_a_linear_inside(
    name: str, how: str, route: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, z = CELLS[name]().double(), inputs()
    owner = g.energy if isinstance(g, cells.GradientDescent) else g
    INSIDE[how](owner.M if isinstance(g, Own) else owner.A, monkeypatch)
    x = start(g)
    for _ in range(300):
        x = true_step(g, x, z).detach()
    sol = fpi.fixed_point(g, start(g), z, route=route, **TIGHT)
    torch.testing.assert_close(sol.value.detach(), x, **CLOSE)


def energy_hook(energy: nn.Module, patch: pytest.MonkeyPatch) -> None:
    energy.register_forward_hook(lambda m, args, out: 0.5 * out)


def energy_forward(energy: nn.Module, patch: pytest.MonkeyPatch) -> None:
    old = energy.forward
    energy.forward = lambda x, z: 0.5 * old(x, z)


def energy_value(energy: Any, patch: pytest.MonkeyPatch) -> None:
    old = energy.value
    energy.value = lambda x, prepared: 0.5 * old(x, prepared)


def class_value(energy: Any, patch: pytest.MonkeyPatch) -> None:
    old = cells.MLPEnergy.value
    patch.setattr(cells.MLPEnergy, "value", lambda s, x, prepared: 0.5 * old(s, x, prepared))


def class_forward(energy: Any, patch: pytest.MonkeyPatch) -> None:
    old = cells.MLPEnergy.forward
    patch.setattr(cells.MLPEnergy, "forward", lambda s, x, z: 0.5 * old(s, x, z))


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


def other_linear(energy: Any, patch: pytest.MonkeyPatch) -> None:
    energy.A = Halved(D, 9, bias=False).double()


@pytest.mark.parametrize("route", [None, "host"])
@pytest.mark.parametrize(
    "change",
    [energy_hook, energy_forward, energy_value, class_value, class_forward, other_linear],
)
def test_a_descent_follows_the_energy_that_is_called(
    change: Callable[[Any, pytest.MonkeyPatch], None],
    route: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g, z = descent().double(), inputs()
    change(g.energy, monkeypatch)  # type: ignore[arg-type]
    x = torch.randn(B, D, dtype=F64)
    torch.testing.assert_close(g(x, z), true_step(g, x, z))
    sol = fpi.fixed_point(g, start(g), z, route=route, **TIGHT)
    for _ in range(300):
        x = true_step(g, x, z)
    torch.testing.assert_close(sol.value.detach(), x, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "method", "make"),
    [
        (cells.Dense, "step", dense),
        (cells.Dense, "forward", dense),
        (cells.Cell, "forward", mlp),
        (cells.GradientDescent, "step", descent),
        (nn.Module, "__call__", dense),
        (nn.Module, "_call_impl", mlp),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_patched_classes(
    kind: Any, method: str, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    g, z, old = make().double(), inputs(), getattr(kind, method)

    def other(self: nn.Module, *args: Any) -> Any:
        out = old(self, *args)
        return halved(out) if self is g else out

    monkeypatch.setattr(kind, method, other)
    expected = by_hand(g, z)
    torch.testing.assert_close(fpi.FPILayer(g, **TIGHT)(z), expected.detach(), **CLOSE)


class HalvedTanh(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 0.5 * out if func is torch.tanh else out


class HalvedProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 0.5 * out if func is torch.ops.aten.tanh.default else out


@pytest.mark.parametrize("mode", [HalvedTanh, HalvedProducts])
def test_a_mode_sees_what_torch_computes(mode: Any) -> None:
    g, z = Own().double(), inputs()
    with torch.no_grad(), mode():
        expected = by_hand(g, z)
        value = fpi.fixed_point(g, start(g), z, **TIGHT).value
    torch.testing.assert_close(value, expected, **CLOSE)
    # A default device is one too, and sees nothing.
    with torch.no_grad(), torch.device("cpu"):
        assert fpi.fixed_point(g, start(g), z, route="fused", **TIGHT).converged.all()


# --- prepare and step that say something else than the call -------------------------------------


class Disagreeing(nn.Module):
    """prepare and step forget a bias, which the call adds."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Linear(D, D, bias=False)
        nn.init.orthogonal_(self.A.weight, 0.5)
        self.bias = nn.Parameter(torch.zeros(D))

    def prepare(self, z: Tensor) -> Tensor:
        return z

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return torch.tanh(self.A(x) + prepared)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.A(x) + z + self.bias)


def test_a_claim_of_prepare_and_step_is_compared() -> None:
    g, z = Disagreeing().double(), inputs()
    layer = fpi.FPILayer(g, **TIGHT)
    torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)
    assert "runs once per solve" in layer.explain()
    with torch.no_grad():
        g.bias.fill_(1.0)
    torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)
    assert "step(x, prepare(*z)) is not what g(x, *z) is" in layer.explain()


def test_the_claim_is_compared_once() -> None:
    calls = []

    class Claiming(Disagreeing):
        def prepare(self, z: Tensor) -> Tensor:
            calls.append("prepare")
            return super().prepare(z) + self.bias

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            calls.append("forward")
            return super().forward(x, z)

    g, z = Claiming().double(), inputs()
    layer = fpi.FPILayer(g, **TIGHT)
    layer(z)
    assert calls.count("forward") == 1
    calls.clear()
    layer(z)
    assert calls == ["prepare"]
    with torch.no_grad():
        g.bias.fill_(0.5)
    torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)
    g.step = lambda x, prepared: 0.5 * prepared  # type: ignore[method-assign]
    torch.testing.assert_close(layer(z), by_hand(g, z), **CLOSE)


class Raising(Disagreeing):
    """Its prepare and step are for something else."""

    def prepare(self) -> None:  # type: ignore[override]
        pass

    def step(self) -> None:  # type: ignore[override]
        pass

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return super().forward(x, z)


class Callable_:
    """No module."""

    def prepare(self, z: Tensor) -> Tensor:
        return z

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return 0.3 * torch.sin(x) + prepared

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.6 * torch.sin(x) + z


class Inheriting(Callable_):
    __slots__ = ()

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * super().__call__(x, z)


def function() -> Any:
    def g(x: Tensor, z: Tensor) -> Tensor:
        return 0.6 * torch.sin(x) + z

    g.prepare = lambda z: z  # type: ignore[attr-defined]
    g.step = lambda x, prepared: 0.3 * torch.sin(x) + prepared  # type: ignore[attr-defined]
    return g


@pytest.mark.parametrize("make", [Raising, Callable_, Inheriting, function])
def test_the_call_is_right_where_they_disagree(make: Callable[[], Any]) -> None:
    g, z = make(), inputs()
    g = g.double() if isinstance(g, nn.Module) else g
    expected = by_hand(g, z)
    sol = fpi.fixed_point(g, start(g), z, **TIGHT)
    torch.testing.assert_close(sol.value.detach(), expected.detach(), **CLOSE)
    # What cannot be compared is called, too.
    hoisting._verdicts.pop(g, None)
    found = torch.func.jvp(lambda z: fpi.fixed_point(g, start(g), z, **TIGHT).value, (z,), (z,))
    torch.testing.assert_close(found[0].detach(), expected.detach(), **CLOSE)


def test_comparing_leaves_no_trace() -> None:
    class Normed(Disagreeing):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(D)

        def step(self, x: Tensor, prepared: Tensor) -> Tensor:
            return 0.5 * self.norm(super().step(x, prepared))

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return 0.5 * self.norm(torch.tanh(self.A(x) + z))

    g, z = Normed().double(), inputs()
    before = copy.deepcopy(g.state_dict())
    random = torch.get_rng_state()
    assert hoisting.why_whole(g, layout_of(start(g)), (z,)) is None
    torch.testing.assert_close(g.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    gone = weakref.ref(g)
    del g
    gc.collect()
    assert gone() is None


# --- captured loops -----------------------------------------------------------------------------


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let states on the CPU be captured, on a stand-in for CUDA graphs."""
    monkeypatch.setitem(device_loop.GRAPHS, "cpu", TapeGraphs())
    monkeypatch.setattr(device_loop, "plans", PlanCache())


@pytest.mark.usefixtures("tape")
@pytest.mark.parametrize("on", ["g", "inside"])
def test_a_captured_loop_does_not_pass_hooks_over(on: str) -> None:
    g, z, seen = Plain().double(), inputs(), []
    options = {"solver": fpi.Picard(), **TIGHT}
    fpi.fixed_point(g, start(g), z, route="device", **options)
    (g if on == "g" else g.A).register_forward_hook(lambda m, args, out: seen.append(1))
    with pytest.raises(RuntimeError, match="has hooks, which must see its evaluations"):
        fpi.fixed_point(g, start(g), z, route="device", **options)
    assert "has hooks, which must see its evaluations" in fpi.FPILayer(g).explain()
    seen.clear()
    with torch.no_grad():
        sol = fpi.fixed_point(g, start(g), z, **options)
    assert len(seen) >= int(sol.num_steps.max())


@pytest.mark.usefixtures("tape")
def test_a_captured_loop_takes_hooks_that_compute_weights() -> None:
    g, z = Plain().double(), inputs()
    prune.l1_unstructured(g.A, "weight", 0.5)
    sol = fpi.fixed_point(g, start(g), z, route="device", **TIGHT)
    torch.testing.assert_close(sol.value, by_hand(g, z), **CLOSE)


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.register_forward_hook(lambda m, args, out: out - 0.5 * out.mean(0)),
        lambda g: g.A.register_forward_hook(lambda m, args, out: out - 0.5 * out.mean(0)),
        lambda g: setattr(g, "A", nn.Sequential(g.A, nn.BatchNorm1d(D, dtype=F64))),
        lambda g: setattr(g, "A", Centred(D, D, bias=False, dtype=F64)),
    ],
    ids=["hook", "inside", "batch_norm", "other"],
)
def test_a_cell_does_not_promise_rows_for_what_hangs_on_it(change: Any) -> None:
    g = dense().double()
    change(g)
    text = fpi.FPILayer(g).explain()
    assert "all are evaluated until the last one stops (g.rowwise is True, but" in text
    assert "stopped ones leave the batch" in fpi.FPILayer(dense()).explain()
    assert "stopped ones leave the batch" in fpi.FPILayer(g, rowwise=True).explain()


class Centred(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - input.mean(0))


# --- backward hooks -----------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Linear(D, D)
        nn.init.orthogonal_(self.A.weight, 0.5)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.A(x) + z)


def scaled(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else 0.5 * g for g in grads)


def tensor_hook(change: bool, seen: list[int]) -> Callable[..., Any]:
    def on_output(m: nn.Module, args: Any, out: Any) -> Any:
        def hooked(t: Tensor) -> Tensor:
            t = t.clone()
            if t.requires_grad:
                t.register_hook(lambda grad: (seen.append(1), 0.5 * grad if change else None)[1])
            return t

        return tuple(map(hooked, out)) if isinstance(out, tuple) else hooked(out)

    return on_output


def hang(g: nn.Module, kind: str, change: bool) -> list[int]:
    seen: list[int] = []
    if kind == "full":
        g.register_full_backward_hook(
            lambda m, into, out: (seen.append(1), scaled(into) if change else None)[1]
        )
    elif kind == "pre":
        g.register_full_backward_pre_hook(
            lambda m, out: (seen.append(1), scaled(out) if change else None)[1]
        )
    else:
        g.register_forward_hook(tensor_hook(change, seen))
    return seen


BACKWARD = ["full", "pre", "tensor"]


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize(
    ("make", "kind", "change"),
    [
        *itertools.product([dense, Plain], BACKWARD, [False, True]),
        # Of a tuple, torch shows such hooks parts.
        *itertools.product([Pair], BACKWARD, [False]),
        (Pair, "tensor", True),
    ],
)
def test_backward_hooks_act_on_every_product(
    make: Callable[[], nn.Module], kind: str, adjoint: str, change: bool
) -> None:
    g, z = make().double(), inputs().requires_grad_()
    seen = hang(g, kind, change)
    expected = derivatives(by_hand(g, z, 60), [z, *g.parameters()], 1)
    seen.clear()
    sol = fpi.fixed_point(g, start(g), z, adjoint=ADJOINTS[adjoint], solver=fpi.Picard(), **TIGHT)
    found = derivatives(sol.value, [z, *g.parameters()], 1)
    # Of a tuple state, torch shows a full hook z alone.
    assert len(seen) > (0 if make is Pair and kind == "full" else 3)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("adjoint", ["implicit", "neumann", "unroll"])
@pytest.mark.parametrize("kind", BACKWARD)
@pytest.mark.parametrize("make", [dense, Plain, Pair])
def test_hooks_that_look_have_second_derivatives(
    make: Callable[[], nn.Module], kind: str, adjoint: str
) -> None:
    g, z = make().double(), inputs().requires_grad_()
    given = [z, *g.parameters()]
    expected = derivatives(by_hand(g, z, 60), given, 2)
    seen = hang(g, kind, change=False)
    sol = fpi.fixed_point(g, start(g), z, adjoint=ADJOINTS[adjoint], solver=fpi.Picard(), **TIGHT)
    found = derivatives(sol.value, given, 2)
    assert seen
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adjoint", ["implicit", "gmres", "neumann", "phantom"])
@pytest.mark.parametrize("kind", BACKWARD)
@pytest.mark.parametrize("make", [dense, Plain])
def test_hooks_that_change_gradients_have_none(
    make: Callable[[], nn.Module], kind: str, adjoint: str
) -> None:
    g, z = make().double(), inputs().requires_grad_()
    hang(g, kind, change=True)
    value = fpi.fixed_point(g, start(g), z, adjoint=ADJOINTS[adjoint], **TIGHT).value
    with pytest.raises(RuntimeError, match="a backward hook on g or inside it changes these"):
        derivatives(value, [z], 2)


@pytest.mark.parametrize("adjoint", [*ADJOINTS.values(), fpi.JacobianFree()], ids=str)
def test_a_full_backward_hook_is_called(adjoint: Any) -> None:
    for g in (dense(), Plain(), Own()):
        seen = hang(g, "full", change=False)
        z = torch.randn(B, D, requires_grad=True)
        fpi.FPILayer(g, adjoint=adjoint)(z).sum().backward()
        assert seen


# --- wrappers -----------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Hands on what it does not have, as FullyShardedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, x: Tensor, *z: Tensor) -> Tensor:
        return 0.5 * self.module(x, *z)


@pytest.mark.parametrize("make", [dense, mlp, descent, Own])
def test_a_wrapper_is_called_itself(make: Callable[[], nn.Module]) -> None:
    g, z = Wrapper(make().double()), inputs()
    assert callable(g.step)
    torch.testing.assert_close(fpi.FPILayer(g, **TIGHT)(z), by_hand(g, z), **CLOSE)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_managed_by_fully_shard(tmp_path: Any) -> None:
    distributed = pytest.importorskip("torch.distributed")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("no gloo")
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        z = torch.randn(B, D)
        for on in ("g", "layer", "A"):
            torch.manual_seed(1)
            reference = fpi.FPILayer(dense(), rtol=1e-6, route="host")
            torch.manual_seed(1)
            layer = fpi.FPILayer(dense(), rtol=1e-6)
            sharded = {"g": layer.g, "layer": layer, "A": layer.g.A}[on]
            fsdp.fully_shard(sharded, mesh=mesh, reshard_after_forward=True)
            for run in (reference, layer):
                run(z).square().sum().backward()
            for mine, plain in zip(layer.parameters(), reference.parameters(), strict=True):
                grad = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
                torch.testing.assert_close(grad, plain.grad, rtol=1e-4, atol=1e-5)
    finally:
        distributed.destroy_process_group()
