"""Inference of a whole model: eager, through braze.fuse, and compiled.

Timed is the forward in eval() under torch.inference_mode.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from . import model_cases, models, session
from .clock import Call
from .model_cases import CAST, Cell, Task, autocast, images, suite

CELLS = (
    Cell("resnet50", 8, "fp32", quick=True),
    Cell("resnet50", 8, "bf16"),
    Cell("resnet50", 1, "bf16"),
    Cell("resnet18", 8, "fp32"),
    Cell("resnet18", 8, "bf16"),
    Cell("mobilenet_v2", 8, "fp32", quick=True),
    Cell("mobilenet_v2", 8, "bf16"),
    Cell("efficientnet_b0", 8, "fp32"),
    Cell("efficientnet_b0", 8, "bf16"),
    Cell("resnet50", 256, CAST, device="cuda", goal=1.5),
    Cell("resnet50", 256, "bf16", device="cuda", goal=1.5),
    Cell("resnet50", 32, CAST, device="cuda"),
    Cell("resnet50", 256, "fp32", device="cuda"),
)


def call(cell: Cell, layout: str, model: nn.Module) -> Call:
    """One forward under inference_mode."""
    x = images(cell, layout)

    def forward() -> Tensor:
        with torch.inference_mode(), autocast(cell):
            return models.heads(model(x))[0]

    return forward


TASK = Task("infer", False, CELLS, call)
SUITE = suite(TASK)
add_arguments = model_cases.add_arguments
run = partial(session.run, (SUITE,))
