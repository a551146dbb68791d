"""The data sets of the demo and the batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

DATASETS = ("digits", "mnist", "cifar10")
CLASSES = 10
Split = tuple[Tensor, Tensor]


class DemoError(Exception):
    """A failure explained in one line: what happened, why, and what to do. ``code`` is the process's."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Data:
    """Images, (N, C, S, S) of values up to ``largest``, and labels, (N,), in memory."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    largest: float
    mirrored: bool = False

    def __post_init__(self) -> None:
        sample = self.train_images[:10_000].float() / self.largest
        self.mean = sample.mean(dim=(0, 2, 3), keepdim=True)
        self.std = sample.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-3)

    def normalized(self, images: Tensor) -> Tensor:
        """With zero mean and unit variance per channel, fp32."""
        return (images.float() / self.largest - self.mean) / self.std


def _digits() -> Data:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DemoError(
            f"scikit-learn, which brings the digits, cannot be imported ({error}); "
            "pip install scikit-learn matplotlib"
        ) from error
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    # The split stays the same whatever --seed is, so that accuracies can be compared.
    train, test = train_test_split(
        range(len(labels)), test_size=0.25, stratify=labels, random_state=0
    )
    images = images.reshape(-1, 1, 8, 8)
    return Data(images[train], labels[train].long(), images[test], labels[test].long(), 16.0)


def _from_torchvision(name: str, root: Path) -> Data:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DemoError(
            f"--data {name} needs torchvision, which cannot be imported ({error}); "
            "pip install torchvision"
        ) from error
    kind = datasets.MNIST if name == "mnist" else datasets.CIFAR10
    folder = root / ("MNIST/raw" if name == "mnist" else "cifar-10-batches-py")
    parts: list[Tensor] = []
    for train in (True, False):
        try:
            part = kind(str(root), train=train, download=False)
        except (RuntimeError, OSError, ValueError) as error:
            raise DemoError(
                f"no complete {name} files were found in {folder}; put them there or fetch them: "
                f'python -c "from torchvision.datasets import {kind.__name__} as D; '
                f"D('{root}', download=True)\""
            ) from error
        pixels = torch.as_tensor(part.data)
        images = pixels.unsqueeze(1) if name == "mnist" else pixels.permute(0, 3, 1, 2)
        parts += [images.contiguous(), torch.as_tensor(part.targets).long()]
    train_x, train_y, test_x, test_y = parts
    return Data(train_x, train_y, test_x, test_y, 255.0, mirrored=name == "cifar10")


def load(name: str, root: Path | None) -> Data:
    """``"digits"`` (1,797 images of 8x8, in scikit-learn), or ``"mnist"`` or ``"cifar10"`` from ``root``.

    Raises:
        DemoError: a library is not installed, or the files are not there; nothing is downloaded.
    """
    return _digits() if root is None else _from_torchvision(name, root)


def _augmented(images: Tensor, mirrored: bool, generator: torch.Generator) -> Tensor:
    """Images moved by up to an eighth of their size; half of them also mirrored, where asked for."""
    count, _, _, size = images.shape
    margin = size // 8
    padded = F.pad(images, (margin,) * 4)
    corners = torch.randint(0, 2 * margin + 1, (count, 2), generator=generator).tolist()
    cut = [
        image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, corners, strict=True)
    ]
    if mirrored:
        turns = torch.rand(count, generator=generator).tolist()
        cut = [
            image.flip(2) if turn < 0.5 else image for image, turn in zip(cut, turns, strict=True)
        ]
    return torch.stack(cut)


def batches(
    data: Data, count: int, batch_size: int, augment: bool, seed: int, epoch: int
) -> Iterator[Split]:
    """The first ``count`` shuffled batches of an epoch: normalized images and labels.

    They depend on ``seed`` and ``epoch`` alone, so that a resumed run sees what an uninterrupted one sees.
    """
    generator = torch.Generator().manual_seed(seed + (epoch << 31))
    order = torch.randperm(len(data.train_labels), generator=generator)
    for which in order.split(batch_size)[:count]:
        images = data.train_images[which]
        if augment:
            images = _augmented(images, data.mirrored, generator)
        yield data.normalized(images), data.train_labels[which]
