"""Lion, which torch does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from braze.optim._extras import Extras, checked
from braze.optim._step import FusedStep

__all__ = ["Lion"]


class _LionInTorch(Optimizer):
    """The same in torch's operators, for what the kernels do not take."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if any(
            p.grad is not None and p.grad.is_sparse for g in self.param_groups for p in g["params"]
        ):
            raise RuntimeError("Lion does not support sparse gradients")
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = -p.grad if group["maximize"] else p.grad
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                average = state["exp_avg"]
                direction = average * beta1 + grad * (1 - beta1)
                real = torch.view_as_real(direction) if p.is_complex() else direction
                # Of NaN, which torch's sign takes for 0, it is NaN.
                real.copy_(torch.where(real.isnan(), real, real.sign()))
                p.mul_(1 - lr * group["weight_decay"]).sub_(direction * lr)
                average.mul_(beta2).add_(grad * (1 - beta2))


class Lion(FusedStep, _LionInTorch):
    r"""Lion, "evolved sign momentum", with one native call per step.

    For each parameter :math:`p` with gradient :math:`g`:

    .. math::
        g &\leftarrow \pm g + l_1\,\mathrm{sign}(p) \\
        c &= \beta_1 m + (1-\beta_1) g \\
        p &\leftarrow (1-\gamma\lambda) p - \gamma\,\mathrm{sign}(c) \\
        m &\leftarrow \beta_2 m + (1-\beta_2) g

    with sign(0) = 0, and the real and imaginary part of a complex parameter each on its own. The state is
    ``exp_avg``, m, in the parameter's dtype and layout. Dtypes, layouts, the numerics class, accumulation
    and the errors raised are those of :class:`braze.optim.Adam`. Tensor subclasses such as DTensor and
    active dispatch modes run the same formula in torch's operators.

    Args:
        params: parameters or parameter groups, as for :class:`torch.optim.Adam`.
        lr (float or Tensor): :math:`\gamma`; a third to a tenth of AdamW's is usual. Default: 1e-4.
        betas (tuple): :math:`\beta_1` and :math:`\beta_2`. Default: (0.9, 0.99).
        weight_decay (float): :math:`\lambda`, decoupled; three to ten times AdamW's is usual. Default: 0.
        maximize (bool): ascend instead. Default: False.
        capturable (bool): for CUDA graphs: ``lr``, ``betas`` and ``weight_decay`` that are tensors on the
            device are read when the graph runs. Default: False.
        **extras: the keyword-only additions of :class:`braze.optim.Adam`.

    Raises:
        ValueError, TypeError: an argument out of its range.
        RuntimeError: at a step with a sparse gradient; nothing has changed.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023.
    """

    _algorithm: ClassVar[str] = "lion"
    _torch_class: ClassVar[type[Optimizer]] = _LionInTorch

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        checked_extras = checked(type(self).__name__, extras)
        for name, value in (("learning rate", lr), ("weight_decay value", weight_decay)):
            if not 0.0 <= value:
                raise ValueError(f"Invalid {name}: {value}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
        }
        Optimizer.__init__(self, params, defaults)
        self._configure(checked_extras)
