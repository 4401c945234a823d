"""Spectral radius and Jacobian penalty, against dense Jacobians."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from fpi_cuda.diagnostics import jacobian_penalty, spectral_radius


def linear(matrix: Tensor) -> Callable[..., Tensor]:
    """x -> A x, with A (D, D) or one for each sample (B, D, D)."""
    return lambda x: (matrix @ x[..., None])[..., 0]


def with_eigenvalues(values: list[complex], dim: int) -> Tensor:
    """A non-normal real (dim, dim) matrix with these eigenvalues, their conjugates, and zeros."""
    matrix = torch.zeros(dim, dim, dtype=torch.float64)
    at = 0
    for value in values:
        if value.imag:
            block = [[value.real, -value.imag], [value.imag, value.real]]
            matrix[at : at + 2, at : at + 2] = torch.tensor(block)
            at += 2
        else:
            matrix[at, at] = value.real
            at += 1
    mixing = torch.eye(dim, dtype=torch.float64) + 0.3 * torch.randn(dim, dim) / math.sqrt(dim)
    return mixing @ matrix @ torch.linalg.inv(mixing)


SPECTRA: dict[str, list[complex]] = {
    "real": [0.9, 0.5, -0.3],
    "negative": [-1.2, 0.5],
    "opposite": [0.8, -0.8, 0.1],
    "complex": [0.3 + 0.9j, 0.5, -0.2 + 0.1j],
    "rotation": [0.95j],
    "repeated": [0.7, 0.7, 0.7],
}


@pytest.mark.parametrize("num_steps", [6, 40], ids=["arnoldi", "dense"])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_spectral_radius_of_known_spectra(name: str, num_steps: int) -> None:
    matrix = with_eigenvalues(SPECTRA[name], 33)
    x = torch.randn(4, 33, dtype=torch.float64)
    expected = max(abs(value) for value in SPECTRA[name])
    radius = spectral_radius(linear(matrix), x, num_steps=num_steps)
    assert radius.shape == (4,)
    assert not radius.requires_grad
    # Six eigenvalues at most are not zero, so six Arnoldi steps find them all.
    torch.testing.assert_close(radius, torch.full_like(radius, expected), rtol=1e-6, atol=0)


def bidiagonal(dim: int, diagonal: float, above: float) -> Tensor:
    shift = torch.diag(torch.ones(dim - 1, dtype=torch.float64), 1)
    return diagonal * torch.eye(dim, dtype=torch.float64) + above * shift


@pytest.mark.parametrize(("dim", "num_steps"), [(200, 64), (40, 20), (65, 64)])
@pytest.mark.parametrize(("diagonal", "above"), [(0.5, 0.4), (0.5, 1.0), (0.0, 0.9)])
def test_spectral_radius_of_matrices_far_from_normal(
    dim: int, num_steps: int, diagonal: float, above: float
) -> None:
    """Arnoldi alone says 0.9 where 0.5 or 0 is true."""
    step = linear(bidiagonal(dim, diagonal, above))
    x = torch.randn(3, dim, dtype=torch.float64)
    radius, error = spectral_radius(step, x, num_steps=num_steps, with_error=True)
    torch.testing.assert_close(radius, torch.full_like(radius, diagonal))
    assert (error == 0).all()
    for _ in range(20 if dim == 65 else 2):  # other starting vectors
        assert torch.equal(spectral_radius(step, x, num_steps=num_steps), radius)


@pytest.mark.parametrize(
    "matrix",
    [
        bidiagonal(300, 0.5, 0.4),
        bidiagonal(300, 0.0, 0.9),
        bidiagonal(300, 0.9, 0.05),
        torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64))[0] * 0.9,
        with_eigenvalues([0.9, 0.5, -0.3], 300),
        torch.randn(300, 300, dtype=torch.float64).triu(),
    ],
    ids=[
        "bidiagonal",
        "nilpotent",
        "nearly diagonal",
        "orthogonal",
        "a few eigenvalues",
        "triangular",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_estimate_of_the_spectral_radius_knows_its_error(
    matrix: Tensor, dtype: torch.dtype
) -> None:
    true = torch.linalg.eigvals(matrix).abs().max()
    x = torch.randn(8, 300, dtype=dtype)
    radius, error = spectral_radius(linear(matrix.to(dtype)), x, with_error=True)
    assert radius.dtype == error.dtype == dtype
    assert ((radius - true).abs() <= error).all()


def test_certain_samples_keep_their_estimate_beside_uncertain_ones() -> None:
    matrices = torch.stack([with_eigenvalues([0.9, 0.5], 100), bidiagonal(100, 0.0, 0.9)])
    x = torch.randn(2, 100, dtype=torch.float64)
    radius, error = spectral_radius(linear(matrices), x, with_error=True)
    torch.testing.assert_close(radius, torch.tensor([0.9, 0.0], dtype=torch.float64))
    assert 0 < error[0] < 1e-6
    assert error[1] == 0


@pytest.mark.parametrize(("size", "entry"), [(256, 0.25), (256, 0.3), (100, 0.25)])
def test_eigenvalues_that_rounding_moves_have_an_error(size: int, entry: float) -> None:
    """Grcar's matrix. Scaled by powers of 0.6 it has the same eigenvalues, and is well behaved."""

    def grcar(ratio: float) -> Tensor:
        places = torch.arange(size)
        above = (places - places[:, None]).clamp(-2, 4).double()
        matrix = torch.where((above >= 0) & (above <= 3), entry, 0.0).double()
        return (matrix - torch.where(above == -1, entry, 0.0)) * ratio**above

    true = torch.linalg.eigvals(grcar(0.6)).abs().max()
    for matrix in (grcar(1.0), grcar(1.0).mT):
        radius, error = spectral_radius(
            lambda x, matrix=matrix: x @ matrix, torch.zeros(1, size).double(), with_error=True
        )
        assert (radius - true).abs() <= error + 0.02 * true
        assert error > 1e-3 * true


