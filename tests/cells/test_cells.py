"""Cells: closed forms, hoisting, contraction when fresh, gradients of any order, refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from fpi_cuda import FPILayer, fixed_point
from fpi_cuda.cells import ACTIVATIONS, MLP, Cell, Dense, GradientDescent, MLPEnergy

Z, X, HIDDEN = 5, 4, 7
SMOOTH = [name for name in ACTIVATIONS if name != "relu"]
CELLS: dict[str, Callable[[], Cell]] = {
    "dense": lambda: Dense(Z, X),
    "mlp": lambda: MLP(Z, X, HIDDEN),
    "descent_closed_form": lambda: GradientDescent(MLPEnergy(Z, X, HIDDEN), 0.5),
    "descent_hoisted": lambda: GradientDescent(Hoisted(), 0.1),
    "descent_module": lambda: GradientDescent(Plain(), 0.1),
    "descent_function": lambda: GradientDescent(quartic, 0.1),
}


class Hoisted(nn.Module):
    """An energy that offers prepare and value, but no gradient."""

    rowwise = True

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(Z, X)

    def prepare(self, z: Tensor) -> Tensor:
        prepared: Tensor = self.linear(z)
        return prepared

    def value(self, x: Tensor, prepared: Tensor) -> Tensor:
        return torch.nn.functional.softplus(x + prepared).sum(-1) + (x * x).sum(-1)


class Plain(nn.Module):
    """An energy that is only a module (x, z) -> (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(Z, X)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.cosh(x - self.linear(z)).sum(-1)


def quartic(x: Tensor, z: Tensor) -> Tensor:
    return (x**4).sum(-1) - (x * z[..., :X]).sum(-1)


@pytest.fixture(params=list(CELLS))
def cell(request: pytest.FixtureRequest) -> Cell:
    return CELLS[request.param]().double()


def states(batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, X, dtype=torch.float64), torch.randn(batch, Z, dtype=torch.float64)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_derivative_and_lipschitz_constant(name: str) -> None:
    activation = ACTIVATIONS[name]
    u = torch.linspace(-30, 30, 6001, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(activation.value(u).sum(), u)
    # Where softplus counts as linear, at u > 20, torch rounds its slope to 1: 2e-9 off.
    torch.testing.assert_close(activation.derivative(u), expected, rtol=1e-12, atol=3e-9)
    assert float(expected.abs().max()) <= activation.lipschitz
    assert float(expected.abs().max()) == pytest.approx(activation.lipschitz, rel=1e-5)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_dense_is_its_formula(name: str) -> None:
    cell = Dense(Z, X, name).double()
    x, z = states()
    expected = ACTIVATIONS[name].value(x @ cell.A.weight.T + z @ cell.B.weight.T + cell.B.bias)
    torch.testing.assert_close(cell(x, z), expected)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_mlp_is_its_formula(name: str) -> None:
    cell = MLP(Z, X, HIDDEN, activation=name, out_activation="tanh").double()
    x, z = states()
    hidden = ACTIVATIONS[name].value(x @ cell.A.weight.T + z @ cell.B.weight.T + cell.B.bias)
    torch.testing.assert_close(cell(x, z), torch.tanh(hidden @ cell.W.weight.T + cell.W.bias))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_energy_is_its_formula_and_gradient_that_of_autograd(name: str) -> None:
    energy = MLPEnergy(Z, X, HIDDEN, name, quadratic=0.3).double()
    x, z = states()
    x.requires_grad_()
    u = x @ energy.A.weight.T + z @ energy.B.weight.T + energy.B.bias
    expected = (ACTIVATIONS[name].value(u) * energy.w).sum(-1) + 0.15 * (x**2).sum(-1)
    value = energy(x, z)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    torch.testing.assert_close(energy.gradient(x, energy.prepare(z)), gradient)
    step = GradientDescent(energy, 0.7)(x, z)
    torch.testing.assert_close(step, x - 0.7 * gradient)


def test_forward_is_prepare_then_step(cell: Cell) -> None:
    x, z = states()
    torch.testing.assert_close(cell(x, z), cell.step(x, cell.prepare(z)), rtol=0, atol=0)


def test_step_does_not_touch_z() -> None:
    for name in ("dense", "mlp", "descent_closed_form"):
        cell = CELLS[name]()
        prepared = cell.prepare(torch.randn(3, Z))
        for path, parameter in cell.named_parameters():
            if "B." in path:
                nn.init.constant_(parameter, float("nan"))
        assert not bool(torch.isfinite(cell.prepare(torch.randn(3, Z))).any())
        assert bool(torch.isfinite(cell.step(torch.randn(3, X), prepared)).all())


@pytest.mark.parametrize("index", [0, 1, 2])
def test_rows_are_independent(cell: Cell, index: int) -> None:
    x, z = states()
    whole = cell(x, z)
    torch.testing.assert_close(cell(x[index : index + 1], z[index : index + 1])[0], whole[index])


@pytest.mark.parametrize(
    ("name", "rowwise", "x_features"),
    [
        ("dense", True, X),
        ("mlp", True, X),
        ("descent_closed_form", True, X),
        ("descent_hoisted", True, None),
        ("descent_module", False, None),
        ("descent_function", False, None),
    ],
)
def test_what_a_cell_declares(name: str, rowwise: bool, x_features: int | None) -> None:
    cell = CELLS[name]()
    assert cell.rowwise is rowwise
    assert cell.x_features == x_features


@torch.no_grad()
def jacobian_norm(cell: Cell, x: Tensor, z: Tensor) -> float:
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x, z: cell(x, z)))(x, z)
    return float(torch.linalg.matrix_norm(jacobian, 2).max())


