"""One version number, and what a source distribution holds."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fpi_cuda

ROOT = Path(__file__).parents[2]
LEFT_OUT = {".gitignore"}
PRINT_VERSION = "import sys; sys.path.insert(0, '.'); import fpi_cuda; print(fpi_cuda.__version__)"


def version_of(folder: Path) -> str:
    """What the copy of the package in a folder says."""
    command = [sys.executable, "-W", "ignore", "-c", PRINT_VERSION]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_version_is_that_of_pyproject() -> None:
    (written,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert fpi_cuda.__version__ == written
    assert f"## {written}" in (ROOT / "CHANGELOG.md").read_text()


def test_a_checkout_says_its_own_version_and_an_installed_package_its_metadata(
    tmp_path: Path,
) -> None:
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fpi_cuda", tmp_path / "fpi_cuda", ignore=ignore)
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\nname = "fpi_cuda"\nversion = "7.8.9"\n')
    assert version_of(tmp_path) == "7.8.9"
    project.write_text('[project]\nname = "another"\nversion = "7.8.9"\n')
    try:
        installed = importlib.metadata.version("fpi_cuda")
    except importlib.metadata.PackageNotFoundError:
        installed = "0+unknown"
    assert version_of(tmp_path) == installed


def test_a_source_distribution_holds_what_is_tracked(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    for name in tracked:
        copy = tmp_path / "tree" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path / "tree", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        held = {name.partition("/")[2] for name in files.getnames()}
    assert tracked - held == LEFT_OUT
