"""Every check of op_checks.py on every operation of the table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import devices
import op_checks as checks
import pytest
import torch
from op_layouts import LAYOUTS
from op_table import BF16, FP32, FP64, Op, Sample, Wrong
from ops_batch_norm import BATCH_NORM_OPS
from ops_batch_norm_steps import STEP_OPS
from ops_conv import CONV_OPS
from ops_dropout import DROPOUT_OPS
from test_leaks import assert_flat

OP_DB: tuple[Op, ...] = (*BATCH_NORM_OPS, *STEP_OPS, *CONV_OPS, *DROPOUT_OPS)


def cases(*dtypes: torch.dtype, choose: Callable[[Op], tuple[Sample, ...]] | None = None) -> Any:
    """Every operation, sample and dtype. An operation that has none of ``dtypes`` is called with its first."""
    parameters = []
    for op in OP_DB:
        wanted = [d for d in op.dtypes if not dtypes or d in dtypes] or op.dtypes[:1]
        for sample in op.samples if choose is None else choose(op):
            for dtype in wanted:
                name = f"{op.name}-{sample.name}-{str(dtype)[6:]}"
                parameters.append(pytest.param(op, sample, dtype, id=name))
    return pytest.mark.parametrize(("op", "sample", "dtype"), parameters)


def elements(sample: Sample) -> int:
    return sum(a.numel() for a in sample.make(FP32) if isinstance(a, torch.Tensor))


@functools.cache
def with_gradients(op: Op) -> tuple[Sample, ...]:
    return op.samples if op.differentiable else ()


@functools.cache
def few(op: Op) -> tuple[Sample, ...]:
    """For checks that look at how an operator is declared, not at what it computes."""
    return op.samples[1:3]


def test_every_operator_is_in_the_table() -> None:
    known = {op.name for op in OP_DB}
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.partition("::")[2] for name in names if name.startswith("braze::")}
    assert ours == known


@cases()
def test_values(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    checks.check_values(op, sample, dtype)


@cases(FP32, choose=lambda op: op.large)
def test_large_values(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    checks.check_values(op, sample, dtype)


@cases(choose=with_gradients)
def test_gradients(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    checks.check_gradients(op, sample, dtype)


@cases(FP64, choose=lambda op: tuple(s for s in with_gradients(op) if 0 < elements(s) < 700))
def test_gradcheck(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    checks.check_gradcheck(op, sample)


@cases(FP32, choose=lambda op: with_gradients(op)[:3])
def test_any_subset_of_gradients(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    checks.check_subsets(op, sample, dtype)


@cases(FP32, choose=few)
def test_opcheck(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    checks.check_opcheck(op, sample, dtype)


@cases(FP32, BF16)
def test_fake(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    checks.check_fake(op, sample.make(dtype), sample.name)


@cases(FP32, choose=few)
def test_compile(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    checks.check_compile(op, sample, dtype)


@cases(FP32)
def test_inference_mode(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    checks.check_inference(op, sample, dtype)


@cases(FP32, choose=lambda op: op.samples if op.python else ())
def test_python_function_is_the_operator(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    checks.check_python(op, sample, dtype)


@cases(FP32, BF16)
def test_only_declared_arguments_change(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    checks.check_only_declared_arguments_change(op, sample, dtype)


@pytest.mark.parametrize(
    ("op", "wrong"),
    [pytest.param(op, wrong, id=f"{op.name}-{wrong.name}") for op in OP_DB for wrong in op.wrong],
)
def test_rejected_calls_change_nothing(op: Op, wrong: Wrong) -> None:
    checks.check_rejected(op, wrong)


@pytest.mark.slow("every operation for every instruction set")
@pytest.mark.cpu_only("compares CPU threads and instruction sets")
@cases(choose=lambda op: op.large)
def test_same_bits(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    checks.check_bits(op, sample, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@cases(FP32, choose=lambda op: tuple(s for s in op.samples if not s.fixed))
def test_layouts(op: Op, sample: Sample, dtype: torch.dtype, layout: str) -> None:
    checks.check_layout(op, sample, dtype, layout)


@cases(choose=lambda op: (*op.samples, *op.large[:1]))
def test_device(op: Op, sample: Sample, dtype: torch.dtype, device: devices.Device) -> None:
    checks.check_device(op, sample, dtype, device)


@pytest.mark.slow("repeats each operation until its memory shows")
@pytest.mark.cpu_only("measures this process's memory")
@cases(FP32, choose=lambda op: op.samples[1:2])
def test_memory_stays_flat(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    args = sample.make(dtype)
    inputs = checks.leaves(op, args)

    def step() -> None:
        outputs = [y for y in checks.call(op, args) if y.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs])

    assert_flat(step)
