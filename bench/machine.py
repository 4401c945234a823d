"""Where and with what a measurement was taken."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from bench import checkout

LIBRARIES = ("torch", "numpy", "torchdeq", "xitorch", "jax", "jaxopt", "optimistix")


def describe(device: torch.device, threads: int, command: list[str]) -> dict[str, Any]:
    """Device, versions, commit and command line; folders in the command line become DIR."""
    return {
        "device": device_name(device),
        "cpu": cpu_model(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := version_of(name))},
        "commit": checkout.commit(),
        "command": checkout.without_folders(command),
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def cpu_model() -> str:
    """The processor's name, with family and model where the kernel tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return str(name)


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_line() -> list[str]:
    """This process as the user typed it."""
    spec = sys.modules["__main__"].__spec__
    return ["python", "-m", spec.name if spec else Path(sys.argv[0]).name, *sys.argv[1:]]
