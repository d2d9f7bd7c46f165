"""Builds `metaaug_fast._C`; everything else about the project is in pyproject.toml."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup


def find_cuda() -> None:
    """Set CUDA_HOME where `nvcc` is a script that starts one from elsewhere: torch would take the script's folder."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys():
        return
    if (Path(nvcc).resolve().parents[1] / "include" / "cuda_runtime.h").exists():
        return
    steps = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    for line in (steps.stdout + steps.stderr).splitlines():
        if line.startswith("#$ TOP="):
            os.environ["CUDA_HOME"] = str(Path(line.removeprefix("#$ TOP=")).resolve())


find_cuda()
try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ModuleNotFoundError:
    sys.exit("metaaug_fast is built against the torch you run: install it, then pip install --no-build-isolation .")

ROOT = Path(__file__).parent


def missing_for_cuda() -> str:
    """What the CUDA engine needs and does not find, or nothing. Whether there is a GPU makes no difference."""
    if torch.version.cuda is None:
        return f"a CUDA build of torch (got torch {torch.__version__})"
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not nvcc.exists() or not (Path(CUDA_HOME) / "include" / "cuda_runtime.h").exists():
        return f"nvcc and its headers: put it on PATH or set CUDA_HOME (got {CUDA_HOME})"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.\d+", told)  # where it does not say, torch takes any
    wanted = torch.version.cuda.split(".")[0]
    if release and release[1] != wanted:
        return (
            f"nvcc of CUDA {wanted}, which torch {torch.__version__} was built with (got {release[0]} in {CUDA_HOME}): "
            f"set CUDA_HOME to such a one, or install a torch built with CUDA {release[1]}"
        )
    return ""


def why_no_cuda() -> str:
    """What the CUDA engine would need, or nothing where it is built: as METAAUG_CUDA says, else where it can be."""
    asked = os.environ.get("METAAUG_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"METAAUG_CUDA must be 0 or 1 (got {asked!r})")
    if asked == "0":
        return "METAAUG_CUDA to be 1 or unset (got 0)"
    missing = missing_for_cuda()
    if missing and asked == "1":
        sys.exit(f"METAAUG_CUDA=1 needs {missing}")
    if missing and torch.version.cuda is not None:
        print(f"metaaug_fast is built without its CUDA engine, which needs {missing}")
    return missing


def extension() -> Extension:
    """The extension's sources and flags; DEBUG=1 builds it with checks and symbols."""
    debug = os.environ.get("DEBUG", "0") not in ("", "0")
    missing = why_no_cuda()
    suffixes = (".cpp",) if missing else (".cpp", ".cu")
    files = sorted((ROOT / "csrc").rglob("*.*"))
    sources = [str(path.relative_to(ROOT)) for path in files if path.suffix in suffixes]
    headers = [str(path.relative_to(ROOT)) for path in files if path.suffix == ".h"]
    flags = ["-O0", "-g"] if debug else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-g0"]
    flags += ["-Wall", "-fvisibility=hidden"]
    if missing:
        return CppExtension(
            "metaaug_fast._C",
            sources,
            depends=headers,
            define_macros=[("METAAUG_WHY_NO_CUDA", json.dumps(missing))],
            extra_compile_args=flags,
        )
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # torch would choose by the GPU that is there
    return CUDAExtension(
        "metaaug_fast._C",
        sources,
        depends=headers,
        define_macros=[("METAAUG_CUDA", "1")],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "--threads", "2", *(["-G"] if debug else ["-lineinfo"])]},
    )


def check_compiler() -> None:
    """Exit with one sentence where there is no C++ compiler."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler) and not shutil.which("g++") and not shutil.which("cl"):
        sys.exit(f"metaaug_fast needs a C++17 compiler: {compiler!r} was not found (install g++ or clang, or set CXX)")


if __name__ == "__main__":
    if any(command.startswith(("build", "bdist", "develop", "install", "editable")) for command in sys.argv[1:]):
        check_compiler()
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
