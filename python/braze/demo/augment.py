"""Random changes of a batch of images, from a seeded generator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_DEGREES = 10.0
# As a fraction of the image: 0.5 pixels of 8, 1.75 of 28.
_MAX_SHIFT = 1.0 / 16.0


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * 2.0 - 1.0


def _affine(images: Tensor, angle: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = (torch.stack((cos, -sin, dx), dim=1), torch.stack((sin, cos, dy), dim=1))
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def _crop(images: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    margin = max(1, height // 8)
    padded = F.pad(images, (margin,) * 4)
    top = torch.randint(0, 2 * margin + 1, (count, 1, 1), generator=generator)
    left = torch.randint(0, 2 * margin + 1, (count, 1, 1), generator=generator)
    rows = top + torch.arange(height).reshape(1, height, 1)
    columns = left + torch.arange(width).reshape(1, 1, width)
    which = torch.arange(count).reshape(count, 1, 1)
    return padded.permute(0, 2, 3, 1)[which, rows, columns].permute(0, 3, 1, 2).contiguous()


def augment(images: Tensor, names: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """Return a randomly changed copy of a batch.

    Args:
        images: shape (N, C, H, W), floating, on the CPU; 0 is the background.
        names: any of ``"shift"`` (up to 1/16 of the image), ``"rotate"`` (up to 10 degrees),
            ``"crop"`` (pad by 1/8, cut out the original size), ``"flip"`` (left to right).
        generator: a CPU generator; equal states give equal results.

    Returns:
        A tensor of the same shape and dtype; ``images`` itself where ``names`` is empty.

    Raises:
        ValueError: a name is unknown.
    """
    unknown = set(names) - {"shift", "rotate", "crop", "flip"}
    if unknown:
        raise ValueError(f"unknown augmentation: {', '.join(sorted(unknown))}")
    count = images.shape[0]
    if "shift" in names or "rotate" in names:
        # One resampling for both: two would blur a small image twice.
        zero = torch.zeros(count)
        angle, dx, dy = zero, zero, zero
        if "rotate" in names:
            angle = _uniform(count, generator) * math.radians(_MAX_DEGREES)
        if "shift" in names:
            # The grid spans 2 units across the image.
            dx = _uniform(count, generator) * 2.0 * _MAX_SHIFT
            dy = _uniform(count, generator) * 2.0 * _MAX_SHIFT
        images = _affine(images, *(part.to(images.dtype) for part in (angle, dx, dy)))
    if "crop" in names:
        images = _crop(images, generator)
    if "flip" in names:
        mirrored = torch.rand(count, generator=generator) < 0.5
        images = torch.where(mirrored.reshape(count, 1, 1, 1), images.flip(3), images)
    return images
