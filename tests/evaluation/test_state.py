"""States, inputs and maps of unusual kinds: served, or refused by name with the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fpi_cuda as fpi

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*[Ss]parse:UserWarning",
    "ignore:The PyTorch API of .*:UserWarning",
    "ignore:.*quantiz",
    "ignore:.torch.jit.:DeprecationWarning",
    "ignore:.torch.jit.:FutureWarning",
)
SHAPE = (4, 4)


class Marked(torch.Tensor):
    """A subclass by __torch_function__ alone: it holds its own numbers."""


class Wrapped(torch.Tensor):
    """A subclass by __torch_dispatch__: the numbers are another tensor's."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return pytree.tree_map_only(torch.Tensor, Wrapped, func(*args, **kwargs))


def base() -> Tensor:
    return torch.arange(16.0).reshape(SHAPE) / 16 - 0.4


def jagged(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(3, 4), torch.zeros(2, 4)], layout=layout)


def masked() -> Any:
    return torch.masked.masked_tensor(base(), base() > 0)


STRANGE: dict[str, tuple[Callable[[], Any], str, Callable[[Any], Tensor]]] = {
    # What makes it, the words of the refusal, how g may read it as a z.
    "jagged": (
        lambda: jagged(torch.jagged),
        "nested tensor. .*padded",
        lambda z: z.values().sum(0),
    ),
    "nested": (
        lambda: jagged(torch.strided),
        "nested tensor. .*padded",
        lambda z: torch.nested.to_padded_tensor(z, 0.0).sum(),
    ),
    "coo": (lambda: base().to_sparse(), r"sparse_coo. [Uu]se \S*\.to_dense", Tensor.to_dense),
    "csr": (lambda: base().to_sparse_csr(), r"sparse_csr. [Uu]se \S*\.to_dense", Tensor.to_dense),
    "csc": (lambda: base().to_sparse_csc(), r"sparse_csc. [Uu]se \S*\.to_dense", Tensor.to_dense),
    "bsr": (lambda: base().to_sparse_bsr((2, 2)), r"sparse_bsr. [Uu]se \S*\.to_d", Tensor.to_dense),
    "wrapper": (lambda: Wrapped(base()), "a Wrapped. [Uu]nwrap it", lambda z: z.inner),
    "masked": (masked, r"MaskedTensor. [Uu]se \S*\.to_tensor", lambda z: z.get_data()),
    "quantized": (
        lambda: torch.quantize_per_tensor(base(), 0.1, 0, torch.qint8),
        r"qint8. [Uu]se \S*\.dequantize",
        lambda z: z.dequantize(),
    ),
    "uninitialized": (nn.UninitializedParameter, "uninitialized parameter. [Cc]all", None),
}  # fmt: skip
if torch.backends.mkldnn.is_available():
    STRANGE["mkldnn"] = (
        lambda: base().to_mkldnn(),
        r"_mkldnn. [Uu]se \S*\.to_dense",
        Tensor.to_dense,
    )
KINDS = pytest.mark.parametrize("kind", list(STRANGE))


def half(x: Tensor, *z: Tensor) -> Tensor:
    return 0.5 * torch.tanh(x) + 0.1


@KINDS
@pytest.mark.parametrize("in_tuple", [False, True], ids=["tensor", "tuple"])
def test_x0_is_refused_by_name(kind: str, in_tuple: bool) -> None:
    make, words, _ = STRANGE[kind]
    x0 = (torch.zeros(SHAPE), make()) if in_tuple else make()
    with pytest.raises(TypeError, match=f"fixed_point: x0 must be dense, got .*{words}"):
        fpi.fixed_point(lambda x: x, x0)


@KINDS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("in_tuple", [False, True], ids=["tensor", "tuple"])
def test_what_g_returns_is_refused_by_name(kind: str, mode: Any, in_tuple: bool) -> None:
    make, words, _ = STRANGE[kind]
    zero = torch.zeros(SHAPE)
    g = (lambda x: (x[0], make())) if in_tuple else (lambda x: make())
    name = r"g\(x\)\[1\]" if in_tuple else r"g\(x\)"
    rule = f"fixed_point: g must return dense tensors, got {name}=.*{words}"
    with mode(), pytest.raises(ValueError, match=rule):
        fpi.fixed_point(g, (zero, zero) if in_tuple else zero)


