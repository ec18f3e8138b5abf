"""Builds the native backend: the CPU part where there is a compiler, the CUDA part too with TRAPO_CUDA=1 and nvcc.

    pip install .                               CPU part, in seconds
    TRAPO_CUDA=1 pip install .                  CUDA part too, for sm_80 to sm_89, sm_90a, sm_100 and later
    TRAPO_CUDA=1 TRAPO_CUDA_ARCHS="90a 120" pip install .     for the architectures named
    TRAPO_SANITIZE=1 pip install .              with the address and undefined-behaviour sanitizers
    TRAPO_NATIVE=0 pip install .                no native backend
    TRAPO_WERROR=1 pip install .                warnings are errors, as in the Makefile; off for compilers that nobody has tried

`pip install -e .` takes the same. Without a compiler, or without torch in the environment that installs, the package installs and
works without the native backend; `python -m trapo_kernels.doctor` then gives the reason, which is left in
trapo_kernels/_native_build.txt. The sources and the classes here are named in pyproject.toml.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

CUDA_SOURCES = [str(path) for path in sorted(Path("csrc/cuda").glob("*.cu"))]
OLDEST_TORCH = "0x020b000000000000"  # 2.11: the stable ABI of that version is all that the sources use
CUDA_ARCHS = "80 90a 100+PTX"  # +PTX: for later ones too, whose driver compiles it when it is first used
REASON_FILE = "_native_build.txt"
_STRICT = ["-Werror"] if os.environ.get("TRAPO_WERROR") == "1" else []


def torch_directory() -> Path:
    """Where torch is installed; pip builds in an environment of its own, so it cannot simply be imported."""
    places = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages()]
    places = [Path(place) for place in places if place]
    for place in places:
        if (place / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
            return place / "torch"
    raise RuntimeError("torch ≥ 2.11 was not installed when trapo was. Install torch first, then trapo again.")


class BuildNative(build_ext):
    """Compiles the one extension, or says why it is not there."""

    in_source = False  # whether the library is copied beside the sources once it is built

    def finalize_options(self) -> None:
        super().finalize_options()
        for ext in self.extensions:  # a source distribution holds them, and a change of one of them builds anew
            ext.depends = [str(file) for file in sorted(Path("csrc").rglob("*")) if file.is_file() and file.suffix != ".pyc"]

    def run(self) -> None:
        self.in_source = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        built = Path(self.get_ext_fullpath(ext.name))
        installed = Path(*ext.name.split(".")[:-1]) / built.name if self.in_source else built
        reason_file = installed.with_name(REASON_FILE)
        reason_file.parent.mkdir(parents=True, exist_ok=True)
        reason_file.unlink(missing_ok=True)
        try:
            self._compile(ext)
        except Exception as error:  # whatever it was, the package works without the native backend and tells the reason
            told = isinstance(error, RuntimeError)  # by this file, in a sentence
            reason = error if told else f"the compiler failed ({type(error).__name__}); `pip install -v .` shows how."
            reason_file.write_text(f"{reason}\n", encoding="utf-8")
            if os.environ.get("TRAPO_CUDA") == "1" or os.environ.get("TRAPO_SANITIZE") == "1":
                raise RuntimeError(f"trapo: the native backend was asked for by name: {error}") from error  # not optional then
            for library in (built, installed):  # an older one would not be of these sources
                library.unlink(missing_ok=True)
            print(f"trapo: no native backend: {error}", file=sys.stderr)

    def _compile(self, ext: Extension) -> None:
        if os.environ.get("TRAPO_NATIVE") == "0":
            raise RuntimeError("it was switched off by TRAPO_NATIVE=0 when trapo was installed.")
        compiler = self.compiler.compiler_so_cxx[0]
        if shutil.which(compiler) is None:
            raise RuntimeError(f"no C++ compiler ({compiler}) was found when trapo was installed. Install one, then trapo again.")
        torch = torch_directory()
        macros = [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]
        ext.extra_compile_args = ["-std=c++20", "-O3", "-g0", "-Wall", "-Wextra", "-Wno-psabi", *_STRICT, *macros]
        ext.extra_compile_args += ["-fno-fast-math"]  # whatever CXXFLAGS say: exp rounds by adding and subtracting
        ext.extra_compile_args += ["-isystem", str(torch / "include")]
        ext.library_dirs, ext.libraries = [str(torch / "lib")], ["torch_cpu", "torch", "c10"]
        if os.environ.get("TRAPO_SANITIZE") == "1":
            flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
            ext.extra_compile_args += flags
            ext.extra_link_args = flags
        if os.environ.get("TRAPO_CUDA") == "1":
            ext.extra_objects = self._cuda_objects(torch, macros)
            self.force = True  # or a library that is newer than the sources would not be linked with them
            ext.libraries += ["torch_cuda", "c10_cuda"]  # which bring the libcudart of this torch, wherever nvcc keeps its own
        super().build_extension(ext)

    def _cuda_objects(self, torch: Path, macros: list[str]) -> list[str]:
        if not (torch / "lib" / "libtorch_cuda.so").exists():
            raise RuntimeError(
                f"TRAPO_CUDA=1 needs a torch that was built for CUDA; that in {torch} has no libtorch_cuda.so. "
                "Install one, then trapo again."
            )
        archs = (os.environ.get("TRAPO_CUDA_ARCHS") or CUDA_ARCHS).split()
        targets = [gencode(arch) for arch in archs]
        changed = max(file.stat().st_mtime for file in Path("csrc").rglob("*") if file.is_file())
        command = [nvcc(), "-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC", *targets, *macros, "-DUSE_CUDA"]
        command += [f"-DTRAPO_CUDA_ARCHS={'_'.join(archs)}"]
        command += ["-isystem", str(torch / "include"), *(["-Werror", "all-warnings"] if _STRICT else [])]
        objects, running = [], []
        for source in CUDA_SOURCES:
            target = Path(self.build_temp) / Path(source).with_suffix(f".{'_'.join(archs)}.o").name
            target.parent.mkdir(parents=True, exist_ok=True)
            objects.append(str(target))
            if not target.exists() or target.stat().st_mtime <= changed:
                with target.with_suffix(".log").open("w") as log:
                    compiling = subprocess.Popen([*command, "-c", source, "-o", str(target)], stdout=log, stderr=log)
                running.append((source, target.with_suffix(".log"), compiling))  # all at once
        for source, log, process in running:
            failed, said = process.wait() != 0, log.read_text(errors="replace").strip()
            print(said, file=sys.stderr, end="\n" if said else "")
            if failed:
                lines = [line for line in said.splitlines() if "error" in line] or said.splitlines() or ["nothing was said."]
                raise RuntimeError(f"nvcc failed on {source}: {lines[0]}")
        return objects


class SourceDistribution(sdist):
    """Holds no tests: setuptools takes those named tests/test*.py by itself, without their helpers. A MANIFEST.in would say so in a
    line, and be one file more at the top level, which holds what a reader looks for."""

    def make_distribution(self) -> None:
        self.filelist.exclude_pattern(None, prefix="tests")
        super().make_distribution()


def gencode(arch: str) -> str:
    """nvcc's option for one entry of TRAPO_CUDA_ARCHS."""
    known = re.fullmatch(r"(\d{2,3}a?)(\+PTX)?", arch)
    if known is None:
        raise RuntimeError(
            f"TRAPO_CUDA_ARCHS must name architectures such as 80, 90a or 120+PTX, got {arch}. Separate them by spaces."
        )
    number, ptx = known.groups()
    if number == "90":
        raise RuntimeError("TRAPO_CUDA_ARCHS must name 90a, whose instructions the Hopper kernel needs, got 90. Write 90a.")
    if ptx and (number.endswith("a") or int(number) < 100):  # what is of 90a runs nowhere else; what is of 80 has no clusters
        raise RuntimeError(f"TRAPO_CUDA_ARCHS must have +PTX at 100 or later, without an a, got {arch}. Write {number}.")
    return f"-gencode=arch=compute_{number},code=" + (f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}")


def nvcc() -> str:
    """The CUDA compiler."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"))
    if found is None:
        raise RuntimeError("TRAPO_CUDA=1 needs nvcc, which was not found. Put it on PATH or set CUDA_HOME.")
    return found
