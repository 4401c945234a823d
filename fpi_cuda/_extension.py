"""The two compiled files: loaded once on import, with the reason kept where that fails."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libfpi_cuda.so")

INTERFACE = 5
"""kInterface of csrc/interface.h: a file with another number was built from other sources.

It counts changes of the ops and classes and of what their arguments mean, not of the kernels'
rules: a library whose rules are older loads.
"""

INSTALL = "Reinstall with pip install . in the source folder"

SWITCH = "FPI_CUDA_DISABLE_EXTENSION"
"""The environment variable by which a user does without the library, and hears nothing of it."""


def version() -> str:
    """That of pyproject.toml: beside the package in a checkout, else as it was installed with."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        text = project.read_text(encoding="utf-8")
        found = re.search(r'^name = "fpi_cuda"\nversion = "(.+)"$', text, re.MULTILINE)
        if found:
            return found[1]
    try:
        return importlib.metadata.version("fpi_cuda")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def _other_copy() -> str | None:
    """The library of another copy of this package that has registered torch.ops.fpi_cuda.

    A second registration ends the process: torch's stable headers go on with the library that
    torch has refused to make. LIBRARY itself may be loaded again: dlopen knows it by then.
    """
    if not hasattr(torch.ops.fpi_cuda, "build_info"):
        return None
    try:
        ctypes.CDLL(str(LIBRARY.resolve()), mode=os.RTLD_NOLOAD)
    except OSError:
        loaded = (path for path in torch.ops.loaded_libraries if Path(path).name == LIBRARY.name)
        return next(loaded, "one that torch.ops.load_library did not load")
    return None


def _load() -> str | None:
    """Register torch.ops.fpi_cuda; return None, or why not and what to do."""
    if os.environ.get(SWITCH) == "1":
        return f"switched off by {SWITCH}=1. Unset it"
    if not LIBRARY.exists():
        return f"built without the extension (no {LIBRARY.name} in the package). {INSTALL}"
    other = _other_copy()
    if other is not None:
        return (
            f"a process holds one copy of the extension: {other} was loaded before {LIBRARY}. "
            "Import fpi_cuda from one folder only, or use a process for each"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return f"the extension does not load under torch {torch.__version__} ({reason}). {INSTALL}"
    return _stale(LIBRARY, _built().get("interface", "none"))


def _stale(file: Path, found: str) -> str | None:
    """Why a file with this number is not to be used, or None."""
    if found == str(INTERFACE):
        return None
    return (
        f"{file} was built from other sources than this Python code, which needs interface "
        f"{INTERFACE} and gets {found}. {_rebuild()}"
    )


def _rebuild() -> str:
    """What makes both files anew."""
    source = LIBRARY.parents[1]
    if (source / "setup.py").exists():
        return f"Run python setup.py build_ext --inplace in {source}"
    return INSTALL


def _load_module() -> str | None:
    """Bind fpi_cuda._C to the library; return None, or why not and what to do."""
    if load_error is not None:
        return load_error
    try:
        # Else an editable install of another checkout would lend its own.
        if PathFinder.find_spec("fpi_cuda._C", [str(LIBRARY.parent)]) is None:
            raise ImportError("No module named 'fpi_cuda._C'")
        import fpi_cuda._C as module
    except ImportError as error:
        python = ".".join(map(str, sys.version_info[:2]))
        reason = " ".join(str(error).split())
        return f"built without fpi_cuda._C for Python {python} ({reason}). {_rebuild()}"
    stale = _stale(Path(module.__file__), str(module.interface))
    if stale is None:
        module.open_library(str(LIBRARY))
    return stale


def _built() -> dict[str, str]:
    return dict(line.split("=", 1) for line in torch.ops.fpi_cuda.build_info().splitlines())


load_error: str | None = _load()
"""Why the library is unavailable, with the remedy; None where it is loaded."""

module_error: str | None = _load_module()
"""Why fpi_cuda._C is unavailable, with the remedy, and so the device loop; None: it is loaded."""


def warn_if_missing() -> None:
    """Say, where the package is imported, that the kernels are missing and what that costs.

    To be called by the package itself. A RuntimeWarning: a category of our own could not be named
    in a filter before the import that it is about.
    """
    if load_error is not None and os.environ.get(SWITCH) != "1":
        warnings.warn(
            f"fpi_cuda: no compiled kernels: {load_error}. Until then solves run in plain torch, "
            "which takes 30 times as long or more on a CPU. To do without them on purpose, and "
            f"without this warning, set {SWITCH}=1",
            RuntimeWarning,
            stacklevel=3,
        )


def native_available() -> bool:
    """Whether the C++ kernels can be called."""
    return load_error is None


def build_info() -> dict[str, str]:
    """How the library was built: interface, compiler, torch_headers, torch_target, and more.

    `interface` is the number that Python code and library must share; `cuda` holds the
    architectures, or `no_cuda` the reason why there are none.

    Raises:
        RuntimeError: the library is not loaded.
    """
    if load_error is not None:
        raise RuntimeError(f"build_info: the library is unavailable: {load_error}.")
    return _built()
