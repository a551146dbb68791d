"""Compiles the CUDA side without a GPU and measures what nvcc made of it.

    .venv/bin/python tests/support/cuda_gates.py          compare with tests/support/cuda_ratchet.json
    .venv/bin/python tests/support/cuda_gates.py --pin    make the present figures the pinned ones

Pinned per kernel and architecture: registers, stack and shared bytes, local memory accesses
(spills), and 128-bit global loads and stores. Any difference fails, improvements too: they are
pinned, and so cannot be lost again unnoticed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
RATCHET = ROOT / "tests/support/cuda_ratchet.json"
BUILD = ROOT / "build/cuda-check"
PIN = ".venv/bin/python tests/support/cuda_gates.py --pin"
FIGURES = ("registers", "stack", "shared", "local", "loads128", "stores128")
Kernels = dict[str, dict[str, dict[str, int]]]


class GateError(RuntimeError):
    """The figures cannot be had, or do not obey the rules."""


def nvcc_module() -> ModuleType:
    """braze/_nvcc.py by its file: it must work where braze is not built."""
    spec = importlib.util.spec_from_file_location("braze_nvcc", ROOT / "python/braze/_nvcc.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["braze_nvcc"] = module
    spec.loader.exec_module(module)
    return module


def no_nvcc() -> str:
    """Why nothing can be compiled here, or ""."""
    nvcc = nvcc_module()
    try:
        nvcc.find("")
    except nvcc.ToolkitError as error:
        return str(error)
    return ""


def nvcc_version() -> str:
    """All of it, 13.0.88: each compiler allocates registers its own way."""
    nvcc = str(nvcc_module().find("").nvcc)
    about = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", about)
    return found[1] if found else "unknown"


def tool(name: str) -> Path:
    """cuobjdump or nvdisasm of the pinned package, not of whatever toolkit is on PATH."""
    package = f"nvidia-cuda-{name}"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            path = Path(str(file.locate()))
            if not os.access(path, os.X_OK):
                path.chmod(0o755)
            return path
    raise GateError(f"{name} is missing: pip install -r requirements-dev.txt")


def _run(command: list[str], environ: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if done.returncode:
        raise GateError(
            f"{shlex.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def tools_first() -> dict[str, str]:
    """The environment with pip's cmake and ninja, and the default architectures."""
    environ = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    return {**environ, "PATH": f"{Path(sys.executable).parent}:{environ['PATH']}"}


def compile_objects(build: Path = BUILD) -> list[dict[str, str]]:
    """Compiles csrc/cuda and csrc/ops/*_cuda.cpp as the build does, with warnings and spills as errors.

    Links nothing, so a CPU torch will do. Returns CMake's compile commands.
    """
    environ = tools_first()
    options = {
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "Python_EXECUTABLE": sys.executable,
        "BRAZE_CUDA": "ON",
        "BRAZE_WERROR": "ON",
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    _run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defines], environ)
    _run(["cmake", "--build", str(build), "--target", "braze_cuda_objects"], environ)
    commands = json.loads((build / "compile_commands.json").read_text())
    return [c for c in commands if "braze_cuda_objects" in c["output"]]


