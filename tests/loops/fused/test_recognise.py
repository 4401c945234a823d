"""Forms of a user's g that a trace is recognised as, and the reasons where it is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear
from torch.nn.utils import parametrizations

import fpi_cuda as fpi
from fpi_cuda.loops.fused import kept
from fpi_cuda.loops.fused.forms import forms, lowered_by
from fpi_cuda.lowered import NotLowered

pytestmark = pytest.mark.skipif(not fpi.native_available(), reason="no native library")

B, D, K, H = 5, 4, 3, 6
F64 = torch.float64


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Capture, and begin without captures."""
    monkeypatch.setenv("FPI_CUDA_CAPTURE", "1")
    forms.clear()
    kept.clear()
    yield
    forms.clear()
    kept.clear()


class Weights(nn.Module):
    """What the maps below are made of; P is short for it."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()

        def normal(*shape: int, size: float = 1.0) -> nn.Parameter:
            return nn.Parameter(size * torch.randn(*shape, dtype=dtype))

        self.A = normal(H, D, size=0.3)
        self.C = normal(H, K)
        self.b = normal(H)
        self.O = normal(D, H, size=0.2)
        self.w = nn.Parameter(torch.rand(H, dtype=dtype))
        self.row = normal(1, H, size=0.3)
        self.S = normal(D, D, size=0.2)
        self.U = normal(D, K)
        self.d = normal(D)
        self.xz = normal(D, D + K, size=0.2)
        self.hidden_xz = normal(H, D + K, size=0.2)
        self.one = nn.Parameter(torch.tensor(0.4, dtype=dtype))


Map = Callable[[Tensor, Tensor, Weights], Tensor]


def in_place(x: Tensor, z: Tensor, P: Weights) -> Tensor:
    out = linear(x, P.S, P.d)
    out += linear(z, P.U)
    return torch.tanh(out)


MAPS: dict[str, tuple[Map, str]] = {
    "x and z joined": (
        lambda x, z, P: torch.tanh(linear(torch.cat([x, z], -1), P.xz, P.d)),
        "tanh(W x + b)",
    ),
    "z and x joined": (
        lambda x, z, P: torch.tanh(torch.cat((z, x), dim=1) @ P.xz.T + P.d),
        "tanh(W x + b)",
    ),
    "hstack": (lambda x, z, P: torch.tanh(torch.hstack([x, z]) @ P.xz.T), "tanh(W x + b)"),
    "joined, two layers": (
        lambda x, z, P: linear(
            torch.relu(linear(torch.cat([x, z], -1), P.hidden_xz, P.b)), P.O, P.d
        ),
        "W2 relu(W1 x + b1) + b2",
    ),
    "joined inside": (
        lambda x, z, P: linear(torch.cat([torch.relu(linear(x, P.S, P.d)), z], -1), P.xz),
        "W2 relu(W1 x + b1) + b2",
    ),
    "W (x + z)": (lambda x, z, P: torch.tanh(linear(x + z @ P.U.T, P.S, P.d)), "tanh(W x + b)"),
    "z behind the first layer": (
        lambda x, z, P: torch.tanh(linear(torch.relu(linear(x, P.A, P.b)) + z @ P.C.T, P.O)),
        "tanh(W2 relu(W1 x + b1) + b2)",
    ),
    "einsum": (
        lambda x, z, P: torch.tanh(
            torch.einsum("bi,oi->bo", x, P.S) + torch.einsum("k o, b k -> b o", P.U.T, z)
        ),
        "tanh(W x + b)",
    ),
    "einsum, weight first": (
        lambda x, z, P: torch.tanh(torch.einsum("io, bi -> bo", P.S, x) + z @ P.U.T),
        "tanh(W x + b)",
    ),
    "addmm": (lambda x, z, P: torch.tanh(torch.addmm(z @ P.U.T, x, P.S.t())), "tanh(W x + b)"),
    "mm": (lambda x, z, P: torch.tanh(x.mm(P.S.t()) + z.mm(P.U.t())), "tanh(W x + b)"),
    "in place": (in_place, "tanh(W x + b)"),
    "damped": (
        lambda x, z, P: x + 0.5 * (torch.tanh(linear(x, P.S) + z @ P.U.T) - x),
        "a tanh(W x + b) + 0.5 x",
    ),
    "damped by alpha": (
        lambda x, z, P: torch.add(x, torch.tanh(linear(x, P.S) + z @ P.U.T) - x, alpha=0.5),
        "a tanh(W x + b) + 0.5 x",
    ),
    "lerp": (
        lambda x, z, P: torch.lerp(x, torch.tanh(linear(x, P.S) + z @ P.U.T), 0.25),
        "a tanh(W x + b) + 0.75 x",
    ),
    "two weights": (
        lambda x, z, P: torch.tanh(linear(x, P.S) + 0.5 * (x @ P.S) + z @ P.U.T),
        "tanh(W x + b)",
    ),
    "gate": (
        lambda x, z, P: torch.sigmoid(z @ P.U.T) * torch.tanh(linear(x, P.S, P.d)),
        "a tanh(W x + b)",
    ),
    "a residual that is not read": (
        lambda x, z, P: (x.exp().sum(), torch.tanh(linear(x, P.S) + z @ P.U.T))[1],
        "tanh(W x + b)",
    ),
}


def hidden(x: Tensor, z: Tensor, P: Weights) -> Tensor:
    return x @ P.A.T + z @ P.C.T + P.b


def bowl(x: Tensor) -> Tensor:
    return 0.5 * (x * x).sum(-1)


def tanh_energy(x: Tensor, z: Tensor, P: Weights) -> Tensor:
    return (torch.tanh(hidden(x, z, P)) * P.w).sum(-1) + bowl(x)


def joined_energy(x: Tensor, z: Tensor, P: Weights) -> Tensor:
    h = torch.tanh(linear(torch.cat([x, z], -1), P.hidden_xz, P.b))
    return linear(h, P.row, P.one[None]).squeeze(-1) + bowl(x)


def in_place_energy(x: Tensor, z: Tensor, P: Weights) -> Tensor:
    h = linear(x, P.A)
    h += linear(z, P.C)
    return torch.sigmoid(h).sum(1) + bowl(x)


DESCENT = "W2 {}(W1 x + b1) + 0.7 x"
ENERGIES: dict[str, tuple[Map, str]] = {
    "tanh": (tanh_energy, DESCENT.format("tanh_derivative")),
    "sigmoid": (
        lambda x, z, P: torch.sigmoid(hidden(x, z, P)) @ P.w + bowl(x),
        DESCENT.format("sigmoid_derivative"),
    ),
    "gelu": (
        lambda x, z, P: functional.gelu(hidden(x, z, P)).sum(1) + bowl(x),
        DESCENT.format("gelu_derivative"),
    ),
    "softplus": (
        lambda x, z, P: (functional.softplus(hidden(x, z, P)) * P.w).sum(1) + bowl(x),
        DESCENT.format("sigmoid"),
    ),
    "joined": (joined_energy, DESCENT.format("tanh_derivative")),
    "in place": (in_place_energy, DESCENT.format("sigmoid_derivative")),
    "keepdim": (
        lambda x, z, P: (
            linear(torch.tanh(hidden(x, z, P)), P.row) + 0.5 * x.pow(2).sum(1, keepdim=True)
        ),
        DESCENT.format("tanh_derivative"),
    ),
    "distance": (
        lambda x, z, P: (
            torch.tanh(linear(x, P.A, P.b)) @ P.w + ((x - z @ P.U.T) ** 2).sum(dim=1) / 2
        ),
        "W2 tanh_derivative(W1 x + b1) + b2 + 0.7 x",
    ),
    "linear in x": (
        lambda x, z, P: torch.tanh(linear(x, P.A, P.b)).sum(1) - (x * (z @ P.U.T)).sum(1) + bowl(x),
        "W2 tanh_derivative(W1 x + b1) + b2 + 0.7 x",
    ),
    "weights by z": (
        lambda x, z, P: (
            (torch.sigmoid(z @ P.C.T) * torch.tanh(linear(x, P.A, P.b))).sum(1) + bowl(x)
        ),
        "W2 a1 tanh_derivative(W1 x + b1) + 0.7 x",
    ),
    "least squares": (
        lambda x, z, P: 0.5 * (linear(x, P.A) - z @ P.C.T).square().sum(1) + bowl(x),
        "W2 (W1 x + b1) + 0.7 x",
    ),
    "quadratic form": (
        lambda x, z, P: bowl(x) - 0.5 * ((x @ P.S) * x).sum(1) - (x * (z @ P.U.T)).sum(1),
        "W x + b + 0.7 x",
    ),
    "mean": (
        lambda x, z, P: torch.tanh(hidden(x, z, P)).mean(1) + D * 0.5 * x.square().mean(-1),
        DESCENT.format("tanh_derivative"),
    ),
}


def step_where_needed(energy: Map, x: Tensor, z: Tensor, P: Weights) -> Tensor:
    with torch.enable_grad():
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(x, z, P).sum(), x, create_graph=True)
    return x - 0.3 * slope


def step_set(energy: Map, x: Tensor, z: Tensor, P: Weights) -> Tensor:
    with torch.enable_grad():
        x = x.requires_grad_()
        slope = torch.autograd.grad(energy(x, z, P).sum(), [x], create_graph=True)[0]
    return x - 0.3 * slope


def step_of_copy(energy: Map, x: Tensor, z: Tensor, P: Weights) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        slope = torch.autograd.grad(energy(x, z, P).sum(), x, create_graph=True)[0]
    return x - 0.3 * slope


def step_by_ones(energy: Map, x: Tensor, z: Tensor, P: Weights) -> Tensor:
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        e = energy(x, z, P)
        slope = torch.autograd.grad(e, x, torch.ones_like(e), create_graph=True)[0]
    return x - 0.3 * slope


def step_by_func(energy: Map, x: Tensor, z: Tensor, P: Weights) -> Tensor:
    return x - 0.3 * torch.func.grad(lambda y: energy(y, z, P).sum())(x)


def step_by_vjp(energy: Map, x: Tensor, z: Tensor, P: Weights) -> Tensor:
    value, pull = torch.func.vjp(lambda y: energy(y, z, P).sum(), x)
    return x - 0.3 * pull(torch.ones_like(value))[0]


def step_by_partial(energy: Map, x: Tensor, z: Tensor, P: Weights) -> Tensor:
    return x - 0.3 * fpi.partial(lambda y: energy(y, z, P), x)


STEPS = (
    step_where_needed, step_set, step_of_copy, step_by_ones,
    step_by_func, step_by_vjp, step_by_partial,
)  # fmt: skip


def zero_state(z: Tensor) -> Tensor:
    return torch.zeros(len(z), D, dtype=z.dtype)


def closed(f: Map, P: Weights) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, z: f(x, z, P)


def solved(g: Any, z: Tensor, inputs: list[Tensor], route: str | None) -> list[Tensor]:
    """The value, its gradient, and a gradient of that."""
    rtol = 1e-12 if z.dtype == F64 else 1e-6
    found = []
    for create_graph in (False, True):
        solution = fpi.fixed_point(
            g, zero_state(z), z, rtol=rtol, max_steps=1000, route=route, throw=True
        )
        scalar = solution.value.sin().sum()
        grads = torch.autograd.grad(
            scalar, inputs, create_graph=create_graph, materialize_grads=True
        )
        found += [solution.value, *grads]
    second = torch.stack([t.sin().sum() for t in grads if t.requires_grad]).sum()
    found += torch.autograd.grad(second, inputs, materialize_grads=True)
    return [t.detach() for t in found]


def require_agreement(g: Any, P: nn.Module, z: Tensor) -> None:
    """By the fused loop and by a plan that was kept, a solve is what it is by g itself."""
    inputs = [z, *P.parameters()]
    expected = solved(g, z, inputs, "host")
    tolerance = 1e-9 if z.dtype == F64 else 1e-3
    for route in ("fused", None):  # the second by the plan of the first
        for t, e in zip(solved(g, z, inputs, route), expected, strict=True):
            torch.testing.assert_close(t, e, rtol=tolerance, atol=tolerance)


def words(g: Any, z: Tensor) -> str:
    return forms.of(g, zero_state(z), (z,)).found.words


def given(dtype: torch.dtype = F64, batch: int = B) -> tuple[Weights, Tensor]:
    return Weights(dtype), torch.randn(batch, K, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_recognised(name: str) -> None:
    f, form = MAPS[name]
    P, z = given()
    g = closed(f, P)
    assert words(g, z) == form
    require_agreement(g, P, z)


@pytest.mark.parametrize("name", ENERGIES)
def test_the_gradient_step_of_an_energy_is_recognised(name: str) -> None:
    energy, form = ENERGIES[name]
    P, z = given(torch.float32 if name == "softplus" else F64)
    g = closed(lambda x, z, P: step_where_needed(energy, x, z, P), P)
    assert words(g, z) == form
    require_agreement(g, P, z)


@pytest.mark.parametrize("step", STEPS)
def test_a_gradient_step_may_be_written_in_many_ways(step: Any, loops: list[int]) -> None:
    P, z = given()
    g = closed(lambda x, z, P: step(tanh_energy, x, z, P), P)
    assert words(g, z) == DESCENT.format("tanh_derivative")
    x0 = zero_state(z)
    solution = fpi.fixed_point(g, x0, z, rtol=1e-12, route="fused")
    torch.autograd.grad(solution.value.sum(), z)
    assert len(loops) == 2  # the adjoint is one too
    assert not x0.requires_grad
    require_agreement(g, P, z)


def test_relu_energy_descends_along_its_own_slope() -> None:
    P, z = given()
    g = closed(
        lambda x, z, P: step_where_needed(
            lambda x, z, P: torch.relu(hidden(x, z, P)) @ P.w + bowl(x), x, z, P
        ),
        P,
    )
    found = forms.of(g, zero_state(z), (z,))
    assert found.found.words == DESCENT.format("relu_derivative")
    x = torch.randn(B, D, dtype=F64)
    torch.testing.assert_close(lowered_by(found, found.reads(g, x, (z,)))(x), g(x, z))


def test_only_what_is_differentiated_by_is_differentiated() -> None:
    """x has a part in the energy besides the stand-in for it."""
    P, z = given()

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.func.grad(lambda y: (y * (x @ P.S + z @ P.U.T)).sum())(x)

    assert words(g, z) == "W x + b"
    require_agreement(g, P, z)


class Descent(nn.Module):
    """As it is in tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D + K, H), nn.Softplus(), nn.Linear(H, 1))
        self.size = 0.3

    def energy(self, x: Tensor, z: Tensor) -> Tensor:
        return self.net(torch.cat([x, z], dim=-1)).squeeze(-1) + bowl(x)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            e = self.energy(x, z).sum() * (B / len(x))
            slope = torch.autograd.grad(e, x, create_graph=self.training)[0]
        return x - self.size * slope


