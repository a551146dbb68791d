"""Classification scores from a confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Accuracy, macro precision and macro recall, each a fraction between 0 and 1."""

    accuracy: float
    precision: float
    recall: float


def confusion_matrix(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Count how often each class was taken for each other.

    Args:
        truth: class indices, shape (N,), int64.
        predicted: class indices, shape (N,), int64.
        classes: the number of classes K.

    Returns:
        An int64 tensor of shape (K, K); row: the true class, column: the predicted one.

    Raises:
        ValueError: the shapes differ.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"{tuple(truth.shape)} true and {tuple(predicted.shape)} predicted labels")
    counts = torch.bincount(truth * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


def scores(confusion: Tensor) -> Scores:
    """Return the scores of a confusion matrix (rows: truth, columns: prediction).

    Precision and recall are means over the classes with equal weight; a class that was never
    predicted has precision 0, a class without examples has recall 0.
    """
    counts = confusion.to(torch.float64)
    hits = counts.diagonal()
    # Where the denominator is 0 the numerator is 0 too, so clamping gives 0.
    precision = hits / counts.sum(dim=0).clamp(min=1)
    recall = hits / counts.sum(dim=1).clamp(min=1)
    accuracy = hits.sum() / counts.sum().clamp(min=1)
    return Scores(float(accuracy), float(precision.mean()), float(recall.mean()))
