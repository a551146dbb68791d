"""Compiles the CUDA side without a GPU and measures what nvcc made of it.

    .venv/bin/python tests/support/cuda_gates.py          compare with tests/support/cuda_ratchet.json
    .venv/bin/python tests/support/cuda_gates.py --pin    make the present figures the pinned ones

Pinned per kernel and architecture: registers, stack and shared bytes, local memory accesses
(spills), and 128-bit global loads and stores. Pinned per hot loop: sass_model.py's figures, and
per kernel that multiplies sass_tensor.py's. They must keep to limits too, and docs/cuda_model.md
shows them. Any difference fails, improvements too: they are pinned, and so cannot be lost again
unnoticed.
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
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import sass_layers
import sass_model
import sass_tensor

ROOT = Path(__file__).parents[2]
RATCHET = ROOT / "tests/support/cuda_ratchet.json"
PAGE = ROOT / "docs/cuda_model.md"
BUILD = ROOT / "build/cuda-check"
PIN = ".venv/bin/python tests/support/cuda_gates.py --pin"
FIGURES = ("registers", "stack", "shared", "local", "loads128", "stores128")
Kernels = dict[str, dict[str, dict[str, int]]]
Rows = dict[str, sass_model.Row]
TensorRows = dict[str, sass_tensor.TensorRow]


class GateError(RuntimeError):
    """The figures cannot be had, or do not obey the rules."""


@dataclass
class Ratchet:
    """What is pinned, and what the rules are."""

    nvcc: str = ""
    scalar: list[str] = field(default_factory=list)  # kernels that need no 16-byte accesses
    kernels: Kernels = field(default_factory=Kernels)
    limits: dict[str, float] = field(default_factory=dict)
    excused: dict[str, str] = field(default_factory=dict)  # row: why it may miss a limit
    model: Kernels = field(default_factory=Kernels)  # rows of the model, on its one architecture
    tensor: Kernels = field(default_factory=Kernels)  # of the kernels that multiply


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

    Links libbraze_cuda alone, so a CPU torch will do. Returns CMake's compile commands.
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
    _run(["cmake", "--build", str(build), "--target", "braze_cuda", "cuda_bindings"], environ)
    commands = json.loads((build / "compile_commands.json").read_text())
    return [c for c in commands if c["file"].endswith((".cu", "_cuda.cpp"))]


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
        elif match := sass_model.INSTRUCTION.match(line):
            figures, operation = kernels[name][arch], match["opcode"]
            if re.match(r"(LDL|STL)\b", operation):
                figures["local"] += 1
            elif sass_model.LOAD128.match(operation):
                figures["loads128"] += 1
            elif sass_model.STORE128.match(operation):
                figures["stores128"] += 1
    return kernels


def dump(file: Path, *options: str) -> str:
    """What cuobjdump says of ``file``."""
    environ = {**os.environ, "PATH": f"{tool('nvdisasm').parent}:{os.environ['PATH']}"}
    return _run([str(tool("cuobjdump")), *options, str(file)], environ)


def demangled(mangled: str) -> str:
    return short(_run(["c++filt", mangled]).strip())


def measure(objects: list[Path]) -> Kernels:
    """Figures of every kernel in ``objects`` by short name and architecture."""
    result = Kernels()
    for file in objects:
        for mangled, by_arch in parse(dump(file, "-res-usage"), dump(file, "-sass")).items():
            name = demangled(mangled)
            if name in result:
                raise GateError(f"two kernels are called {name}: give one another name")
            result[name] = by_arch
    return dict(sorted(result.items()))


def hot_rows(objects: list[Path], kernels: Kernels) -> tuple[Rows, TensorRows]:
    """The models' rows of ``objects``, whose figures are ``kernels``."""
    rows, tensor = Rows(), TensorRows()
    for file in objects:
        sass = dump(file, "-arch", sass_model.ARCH, "-sass")
        for mangled, body in sass_model.functions(sass).items():
            name = demangled(mangled)
            figures = kernels[name][sass_model.ARCH]
            found = sass_model.rows_of(name, body, figures["registers"], figures["shared"])
            if sass_model.family_of(name) and not found:
                raise GateError(f"{name} has no loop with the accesses of its family")
            rows |= found
            try:
                row = sass_tensor.row_of(name, body, figures["registers"], figures["shared"])
            except ValueError as error:
                raise GateError(str(error)) from error
            if row:
                tensor[name] = row
    return dict(sorted(rows.items())), dict(sorted(tensor.items()))


