"""Convolution + batch norm + ReLU over layers of ResNet-50, against torch eager.

``forward+backward``: a training step of ConvBNReLU2d; ``inference``: its forward in eval(), where braze folds
the batch norm into the convolution. The convolutions themselves are oneDNN's and cuDNN's on both sides.

``kernels``, on CUDA: braze's own convolutions, one by one (bench/conv_kernels.py). --bytes prints what they are
about: what a training step reads, writes and saves with them and without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import braze.nn
import torch
from torch import nn

from . import conv_bytes, conv_kernels, session
from .clock import Call
from .harness import DTYPES, LAYOUTS, Built, Case, Part, Setting, Suite
from .resnet50 import Convolution, flops_of, name_of
from .rows import count

LAYERS = (
    Convolution(64, 64, 3, 1, 56),
    Convolution(64, 256, 1, 1, 56),
    Convolution(128, 128, 3, 1, 28),
    Convolution(1024, 256, 1, 1, 14),
    Convolution(512, 512, 3, 1, 7),
)
BATCH = {"cpu": 8, "cuda": 128}


def _modules(conv: Convolution) -> dict[str, nn.Module]:
    """With the same numbers."""
    shape = (conv.inputs, conv.outputs, conv.kernel, conv.stride, conv.kernel // 2)
    torch.manual_seed(0)
    parts = (nn.Conv2d(*shape, bias=False), nn.BatchNorm2d(conv.outputs))
    ours = braze.nn.ConvBNReLU2d(*shape)
    ours.conv.load_state_dict(parts[0].state_dict())
    return {"torch": nn.Sequential(*parts, nn.ReLU(inplace=True)), "braze": ours}


def build(conv: Convolution, dtype: str, layout: str, training: bool, setting: Setting) -> Built:
    """bf16 is autocast over fp32 parameters in training, a bf16 model in inference."""
    device, form = setting.device, LAYOUTS[layout]
    shape = (BATCH[device], conv.inputs, conv.side, conv.side)
    x = torch.randn(shape, device=device).contiguous(memory_format=form)
    out = (BATCH[device], conv.outputs, conv.out, conv.out)
    dy = torch.randn(out, device=device).contiguous(memory_format=form)
    modules = _modules(conv)
    cast = DTYPES[dtype] if not training else torch.float32
    x = x.to(DTYPES[dtype])

    def call(module: nn.Module, compiled: bool = False) -> Call:
        module = module.to(device, cast, memory_format=form).train(training)  # type: ignore[call-overload]
        run = torch.compile(module) if compiled else module
        if not training:

            def forward() -> torch.Tensor:
                with torch.inference_mode():
                    result: torch.Tensor = run(x)
                    return result

            return forward
        wanted = [x.requires_grad_(), *module.parameters()]

        def step() -> tuple[torch.Tensor, ...]:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
                y = run(x)
            return torch.autograd.grad(y, wanted, dy.to(y.dtype))

        return step

    makers: dict[str, Callable[[], Call]] = {
        name: partial(call, module) for name, module in modules.items()
    }
    if "compile" in setting.against:
        makers["compile"] = lambda: call(_modules(conv)["torch"], compiled=True)
    return Built(makers)


def cases(arguments: argparse.Namespace) -> list[Case]:
    found = []
    for training in (True, False):
        direction = "forward+backward" if training else "inference"
        for layout in LAYOUTS:
            for dtype in ("fp32", "bf16"):
                parts = [
                    Part(
                        partial(build, conv, dtype, layout, training),
                        flops=(3 if training else 1) * flops_of(conv, BATCH[arguments.device]),
                        name=name_of(conv),
                    )
                    for conv in (LAYERS[:2] if arguments.quick else LAYERS)
                ]
                tags = {
                    "dtype": dtype,
                    "layout": layout,
                    "direction": direction,
                    "batch": BATCH[arguments.device],
                }
                title = f"conv+bn+relu {dtype} {layout} {direction}"
                loose = {"fp32": 1e-3, "bf16": 5e-2}[dtype]
                found.append(Case(title, tags, tuple(parts), layout == "NHWC", None, loose))
    return found


SUITE = Suite("conv", cases, 1.0, {"cpu": "warm", "cuda": "cold"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    batch = "images, of the kernels' rows and of --bytes (default 256 and 32; --bytes: 256)"
    parser.add_argument("--batch", type=count, help=batch)
    parser.add_argument("--bytes", action="store_true", help="bytes from shapes, and no time")
    session.add_options(parser, f"{SUITE.seconds:g}, {conv_kernels.SUITE.seconds:g}")


def run(arguments: argparse.Namespace) -> int:
    """Returns :func:`session.run`'s code."""
    if arguments.bytes:
        print("\n".join(conv_bytes.lines(arguments.batch or conv_kernels.BATCHES[0])))
        return 0
    return session.run((SUITE, conv_kernels.SUITE), arguments)
