"""Contract, 7: g is evaluated faithfully.

Autocast and, for a stochastic g, randomness are the same in every evaluation of one solve and its
adjoint, or a clear error says why not. What a user hangs on g counts: hooks of every kind, a
patched or overridden ``forward``, parametrizations, FSDP. A shortcut (prepare and step, a fused or
captured loop) is taken only where it gives what ``g(x, *z)`` gives.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from coupled_maps import orthogonal
from dropping import Dropping, Watching, leaves, with_mask
from hooked_maps import CELLS, CLOSE, F64, TIGHT, B, D, Plain, by_hand, dense, inputs, parts, start
from hung import HUNG
from torch import Tensor, nn

import fpi_cuda as fpi


@pytest.mark.parametrize(
    ("name", "how", "backend"),
    [*itertools.product(CELLS, HUNG, [None]), *itertools.product(["dense"], HUNG, ["reference"])],
)
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


@pytest.mark.parametrize("rowwise", [False, True])
def test_one_mask_per_solve_and_its_adjoint(rowwise: bool) -> None:
    z, a = leaves()
    z = (z.detach() * torch.logspace(-4, 1, B, dtype=F64)[:, None]).requires_grad_()
    g = Dropping(a, rowwise)
    sol = fpi.fixed_point(g, torch.zeros_like(z), z, **TIGHT)
    assert sol.converged.all()
    grads = torch.autograd.grad((sol.value**2).sum(), (z, a), create_graph=True)
    second = torch.autograd.grad((grads[1] ** 2).sum(), a)[0]
    assert all(torch.equal(mask, g.masks[0]) for mask in g.masks)
    expected = with_mask(a, z, g.masks[0])
    torch.testing.assert_close(sol.value, expected)
    oracle = torch.autograd.grad((expected**2).sum(), (z, a), create_graph=True)
    torch.testing.assert_close(grads, oracle)
    torch.testing.assert_close(second, torch.autograd.grad((oracle[1] ** 2).sum(), a)[0])


@pytest.mark.parametrize("create_graph", [False, True])
def test_autocast_is_the_same_in_every_evaluation(create_graph: bool) -> None:
    cell = Watching()
    z = torch.randn(B, D)
    with torch.autocast("cpu", torch.bfloat16):
        sol = fpi.fixed_point(cell, torch.zeros(B, D), z, rtol=1e-2)
    assert sol.value.dtype == torch.float32
    assert sol.converged.all()
    # Backward runs outside of autocast, as torch recommends.
    (grad,) = torch.autograd.grad(
        (sol.value**2).sum(), cell.linear.weight, create_graph=create_graph
    )
    if create_graph:
        torch.autograd.grad(grad.sum(), cell.linear.weight)
    assert set(cell.dtypes) == {torch.bfloat16}
    expected = fpi.fixed_point(cell, torch.zeros(B, D), z, rtol=1e-6).value
    (oracle,) = torch.autograd.grad((expected**2).sum(), cell.linear.weight)
    assert torch.linalg.matrix_norm(grad - oracle) <= 0.05 * torch.linalg.matrix_norm(oracle)


class Normalised(nn.Module):
    def __init__(self, norm: nn.Module, hoisted: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("weight", orthogonal(5, 0.5))
        if hoisted:
            self.prepare = lambda z: self.norm(z)
            self.step = lambda x, prepared: 0.5 * torch.tanh(x @ self.weight + prepared)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if hasattr(self, "prepare"):
            return self.step(x, self.prepare(z))
        return 0.5 * torch.tanh(self.norm(x @ self.weight + z))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("hoisted", [False, True])
def test_running_statistics_count_one_call(grad: bool, create_graph: bool, hoisted: bool) -> None:
    norm = nn.BatchNorm1d(5, dtype=F64)
    g = Normalised(norm, hoisted)
    layer, z = fpi.FPILayer(g, rtol=1e-9, max_steps=200), torch.randn(16, 5, dtype=F64)
    for call in range(1, 4):
        before = norm.running_mean.clone()  # type: ignore[union-attr]
        with torch.set_grad_enabled(grad):
            x = layer(z.clone().requires_grad_())
        if grad:
            grads = torch.autograd.grad(x.square().sum(), list(g.parameters()), create_graph=True)
            if create_graph:
                sum(t.square().sum() for t in grads).backward()
        assert norm.num_batches_tracked == call
        inner = z if hoisted else x.detach() @ g.weight + z
        want = 0.9 * before + 0.1 * inner.mean(0)
        assert (norm.running_mean - want).abs().max() < 1e-7  # type: ignore[operator]
