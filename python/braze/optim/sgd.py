"""SGD, torch-compatible."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.sgd import SGD as TorchSGD
from torch.optim.sgd import sgd as sgd
from typing_extensions import Unpack

from braze.optim._extras import Extras, checked
from braze.optim._step import FusedStep

__all__ = ["SGD", "sgd"]


class SGD(FusedStep, TorchSGD):
    r"""Stochastic gradient descent; a drop-in for :class:`torch.optim.SGD` with one native call per step.

    For each parameter :math:`p` with gradient :math:`g`, momentum :math:`\mu` and dampening :math:`\tau`:

    .. math::
        g &\leftarrow \pm g + \lambda p + l_1\,\mathrm{sign}(p) \\
        b &\leftarrow \mu b + (1-\tau) g \quad (b = g \text{ the first time}) \\
        p &\leftarrow p - \gamma \,(g + \mu b \text{ if nesterov, else } b)

    Arguments, state, ``state_dict`` and hooks are torch's. Dtypes, layouts, the numerics class, the
    keyword-only additions (``**extras``), the differences from torch
    and the errors raised are those of :class:`braze.optim.Adam`. A momentum buffer has the parameter's
    dtype and layout; on an overflow found by a GradScaler not even a first one appears.

    Keyword-only besides those:

    Args:
        capturable (bool): for CUDA graphs: ``lr``, ``momentum``, ``dampening`` and ``weight_decay`` that are
            tensors on the device are read when the graph runs, so that a schedule may change them between
            replays. Default: False.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013;
    ``torch.optim.SGD``.
    """

    _algorithm: ClassVar[str] = "sgd"
    _torch_class: ClassVar[type[Optimizer]] = TorchSGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        checked_extras = checked(type(self).__name__, extras)
        TorchSGD.__init__(
            self,
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._configure(checked_extras, **({"capturable": True} if capturable else {}))