def test_spectral_radius_is_not_the_norm() -> None:
    matrix = torch.tensor([[0.0, 4.0], [0.25, 0.0]], dtype=torch.float64)
    nilpotent = torch.tensor([[0.0, 9.0], [0.0, 0.0]], dtype=torch.float64)
    x = torch.randn(2, 2, dtype=torch.float64)
    radius = spectral_radius(linear(torch.stack([matrix, nilpotent])), x)
    torch.testing.assert_close(radius, torch.tensor([1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_spectral_radius_per_sample_of_a_network(dtype: torch.dtype) -> None:
    dim = 100
    weight = (torch.randn(dim, dim) / math.sqrt(dim)).to(dtype)
    x, z = torch.randn(5, dim).to(dtype), (3 * torch.rand(5, 1)).to(dtype)

    def g(x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ weight.T + z)

    jacobian = torch.func.vmap(torch.func.jacrev(g))(x, z)
    expected = torch.linalg.eigvals(jacobian).abs().amax(1)
    torch.testing.assert_close(spectral_radius(g, x, z, num_steps=dim), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(spectral_radius(g, x, z, num_steps=60), expected, rtol=2e-2, atol=0)


def test_spectral_radius_of_one_bad_sample() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    x[1, 2] = float("nan")
    for num_steps in (2, 4):
        radius = spectral_radius(lambda x: torch.sin(0.5 * x), x, num_steps=num_steps)
        assert torch.isnan(radius).tolist() == [False, True, False]


def test_spectral_radius_of_other_states() -> None:
    def swap(state: tuple[Tensor, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        u, v = state
        return scale * v.flatten(1), scale * u.reshape(v.shape)

    pair = torch.randn(2, 6), torch.randn(2, 3, 2)
    torch.testing.assert_close(spectral_radius(swap, pair, 0.7), torch.full((2,), 0.7))
    image = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(spectral_radius(lambda x: x.mT / 2, image), torch.full((2,), 0.5))
    half = spectral_radius(lambda x: -0.5 * x, torch.randn(2, 70).bfloat16(), num_steps=5)
    # Products are rounded to the 8 bits of bfloat16.
    torch.testing.assert_close(half, torch.full((2,), 0.5), rtol=1e-2, atol=0)
    assert spectral_radius(lambda x: x, torch.zeros(0, 3)).shape == (0,)
    assert spectral_radius(lambda x: x * 1, torch.zeros(3, 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_spectral_radius_without_grad(mode: Callable[[], Any]) -> None:
    layer = nn.Linear(3, 3, bias=False)
    with mode():
        radius = spectral_radius(layer, torch.randn(2, 3))
    expected = torch.linalg.eigvals(layer.weight.detach()).abs().max()
    torch.testing.assert_close(radius, expected.expand(2))


@pytest.mark.parametrize(
    ("g", "x", "num_steps", "message"),
    [
        (lambda x: x.detach() * 2, torch.ones(2, 3), 9, "g does not depend on x"),
        (lambda x: torch.ones(2, 3, requires_grad=True) * 2, torch.ones(2, 3), 9, "not depend"),
        (lambda x: x[:, :2], torch.ones(2, 3), 9, "g must return the shape of x"),
        (lambda x: x, torch.ones(2, 3), 0, "num_steps must be at least 1, got 0"),
    ],
)
def test_spectral_radius_names_bad_input(
    g: Callable[..., Any], x: Tensor, num_steps: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spectral_radius(g, x, num_steps=num_steps)


def test_penalty_is_exact_where_j_jt_is_diagonal() -> None:
    basis, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    penalty = jacobian_penalty(linear(0.6 * basis), torch.randn(5, 7, dtype=torch.float64))
    torch.testing.assert_close(penalty, torch.tensor(0.36, dtype=torch.float64))


def test_penalty_is_unbiased() -> None:
    matrix = torch.randn(4, 9, 9, dtype=torch.float64)
    x = torch.randn(4, 9, dtype=torch.float64)
    penalty = jacobian_penalty(linear(matrix), x, num_probes=1000)
    # 4,000 draws whose deviation is about a third of their mean: 10 standard errors.
    torch.testing.assert_close(penalty, (matrix**2).sum() / 36, rtol=5e-2, atol=0)


def test_penalty_repeats_with_its_generator() -> None:
    x = torch.randn(4, 9)
    g = linear(torch.randn(9, 9))
    first, second, third = (
        jacobian_penalty(g, x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first == second
    assert first != third


def test_penalty_gradients() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def penalty(weight: Tensor, x: Tensor, z: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return jacobian_penalty(
            lambda x, z: torch.tanh(x @ weight + z), x, z, num_probes=2, generator=generator
        )

    assert gradcheck(penalty, (weight, x, z))
    assert gradgradcheck(penalty, (weight, x, z))
    assert penalty(weight, x, z).dim() == 0
    (expected,) = torch.autograd.grad(penalty(weight, x, z), weight)
    torch.testing.assert_close(torch.func.grad(penalty)(weight, x, z), expected)
    with torch.no_grad():
        assert not penalty(weight, x, z).requires_grad


def test_penalty_of_a_tuple_state() -> None:
    state = torch.randn(2, 3, requires_grad=True), torch.randn(2, 5)
    penalty = jacobian_penalty(lambda s, c: (c * s[0], 2 * s[1]), state, 3.0)
    torch.testing.assert_close(penalty, torch.tensor((3 * 9 + 5 * 4) / 8.0))


def test_penalty_names_bad_input() -> None:
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        jacobian_penalty(lambda x: x, torch.ones(2, 3), num_probes=0)
    with pytest.raises(ValueError, match=r"jacobian_penalty: x is empty, got \(0, 3\)"):
        jacobian_penalty(lambda x: x, torch.ones(0, 3))
    with pytest.raises(ValueError, match="does not depend"):
        jacobian_penalty(lambda x: x.detach(), torch.ones(2, 3))
