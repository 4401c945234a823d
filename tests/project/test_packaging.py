"""The package as it is installed: import, the compiled library, metadata, and the build."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet

import fpi_cuda
from fpi_cuda import _C, Status, _extension
from fpi_cuda.activations import CODES
from fpi_cuda.ops.solver_state import CONTROL_FIELDS
from fpi_cuda.options import PRECISIONS

ROOT = Path(__file__).parents[2]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, from a folder that is not the repository's.

    Warnings are errors but that of the missing library, which has tests of its own.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:fpi_cuda", "-c", code],
        env=variables,
        cwd="/",
        capture_output=True,
        text=True,
    )


def test_library_is_loaded_and_says_how_it_was_built() -> None:
    assert _extension.load_error is None
    info = _extension.build_info()
    assert info["torch_target"] == "2.10"
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert re.match(r"\d+\.\d+", info["torch_headers"])
    assert ("cuda" in info) != ("no_cuda" in info)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_library_needs_no_python_and_no_cuda_library() -> None:
    listing = subprocess.check_output(["readelf", "-d", _extension.LIBRARY], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(\S+?)\.so", listing)
    assert {"libtorch", "libtorch_cpu"} <= set(needed)
    assert not [name for name in needed if re.search("python|cuda|cudart|c10", name)]


def test_a_changed_interface_has_a_new_number() -> None:
    """Raised by hand, so that an edit of Python or of a kernel asks for no new build."""
    csrc = ROOT / "csrc"
    sources = "".join(path.read_text() for path in sorted(csrc.glob("*.cpp")))
    (number,) = re.findall(r"kInterface = (\d+);", (csrc / "interface.h").read_text())
    assert int(number) == _extension.INTERFACE
    assert _extension.build_info()["interface"] == str(_C.interface) == number
    calls = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', sources)
    schemas = sorted("".join(re.findall(r'"([^"]*)"', call)) for call in calls)
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fpi_cuda::")]
    assert {f"fpi_cuda::{schema.partition('(')[0]}" for schema in schemas} == set(ops)
    headers = "".join(path.read_text() for path in sorted(csrc.glob("*/api.h")))
    functions = re.findall(r"FPI_API (\w[^;]*);", headers)
    stub = (Path(_extension.__file__).parent / "_C.pyi").read_text()
    classes = [f"{name}({args})" for name, args in re.findall(r"def (\w+)\(([^)]*)\)", stub)]
    # What the arguments mean; other tests hold these to the headers.
    meanings = (CONTROL_FIELDS, [*map(int, Status)], tuple(CODES), PRECISIONS)
    signatures = [" ".join(text.split()) for text in (*functions, *classes)]
    shared = (schemas, signatures, *meanings)
    digest = hashlib.sha256(repr(shared).encode()).hexdigest()[:16]
    assert (digest, _extension.INTERFACE) == ("f91db47d3d7d84fd", 5), (
        "the interface has changed: raise INTERFACE and kInterface by one, and put both here"
    )


MISSING = """
import pathlib, shutil, sys
folder = pathlib.Path({folder!r})
sys.path.insert(0, str(folder))
import fpi_cuda
assert pathlib.Path(fpi_cuda.__file__).parent == folder / "fpi_cuda"
from fpi_cuda import _extension
print(_extension.native_available(), _extension.load_error)
"""


@pytest.fixture
def copy_without_library(tmp_path: Path) -> Path:
    package = Path(fpi_cuda.__file__).parent
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package, tmp_path / "fpi_cuda", ignore=ignore)
    return tmp_path


def test_import_works_without_the_library(copy_without_library: Path) -> None:
    done = run(MISSING.format(folder=str(copy_without_library)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False built without the extension")
    assert "pip install ." in done.stdout


def test_import_works_with_a_broken_library(copy_without_library: Path) -> None:
    (copy_without_library / "fpi_cuda" / "libfpi_cuda.so").write_bytes(b"not a library")
    done = run(MISSING.format(folder=str(copy_without_library)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False the extension does not load")
    assert "libfpi_cuda.so" in done.stdout
    assert "pip install ." in done.stdout


@pytest.mark.parametrize("is_source_tree", [False, True])
def test_a_stale_library_is_refused(copy_without_library: Path, is_source_tree: bool) -> None:
    package = copy_without_library / "fpi_cuda"
    shutil.copy(_extension.LIBRARY, package)
    text = (package / "_extension.py").read_text()
    newer = f"\nINTERFACE = {_extension.INTERFACE + 1}\n"
    (package / "_extension.py").write_text(re.sub(r"\nINTERFACE = \d+\n", newer, text))
    if is_source_tree:
        (copy_without_library / "setup.py").touch()
    done = run(MISSING.format(folder=str(copy_without_library)))
    assert done.returncode == 0, done.stderr
    assert "libfpi_cuda.so was built from other sources than this Python code" in done.stdout
    needs = f"needs interface {_extension.INTERFACE + 1} and gets {_extension.INTERFACE}. "
    in_place = f"Run python setup.py build_ext --inplace in {copy_without_library}"
    assert needs + (in_place if is_source_tree else "Reinstall with pip install .") in done.stdout


def test_all_but_the_device_loop_works_without_the_module(copy_without_library: Path) -> None:
    package = copy_without_library / "fpi_cuda"
    shutil.copy(_extension.LIBRARY, package)
    (package / "_C.cpython-39-other.so").touch()  # of another Python
    code = MISSING + (
        "import torch; from fpi_cuda.loops.device.cuda_graphs import CudaGraphs\n"
        "x = fpi_cuda.fixed_point(torch.cos, torch.ones(1, 1), backend='native').value\n"
        "print(x.item() > 0.7, CudaGraphs().why_not(), sep=chr(10))\n"
    )
    done = run(code.format(folder=str(copy_without_library)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True None\nTrue\nbuilt without fpi_cuda._C for Python 3.")
    assert "(No module named 'fpi_cuda._C'). Reinstall with pip install ." in done.stdout


TWO_COPIES = """
import importlib, sys
for folder in {folders!r}:
    sys.path.insert(0, folder)
    for name in [n for n in sys.modules if n.split(".")[0] == "fpi_cuda"]:
        del sys.modules[name]
    _extension = importlib.import_module("fpi_cuda._extension")
    assert _extension.LIBRARY.parents[1].samefile(folder)
    print(_extension.load_error)
