"""A whole training step of a model: eager, through braze.fuse, and compiled.

Timed is zero_grad(set_to_none=True), forward, cross-entropy, backward, without an optimizer.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from . import model_cases, models, session
from .clock import Call
from .model_cases import Cell, Task, autocast, images, suite

CELLS = (
    Cell("resnet50", 8, "bf16"),
    Cell("resnet50", 8, "fp32"),
    Cell("resnet18", 16, "bf16"),
    Cell("resnet18", 16, "fp32", quick=True),
    Cell("mobilenet_v2", 8, "fp32", quick=True),
)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; of every pixel where there are logits for every pixel."""
    places = logits.shape[2:]
    wanted = labels.view(-1, *(1 for _ in places)).expand(-1, *places)
    return F.cross_entropy(logits, wanted)


def call(cell: Cell, layout: str, model: nn.Module) -> Call:
    """One step: gradients dropped, forward, the heads' losses, backward. No optimizer."""
    x = images(cell, layout)
    labels = models.labels(cell.batch).to(cell.device)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with autocast(cell):
            heads = models.heads(model(x))
            loss = sum((loss_of(head, labels) for head in heads[1:]), loss_of(heads[0], labels))
        loss.backward()
        return loss.detach()

    return step


TASK = Task("train", True, CELLS, call)
SUITE = suite(TASK)
add_arguments = model_cases.add_arguments
run = partial(session.run, (SUITE,))
