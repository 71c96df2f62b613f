"""Builds the two extension libraries of fxsparse on LibTorch's stable ABI.

`fxsparse/_C.abi3.so` (schemas, CPU kernels) needs g++ or clang++; `fxsparse/_C_cuda.abi3.so` (CUDA kernels) is built
too wherever nvcc is found, GPU or not. Neither needs Python, or a CUDA runtime library at run time, so one build serves
every Python, every torch from 2.11 on, and C++ programs. They are no modules to import: torch.ops.load_library and
dlopen load them. torch.utils.cpp_extension is not used: it refuses to compile CUDA sources when the installed torch is
CPU-only.

Environment: CXX, NVCC (compilers), FXSPARSE_CUDA_ARCHS (for example "80;90a"; sources
named *_sm90a.cu use instructions of that target and are always built for it alone), FXSPARSE_WITHOUT_CUDA=1,
FXSPARSE_CXXFLAGS (extra flags, for example "-fsanitize=address -g").
"""

from __future__ import annotations

import concurrent.futures
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "fxsparse" / "csrc"
TORCH_TARGET_2_11 = "0x020b000000000000ULL"
# The kernels are one source compiled once per instruction set; the choice is made at run time, never by -march=native.
CPU_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
X86 = platform.machine() in ("x86_64", "AMD64")  # elsewhere those sources are empty
DEFAULT_CUDA_ARCHS = "80;90a;100"


def _torch_dir() -> Path:
    import torch

    return Path(torch.__file__).parent


def _cuda_home(nvcc: str) -> Path:
    """The toolkit's folder, as nvcc itself reports it (nvcc may be a link or a wrapper)."""
    dry_run = subprocess.run([nvcc, "-dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    return Path(found.group(1)) if found else Path(nvcc).resolve().parent.parent


class BuildLibraries(build_ext):
    """Compiles each library by plain compiler calls, one object per source, in parallel."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library by the stable ABI tag, whatever interpreter builds it."""
        return str(Path(*fullname.split("."))) + ".abi3.so"

    def build_extension(self, ext: Extension) -> None:
        """Build one library from its sources."""
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp) / ext.name
        objects.mkdir(parents=True, exist_ok=True)
        torch = _torch_dir()
        include = [f"-I{torch / 'include'}", f"-I{CSRC}"]
        common = [
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_2_11}",
            "-std=c++20",
            "-O3",
            *include,
            *shlex.split(os.environ.get("FXSPARSE_CXXFLAGS", "")),
        ]
        torch_libs = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        cxx = os.environ.get("CXX", "g++")
        commands, produced = [], []
        for source in ext.sources:
            obj = objects / (Path(source).stem + ".o")
            produced.append(str(obj))
            if source.endswith(".cu"):
                commands.append([*_nvcc_command(source), *common, "-c", source, "-o", str(obj)])
            else:
                isa = Path(source).stem.rsplit("_", 1)[-1]
                flags = ["-fPIC", "-fvisibility=hidden", "-Wall", *(CPU_FLAGS.get(isa, []) if X86 else [])]
                commands.append([cxx, *common, *flags, "-c", source, "-o", str(obj)])
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._run, commands))
        # Linked beside and moved into place: overwriting a library that a process has loaded would crash it.
        fresh = out.with_suffix(".new")
        link = [cxx, "-shared", *produced, "-o", str(fresh), *torch_libs]
        link += shlex.split(os.environ.get("FXSPARSE_CXXFLAGS", ""))
        if ext.name.endswith("_cuda"):
            lib64 = _cuda_home(_find_nvcc() or "nvcc") / "lib64"
            link += ["-Wl,--as-needed", f"-L{lib64}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        self._run(link)
        # An exception that leaves a library with a C++ runtime of its own ends the process, and reaches nobody.
        if platform.system() == "Linux" and b"libstdc++.so" not in fresh.read_bytes():
            fresh.unlink()
            raise SystemExit(
                f"{cxx} links another C++ runtime than torch's libstdc++.so into {out.name}, or links it statically: "
                "an operator that refuses its arguments would end the process. "
                "Set CXX to a compiler that links libstdc++.so."
            )
        fresh.replace(out)

    def _run(self, command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)


def _nvcc_command(source: str) -> list[str]:
    if own := re.search(r"_sm(\d+a)\.cu$", source):
        gencode = [f"-gencode=arch=compute_{own[1]},code=sm_{own[1]}"]
    else:
        archs = os.environ.get("FXSPARSE_CUDA_ARCHS", DEFAULT_CUDA_ARCHS).split(";")
        if Path(source).name.startswith("bind_"):  # without device code: one pass over torch's headers is enough
            archs = archs[:1]
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        newest = max(archs, key=lambda a: int(re.sub(r"\D", "", a)))
        ptx = re.sub(r"\D", "", newest)
        gencode.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    # The define makes torch's stable headers declare their CUDA side.
    return [_find_nvcc() or "nvcc", "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode]


def _find_nvcc() -> str | None:
    if os.environ.get("FXSPARSE_WITHOUT_CUDA") == "1":
        return None
    return os.environ.get("NVCC") or shutil.which("nvcc")


def _extensions() -> list[Extension]:
    relative = [str(p.relative_to(ROOT)) for p in sorted((CSRC / "cpu").glob("*.cpp"))]
    libraries = [
        Extension(
            "fxsparse._C",
            ["fxsparse/csrc/bind_cpu.cpp", "fxsparse/csrc/bind_region.cpp", *relative],
            py_limited_api=True,
        )
    ]
    if _find_nvcc():
        kernels = [str(p.relative_to(ROOT)) for p in sorted((CSRC / "cuda").glob("*.cu"))]
        bindings = [f"fxsparse/csrc/{name}.cu" for name in ("bind_cuda", "bind_cuda_region", "bind_tiled")]
        cuda = [*bindings, *kernels]
        libraries.append(Extension("fxsparse._C_cuda", cuda, py_limited_api=True))
    return libraries


setup(
    ext_modules=_extensions(),
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # one wheel for every Python
)
