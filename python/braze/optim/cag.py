"""Cumulative-gradient descent."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from braze.optim._extras import Extras
from braze.optim.sgd import SGD

__all__ = ["CAG"]


class CAG(SGD):
    r"""Cumulative-gradient descent: one update from the sum of J micro-batch gradients.

    .. math::
        \theta \leftarrow \theta_0 - \gamma \sum_{j=1}^{J} g_j(\theta_0)

    All J gradients are taken at the same :math:`\theta_0`: call ``backward()`` and ``step()`` once per
    micro-batch; the J-th ``step()`` updates, and ``updated`` tells. With momentum :math:`\mu`,
    :math:`b \leftarrow \mu b + \sum_j g_j` and :math:`\theta \leftarrow \theta_0 - \gamma b`, where b decays
    once per window: the gradients are added straight into b (fp32 and fp64 parameters), which is exact
    and needs no buffer for the sum; 16-bit parameters sum in fp32 first. Weight decay
    :math:`\lambda\theta_0` and :math:`l_1\,\mathrm{sign}(\theta_0)` enter once per update.

    Because the sum is not divided, the step length grows with J: for a given ``lr`` of SGD on the mean
    gradient, use ``lr / J``, or ``accumulation="mean"``.

    A checkpoint taken within a window resumes bit for bit here; torch.optim.SGD can load it, but would take
    the gradients already in b for momentum.

    Args:
        params: parameters or parameter groups, as for :class:`torch.optim.SGD`.
        lr (float or Tensor): :math:`\gamma`.
        accumulation_steps (int): J. Default: 4.
        accumulation (str): "sum" as in the formula, or "mean". Default: "sum".
        momentum (float): :math:`\mu`. Default: 0. With ``max_grad_norm`` or ``collect_grad_stats`` the sum has
            a buffer of its own, for it has to be measured.
        weight_decay (float): :math:`\lambda`. Default: 0.
        maximize (bool): ascend instead. Default: False.
        **extras: the other keyword-only additions of :class:`braze.optim.Adam`.

    Raises:
        ValueError, TypeError: as :class:`braze.optim.SGD`.
    """

    _folds_momentum: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0,
        weight_decay: float = 0,
        maximize: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay=weight_decay,
            maximize=maximize,
            **cast(Extras, {"accumulation_steps": 4, "accumulation": "sum", **extras}),
        )
