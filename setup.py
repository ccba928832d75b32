# SPDX-License-Identifier: Apache-2.0
"""Build faceedit: ordinary package discovery, and the native kernels through CMakeLists.txt.

A build that cannot compile still installs: the package then runs on eager PyTorch and Triton, and `build_info.json`
beside the module keeps the reason for `faceedit doctor`. Environment:

FACEEDIT_NATIVE  auto (default) | off | require   `require` turns a failed native build into an error, for CI
FACEEDIT_CUDA    auto (default) | off | require   the same for the CUDA kernels
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULE = "faceedit.kernels._C"


def check_links(root: Path) -> None:
    """Refuse a tree without its symbolic links: the packages behind them would be left out in silence."""
    for name in ("kernels", "training"):
        if not (root / "faceedit" / name / "__init__.py").is_file():
            raise SystemExit(
                f"setup.py: faceedit/{name} must be a link to ../{name} or a folder of modules, got neither; "
                "check out again with `git clone -c core.symlinks=true`"
            )


check_links(ROOT)


class BuildFailedError(Exception):
    """One line that says why the native module could not be built."""


def setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "off", "require"):
        raise SystemExit(f"setup.py: {name} must be auto, off or require, got {value!r}")
    return value


# "error:", nvcc's "error #20011-D:", "fatal error C1083:"; not the -Werror of a command line that ninja shows.
ERROR = re.compile(r"\b(?:fatal )?error\b\s*(?:[A-Z]+\d+\s*)?[:#(]|CMake Error", re.IGNORECASE)


def failure(output: str) -> str:
    """Return the line of a failed command's output that says why."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reason = next((line for line in lines if ERROR.search(line)), lines[-1] if lines else "no output")
    if reason.startswith("CMake Error") and reason.endswith(":"):
        # CMake prints "CMake Error at file:line (call):", the message on the lines below, and then who called.
        start = lines.index(reason) + 1
        message = list(takewhile(lambda line: not line.startswith("Call Stack"), lines[start : start + 3]))
        reason = " ".join(message) or reason
    return reason


def run(command: list[str]) -> str:
    """Run a build command; a failure becomes one line, with the whole output on stderr."""
    try:
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildFailedError(f"{command[0]} could not be started: {error.strerror}") from error
    if done.returncode:
        sys.stderr.write(done.stdout)
        raise BuildFailedError(f"{Path(command[0]).name} exited with {done.returncode}: {failure(done.stdout)}")
    return done.stdout


PTXAS_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for '(?P<architecture>sm_\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def cuda_resources(output: str) -> list[dict[str, str | int]]:
    """Read what each CUDA kernel uses on each architecture from the compiler's own report."""
    rows = [match.groupdict() for match in PTXAS_ENTRY.finditer(output)]
    return [{key: int(value) if value.isdigit() else value for key, value in row.items()} for row in rows]


# How nvcc marks what is private to a file: hashes that change with the file, around its name.
PRIVATE = re.compile(r"\d+_(?:GLOBAL__N|INTERNAL)__[0-9a-f]+_\d+_(?P<file>\w+?_cu)_[0-9a-f]{8}")


def keep_resources(record: Path, rows: list[dict[str, str | int]]) -> list[dict[str, str | int]]:
    """Join a build's rows with those of files that an earlier build compiled and this one did not."""

    def source(row: dict[str, str | int]) -> str:
        found = PRIVATE.search(str(row["kernel"]))
        return found["file"] if found else str(row["kernel"])

    known = json.loads(record.read_text()) if record.exists() else []
    compiled = {source(row) for row in rows}
    joined = [row for row in known if source(row) not in compiled] + rows
    record.write_text(json.dumps(joined))
    return joined


def found_cuda(build: Path) -> bool:
    """Whether CMake found a CUDA compiler for this build directory."""
    lines = (build / "CMakeCache.txt").read_text().splitlines()
    return any(line.startswith("CMAKE_CUDA_COMPILER:") and not line.endswith("NOTFOUND") for line in lines)


def why_no_cuda() -> str:
    """Say why CMake found no CUDA compiler: there is none, or nvcc could not compile CMake's own test."""
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if not nvcc:
        return "no CUDA compiler (nvcc) was found"
    return f"{nvcc} is there but cannot compile; set CUDAHOSTCXX to a host compiler that it takes, and install again"


