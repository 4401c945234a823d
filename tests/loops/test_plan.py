"""Which loop runs a solve: one decision, which solves follow and explain() prints."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fpi_cuda as fpi
from fpi_cuda import cells, loops
from fpi_cuda.evaluation.state import layout_of
from fpi_cuda.lowered import Lowered, NotLowered

NO_GRAPHS = ("device", "the state is on cpu, which has no CUDA graphs")


class Reluctant(cells.Dense):
    """A cell of a user's that could be fused, and finds out only with its inputs that it is not."""

    def step(self, x: Tensor, prepared: Tensor) -> Tensor:
        return super().step(x, prepared)

    def lower(self, prepared: Tensor) -> Lowered:
        raise NotLowered(f"not with {len(prepared)} samples")


def plan_of(layer: fpi.FPILayer, x0: Tensor) -> loops.Plan:
    return loops.plan_of(layer.g, layout_of(x0), layer.options)


@pytest.mark.skipif(not fpi.native_available(), reason="no native library")
@pytest.mark.parametrize(
    ("g", "given", "name", "reasons"),
    [
        (
            lambda x, z: 0.5 * x + z,
            {},
            "host",
            (("fused", "function has no lower(prepared)"), NO_GRAPHS),
        ),
        (cells.Dense(3, 3), {}, "fused", ()),
        (
            cells.Dense(3, 3),
            {"route": "host"},
            "host",
            (("fused", 'route="host" asks for it'), ("device", 'route="host" asks for it')),
        ),
        (
            cells.Dense(3, 3),
            {"solver": fpi.Broyden()},
            "host",
            (("fused", "it has Picard and Anderson, not Broyden"), NO_GRAPHS),
        ),
    ],
    ids=["function", "cell", "route", "solver"],
)
def test_a_solve_goes_as_planned(g: Any, given: Any, name: str, reasons: Any) -> None:
    layer = fpi.FPILayer(g, state_shape=3, **given)
    z = torch.randn(2, 3)
    plan = plan_of(layer, torch.zeros(2, 3))
    assert (plan.loop.name, plan.reasons) == (name, reasons)
    before = layer.explain().splitlines()[0]
    route = layer.solve(z).adjoint_record.route
    assert route == (name, reasons)
    for line in (before, layer.explain().splitlines()[0]):
        assert line.startswith(f"route    {name} loop")
        assert route.reason in line


@pytest.mark.skipif(not fpi.native_available(), reason="no native library")
def test_a_loop_that_declines_while_it_solves_makes_room_for_the_next() -> None:
    layer = fpi.FPILayer(Reluctant(3, 3))
    z = torch.randn(2, 3)
    assert plan_of(layer, torch.zeros(2, 3)).loop.name == "fused"
    solution = layer.solve(z)
    reasons = (("fused", "not with 2 samples"), NO_GRAPHS)
    assert solution.adjoint_record.route == ("host", reasons)
    assert "not fused: not with 2 samples; not on the device: the state" in layer.explain()
    with pytest.raises(loops.Unavailable, match="the solve cannot run there: not with 2 samples"):
        fpi.FPILayer(layer.g, route="fused")(z)


def test_the_loop_asked_for_says_why_it_cannot() -> None:
    layer = fpi.FPILayer(lambda x, z: 0.5 * x + z, route="device")
    with pytest.raises(loops.Unavailable) as caught:
        plan_of(layer, torch.zeros(2, 3))
    handed_on = pickle.loads(pickle.dumps(caught.value))
    assert str(handed_on) == str(caught.value)
    assert handed_on.reason == caught.value.reason == NO_GRAPHS[1]
    assert layer.explain().startswith('route    none: route="device" asks for the device loop, but')


def test_equal_requests_have_equal_plans() -> None:
    layer = fpi.FPILayer(cells.MLP(4, 3, 5))
    plan = plan_of(layer, torch.zeros(2, 3))
    assert plan == plan_of(layer, torch.ones(2, 3))
    assert hash(plan) == hash(plan_of(layer, torch.ones(2, 3)))
    assert plan != plan_of(layer, torch.zeros(3, 3))
    assert plan.adjoint_solver == fpi.Anderson(m=5, ridge=0.0)
