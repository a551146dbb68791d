"""The batch-norm operators' entries of the table."""

from __future__ import annotations

from typing import Any

import batch_norm_reference as reference
import torch
from batch_norm_reference import Config, act_args, add_act_args
from op_table import FP32, Args, Op, Sample, Wrong, one_number, values

CONFIGS = (
    Config((4, 5)),
    Config((3, 16, 7), "silu", residual=True, wide=True),
    Config((2, 9, 5, 3), last=True, residual=True, momentum=None),
    Config((2, 3, 2, 3, 4), "gelu", last=True, affine=False, running=False),
    Config((2, 8, 4, 4), "hardswish", training=False, residual=True),
    Config((2, 8, 4, 4), "leaky_relu", training=False, affine=False, last=True),
    Config((2, 4, 3, 3), "identity", residual=True, bias=False, momentum=1.0),
    Config((3, 1, 4, 4), "mish", last=True),
    Config((5, 6, 1, 1), "elu"),
)
EMPTY = (Config((0, 3, 2, 2)), Config((2, 3, 0), "silu", residual=True, training=False))
LARGE = (
    Config((8, 24, 40, 41), residual=True, last=True, wide=True),
    Config((8, 24, 40, 41), "silu", wide=True),
)
SMALL = Config((3, 2, 2, 2), residual=True)


def act(config: Config) -> Sample:
    return Sample(config.name, lambda dtype: act_args(config, dtype))


def add(config: Config) -> Sample:
    return Sample(config.name, lambda dtype: add_act_args(config, dtype))


# ------------------------------------------------------------ refused calls


def changed(args: Args, **positions: Any) -> Args:
    for position, value in positions.items():
        args[int(position[1:])] = value
    return args


def wrong_act() -> tuple[Wrong, ...]:
    def make(config: Config = SMALL, **positions: Any) -> Any:
        return lambda: changed(act_args(config, FP32), **positions)

    two = values((2,), 5)
    return (
        Wrong(
            "1-d", make(_0=values((4,), 1), _11=None), ValueError, "input must have 2 dimensions"
        ),
        Wrong(
            "integers",
            make(_0=torch.ones(3, 2, 2, 2, dtype=torch.int64), _11=None),
            TypeError,
            "input",
        ),
        Wrong("one value", make(Config((1, 4, 1, 1))), ValueError, "more than 1 value per channel"),
        Wrong(
            "weight's length", make(_1=values((3,), 1)), ValueError, "weight must have one value"
        ),
        Wrong("bias's shape", make(_2=values((2, 1), 1)), ValueError, "bias must have one value"),
        Wrong(
            "weight's dtype", make(_1=two.double(), _2=None), TypeError, "weight must be float32"
        ),
        Wrong("two dtypes", make(_1=two.bfloat16()), TypeError, "weight"),
        Wrong("one statistic", make(_4=None), ValueError, "must both be given"),
        Wrong("running_mean's length", make(_3=values((3,), 1)), ValueError, "running_mean"),
        Wrong("running dtypes", make(_3=two.double()), TypeError, "running_mean is Double"),
        Wrong("no statistics", make(_3=None, _4=None, _8=False), ValueError, "training is False"),
        Wrong(
            "count's dtype",
            make(_5=one_number(3, FP32)),
            TypeError,
            "num_batches_tracked must be int64",
        ),
        Wrong("no count", make(_5=None, _6=None), ValueError, "needs num_batches_tracked"),
        Wrong("activation", make(_9="swish"), ValueError, "activation is 'swish'.*hardswish"),
        Wrong("residual's shape", make(_11=values((3, 2, 2, 3), 1)), (RuntimeError), "2"),
    )


def wrong_add_act() -> tuple[Wrong, ...]:
    def make(**positions: Any) -> Any:
        return lambda: changed(add_act_args(SMALL, FP32), **positions)

    return (
        Wrong(
            "input2's shape",
            make(_8=values((3, 2, 2, 3), 1)),
            ValueError,
            "input2 must have input's",
        ),
        Wrong(
            "weight2's length", make(_9=values((3,), 1)), ValueError, "weight2 must have one value"
        ),
        Wrong("one statistic", make(_11=None), ValueError, "running_mean2"),
        Wrong("activation", make(_17="Relu"), ValueError, "activation is 'Relu'"),
    )


BATCH_NORM_OPS = (
    Op(
        name="batch_norm_act",
        samples=tuple(act(config) for config in (*CONFIGS, *EMPTY)),
        composite=reference.batch_norm_act,
        large=tuple(act(config) for config in LARGE),
        activations=(0, 11),
        differentiable=(0, 1, 2, 11),
        mutated=(3, 4, 5),
        wrong=wrong_act(),
    ),
    Op(
        name="batch_norm_act_fork",
        samples=tuple(act(config) for config in (*CONFIGS[1:3], CONFIGS[5], EMPTY[0])),
        composite=reference.batch_norm_act_fork,
        large=tuple(act(config) for config in LARGE),
        activations=(0, 11),
        differentiable=(0, 1, 2, 11),
        mutated=(3, 4, 5),
        wrong=wrong_act(),
    ),
    Op(
        name="batch_norm_add_act",
        samples=tuple(add(config) for config in (*CONFIGS[:6], EMPTY[0])),
        composite=reference.batch_norm_add_act,
        large=tuple(add(config) for config in LARGE),
        activations=(0, 8),
        differentiable=(0, 1, 2, 8, 9, 10),
        mutated=(3, 4, 5, 11, 12, 13),
        wrong=wrong_add_act(),
    ),
    Op(
        name="batch_norm_add_act_fork",
        samples=tuple(add(config) for config in (*CONFIGS[:2], EMPTY[0])),
        composite=reference.batch_norm_add_act_fork,
        large=tuple(add(config) for config in LARGE),
        activations=(0, 8),
        differentiable=(0, 1, 2, 8, 9, 10),
        mutated=(3, 4, 5, 11, 12, 13),
        wrong=wrong_add_act(),
    ),
)
