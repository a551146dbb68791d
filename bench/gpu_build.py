"""Compiles braze for the GPU of this machine alone, with CMake, into build/gpu/site.

The built modules are also packed into build/gpu/site.tar.gz and, if OUT names a folder, copied there: on
another machine with the same torch, Python and GPU they are unpacked and not built again.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch

from . import clock, rows
from .files import collect_folder, write_text
from .rows import Row, Work
from .sources import BUILT, digest, find_root

# Bits do not depend on the CPU's instruction set, and compiling for one takes a quarter of the time.
CPU_OPTIONS = ("-DBRAZE_CPU_SETS=baseline",)
ARCHIVE = "site.tar.gz"
KEY = "built-from"


def key(root: Path, architecture: str) -> str:
    """What a built module can be used for: these sources, this torch, this Python, this GPU."""
    parts = (digest(root, BUILT), torch.__version__, platform.python_version(), architecture)
    return " ".join(parts)


def _is_of(site: Path, wanted: str) -> bool:
    path = site / "braze" / KEY
    return path.is_file() and path.read_text() == wanted


def unpack(out: Path, wanted: str) -> bool:
    """Whether the archive of an earlier run was of the same sources; it is in place then."""
    archive, site = out / ARCHIVE, out / "site"
    if not archive.is_file():
        return False
    shutil.rmtree(site, ignore_errors=True)
    try:
        with tarfile.open(archive) as packed:
            packed.extractall(site, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        print(f"{archive} is of no use: {error}")
    return _is_of(site, wanted)


def pack(out: Path) -> None:
    """The archive, in every place where one is looked for."""
    part = out / f"{ARCHIVE}.part"
    with tarfile.open(part, "w:gz", compresslevel=6) as packed:
        packed.add(out / "site", arcname=".")
    part.replace(out / ARCHIVE)
    if (folder := collect_folder()) is not None:
        shutil.copy(out / ARCHIVE, folder / ARCHIVE)


def _run(command: list[str], environment: dict[str, str]) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True, env=environment)


def compile_to(root: Path, out: Path, architecture: str, wanted: str) -> None:
    """Raises RuntimeError or CalledProcessError where it cannot be built."""
    if not shutil.which("cmake"):
        raise RuntimeError("cmake is missing; install it: pip install cmake ninja")
    build, new = out / "cmake", out / "site.new"
    shutil.rmtree(new, ignore_errors=True)
    configure = ["cmake", "-S", str(root), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", *CPU_OPTIONS]
    environment = {**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    if architecture:
        configure += ["-DBRAZE_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real"]
    else:
        configure.append("-DBRAZE_CUDA=OFF")
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    _run(configure, environment)
    _run(["cmake", "--build", str(build)], environment)
    _run(["cmake", "--install", str(build), "--prefix", str(new), "--strip"], environment)
    package = new / "braze"
    for folder in ("bench", "csrc"):  # the checkout's are used
        shutil.rmtree(package / folder)
    (package / KEY).write_text(wanted)
    shutil.rmtree(out / "site", ignore_errors=True)
    new.rename(out / "site")


def link_python(root: Path, site: Path) -> None:
    """Puts the checkout's Python beside the compiled modules, so that it can change without a build."""
    package = site / "braze"
    for old in package.iterdir():
        if old.is_symlink():
            old.unlink()
    sources = [p for p in (root / "python" / "braze").iterdir() if p.name != "__pycache__"]
    for source in (*sources, root / "bench", root / "csrc"):
        if not (package / source.name).exists():
            (package / source.name).symlink_to(source)


def _provide_expecttest(shim: Path) -> None:
    """torch.testing imports it for a base class alone; machines without a network often lack it."""
    text = "import unittest\n\n\nclass TestCase(unittest.TestCase):\n    pass\n"
    try:
        import expecttest  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        write_text(shim / "expecttest.py", text)


def build(root: Path, out: Path, architecture: str, row: Row) -> None:
    """One row."""
    began = time.monotonic()
    wanted = key(root, architecture)
    site = out / "site"
    row["how"] = "was there"
    if not _is_of(site, wanted) and not unpack(out, wanted):
        row["how"] = "compiled"
        compile_to(root, out, architecture, wanted)
    row["seconds"] = round(time.monotonic() - began, 1)
    if row["how"] == "compiled":
        pack(out)  # before there are links to this checkout
    link_python(root, site)
    _provide_expecttest(out / "shim")
    show = "import braze\nfor k, v in braze.build_info().items(): print(k, v)"
    environment = {**os.environ, "PYTHONPATH": f"{site}:{os.environ.get('PYTHONPATH', '')}"}
    seen = subprocess.run(
        [sys.executable, "-c", show], env=environment, capture_output=True, text=True, cwd="/"
    )
    if seen.returncode:
        shutil.rmtree(site)  # the next run builds it anew
        (out / ARCHIVE).unlink(missing_ok=True)
        raise RuntimeError(f"built, but import braze fails: {seen.stderr[-400:]}")
    row["info"] = seen.stdout.splitlines()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rows.add_options(parser, ("cuda", "cpu"))


def run(arguments: argparse.Namespace) -> int:
    """Builds. Returns :func:`rows.run`'s code."""
    clock.open_clock(arguments.device)
    architecture = ""
    if arguments.device == "cuda":
        architecture = "{}{}".format(*torch.cuda.get_device_capability())
    root = find_root(Path(__file__).parent)
    out = Path(os.environ.get("BRAZE_GPU_OUT", root / "build" / "gpu"))
    out.mkdir(parents=True, exist_ok=True)
    work = Work("build", lambda row: build(root, out, architecture, row))
    arguments.skip_file = None  # what was built may be gone
    return rows.run([work], arguments, {}, lambda row: str(row))
