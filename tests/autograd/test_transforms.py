"""Fixed points inside torch.func and other transforms, against the same of an unrolled loop."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fpi_cuda as fpi
from fpi_cuda import transforms

F64 = torch.float64
B, D = 3, 4
TIGHT: dict[str, Any] = {"rtol": 1e-12, "max_steps": 300}
Layer = Callable[[Tensor, Tensor], Tensor]

ADJOINTS = [
    fpi.Implicit(),
    fpi.Implicit(solver=fpi.Broyden()),
    fpi.Implicit(solver=fpi.GMRES()),
    fpi.Implicit(solver=fpi.ConjugateGradient()),
    fpi.Neumann(k=50),
    fpi.Phantom(k=50),
    fpi.Phantom(k=80, tau=0.7),
    fpi.Unroll(),
]
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


Z = double(B, D)
A = 0.5 * double(D, D) / torch.linalg.matrix_norm(double(D, D), 2)
ZZ = torch.stack([Z, Z + 1])
AA = torch.stack([A, 0.3 * A])


def solved(**options: Any) -> Layer:
    """x* of tanh(A x + z); A is closed over."""

    def layer(z: Tensor, a: Tensor) -> Tensor:
        def g(x: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(x @ a.T + z)

        return fpi.fixed_point(g, torch.zeros_like(z), z, **(TIGHT | options)).value

    return layer


def looped(z: Tensor, a: Tensor) -> Tensor:
    x = torch.zeros_like(z)
    for _ in range(80):
        x = torch.tanh(x @ a.T + z)
    return x


def loss(layer: Layer, z: Tensor = Z) -> Callable[[Tensor], Tensor]:
    return lambda a: (layer(z, a) ** 3).sum()


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


def test_an_ensemble_of_layers() -> None:
    layers = [fpi.FPILayer(fpi.cells.Dense(D, D, dtype=F64), **TIGHT) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)  # type: ignore[arg-type]

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], z: Tensor) -> Tensor:
        return torch.func.functional_call(layers[0], (parameters, buffers), (z,))

    found = vmap(one, in_dims=(0, 0, None))(parameters, buffers, Z)
    expected = torch.stack([layer(Z) for layer in layers])
    torch.testing.assert_close(found, expected)
    assert layers[0].last_solution is not None  # of the plain call
    grads = torch.autograd.grad((found**2).sum(), list(parameters.values()))
    for name, stacked in zip(parameters, grads, strict=True):
        each = [
            torch.autograd.grad((layer(Z) ** 2).sum(), layer.get_parameter(name))[0]
            for layer in layers
        ]
        torch.testing.assert_close(stacked, torch.stack(each))


def test_gradients_per_sample_add_up() -> None:
    layer = fpi.FPILayer(fpi.cells.Dense(D, D, dtype=F64), **TIGHT)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def of_one(parameters: dict[str, Tensor], z: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, parameters, (z[None],)) ** 2).sum()

    found = vmap(grad(of_one), in_dims=(None, 0))(parameters, Z)
    (layer(Z) ** 2).sum().backward()
    for name, p in layer.named_parameters():
        assert found[name].shape == (B, *p.shape)
        torch.testing.assert_close(found[name].sum(0), p.grad)


def test_the_account_of_a_vmap_is_that_of_each_call() -> None:
    def account(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sol = fpi.fixed_point(lambda x, z: torch.tanh(x @ A.T + z), torch.zeros_like(z), z)
        return sol.value, sol.status, sol.num_steps, sol.residual

    found = vmap(account)(ZZ)
    for i, z in enumerate(ZZ):
        for one, expected in zip(found, account(z), strict=True):
            torch.testing.assert_close(one[i], expected)


def test_a_failing_sample_of_a_vmap_hurts_no_other() -> None:
    bad = ZZ.clone()
    bad[1, 2, 0] = torch.nan

    def values(z: Tensor) -> Tensor:
        return solved()(z, A)

    found = vmap(values)(bad)
    expected = vmap(values)(ZZ)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1, :2], expected[1, :2])


@pytest.mark.parametrize("shared", [False, True])
def test_a_failing_sample_of_a_vmap_spoils_no_shared_weight(shared: bool) -> None:
    z = torch.tensor([0.3, torch.nan, -0.2], dtype=F64)

    def g(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return w * torch.tanh(x) + z

    def total(w: Tensor, z: Tensor, transform: bool) -> Tensor:
        def one(z: Tensor) -> Tensor:
            if shared:
                return fpi.fixed_point(lambda x, z: g(x, z, w), torch.zeros_like(z), z).value
            return fpi.fixed_point(g, torch.zeros_like(z), z, w).value

        return vmap(one)(z[:, None, None]).nansum() if transform else one(z[:, None]).nansum()

    w = torch.tensor(0.3, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fpi.FixedPointWarning)
        found = grad(total)(w, z, True)
    torch.testing.assert_close(found, grad(total)(w, z[[0, 2]], False))


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


@pytest.mark.parametrize("which", ["grad", "gradgrad", "jvp", "jacrev", "hessian", "vmapgrad"])
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
        "jacrev": lambda f: jacrev(f)(A),
        "hessian": lambda f: hessian(lambda a: (f(a) ** 3).sum())(A),
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


def test_throw_inside_of_vmap_numbers_the_samples_of_all() -> None:
    bad = ZZ.clone()
    bad[1, 2, 0] = torch.nan

    def layer(z: Tensor) -> Tensor:
        return solved(throw=True)(z, A)

    torch.testing.assert_close(vmap(layer)(ZZ), vmap(lambda z: looped(z, A))(ZZ))
    with pytest.raises(fpi.ConvergenceError, match=r"1 of 6 samples .*5: NONFINITE") as raised:
        vmap(layer)(bad)
    solution = raised.value.solution
    assert solution.value.shape == (2 * B, D)
    assert solution.converged.tolist() == [True] * 5 + [False]
    with pytest.raises(fpi.ConvergenceError, match="1 of 3 samples"):
        grad(lambda a: solved(throw=True)(bad[1], a).sum())(A)


@pytest.mark.parametrize("size", [0, 1])
def test_a_vmap_over_nothing_and_over_one(size: int) -> None:
    zz, aa = ZZ[:size], AA[:size]
    torch.testing.assert_close(vmap(solved())(zz, aa), vmap(looped)(zz, aa))
    found = vmap(solved(), in_dims=(0, None))(zz, A)
    torch.testing.assert_close(found, vmap(looped, in_dims=(0, None))(zz, A))
    gradient = vmap(grad(lambda z, a: (solved()(z, a) ** 2).sum()))
    expected = vmap(grad(lambda z, a: (looped(z, a) ** 2).sum()))
    torch.testing.assert_close(gradient(zz, aa), expected(zz, aa))


def with_matrix(a: Tensor) -> Tensor:
    return solved()(Z, a)


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


@pytest.mark.filterwarnings("ignore::UserWarning:torch.fx")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracers_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.func.jvp"):
        torch.func.linearize(with_matrix, A)
    with pytest.raises(RuntimeError, match="make_fx"):
        make_fx(with_matrix)(A)
    with pytest.raises(RuntimeError, match="these data"):
        torch.jit.trace(Wrapped(), Z)
    with pytest.raises(RuntimeError, match="FakeTensor"):
        torch.export.export(Wrapped(), (Z,), strict=False)
    with torch._subclasses.FakeTensorMode(), pytest.raises(RuntimeError, match="FakeTensor"):
        solved()(torch.zeros(B, D), torch.zeros(D, D))
    meta = torch.zeros(B, D, device="meta")
    with pytest.raises(ValueError, match="device meta"):
        fpi.fixed_point(lambda x, z: x, meta, meta)


class Wrapped(nn.Module):
    """A model with a layer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = fpi.FPILayer(fpi.cells.Dense(D, D, dtype=F64), **TIGHT)

    def forward(self, z: Tensor) -> Tensor:
        return self.layer(z.sin()).cos()


