"""Which modules are batch norms, whoever wrote them, and how to call the kernels for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from braze.nn._activation import Activation, resolve
from braze.nn._route import Norm
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
    "full_name",
    "is_batch_norm",
    "norm_activation",
    "norm_of",
    "same_norm",
    "why_not",
]

# torch's batch norms and ours, whose forward computes the same.
REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    kind._torch_class: kind for kind in (BatchNorm1d, BatchNorm2d, BatchNorm3d)
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


# What a subclass may define anew and still be the batch norm it is made from: how it is made, printed, stored.
_HARMLESS = frozenset(
    ("extra_repr", "reset_parameters", "reset_running_stats", "_load_from_state_dict", "_version")
) | {"_abc_impl"}
_SPECIAL = frozenset(("__call__", "__getattr__", "__getattribute__", "__setattr__"))
_READ = frozenset(
    ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "eps", "momentum")
) | {"training", "affine", "track_running_stats", "num_features"}


def _base(kind: type) -> tuple[Callable[[Any], Activation | None] | None, set[str]]:
    """What the batch norm that ``kind`` derives from ends with, if it is one, and what ``kind`` has in the
    place of what that one computes with."""
    changed: set[str] = set()
    for base in kind.__mro__:
        own = _ACTIVATION.get(base) or _NAMED.get(full_name(base))
        if own is not None:
            known = set(dir(base)) - _HARMLESS
            return own, {
                name
                for name in changed
                if name in _READ | _SPECIAL or (name in known and not name.startswith("__"))
            }
        changed |= vars(base).keys()
    return None, set()


def norm_activation(module: nn.Module) -> Activation | None:
    """The activation that the batch norm ``module`` ends with itself, identity in general; None: it is none."""
    kind = type(module)
    own = _ACTIVATION.get(kind)
    if own is None:
        own, changed = _base(kind)
        if own is None or changed:
            return None
        _ACTIVATION[kind] = own
    return own(module)


def why_not(module: nn.Module) -> str:
    """Why this batch norm cannot be fused."""
    kind = type(module)
    _, changed = _base(kind)
    reason = f"{kind.__name__} is not a batch norm that can be fused"
    return f"{reason}: it has {', '.join(sorted(changed))} of its own" if changed else reason


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


def norm_of(module: Any, input: Tensor) -> tuple[Norm, bool]:
    """What a batch norm normalises with, and whether with the batch's statistics. Raises what its own forward
    raises for this input."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        frozen = (module.weight, module.bias, module.running_mean, module.running_var)
        return Norm(*frozen, None, 0.0, module.eps), False
    module._check_input_dim(input)
    return FusedBatchNorm._norm(module)  # type: ignore[arg-type]
