"""BatchNorm1d/2d/3d as torch's, and BatchNormAct1d/2d/3d with an activation and a sum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: F401  (of the source that torch.jit.script compiles)
import torch.nn.modules.batchnorm as torch_batchnorm
from torch import Tensor

from braze.nn._activation import ACTIVATIONS, ActivationLike, resolve
from braze.nn._batch_norm_functional import run
from braze.nn._drop_in import DropIn, is_symbolic, leaf, scripted_as
from braze.nn._route import Norm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]


class FusedBatchNorm(torch_batchnorm._BatchNorm):
    """Mixin in front of a torch batch-norm class: replaces ``forward``."""

    activation: str = "identity"
    activation_parameter: float = 0.0

    @scripted_as(torch_batchnorm._BatchNorm.forward)
    def forward(self, input: Tensor) -> Tensor:
        return self._normalize(input, None)

    def _normalize(self, input: Tensor, residual: Tensor | None) -> Tensor:
        if is_symbolic(input):
            return leaf(self, input) if residual is None else leaf(self, input, residual)
        self._check_input_dim(input)
        norm, training = self._norm()
        result = run(input, norm, training, self.activation, self.activation_parameter, residual)
        assert isinstance(result, Tensor)
        return result

    def _norm(self) -> tuple[Norm, bool]:
        """What this call normalises with, and whether with the batch's statistics."""
        # Straight from where they usually are: six times nn.Module.__getattr__ takes as long as a small kernel.
        parameters, buffers = self._parameters, self._buffers
        running_mean = buffers["running_mean"] if "running_mean" in buffers else self.running_mean
        running_var = buffers["running_var"] if "running_var" in buffers else self.running_var
        num_batches_tracked = None
        training = self.training
        if not training:
            training = running_mean is None and running_var is None
        elif self.track_running_stats:
            num_batches_tracked = self.num_batches_tracked
        else:
            running_mean = running_var = None
        momentum = self.momentum
        if momentum is None and num_batches_tracked is None:
            momentum = 0.0
        norm = Norm(
            parameters["weight"] if "weight" in parameters else self.weight,
            parameters["bias"] if "bias" in parameters else self.bias,
            running_mean,
            running_var,
            num_batches_tracked,
            momentum,
            self.eps,
        )
        return norm, training


class BatchNorm1d(DropIn, FusedBatchNorm, torch.nn.BatchNorm1d):
    r"""Batch normalisation of [N, C] or [N, C, L]; a drop-in for :class:`torch.nn.BatchNorm1d`.

    .. math::
        y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    Arguments, attributes, ``state_dict`` and errors are torch's. fp32, fp64, bf16 and fp16 on the CPU and on
    CUDA devices, in any layout; parameters and running statistics in fp32 or the input's dtype. Two passes
    over the input forward and two backward; ``num_batches_tracked`` is counted by the kernel, also with
    ``momentum=None``, which never waits for the device. The same bits for any number of threads.

    Differences from torch: rounding. ``torch.jit.script`` and ``torch.jit.trace``, export, ``torch.func``
    transforms, forward-mode AD, and inputs of other dtypes, layouts, devices or tensor subclasses run torch's
    own code. ``isinstance(module, BatchNorm1d)`` holds for torch's, too.

    Raises:
        ValueError, RuntimeError: what torch's module raises, in its words.
        RuntimeError: the input is on a CUDA device and braze has no CUDA kernels here.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015; ``torch.nn.BatchNorm1d``.
    """


class BatchNorm2d(DropIn, FusedBatchNorm, torch.nn.BatchNorm2d):
    r"""Batch normalisation of [N, C, H, W]; a drop-in for :class:`torch.nn.BatchNorm2d`.

    Contiguous and channels-last inputs are equally at home. All else is as for :class:`BatchNorm1d`.
    """


class BatchNorm3d(DropIn, FusedBatchNorm, torch.nn.BatchNorm3d):
    r"""Batch normalisation of [N, C, D, H, W]; a drop-in for :class:`torch.nn.BatchNorm3d`.

    Contiguous and channels-last inputs are equally at home. All else is as for :class:`BatchNorm1d`.
    """


class LazyBatchNorm1d(DropIn, torch.nn.LazyBatchNorm1d):
    """``torch.nn.LazyBatchNorm1d`` that becomes a :class:`BatchNorm1d`."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(DropIn, torch.nn.LazyBatchNorm2d):
    """``torch.nn.LazyBatchNorm2d`` that becomes a :class:`BatchNorm2d`."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(DropIn, torch.nn.LazyBatchNorm3d):
    """``torch.nn.LazyBatchNorm3d`` that becomes a :class:`BatchNorm3d`."""

    cls_to_become = BatchNorm3d


class FusedBatchNormAct(FusedBatchNorm):
    """What the three BatchNormAct classes have in common."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: ActivationLike = "relu",
        negative_slope: float = 0.01,
        device: Any = None,
        dtype: Any = None,
        bias: bool = True,
    ) -> None:
        name, parameter = resolve(activation, negative_slope)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:
            self.register_parameter("bias", None)
        self.activation, self.activation_parameter = name, parameter

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._normalize(input, residual)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {activation_repr(self)}"


def activation_repr(module: Any) -> str:
    """``activation='leaky_relu', negative_slope=0.2``."""
    text = f"activation={module.activation!r}"
    name = ACTIVATIONS[module.activation].parameter
    return f"{text}, {name}={module.activation_parameter}" if name else text


class BatchNormAct1d(FusedBatchNormAct, torch.nn.BatchNorm1d):
    r"""Batch normalisation, a sum and an activation of [N, C] or [N, C, L] in one.

    ``forward(input, residual=None)`` gives

    .. math::
        y = \mathrm{activation}\Big(
            \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta + \mathrm{residual}\Big)

    in two passes forward and two backward, which save ``input`` and at most one bit per element, or
    ``residual``. A :class:`torch.nn.BatchNorm1d` with the same ``state_dict``; ``activation`` is no part of it.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: torch's.
        activation: a name, such as relu or gelu_tanh (the error for an unknown one lists all); or None; or the
            torch.nn module or torch.nn.functional function of one of them, whose own parameters (slope, alpha,
            approximate) count and whose ``inplace`` does not.
        negative_slope: of leaky_relu given by name or function.

    Shapes and dtypes: as :class:`BatchNorm1d`; ``residual`` as ``input``, another dtype is promoted and another
    shape broadcast as torch's addition would. The result is in ``input``'s memory format.

    Raises:
        ValueError: an activation that cannot be fused; otherwise as :class:`BatchNorm1d`.
        TypeError: one that is no activation at all.
        RuntimeError: as :class:`BatchNorm1d`.

    Differences from torch's three modules: the value between them is not rounded to 16 bits;
    ``torch.jit.script`` does not take it (trace or export it, or script the three).
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` knows no activation and would lose it: use
    :func:`braze.nn.convert_sync_batchnorm`, which is also that of ``braze.nn.SyncBatchNorm``.
    """


class BatchNormAct2d(FusedBatchNormAct, torch.nn.BatchNorm2d):
    r"""activation(batch_norm(input) + residual) of [N, C, H, W]; see :class:`BatchNormAct1d`.

    Contiguous and channels-last inputs are equally at home.
    """


class BatchNormAct3d(FusedBatchNormAct, torch.nn.BatchNorm3d):
    r"""activation(batch_norm(input) + residual) of [N, C, D, H, W]; see :class:`BatchNormAct1d`.

    Contiguous and channels-last inputs are equally at home.
    """