def test_an_energy_that_depends_on_the_batch_is_captured_for_each() -> None:
    g, batches = Descent(), (5, 8, 5)
    for batch in batches:
        z = torch.randn(batch, K, requires_grad=True)
        require_agreement(g, g, z)
    numbers = {c.found.carry for c in forms.kind_of(g).captures}
    assert numbers == {1 - 0.3 * (B / batch) for batch in batches}


def test_one_capture_serves_other_batches() -> None:
    P, _ = given()
    g = closed(lambda x, z, P: step_where_needed(joined_energy, x, z, P), P)
    for batch in (5, 8, 9, 12):
        require_agreement(g, P, torch.randn(batch, K, dtype=F64, requires_grad=True))
    assert len(forms.kind_of(g).captures) <= 2


def test_a_step_size_that_changes_is_read() -> None:
    g = Descent()
    z = torch.randn(B, K, requires_grad=True)
    require_agreement(g, g, z)
    g.size = 0.2
    require_agreement(g, g, z)
    g.net[0].weight.data.mul_(0.5)
    require_agreement(g, g, z)


def test_what_only_a_plain_x_meets_is_looked_at() -> None:
    """A solve evaluates g at an x that does not require grad, and a trace was made with one."""
    P, z = given()
    bend = {"on": False}

    def g(x: Tensor, z: Tensor) -> Tensor:
        with torch.enable_grad():
            if not x.requires_grad:
                x = x.detach().requires_grad_()
                if bend["on"]:
                    return step_where_needed(tanh_energy, 2.0 * x, z, P)
            return step_where_needed(tanh_energy, x, z, P)

    require_agreement(g, P, z)
    bend["on"] = True
    with pytest.raises(NotLowered, match="another value where x requires grad"):
        words(g, z)
    with torch.no_grad():
        own = fpi.fixed_point(g, zero_state(z), z, max_steps=50, route="host", throw=True)
        found = fpi.fixed_point(g, zero_state(z), z, max_steps=50)
    assert torch.equal(own.value, found.value)


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm],
)
def test_parametrized_weights_are_computed_once(wrap: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.fz = wrap(nn.Linear(D, D)), nn.Linear(K, D)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.fc(x) + self.fz(z))

    g = Recurrent().eval().double()
    z = torch.randn(B, K, dtype=F64, requires_grad=True)
    assert words(g, z) == "tanh(W x + b)"
    require_agreement(g, g, z)


