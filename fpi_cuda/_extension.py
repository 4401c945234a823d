"""The compiled library: loaded once on import, with the reason kept where that fails."""

from __future__ import annotations

import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libfpi_cuda.so")


def _load() -> str | None:
    """Register torch.ops.fpi_cuda; return None, or why not and what to do."""
    if os.environ.get("FPI_CUDA_DISABLE_EXTENSION") == "1":
        return "switched off by FPI_CUDA_DISABLE_EXTENSION=1. Unset it"
    if not LIBRARY.exists():
        return (
            f"built without the extension (no {LIBRARY.name} in the package). Reinstall with "
            "pip install . in the source folder"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return (
            f"the extension does not load under torch {torch.__version__} ({reason}). Reinstall "
            "with pip install . in the source folder"
        )
    return None


load_error: str | None = _load()
"""Why the library is unavailable, with the remedy; None where it is loaded."""


def build_info() -> dict[str, str]:
    """How the library was built: compiler, torch_headers, torch_target, and cuda or no_cuda.

    Raises:
        RuntimeError: the library is not loaded.
    """
    require("native", "build_info")
    return dict(line.split("=", 1) for line in torch.ops.fpi_cuda.build_info().splitlines())


def native_available() -> bool:
    """Whether the C++ kernels can be called."""
    return load_error is None


def cuda_available() -> bool:
    """Whether the CUDA kernels were built; says nothing of a device."""
    return native_available() and "cuda" in build_info()


def require(backend: str, operation: str = "fixed_point") -> None:
    """Raise unless the library holds the kernels of `backend`.

    Args:
        backend: "native" or "cuda".
        operation: named in the error.
    Raises:
        RuntimeError: they are missing; says why and what to do.
    """
    if load_error is not None:
        problem = load_error
        fallback = "reference"
    elif backend == "cuda" and not cuda_available():
        problem = f"built without CUDA ({build_info()['no_cuda']}). Reinstall with CUDA_HOME set"
        fallback = "native"
    else:
        return
    raise RuntimeError(
        f'{operation}: backend="{backend}" is unavailable: {problem}, or use backend="{fallback}".'
    )
