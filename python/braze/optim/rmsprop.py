"""RMSprop, torch-compatible."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.rmsprop import RMSprop as TorchRMSprop
from torch.optim.rmsprop import rmsprop as rmsprop
from typing_extensions import Unpack

from braze.optim._extras import Extras, checked
from braze.optim._step import FusedStep

__all__ = ["RMSprop", "rmsprop"]


class RMSprop(FusedStep, TorchRMSprop):
    r"""RMSprop; a drop-in for :class:`torch.optim.RMSprop` with one native call per step.

    For each parameter :math:`p` with gradient :math:`g`:

    .. math::
        g &\leftarrow \pm g + \lambda p + l_1\,\mathrm{sign}(p) \\
        v &\leftarrow \alpha v + (1-\alpha) g^2, \qquad a \leftarrow \alpha a + (1-\alpha) g \\
        d &= g / (\sqrt{v - a^2 \text{ if centered, else } v} + \epsilon),
            \qquad b \leftarrow \mu b + d \\
        p &\leftarrow p - \gamma \,(b \text{ if } \mu > 0, \text{ else } d)

    Arguments, state, ``state_dict`` and hooks are torch's. Dtypes, layouts, the numerics class, the
    keyword-only additions (``**extras``), the differences from torch
    and the errors raised are those of :class:`braze.optim.Adam`. Besides them: where rounding takes
    :math:`v - a^2` below zero it counts as zero (torch's parameter becomes NaN), and with
    ``capturable=True`` ``lr``, ``momentum`` and ``weight_decay`` that are tensors on the device are read
    when a CUDA graph runs.

    Source: Hinton, "Neural Networks for Machine Learning", lecture 6e, 2012; Graves, "Generating Sequences
    With Recurrent Neural Networks", 2013, for ``centered``; ``torch.optim.RMSprop``.
    """

    _algorithm: ClassVar[str] = "rmsprop"
    _torch_class: ClassVar[type[Optimizer]] = TorchRMSprop

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        checked_extras = checked(type(self).__name__, extras)
        TorchRMSprop.__init__(
            self,
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )
        self._configure(checked_extras)
