"""Where and when a result was measured: what every result file carries. Linux; elsewhere less is known."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from .sources import digest, find_root

# Shares of the processors' time that others may use, and seconds to wait for it.
IDLE, IDLE_WAIT_S = 0.05, 20.0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpu_field(name: str) -> str:
    found = re.search(rf"^{name}\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else ""


def _generation(family: int, model: int) -> str:
    """AMD's, which virtual machines' names leave out."""
    if family == 23:
        return "Zen 2" if model >= 0x30 else "Zen"
    if family == 25:
        return "Zen 3" if model < 0x10 or 0x20 <= model < 0x60 else "Zen 4"
    return "Zen 5" if family == 26 else ""


@functools.cache
def processor() -> str:
    """The processor's name."""
    name = _cpu_field("model name") or platform.processor() or platform.machine()
    if _cpu_field("vendor_id") != "AuthenticAMD":
        return name
    generation = _generation(int(_cpu_field("cpu family")), int(_cpu_field("model")))
    return f"{name} ({generation})" if generation else name


@functools.cache
def last_cache() -> int:
    """Bytes of the largest cache; 32 MiB where nobody tells."""
    sizes = [
        _read(str(p)).strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")
    ]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=2**25)


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return 1024 * int(found[1]) if found else 2**31


def _ticks() -> tuple[float, float]:
    """Of all processors since the start: busy (with time that a host took), and all."""
    fields = [float(word) for word in _read("/proc/stat").partition("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4], sum(fields)) if fields else (0.0, 0.0)


def busy(seconds: float = 0.4) -> float:
    """The share of the processors' time that others use now."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    return (after[0] - before[0]) / max(1.0, after[1] - before[1])


def wait_until_idle(limit_s: float = IDLE_WAIT_S) -> float:
    """Waits until nobody else computes, ``limit_s`` at most. Returns the share that others still use."""
    deadline = time.monotonic() + limit_s
    while (share := busy()) > IDLE and time.monotonic() < deadline:
        time.sleep(0.5)
    return round(share, 3)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _commit() -> dict[str, Any]:
    """Of the checkout that this file, or the current folder, is in; a wheel alone knows none."""
    facts: dict[str, Any] = {"commit": None, "dirty": False, "sources": None}
    with contextlib.suppress(FileNotFoundError):
        root = find_root()
        facts["commit"] = _git(root, "rev-parse", "--short=7", "HEAD")
        changed = _git(
            root, "status", "--porcelain", "--untracked-files=no", "--", "csrc", "python"
        )
        facts["dirty"] = bool(changed)
        facts["sources"] = digest(root, ("csrc/**/*", "python/**/*.py"))
    return facts


def gpu() -> dict[str, Any] | None:
    """The CUDA device; its clocks and what throttles them where nvidia-ml-py is installed."""
    import torch

    if not torch.cuda.is_available():
        return None
    facts: dict[str, Any] = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        for key, kind in (("sm_mhz", nvml.NVML_CLOCK_SM), ("memory_mhz", nvml.NVML_CLOCK_MEM)):
            facts[key] = nvml.nvmlDeviceGetClockInfo(handle, kind)
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        kinds = [n for n in dir(nvml) if n.startswith("nvmlClocksEventReason")]
        facts["throttle"] = [
            name.removeprefix("nvmlClocksEventReason")
            for name in kinds
            if isinstance(bit := getattr(nvml, name), int) and bit & reasons
        ]
    except Exception as error:  # another driver, no rights, no package: figures stand without it
        facts["clocks"] = f"unknown: {error}"
    return facts


def describe(share: float) -> dict[str, Any]:
    """The environment of a result file. ``share``: what others used of the processors."""
    import braze
    import torch

    build = braze.build_info()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": f"{processor()}, {cores} cores",
        "cpu": processor(),
        "cores": cores,
        "last_cache_mb": last_cache() / 2**20,
        "gpu": gpu(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "braze": build["braze"],
        "compiler": build["compiler"],
        "busy": share,
        **_commit(),
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
