"""The entries of the table for the steps that the batch-norm operators are made of."""

from __future__ import annotations

import batch_norm_reference as reference
import batch_norm_steps_reference as steps
import torch
from activations import NAMES
from batch_norm_reference import Config, act_args, activation_tensor, channel_args
from batch_norm_steps_reference import arithmetic, comparable
from op_table import FP32, Args, Op, Sample, Wrong, one_number, values
from ops_batch_norm import LARGE, SMALL, changed
from torch import Tensor

CONFIGS = (
    Config((4, 5)),
    Config((3, 16, 7), "silu", residual=True, wide=True),
    Config((2, 9, 5, 3), "relu6", last=True, residual=True),
    Config((2, 3, 2, 3, 4), "gelu_tanh", last=True, affine=False, running=False),
    Config((2, 4, 3, 3), "tanh", residual=True, bias=False, momentum=None),
)
EMPTY = Config((0, 3, 2, 2), "sigmoid")


def stats_like(x: Tensor, seed: int = 30) -> Tensor:
    """[5, C] as for a batch like x: mean, its low part, invstd, scale, shift."""
    c, wide = (x.shape[1],), arithmetic(x.dtype)
    mean, invstd = values(c, seed, wide) * 0.2 + 0.5, 1 / (values(c, seed + 1, wide).abs() + 0.5)
    low, scale = values(c, seed + 2, wide) * 1e-9, invstd * (values(c, seed + 3, wide) + 1.0)
    return torch.stack([mean, low, invstd, scale, values(c, seed + 4, wide) - low * scale])


# ----------------------------------------------------------------- samples


def forward_sample(config: Config, two: bool = False) -> Sample:
    def make(dtype: torch.dtype) -> Args:
        args = act_args(config, dtype)
        other: Args = [None, *([None] * 5), 0.1, 1e-5]
        if two:
            other = [
                activation_tensor(config, 3, dtype),
                *channel_args(config, dtype, 20),
                0.3,
                1e-3,
            ]
        residual = None if two else args[11]
        return [*args[:8], *other, residual, args[8], NAMES.index(args[9]), args[10], True]

    return Sample(f"{config.name}{'-two' if two else ''}", make)


def moments_sample(config: Config) -> Sample:
    return Sample(config.name, lambda dtype: [activation_tensor(config, 1, dtype)])


def combine_sample(config: Config, processes: int) -> Sample:
    def make(dtype: torch.dtype) -> Args:
        x = activation_tensor(config, 1, dtype)
        parts = [steps.moments(activation_tensor(config, 40 + i, dtype)) for i in range(processes)]
        # One process may have had nothing.
        parts[-1] = parts[-1] * (0.0 if processes > 2 else 1.0)
        return [torch.stack(parts), x, *channel_args(config, dtype, 10), config.momentum, 1e-5]

    return Sample(f"{config.name}-{processes}", make)


def residual_of(config: Config, dtype: torch.dtype) -> Tensor | None:
    return activation_tensor(config.with_(mean=0.0), 2, dtype) if config.residual else None


def apply_sample(config: Config) -> Sample:
    def make(dtype: torch.dtype) -> Args:
        x = activation_tensor(config, 1, dtype)
        parameter = reference.PARAMETERS.get(config.activation, 0.0)
        number = NAMES.index(config.activation)
        return [x, stats_like(x), residual_of(config, dtype), number, parameter]

    return Sample(config.name, make)


def mask_for(config: Config, x: Tensor, residual: Tensor | None, stats: Tensor) -> Tensor | None:
    """As the forward makes it."""
    if residual is None or config.activation not in reference.TWO_SLOPES:
        return None
    number = NAMES.index(config.activation)
    mask: Tensor = torch.ops.braze.batch_norm_apply(x, stats, residual, number, 0.0)[1]
    return mask