def toolchain(with_cuda: bool) -> str:
    """Return a key of what compiles: the compilers' own descriptions, and the flags they take from the environment."""
    variables = ("CXX", "CXXFLAGS", "CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    parts = [sys.version, str(with_cuda)] + [os.environ.get(name, "") for name in (*variables, "LDFLAGS")]
    for variable, usual in (("CXX", "c++"), ("CUDACXX", "nvcc")):
        command = shlex.split(os.environ.get(variable, usual)) or [usual]  # "ccache g++" is two words
        path = shutil.which(command[0])
        version = [str(path), *command[1:], "--version"]
        done = subprocess.run(version, capture_output=True, text=True, check=False) if path else None
        parts += [str(path), done.stdout if done else ""]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


class CMakeBuild(build_ext):
    """Build the one extension with CMake, and record what was built."""

    def build_extension(self, ext: Extension) -> None:
        info: dict[str, object] = {"native": False, "cuda": False, "reason": "", "cuda_reason": ""}
        try:
            self.build_native(Path(self.get_ext_fullpath(ext.name)).resolve(), info)
        except BuildFailedError as error:
            info["reason"] = str(error)
            # A module left by an earlier build would be packaged as if it were this one's.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            if setting("FACEEDIT_NATIVE") == "require":
                raise SystemExit(f"setup.py: the native kernels could not be built: {error}") from error
            self.warn(f"native kernels left out: {error}")
        if not info["native"]:
            info["cuda_reason"] = info["cuda_reason"] or "the native module was not built"
        if setting("FACEEDIT_CUDA") == "require" and not info["cuda"]:
            raise SystemExit(f"setup.py: the CUDA kernels could not be built: {info['cuda_reason']}")
        self.record = Path(self.get_ext_fullpath(ext.name)).with_name("build_info.json")
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps(info, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds: the record goes where the module goes, and no older module stays with it."""
        package = Path(self.get_finalized_command("build_py").get_package_dir("faceedit.kernels"))
        if not json.loads(self.record.read_text())["native"]:
            (package / Path(self.get_ext_filename(MODULE)).name).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copy2(self.record, package / "build_info.json")

    def build_native(self, module: Path, info: dict[str, object]) -> None:
        if setting("FACEEDIT_NATIVE") == "off":
            raise BuildFailedError("FACEEDIT_NATIVE=off")
        try:
            import pybind11
        except ImportError as error:
            raise BuildFailedError("pybind11 is not installed in the build environment") from error
        cmake = shutil.which("cmake")
        if not cmake:
            raise BuildFailedError("cmake was not found")
        with_cuda = setting("FACEEDIT_CUDA") != "off"
        # A directory for each toolchain: the next build compiles what changed, never with another compiler's objects.
        build = Path(self.build_temp).resolve() / f"cmake-{toolchain(with_cuda)}"
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'out'}",
        ]
        if ninja := shutil.which("ninja"):
            # Build environments come and go: name today's ninja, not the one an earlier build remembers.
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if (build / "CMakeCache.txt").exists() and not found_cuda(build):
            configure += ["-U", "CMAKE_CUDA_COMPILER"]  # one that could not be used then may be usable now
        compile_command = [cmake, "--build", str(build), "--parallel", str(min(os.cpu_count() or 1, 8))]
        if not with_cuda:
            info["cuda_reason"] = "FACEEDIT_CUDA=off"
        try:
            run([*configure, f"-DFACEEDIT_CUDA={'ON' if with_cuda else 'OFF'}"])
            rows = cuda_resources(run(compile_command))
            info["cuda_resources"] = keep_resources(build / "cuda_resources.json", rows)
            info["cuda"] = with_cuda and found_cuda(build)
            if with_cuda and not info["cuda"]:
                info["cuda_reason"] = why_no_cuda()
        except BuildFailedError as error:
            if not with_cuda:
                raise
            # nvcc may be there and unusable (a host compiler it refuses, say): the CPU kernels need none of it.
            info["cuda_reason"] = str(error)
            shutil.rmtree(build, ignore_errors=True)
            run([*configure, "-DFACEEDIT_CUDA=OFF"])
            run(compile_command)
        built = next((build / "out").glob("_C*.so"), None) or next((build / "out").glob("_C*.pyd"), None)
        if built is None:
            raise BuildFailedError("the build left no module")
        module.parent.mkdir(parents=True, exist_ok=True)
        # A running process may have the old module mapped: replace it, never write into it.
        fresh = module.with_name(module.name + ".new")
        shutil.copy2(built, fresh)
        os.replace(fresh, module)
        info["native"] = True


setup(ext_modules=[Extension(MODULE, sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
