"""The table of braze's tensor operations. test_ops_generic.py runs every check of op_checks.py on every entry,
and fails for an operator that has none.

A new operation is one ``Op`` in a module ``ops_<area>.py``, added to ``OP_DB`` in test_ops_generic.py:

    Op(
        name="dropout",  # torch.ops.braze.dropout, and _C.dropout
        samples=(Sample("fp", lambda dtype: [values((4, 5, 6), 1, dtype), 0.5, 7, 0]),),
        composite=lambda x, p, seed, offset: x * mask(x, p, seed, offset) / (1 - p),
        large=(Sample("large", lambda dtype: [values((400, 1000), 1, dtype), 0.5, 7, 0]),),
        activations=(0,),
        differentiable=(0,),
        wrong=(Wrong("p", lambda: [values((3,), 1), 2.0, 7, 0], ValueError, "p must be"),),
    )

An operation that draws from torch's generator is called after ``torch.manual_seed(0)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import devices
import torch
from torch import Tensor

Args = list[Any]
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Sample:
    """Arguments; ``make`` gives fresh tensors with the same values every time. ``fixed``: an argument goes with
    the layout of the others, which therefore stays."""

    name: str
    make: Callable[[torch.dtype], Args]
    fixed: bool = False


@dataclass(frozen=True)
class Wrong:
    """Arguments that must be refused, with these words."""

    name: str
    make: Callable[[], Args]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class Op:
    """One operator. Positions are those of arguments in a call.

    Args:
        composite: the same in torch's operations, mutations included. Run in fp64 it is the truth, run in
            the sample's dtypes it is what torch offers, whose error is the measure of ours.
        large: samples with work for several threads and blocks.
        activations: arguments of one shape [N, C, ...] whose layout in memory is free.
        differentiable: arguments that have gradients.
        mutated: arguments that are written.
        view: what of the outputs is compared with the composite's outputs; all without it.
        exact: every bit is the composite's.
        random: draws from torch's generator; its last output is what it drew, the composite's first argument.
        composed: the CPU's kernel is a composition of torch's operators.
        python: also a function of ``braze._native._C``.
    """

    name: str
    samples: tuple[Sample, ...]
    composite: Callable[..., Any]
    large: tuple[Sample, ...] = ()
    activations: tuple[int, ...] = (0,)
    differentiable: tuple[int, ...] = ()
    mutated: tuple[int, ...] = ()
    wrong: tuple[Wrong, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (FP32, FP64, BF16, FP16)
    view: Callable[[list[Tensor]], list[Tensor]] = field(default=list)
    exact: bool = False
    random: bool = False
    composed: bool = False
    python: bool = True
    namespace: str = "braze"

    @property
    def overload(self) -> Any:
        return getattr(getattr(torch.ops, self.namespace), self.name).default

    def __str__(self) -> str:
        return self.name


def place() -> torch.device:
    return devices.get().place if devices.MODE in devices.APART else devices.CPU


def values(shape: Sequence[int], seed: int, dtype: torch.dtype = FP32) -> Tensor:
    """Normal numbers on the tests' device, the same in every mode."""
    return devices.values(shape, seed, dtype).to(place())


def one_number(value: float, dtype: torch.dtype) -> Tensor:
    return torch.full((), value, dtype=dtype, device=place())