@pytest.mark.parametrize("x_features", [1, 2, 33])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_fresh_networks_contract_by_half(name: str, x_features: int) -> None:
    x, z = 3 * torch.randn(50, x_features), torch.randn(50, Z)
    for cell in (Dense(Z, x_features, name), MLP(Z, x_features, 9, name, "sigmoid")):
        assert jacobian_norm(cell, x, z) <= 0.5 + 1e-5


@pytest.mark.parametrize("quadratic", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("name", SMOOTH)
def test_fresh_energies_contract(name: str, quadratic: float) -> None:
    cell = GradientDescent(MLPEnergy(Z, X, HIDDEN, name, quadratic), 1 / quadratic)
    x, z = 3 * torch.randn(50, X), torch.randn(50, Z)
    assert jacobian_norm(cell, x, z) <= 0.8 + 1e-5


def test_descent_finds_the_minimiser_of_a_quadratic() -> None:
    basis, _ = torch.linalg.qr(torch.randn(X, X, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)) @ basis.T
    cell = GradientDescent(lambda x, z: 0.5 * ((x @ matrix) * x).sum(-1) - (x * z).sum(-1), 0.4)
    z = torch.randn(3, X, dtype=torch.float64)
    x = torch.zeros_like(z)
    for _ in range(200):
        x = cell(x, z)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, z.T).T)


@pytest.mark.parametrize("quadratic", [0.0, 0.1])
def test_the_quadratic_term_decides_whether_descent_settles(quadratic: float) -> None:
    # One hidden unit, f = softplus(x) + quadratic / 2 x^2: without the term the minimum is at
    # minus infinity, with it where sigmoid(x) = -quadratic x.
    energy = MLPEnergy(1, 1, 1, quadratic=quadratic).double()
    with torch.no_grad():
        energy.A.weight.fill_(1)
        energy.B.weight.zero_()
        energy.B.bias.zero_()
        energy.w.fill_(1)
    cell = GradientDescent(energy, 1.0)
    x, z = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    trail = []
    with torch.no_grad():
        for _ in range(2000):
            x = cell(x, z)
            trail.append(float(x))
    if quadratic:
        assert abs(float(torch.sigmoid(x)) + quadratic * float(x)) < 1e-12
    else:
        assert trail[-1] < trail[999] < trail[99] < -4