def reduce_sample(config: Config, with_mask: bool, gradient_args: bool) -> Sample:
    """Of batch_norm_reduce, or of batch_norm_apply_grad."""

    def make(dtype: torch.dtype) -> Args:
        x, residual = activation_tensor(config, 1, dtype), residual_of(config, dtype)
        stats, wide = stats_like(x), arithmetic(dtype)
        mask = mask_for(config, x, residual, stats) if with_mask else None
        args = [activation_tensor(config, 5, dtype), x, stats, residual, mask]
        if gradient_args:
            args += [
                values((2, x.shape[1]), 50, wide),
                one_number(x.numel() // x.shape[1] + 7, wide),
            ]
        number = NAMES.index(config.activation)
        args += [number, reference.PARAMETERS.get(config.activation, 0.0)]
        return [*args, config.residual] if gradient_args else args

    return Sample(f"{config.name}{'-mask' if with_mask else ''}", make, fixed=with_mask)


def backward_sample(
    config: Config,
    two: bool = False,
    grads: int = 1,
    with_mask: bool = False,
    wanted: str = "1111111",
) -> Sample:
    def make(dtype: torch.dtype) -> Args:
        x, residual = activation_tensor(config, 1, dtype), residual_of(config, dtype)
        stats = stats_like(x)
        weight = channel_args(config, dtype, 10)[0]
        mask = mask_for(config, x, residual, stats) if with_mask else None
        args = [
            activation_tensor(config, 5, dtype),
            activation_tensor(config, 6, dtype) if grads == 2 else None,
        ]
        args += [x, weight, stats]
        args += (
            [activation_tensor(config, 3, dtype), weight, stats_like(x, 60)] if two else [None] * 3
        )
        present = [True] * 3 + [two] * 3 + [config.residual and not two]
        asked = [a and w == "1" for a, w in zip(present, wanted, strict=True)]
        args += [None if two else residual, mask, config.training, NAMES.index(config.activation)]
        return [*args, reference.PARAMETERS.get(config.activation, 0.0), asked]

    return Sample(f"{config.name}-{'two' if two else grads}-{wanted}", make, fixed=with_mask)


def input_grad_sample(config: Config) -> Sample:
    """Of a gradient behind the activation's derivative."""

    def make(dtype: torch.dtype) -> Args:
        grad, x, stats = reduce_sample(config, False, False).make(dtype)[:3]
        return [grad, x, stats, values((3, x.shape[1]), 50, arithmetic(dtype))]

    return Sample(config.name, make)


def _with(args: Args, position: int, value: object) -> Args:
    args[position] = value
    return args


def wrong_steps(op: str) -> tuple[Wrong, ...]:
    if op == "combine":
        make = combine_sample(SMALL, 2).make
        return (
            Wrong(
                "moments",
                lambda: changed(make(FP32), _0=values((2, 2), 1)),
                ValueError,
                "moments must be",
            ),
            Wrong(
                "dtype",
                lambda: changed(make(FP32), _0=values((1, 3, 2), 1).double()),
                TypeError,
                "moments",
            ),
        )
    sample = {
        "apply": apply_sample(SMALL),
        "reduce": reduce_sample(SMALL, True, False),
        "apply_grad": reduce_sample(SMALL, True, True),
    }[op].make
    at = 0 if op == "apply" else 1
    stats = {f"_{at + 1}": values((4, 2), 1)}
    wrong = [Wrong("stats", lambda: changed(sample(FP32), **stats), ValueError, "stats must be")]
    if at:
        short = values((3, 2, 2), 1)
        mask = torch.zeros(1, dtype=torch.uint8, device=short.device)
        wrong.append(
            Wrong("grad", lambda: changed(sample(FP32), _0=short), ValueError, "grad must have")
        )
        wrong.append(
            Wrong("mask", lambda: changed(sample(FP32), _4=mask), ValueError, "mask must be")
        )
    at_number = -3 if op == "apply_grad" else -2
    for number in (-1, len(NAMES)):
        wrong.append(
            Wrong(
                f"activation {number}",
                lambda number=number: _with(sample(FP32), at_number, number),
                ValueError,
                f"activation is number {number}",
            )
        )
    return tuple(wrong)


STEP_OPS = (
    Op(
        name="batch_norm_act_forward",
        samples=(*(forward_sample(c) for c in (*CONFIGS, EMPTY)), forward_sample(CONFIGS[2], True)),
        composite=steps.forward,
        large=tuple(forward_sample(c) for c in LARGE),
        activations=(0, 8, 16),
        mutated=(3, 4, 5, 11, 12, 13),
        view=lambda out: [out[0], *comparable(out[1]), *comparable(out[2])],
        python=False,
    ),
    Op(
        name="batch_norm_act_backward",
        samples=(
            *(backward_sample(c) for c in (*CONFIGS, EMPTY)),
            backward_sample(CONFIGS[2], with_mask=True),
            backward_sample(CONFIGS[1], grads=2),
            backward_sample(CONFIGS[0], two=True, wanted="1011101"),
            backward_sample(CONFIGS[1].with_(training=False), wanted="1000001"),
        ),
        composite=steps.backward,
        large=tuple(backward_sample(c, with_mask=c.last) for c in LARGE),
        activations=(0, 1, 2, 5, 8),
    ),
    Op(
        name="batch_norm_moments",
        samples=tuple(moments_sample(c) for c in (*CONFIGS, EMPTY)),
        composite=steps.moments,
        large=tuple(moments_sample(c) for c in LARGE),
        wrong=(Wrong("1-d", lambda: [values((3,), 1)], ValueError, "2 dimensions"),),
    ),
    Op(
        name="batch_norm_combine",
        samples=(
            *(combine_sample(c, 2) for c in CONFIGS),
            combine_sample(CONFIGS[0], 3),
            combine_sample(CONFIGS[1], 1),
        ),
        composite=steps.combine,
        activations=(1,),
        mutated=(4, 5, 6),
        view=lambda out: comparable(out[0]),
        wrong=wrong_steps("combine"),
    ),
    Op(
        name="batch_norm_apply",
        samples=tuple(apply_sample(c) for c in (*CONFIGS, EMPTY)),
        composite=steps.apply,
        large=tuple(apply_sample(c) for c in LARGE),
        activations=(0, 2),
        view=lambda out: out[:1],
        wrong=wrong_steps("apply"),
    ),
    Op(
        name="batch_norm_reduce",
        samples=(
            *(reduce_sample(c, False, False) for c in (*CONFIGS, EMPTY)),
            reduce_sample(CONFIGS[2], True, False),
        ),
        composite=steps.reduce,
        large=tuple(reduce_sample(c, c.last, False) for c in LARGE),
        activations=(0, 1, 3),
        wrong=wrong_steps("reduce"),
    ),
    Op(
        name="batch_norm_apply_grad",
        samples=(
            *(reduce_sample(c, False, True) for c in (*CONFIGS, EMPTY)),
            reduce_sample(CONFIGS[2], True, True),
        ),
        composite=steps.apply_grad,
        large=tuple(reduce_sample(c, c.last, True) for c in LARGE),
        activations=(0, 1, 3),
        wrong=wrong_steps("apply_grad"),
    ),
    Op(
        name="batch_norm_input_grad",
        samples=tuple(input_grad_sample(c) for c in (*CONFIGS, EMPTY)),
        composite=steps.input_grad,
        large=tuple(input_grad_sample(c) for c in LARGE),
        activations=(0, 1),
        wrong=(
            Wrong(
                "coefficients",
                lambda: changed(input_grad_sample(SMALL).make(FP32), _3=values((3, 3), 1)),
                ValueError,
                "coefficients must be",
            ),
        ),
    ),
)
