"""Solves inside of vmap: each as if it were alone, in its account and its failures."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tanh_maps import AA, F64, TIGHT, ZZ, A, B, D, Layer, Z, double, looped, solved
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap

import fpi_cuda as fpi


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
