"""AdamW, torch-compatible."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.optim.adamw import AdamW as TorchAdamW
from torch.optim.adamw import adamw as adamw
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from braze.optim._extras import Extras
from braze.optim.adam import Adam

__all__ = ["AdamW", "adamw"]


class AdamW(Adam, TorchAdamW):
    r"""Adam with decoupled weight decay; a drop-in for :class:`torch.optim.AdamW`.

    As :class:`braze.optim.Adam`, but :math:`p \leftarrow (1-\gamma\lambda) p` replaces the term
    :math:`\lambda p` in the gradient. ``weight_decay`` defaults to 1e-2. Dtypes, numerics, the keyword-only
    additions (``**extras``), the differences from torch and the errors
    raised are those of :class:`braze.optim.Adam`; ``l1`` acts through the gradient, not decoupled.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017; ``torch.optim.AdamW``.
    """

    _torch_class: ClassVar[type[Optimizer]] = TorchAdamW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **extras,
        )
