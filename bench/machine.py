"""Where and with what a measurement was taken."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "numpy", "torchdeq", "xitorch", "jax", "jaxopt", "optimistix")


def describe(device: torch.device, threads: int, command: list[str]) -> dict[str, Any]:
    """Device, versions, commit and command line; folders in the command line become DIR."""
    return {
        "device": device_name(device),
        "cpu": cpu_model(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version for name in LIBRARIES if (version := version_of(name))},
        "commit": commit(),
        "command": " ".join(re.sub(r"^(\S*=)?.*/.*$", r"\1DIR", word) for word in command),
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def slug(device: torch.device) -> str:
    """The device's name as it stands in file names."""
    return re.sub(r"[^A-Za-z0-9]+", "-", device_name(device)).strip("-").lower()


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


def commit() -> str:
    """The commit of this checkout, with "+" where tracked files differ from it."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        try:
            run = subprocess.run(
                ["git", "-C", str(here), *args], capture_output=True, text=True, check=False
            )
        except OSError:  # there is no git
            return ""
        return run.stdout.strip() if run.returncode == 0 else ""

    revision = git("rev-parse", "--short", "HEAD")
    if not revision:
        return "unknown"
    return revision + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def command_line() -> list[str]:
    """This process as the user typed it."""
    spec = sys.modules["__main__"].__spec__
    return ["python", "-m", spec.name if spec else Path(sys.argv[0]).name, *sys.argv[1:]]