@pytest.mark.parametrize("options", [{}, {"rtol": 0.0, "atol": 1e-11}], ids=str)
def test_a_vmap_over_gradients_of_a_solution_from_outside(options: Any) -> None:
    """Samples side by side are solved for as accurately as each alone."""
    z, w = Z.clone().requires_grad_(), double(5, B, D)

    def second(layer: Layer) -> Tensor:
        x = layer(z, A)

        def of_gradient(w: Tensor) -> Tensor:
            return torch.autograd.grad(x, z, w, create_graph=True)[0].square().sum()

        return vmap(grad(of_gradient))(w)

    torch.testing.assert_close(second(solved(**options)), second(looped), rtol=1e-8, atol=1e-9)


# torch.compile reads .grad of the tensors that it goes on with.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_torch_compile_goes_around_a_layer() -> None:
    model = Wrapped()
    z = Z.clone().requires_grad_()
    expected = torch.autograd.grad(model(z).sum(), (z, *model.parameters()))
    try:
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            found = torch.autograd.grad(compiled(z).sum(), (z, *model.parameters()))
            torch.testing.assert_close(found, expected)
        assert model.layer.last_solution is not None
        assert model.layer.last_solution.converged.all()
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="without fullgraph=True"):
            whole(z)
        inside = fpi.FPILayer(torch.compile(model.layer.g, backend="aot_eager"), **TIGHT)
        torch.testing.assert_close(inside(z), model.layer(z))
    finally:
        torch._dynamo.reset()


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


