"""The batch-norm operations as compositions of torch's own: for what the kernels do not take (functorch's
transforms, forward-mode AD, other dtypes, layouts, devices and subclasses), and for traces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import batch_norm as torch_batch_norm

from braze.nn._activation import ACTIVATIONS
from braze.nn._route import Norm


def batch_norm(input: Tensor, norm: Norm, training: bool) -> Tensor:
    """torch's batch_norm, and what its modules do before it."""
    weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps = norm
    factor = 0.0 if momentum is None else momentum
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            factor = 1.0 / float(num_batches_tracked)
    return torch_batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)


def batch_norm_act(
    input: Tensor,
    norm: Norm,
    training: bool,
    activation: str,
    parameter: float,
    residual: Tensor | None,
) -> Tensor:
    """activation(batch_norm(input) + residual)."""
    if residual is not None:
        torch.broadcast_shapes(input.shape, residual.shape)  # to fail before anything is written
    z = batch_norm(input, norm, training)
    if residual is not None:
        z = z + residual
    return ACTIVATIONS[activation](z, parameter)


def batch_norm_add_act(
    input: Tensor,
    norm: Norm,
    input2: Tensor,
    norm2: Norm,
    training: bool,
    activation: str,
    parameter: float,
) -> Tensor:
    """activation(batch_norm(input) + batch_norm(input2))."""
    torch.broadcast_shapes(input.shape, input2.shape)  # to fail before anything is written
    z = batch_norm(input, norm, training)
    return ACTIVATIONS[activation](z + batch_norm(input2, norm2, training), parameter)
