"""Fixed points inside torch.func and other transforms, against the same of an unrolled loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tanh_maps import (
    AA,
    F64,
    TIGHT,
    ZZ,
    A,
    B,
    D,
    Layer,
    Z,
    double,
    looped,
    loss,
    solved,
    with_matrix,
)
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fpi_cuda as fpi
from fpi_cuda.evaluation import transforms

ADJOINTS = [
    fpi.Implicit(),
    fpi.Implicit(solver=fpi.GMRES()),
    fpi.Implicit(solver=fpi.ConjugateGradient()),
    fpi.Neumann(k=50),
    fpi.Phantom(k=80, tau=0.7),
    fpi.Unroll(),
]
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def gradient_norm(layer: Layer) -> Callable[[Tensor], Tensor]:
    return lambda a: (grad(loss(layer))(a) ** 2).sum()


def of_sample(layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, a: (layer(z[None], a) ** 2).sum()


def tangent(layer: Layer, a: Tensor) -> Tensor:
    return jvp(lambda a: layer(Z, a), (a,), (a.cos(),))[1]


OPERATIONS: dict[str, Callable[[Layer], Tensor]] = {
    "grad": lambda f: grad(loss(f))(A),
    "grad grad": lambda f: grad(gradient_norm(f))(A),
    "grad grad grad": lambda f: grad(lambda a: grad(gradient_norm(f))(a).sin().sum())(A),
    "vjp": lambda f: vjp(lambda a: f(Z, a), A)[1](Z.sin())[0],
    "jvp": lambda f: tangent(f, A),
    "jvp jvp": lambda f: jvp(lambda a: tangent(f, a), (A,), (A.sin(),))[1],
    "grad jvp": lambda f: grad(lambda a: (tangent(f, a) ** 2).sum())(A),
    "jvp grad": lambda f: jvp(grad(loss(f)), (A,), (A.sin(),))[1],
    "jacrev": lambda f: jacrev(lambda a: f(Z, a))(A),
    "jacfwd": lambda f: jacfwd(lambda a: f(Z, a))(A),
    "jacrev jacrev": lambda f: jacrev(jacrev(loss(f)))(A),
    "hessian": lambda f: hessian(loss(f))(A),
    "vmap": lambda f: vmap(f, in_dims=(0, None))(ZZ, A),
    "vmap closure": lambda f: vmap(f)(ZZ, AA),
    "vmap vmap": lambda f: vmap(vmap(f, in_dims=(0, None)), in_dims=(None, 0))(ZZ, AA),
    "vmap grad": lambda f: vmap(grad(of_sample(f)), in_dims=(0, None))(Z, A),
    "vmap hessian": lambda f: vmap(hessian(of_sample(f)), in_dims=(0, None))(Z, A),
    "grad vmap": lambda f: grad(lambda aa: (vmap(f)(ZZ, aa) ** 2).sum())(AA),
    "vmap jvp": lambda f: vmap(lambda t: jvp(lambda a: f(Z, a), (A,), (t,))[1])(AA),
}
# Its steps are taken inside of the derivative, and how many depends on batched numbers.
UNROLL_CANNOT = {"vmap grad", "vmap hessian"}


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_transforms_of_every_adjoint(name: str, adjoint: Any) -> None:
    operation = OPERATIONS[name]
    if isinstance(adjoint, fpi.Unroll) and name in UNROLL_CANNOT:
        with pytest.raises(RuntimeError, match="Use adjoint=Implicit"):
            operation(solved(adjoint=adjoint))
        return
    found, expected = operation(solved(adjoint=adjoint)), operation(looped)
    # Derivatives of Anderson's steps converge later than the steps.
    rtol = 1e-6 if isinstance(adjoint, fpi.Unroll) else 1e-8
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_transforms_where_plain_autograd_records_nothing(name: str, mode: str) -> None:
    operation = OPERATIONS[name]
    expected = operation(looped)
    differentiates = name not in ("vmap", "vmap closure", "vmap vmap")
    with MODES[mode]():
        if mode == "inference" and differentiates and not transforms.works_in_inference():
            with pytest.raises(RuntimeError):
                operation(solved())
            return
        found = operation(solved())
    assert not found.requires_grad
    torch.testing.assert_close(found.clone(), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", [fpi.Picard(), fpi.Anderson(), fpi.Broyden()], ids=str)
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", ["vmap closure", "hessian", "vmap grad", "grad jvp"])
def test_transforms_of_every_solver(name: str, backend: str, solver: Any) -> None:
    found = OPERATIONS[name](solved(solver=solver, backend=backend))
    torch.testing.assert_close(found, OPERATIONS[name](looped), rtol=1e-8, atol=1e-9)


def test_complex_inputs() -> None:
    z = torch.randn(B, D, dtype=torch.complex128)

    def layer(z: Tensor) -> Tensor:
        x0 = torch.zeros(B, D, dtype=F64)
        return fpi.fixed_point(
            lambda x, z: torch.tanh(x @ A.T + z.real * z.imag), x0, z, **TIGHT
        ).value

    def loop(z: Tensor) -> Tensor:
        return looped(z.real * z.imag, A)

    found, expected = (grad(lambda z, f=f: (f(z) ** 2).sum())(z) for f in (layer, loop))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    found, expected = (jvp(f, (z,), (z.cos(),))[1] for f in (layer, loop))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


class Middle(nn.Module):
    """A model whose map is a method, so that functional_call exchanges what it closes over."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(D, D, dtype=F64)
        with torch.no_grad():
            self.inside.weight.copy_(A)

    def step(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.inside(x) + z)

    def forward(self, z: Tensor, solve: bool) -> Tensor:
        x = torch.zeros_like(z)
        if solve:
            return fpi.fixed_point(self.step, x, z, **TIGHT).value
        for _ in range(80):
            x = self.step(x, z)
        return x


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("order", [1, 2])
def test_a_map_that_is_a_method_of_what_functional_call_exchanges(order: int, scale: float) -> None:
    model = Middle()
    parameters = {name: scale * p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], solve: bool) -> Tensor:
        return (torch.func.functional_call(model, parameters, (Z, solve)) ** 3).sum()

    def size(parameters: dict[str, Tensor], solve: bool) -> Tensor:
        grads = grad(loss)(parameters, solve)
        return sum((g.sin().sum() for g in grads.values()), torch.zeros((), dtype=F64))

    of = grad(loss if order == 1 else size)
    found, expected = of(parameters, True), of(parameters, False)
    for name in parameters:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("which", ["grad", "gradgrad", "jvp", "vmapgrad", "vmapjvpgrad"])
