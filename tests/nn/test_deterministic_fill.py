"""Under torch.use_deterministic_algorithms(True) torch fills what it allocates, in a pass over memory that our
kernels then write: what they write in full is allocated without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import devices
import op_checks as checks
import pytest
import torch
from micro_batches import KINDS, build, gradients, parameters, put
from op_table import FP32, Op, Sample
from test_ops_generic import cases
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.fake_lacks("its empty fills nothing")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _callers(event: Any) -> list[str]:
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names


def fills(work: Callable[[], Any]) -> list[list[str]]:
    """The operators, innermost first, in which torch filled new memory."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    found = [_callers(e) for e in profiled.events() if e.name == "aten::fill_"]
    return [callers for callers in found if callers and callers[0].startswith("aten::empty")]


def test_a_fill_is_found() -> None:
    x = torch.randn(3, 4)
    assert fills(lambda: torch.empty_like(x)) == [["aten::empty_strided", "aten::empty_like"]]
    assert fills(lambda: torch.zeros_like(x)) and not fills(lambda: x.fill_(1))


def computed(op: Op) -> tuple[Sample, ...]:
    return () if op.composed and devices.MODE == "cpu" else op.samples


@cases(FP32, choose=computed)
def test_operators_fill_nothing(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    args = sample.make(dtype)
    inputs = checks.leaves(op, args)
    outputs: list[Tensor] = []
    assert not fills(lambda: outputs.extend(checks.call(op, args)))
    outputs = [y for y in outputs if y.requires_grad]
    if outputs:
        grads = [torch.ones_like(y) for y in outputs]
        assert not fills(lambda: torch.autograd.grad(outputs, inputs, grads))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_fill_no_state(kind: str, steps: int) -> None:
    params = parameters()
    optimizer = build(kind, params, accumulation_steps=steps)
    found: list[list[str]] = []
    for seed in range(4):
        put(params, gradients(seed))
        found += fills(optimizer.step)
    # A count of steps, which is one number.
    assert all(callers[1] == "aten::zeros" for callers in found), found
    assert len(found) <= len(params)
