"""FPILayer as a module among modules: starts, copies, threads, nesting, hooks, what it says."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import fpi_cuda as fpi

F64 = torch.float64
B, K, D = 5, 3, 4
TIGHT: dict[str, Any] = {"rtol": 1e-11, "max_steps": 300}


class Cell(nn.Module):
    """tanh(A x + C z), by hand: it has no x_features, no prepare and is not known row-wise."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        torch.manual_seed(0)
        a = torch.randn(D, D, dtype=dtype)
        self.a = nn.Parameter(0.5 * a / torch.linalg.matrix_norm(a, 2))
        self.c = nn.Parameter(torch.randn(D, K, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ self.a.T + z @ self.c.T)


def looped(cell: Callable[..., Tensor], z: Tensor) -> Tensor:
    x = torch.zeros(len(z), D, dtype=z.dtype)
    for _ in range(100):
        x = cell(x, z)
    return x


def gradients(module: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((value**2).sum(), list(module.parameters())))


@pytest.fixture
def z() -> Tensor:
    return torch.randn(B, K, dtype=F64)


def a_layer(**options: Any) -> fpi.FPILayer:
    return fpi.FPILayer(Cell(), state_shape=D, **(TIGHT | options))


# --- where a solve starts -----------------------------------------------------------------------


def test_the_start_of_a_solve() -> None:
    z = torch.randn(B, K)

    def start(g: Any = lambda x, z: x, **options: Any) -> Any:
        return fpi.FPILayer(g, **options).start(z)

    for given, shape in (((2, 3), (B, 2, 3)), (7, (B, 7)), ((), (B,)), ([6], (B, 6))):
        x0 = start(state_shape=given)
        assert x0.shape == shape
        assert (x0 == 0).all()
    first, second = start(state_shape=((2,), (3, 1)))
    assert (first.shape, second.shape) == ((B, 2), (B, 3, 1))
    assert start().shape == (B, K)
    assert start(fpi.cells.Dense(K, 9)).shape == (B, 9)
    assert start(fpi.cells.Dense(K, 9, dtype=F64)).dtype == F64
    assert (start(init=lambda z: z + 1) == z + 1).all()
    wide = z.double()
    assert fpi.FPILayer(lambda x, z: x).start(wide).dtype == F64
    labels = torch.zeros(B, K, dtype=torch.int64)
    assert fpi.FPILayer(lambda x, z: x).start(labels).dtype == torch.get_default_dtype()
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert fpi.FPILayer(lambda x, z: x).start(channels_last).shape == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"state_shape": -1}, ValueError, "state_shape must be the shape of one sample"),
        ({"state_shape": 2.0}, ValueError, "state_shape must be the shape of one sample"),
        ({"state_shape": ((2,), 3)}, ValueError, "state_shape must be the shape of one sample"),
        ({"state_shape": "4"}, ValueError, "state_shape must be the shape of one sample"),
        ({"init": 3}, TypeError, "init must be a function of z, got int"),
        ({"init": torch.zeros_like, "state_shape": 3}, ValueError, "state_shape or init, not both"),
        ({"tol": 1}, TypeError, "Valid options: state_shape, init, solver, rtol"),
    ],
)
def test_a_bad_start_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="FPILayer: .*" + message):
        fpi.FPILayer(lambda x, z: x, **options)


def test_a_call_without_a_batch_to_start_from_is_refused() -> None:
    layer = fpi.FPILayer(lambda x, *z: 0.5 * x)
    for z in ((), (torch.tensor(1.0),), (1.0,)):
        with pytest.raises(TypeError, match="pass x0, or give the layer an init"):
            layer(*z)
    assert (layer(x0=torch.zeros(2, 3)) == 0).all()
    with pytest.raises(TypeError, match="g must be a function or module"):
        fpi.FPILayer(None)  # type: ignore[arg-type]


