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


def native_available() -> bool:
    """Whether the C++ kernels can be called."""
    return load_error is None


def build_info() -> dict[str, str]:
    """How the library was built: compiler, torch_headers, torch_target, and what follows.

    `cuda` holds the architectures, or `no_cuda` the reason why there are none; `activations` the
    names of those that were added to the fused loop's own.

    Raises:
        RuntimeError: the library is not loaded.
    """
    if load_error is not None:
        raise RuntimeError(f"build_info: the library is unavailable: {load_error}.")
    return dict(line.split("=", 1) for line in torch.ops.fpi_cuda.build_info().splitlines())
