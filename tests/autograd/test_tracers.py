"""Tracers and compilers around a layer: gone around, or refused by name."""

from __future__ import annotations

import pytest
import torch
from tanh_maps import F64, TIGHT, A, B, D, Z, solved, with_matrix
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fpi_cuda as fpi


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
