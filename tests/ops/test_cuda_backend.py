"""When the cuda backend is chosen, and what it says where it cannot be."""

from __future__ import annotations

import pytest
import torch

import fpi_cuda as fpi
from fpi_cuda import _extension, ops

built = pytest.mark.skipif(not _extension.native_available(), reason="built without the extension")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A library with CUDA kernels, or without them for the reason given."""
    monkeypatch.setattr(_extension, "load_error", None)
    monkeypatch.setattr(ops, "_no_cuda_reason", lambda: request.param)


@built
def test_the_ops_are_registered_for_cuda_where_they_were_built() -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in ("anderson_step_", "broyden_step_"):
        assert has_kernel(f"fpi_cuda::{op}", "CPU")
        assert has_kernel(f"fpi_cuda::{op}", "CUDA") == ("cuda" in _extension.build_info())


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scratch_is_asked_for_where_blocks_share_a_sample(dtype: torch.dtype) -> None:
    assert ops.cuda.scratch(torch.empty(3, 16384, dtype=dtype)) is None
    one = ops.cuda.scratch(torch.empty(1, 16385, dtype=dtype))
    three = ops.cuda.scratch(torch.empty(3, 16385, dtype=dtype))
    assert one is not None
    assert three is not None
    assert 0 < 3 * len(one) == len(three)
    assert not one.any()


@pytest.mark.parametrize("no_cuda", [None], indirect=True)
@pytest.mark.usefixtures("no_cuda")
def test_a_library_with_cuda_serves_states_on_a_device() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert ops.resolve(None, CUDA, dtype) is ops.cuda
        assert ops.resolve("cuda", CUDA, dtype) is ops.cuda
    assert ops.resolve(None, CUDA, torch.complex64).name == "reference"
    assert ops.resolve(None, CPU, torch.float32).name == "native"


@pytest.mark.parametrize(
    ("no_cuda", "device", "dtype", "message"),
    [
        (
            "no nvcc at install",
            CUDA,
            torch.float32,
            r"without CUDA \(no nvcc at install\)\. Reinst",
        ),
        (None, CPU, torch.float32, "it runs on CUDA devices, the state is on cpu"),
        (None, CUDA, torch.complex64, "it has no kernels for torch.complex64"),
    ],
    indirect=["no_cuda"],
    ids=["not-built", "on-the-cpu", "dtype"],
)
@pytest.mark.usefixtures("no_cuda")
def test_cuda_says_why_it_is_unavailable(
    device: torch.device, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=f'backend="cuda" is unavailable: .*{message}'):
        ops.resolve("cuda", device, dtype)


@pytest.mark.parametrize("no_cuda", ["FPI_CUDA=0 at install"], indirect=True)
@pytest.mark.usefixtures("no_cuda")
def test_a_library_without_cuda_leaves_devices_to_the_reference() -> None:
    assert ops.resolve(None, CUDA, torch.float32).name == "reference"
    with pytest.raises(ValueError, match="FPI_CUDA=0 at install"):
        fpi.fixed_point(torch.cos, torch.ones(2, 3), backend="cuda")
