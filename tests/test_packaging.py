"""The package as it is installed: import, the compiled library, metadata, and the build."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet

import fpi_cuda
from fpi_cuda import Status, _extension, lowered, precision
from fpi_cuda.loops.device import native
from fpi_cuda.ops.solver_state import CONTROL_FIELDS

ROOT = Path(__file__).parents[1]


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
    (number,) = re.findall(r"kInterface = (\d+);", sources)
    assert int(number) == _extension.INTERFACE
    assert _extension.build_info()["interface"] == number
    calls = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', sources)
    schemas = sorted("".join(re.findall(r'"([^"]*)"', call)) for call in calls)
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fpi_cuda::")]
    assert {f"fpi_cuda::{schema.partition('(')[0]}" for schema in schemas} == set(ops)
    functions = re.findall(r"FPI_API (\w[^;]*);", (csrc / "device_loop" / "api.h").read_text())
    assert len(functions) == len(native.SIGNATURES)
    # What the arguments mean; other tests hold these to the headers.
    meanings = (CONTROL_FIELDS, [*map(int, Status)], lowered.ACTIVATIONS, precision.NAMES)
    shared = (schemas, [" ".join(function.split()) for function in functions], *meanings)
    digest = hashlib.sha256(repr(shared).encode()).hexdigest()[:16]
    assert (digest, _extension.INTERFACE) == ("a6883eaf3486145a", 2), (
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
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder"
    (folder / "csrc").mkdir(parents=True)
    (folder / "fpi_cuda").mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()
    (folder / "csrc" / "one_op.cpp").write_text(ONE_OP)
    (folder / "csrc" / "one_kernel.cu").write_text(ONE_KERNEL)
    return folder


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("FPI_", "TORCH_CUDA"))}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**variables, **environment},
        capture_output=True,
        text=True,
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
def setup_py(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """setup.py as a module, without the call of setup()."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    for name in ("FPI_CUDA", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CUDA_SOURCES = ["csrc/cuda/one_kernel.cu"]
    return module


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


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
def test_commands_run_with_and_without_ninja(
    setup_py: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ninja: bool
) -> None:
    if ninja and not setup_py.shutil.which("ninja"):
        pytest.skip("no ninja")
    if not ninja:
        monkeypatch.setattr(setup_py.shutil, "which", lambda *args, **options: None)
    monkeypatch.chdir(tmp_path)
    setup_py.BUILD.mkdir(parents=True)
    Path("a.cpp").write_text("a $HOME")
    compiles = {"a.o": (["a.cpp"], ["cp", "a.cpp", "a.o"])}
    setup_py.run_all(compiles, {"a.so": (["a.o"], ["cp", "a.o", "a.so"])})
    assert Path("a.so").read_text() == "a $HOME"
    with pytest.raises(SystemExit, match="the build failed"):
        setup_py.run_all(compiles, {"b.so": (["a.o"], ["false"])})


# What may not be in the repository.

FOLDERS = "opt|work|tmp|root|home"  # Machine paths: they hold on nobody else's computer.
FORBIDDEN = re.compile(rf"(?<![\w.)}}*-])/({FOLDERS})/|extra-index|find-links|index-url")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_tracked_file_names_one_machine() -> None:
    listing = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    paths = [ROOT / name for name in listing.split("\0") if name]
    assert len(paths) > 10
    problems = []
    for path in paths:
        if path == Path(__file__) or not path.is_file():
            continue
        text = path.read_bytes().decode(errors="ignore")
        problems += [f"{path}: {match[0]}" for match in FORBIDDEN.finditer(text)]
    assert not problems
