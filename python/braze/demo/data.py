"""The data sets of the demo and the batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .augment import augment
from .config import DemoError


@dataclass(frozen=True)
class Data:
    """A data set in memory.

    Images have shape (N, C, S, S); multiplied by ``scale`` they lie in [0, 1]. Labels have
    shape (N,), int64. ``mean`` and ``std`` have shape (1, C, 1, 1), of the scaled images.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    scale: float
    mean: Tensor
    std: Tensor
    classes: int = 10

    @property
    def channels(self) -> int:
        """The number of channels of an image."""
        return self.train_images.shape[1]

    @property
    def size(self) -> int:
        """The width and height of an image, in pixels."""
        return self.train_images.shape[2]

    def normalized(self, scaled: Tensor) -> Tensor:
        """Return images in [0, 1] with zero mean and unit variance per channel."""
        return (scaled - self.mean) / self.std


def _make(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], scale: float
) -> Data:
    sample = train[0][:10_000].to(torch.float32) * scale
    mean = sample.mean(dim=(0, 2, 3), keepdim=True)
    std = sample.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-3)
    return Data(name, *train, *test, scale=scale, mean=mean, std=std)


def _digits() -> Data:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DemoError(
            f"scikit-learn, which brings the digits, cannot be imported ({error}); "
            "pip install scikit-learn matplotlib"
        ) from error
    images, labels = load_digits(return_X_y=True)
    # The split stays the same whatever --seed is, so that accuracies can be compared.
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_x, test_x = (torch.from_numpy(x).float().reshape(-1, 1, 8, 8) for x in parts[:2])
    train_y, test_y = (torch.from_numpy(y).long() for y in parts[2:])
    return _make("digits", (train_x, train_y), (test_x, test_y), 1.0 / 16.0)


def _from_torchvision(name: str, root: Path) -> Data:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DemoError(
            f"--data {name} needs torchvision, which cannot be imported ({error}); "
            "pip install torchvision"
        ) from error
    if name == "mnist":
        kind, folder = datasets.MNIST, root / "MNIST" / "raw"
    else:
        kind, folder = datasets.CIFAR10, root / "cifar-10-batches-py"
    parts: list[tuple[Tensor, Tensor]] = []
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
        parts.append((images.contiguous(), torch.as_tensor(part.targets).long()))
    return _make(name, parts[0], parts[1], 1.0 / 255.0)


def load(name: str, root: Path | None) -> Data:
    """Load a data set.

    Args:
        name: ``"digits"`` (1,797 images of 8x8, in scikit-learn), ``"mnist"`` or ``"cifar10"``
            (both through torchvision, never downloaded).
        root: the folder of the files of mnist and cifar10.

    Raises:
        DemoError: a library is not installed, or the files are not there.
    """
    if name == "digits":
        return _digits()
    if root is None:
        raise DemoError(f"--data {name} needs --root DIR, its folder")
    return _from_torchvision(name, root)


def batches_per_epoch(images: int, batch_size: int, accumulation_steps: int) -> int:
    """Return how many whole batches an epoch uses: a multiple of ``accumulation_steps``.

    Raises:
        DemoError: not even one update fits into an epoch.
    """
    whole = images // batch_size // accumulation_steps * accumulation_steps
    if whole == 0:
        raise DemoError(
            f"one update takes {batch_size * accumulation_steps} images (--batch-size "
            f"{batch_size} x --accumulation-steps {accumulation_steps}), the training split has "
            f"{images}: lower one of them"
        )
    return whole


def batches(
    data: Data, count: int, batch_size: int, names: tuple[str, ...], seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the shuffled, augmented, normalized training batches of one epoch.

    The order and the augmentation depend on ``seed`` and ``epoch`` alone, so that a resumed
    run sees what an uninterrupted one sees.

    Args:
        data: the data set.
        count: how many batches to yield.
        batch_size: images per batch, B.
        names: the augmentations; see :func:`braze.demo.augment.augment`.
        seed: the seed of the run, below 2**31.
        epoch: the number of the epoch, from 1.

    Yields:
        Images of shape (B, C, S, S), float32, and labels of shape (B,), int64, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed + (epoch << 31))
    order = torch.randperm(data.train_labels.shape[0], generator=generator)
    for index in range(count):
        which = order[index * batch_size : (index + 1) * batch_size]
        scaled = data.train_images[which].to(torch.float32) * data.scale
        images = data.normalized(augment(scaled, names, generator))
        yield images, data.train_labels[which]
