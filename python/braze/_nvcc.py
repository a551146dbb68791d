"""Finds nvcc and the architectures to compile for. Used by CMake (as a script) and by ``braze.build``.

Standard library only: it runs before torch is imported, and where torch cannot be.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

OLDEST = (12, 8)
# Machine code for each generation, and PTX of the oldest, which the driver can compile for any GPU
# not listed. PTX of the newest would serve only GPUs that are newer still.
ARCHITECTURES = ("8.0+PTX", "9.0", "10.0", "12.0")
EXPLICIT = ("CUDACXX", "CUDA_HOME", "CUDA_PATH")


class ToolkitError(RuntimeError):
    """Nothing can be compiled, or it did not compile; the text says why and how to mend it."""


@dataclass(frozen=True)
class Toolkit:
    """One installed CUDA toolkit: its compiler, its root and its release, such as ``13.0``."""

    nvcc: Path
    root: Path
    release: str

    @property
    def cudart_static(self) -> Path:
        """The runtime library that goes into what is linked. Raises :class:`ToolkitError`."""
        for folder in ("lib64", "lib"):
            if (file := self.root / folder / "libcudart_static.a").exists():
                return file
        raise ToolkitError(
            f"libcudart_static.a, the CUDA runtime, is not in {self.root}. Install it: "
            f"pip install 'nvidia-cuda-runtime=={self.release}.*'"
        )


def probe(nvcc: Path) -> Toolkit | None:
    """Asks a compiler where it really lives: an ``nvcc`` on PATH is often a script elsewhere."""
    try:
        dry = [str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        where = subprocess.run(dry, capture_output=True, text=True, timeout=60)
        about = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    here = re.search(r"^#\$ _HERE_=(.+)$", where.stderr, re.MULTILINE)
    release = re.search(r"release (\d+\.\d+)", about.stdout)
    if not here or not release:
        return None
    folder = Path(here[1].strip())
    return Toolkit(folder / "nvcc", folder.parent, release[1])


def _found(torch_cuda: str) -> Iterator[Path]:
    major = torch_cuda.split(".")[0] or "*"
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    for pattern in (
        "/usr/local/cuda",
        f"/usr/local/cuda-{torch_cuda}",
        f"/usr/local/cuda-{major}*",
    ):
        yield from (Path(p, "bin/nvcc") for p in sorted(glob.glob(pattern), reverse=True))
    for packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        yield from (Path(p) for p in sorted(glob.glob(f"{packages}/nvidia/cu{major}/bin/nvcc")))


def _named(environ: Mapping[str, str]) -> Toolkit | None:
    for name in EXPLICIT:
        if value := environ.get(name):
            nvcc = Path(value) if name == "CUDACXX" else Path(value, "bin/nvcc")
            if toolkit := probe(Path(shutil.which(nvcc) or nvcc)):
                return toolkit
            raise ToolkitError(
                f"{name}={value} does not lead to a working CUDA compiler ({nvcc} does not run). "
                f"Correct it, or unset it to have the toolkit looked for."
            )
    return None


def find(torch_cuda: str, environ: Mapping[str, str] = os.environ) -> Toolkit:
    """The toolkit to compile with, of the same CUDA major as torch (any, if ``torch_cuda`` is "").

    CUDACXX, CUDA_HOME and CUDA_PATH are obeyed in this order; without them PATH, /usr/local/cuda*
    and pip's nvidia-cuda-nvcc are searched. Raises :class:`ToolkitError`.
    """

    def fits(toolkit: Toolkit) -> bool:
        same = not torch_cuda or toolkit.release.split(".")[0] == torch_cuda.split(".")[0]
        return same and tuple(map(int, toolkit.release.split("."))) >= OLDEST

    wanted = f"{torch_cuda.split('.')[0]}.x" if torch_cuda else f"{OLDEST[0]}.{OLDEST[1]} or newer"
    rejected = _named(environ)
    if rejected and fits(rejected):
        return rejected
    if rejected is None:
        for nvcc in _found(torch_cuda):
            if nvcc.exists() and (toolkit := probe(nvcc)):
                if fits(toolkit):
                    return toolkit
                rejected = rejected or toolkit
    torch_is = f"torch was built for CUDA {torch_cuda}" if torch_cuda else "braze"
    if rejected:
        raise ToolkitError(
            f"the CUDA toolkit found is {rejected.release} ({rejected.nvcc}), but {torch_is} and needs a "
            f"compiler of CUDA {wanted} (at least {OLDEST[0]}.{OLDEST[1]}). Install that toolkit and "
            f"point CUDA_HOME to it."
        )
    raise ToolkitError(
        f"nvcc, the CUDA compiler, was not found, and {torch_is} and needs it. Install the CUDA toolkit "
        f"{wanted} and point CUDA_HOME to it (the folder that holds bin/nvcc)"
        f"{_pip_advice(torch_cuda)}"
    )


def _pip_advice(torch_cuda: str) -> str:
    """The way without a system-wide toolkit. nvcc itself is on PyPI from CUDA 13 on."""
    if torch_cuda and int(torch_cuda.split(".")[0]) < 13:
        return ""
    parts = ("nvcc", "crt", "cccl", "runtime")
    release = torch_cuda or "13.0"
    packages = [f"'nvidia-cuda-{part}=={release}.*'" for part in parts]
    return (
        ", or install it into this environment: "
        f"pip install {' '.join(packages)} 'nvidia-nvvm=={release}.*'"
    )


def listed(environ: Mapping[str, str] = os.environ) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or the default. No GPU is asked: the machine that compiles often has none."""
    return re.findall(r"[^;,\s]+", environ.get("TORCH_CUDA_ARCH_LIST", "")) or list(ARCHITECTURES)


def architectures(environ: Mapping[str, str] = os.environ) -> list[str]:
    """:func:`listed` in CMake's notation: 9.0 10.0+PTX is 90-real, 100. Raises :class:`ToolkitError`."""
    result = []
    for item in listed(environ):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if not match:
            raise ToolkitError(
                f"TORCH_CUDA_ARCH_LIST has '{item}', which is no compute capability. Write for "
                f'instance TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0+PTX", or unset it.'
            )
        result.append(match[1] + match[2] + ("" if match[3] else "-real"))
    return result


def main(torch_cuda: str) -> int:
    """For CMake: prints nvcc; root; release; static runtime; architectures. On failure, why, and returns 1."""
    try:
        toolkit = find(torch_cuda)
        facts = [
            toolkit.nvcc,
            toolkit.root,
            toolkit.release,
            toolkit.cudart_static,
            *architectures(),
        ]
    except ToolkitError as error:
        print(error, end="")
        return 1
    print(*facts, sep=";", end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
