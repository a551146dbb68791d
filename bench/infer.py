"""Inference of a whole model: eager, through braze.fuse, and compiled.

Timed is the forward in eval() under torch.inference_mode; interleaved.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from . import model_run, models
from .model_cells import CAST, Call, Cell, Contender, autocast, images
from .model_run import Task

CELLS = (
    Cell("resnet50", 8, "fp32"),
    Cell("resnet50", 8, "bf16"),
    Cell("resnet50", 1, "bf16"),
    Cell("resnet18", 8, "fp32"),
    Cell("resnet18", 8, "bf16"),
    Cell("mobilenet_v2", 8, "fp32"),
    Cell("mobilenet_v2", 8, "bf16"),
    Cell("efficientnet_b0", 8, "fp32"),
    Cell("efficientnet_b0", 8, "bf16"),
    *(
        Cell("resnet50", batch, dtype, device="cuda")
        for batch, dtype in ((256, CAST), (256, "bf16"), (32, CAST), (256, "fp32"))
    ),
)
# Of braze, channels last, against these.
GOALS = {
    CELLS[0]: {"eager NHWC": 1.25},
    CELLS[1]: {"eager NHWC": 2.5},
    CELLS[2]: {"eager NHWC": 2.0},
    **{
        cell: {"eager NHWC": 1.5}
        for cell in CELLS
        if cell.device == "cuda" and cell.batch == 256 and cell.dtype != "fp32"
    },
}


def call(cell: Cell, contender: Contender, model: nn.Module) -> Call:
    """One forward under inference_mode."""
    x = images(cell, contender.layout)

    def forward() -> Tensor:
        with torch.inference_mode(), autocast(cell):
            return models.heads(model(x))[0]

    return forward


TASK = Task(
    name="infer",
    training=False,
    cells=CELLS,
    goals=GOALS,
    call=call,
)
add_arguments = partial(model_run.add_arguments, TASK)
run = partial(model_run.run, TASK)
