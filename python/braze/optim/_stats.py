"""What grad_stats() tells of a parameter."""

from __future__ import annotations

from typing import NamedTuple


class GradStats(NamedTuple):
    """Of one parameter's gradient at a step, before clipping, and of the update that came of it.

    A complex gradient counts as its real and imaginary parts.
    """

    norm: float
    """2-norm."""
    largest: float
    """Largest magnitude; NaN does not count."""
    zeros: float
    """Fraction of elements that are exactly 0."""
    non_finite: int
    """Elements that are infinite or NaN."""
    update_ratio: float
    """2-norm of the parameter's change over that of the parameter before; infinite where
    that was 0, NaN where both are."""
