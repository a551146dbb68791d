"""What a wheel may hold, what it must, and how large it may be."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from .rows import Row

# Bytes: of a wheel for the CPU with all of five torches and three Pythons, and of one with CUDA kernels.
LIMIT, CUDA_LIMIT = 12_000_000, 20_000_000
KINDS = re.compile(
    r"braze/(bench/README\.md|.+\.(py|pyi|typed|h|cuh|cu|cpp)|(lib|_)\w+[\w.-]*\.so)|braze-.+\.dist-info/.+"
)
# Of the system, and what is in the process once torch is imported.
LIBRARIES = re.compile(
    r"lib(c10|torch|c10_cuda|torch_cpu|torch_cuda|torch_python|braze_kernels|braze_cuda|stdc\+\+|gcc_s|m|c|gomp|dl|rt"
    r"|pthread)\.so(\.\d+)*|ld-linux[\w-]*\.so\.\d"
)


def _run(*command: str | Path) -> str:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True
    ).stdout


def check_library(file: Path, foreign: Iterable[str]) -> list[str]:
    """What is wrong with one .so; ``foreign``: folders of this machine whose names it must not hold."""
    problems = []
    dynamic = _run("readelf", "-d", file)
    paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
    if paths != ["$ORIGIN"]:
        problems.append(f"its RPATH is {paths}, not $ORIGIN")
    for name in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        if not LIBRARIES.fullmatch(name):
            problems.append(f"it needs {name}")
    if file.name.startswith("lib"):
        for name in _run(
            "nm", "-D", "-C", "--undefined-only", "--format=just-symbols", file
        ).splitlines():
            if re.match(r"(at|c10|torch)::|_?Py", name):
                problems.append(f"it needs {name}, and must know neither torch nor Python")
    content = file.read_bytes()
    problems += [f"it names {folder}" for folder in foreign if folder.encode() + b"/" in content]
    return [f"{file.name}: {problem}" for problem in problems]


def check(
    wheel: Path, rows: list[Row], cuda: bool, foreign: Iterable[str], limit: int = 0
) -> list[str]:
    """All that is wrong with a wheel; ``cuda``: it has CUDA kernels. ``limit``: bytes, default by ``cuda``."""
    problems = []
    limit = limit or (CUDA_LIMIT if cuda else LIMIT)
    if (size := wheel.stat().st_size) > limit:
        problems.append(f"the wheel has {size:,} bytes, more than {limit:,}")
    with zipfile.ZipFile(wheel) as packed, tempfile.TemporaryDirectory() as folder:
        names = {name for name in packed.namelist() if not name.endswith("/")}
        problems += [
            f"{name} does not belong there" for name in sorted(names) if not KINDS.fullmatch(name)
        ]
        wanted = {
            "braze/py.typed",
            "braze/_build.py",
            "braze/csrc/bindings.cpp",
            "braze/libbraze_kernels.so",
        }
        wanted |= {f"braze/{row.file('_C')}" for row in rows}
        if cuda:
            wanted |= {"braze/libbraze_cuda.so"}
            wanted |= {f"braze/{row.file('_cuda')}" for row in rows if row.torch.cuda}
        problems += [f"{name} is missing" for name in sorted(wanted - names)]
        libraries = {name for name in names - wanted if name.endswith(".so")}
        problems += [f"{name} was not asked for" for name in sorted(libraries)]
        if not any(
            re.fullmatch(r"braze-.+\.dist-info/(licenses/)?LICENSE", name) for name in names
        ):
            problems.append("LICENSE is missing")
        for name in sorted(names):
            if name.endswith(".so"):
                problems += check_library(Path(packed.extract(name, folder)), foreign)
    return problems


def sizes(wheel: Path) -> dict[str, int]:
    """Bytes of each file within the wheel, as compressed there."""
    with zipfile.ZipFile(wheel) as packed:
        return {Path(info.filename).name: info.compress_size for info in packed.infolist()}


def write_index(out: Path) -> None:
    """SHA256SUMS, and index/braze/index.html, a page as package indexes have it, of what is in ``out``."""
    files = sorted([*out.glob("braze-*.whl"), *out.glob("braze-*.tar.gz")])
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (out / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    page = out / "index/braze/index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    links = "".join(
        f'<a href="../../{name}#sha256={digest}" data-requires-python="&gt;=3.10">{name}</a><br>\n'
        for name, digest in sums.items()
    )
    page.write_text(f"<!DOCTYPE html>\n<title>braze</title>\n{links}")
