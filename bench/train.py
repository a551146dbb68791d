"""A whole training step of a model: eager, through braze.fuse, and compiled.

Timed is zero_grad(set_to_none=True), forward, cross-entropy, backward, without an optimizer; interleaved.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from . import model_run, models
from .model_cells import Call, Cell, Contender, autocast, images
from .model_run import Task

CELLS = (
    Cell("resnet50", 8, "bf16"),
    Cell("resnet50", 8, "fp32"),
    Cell("resnet18", 16, "bf16"),
    Cell("resnet18", 16, "fp32"),
    Cell("mobilenet_v2", 8, "fp32"),
)
# Of braze, channels last, against these.
GOALS = {
    CELLS[0]: {"eager NHWC": 1.35, "eager NCHW": 1.6},
    CELLS[1]: {"eager NHWC": 1.05, "eager NCHW": 1.18},
    CELLS[2]: {"eager NHWC": 1.25},
    CELLS[3]: {"eager NHWC": 1.15},
    CELLS[4]: {"eager NHWC": 1.35},
}


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; of every pixel where there are logits for every pixel."""
    places = logits.shape[2:]
    wanted = labels.view(-1, *(1 for _ in places)).expand(-1, *places)
    return F.cross_entropy(logits, wanted)


def call(cell: Cell, contender: Contender, model: nn.Module) -> Call:
    """One step: gradients dropped, forward, the heads' losses, backward. No optimizer."""
    x = images(cell, contender.layout)
    labels = models.labels(cell.batch).to(cell.device)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with autocast(cell):
            heads = models.heads(model(x))
            loss = sum((loss_of(head, labels) for head in heads[1:]), loss_of(heads[0], labels))
        loss.backward()
        return loss.detach()

    return step


TASK = Task(
    name="train",
    training=True,
    cells=CELLS,
    goals=GOALS,
    call=call,
)
add_arguments = partial(model_run.add_arguments, TASK)
run = partial(model_run.run, TASK)
