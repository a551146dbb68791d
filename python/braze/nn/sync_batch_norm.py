"""Batch normalisation over the batches of several processes, with an activation and a sum."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from braze.nn._activation import ACTIVATIONS, NUMBERS, ActivationLike, resolve
from braze.nn._drop_in import DropIn, is_symbolic, leaf
from braze.nn._route import Norm, ops, takes_activation, takes_addend, takes_vectors, transformed
from braze.nn.batch_norm import FusedBatchNorm, activation_repr

__all__ = ["SyncBatchNorm", "SyncBatchNormAct", "convert_sync_batchnorm"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_INVSTD = 2  # row of the statistics


def weight_dtypes(weight: Tensor | None, running: Tensor | None) -> str:
    return (
        f"parameters in {'no dtype' if weight is None else weight.dtype} and statistics in "
        f"{'no dtype' if running is None else running.dtype}"
    )


def _all_gather(moments: Tensor, group: Any, world_size: int) -> Tensor:
    gathered = moments.new_empty((world_size, *moments.shape))
    if dist.get_backend(group) == "gloo":
        dist.all_gather(list(gathered.unbind(0)), moments, group)
    else:
        dist.all_gather_into_tensor(gathered, moments, group)
    return gathered


class _SyncBatchNorm(torch.autograd.Function):
    """Forward: one all_gather of 3C numbers. Backward: one all_reduce of 2C."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        norm: Norm,
        activation: int,
        parameter: float,
        group: Any,
        world_size: int,
    ) -> Tensor:
        operators = ops()
        moments = _all_gather(operators.batch_norm_moments(input), group, world_size)
        stats = operators.batch_norm_combine(moments, input, *norm)
        y: Tensor
        y, mask = operators.batch_norm_apply(input, stats, residual, activation, parameter)
        saved = residual if mask.numel() == 0 else None
        ctx.save_for_backward(input, stats, saved, mask, moments[:, 2, 0].sum())
        ctx.activation, ctx.parameter, ctx.group = activation, parameter, group
        ctx.dtypes = (
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, stats, residual, mask, count = ctx.saved_tensors
        need_input, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        operators = ops()
        shared = (residual, mask, ctx.activation, ctx.parameter)
        sums = operators.batch_norm_reduce(grad, input, stats, *shared)
        weight_dtype, bias_dtype = ctx.dtypes
        # Of this process's batch: it is for DistributedDataParallel to average them.
        grad_weight = (sums[1] * stats[_INVSTD]).to(weight_dtype) if need_weight else None
        grad_bias = sums[0].to(bias_dtype, copy=True) if need_bias else None
        grad_input = grad_residual = None
        if need_input:
            dist.all_reduce(sums, group=ctx.group)
        if need_input or need_residual:
            grad_input, grad_residual = operators.batch_norm_apply_grad(
                grad, input, stats, residual, mask, sums, count, *shared[2:], need_residual
            )
        return (
            grad_input if need_input else None,
            grad_weight,
            grad_bias,
            grad_residual if need_residual else None,
            *(None,) * 5,
        )


class SyncBatchNormAct(FusedBatchNorm):
    r"""activation(batch_norm(input) + residual) with the statistics of all processes of a group.

    As :class:`torch.nn.SyncBatchNorm`, whose arguments, attributes and ``state_dict`` it has, with
    :class:`BatchNormAct2d`'s activation and ``forward(input, residual=None)``. Mean and variance are merged
    from every process's own, exactly, whatever the sizes of their batches; an empty one takes part with
    nothing. One all_gather of 3 C numbers forward, one all_reduce of 2 C backward, and no wait for the device.

    In ``eval()``, without an initialised process group, and in a group of one, it is :class:`BatchNormAct2d`
    for any number of dimensions.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, bias: torch's.
        activation, negative_slope: as :class:`BatchNormAct2d`; "identity" is plain SyncBatchNorm.

    Shapes: [N, C, ...]; dtypes as :class:`BatchNorm1d`.

    Raises:
        ValueError: fewer than two dimensions, no channels, an activation that cannot be fused.
        NotImplementedError: statistics are shared, and the kernels do not take the input.
        RuntimeError: gradients of gradients are asked for while statistics are shared.

    Differences from torch: CPU tensors and gloo work too, which is why this is no subclass of
    torch.nn.SyncBatchNorm: DistributedDataParallel refuses those on the CPU. Under ``torch.compile`` the
    collectives stay outside the graph.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        *,
        activation: ActivationLike = "relu",
        negative_slope: float = 0.01,
        device: Any = None,
        dtype: Any = None,
        bias: bool = True,
    ) -> None:
        name, parameter = resolve(activation, negative_slope)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:
            self.register_parameter("bias", None)
        self.activation, self.activation_parameter = name, parameter
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        world_size = self._world_size()
        if world_size < 2:
            return self._normalize(input, residual)
        self._check_input_dim(input)
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")
        activation, parameter = self.activation, self.activation_parameter
        if residual is not None and not takes_addend(input, residual):
            torch.broadcast_shapes(
                input.shape, residual.shape
            )  # to fail before anything is written
            z = self._shared(input, None, "identity", 0.0, world_size)
            return ACTIVATIONS[activation](z + residual, parameter)
        if residual is not None and residual.dtype != input.dtype:
            dtype = torch.promote_types(input.dtype, residual.dtype)
            input, residual = input.to(dtype), residual.to(dtype)
        return self._shared(input, residual, activation, parameter, world_size)

    def _shared(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str,
        parameter: float,
        world_size: int,
    ) -> Tensor:
        norm, _ = self._norm()
        if (
            transformed()
            or not takes_activation(input)
            or not takes_vectors(norm, input.shape[1], input.dtype, input)
            or (norm.running_mean is None and norm.num_batches_tracked is not None)
        ):
            raise NotImplementedError(
                f"SyncBatchNormAct: the statistics of a {input.dtype} {type(input).__name__} on "
                f"{input.device} cannot be shared with {weight_dtypes(norm.weight, norm.running_mean)}. "
                "It takes dense fp32, fp64, bf16 and fp16 tensors on the CPU and on CUDA devices, parameters "
                "and statistics in fp32 or the input's dtype, both running statistics or neither, "
                "and no torch.func transform"
            )
        result: Tensor = _SyncBatchNorm.apply(
            input,
            norm.weight,
            norm.bias,
            residual,
            norm,
            NUMBERS[activation],
            parameter,
            self._group(),
            world_size,
        )
        return result

    def _group(self) -> Any:
        return self.process_group or dist.group.WORLD

    def _world_size(self) -> int:
        """Of the processes whose statistics are shared in this call; 1 where none are."""
        if self.training and dist.is_available() and dist.is_initialized():
            return dist.get_world_size(self._group())
        return 1

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {activation_repr(self)}"

    @classmethod
    def convert_sync_batchnorm(cls, module: ModuleT, process_group: Any = None) -> ModuleT:
        """As :func:`braze.nn.convert_sync_batchnorm`."""
        return convert_sync_batchnorm(module, process_group)


def convert_sync_batchnorm(module: ModuleT, process_group: Any = None) -> ModuleT:
    """Replaces every batch norm in ``module`` by a :class:`SyncBatchNormAct`.

    Args:
        module: with torch's or braze's BatchNorm, BatchNormAct and SyncBatchNorm modules anywhere in it.
        process_group: over which statistics are shared; all processes by default.

    Returns:
        ``module``, changed in place; or the new module if it is a batch norm itself. Parameters, buffers, the
        activation, ``training`` and hooks are those of the modules replaced, the very same objects.

    Raises:
        ValueError: a lazy batch norm that has not seen its first input, or a parametrized one. Nothing has
            been changed.

    Differences from :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`, which does not know activations and
    would lose them: the activation and hooks are kept.
    """
    for name, child in module.named_modules():
        if not isinstance(child, _BatchNorm):
            continue
        if isinstance(child, LazyModuleMixin):
            raise ValueError(
                f"convert_sync_batchnorm: {name or 'module'} is a {type(child).__name__}, whose number "
                "of channels is unknown yet; call the model once before it is converted"
            )
        if parametrize.is_parametrized(child):
            raise ValueError(
                f"convert_sync_batchnorm: {name or 'module'} is parametrized, which a module of another "
                "class would not be; convert first, and register the parametrization then"
            )
    result: ModuleT = _converted(module, process_group, {})
    return result


def _converted(module: Any, process_group: Any, done: dict[nn.Module, nn.Module]) -> Any:
    if module in done:  # a module in two places stays one
        return done[module]
    if isinstance(module, _BatchNorm):
        result = _synchronized(module, process_group)
    else:
        result = module
    done[module] = result
    for name, child in module._modules.items():
        if child is None:
            continue
        new = _converted(child, process_group, done)
        if new is not child:
            module._modules[name] = new
    return result


def _synchronized(old: _BatchNorm, process_group: Any) -> SyncBatchNormAct:
    new = SyncBatchNormAct.__new__(SyncBatchNormAct)
    new.__dict__.update(old.__dict__)
    # The module's own containers, so that what is added to one is not in the other.
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = old.__dict__[name].copy()
    new.process_group = process_group
    return new


class SyncBatchNorm(DropIn, nn.SyncBatchNorm):
    """As :class:`torch.nn.SyncBatchNorm`, but what ``convert_sync_batchnorm`` makes is a
    :class:`SyncBatchNormAct`, so that a ``BatchNormAct`` keeps its activation. Arguments, shapes, dtypes and
    errors are torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        return leaf(self, input) if is_symbolic(input) else super().forward(input)

    @classmethod
    def convert_sync_batchnorm(cls, module: ModuleT, process_group: Any = None) -> ModuleT:
        """As :func:`braze.nn.convert_sync_batchnorm`."""
        return convert_sync_batchnorm(module, process_group)