def broken_rules(kernels: Kernels, scalar: list[str]) -> list[str]:
    """What no pin excuses: local memory, and 128-bit accesses that are missing or were split."""
    problems = []
    for name, by_arch in kernels.items():
        for figure in ("loads128", "stores128"):
            counts = {arch: figures[figure] for arch, figures in by_arch.items()}
            if name not in scalar and 2 * min(counts.values()) < max(counts.values()):
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
            lines.append(f"{name}: {'new, not pinned' if old is None else 'gone'}")
            continue
        for arch in sorted(old.keys() | new.keys()):
            before, after = old.get(arch, {}), new.get(arch, {})
            changed = [
                f"{figure} {before.get(figure)} -> {after.get(figure)}"
                for figure in before | after
                if before.get(figure) != after.get(figure)
            ]
            if changed:
                lines.append(f"{name} on {arch}: {', '.join(changed)}")
    return lines


def problems_and_changes(
    ratchet: Ratchet, kernels: Kernels, rows: Rows, tensor: TensorRows
) -> tuple[list[str], list[str]]:
    """What breaks a rule, and what is not as it was pinned."""
    problems = broken_rules(kernels, ratchet.scalar)
    problems += sass_model.broken_limits({**rows, **tensor}, ratchet.limits, ratchet.excused)
    changes = differences(ratchet.kernels, kernels) + differences(ratchet.model, pinned(rows))
    changes += differences(ratchet.tensor, pinned(tensor))
    if not PAGE.exists() or PAGE.read_text() != page(ratchet, rows, tensor):
        changes.append(f"{PAGE.name} is not made of these figures")
    return problems, changes


def pinned(rows: Rows | TensorRows) -> Kernels:
    return {name: {sass_model.ARCH: row.figures()} for name, row in rows.items()}


def page(ratchet: Ratchet, rows: Rows, tensor: TensorRows) -> str:
    first = sass_model.document(rows, ratchet.limits, ratchet.excused, PIN)
    return first + sass_layers.document(tensor, ratchet.limits, ratchet.excused)


COLUMNS = {"kernels": FIGURES, "model": sass_model.FIGURES, "tensor": sass_tensor.FIGURES}


def read_ratchet() -> Ratchet:
    data = json.loads(RATCHET.read_text())
    del data["figures"]
    for part, columns in COLUMNS.items():
        data[part] = {
            name: {arch: dict(zip(columns, row, strict=True)) for arch, row in by_arch.items()}
            for name, by_arch in data[part].items()
        }
    return Ratchet(**data)


def write_ratchet(ratchet: Ratchet) -> None:
    """One line per kernel and architecture, so that a diff reads as a table."""
    data = {"figures": COLUMNS, **vars(ratchet)}
    for part in COLUMNS:
        data[part] = {
            name: {arch: [*figures.values()] for arch, figures in by_arch.items()}
            for name, by_arch in data[part].items()
        }
    text = json.dumps(data, indent=1)
    text = re.sub(r"\[[^\[\]]*\]", lambda row: " ".join(row[0].split()), text)
    RATCHET.write_text(text + "\n")


def main() -> int:
    """Compares or pins. Returns 0, or 1 after printing what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pin", action="store_true", help=f"rewrite {RATCHET.name}, {PAGE.name}")
    pin = parser.parse_args().pin
    ratchet = read_ratchet()
    try:
        objects = cuda_objects(compile_objects())
        kernels = measure(objects)
        rows, tensor = hot_rows(objects, kernels)
    except GateError as error:
        print(error, file=sys.stderr)
        return 1
    problems, changes = problems_and_changes(ratchet, kernels, rows, tensor)
    print(*problems, *changes, sep="\n")
    if pin:
        ratchet.nvcc, ratchet.kernels = nvcc_version(), kernels
        ratchet.model, ratchet.tensor = pinned(rows), pinned(tensor)
        ratchet.scalar = [name for name in ratchet.scalar if name in kernels]
        write_ratchet(ratchet)
        PAGE.write_text(page(ratchet, rows, tensor))
        print(f"pinned {len(kernels)} kernels, {len(rows) + len(tensor)} hot loops")
        return 1 if problems else 0
    if changes:
        print(f"if this is meant: {PIN}")
    return 1 if problems or changes else 0


def cuda_objects(commands: list[dict[str, str]]) -> list[Path]:
    """The objects made from .cu files."""
    return sorted(Path(c["directory"], c["output"]) for c in commands if c["file"].endswith(".cu"))


if __name__ == "__main__":
    raise SystemExit(main())
