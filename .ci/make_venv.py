"""Make a virtual environment that sees the torch of this interpreter, or has a torch of its own.

Usage: python .ci/make_venv.py FOLDER TORCH_REQUIREMENT
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"fpi_cuda: Python >= 3.10 is needed, got {sys.version.split()[0]}: make PYTHON=...")


def usable_torch():
    try:
        import torch
    except Exception:
        return False
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


folder, requirement = Path(sys.argv[1]), sys.argv[2]
borrow = usable_torch()
inside = sys.prefix != sys.base_prefix
# system_site_packages means those of the base interpreter, not of the environment we run in: only
# where that one sees them too, or a pytest plugin that lies there comes along.
settings = Path(sys.prefix, "pyvenv.cfg").read_text() if inside else ""
system = borrow and (not inside or "include-system-site-packages = true" in settings)
venv.create(folder, system_site_packages=system, with_pip=True, clear=True)
python = folder / "bin" / "python"
if borrow and inside:
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.check_output([python, "-c", query], text=True).strip()
    parent = sysconfig.get_path("purelib")
    Path(site, "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
wanted = ["setuptools>=77", "pybind11>=3", "ninja"] + ([] if borrow else [requirement])
sys.exit(subprocess.call([python, "-m", "pip", "install", *wanted]))