"""


def test_a_second_copy_in_a_process_is_refused_by_name(copy_without_library: Path) -> None:
    library = copy_without_library / "fpi_cuda" / "libfpi_cuda.so"
    shutil.copy(_extension.LIBRARY, library)
    done = run(TWO_COPIES.format(folders=[str(ROOT), str(copy_without_library)]))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "None"
    assert second.startswith("a process holds one copy of the extension: ")
    assert f"{_extension.LIBRARY} was loaded before {library}" in second
    assert "from one folder only" in second


def test_a_copy_may_be_imported_again(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(ROOT)
    done = run(TWO_COPIES.format(folders=[str(ROOT), str(ROOT), str(tmp_path / "link")]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None"] * 3


IMPORT_THEM = """
import pathlib, sys
sys.path.insert(0, {folder!r})
import fpi_cuda  # the user's line
"""


def import_without_the_library(folder: Path, *, flags: str = "", **environment: str) -> Any:
    script = folder / "user.py"
    script.write_text(IMPORT_THEM.format(folder=str(folder)))
    command = [sys.executable, *flags.split(), str(script)]
    environment = {k: v for k, v in os.environ.items() if "FPI_CUDA" not in k} | environment
    environment.pop("PYTHONWARNINGS", None)
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_missing_library_is_said_once_at_the_import(copy_without_library: Path) -> None:
    done = import_without_the_library(copy_without_library)
    assert (done.returncode, done.stdout) == (0, "")
    said, line = done.stderr.splitlines()
    assert said.startswith(f"{copy_without_library / 'user.py'}:4: RuntimeWarning: fpi_cuda: no ")
    assert "no libfpi_cuda.so in the package" in said
    assert "30 times" in said
    assert line.strip() == "import fpi_cuda  # the user's line"


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        ("-W ignore:fpi_cuda", {}),
        ("-W ignore::RuntimeWarning", {}),
        ("-W error", {"FPI_CUDA_DISABLE_EXTENSION": "1"}),
    ],
    ids=["by message", "by category", "on purpose"],
)
def test_that_a_library_is_missing_can_be_left_unsaid(
    copy_without_library: Path, flags: str, environment: dict[str, str]
) -> None:
    done = import_without_the_library(copy_without_library, flags=flags, **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_build_info_without_the_library_says_why() -> None:
    code = "from fpi_cuda import _extension; _extension.build_info()"
    done = run(code, FPI_CUDA_DISABLE_EXTENSION="1")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: build_info: the library is unavailable: switched off")


def test_import_makes_no_noise() -> None:
    done = run("import fpi_cuda")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_warnings_are_errors_but_for_the_scripting_of_torch(category: type[Warning]) -> None:
    torch.jit.script(torch.nn.Identity())
    text = "`torch.jit.script` is deprecated. Please switch to `torch.compile` or `torch.export`."
    warnings.warn(text, category, stacklevel=1)
    with pytest.raises(category, match="map"):
        warnings.warn("`map` is deprecated.", category, stacklevel=1)


# What the CUDA builds of torch pin.
TRITONS = {"2.10.0": "3.6.0", "2.11.0": "3.6.0", "2.12.0": "3.7.0", "2.14.1": "3.8.0"}


@pytest.mark.parametrize("torch_version", TRITONS)
def test_the_extra_for_tests_takes_the_triton_of_every_torch(torch_version: str) -> None:
    (found,) = re.findall(r'"triton([^;]+);', (ROOT / "pyproject.toml").read_text())
    assert TRITONS[torch_version] in SpecifierSet(found)


# The build, on a copy of the project with one op and one kernel.

ONE_OP = """
#include <string>
#include <torch/csrc/stable/library.h>
#ifdef FPI_CUDA_ARCHS
int launch();
std::string built() { return "cuda " FPI_CUDA_ARCHS + std::to_string(launch()); }
#else
std::string built() { return "no cuda: " FPI_NO_CUDA; }
#endif
STABLE_TORCH_LIBRARY(one_op, m) { m.def("built() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(one_op, CompositeExplicitAutograd, m) {
  m.impl("built", TORCH_BOX(&built));
}
"""
ONE_KERNEL = """
__global__ void fill_kernel(float* x) { x[threadIdx.x] = 1.0f; }
int launch() { fill_kernel<<<1, 0>>>(nullptr); return cudaGetLastError() == cudaSuccess; }
"""
ONE_MODULE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_C, m) { m.attr("interface") = 0; }
"""
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder"
    (folder / "csrc" / "python").mkdir(parents=True)
    (folder / "fpi_cuda").mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()
    (folder / "csrc" / "one_op.cpp").write_text(ONE_OP)
    (folder / "csrc" / "one_kernel.cu").write_text(ONE_KERNEL)
    (folder / "csrc" / "python" / "module.cpp").write_text(ONE_MODULE)
    for name in ("__init__.py", "_C.pyi"):
        (folder / "fpi_cuda" / name).touch()
    return folder


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_in(folder, [sys.executable, "setup.py", "build_ext", "--inplace"], **environment)


def run_in(
    folder: Path, command: list[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FPI_", "TORCH_CUDA"))}
    return subprocess.run(
        command, cwd=folder, env={**kept, **environment}, capture_output=True, text=True
    )


def load(folder: Path) -> str:
    library = str(folder / "fpi_cuda" / "libfpi_cuda.so")
    done = run(f"import torch as t; t.ops.load_library({library!r}); print(t.ops.one_op.built())")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_build_without_cuda_says_so_in_one_line(project: Path) -> None:
    done = build(project, FPI_CUDA="0")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("fpi_cuda:")]
    assert said == [
        "fpi_cuda: native CPU backend, no CUDA backend (FPI_CUDA=0 at install); "
        f"torch {torch.__version__}"
    ]
    assert load(project) == "no cuda: FPI_CUDA=0 at install"
    # The module needs neither torch nor CUDA.
    code = f"import sys; sys.path[0] = {str(project)!r}; from fpi_cuda import _C; "
    done = run(code + "assert _C.interface == 0 and 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_what_is_shipped_is_for_one_python_and_holds_all_that_it_needs(project: Path) -> None:
    code = "from setuptools import build_meta as b; print(b.build_sdist('.'), b.build_wheel('.'))"
    done = run_in(project, [sys.executable, "-c", code], FPI_CUDA="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = project.glob("*.whl")
    (sdist,) = project.glob("*.tar.gz")
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert f"-{python}-{python}-" in wheel.name
    module = f"fpi_cuda/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    with zipfile.ZipFile(wheel) as archive:
        assert {module, "fpi_cuda/_C.pyi", "fpi_cuda/libfpi_cuda.so"} <= {*archive.namelist()}
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "csrc/python/module.cpp", "fpi_cuda/_C.pyi"} <= names
    assert not [name for name in names if name.endswith(".so")]


@needs_nvcc
def test_build_with_cuda_loads_without_a_device_or_a_cuda_torch(project: Path) -> None:
    done = build(project, FPI_CUDA="1", FPI_CUDA_ARCHS="8.0 9.0+PTX")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CUDA backend for 8.0 9.0+PTX" in done.stdout
    assert load(project).startswith("cuda 8.0 9.0+PTX")


def test_a_failed_compile_ends_with_one_sentence(project: Path) -> None:
    (project / "csrc" / "one_op.cpp").write_text("int main( {")
    done = build(project, FPI_CUDA="0")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("fpi_cuda: the build failed")
    assert "Traceback" not in done.stderr


@pytest.fixture
def ninja(setup_py: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What ninja was called with, a run a line."""
    real = setup_py.shutil.which("ninja")
    if real is None:
        pytest.skip("no ninja")
    stand_in, calls = tmp_path / "bin" / "ninja", tmp_path / "calls"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\nexec "{real}" "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(setup_py.shutil, "which", lambda name, path=None: str(stand_in))
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize("jobs", ["1", ""], ids=["MAX_JOBS=1", "unset"])
def test_ninja_runs_the_commands(
    setup_py: types.ModuleType, monkeypatch: pytest.MonkeyPatch, ninja: Path, jobs: str
) -> None:
    monkeypatch.setenv("MAX_JOBS", jobs)
    Path("a.cpp").write_text("a $HOME")
    commands = {
        "a.o": (["a.cpp"], ["cp", "a.cpp", "a.o"]),
        "a.so": (["a.o"], ["cp", "a.o", "a.so"]),
    }
    setup_py.run_ninja(commands)
    assert Path("a.so").read_text() == "a $HOME"
    assert ninja.read_text().startswith("-j 1 -f" if jobs else "-f")
    with pytest.raises(SystemExit, match="the build failed"):
        setup_py.run_ninja({**commands, "b.so": (["a.o"], ["false"])})


def test_a_build_without_ninja_says_what_to_install(
    setup_py: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_py.shutil, "which", lambda *args, **options: None)
    with pytest.raises(SystemExit, match=r"ninja is needed to build\. First pip install ninja"):
        setup_py.run_ninja({})


# What may not be in the repository.
