"""What setup.py decides: which torch, whether CUDA, for which architectures."""

from __future__ import annotations

import sys
import sysconfig
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def isolated(setup_py: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """setup.py in a build that cannot import torch."""
    monkeypatch.setattr(setup_py.importlib.util, "find_spec", lambda name: None)
    return setup_py


def site_packages(base: Path) -> Path:
    variables = {"base": str(base), "platbase": str(base)}
    return Path(sysconfig.get_path("purelib", "posix_prefix", variables))


def test_isolated_build_finds_the_torch_of_its_environment(
    isolated: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = site_packages(tmp_path) / "torch"
    folder.mkdir(parents=True)
    (folder / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda = '13.0'\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    found, version = isolated.find_torch()
    assert found == folder
    assert version["cuda"] == "13.0"


@pytest.mark.parametrize(("installed", "found"), [(None, "none"), ("2.9.1", "2.9.1")])
def test_build_without_a_usable_torch_says_what_to_install(
    isolated: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    installed: str | None,
    found: str,
) -> None:
    if installed:
        folder = site_packages(tmp_path) / "torch"
        folder.mkdir(parents=True)
        (folder / "version.py").write_text(f"__version__ = {installed!r}\n")
    schemes = {"purelib": str(site_packages(tmp_path)), "platlib": str(tmp_path)}
    monkeypatch.setattr(isolated.sysconfig, "get_paths", lambda *args: schemes)
    with pytest.raises(SystemExit, match=f"found {found}. First pip install") as error:
        isolated.find_torch()
    assert "\n" not in str(error.value)
    assert "--no-build-isolation to pip install" in str(error.value)
    assert "--no-isolation to python -m build" in str(error.value)


CPU_TORCH = {"__version__": "2.13.0+cpu", "cuda": None}
CUDA_TORCH = {"__version__": "2.13.0+cu130", "cuda": "13.0"}


@pytest.mark.parametrize(
    ("choice", "nvcc", "torch_version", "reason"),
    [
        ("", True, CUDA_TORCH, None),
        ("", True, CPU_TORCH, "torch 2.13.0+cpu at install was a build without CUDA"),
        ("", False, CUDA_TORCH, "no nvcc at install"),
        ("0", True, CUDA_TORCH, "FPI_CUDA=0 at install"),
        ("1", True, CPU_TORCH, None),
    ],
)
def test_toolkit_and_torch_decide_on_cuda(
    setup_py: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    choice: str,
    nvcc: bool,
    torch_version: dict[str, str | None],
    reason: str | None,
) -> None:
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    if nvcc:
        compiler.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FPI_CUDA", choice)
    chosen = str(compiler) if reason is None else None
    assert setup_py.plan_cuda(torch_version) == (chosen, reason)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("1", "FPI_CUDA=1 asks for the CUDA kernels, but: no nvcc at install"),
        ("yes", "FPI_CUDA must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_an_impossible_choice_of_cuda_is_an_error(
    setup_py: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    choice: str,
    message: str,
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FPI_CUDA", choice)
    with pytest.raises(SystemExit, match=message):
        setup_py.plan_cuda(CUDA_TORCH)


@pytest.mark.parametrize(
    ("release", "cuda", "archs", "warns"),
    [
        ("13.0", "12.8", "9.0", True),
        ("13.0", "13.0", "9.0+PTX", False),
        ("12.8", "13.0", "9.0+PTX", False),
        ("12.9", "12.6", "8.0 9.0", False),
        ("12.9", "12.6", "8.0 9.0+PTX", True),
        ("13.0", None, "9.0+PTX", False),
        ("unknown", "12.8", "9.0", False),
    ],
)
def test_a_toolkit_too_new_for_the_driver_of_torch_is_named(
    setup_py: types.ModuleType,
    tmp_path: Path,
    release: str,
    cuda: str | None,
    archs: str,
    warns: bool,
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    said = setup_py.newer_toolkit(str(nvcc), {"__version__": "2.10.0", "cuda": cuda}, archs)
    assert (said is not None) == warns
    if warns:
        start = f"fpi_cuda: warning: nvcc is of CUDA {release}, torch 2.10.0 of CUDA {cuda}: "
        assert said.startswith(start)
        assert f"set CUDA_HOME to a toolkit of CUDA {cuda}." in said
        assert "\n" not in said


def test_architectures_become_options_of_nvcc(setup_py: types.ModuleType) -> None:
    assert list(setup_py.arch_flags("8.0;9.0a+PTX")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    with pytest.raises(SystemExit, match="CUDA architectures are written"):
        list(setup_py.arch_flags("Hopper"))
