"""Dropout as modules: torch's own, computed by braze.nn.functional, and the fused ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F  # noqa: F401  (of the source that torch.jit.script compiles)
from torch import Tensor, nn

from braze.nn import _dropout_functional as functional
from braze.nn._activation import ACTIVATIONS
from braze.nn._drop_in import DropIn, is_symbolic, leaf, scripted_as

__all__ = [
    "ActDropout",
    "AlphaDropout",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "FeatureAlphaDropout",
]


def _forward(torch_class: type[nn.Module], function: Callable[..., Tensor]) -> Any:
    @scripted_as(torch_class.forward)
    def forward(self: Any, input: Tensor) -> Tensor:
        if is_symbolic(input):
            return leaf(self, input)
        return function(input, self.p, self.training, self.inplace)

    return forward


def _not_inplace(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, p, training, _: function(input, p, training)


class Dropout(DropIn, nn.Dropout):
    """``torch.nn.Dropout`` with :func:`braze.nn.functional.dropout`: the mask is made again in the backward
    pass, not kept.

    Args, errors and state are torch's; ``p`` may not be nan (ValueError). ``torch.jit.script``
    compiles torch's.
    """

    forward = _forward(nn.Dropout, functional.dropout)


class Dropout1d(DropIn, nn.Dropout1d):
    """``torch.nn.Dropout1d`` with :func:`braze.nn.functional.dropout1d`: whole channels of (N, C, L) or
    (C, L)."""

    forward = _forward(nn.Dropout1d, functional.dropout1d)


class Dropout2d(DropIn, nn.Dropout2d):
    """``torch.nn.Dropout2d`` with :func:`braze.nn.functional.dropout2d`: whole channels of (N, C, H, W)."""

    forward = _forward(nn.Dropout2d, functional.dropout2d)


class Dropout3d(DropIn, nn.Dropout3d):
    """``torch.nn.Dropout3d`` with :func:`braze.nn.functional.dropout3d`: whole channels of (N, C, D, H, W)."""

    forward = _forward(nn.Dropout3d, functional.dropout3d)


class AlphaDropout(DropIn, nn.AlphaDropout):
    """``torch.nn.AlphaDropout`` with :func:`braze.nn.functional.alpha_dropout`; ``inplace`` is
    ignored, as by torch's."""

    forward = _forward(nn.AlphaDropout, _not_inplace(functional.alpha_dropout))


class FeatureAlphaDropout(DropIn, nn.FeatureAlphaDropout):
    """``torch.nn.FeatureAlphaDropout`` with :func:`braze.nn.functional.feature_alpha_dropout`; ``inplace`` is
    ignored, as by torch's."""

    forward = _forward(nn.FeatureAlphaDropout, _not_inplace(functional.feature_alpha_dropout))


# torch's, and those above that compute the same.
REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    kind._torch_class: kind
    for kind in (Dropout, Dropout1d, Dropout2d, Dropout3d, AlphaDropout, FeatureAlphaDropout)
}


class ActDropout(nn.modules.dropout._DropoutNd):
    """``y = dropout(activation(x), p)`` in one pass, of any shape: see :func:`braze.nn.functional.act_dropout`.

    Args:
        activation: a name, such as relu or gelu_tanh; the error for an unknown one lists all.
        p: the probability to drop.
        inplace: writes the result to the input.
        negative_slope: of leaky_relu.
        alpha: of elu.

    Raises:
        ValueError: there is no such activation, or ``p`` is not in [0, 1].
    """

    def __init__(
        self,
        activation: str = "relu",
        p: float = 0.5,
        inplace: bool = False,
        *,
        negative_slope: float = 0.01,
        alpha: float = 1.0,
    ) -> None:
        super().__init__(p, inplace)
        functional.check_activation(activation)
        self.activation = activation
        self.negative_slope = negative_slope
        self.alpha = alpha

    def forward(self, input: Tensor) -> Tensor:
        if is_symbolic(input):
            return leaf(self, input)
        return functional.act_dropout(
            input,
            self.activation,
            self.p,
            self.training,
            self.inplace,
            negative_slope=self.negative_slope,
            alpha=self.alpha,
        )

    def extra_repr(self) -> str:
        name = ACTIVATIONS[self.activation].parameter
        parameter = f", {name}={getattr(self, name)}" if name else ""
        return f"{self.activation}{parameter}, {super().extra_repr()}"


class DropoutAdd(nn.modules.dropout._DropoutNd):
    """``y = dropout(x, p) + residual`` in one pass: see :func:`braze.nn.functional.dropout_add`.

    ``forward(input, residual)``: tensors of any shape, the same for both; a residual of another shape or dtype
    is added as torch adds it.

    Args:
        p: the probability to drop.

    Raises:
        ValueError: ``p`` is not in [0, 1].
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        if is_symbolic(input):
            return leaf(self, input, residual)
        return functional.dropout_add(input, residual, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