def test_a_layer_inside_of_a_layer_that_closes_over_the_same_weight(which: str) -> None:
    def layer(a: Tensor, solve: bool) -> Tensor:
        def fixed(g: Callable[..., Tensor], *z: Tensor) -> Tensor:
            x = torch.zeros(B, D, dtype=F64)
            if solve:
                return fpi.fixed_point(g, x, *z, **TIGHT).value
            for _ in range(60):
                x = g(x, *z)
            return x

        def outer(x: Tensor, z: Tensor) -> Tensor:
            y = fixed(lambda y, x: torch.tanh(0.4 * y @ a + 0.3 * x), x)
            return torch.tanh(0.3 * y + 0.5 * x @ a.T + z)

        return fixed(outer, Z)

    operation: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
        "grad": lambda f: grad(lambda a: (f(a) ** 3).sum())(A),
        "gradgrad": lambda f: grad(lambda a: grad(lambda a: (f(a) ** 3).sum())(a).sin().sum())(A),
        "jvp": lambda f: jvp(f, (A,), (A.cos(),))[1],
        "vmapjvpgrad": lambda f: vmap(
            lambda t: jvp(grad(lambda a: (f(a) ** 3).sum()), (A,), (t,))[1]
        )(AA),
        "vmapgrad": lambda f: vmap(grad(lambda a: (f(a) ** 3).sum()))(AA),
    }
    found, expected = (operation[which](lambda a, s=s: layer(a, s)) for s in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_what_is_given_as_z_and_closed_over_too() -> None:
    def total(z: Tensor, solve: bool) -> Tensor:
        def g(x: Tensor, u: Tensor) -> Tensor:
            return torch.tanh(x @ A.T + z + 0.5 * u)

        x = torch.zeros_like(z)
        if solve:
            return (fpi.fixed_point(g, x, z, **TIGHT).value ** 2).sum()
        for _ in range(80):
            x = g(x, z)
        return (x**2).sum()

    for operation in (grad, hessian):
        found, expected = (operation(lambda z, s=s: total(z, s))(Z) for s in (True, False))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_weights_that_only_count_away_from_the_start() -> None:
    def layer(a: Tensor, solve: bool) -> Tensor:
        def g(x: Tensor) -> Tensor:
            return torch.tanh(Z) if bool((x == 0).all()) else torch.tanh(x @ a.T + Z)

        x = torch.zeros(B, D, dtype=F64)
        if solve:
            return fpi.fixed_point(g, x, **TIGHT).value
        for _ in range(80):
            x = g(x)
        return x

    found, expected = (grad(lambda a, s=s: (layer(a, s) ** 2).sum())(A) for s in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_weights_that_a_transform_inside_of_g_is_given_are_not_lost() -> None:
    """They are wrapped anew before any function of torch sees them."""

    def layer(a: Tensor) -> Tensor:
        def g(x: Tensor) -> Tensor:
            return torch.tanh(vmap(lambda row: x @ row, out_dims=1)(a) + Z)

        return fpi.fixed_point(g, torch.zeros(B, D, dtype=F64), **TIGHT).value

    with pytest.raises(RuntimeError, match="Pass it to g as a z"):
        grad(lambda a: (layer(a) ** 2).sum())(A)
    leaf = A.clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad((vmap(lambda _: layer(leaf))(Z[:2]) ** 2).sum(), leaf)[0],
        2 * torch.autograd.grad((looped(Z, leaf) ** 2).sum(), leaf)[0],
    )


def test_functional_call_with_frozen_weights() -> None:
    layer = fpi.FPILayer(fpi.cells.Dense(D, D, dtype=F64), **TIGHT)
    other = {name: 0.7 * p.detach() for name, p in layer.named_parameters()}

    def total(z: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, other, (z,)) ** 3).sum()

    found = grad(total)(Z)
    z = Z.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(total(z), z)[0])