def compile_one(commands: list[dict[str, str]], source: Path, output: Path) -> tuple[int, str]:
    """Compiles another .cu with the very options of the build. Returns nvcc's status and output."""
    like = next(c for c in commands if c["file"].endswith(".cu"))
    words = [w for w in shlex.split(like["command"]) if not w.startswith(("-M", like["output"]))]
    words = [w for w in words if not w.endswith((".o.d", ".o", ".cu")) and w not in ("-o", "-c")]
    command = [*words, "-I", str(ROOT / "csrc/cuda"), "-c", str(source), "-o", str(output)]
    done = subprocess.run(
        command, cwd=like["directory"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def short(demangled: str) -> str:
    """``void braze::cuda::step<float>(Args)`` as ``step<float>``."""
    name = re.sub(r"\(anonymous namespace\)::|braze::(cuda::)?", "", demangled)
    depth, end = 0, len(name)
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            end = i
            break
    return name[:end].removeprefix("void ")


def parse(resources: str, sass: str) -> Kernels:
    """Figures by mangled kernel and architecture from cuobjdump's -res-usage and -sass."""
    kernels: Kernels = {}
    arch = name = ""
    for line in resources.splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            values = [int(group) for group in match.groups()]
            kernels.setdefault(name, {})[arch] = dict(zip(FIGURES, [*values, 0, 0], strict=True))
    for line in sass.splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)", line):
            figures, operation = kernels[name][arch], match[1]
            if re.match(r"(LDL|STL)\b", operation):
                figures["local"] += 1
            elif re.match(r"LDG?\..*\b128\b", operation):
                figures["loads128"] += 1
            elif re.match(r"STG?\..*\b128\b", operation):
                figures["stores128"] += 1
    return kernels


def measure(objects: list[Path]) -> Kernels:
    """Figures of every kernel in ``objects`` by short name and architecture."""
    environ = {**os.environ, "PATH": f"{tool('nvdisasm').parent}:{os.environ['PATH']}"}
    cuobjdump, result = str(tool("cuobjdump")), Kernels()
    for file in objects:
        dumps = [
            _run([cuobjdump, option, str(file)], environ) for option in ("-res-usage", "-sass")
        ]
        for mangled, by_arch in parse(dumps[0], dumps[1]).items():
            name = short(_run(["c++filt", mangled]).strip())
            if name in result:
                raise GateError(f"two kernels are called {name}: give one another name")
            result[name] = by_arch
    return dict(sorted(result.items()))


def broken_rules(kernels: Kernels, scalar: list[str]) -> list[str]:
    """What no pin excuses: local memory, and 128-bit accesses that are missing or were split."""
    problems = []
    for name, by_arch in kernels.items():
        for figure in ("loads128", "stores128"):
            counts = {arch: figures[figure] for arch, figures in by_arch.items()}
            if name not in scalar and 4 * min(counts.values()) < 3 * max(counts.values()):
                problems.append(
                    f"{name}: {figure} {counts}. Where there are fewer, the compiler split 16-byte "
                    f"accesses into smaller ones."
                )
        for arch, figures in by_arch.items():
            where = f"{name} on {arch}"
            if figures["local"] or figures["stack"]:
                problems.append(
                    f"{where}: {figures['local']} local memory accesses, {figures['stack']} bytes of "
                    f"stack. Registers were spilled, or an array is indexed by a variable."
                )
            if name not in scalar and not (figures["loads128"] and figures["stores128"]):
                problems.append(
                    f"{where}: {figures['loads128']} 128-bit loads and {figures['stores128']} stores. "
                    f'Use load16/store16, or list the kernel under "scalar" in {RATCHET.name}.'
                )
    return problems


def differences(pinned: Kernels, present: Kernels) -> list[str]:
    """One line per figure that changed, kernel that appeared and kernel that went."""
    lines = []
    for name in sorted(pinned.keys() | present.keys()):
        old, new = pinned.get(name), present.get(name)
        if old is None or new is None:
            lines.append(f"{name}: {'new kernel, not pinned' if old is None else 'gone'}")
            continue
        for arch in sorted(old.keys() | new.keys()):
            before, after = old.get(arch, {}), new.get(arch, {})
            changed = [
                f"{figure} {before.get(figure)} -> {after.get(figure)}"
                for figure in FIGURES
                if before.get(figure) != after.get(figure)
            ]
            if changed:
                lines.append(f"{name} on {arch}: {', '.join(changed)}")
    return lines


def read_ratchet() -> tuple[str, list[str], Kernels]:
    """The compiler's version, the kernels that may be scalar, and the pinned figures."""
    data = json.loads(RATCHET.read_text())
    kernels = {
        name: {arch: dict(zip(FIGURES, row, strict=True)) for arch, row in by_arch.items()}
        for name, by_arch in data["kernels"].items()
    }
    return data["nvcc"], data["scalar"], kernels


def write_ratchet(version: str, scalar: list[str], kernels: Kernels) -> None:
    """One line per kernel and architecture, so that a diff reads as a table."""
    rows = {
        name: {arch: [figures[f] for f in FIGURES] for arch, figures in by_arch.items()}
        for name, by_arch in kernels.items()
    }
    head = {"figures": FIGURES, "nvcc": version, "scalar": scalar, "kernels": rows}
    text = json.dumps(head, indent=1)
    text = re.sub(r"\[[^\[\]]*\]", lambda row: " ".join(row[0].split()), text)
    RATCHET.write_text(text + "\n")


def main() -> int:
    """Compares or pins. Returns 0, or 1 after printing what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pin", action="store_true", help=f"rewrite {RATCHET.name}")
    pin = parser.parse_args().pin
    try:
        commands = compile_objects()
        kernels = measure(cuda_objects(commands))
    except GateError as error:
        print(error, file=sys.stderr)
        return 1
    _, scalar, pinned = read_ratchet() if RATCHET.exists() else ("", [], Kernels())
    problems = broken_rules(kernels, scalar)
    changes = differences(pinned, kernels)
    print(*problems, *changes, sep="\n")
    if pin:
        write_ratchet(nvcc_version(), [s for s in scalar if s in kernels], kernels)
        print(f"pinned {len(kernels)} kernels")
        return 1 if problems else 0
    if changes:
        print(f"if this is meant: {PIN}")
    return 1 if problems or changes else 0


def cuda_objects(commands: list[dict[str, str]]) -> list[Path]:
    """The objects made from .cu files."""
    return sorted(Path(c["directory"], c["output"]) for c in commands if c["file"].endswith(".cu"))


if __name__ == "__main__":
    raise SystemExit(main())