@pytest.mark.parametrize("name", ["dense", "mlp", *(n for n in CELLS if "descent" in n)])
def test_gradients_of_two_orders(name: str) -> None:
    cell = (Dense(Z, X, "gelu") if name == "dense" else CELLS[name]()).double()
    if isinstance(cell, MLP):
        cell.activation = "softplus"
    names = [name for name, _ in cell.named_parameters()]
    x, z = (t.requires_grad_() for t in states(2))

    def run(x: Tensor, z: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(cell, dict(zip(names, parameters, strict=True)), (x, z))

    assert gradcheck(run, (x, z, *cell.parameters()), check_forward_ad=True)
    assert gradgradcheck(run, (x, z, *cell.parameters()))


def test_transforms(cell: Cell) -> None:
    x, z = states()
    call: Callable[..., Any] = lambda x, z: cell(x, z)  # noqa: E731
    expected = cell(x, z)
    torch.testing.assert_close(torch.func.vmap(call)(x, z), expected)
    jacobian = torch.func.vmap(torch.func.jacrev(call))(x, z)
    tangent = torch.randn_like(x)
    out, pushed = torch.func.jvp(lambda x: cell(x, z), (x,), (tangent,))[:2]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(pushed, torch.einsum("bij,bj->bi", jacobian, tangent))
    pulled = torch.func.grad(lambda x: (cell(x, z) * tangent).sum())(x)
    torch.testing.assert_close(pulled, torch.einsum("bij,bi->bj", jacobian, tangent))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_none_is_wanted(cell: Cell, mode: Callable[[], Any]) -> None:
    x, z = states()
    expected = cell(x, z).detach()
    with mode():
        result = cell(x, z)
        assert not torch.is_grad_enabled()
    assert not result.requires_grad
    torch.testing.assert_close(result, expected)
    assert all(p.grad is None for p in cell.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_the_state_keeps_its_dtype(name: str, dtype: torch.dtype) -> None:
    x, z = (t.to(dtype) for t in states())
    energy = MLPEnergy(Z, X, HIDDEN, name)
    for cell in (Dense(Z, X, name), MLP(Z, X, HIDDEN, name, name), GradientDescent(energy, 0.5)):
        result = cell.to(dtype)(x, z)
        assert result.dtype == dtype
        reference = cell.double()(x.double(), z.double())
        # bfloat16 carries 8 bits through a sum of at most 7 terms.
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(result.double(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["dense", "mlp", "descent_closed_form"])
def test_under_autocast_the_state_keeps_its_dtype(name: str) -> None:
    cell = CELLS[name]()
    x, z = (t.float() for t in states())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cell(x, z).dtype == torch.float32


def test_copies(cell: Cell) -> None:
    x, z = states()
    expected = cell(x, z)
    for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        torch.testing.assert_close(twin(x, z), expected, rtol=0, atol=0)
        assert all(a is not b for a, b in zip(cell.parameters(), twin.parameters(), strict=True))
    fresh = copy.deepcopy(cell)
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    fresh.load_state_dict(cell.state_dict())
    torch.testing.assert_close(fresh(x, z), expected, rtol=0, atol=0)


def test_parameters_are_made_where_they_are_asked_for() -> None:
    for module in (
        Dense(Z, X, device="meta", dtype=torch.float64),
        MLP(Z, X, HIDDEN, device="meta", dtype=torch.float64),
        MLPEnergy(Z, X, HIDDEN, device="meta", dtype=torch.float64),
    ):
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float64)}


def test_more_than_one_feature_dimension() -> None:
    x, z = torch.randn(3, 6, X), torch.randn(3, 6, Z)
    for name in ("dense", "mlp", "descent_closed_form"):
        cell = CELLS[name]()
        torch.testing.assert_close(cell(x, z)[:, 2], cell(x[:, 2], z[:, 2]))


def test_descent_on_images_and_on_scalars() -> None:
    image = torch.randn(2, 3, 8, 8)
    cell = GradientDescent(lambda x, z: 0.5 * ((x - z) ** 2).sum((1, 2, 3)), 0.25)
    torch.testing.assert_close(cell(torch.zeros_like(image), image), 0.25 * image)
    torch.testing.assert_close(
        GradientDescent(lambda x: x**2, 0.25)(torch.ones(3)), torch.ones(3) / 2
    )


def test_descent_differentiates_what_the_energy_closes_over() -> None:
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    cell = GradientDescent(lambda x: scale * (x**2).sum(-1), 0.1)
    x = torch.ones(2, X, dtype=torch.float64)
    cell(x).sum().backward()
    # d/dscale of sum(x - 0.1 * 2 scale x)
    torch.testing.assert_close(scale.grad, torch.tensor(-0.2 * 2 * X, dtype=torch.float64))


class Redefined(MLPEnergy):
    """Changes the energy and inherits gradient, which no longer belongs to it."""

    def value(self, x: Tensor, prepared: Tensor) -> Tensor:
        return super().value(x, prepared) + 3 * x.sum(-1)


class Rewritten(MLPEnergy):
    """Changes the energy where it is called whole."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return super().forward(x, z) + 3 * x.sum(-1)


@pytest.mark.parametrize("kind", [Redefined, Rewritten])
def test_an_inherited_gradient_is_not_trusted(kind: type[MLPEnergy]) -> None:
    energy = kind(Z, X, HIDDEN).double()
    x, z = states()
    base = x - 0.5 * energy.gradient(x, energy.prepare(z))
    torch.testing.assert_close(GradientDescent(energy, 0.5)(x, z), base - 1.5)


# As a user's unchecked code would call them.
UNTYPED_MLP: Any = MLP
UNTYPED_DESCENT: Any = GradientDescent
UNKNOWN = "tanh, relu, sigmoid, gelu, softplus, identity, got 'swish'"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Dense(Z, X, "swish"), ValueError, "Dense: activation .*" + UNKNOWN),
        (lambda: MLP(Z, X, 3, "swish"), ValueError, "MLP: activation .*" + UNKNOWN),
        (lambda: MLP(Z, X, 3, "relu", "swish"), ValueError, "MLP: out_activation .*" + UNKNOWN),
        (lambda: MLPEnergy(Z, X, 3, "swish"), ValueError, "MLPEnergy: activation .*" + UNKNOWN),
        (lambda: Dense(0, X), ValueError, "Dense: z_features must be at least 1, got 0"),
        (lambda: UNTYPED_MLP(Z, X, 2.5), TypeError, "MLP: hidden_features must be an int"),
        (lambda: MLPEnergy(Z, X, 3, quadratic=-1), ValueError, r"quadratic must be in \[0.0, inf"),
        (lambda: GradientDescent(quartic, 0.0), ValueError, r"step_size must be in \(0.0, inf"),
        (lambda: GradientDescent(quartic, float("nan")), ValueError, "step_size"),
        (lambda: UNTYPED_DESCENT(quartic, "big"), TypeError, "step_size must be a number"),
        (lambda: UNTYPED_DESCENT(3.0, 0.1), TypeError, "energy must be a function or module"),
    ],
)
def test_bad_options_are_named(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "x", "z", "message"),
    [
        ("dense", (3, X), (3, Z + 1), r"Dense: z must have 5 features .* got z=\(3, 6\)"),
        ("dense", (3, X + 1), (3, Z), r"Dense: x must have 4 features .* got x=\(3, 5\)"),
        (
            "mlp",
            (3, X),
            (1, Z),
            r"MLP: z must have the batch of x, got x=\(3, 4\), z=\(1, \.\.\.\)",
        ),
        ("descent_closed_form", (3, X), (Z,), "MLPEnergy: z must have the batch of x"),
    ],
)
def test_bad_shapes_are_named(
    name: str, x: tuple[int, ...], z: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CELLS[name]()(torch.randn(x), torch.randn(z))


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (lambda x: (x**2).mean(), r"one value per sample, \(B,\), got x=\(3, 4\), energy=\(\)"),
        (lambda x: (x**2).sum(-1, keepdim=True), r"energy=\(3, 1\)"),
        (lambda x: x**2, r"energy=\(3, 4\)"),
        (lambda x: 1.0, "energy=float"),
        (lambda x: x.detach().sum(-1), "energy does not depend on x"),
        (torch.no_grad()(lambda x: x.sum(-1)), "energy does not depend on x"),
    ],
)
def test_bad_energies_are_named(energy: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match="GradientDescent: .*" + message):
        GradientDescent(energy, 0.1)(torch.randn(3, X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: Dense(Z, X, dtype=dtype),
        lambda dtype: MLP(Z, X, HIDDEN, dtype=dtype),
        lambda dtype: GradientDescent(MLPEnergy(Z, X, HIDDEN, dtype=dtype), 0.5),
    ],
    ids=["dense", "mlp", "descent"],
)
def test_cells_in_half_precision(make: Callable[..., Cell], dtype: torch.dtype) -> None:
    cell = make(dtype)
    assert {p.dtype for p in cell.parameters()} == {dtype}
    x, z = torch.randn(3, X, dtype=dtype), torch.randn(3, Z, dtype=dtype)
    wide = copy.deepcopy(cell).float()
    torch.testing.assert_close(cell(x, z).float(), wide(x.float(), z.float()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("cell", [Dense(3, 4), MLP(3, 4, 5)], ids=["Dense", "MLP"])
def test_a_forgotten_batch_is_named(cell: Cell) -> None:
    layer = FPILayer(cell, max_steps=1)
    with pytest.raises(ValueError, match=r"x0 must be \(batch, 4\) .* got x0=\(4,\)"):
        layer(torch.randn(3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.complex64], ids=str)
def test_z_of_another_dtype_is_named(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"Dense: z must have the dtype of the weights.*z\.to\("):
        Dense(3, 4)(torch.zeros(2, 4), torch.ones(2, 3).to(dtype))


@pytest.mark.parametrize("name", ["dense", "mlp", "descent_closed_form"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_start_of_another_dtype_is_named(name: str, dtype: torch.dtype) -> None:
    cell, x0, z = CELLS[name](), torch.zeros(2, X, dtype=dtype), torch.randn(2, Z)
    message = (
        rf"x must have the dtype .*, torch.float32, got {dtype}. Use x0.to\(torch.float32\), or"
    )
    with pytest.raises(TypeError, match=message):
        fixed_point(cell, x0, z)


@pytest.mark.parametrize("name", ["dense", "mlp", "descent_closed_form"])
def test_autocast_may_narrow_what_is_prepared(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        value = fixed_point(CELLS[name](), torch.zeros(2, X), torch.randn(2, Z)).value
    assert value.dtype == torch.float32


def test_a_class_in_place_of_a_cell_is_named() -> None:
    with pytest.raises(TypeError, match=r"got the class Dense. Pass an instance of it"):
        FPILayer(Dense)
