"""What the device does with the building blocks of the kernels, and cuDNN with ResNet-50's convolutions."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from braze import _native, build
from torch import Tensor

from . import rows
from .clock import Clock, open_clock
from .resnet50 import Convolution, convolutions, flops_of, name_of
from .rows import Row, Work
from .sanitize import find_tool
from .sources import find_root

TABLES = ("copy", "read", "launch", "tickets")
BATCH = 256


@functools.cache
def program(device: str) -> Path:
    """micro.cu, compiled for this GPU, or for the emulator of the tests."""
    source = Path(__file__).with_name("micro.cu").resolve()
    root = find_root(Path(__file__).parent)
    if device == "cpu":
        sys.path.insert(0, str(root / "tests" / "support"))
        built: Path = importlib.import_module("emulator_build").build_program(
            "micro", [source], "native"
        )
        return built
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc is missing, which compiles bench/micro.cu")
    target = root / "build" / "gpu" / "micro"
    target.parent.mkdir(parents=True, exist_ok=True)
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    options = ["-std=c++20", "-O3", f"-arch={architecture}", "-fmad=false", "-o", str(target)]
    subprocess.run([nvcc, *options, str(source)], check=True)
    return target


def table(device: str, row: Row, *arguments: str) -> None:
    """The program's lines. What it printed before a failure stays."""
    run = subprocess.run([program(device), *arguments], capture_output=True, text=True)
    row["table"] = [json.loads(text) for text in run.stdout.splitlines()]
    if run.returncode:
        raise RuntimeError(f"micro {arguments[0]} ended with {run.returncode}: {run.stderr[-300:]}")


def kernels(device: str, row: Row) -> None:
    """Registers and occupancy of every kernel, as the driver sees them."""
    cuobjdump = find_tool("cuobjdump")
    file = next(iter(build.libraries("_cuda")), _native.CUDA_FILE)
    if device == "cpu" or cuobjdump is None or file is None:
        row["ok"] = None
        row["note"] = "not available: it needs a CUDA device, braze._cuda and cuobjdump"
        return
    with tempfile.TemporaryDirectory() as folder:
        extract = [cuobjdump, "--extract-elf", "all", str(file)]
        subprocess.run(extract, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        files = sorted(str(path) for path in Path(folder).glob("*.cubin"))
        table(device, row, "kernels", *files)
    names = "\n".join(entry["name"] for entry in row["table"])
    if (filt := find_tool("cu++filt")) is not None and names:
        plain = subprocess.run([filt], input=names, capture_output=True, text=True).stdout
        for entry, name in zip(row["table"], plain.splitlines(), strict=False):
            entry["name"] = name.replace("braze::cuda::", "")[:200]
    if not row["table"]:
        raise RuntimeError(f"no kernel was found in {file}")


def shapes() -> Counter[Convolution]:
    """ResNet-50's convolutions and how many there are of each."""
    return Counter(replace(conv, place="", projected=False) for conv in convolutions())


def calls(conv: Convolution, batch: int, device: str) -> dict[str, Callable[[], Any]]:
    """Forward, forward with bias and ReLU in the same call, and the two gradients; bf16, NHWC."""

    def make(*shape: int) -> Tensor:
        tensor = torch.randn(*shape, device=device).to(torch.bfloat16)
        return tensor.contiguous(memory_format=torch.channels_last)

    x = make(batch, conv.inputs, conv.side, conv.side)
    weight = make(conv.outputs, conv.inputs, conv.kernel, conv.kernel)
    dy = make(batch, conv.outputs, conv.out, conv.out)
    bias = torch.randn(conv.outputs, device=device).to(torch.bfloat16)
    # cuDNN's order in torch.
    stride, padding, dilation, groups = [conv.stride] * 2, [conv.kernel // 2] * 2, [1, 1], 1

    def forward(bias: Tensor | None = None) -> Tensor:
        return torch.conv2d(x, weight, bias, stride=stride, padding=padding)

    def backward(dx: bool) -> Any:
        mask = [dx, not dx, False]
        fixed = (None, stride, padding, dilation, False, [0, 0], groups, mask)
        return torch.ops.aten.convolution_backward(dy, x, weight, *fixed)

    def fused() -> Tensor:
        if device == "cpu":
            return forward(bias).relu_()
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)

    return {
        "forward": forward,
        "bias_relu": lambda: forward(bias).relu_(),
        "fused_relu": fused,
        "dgrad": lambda: backward(True),
        "wgrad": lambda: backward(False),
    }


def measure(conv: Convolution, count: int, clock: Clock, batch: int, row: Row) -> None:
    """Microseconds with a cold L2; what cuDNN refuses is in ``failed``."""
    row["count"], row["batch"], row["failed"] = count, batch, {}
    for name, call in calls(conv, batch, clock.name).items():
        try:
            call()
        except RuntimeError as error:
            if rows.is_fatal(str(error)):
                raise
            row["failed"][name] = str(error)[:200]
            continue
        call()
        times = clock.cold(call, 5, clock.wall(call, 2).wall)
        if not times:
            times = [clock.wall(call, 5).device]
        row[f"{name}_us"] = statistics.median(times) * 1e6
        row[f"{name}_tflops"] = flops_of(conv, batch) / statistics.median(times) / 1e12


def lines(row: Row) -> str:
    text = [f"\n{row['name']} {row.get('note', '')}"]
    text += [
        "  " + ", ".join(f"{key} {value}" for key, value in entry.items())
        for entry in row.get("table", [])
    ]
    figures = {key[:-3]: value for key, value in row.items() if key.endswith("_us")}
    if figures:
        text.append("  us: " + ", ".join(f"{key} {value:.0f}" for key, value in figures.items()))
    return "\n".join(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    rows.add_options(parser, ("cuda", "cpu"))


def run(arguments: argparse.Namespace) -> int:
    """Measures row by row; on the CPU it rehearses. Returns :func:`rows.run`'s code."""
    clock = open_clock(arguments.device)
    timed, batch = list(shapes().items()), BATCH
    if arguments.device == "cpu":
        timed, batch = timed[-2:], 1

    def of(name: str) -> Work:
        return Work(name, lambda row: table(arguments.device, row, name))

    def convolved(conv: Convolution, count: int) -> Work:
        return Work(name_of(conv), lambda row: measure(conv, count, clock, batch, row))

    work = [*map(of, TABLES), Work("kernels", lambda row: kernels(arguments.device, row))]
    work += [convolved(*pair) for pair in timed]
    names = rows.choose([one.name for one in work], arguments.filter)
    wanted = [one for one in work if one.name in names]
    return rows.run(wanted, arguments, dict(clock.facts()), lines)
