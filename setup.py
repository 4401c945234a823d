"""Build the two compiled files of the package.

libfpi_cuda.so holds the ops: C++ kernels for the CPU, and CUDA kernels where toolkit and torch
allow; free of Python and on torch's stable ABI, one file serves every version of both. _C holds the
classes of csrc/python, by pybind11, for the Python that builds it.

Environment:
    FPI_CUDA: 1 builds the CUDA kernels or fails, 0 leaves them out; unset, nvcc and the torch
        build decide. A visible GPU is never asked for.
    FPI_CUDA_ARCHS, else TORCH_CUDA_ARCH_LIST: such as "8.0 9.0+PTX", the default.
    CUDA_HOME, CXX, CXXFLAGS, MAX_JOBS: as usual.
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

MODULE_SOURCES = sorted(map(str, Path("csrc/python").glob("*.cpp")))
CPP_SOURCES = sorted({*map(str, Path("csrc").rglob("*.cpp"))} - {*MODULE_SOURCES})
CUDA_SOURCES = sorted(map(str, Path("csrc").rglob("*.cu")))
BUILD = Path("build", "native")
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# libtorch pulls in libtorch_cuda where there is one; the linker would drop it as unused.
LINK_FLAGS = ["--no-as-needed"] if sys.platform == "linux" else ["-undefined", "dynamic_lookup"]
LINK_FLAGS = ["-shared", *(arg for word in LINK_FLAGS for arg in ("-Xlinker", word))]


def find_torch():
    """Return the folder of an installed torch >= 2.10, and its version module as a dict.

    An isolated build cannot import the torch that it builds for, but it runs on the target's
    interpreter, so site-packages are searched by path. The library keeps to torch's stable ABI:
    the headers of any torch on the machine will do.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parents[1]] if spec and spec.origin else []
    hints = [sys.prefix, os.getenv("VIRTUAL_ENV"), os.getenv("CONDA_PREFIX"), sys.base_prefix]
    for base in filter(None, hints):
        for scheme in sysconfig.get_scheme_names():
            paths = sysconfig.get_paths(scheme, {"base": base, "platbase": base})
            folders += [Path(paths["purelib"]), Path(paths["platlib"])]
    found = []
    for file in dict.fromkeys(folder / "torch" / "version.py" for folder in folders):
        if file.exists():
            version = runpy.run_path(str(file))
            if tuple(map(int, re.findall(r"\d+", version["__version__"])[:2])) >= (2, 10):
                return file.parent, version
            found.append(version["__version__"])
    sys.exit(
        f"fpi_cuda: torch >= 2.10 is needed to build, found {', '.join(found) or 'none'}. First "
        'pip install "torch>=2.10" in the environment that you build for. If it is there already, '
        "an isolated build does not see it: add --no-build-isolation to pip install, or "
        "--no-isolation to python -m build."
    )


def plan_cuda(torch_version):
    """Return (nvcc, None), or (None, the reason why no CUDA kernels are built)."""
    home = os.getenv("CUDA_HOME") or os.getenv("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    choice = os.getenv("FPI_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"fpi_cuda: FPI_CUDA must be 0, 1 or unset, got {choice!r}")
    if choice == "0":
        return None, "FPI_CUDA=0 at install"
    reason = None
    if not CUDA_SOURCES:
        reason = "this version has no CUDA kernels"
    elif not nvcc:
        reason = "no nvcc at install"
    elif not torch_version.get("cuda") and choice != "1":
        reason = f"torch {torch_version['__version__']} at install was a build without CUDA"
    if reason and choice == "1":
        sys.exit(f"fpi_cuda: FPI_CUDA=1 asks for the CUDA kernels, but: {reason}")
    return (None, reason) if reason else (nvcc, None)


def newer_toolkit(nvcc, torch_version, archs):
    """Return a warning where nvcc is later than torch's CUDA in what a driver minds, else None.

    A driver that is new enough for this torch may refuse kernels of a later major version, and PTX
    of any later one.
    """
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    cuda = torch_version.get("cuda")
    if not release or not cuda:
        return None
    minded = 2 if "+PTX" in archs else 1
    ours, theirs = ([*map(int, v.split(".")[:minded])] for v in (release[1], cuda))
    if ours <= theirs:
        return None
    return (
        f"fpi_cuda: warning: nvcc is of CUDA {release[1]}, torch {torch_version['__version__']} of "
        f"CUDA {cuda}: a driver that serves this torch may be too old for the CUDA backend. Have a "
        f"driver for CUDA {release[1]}, or set CUDA_HOME to a toolkit of CUDA {cuda}."
    )