def test_a_layer_of_a_tuple_state(z: Tensor) -> None:
    cell = Cell()

    def g(state: tuple[Tensor, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        x, mean = state
        return cell(x + 0.1 * mean[:, None], z), x.mean(1)

    layer = fpi.FPILayer(g, state_shape=((D,), ()), **TIGHT)
    x, mean = layer(z)
    assert (x.shape, mean.shape) == ((B, D), (B,))
    torch.testing.assert_close(mean, x.mean(1))
    warm = layer.solve(z, x0=(x, mean))
    assert (warm.num_steps == 1).all()
    assert isinstance(layer.last_solution.value, tuple)


def test_an_init_is_trained_by_unroll_only(z: Tensor) -> None:
    for adjoint in (fpi.Implicit(), fpi.Unroll()):
        layer = fpi.FPILayer(
            Cell(), init=nn.Linear(K, D, dtype=F64), adjoint=adjoint, rtol=1e-2, max_steps=4
        )
        assert {"g.a", "g.c", "init.weight", "init.bias"} == set(dict(layer.named_parameters()))
        layer(z).sum().backward()
        assert (layer.init.weight.grad is None) == isinstance(adjoint, fpi.Implicit)
        assert layer.g.a.grad is not None


def test_a_warm_start_saves_steps(z: Tensor) -> None:
    layer = a_layer()
    cold = layer.solve(z)
    warm = layer.solve(z + 1e-4, x0=cold.value)
    assert (warm.num_steps < cold.num_steps).all()
    again = layer.solve(z, x0=layer(z))
    assert (again.num_steps <= 2).all()
    torch.testing.assert_close(
        gradients(layer, warm.value), gradients(layer, looped(layer.g, z + 1e-4))
    )


def test_the_last_solution_is_kept_without_its_graph(z: Tensor) -> None:
    layer = a_layer()
    assert layer.last_solution is None
    value = layer(z)
    last = layer.last_solution
    assert value.requires_grad
    assert not last.value.requires_grad
    assert torch.equal(last.value, value)
    assert last.converged.all()
    assert last.adjoint_stats is None
    value.sum().backward()
    assert last.adjoint_stats.converged.all()
    torch.func.vmap(layer)(z[:, None])
    assert layer.last_solution is None
    with pytest.raises(fpi.ConvergenceError):
        a_layer(throw=True, rtol=1e-11, max_steps=2)(z)


# --- copies, files, dtypes --------------------------------------------------------------------


def copies(layer: fpi.FPILayer) -> dict[str, fpi.FPILayer]:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = a_layer()
    for p in loaded.parameters():
        nn.init.zeros_(p)
    loaded.load_state_dict(layer.state_dict())
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "save": torch.load(file, weights_only=False),
        "state_dict": loaded,
    }


def test_copies_are_the_same_and_independent(z: Tensor) -> None:
    layer = a_layer(solver=fpi.Anderson(m=3), adjoint=fpi.Implicit(solver=fpi.GMRES()))
    expected = layer(z)
    oracle = gradients(layer, expected)
    assert layer.last_solution is not None
    for name, other in copies(layer).items():
        assert other.last_solution is None, name
        if name != "state_dict":
            assert other.options == layer.options
        value = other(z)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients(other, value), oracle)
        with torch.no_grad():
            other.g.a.zero_()
        assert torch.equal(layer(z), expected), name


def test_the_state_dict_holds_what_g_holds() -> None:
    layer = fpi.FPILayer(nn.BatchNorm1d(D))
    assert set(layer.state_dict()) == {f"g.{name}" for name in nn.BatchNorm1d(D).state_dict()}


def test_moving_a_layer_to_another_dtype(z: Tensor) -> None:
    layer = a_layer(rtol=1e-4)
    half = copy.deepcopy(layer).float()
    value = half(z.float())
    assert value.dtype == torch.float32
    assert "float32" in half.explain()
    torch.testing.assert_close(value.double(), layer(z), rtol=1e-2, atol=1e-3)