class Hoisting(nn.Module):
    """A g that reads its z once."""

    def __init__(self, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.w = nn.Parameter(0.5 * torch.eye(4))

    def prepare(self, z: Any) -> Tensor:
        return self.read(z)

    def step(self, x: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) + b

    def forward(self, x: Tensor, z: Any) -> Tensor:
        return self.step(x, self.prepare(z))


@KINDS
@pytest.mark.parametrize("hoisted", [False, True])
def test_a_z_of_any_kind_is_served_where_g_can_read_it(kind: str, hoisted: bool) -> None:
    make, _, read = STRANGE[kind]
    z = make()
    if read is None:
        with pytest.raises(ValueError, match=r"z\[0\] is an uninitialized parameter; call"):
            fpi.fixed_point(half, torch.zeros(SHAPE), z)
        return
    g = Hoisting(read)
    called: Any = g if hoisted else (lambda x, z: g(x, z))
    plain = read(z)
    plain = plain.detach() if plain.requires_grad else plain
    expected = fpi.fixed_point(lambda x: g.step(x, plain), torch.zeros(SHAPE), rtol=1e-6)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            solution = fpi.fixed_point(called, torch.zeros(SHAPE), z, rtol=1e-6)
            assert solution.converged.all()
            torch.testing.assert_close(solution.value, expected.value)
    (got,) = torch.autograd.grad(solution.value.sum(), g.w)
    torch.testing.assert_close(got, torch.autograd.grad(expected.value.sum(), g.w)[0])
    with torch.no_grad():
        fpi.fixed_point(called, torch.zeros(SHAPE), z, rowwise=True)


@pytest.mark.parametrize("kind", ["jagged", "nested", "quantized"])
def test_a_z_that_g_cannot_read_beside_x_is_named(kind: str) -> None:
    make, words, _ = STRANGE[kind]
    with pytest.raises(RuntimeError, match=rf"g failed with x a plain .* z\[0\] .*{words[:5]}"):
        fpi.fixed_point(lambda x, z: 0.5 * x + z, torch.zeros(SHAPE), make())


def test_what_g_itself_raises_passes_through_beside_a_strange_z() -> None:
    class OwnError(RuntimeError):
        pass

    def g(x: Tensor, z: Tensor) -> Tensor:
        raise OwnError("mine")

    with pytest.raises(OwnError, match="mine"):
        fpi.fixed_point(g, torch.zeros(SHAPE), base().to_sparse())


@pytest.mark.parametrize("kind", [kind for kind in STRANGE if kind != "uninitialized"])
def test_a_layer_starts_from_a_strange_z_with_a_state_shape_or_says_so(kind: str) -> None:
    make, _, read = STRANGE[kind]
    z = make()
    batch = z.size(0)
    g = lambda x, z: 0.5 * torch.tanh(x) + read(z)[:batch] * 1.0  # noqa: E731
    if kind in ("jagged", "nested"):
        g = lambda x, z: 0.5 * torch.tanh(x) + read(z).sum()  # noqa: E731
    assert fpi.FPILayer(g, state_shape=(4,))(z).shape == (batch, 4)
    with pytest.raises(TypeError, match=r"FPILayer: cannot start from zeros like z\[0\], which is"):
        fpi.FPILayer(g)(z)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Parameter(base()),
        lambda: base()[:1].expand(SHAPE),
        lambda: torch.arange(10.0).div(10).as_strided(SHAPE, (1, 1)),
        lambda: torch._neg_view(base()),
        lambda: base().t(),
        lambda: torch.zeros(0, 4),
        lambda: torch.zeros(4, 0),
        lambda: base().as_subclass(Marked),
    ],
    ids=["parameter", "expanded", "overlapping", "negated", "transposed", "no samples",
         "no elements", "__torch_function__"],
)  # fmt: skip
def test_dense_tensors_of_any_make_are_served(make: Callable[[], Tensor]) -> None:
    x0 = make()
    before = x0.detach().clone()
    z = torch.full(x0.shape, 0.1, requires_grad=True)
    solution = fpi.fixed_point(lambda x, z: 0.5 * torch.tanh(x) + z, x0, z, rtol=1e-6)
    assert solution.converged.all()
    assert type(solution.status) is Tensor
    value = solution.value.detach().as_subclass(Tensor)
    torch.testing.assert_close(value, 0.5 * torch.tanh(value) + 0.1, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(solution.value.sum(), z)
    expected = 1 / (1 - 0.5 * (1 - torch.tanh(value) ** 2))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(x0.detach(), before)


@pytest.mark.skipif(not hasattr(torch.Tensor, "rename"), reason="torch without names")
def test_named_tensors_are_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TypeError, match=r"dimensions with names. [Uu]se \S*\.rename\(None\)"):
            fpi.fixed_point(half, base().rename("a", "b"))


