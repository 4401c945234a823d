"""How the CUDA loop of lowered cells is laid out on a device, and when another loop is taken."""

from __future__ import annotations

import pytest
import torch

import fpi_cuda as fpi
from fpi_cuda.ops import cuda, native
from fpi_cuda.options import PRECISIONS

pytestmark = pytest.mark.skipif(not fpi.native_available(), reason="no native library")

H100 = (132, 227 * 1024, (9, 0))
A100 = (108, 163 * 1024, (8, 0))
OLD = (72, 64 * 1024, (7, 5))
CPU = torch.device("cpu")


def plan(
    monkeypatch: pytest.MonkeyPatch,
    device: tuple[int, int, tuple[int, int]],
    batch: int,
    dim: int,
    hidden: int = 0,
    *,
    depth: int = 5,
    dtype: torch.dtype = torch.float32,
    precision: str = "ieee",
) -> tuple[int, str | None]:
    monkeypatch.setattr(cuda, "limits_of", lambda _: device)
    return cuda.cell_loop_plan(batch, dim, hidden, depth, dtype, PRECISIONS.index(precision), CPU)


@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_shapes_of_the_paper_and_of_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, device: tuple[int, int, tuple[int, int]], precision: str
) -> None:
    for sizes in ((2515, 159, 600), (8192, 512), (65536, 64), (1, 64)):
        slots, reason = plan(monkeypatch, device, *sizes, precision=precision)
        assert reason is None
        assert slots in (8, 16, 32, 64)
    # The whole of a large weight for every eight samples, by 8 blocks.
    _, reason = plan(monkeypatch, device, 64, 2048, precision=precision)
    assert reason is not None
    if precision != "tf32x3":  # which keeps two numbers of each, too many for shared memory
        assert "too few samples for so large a weight" in reason
        _, reason = plan(monkeypatch, device, 4096, 2048, precision=precision)
        assert reason is None


def test_tiles_grow_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = [plan(monkeypatch, H100, batch, 159, 600)[0] for batch in (1, 1000, 2515, 100_000)]
    assert slots == sorted(slots)
    assert slots[0] == 8
    assert slots[-1] >= 32


def test_states_that_no_tile_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    _, reason = plan(monkeypatch, H100, 100_000, 8192, dtype=torch.float64)
    assert reason is not None
    assert "does not fit into shared memory" in reason


def test_devices_without_such_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(monkeypatch, OLD, 1000, 64)[1] is None
    _, reason = plan(monkeypatch, OLD, 1000, 64, precision="tf32")
    assert reason == "rounded products need a device of compute capability 8.0 or above"


def test_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "limits_of", lambda _: H100)
    words = cuda.cell_loop_words(64, 0, 5, torch.float64, 0, CPU)
    assert words == "one kernel evaluates g and steps, 32 samples at a time per block"
    words = cuda.cell_loop_words(2048, 0, 5, torch.float32, 0, CPU)
    assert words.endswith("or torch and the steps' own kernels where they are few")


def test_another_loop_is_taken_where_it_should_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def declines(*sizes: object) -> tuple[int, str]:
        asked.append(sizes)
        return 8, "it is a bad day"

    monkeypatch.setattr(native, "cell_loop_plan", declines, raising=False)
    cell = fpi.cells.MLP(3, 5, 7)
    z, x0 = torch.randn(6, 3), torch.zeros(6, 5)
    layer = fpi.FPILayer(cell)
    expected = layer(z, x0=x0)
    assert asked == [(6, 5, 7, 5, torch.float32, 0, CPU)]
    assert "it is a bad day" in layer.explain()
    asked.clear()
    layer = fpi.FPILayer(cell, route="fused")
    torch.testing.assert_close(layer(z, x0=x0), expected, rtol=1e-4, atol=1e-4)
    assert not asked
    assert "fused loop" in layer.explain()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 0, 0, 0, False, 0, 1, 0), "sizes must not be negative"),
        ((1, 1, 0, 17, False, 0, 1, 0), "nor depth above 16"),
        ((1, 1, 0, 0, False, 4, 1, 0), "precision must be from 0 to 3, got 4"),
        ((1, 1, 0, 0, False, 0, 0, 0), "a device has cores, got 0"),
    ],
)
def test_the_op_refuses(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fpi_cuda.cell_loop_on_cuda(*sizes)
