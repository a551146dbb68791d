"""Chains of convolutions and batch norms, what they give in training, and who computed them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from braze._native import _C
from braze.nn import _conv_autograd
from braze.nn._conv_bn import conv_chain
from braze.nn._conv_chain import Link
from op_table import values
from torch import Tensor, nn

BF16 = torch.bfloat16
SLOPE = 0.75  # so that it matters little on which side of zero rounding puts a value
# How far rounding may take gradients from the truth: some units of the last place; a value on the other side of
# zero.
SMOOTH, LEAKY, KINKS = 2**-7, 0.03, 0.1
KERNELS = ("conv_norm_forward", "conv_norm_input_grad", "conv_norm_weight_grad")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, SLOPE),
    "silu": F.silu,
}


class Counter:
    """braze's extension, counting its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(_C, name)

    def count(self, name: str) -> int:
        return self.calls.count(name)


@contextmanager
def counted() -> Iterator[Counter]:
    """The calls of convolutions' kernels in here."""
    before, counter = _conv_autograd._C, Counter()
    _conv_autograd._C = counter
    try:
        yield counter
    finally:
        _conv_autograd._C = before


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def image(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return last(values(shape, seed, dtype))


class Chain(nn.Module):
    """Convolutions of (channels, kernel, stride, activation), each with a batch norm and its activation."""

    def __init__(self, inputs: int, *rows: tuple[int, int, int, str], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.activations = [row[3] for row in rows]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for outputs, kernel, stride, _ in rows:
            self.convs.append(
                nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, **options)
            )
            norm = nn.BatchNorm2d(outputs)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            self.norms.append(norm)
            inputs = outputs
        self.to(memory_format=torch.channels_last)

    def links(self) -> tuple[Link, ...]:
        rows = zip(self.convs, self.norms, self.activations, strict=True)
        return tuple(
            Link(conv, norm, name, SLOPE if name == "leaky_relu" else 0.0)
            for conv, norm, name in rows
        )

    def fused(self, x: Tensor, residual: Tensor | None = None, fork: bool = False) -> Any:
        return conv_chain(x, self.links(), residual, False, fork)

    def forward(self, x: Tensor, residual: Tensor | None = None, fork: bool = False) -> Any:
        """The same in torch's operations."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            if residual is not None and i + 1 == len(self.convs):
                x = x + residual
            x = ACTIVATIONS[self.activations[i]](x)
        return (x, x * 1) if fork else x


def outcome(
    model: nn.Module, run: Callable[..., Any], *inputs: Tensor | None, **options: Any
) -> dict[str, Tensor | None]:
    """Results, gradients and buffers of ``run``, a function of ``model``, in the dtype of the inputs."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    results = run(*(None if x is None else x * 1 for x in leaves), **options)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [values(y.shape, 90 + i).to(y) for i, y in enumerate(results)]
    wanted = {f"input {i}": x for i, x in enumerate(leaves) if x is not None}
    wanted |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, Tensor | None] = {f"result {i}": y for i, y in enumerate(results)}
    gradients = torch.autograd.grad(results, list(wanted.values()), upstream, allow_unused=True)
    found |= {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def in_double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def assert_no_worse(
    ours: dict[str, Any], theirs: dict[str, Any], exact: dict[str, Any], least: float = LEAKY
) -> None:
    """Errors against fp64, as root mean squares: at most ``least`` more than twice those of torch in 16 bits.
    No gradient is one of zeros."""
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, truth in exact.items():
        a, b = ours[name], theirs[name]
        if truth is None or a is None:
            assert all(t is None or not t.any() for t in (a, b, truth)), name
            continue
        assert a.shape == b.shape and a.dtype == b.dtype, name
        if not truth.is_floating_point():
            assert torch.equal(a, b), name
            continue
        a, b, truth = (t.detach().double() for t in (a, b, truth))
        error, allowed = (float((t - truth).norm() / truth.norm().clamp(1e-30)) for t in (a, b))
        assert error <= 2 * allowed + least, f"{name}: {error:.3g}, torch's {allowed:.3g}"