def test_weights_shared_by_two_layers(z: Tensor) -> None:
    cell = Cell()
    first, second = (
        fpi.FPILayer(cell, state_shape=D, **TIGHT),
        fpi.FPILayer(cell, state_shape=D, solver=fpi.Picard(), **TIGHT),
    )
    model = nn.ModuleList([first, second])
    assert len(list(model.parameters())) == 2

    def both(one: Callable[[Tensor], Tensor], two: Callable[[Tensor], Tensor]) -> Tensor:
        return two(one(z)[:, :K].sin())

    value = both(first, second)
    expected = both(lambda z: looped(cell, z), lambda z: looped(cell, z))
    torch.testing.assert_close(value, expected)
    found = torch.autograd.grad((value**2).sum(), list(cell.parameters()), create_graph=True)
    oracle = torch.autograd.grad((expected**2).sum(), list(cell.parameters()), create_graph=True)
    torch.testing.assert_close(found, oracle, rtol=1e-8, atol=1e-9)
    second_order = [
        torch.autograd.grad(sum((t**2).sum() for t in grads), list(cell.parameters()))
        for grads in (found, oracle)
    ]
    torch.testing.assert_close(*second_order, rtol=1e-7, atol=1e-8)


# --- threads, workers, nesting, hooks -----------------------------------------------------------