@pytest.mark.parametrize("order", ["grad of vmap", "vmap of grad"])
def test_a_sample_that_fails_under_a_vmap(order: str) -> None:
    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.where(z > 5, x * x + 2, torch.tanh(x @ A.T + z))

    def loss(z: Tensor) -> Tensor:
        value = fpi.fixed_point(g, torch.zeros_like(z), z, **TIGHT).value
        return torch.where(z > 5, 0.0, value).square().sum()

    z = ZZ.clone()
    z[1, 2] = 10.0
    of = {"grad of vmap": grad(lambda z: vmap(loss)(z).sum()), "vmap of grad": vmap(grad(loss))}
    with pytest.warns(fpi.FixedPointWarning):
        found = of[order](z)
    expected = vmap(grad(loss))(ZZ)
    expected[1, 2] = 0.0
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("order", ["grad", "jacrev", "hessian", "grad of vmap"])
def test_a_derivative_that_is_nan_where_a_sample_of_a_vmap_failed(order: str) -> None:
    def layer(a: Tensor, z: Tensor) -> Tensor:
        def g(x: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(x @ a.T + z) + a[0, 0] * torch.sqrt(4 - z[:, :1])

        return fpi.fixed_point(g, torch.zeros_like(z), z, **TIGHT).value

    def total(a: Tensor, z: Tensor) -> Tensor:
        return layer(a, z)[:2].square().sum()

    of = {
        "grad": grad(total, (0, 1)),
        "jacrev": jacrev(lambda a, z: layer(a, z)[:2, 0], (0, 1)),
        "hessian": lambda a, z: (hessian(total)(a, z),),
        "grad of vmap": grad(lambda a, z: vmap(total, (None, 0))(a, z[None]).sum(), (0, 1)),
    }[order]
    good = ZZ.clamp(max=1.0)
    good[:, 2] = 0.5
    bad = good.clone()
    bad[1, 2] = 50.0
    with pytest.warns(fpi.FixedPointWarning):
        found = vmap(of, (None, 0))(A, bad)
    # What the last sample is has no part in the loss.
    torch.testing.assert_close(found, vmap(of, (None, 0))(A, good))