def test_a_gradient_of_a_strided_nested_tensor_is_refused_by_name() -> None:
    def made(**options: Any) -> Tensor:
        parts = [torch.randn(2, 6), torch.randn(3, 6)]
        return torch.nested.nested_tensor(parts, requires_grad=True, **options)

    def g(x: Tensor, n: Tensor) -> Tensor:
        return torch.tanh(0.5 * x + torch.stack([t.sum(0) for t in n.unbind()]))

    x0 = torch.zeros(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the prototype
        strided = made()
        for call in (
            lambda: fpi.fixed_point(g, x0, strided),
            lambda: fpi.fixed_point(lambda x: g(x, strided), x0),
        ):
            with pytest.raises(TypeError, match=r"fixed_point: .*layout=torch\.jagged"):
                call()
        assert fpi.fixed_point(g, x0, made(layout=torch.jagged)).value.requires_grad
        assert fpi.fixed_point(g, x0, strided, adjoint=fpi.Unroll()).value.requires_grad
        assert not fpi.fixed_point(g, x0, strided.detach()).value.requires_grad


# DTensor.


@pytest.fixture
def mesh() -> Iterator[Any]:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_dtensors(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    with pytest.raises(
        TypeError, match=r"got a DTensor. [Uu]se \S*\.to_local\(\), or x0\.full_tensor"
    ):
        fpi.fixed_point(half, distribute_tensor(base(), mesh, [Shard(1)]))
    z = distribute_tensor(base(), mesh, [Replicate()]).requires_grad_()
    zero = torch.zeros(SHAPE)
    with pytest.raises(RuntimeError, match=r"z\[0\] a DTensor .*use z\[0\]\.to_local\(\)"):
        fpi.fixed_point(lambda x, z: 0.5 * x + z, zero, z)
    with pytest.raises(ValueError, match=r"got g\(x\)=a DTensor. [Uu]se \S*\.to_local\(\)"):
        fpi.fixed_point(lambda x, z: z, zero, z)
    weight = nn.Parameter(distribute_tensor(0.5 * torch.eye(4), mesh, [Shard(0)]))

    def g(x: Tensor, z: Any) -> Tensor:
        return torch.tanh(x @ weight.full_tensor()) + z.full_tensor()

    x = fpi.fixed_point(g, zero, z, rtol=1e-6).value
    got = torch.autograd.grad(x.square().sum(), (z, weight))
    a, b = 0.5 * torch.eye(4), base().requires_grad_()
    a.requires_grad_()
    x = fpi.fixed_point(lambda x, z: torch.tanh(x @ a) + z, zero, b, rtol=1e-6).value
    want = torch.autograd.grad(x.square().sum(), (b, a))
    torch.testing.assert_close([t.full_tensor() for t in got], list(want))
    x = fpi.fixed_point(g, zero, z).value
    with pytest.raises(RuntimeError, match="second derivative cannot go through a DTensor"):
        torch.autograd.grad(x.square().sum(), weight, create_graph=True)


# TorchScript.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        nn.init.orthogonal_(self.linear.weight, 0.5)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + z)


@pytest.mark.parametrize("how", ["script", "trace", "freeze"])
def test_a_map_in_torchscript(how: str) -> None:
    net = Net().eval()
    z = base().requires_grad_()
    if how == "script":
        g: Any = torch.jit.script(net)
    elif how == "trace":
        g = torch.jit.trace(net, (base(), base()))
    else:
        g = torch.jit.freeze(torch.jit.script(net))
    layer, plain = fpi.FPILayer(g, rtol=1e-6), fpi.FPILayer(net, rtol=1e-6)
    torch.testing.assert_close(layer(z), plain(z))

    def derivatives(layer: fpi.FPILayer) -> tuple[Tensor, Tensor, Tensor]:
        (first,) = torch.autograd.grad(layer(z).square().sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), z)
        tangent = torch.func.jvp(layer, (base(),), (torch.ones(SHAPE),))[1]
        return first, second, tangent

    torch.testing.assert_close(derivatives(layer), derivatives(plain))
    many = torch.stack([base(), -base()])
    torch.testing.assert_close(torch.func.vmap(layer)(many), torch.func.vmap(plain)(many))
    if how != "freeze":
        found, wanted = (
            torch.autograd.grad(
                torch.autograd.grad(l(z).square().sum(), list(m.parameters()), create_graph=True)[0]
                .square().sum(), list(m.parameters()),
            )
            for l, m in ((layer, g), (plain, net))  # noqa: E741
        )  # fmt: skip
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("outer", [lambda layer: layer, nn.Sequential], ids=["layer", "inside"])
def test_a_layer_in_torchscript_is_refused_by_name(outer: Callable[..., nn.Module]) -> None:
    with pytest.raises(RuntimeError, match=r"FPILayer: torch\.jit\.script cannot .* Script g"):
        torch.jit.script(outer(fpi.FPILayer(Net())))