def arch_flags(archs):
    """Turn "8.0 9.0+PTX" into nvcc's options."""
    for arch in re.split(r"[;,\s]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not match:
            sys.exit(f'fpi_cuda: CUDA architectures are written "8.0 9.0+PTX", got {archs!r}')
        number = match[1] + match[2]
        yield f"-gencode=arch=compute_{number},code=sm_{number}"
        if match[3]:
            yield f"-gencode=arch=compute_{number},code=compute_{number}"


def compiler():
    """Return the start of a C++ compiler's command."""
    cxx = shlex.split(os.getenv("CXX", "c++"))
    if not shutil.which(cxx[0]):
        sys.exit(f"fpi_cuda: a C++17 compiler is needed, but there is no {cxx[0]}. Set CXX.")
    return cxx


def module_command(torch, output):
    """Return the command that makes fpi_cuda._C for this Python."""
    try:
        headers = importlib.import_module("pybind11").get_include()
    except ImportError:
        headers = str(torch / "include")
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").exists():
        sys.exit(f"fpi_cuda: Python's headers are needed, but there is no {python}/Python.h.")
    command = [*compiler(), "-std=c++17", "-O3", "-Icsrc", *HOST_FLAGS, *LINK_FLAGS]
    command += ["-isystem", headers, "-isystem", python, *shlex.split(os.getenv("CXXFLAGS", ""))]
    return [*command, *MODULE_SOURCES, "-o", output, "-ldl"]


def build_module():
    """Make fpi_cuda._C in place, beside a library that was built elsewhere."""
    output = f"fpi_cuda/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if subprocess.call(module_command(find_torch()[0], output)):
        sys.exit("fpi_cuda: the build failed, see the compiler's message above")


def library_commands(torch, version, output):
    """Return the commands that make the op library, as run_ninja takes them."""
    nvcc, no_cuda = plan_cuda(version)
    archs = os.getenv("FPI_CUDA_ARCHS") or os.getenv("TORCH_CUDA_ARCH_LIST") or "8.0 9.0+PTX"
    cuda = f"CUDA backend for {archs}" if nvcc else f"no CUDA backend ({no_cuda})"
    print(f"fpi_cuda: native CPU backend, {cuda}; torch {version['__version__']}", flush=True)
    warning = newer_toolkit(nvcc, version, archs) if nvcc else None
    if warning:
        print(warning, flush=True)
    cxx = compiler()
    define = f'-DFPI_CUDA_ARCHS="{archs}"' if nvcc else f'-DFPI_NO_CUDA="{no_cuda}"'
    common = ["-std=c++17", "-O3", "-Icsrc"]
    # Nobody reads errno or the exception flags, and loops with either are not vectorised.
    host = [*HOST_FLAGS, "-fno-math-errno", "-fno-trapping-math", define]
    host += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-isystem", str(torch / "include")]
    compilers = {".cpp": [*cxx, *common, *host, *shlex.split(os.getenv("CXXFLAGS", ""))]}
    linker = [nvcc, "-ccbin", cxx[-1]] if nvcc else cxx
    quiet = "-Xcompiler=-fPIC,-fvisibility=hidden"
    compilers[".cu"] = [*linker, *common, quiet, *arch_flags(archs)]
    commands = {}
    for source in CPP_SOURCES + (CUDA_SOURCES if nvcc else []):
        file = str(BUILD / (source.replace(os.sep, "_") + ".o"))
        command = [*compilers[Path(source).suffix], "-MMD", "-MF", f"{file}.d"]
        commands[file] = ([source], [*command, "-c", source, "-o", file])
    line = [*linker, *LINK_FLAGS, *commands, "-o", output, f"-L{torch / 'lib'}"]
    return {**commands, output: (list(commands), [*line, "-ltorch", "-ltorch_cpu"])}


def run_ninja(commands):
    """Run what has to be, of commands given as {output: (inputs, command)}."""
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    ninja = shutil.which("ninja", path=scripts)
    if not ninja:
        sys.exit("fpi_cuda: ninja is needed to build. First pip install ninja.")
    lines = [f"builddir = {BUILD}", "rule run", " command = $line", " description = $out"]
    for output, (inputs, command) in commands.items():
        lines += [f"build {output}: run {' '.join(inputs)}"]
        lines += [" line = " + shlex.join(command).replace("$", "$$")]
        lines += [" depfile = $out.d", " deps = gcc"] if "-MMD" in command else []
    BUILD.mkdir(parents=True, exist_ok=True)
    Path(BUILD, "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.getenv("MAX_JOBS") else []
    if subprocess.call([ninja, *jobs, "-f", str(BUILD / "build.ninja")]):
        sys.exit("fpi_cuda: the build failed, see the compiler's message above")


class BuildNative(build_ext):
    """Compile csrc with the C++ compiler and nvcc; setuptools only puts the results in place."""

    def get_ext_filename(self, fullname):
        # Loaded by torch.ops.load_library, never imported: no Python version in the name.
        name = super().get_ext_filename(fullname)
        return name if fullname.endswith("_C") else str(Path(name).parent / "libfpi_cuda.so")

    def build_extensions(self):
        torch, version = find_torch()
        targets = [Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions]
        library, module = (str(BUILD / target.name) for target in targets)
        read = [str(f) for f in Path("csrc").rglob("*.h")] + MODULE_SOURCES
        commands = library_commands(torch, version, library)
        run_ninja({**commands, module: (read, module_command(torch, module))})
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(BUILD / target.name), str(target))


class CheckedDistInfo(dist_info):
    """Fail before pip downloads the dependencies of a build that cannot succeed."""

    def run(self):
        find_torch()
        super().run()


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension("fpi_cuda.libfpi_cuda", CPP_SOURCES),
            Extension("fpi_cuda._C", MODULE_SOURCES),
        ],
        cmdclass={"build_ext": BuildNative, "dist_info": CheckedDistInfo},
    )
