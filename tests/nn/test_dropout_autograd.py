"""Dropout's gradients: exact, in any layout, twice; what is kept for them; checkpoints, hooks and compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dropout_reference as reference
import pytest
import torch
from braze._native import _C
from braze.nn import _dropout_functional as functional
from reference import same_bits
from test_dropout import DTYPES, drawn, layouts
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

Call = Callable[[Tensor], Tensor]
CALLS: dict[str, Call] = {
    "dropout": lambda x: functional.dropout(x, 0.4),
    "alpha": lambda x: functional.alpha_dropout(x, 0.4, True),
    "dropout1d": lambda x: functional.dropout1d(x, 0.4),
    "feature alpha": lambda x: functional.feature_alpha_dropout(x, 0.4, True),
    "in place": lambda x: functional.dropout(x * 1, 0.4, inplace=True),
    "channels in place": lambda x: functional.dropout1d(x * 1, 0.4, inplace=True),
    "added": lambda x: functional.dropout_add(x, x * 2, 0.4),
    **{
        f"{name}{' in place' if inplace else ''}": (
            lambda x, name=name, inplace=inplace: functional.act_dropout(
                x * 1 if inplace else x, name, 0.4, inplace=inplace
            )
        )
        for name in functional.ACTIVATIONS
        for inplace in (False, True)
    },
}


def seeded(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Tensor) -> Tensor:
        torch.manual_seed(3)
        return call(*args)

    return run


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name: str) -> None:
    for x in (
        torch.randn(2, 3, 4, dtype=torch.float64),
        torch.randn(2, 4, 3, dtype=torch.float64).transpose(1, 2),
        torch.randn(2, 3, 8, dtype=torch.float64)[..., ::2],
    ):
        leaf = x.requires_grad_()
        assert gradcheck(seeded(CALLS[name]), (leaf,), fast_mode=True)
        assert gradgradcheck(seeded(CALLS[name]), (leaf,), fast_mode=True)


def test_gradients_of_both_summands() -> None:
    x, r = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    call = seeded(lambda x, r: functional.dropout_add(x, r, 0.4))
    assert gradcheck(call, (x, r)) and gradgradcheck(call, (x, r))
    y = call(x, r.detach())
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    y = call(x.detach(), r)
    assert bool((torch.autograd.grad(y.sum(), r)[0] == 1).all())


def gradients_of(x: Tensor) -> dict[str, Tensor]:
    return {
        "contiguous": torch.randn(x.shape).to(x.dtype).contiguous(),
        "channels last": torch.randn(x.shape)
        .to(x.dtype)
        .contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(x.shape[::-1]).to(x.dtype).permute(3, 2, 1, 0),
        "expanded": torch.randn(x.shape[:2]).to(x.dtype)[:, :, None, None].expand(x.shape),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [name for name in layouts(torch.float32) if name != "0-dim"])
def test_gradients_in_any_layout(layout: str, dtype: torch.dtype) -> None:
    """The mask of the gradient is that of the output, whatever the order in memory of the two."""
    x = layouts(dtype)[layout].requires_grad_()
    for grad in gradients_of(x).values():
        y, *state = drawn(lambda: functional.dropout(x, 0.4))
        (got,) = torch.autograd.grad(y, x, grad)
        keep = reference.element_mask(torch.empty_like(x).cpu(), 0.4, *state)
        assert same_bits(got.cpu().contiguous(), reference.drop(grad.cpu(), keep, 0.4).contiguous())
        y, *state = drawn(lambda: functional.dropout2d(x, 0.4))
        (got,) = torch.autograd.grad(y, x, grad)
        keep = reference.channel_mask(x.cpu(), 0.4, *state)
        assert same_bits(got.cpu().contiguous(), reference.drop(grad.cpu(), keep, 0.4).contiguous())
        for activation in ("relu", "hardsigmoid", "gelu"):
            y, *state = drawn(
                lambda activation=activation: functional.act_dropout(x, activation, 0.4)
            )
            (got,) = torch.autograd.grad(y, x, grad)
            keep = reference.element_mask(torch.empty_like(x).cpu(), 0.4, *state)
            wide = x.detach().cpu().double().requires_grad_()
            z = functional.ACTIVATIONS[activation](wide, 0.0)
            (slope,) = torch.autograd.grad(z.sum(), wide)
            want = torch.where(keep, grad.cpu().double() * slope * reference.scale(0.4), 0.0)
            torch.testing.assert_close(
                got.cpu(), want.to(dtype), atol=1e-5, rtol=2e-2 if dtype.itemsize == 2 else 1e-5
            )


def kept_for_backward(call: Callable[[], Any]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


def test_only_seed_and_offset_are_kept() -> None:
    x = torch.randn(2, 3, 64, requires_grad=True)
    for name in ("dropout", "alpha", "dropout1d", "feature alpha"):
        (state,) = kept_for_backward(lambda name=name: CALLS[name](x))
        assert state.dtype == torch.int64 and state.shape == (2,)
    (state,) = kept_for_backward(lambda: functional.dropout_add(x, x, 0.4))
    assert state.numel() == 2
    y = None

    def relu() -> None:
        nonlocal y
        y = functional.act_dropout(x, "relu", 0.4)

    kept = kept_for_backward(relu)
    assert y is not None and sorted(t.numel() for t in kept) == [2, x.numel()]
    assert any(t.data_ptr() == y.data_ptr() for t in kept)
    kept = kept_for_backward(lambda: functional.act_dropout(x, "gelu", 0.4))
    assert sorted(t.numel() for t in kept) == [2, x.numel()]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_what_is_kept_must_not_be_changed() -> None:
    x = torch.randn(9, requires_grad=True)
    y = functional.act_dropout(x * 1, "relu", 0.4)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = functional.dropout(x * 1, 0.4)
    y.mul_(2)
    y.sum().backward()  # the output is not needed


def test_a_view_in_place() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    base = x * 1
    functional.dropout(base[1:3], 0.5, inplace=True)
    base.sum().backward()
    assert x.grad is not None
    assert bool((x.grad[0] == 1).all()) and set(x.grad[1:3].unique().tolist()) <= {0.0, 2.0}
    assert same_bits(base.detach()[1:3], (x.detach()[1:3] * x.grad[1:3]) + 0.0)


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpoint(reentrant: bool) -> None:
    x = torch.randn(50, 40, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return functional.act_dropout(functional.dropout(x, 0.3) * x, "gelu", 0.2)

    torch.manual_seed(0)
    (want,) = torch.autograd.grad(block(x).sum(), x)
    torch.manual_seed(0)
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None and same_bits(x.grad, want)


def test_retained_graph_gives_the_same_gradient() -> None:
    x = torch.randn(100, requires_grad=True)
    y = functional.dropout(x, 0.5)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    functional.dropout(x, 0.5)  # another draw in between
    assert same_bits(first, torch.autograd.grad(y.sum(), x)[0])


def test_apply_repeats_a_mask() -> None:
    x = torch.randn(1000)
    y, state = _C.dropout(x, 0.4, False, False, None, None)
    assert same_bits(y, _C.dropout_apply(x, state, 0.4, False, False, False))
    for bad, error, text in (
        (state.int(), TypeError, "int64"),
        (state[:1], ValueError, "contiguous tensor"),
        (torch.zeros(4, dtype=torch.int64)[::2], ValueError, "contiguous tensor"),
    ):
        with pytest.raises(error, match=text):
            _C.dropout_apply(x, bad, 0.4, False, False, False)


def test_errors_of_the_operators() -> None:
    x, rng = torch.randn(6), torch.get_rng_state()
    op = torch.ops.braze
    for call, error, text in (
        (lambda: op.dropout(x.long(), 0.5), TypeError, "input must be float32"),
        (lambda: op.dropout(x.to_sparse(), 0.5), Exception, "braze::dropout|strided"),
        (lambda: op.dropout(x, 2.0), ValueError, "between 0 and 1"),
        (lambda: op.dropout(x, 0.5, feature=True), RuntimeError, "at least 2 dimensions"),
        (lambda: op.dropout_add(x, x[:3], 0.5), ValueError, "input's shape"),
        (lambda: op.dropout_add(x, x.double(), 0.5), TypeError, "input's dtype"),
        (lambda: op.act_dropout(x, 0.5, "rleu"), ValueError, "'rleu'.*one of identity, relu"),
    ):
        with pytest.raises(error, match=text):
            call()
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.cpu_only("the emulated device's tensors are the CPU's")
def test_opcheck() -> None:
    op, state = torch.ops.braze, torch.tensor([3, 4])
    for x in (
        torch.randn(2, 3, 4, 5),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 3, 4, 10, dtype=torch.float64)[..., ::2],
    ):
        for grad in (False, True):
            a = x.clone().requires_grad_(grad)
            # p = 1: what is checked against a second run must not be random.
            for feature in (False, True):
                torch.library.opcheck(op.dropout.default, (a, 1.0, False, feature))
                torch.library.opcheck(op.dropout_apply.default, (a, state, 0.4, True, feature))
            torch.library.opcheck(op.dropout_add.default, (a, x, 1.0))
            torch.library.opcheck(op.act_dropout.default, (a, 1.0, "gelu"))
            torch.library.opcheck(op.act_dropout_backward.default, (a, x, state, 0.4, "relu"))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.dropout_.default, (torch.randn(9), 1.0), test_utils=tests)
    torch.library.opcheck(op.act_dropout_.default, (torch.randn(9), 1.0, "relu"), test_utils=tests)


def compiled_and_not(call: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> None:
    compiled = torch.compile(call, fullgraph=True, **options)
    for repetition in range(2):
        results = []
        for function in (call, compiled):
            torch.manual_seed(repetition)
            leaves = [t.detach().clone().requires_grad_() for t in inputs]
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
        for a, b in zip(*results, strict=True):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b)


@pytest.mark.cpu_only("compiled once is enough")
@pytest.mark.parametrize("backend", ("aot_eager_decomp_partition", "inductor"))
def test_compile(backend: str) -> None:
    x = torch.randn(4, 6, 8, 8)
    last = x.contiguous(memory_format=torch.channels_last)
    residual = torch.randn_like(x)

    def block(x: Tensor, residual: Tensor) -> Tensor:
        # Two equal calls must have two masks.
        y = functional.dropout(x, 0.5) + 10 * functional.dropout(x, 0.5)
        y = functional.dropout_add(y * x, residual, 0.3)
        y = functional.act_dropout(functional.dropout2d(y, 0.2), "silu", 0.1)
        return functional.alpha_dropout(y, 0.1, True)

    for input in (x, last):
        compiled_and_not(block, input, residual, backend=backend)

    def in_place(x: Tensor) -> Tensor:
        y = functional.dropout(x * 2, 0.5, inplace=True)
        return functional.act_dropout(y + 1, "relu", 0.5, inplace=True)

    compiled_and_not(in_place, x, backend=backend)


@pytest.mark.cpu_only("compiled once is enough")
def test_compile_with_dynamic_shapes() -> None:
    compiled = torch.compile(
        lambda x: functional.dropout(x, 0.5) + functional.dropout2d(x, 0.5),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for n in (3, 5, 6):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(n, 4, 5, n + 1).contiguous(memory_format=memory_format)
            results = []
            for call in (
                compiled,
                lambda x: functional.dropout(x, 0.5) + functional.dropout2d(x, 0.5),
            ):
                torch.manual_seed(0)
                leaf = x.clone().requires_grad_()
                y = call(leaf)
                results.append([y, torch.autograd.grad(y.sum(), leaf)[0]])
            assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
