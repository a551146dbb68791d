"""Counts the instructions that the CPU kernels take for an element, so that no loop turns scalar unnoticed.

    .venv/bin/python tests/support/cpu_gates.py          compare with tests/support/cpu_ratchet.json
    .venv/bin/python tests/support/cpu_gates.py --pin    make the present figures the pinned ones

valgrind's callgrind counts, in the objects of the build; the difference between two sizes leaves
out what does not grow with them. valgrind 3.19 knows no AVX-512.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from cuda_gates import ROOT, GateError, _run, tools_first

RATCHET = ROOT / "tests/support/cpu_ratchet.json"
BUILD = ROOT / "build/cpu-check"
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
WHEEL = ROOT / f"build/{TAG}-{TAG}-{re.sub('[-.]', '_', sysconfig.get_platform())}"
DRIVER = ROOT / "tests/support/cpu_kernels.cpp"
PIN = ".venv/bin/python tests/support/cpu_gates.py --pin"
SETS = ("baseline", "avx2")
SLACK = 1.1
CROSS = "aarch64-linux-gnu-g++"
CONTROL = "scalar_sgd fp32"
# Instructions per element by kernel and instruction set.
Figures = dict[str, dict[str, float]]


def why_not(*tools: str) -> str:
    """Why the kernels of all sets cannot be compiled, and these tools run, here, or ""."""
    if platform.machine() != "x86_64":
        return f"AVX2 is x86-64's, this is {platform.machine()}"
    missing = [tool for tool in ("c++", "cmake", *tools) if shutil.which(tool) is None]
    return f"{', '.join(missing)} not installed" if missing else ""


def compiler() -> str:
    """Each makes other instructions."""
    return _run(["c++", "--version"]).splitlines()[0]


def compile_objects() -> list[dict[str, str]]:
    """Ninja's commands for csrc/cpu and csrc/plan, which know no torch; all have been run.

    In the build of braze itself, if that is here with all sets: there is little left to compile then.
    """
    environ = tools_first()
    rules = WHEEL / "build.ninja"
    build = WHEEL if rules.exists() and "kernels_avx2" in rules.read_text() else BUILD
    if build == BUILD:
        defines = ["-DBRAZE_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
        _run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defines], environ)
    commands = json.loads(_run(["ninja", "-C", str(build), "-t", "compdb"], environ))
    ours = (f"{ROOT}/csrc/cpu/", f"{ROOT}/csrc/plan/")
    used = [c for c in commands if c["file"].startswith(ours) and c["output"].endswith(".o")]
    _run(["ninja", "-C", str(build), *(c["output"] for c in used)], environ)
    return [{**c, "output": str(build / c["output"])} for c in used]


def flags_of(command: dict[str, str]) -> list[str]:
    """What CMake compiles a file with, beginning with the compiler."""
    words = shlex.split(command["command"])
    return words[: next(i for i, word in enumerate(words) if word in ("-MD", "-o"))]


def compile_driver(commands: list[dict[str, str]], *more: str) -> Path:
    """The driver, with these objects: next to the first, with its compiler."""
    like = next(c for c in commands if c["file"].endswith("/cpu/instruction_set.cpp"))
    program = Path(like["output"]).with_name("cpu_kernels")
    objects = [c["output"] for c in commands]
    command = [*flags_of(like), *more, f"-I{ROOT / 'csrc'}", str(DRIVER), *objects]
    _run([*command, "-o", str(program)])
    return program


def compile_driver_for_arm(commands: list[dict[str, str]], folder: Path) -> Path:
    """The same for aarch64, without libraries of its own, from the commands of the baseline."""
    crossed = []
    for command in commands:
        if "/kernels_" in command["output"] and "/kernels_baseline" not in command["output"]:
            continue
        flags = shlex.join([CROSS, "-Wno-psabi", *flags_of(command)[1:]])
        output = str(folder / f"{Path(command['file']).stem}{len(crossed)}.o")
        crossed.append({**command, "command": f"{flags} -o {output} -c", "output": output})
        _run([*shlex.split(crossed[-1]["command"]), command["file"]])
    return compile_driver(crossed, "-static")


def bits(driver: list[str], flipped: int = 0) -> dict[str, str]:
    """The hash of each result of the driver; `flipped`: bits of its last byte."""
    lines = _run([*driver, str(flipped)]).splitlines()
    return dict(line.rsplit(" ", 1) for line in lines)


def sets_of(program: Path) -> list[str]:
    """What the driver can run here."""
    return _run([str(program)]).split()


def shared_symbols(compiled: str, instruction_set: str) -> list[str]:
    """The weak symbols of an object of this set that other objects may have as well.

    The linker takes one copy, whatever instructions that has. Those of the standard library are
    compiled for any machine, see set_begin.h, and what has the set's namespace in its name is its own.
    """
    fields = [line.split() for line in _run(["nm", "-P", compiled]).splitlines()]
    own = f"3cpu{len(instruction_set)}{instruction_set}"
    weak = [name for name, kind, *_ in fields if kind in "WVu"]
    return [name for name in weak if own not in name and not re.match("_ZN?K?St", name)]


def measure(program: Path, instruction_set: str) -> dict[str, float]:
    """Instructions per element by kernel."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--toggle-collect=measured", "--dump-after=measured"]
        output = f"--callgrind-out-file={folder}/out"
        command = ["valgrind", "--tool=callgrind", *options, output, str(program), instruction_set]
        lines = [line.rsplit(" ", 1) for line in _run(command).splitlines()]
        counts = []
        for part in range(1, len(lines) + 1):
            text = Path(folder, f"out.{part}").read_text()
            counts.append(int(re.findall(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)[-1]))
    figures = {}
    for k in range(0, len(lines), 2):
        (name, small), (_, large) = lines[k : k + 2]
        figures[name] = round((counts[k + 1] - counts[k]) / (int(large) - int(small)), 2)
    return figures


