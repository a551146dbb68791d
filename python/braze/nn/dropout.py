"""Dropout as modules: torch's own, computed by braze.nn.functional, and the fused ones."""

from __future__ import annotations

from torch import Tensor, nn

from braze.nn import _dropout_functional as functional

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


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` with ``braze.nn.functional.dropout``: the mask is made again in the backward
    pass, not kept.

    Args, errors and state are torch's; ``p`` may not be nan (ValueError).
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(nn.Dropout1d):
    """``torch.nn.Dropout1d`` with ``braze.nn.functional.dropout1d``: whole channels of (N, C, L) or (C, L)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(nn.Dropout2d):
    """``torch.nn.Dropout2d`` with ``braze.nn.functional.dropout2d``: whole channels of (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(nn.Dropout3d):
    """``torch.nn.Dropout3d`` with ``braze.nn.functional.dropout3d``: whole channels of (N, C, D, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(nn.AlphaDropout):
    """``torch.nn.AlphaDropout`` with ``braze.nn.functional.alpha_dropout``; ``inplace`` is
    ignored, as by torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(nn.FeatureAlphaDropout):
    """``torch.nn.FeatureAlphaDropout`` with ``braze.nn.functional.feature_alpha_dropout``; ``inplace`` is
    ignored, as by torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.feature_alpha_dropout(input, self.p, self.training)


# torch's, and those above that compute the same.
REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
    nn.AlphaDropout: AlphaDropout,
    nn.FeatureAlphaDropout: FeatureAlphaDropout,
}


class ActDropout(nn.modules.dropout._DropoutNd):
    """``y = dropout(activation(x), p)`` in one pass, of any shape: see ``braze.nn.functional.act_dropout``.

    Args:
        activation: identity, relu, relu6, leaky_relu, elu, sigmoid, tanh, silu, gelu, gelu_tanh, hardswish,
            hardsigmoid or mish.
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
        parameter = {
            "leaky_relu": f", negative_slope={self.negative_slope}",
            "elu": f", alpha={self.alpha}",
        }
        return f"{self.activation}{parameter.get(self.activation, '')}, {super().extra_repr()}"


class DropoutAdd(nn.modules.dropout._DropoutNd):
    """``y = dropout(x, p) + residual`` in one pass: see ``braze.nn.functional.dropout_add``.

    Args:
        p: the probability to drop.

    Raises:
        ValueError: ``p`` is not in [0, 1].
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return functional.dropout_add(input, residual, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
