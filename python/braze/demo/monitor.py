"""The gradients of a deep network as torch initializes it, without and with batch norm."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import nn

from ..optim import GradientMonitor
from .data import CLASSES, Data, DemoError, batches
from .sides import Side

DEPTH, WIDTH, STEPS = 20, 16, 40


def watch(arguments: Namespace, data: Data) -> None:
    """Trains both for 40 steps, prints what the monitor reports, and writes its heat maps.

    Raises:
        DemoError: matplotlib is not installed.
    """
    settings = arguments.batch_size, arguments.augment, arguments.seed
    for name, normalize in (("plain", False), ("batch_norm", True)):
        torch.manual_seed(arguments.seed)
        layers: list[nn.Module] = []
        for inputs in (data.train_images.shape[1], *[WIDTH] * (DEPTH - 1)):
            layers.append(nn.Conv2d(inputs, WIDTH, 3, padding=1, bias=not normalize))
            layers += [nn.BatchNorm2d(WIDTH)] * normalize + [nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES)]
        side = Side("braze", nn.Sequential(*layers).to(arguments.device), arguments)
        with GradientMonitor(side.model, side.optimizer, window=STEPS) as monitor:
            for images, labels in batches(data, STEPS, *settings, epoch=1):
                side.train_batch(images.to(side.device), labels.to(side.device), True, True)
        print(f"{DEPTH} convolutions, {name}: {monitor.report()}")
        try:
            monitor.heat_map(arguments.out / f"gradients_{name}.png")
        except ImportError as error:
            raise DemoError(str(error)) from error