def measure_all(program: Path) -> Figures:
    """Of every kernel, and of the control, in every set."""
    by_set = {name: measure(program, name) for name in SETS}
    kernels = by_set[SETS[0]]
    return {kernel: {name: by_set[name][kernel] for name in SETS} for kernel in kernels}


def differences(pinned: Figures, present: Figures) -> list[str]:
    """One line per figure above what is pinned and SLACK, kernel that appeared and kernel that went."""
    lines = []
    for kernel in sorted(pinned.keys() | present.keys()):
        if kernel not in pinned or kernel not in present:
            lines.append(f"{kernel}: {'gone' if kernel in pinned else 'new, not pinned'}")
            continue
        for name, count in present[kernel].items():
            if count > SLACK * pinned[kernel][name]:
                before = pinned[kernel][name]
                lines.append(f"{kernel}, {name}: {before} instructions an element -> {count}")
    return lines


def read_ratchet() -> tuple[str, Figures]:
    """The compiler, and the pinned figures."""
    data = json.loads(RATCHET.read_text())
    return data["compiler"], data["instructions per element"]


def write_ratchet(figures: Figures) -> None:
    """One line per kernel."""
    data = {"compiler": compiler(), "instructions per element": figures}
    text = json.dumps(data, indent=1)
    text = re.sub(r"(?<=: )\{[^{}]*\}", lambda row: " ".join(row[0].split()), text)
    RATCHET.write_text(text + "\n")


def main() -> int:
    """Compares or pins. Returns 0, or 1 after printing what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pin", action="store_true", help=f"rewrite {RATCHET.name}")
    pin = parser.parse_args().pin
    try:
        figures = measure_all(compile_driver(compile_objects()))
    except GateError as error:
        print(error, file=sys.stderr)
        return 1
    figures.pop(CONTROL)
    _, pinned = read_ratchet() if RATCHET.exists() else ("", Figures())
    changes = differences(pinned, figures)
    print(*changes, sep="\n")
    if pin:
        write_ratchet(figures)
        print(f"pinned {len(figures)} kernels")
        return 0
    if changes:
        print(f"if this is meant: {PIN}")
    return 1 if changes else 0


if __name__ == "__main__":
    raise SystemExit(main())