def in_threads(work: Callable[[int], Any], count: int = 4) -> list[Any]:
    results: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = work(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_replicas_in_threads_and_their_summed_gradient(z: Tensor) -> None:
    """What DataParallel does: a replica and a part of the batch for each thread."""
    layer = a_layer()
    parts = z.repeat(4, 1).chunk(4)
    replicas = [copy.deepcopy(layer) for _ in parts]
    outputs = in_threads(lambda i: replicas[i](parts[i]))
    torch.testing.assert_close(torch.cat(outputs), layer(z.repeat(4, 1)))
    in_threads(lambda i: (outputs[i] ** 2).sum().backward())
    for p, *others in zip(layer.parameters(), *(r.parameters() for r in replicas), strict=True):
        (expected,) = torch.autograd.grad((layer(z.repeat(4, 1)) ** 2).sum(), p)
        torch.testing.assert_close(sum(other.grad for other in others), expected)


class Solved(Dataset):
    """Samples that a worker finds by a solve of its own."""

    def __init__(self) -> None:
        self.layer = fpi.FPILayer(fpi.cells.Dense(K, 64), rtol=1e-5)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        z = torch.full((16, K), float(index + 1), requires_grad=True)
        x = self.layer(z)
        return x.detach(), torch.autograd.grad(x.sum(), z)[0]


# Python 3.12 and later warn of what the fork here is a test of.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
# JAX, where an earlier test has imported it.
@pytest.mark.filterwarnings("ignore:os.fork.* was called:RuntimeWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start: str) -> None:
    data = Solved()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # A fork after the parent has used its threads.
        fpi.FPILayer(fpi.cells.Dense(K, 64))(torch.randn(512, K))
        loader = DataLoader(
            data,
            batch_size=2,
            num_workers=2 if start == "fork" else 1,
            timeout=120,
            multiprocessing_context=start,
        )
        batches = list(loader)
    finally:
        torch.set_num_threads(threads)
    found = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    expected = [torch.stack(parts) for parts in zip(*(data[i] for i in range(6)), strict=True)]
    torch.testing.assert_close(found, expected)


def test_a_layer_inside_of_its_own_g(z: Tensor) -> None:
    """g calls the layer that it belongs to, once."""
    depth = [0]
    cell = Cell()

    def g(x: Tensor, z: Tensor) -> Tensor:
        if depth[0]:
            return cell(x, z)
        depth[0] += 1
        try:
            return 0.5 * cell(x, z) + 0.1 * layer(z)
        finally:
            depth[0] -= 1

    layer = fpi.FPILayer(g, state_shape=D, **TIGHT)
    inner = looped(cell, z)
    expected = looped(lambda x, z: 0.5 * cell(x, z) + 0.1 * inner, z)
    value = layer(z)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(cell, value), gradients(cell, expected))


def test_hooks_on_modules_and_tensors(z: Tensor) -> None:
    layer = a_layer()
    expected = gradients(layer, looped(layer.g, z))
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    z = z.requires_grad_()
    found = gradients(layer, layer(z))
    torch.testing.assert_close(found, expected)
    assert seen[:2] == ["before", "after"]
    # The hooks of g see every evaluation, and every product with its Jacobian.
    inside: list[int] = []
    layer.g.register_forward_hook(lambda *_: inside.append(0))
    layer.g.register_full_backward_hook(lambda *_: inside.append(1))
    value = layer(z)
    assert len(inside) >= int(layer.last_solution.num_steps.max())
    torch.testing.assert_close(gradients(layer, value), expected)
    assert 1 in inside
    halved = layer(z)
    halved.register_hook(lambda v: 0.5 * v)
    torch.testing.assert_close(gradients(layer, halved), [0.5 * t for t in expected])


def test_gradients_add_up_and_vanish_with_zero_grad(z: Tensor) -> None:
    layer = a_layer()
    (layer(z) ** 2).sum().backward()
    once = [p.grad.clone() for p in layer.parameters()]
    (layer(z) ** 2).sum().backward()
    torch.testing.assert_close([p.grad for p in layer.parameters()], [2 * t for t in once])
    layer.zero_grad()
    layer.requires_grad_(False)
    assert not layer(z).requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_a_layer_with_dropout(use_reentrant: bool, z: Tensor) -> None:
    cell = nn.Sequential(nn.Linear(D, D, dtype=F64), nn.Dropout(0.5))
    layer = fpi.FPILayer(
        lambda x, z: torch.tanh(0.3 * cell(x) + z.sum(1, keepdim=True)), state_shape=D, **TIGHT
    )

    def gradient(solve: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        leaf = z.clone().requires_grad_()
        cell.zero_grad()
        (solve(leaf) ** 2).sum().backward()
        return [leaf.grad, *(p.grad.clone() for p in cell.parameters())]

    expected = gradient(layer)
    found = gradient(lambda z: checkpoint(layer, z, use_reentrant=use_reentrant))
    torch.testing.assert_close(found, expected)


# --- what it says -----------------------------------------------------------------------------


def test_what_a_layer_says_of_its_route(z: Tensor) -> None:
    plain = a_layer(rtol=1e-3)
    text = plain.explain()
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert list(lines) == ["route", "backend", "solver", "samples", "inputs", "adjoint"]
    assert lines["route"].startswith("host loop")
    assert "torch.float64 on cpu" in lines["backend"]
    assert "Anderson(m=5" in lines["solver"]
    assert "0.001 ||g(x)||" in lines["solver"]
    assert "all are evaluated" in lines["samples"]
    assert "no prepare" in lines["inputs"]
    assert lines["adjoint"].startswith("exact: ")
    assert "ridge=0.0" in lines["adjoint"]

    cell = fpi.FPILayer(fpi.cells.Dense(K, D), backend="reference", adjoint=fpi.Neumann(k=3))
    text = cell.explain()
    assert "reference for torch.float32 on cpu (asked for)" in text
    assert "stopped ones leave the batch (g.rowwise is True)" in text
    assert "g.prepare(*z) runs once per solve" in text
    assert "(J^T)^3 v" in text
    cell.double()(z)
    assert "torch.float64" in cell.explain()

    half = fpi.FPILayer(fpi.cells.Dense(K, D, dtype=torch.float16))
    assert "native is unavailable: it has no kernels for torch.float16" in half.explain()


@pytest.mark.parametrize(
    ("adjoint", "words"),
    [
        (fpi.Implicit(), "the forward's"),
        (fpi.Implicit(solver=fpi.GMRES(), rtol=1e-2, max_steps=7), "GMRES(restart=32) (asked for)"),
        (fpi.JacobianFree(), "c = v, the identity"),
        (fpi.Phantom(k=4, tau=0.5), "through 4 steps of damping 0.5"),
        (fpi.Unroll(), "every step of the solver"),
    ],
    ids=str,
)
def test_what_a_layer_says_of_its_adjoint(adjoint: Any, words: str) -> None:
    for solver in (fpi.Picard(), fpi.Anderson(), fpi.Broyden()):
        assert words in fpi.FPILayer(Cell(), adjoint=adjoint, solver=solver).explain()


def test_the_representation_shows_what_was_chosen() -> None:
    text = repr(fpi.FPILayer(Cell(), state_shape=(D,), adjoint=fpi.Unroll(), rowwise=True))
    for part in ("solver=Anderson(", "rtol=0.0001", "state_shape=(4,)", "adjoint=Unroll()",
                 "rowwise=True", "(g): Cell()"):  # fmt: skip
        assert part in text
    assert "g=<lambda>" in repr(fpi.FPILayer(lambda x, z: x))
