"""Adam, torch-compatible."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.optim.adam import Adam as TorchAdam
from torch.optim.adam import adam as adam
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from braze.optim._extras import Extras, checked
from braze.optim._step import FusedStep

__all__ = ["Adam", "adam"]


class Adam(FusedStep, TorchAdam):
    r"""Adam; a drop-in for :class:`torch.optim.Adam` with one native call per step.

    For each parameter :math:`p` with gradient :math:`g` at its step :math:`t`:

    .. math::
        g &\leftarrow \pm g + \lambda p + l_1\,\mathrm{sign}(p) \\
        m &\leftarrow \beta_1 m + (1-\beta_1) g, \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        p &\leftarrow p - \frac{\gamma}{1-\beta_1^t} \cdot
            \frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}

    with the running maximum of :math:`v` in its place if ``amsgrad``; decoupled decay multiplies p by
    :math:`1-\gamma\lambda` instead of adding :math:`\lambda p` to the gradient.

    Arguments, state, ``state_dict`` and hooks are torch's. fp32, fp64, bf16, fp16 and complex parameters on
    the CPU and on CUDA devices, in any strided layout and any mix, one launch per device and step; 16-bit
    types compute in fp32 and round once. The gradient's dtype may differ from the parameter's. Bit-exact
    class: the same bits for any number of threads, on any CPU and GPU.

    On CUDA, step counts are on the CPU as torch's are, or on the device with ``fused=True`` or
    ``capturable=True``. As torch's, the step takes a GradScaler's scaled gradients with ``fused=True`` only;
    where the counts are on the device, scale and overflow flag are not waited for then. With
    ``capturable=True`` a step can be captured into a CUDA graph, after one step outside it; ``lr``, ``betas``
    and ``weight_decay`` that are tensors on the device are read when the graph runs.

    Keyword-only additions, whose defaults reproduce torch:

    Args:
        l1 (float): adds ``l1 * sign(p)`` to the gradient, sign(0) = 0, real and imaginary parts separately;
            may be set per parameter group. Default: 0.
        accumulation_steps (int): J calls of ``step()`` make one update; the first J-1 fold the gradients
            into an fp32 accumulator and set ``.grad`` to None. A call without any gradient counts as one
            whose gradients are zero. A micro-batch that a GradScaler found to overflow does not count; call
            ``zero_grad()`` then, as with torch. What a learning-rate schedule counts is its own
            ``scheduler.step()``: call that only when ``updated`` is True, or give it J times the horizon.
            The rate in force at the J-th call is used. Default: 1.
        accumulation (str): "mean" divides the accumulated gradient by the sum of the weights, "sum" does
            not. Default: "mean".
        max_grad_norm (float, optional): c; the gradient, as accumulated and unscaled, is multiplied by
            :math:`\min(1, c / (\|g\| + 10^{-6}))` before penalties and decay, where g are all gradients of the
            optimizer together: ``torch.nn.utils.clip_grad_norm_`` before the step, but ``.grad`` stays as it
            is. One pass more that reads the gradients, and no wait for a device; ``grad_norm`` has the norm.
            ``float("inf")`` only measures. Where the norm is not finite, as torch. May be changed between
            steps. Default: None.
        error_if_nonfinite (bool): raise RuntimeError, before anything is changed, if that norm is not finite;
            waits for the device. Default: False.
        ema_decay (float or callable, optional): d; keeps ``state[p]["ema"]``, a running average of each
            parameter, in the pass that updates it: a copy at the first update, then
            :math:`e \leftarrow e + (1-d)(p - e)`, as ``torch.optim.swa_utils.get_ema_multi_avg_fn``. fp32 for
            16-bit parameters, where a decay near 1 would round every change away. A callable gets the number
            of updates so far, kept in ``param_groups[0]["ema_updates"]``, and returns d. A parameter without
            a gradient keeps its average. ``swap_ema()`` and ``ema_state_dict(model)`` hand them out;
            buffers are not averaged. Default: None.
        ema_warmup (bool): d is at most (1 + n) / (10 + n) after n updates. Default: False.

    ``collect_grad_stats = True`` makes steps collect what ``grad_stats()`` tells of each parameter;
    :class:`braze.optim.GradientMonitor` watches it.

    Differences from torch: one memory pass whatever the flags; parameters that overlap in memory, or are
    given twice, raise ValueError at the first step (torch warns and steps twice); a subclass's ``_init_group``
    is not called; ``capturable`` has no effect on the CPU; ``load_state_dict`` copies; a step count kept on a
    device drops its fraction. ``torch.compile`` leaves the step as it is, as a graph break; with
    ``fullgraph=True`` it raises. ``differentiable=True``, sparse gradients, tensor subclasses such as
    DTensor, active dispatch modes such as make_fx's, and explicit ``foreach=True`` or ``fused=False`` run
    torch's own code.

    Raises:
        ValueError, TypeError: an argument torch would refuse, or a bad one of those above.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014; ``torch.optim.Adam``.
    """

    _algorithm: ClassVar[str] = "adam"
    _torch_class: ClassVar[type[Optimizer]] = TorchAdam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        checked_extras = checked(type(self).__name__, extras)
        TorchAdam.__init__(
            self,
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
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._configure(checked_extras)
