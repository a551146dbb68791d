"""Convolution, batch norm, a sum and an activation as one module: ConvBNAct1d/2d/3d, ConvBNReLU1d/2d/3d."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as _hooked

from braze.nn._activation import ActivationLike, has_hooks, resolve
from braze.nn._conv_bn import conv_bn_act
from braze.nn._folded import distrust, drop_folded
from braze.nn._route import is_plain
from braze.nn.batch_norm import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    FusedBatchNormAct,
)

__all__ = [
    "ConvBNAct1d",
    "ConvBNAct2d",
    "ConvBNAct3d",
    "ConvBNReLU1d",
    "ConvBNReLU2d",
    "ConvBNReLU3d",
]


class FusedConv(nn.Module):
    """What all ConvBNAct and ConvBNReLU classes have in common."""

    _conv: ClassVar[type[Any]]
    _batch_norm: ClassVar[type[FusedBatchNormAct]]

    conv: Any
    bn: FusedBatchNormAct

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: ActivationLike = "relu",
        negative_slope: float = 0.01,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        resolve(activation, negative_slope)  # to fail before anything is allocated
        super().__init__()
        self.conv = self._conv(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.bn = self._batch_norm(
            out_channels,
            eps,
            momentum,
            affine,
            track_running_stats,
            activation=activation,
            negative_slope=negative_slope,
            device=device,
            dtype=dtype,
        )

    def train(self, mode: bool = True) -> Any:
        """As :meth:`torch.nn.Module.train`; folded weights are dropped, by ``eval()`` on CUDA."""
        (drop_folded if mode else distrust)(self.conv)
        return super().train(mode)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, bn = self.conv, self.bn
        result: Tensor
        if is_plain(input) and type(bn) is self._batch_norm and not has_hooks(bn) and not _hooked():
            result = conv_bn_act(conv, bn, input, bn.activation, bn.activation_parameter, residual)
        else:
            output = conv(input)
            result = bn(output) if residual is None else bn(output, residual)
        return result


class ConvBNAct1d(FusedConv):
    r"""activation(batch_norm(conv(input)) + residual) of [N, C, L]; see :class:`ConvBNAct2d`."""

    _conv = nn.Conv1d
    _batch_norm = BatchNormAct1d


class ConvBNAct2d(FusedConv):
    r"""Convolution, batch norm, a sum and an activation: ``forward(input, residual=None)`` gives
    activation(bn(conv(input)) + residual).

    The children are a :class:`torch.nn.Conv2d` named ``conv`` and a :class:`BatchNormAct2d` named ``bn``, and
    the ``state_dict`` is theirs: ``conv.weight``, ``bn.weight``, ``bn.running_mean`` and so on. The convolution
    is torch's own (oneDNN, cuDNN); all after it is two passes forward and two backward. On CUDA, 1x1 and 3x3
    convolutions in training can be braze's, where ``BRAZE_CONV`` or its file of choices says so: then the
    statistics come out of the convolution, and what is after it is one pass forward.

    A ``bias`` of the convolution is not added in training, as the batch's mean would take it away again: the
    running mean accounts for it, and its gradient is exactly zero. With running statistics (``eval()``, also
    of ``bn`` alone in a training model), hooks or a parametrized convolution, it is added.

    With running statistics and no gradients wanted (``torch.no_grad``, ``torch.inference_mode``), the batch
    norm of a 2d module is folded into the convolution's weights. On the CPU the module is one call of oneDNN.
    On CUDA it is a convolution and one kernel, or, with ReLU, one call of cuDNN if that is the faster of the
    two: both are timed once per convolution, shape, dtype and memory format. Folded weights are kept until a
    parameter or a running statistic changes or ``train()`` is called. Every change counts on the CPU, where
    they are read at each call; on CUDA what is written through ``.data`` is seen after the next ``eval()``. A
    captured graph computes the batch norm at every replay, unless all parameters are frozen
    (``requires_grad_(False)``) and the module was called once before: then it goes on with the weights folded
    by then, whatever becomes of the parameters.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as
            :class:`torch.nn.Conv2d`; ``bias`` is False by default.
        eps, momentum, affine, track_running_stats: as :class:`torch.nn.BatchNorm2d`.
        activation, negative_slope: as :class:`BatchNormAct2d`.
        device, dtype: of all parameters.

    Shapes and dtypes: as :class:`torch.nn.Conv2d` and :class:`BatchNormAct2d`; ``residual`` as the result.

    Raises:
        ValueError, TypeError, RuntimeError: as the two.
    """

    _conv = nn.Conv2d
    _batch_norm = BatchNormAct2d


class ConvBNAct3d(FusedConv):
    r"""activation(batch_norm(conv(input)) + residual) of [N, C, D, H, W]; see :class:`ConvBNAct2d`."""

    _conv = nn.Conv3d
    _batch_norm = BatchNormAct3d


class FusedConvReLU(FusedConv):
    """Mixin in front of a ConvBNAct class: the activation is ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            activation="relu",
            device=device,
            dtype=dtype,
        )


class ConvBNReLU1d(FusedConvReLU, ConvBNAct1d):
    r"""relu(batch_norm(conv(input)) + residual) of [N, C, L]; see :class:`ConvBNAct2d`."""


class ConvBNReLU2d(FusedConvReLU, ConvBNAct2d):
    r"""relu(batch_norm(conv(input)) + residual) of [N, C, H, W]; see :class:`ConvBNAct2d`."""


class ConvBNReLU3d(FusedConvReLU, ConvBNAct3d):
    r"""relu(batch_norm(conv(input)) + residual) of [N, C, D, H, W]; see :class:`ConvBNAct2d`."""