def test_a_g_that_no_vmap_can_evaluate_has_a_jacobian() -> None:
    def layer(z: Tensor, solve: bool) -> Tensor:
        def g(x: Tensor, z: Tensor) -> Tensor:
            assert bool(torch.isfinite(x).all())
            h = x @ A.T
            h += z
            return torch.tanh(h)

        x = torch.zeros_like(z)
        if solve:
            return fpi.fixed_point(g, x, z, **TIGHT).value
        for _ in range(80):
            x = g(x, z)
        return x

    for jacobian in (jacrev, jacfwd):
        found = jacobian(lambda z: layer(z, True))(Z)
        torch.testing.assert_close(found, jacrev(lambda z: layer(z, False))(Z))


def test_a_map_that_changes_between_vjp_and_its_pull_is_refused() -> None:
    gain = [1.0]

    def layer(a: Tensor) -> Tensor:
        x0 = torch.zeros(B, D, dtype=F64)
        return fpi.fixed_point(lambda x: gain[0] * torch.tanh(x @ a.T + Z), x0, **TIGHT).value

    value, pull = vjp(layer, A)
    gain[0] = 0.5
    with pytest.raises(RuntimeError, match="another value"):
        pull(torch.ones_like(value))


def test_torch_autograd_functional() -> None:
    of_loop = functools.partial(looped, Z)
    functional = torch.autograd.functional
    expected = functional.jacobian(of_loop, A)
    for vectorize in (False, True):
        found = functional.jacobian(with_matrix, A, vectorize=vectorize)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
        second = functional.hessian(loss(solved()), A, vectorize=vectorize)
        torch.testing.assert_close(second, hessian(loss(looped))(A), rtol=1e-8, atol=1e-9)
    with pytest.raises(RuntimeError, match=r"torch\.func.jacfwd"):
        functional.jacobian(with_matrix, A, vectorize=True, strategy="forward-mode")


def test_is_grads_batched() -> None:
    a = A.clone().requires_grad_()
    weights = double(5, B, D)
    found = torch.autograd.grad(solved()(Z, a), a, weights, is_grads_batched=True)[0]
    expected = torch.autograd.grad(looped(Z, a), a, weights, is_grads_batched=True)[0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    with pytest.raises(RuntimeError, match=r"torch\.func.vmap"):
        torch.autograd.grad(solved()(Z, a), a, weights, is_grads_batched=True, create_graph=True)


AROUND: dict[str, Callable[..., Tensor]] = {
    "jvp": lambda pulled, v: jvp(pulled, (v,), (v.cos(),))[1],
    "grad": lambda pulled, v: grad(lambda w: pulled(w).sin().sum())(v),
    "vmap": lambda pulled, v: vmap(pulled)(torch.stack([v, v.cos()])),
    "vmap jvp": lambda pulled, v: vmap(lambda w: jvp(pulled, (v,), (w,))[1])(v[None].cos()),
    "jvp grad": lambda pulled, v: jvp(grad(lambda w: pulled(w).sin().sum()), (v,), (v.cos(),))[1],
}


@pytest.mark.parametrize("adjoint", [fpi.Implicit(), fpi.Neumann(k=50), fpi.Phantom(k=50)], ids=str)
@pytest.mark.parametrize("name", AROUND)
def test_a_transform_around_the_gradient_of_an_earlier_solve(name: str, adjoint: Any) -> None:
    def derivative(layer: Layer) -> Tensor:
        a = A.clone().requires_grad_()
        x = layer(Z, a)

        def pulled(v: Tensor) -> Tensor:
            return torch.autograd.grad(x, a, v, retain_graph=True, create_graph=True)[0]

        return AROUND[name](pulled, double(B, D))

    found, expected = derivative(solved(adjoint=adjoint)), derivative(looped)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("which", "besides"), [("vmap", 2), ("grad", 3), ("jvp", 3), ("vmapgrad", 3), ("jacrev", 3)]
)
def test_g_is_evaluated_a_few_times_besides_the_solve(which: str, besides: int) -> None:
    calls = 0

    def g(x: Tensor, z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(x @ A.T + z)

    def layer(z: Tensor) -> Tensor:
        found = fpi.fixed_point(g, torch.zeros_like(z), z, **TIGHT)
        steps.append(int(transforms.numbers(found.num_steps).max()))
        return found.value

    operation: dict[str, Callable[[], Any]] = {
        "vmap": lambda: vmap(layer)(ZZ),
        "grad": lambda: grad(lambda z: (layer(z) ** 2).sum())(Z),
        "jvp": lambda: jvp(layer, (Z,), (Z,)),
        "vmapgrad": lambda: vmap(grad(lambda z: (layer(z) ** 2).sum()))(ZZ),
        "jacrev": lambda: jacrev(layer)(Z),
    }
    steps: list[int] = []
    operation[which]()  # The first solve of a map probes it.
    calls, steps = 0, []
    operation[which]()
    assert calls <= sum(steps) + besides