def descent(energy: Map, **options: Any) -> Map:
    def g(x: Tensor, z: Tensor, P: Weights) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            options.setdefault("create_graph", True)
            slope = torch.autograd.grad(energy(x, z, P).sum(), x, **options)[0]
        return x - 0.3 * slope

    return g


def by_a_detached_x(x: Tensor, z: Tensor, P: Weights) -> Tensor:
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        slope = torch.autograd.grad(tanh_energy(y, z, P).sum(), y, create_graph=True)[0]
    return x - 0.3 * slope


def by_a_learned_step(x: Tensor, z: Tensor, P: Weights) -> Tensor:
    slope = torch.func.grad(lambda y: tanh_energy(y, z, P).sum())(x)
    return x - P.one * slope


def by_vmap(x: Tensor, z: Tensor, P: Weights) -> Tensor:
    slope = torch.func.grad(lambda x, z: tanh_energy(x[None], z[None], P).sum())
    return x - 0.3 * torch.func.vmap(slope)(x, z)


def inplace_relu_energy(x: Tensor, z: Tensor, P: Weights) -> Tensor:
    return functional.relu(hidden(x, z, P), inplace=True).sum(1) + bowl(x)


REFUSALS: dict[str, tuple[Map, str]] = {
    "no graph": (
        descent(tanh_energy, create_graph=False),
        "it takes a derivative of itself without create_graph=True",
    ),
    "detached": (by_a_detached_x, "it takes a derivative by what it detached from x"),
    "detached in the energy": (
        descent(lambda x, z, P: (x.detach() * x).sum(1)),
        "its derivative is of detach, which the kernels have not",
    ),
    "vmap": (by_vmap, "it uses torch.func.vmap"),
    "softplus in float64": (
        descent(lambda x, z, P: functional.softplus(hidden(x, z, P)).sum(1) + bowl(x)),
        "in float64 the kernels' derivative of softplus is not torch's",
    ),
    "two hidden layers": (
        descent(lambda x, z, P: torch.tanh(torch.tanh(hidden(x, z, P)) @ P.O.T).sum(1)),
        "it multiplies two values of x",
    ),
    "logsumexp": (
        descent(lambda x, z, P: bowl(x) - torch.logsumexp(hidden(x, z, P), -1)),
        "its derivative is of logsumexp, which the kernels have not",
    ),
    "in place": (descent(inplace_relu_energy), "relu writes over what something else may read"),
    "learned step": (by_a_learned_step, "a sum with x is multiplied by a tensor"),
    "bowl alone": (
        descent(lambda x, z, P: bowl(x - z @ P.U.T)),
        "its value has no product of a weight with x",
    ),
    "sum behind tanh": (
        lambda x, z, P: torch.tanh(x @ P.S) + z @ P.U.T,
        "something is added behind its last activation",
    ),
    "two of x joined": (
        lambda x, z, P: torch.tanh(linear(torch.cat([x, x], 1), P.xz[:, :1].expand(D, 2 * D))),
        "two values of x are joined",
    ),
    "columns first": (
        lambda x, z, P: torch.tanh(linear(2.0 * torch.cat([x, z], -1), P.xz)),
        "it computes with what is joined, before a product",
    ),
    "broadcast": (
        lambda x, z, P: torch.tanh(linear(x, P.S[:1]) + z @ P.U.T),
        "add of x is broadcast to another shape",
    ),
    "normed": (
        lambda x, z, P: functional.layer_norm(torch.tanh(x @ P.S), (D,)),
        "the kernels have no layer_norm of x in this form",
    ),
    "silu": (
        lambda x, z, P: functional.silu(x @ P.S + z @ P.U.T),
        "the kernels have no silu of x in this form",
    ),
    "three layers": (
        lambda x, z, P: torch.tanh(torch.tanh(torch.tanh(x @ P.S) @ P.S) @ P.S),
        "it has 3 layers, and the kernels run one or two",
    ),
}


@pytest.mark.filterwarnings("ignore::fpi_cuda.FixedPointWarning")
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_says_why(name: str) -> None:
    f, reason = REFUSALS[name]
    P, z = given()
    g = closed(f, P)
    with pytest.raises(NotLowered, match=reason):
        words(g, z)
    own = fpi.fixed_point(g, zero_state(z), z, max_steps=3, route="host")
    found = fpi.fixed_point(g, zero_state(z), z, max_steps=3)
    assert torch.equal(found.value, own.value)


def test_what_is_written_besides_the_value_is_seen() -> None:
    P, z = given()
    seen = torch.zeros(D, dtype=F64)

    def g(x: Tensor, z: Tensor) -> Tensor:
        seen.copy_((x @ P.S)[0].detach())
        return torch.tanh(x @ P.S + z @ P.U.T)

    with pytest.raises(NotLowered, match="the kernels have no getitem of x"):
        words(g, z)
