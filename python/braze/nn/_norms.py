"""Which modules are batch norms, whoever wrote them, and how to call the kernels for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from braze.nn._activation import Activation, resolve
from braze.nn._route import BatchNormArguments
from braze.nn.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    FusedBatchNorm,
)

__all__ = [
    "NORMS",
    "REPLACED",
    "arguments_of",
    "full_name",
    "is_batch_norm",
    "norm_activation",
    "same_norm",
]

# torch's batch norms and ours, whose forward computes the same.
REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_IDENTITY = Activation("identity")
# Normalise and do nothing else.
NORMS = frozenset(REPLACED) | frozenset(REPLACED.values())
_OURS = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _own(module: Any) -> Activation:
    return Activation(module.activation, module.activation_parameter)


def _of_timm(module: Any) -> Activation | None:
    """timm's BatchNormAct2d: batch norm, a drop layer that is nearly always nothing, an activation."""
    if type(module.drop) is not nn.Identity:
        return None
    try:
        return resolve(module.act)
    except (TypeError, ValueError):
        return None


_ACTIVATION: dict[type, Callable[[Any], Activation | None]] = {
    **{kind: lambda module: _IDENTITY for kind in NORMS},
    **{kind: _own for kind in _OURS},
}
_NAMED: dict[str, Callable[[Any], Activation | None]] = {
    "timm.layers.norm_act.BatchNormAct2d": _of_timm,
    "torchvision.ops.misc.FrozenBatchNorm2d": lambda module: _IDENTITY,
}
_FROZEN = "torchvision.ops.misc.FrozenBatchNorm2d"


def norm_activation(module: nn.Module) -> Activation | None:
    """The activation that the batch norm ``module`` ends with itself, identity in general; None: it is none."""
    kind = type(module)
    own = _ACTIVATION.get(kind)
    if own is None:
        own = _NAMED.get(full_name(kind))
        if own is None:
            return None
        _ACTIVATION[kind] = own
    return own(module)


def same_norm(own: Activation) -> Callable[[nn.Module], bool]:
    """A condition: the module is a batch norm that ends with this activation."""

    def holds(module: nn.Module) -> bool:
        if type(module) in NORMS:
            return own == _IDENTITY
        return norm_activation(module) == own

    return holds


def is_batch_norm(module: object) -> bool:
    """Whether it is one that can take the batch's statistics."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        norm_activation(module) is not None
    )


def _frozen_arguments(module: Any, input: Tensor) -> BatchNormArguments:
    return (
        input,
        module.weight,
        module.bias,
        module.running_mean,
        module.running_var,
        None,
        False,
        0.0,
        module.eps,
    )


def arguments_of(module: Any, input: Tensor) -> BatchNormArguments:
    """The operators' first arguments for a batch norm. Raises what its own forward raises."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _frozen_arguments(module, input)
    module._check_input_dim(input)
    return FusedBatchNorm._arguments(module, input)  # type: ignore[arg-type]
