"""Batch normalisation with an activation and a sum, as functions."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor
from torch.nn.functional import batch_norm as torch_batch_norm

from braze.nn import _composite, _fake
from braze.nn._activation import ActivationLike, resolve
from braze.nn._route import Norm, ops, takes_addend, takes_batch_norm

__all__ = ["batch_norm", "batch_norm_act", "batch_norm_add_act"]

_fake.register()


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Batch normalisation; a drop-in for :func:`torch.nn.functional.batch_norm`.

    .. math::
        y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    per channel, with the batch's mean and biased variance if ``training``, else ``running_mean`` and
    ``running_var``. With ``training`` these are updated: running = (1 - momentum) running + momentum value,
    the variance unbiased.

    Args, shapes, dtypes and errors are torch's: ``input`` [N, C, ...], the vectors [C], in fp32 or
    ``input``'s dtype. Statistics are summed in two levels, in double across blocks; the same bits for any
    number of threads.

    Differences from torch: none in values beyond rounding. Other dtypes, layouts, devices and tensor
    subclasses, ``torch.func`` transforms, forward-mode AD, ``torch.jit.trace`` and ``torch.export`` run
    torch's own code.

    Raises:
        ValueError, RuntimeError: what torch's function raises, in its words.
        RuntimeError: ``input`` is on a CUDA device and braze has no CUDA kernels here.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015; ``torch.nn.functional.batch_norm``.
    """
    norm = Norm(weight, bias, running_mean, running_var, None, momentum, eps)
    if takes_batch_norm(input, norm, training):
        result: Tensor = ops().batch_norm_act(input, *norm, training, "identity", 0.0, None)
        return result
    return torch_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@overload
def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    fork: Literal[False] = False,
) -> Tensor: ...
@overload
def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    fork: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: ActivationLike = "relu",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Batch normalisation, a sum and an activation in one: y = activation(batch_norm(input) + residual).

    Two passes forward and two backward, and nothing is saved for backward beside ``input`` (and one bit
    per element, or ``residual``).

    Args:
        input: [N, C, ...] of two dimensions or more; fp32, fp64, bf16 or fp16; any strides.
        running_mean, running_var, weight, bias: [C] or None, in fp32 or ``input``'s dtype.
        training: normalise with the batch's statistics, and update the running ones.
        momentum: of the running statistics; None makes them the average over ``num_batches_tracked`` calls.
        eps: added to the variance.
        activation: a name, such as relu or gelu_tanh (the error for an unknown one lists all), or None, or
            the module or function of one of them.
        negative_slope: of leaky_relu, where ``activation`` does not bring its own.
        residual: added before the activation; ``input``'s shape. Another dtype is promoted, and another
            shape broadcast, as torch's addition would.
        num_batches_tracked: int64, one number; counted up by the kernel when ``training``.
        fork: return the output twice, for a value that two branches use. The two share their memory, and
            their gradients are summed inside the backward kernels.

    Returns:
        y, or (y, y) with ``fork``, in ``input``'s memory format.

    Raises:
        ValueError: an unknown activation; one value per channel when training, in torch's words.
        TypeError, RuntimeError: as :func:`batch_norm`. Nothing has been written then.

    Differences from torch's composition: the normalised value and the sum are not rounded to 16 bits on
    their way. What the kernels do not take runs as that composition.
    """
    norm = Norm(weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    return run(input, norm, training, *resolve(activation, negative_slope), residual, fork)


def run(
    input: Tensor,
    norm: Norm,
    training: bool,
    activation: str,
    parameter: float,
    residual: Tensor | None,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The kernels, or the composition."""
    if takes_batch_norm(input, norm, training) and (
        residual is None or takes_addend(input, residual)
    ):
        operators = ops()
        operator = operators.batch_norm_act_fork if fork else operators.batch_norm_act
        result: Tensor | tuple[Tensor, Tensor] = operator(
            input, *norm, training, activation, parameter, residual
        )
        return result
    y = _composite.batch_norm_act(input, norm, training, activation, parameter, residual)
    return (y, y.view_as(y)) if fork else y


def run_add(
    input: Tensor,
    norm: Norm,
    input2: Tensor,
    norm2: Norm,
    training: bool,
    activation: str,
    parameter: float,
    fork: bool = False,
) -> Any:
    """The kernels for two normalised tensors; None where they do not take them."""
    if not (
        takes_batch_norm(input, norm, training)
        and takes_batch_norm(input2, norm2, training)
        and input2.dtype == input.dtype
        and takes_addend(input, input2)
    ):
        return None
    operators = ops()
    operator = operators.batch_norm_add_act_fork if fork else operators.batch_norm_add_act
    return operator(input, *norm, input2, *norm2, training, activation, parameter)


def batch_norm_add_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    input2: Tensor,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    momentum2: float | None = 0.1,
    eps2: float = 1e-5,
    *,
    activation: ActivationLike = "relu",
    negative_slope: float = 0.01,
    num_batches_tracked: Tensor | None = None,
    num_batches_tracked2: Tensor | None = None,
) -> Tensor:
    r"""Two batch normalisations, their sum and an activation: y = activation(bn(input) + bn2(input2)).

    The join of a residual block whose shortcut has a convolution and a batch norm of its own: neither
    normalised tensor is ever stored.

    Args:
        input, input2: [N, C, ...], of the same shape and dtype.
        running_mean ... bias, momentum, eps, num_batches_tracked: of the first, as for
            :func:`batch_norm_act`; with a 2, of the second.
        training: of both.
        activation, negative_slope: as for :func:`batch_norm_act`.

    Raises, differences from torch's composition: as for :func:`batch_norm_act`.
    """
    norm = Norm(weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    norm2 = Norm(weight2, bias2, running_mean2, running_var2, num_batches_tracked2, momentum2, eps2)
    arguments = (input, norm, input2, norm2, training, *resolve(activation, negative_slope))
    result: Tensor | None = run_add(*arguments)
    return _composite.batch_norm_add_act(*arguments) if result is None else result
