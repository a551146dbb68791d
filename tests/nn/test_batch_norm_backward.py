"""What batch norm keeps for backward, two incoming gradients, and derivatives of derivatives."""

from __future__ import annotations

from typing import Any

import batch_norm_reference as reference
import op_checks as checks
import pytest
import torch
from batch_norm_reference import ACTIVATIONS, TWO_SLOPES, Config, act_args, add_act_args
from op_table import BF16, FP32, FP64, Args, values
from torch import Tensor

ops = torch.ops.braze
SHAPE = (4, 16, 12, 13)
DIFFERENTIABLE = (0, 1, 2, 11)


def leaves(args: Args, positions: tuple[int, ...] = DIFFERENTIABLE) -> list[Tensor]:
    return [args[i].requires_grad_() for i in positions if args[i] is not None]


# -------------------------------------------------------------- memory kept


def kept_bytes(function: Any, args: Args, own: list[Tensor]) -> tuple[int, int]:
    """Bytes of memory kept beyond the tensors ``own``, and how many of those are kept."""
    known = {t.untyped_storage().data_ptr() for t in own}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*args)
    assert y is not None
    return sum(n for at, n in seen.items() if at not in known), len(known & set(seen))


def allowed(config: Config, dtype: torch.dtype, sides: int = 1) -> int:
    """Statistics per channel, and for a residual join of a two-slope activation one bit an element."""
    c = config.shape[1]
    arithmetic = 8 if dtype is FP64 else 4
    rows = 1
    for size in config.shape:
        rows *= size
    row = c if config.last else rows // (config.shape[0] * c)
    mask = rows // row * ((row + 7) // 8)
    bits = mask if config.residual and config.activation in TWO_SLOPES else 0
    return sides * 5 * c * arithmetic + bits


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_of_an_activations_size_is_stored(
    activation: str, residual: bool, last: bool
) -> None:
    for dtype in (FP32, BF16):
        config = Config(SHAPE, activation, residual=residual, last=last)
        args = act_args(config, dtype)
        own = leaves(args)
        extra, inputs = kept_bytes(ops.batch_norm_act, args, own)
        assert extra <= allowed(config, dtype)
        # x and the parameters; the residual only where z cannot be told without it.
        needs_residual = residual and activation != "identity" and activation not in TWO_SLOPES
        assert inputs <= 3 + needs_residual


def test_two_inputs_store_both_and_their_statistics() -> None:
    config = Config(SHAPE, "silu")
    args = add_act_args(config, FP32)
    own = leaves(args, (0, 1, 2, 8, 9, 10))
    extra, _ = kept_bytes(ops.batch_norm_add_act, args, own)
    assert extra <= allowed(config, FP32, sides=2)


def test_composite_stores_more() -> None:
    """The positive control: torch keeps z for SiLU."""
    config = Config(SHAPE, "silu")
    args = act_args(config, FP32)
    extra, _ = kept_bytes(reference.batch_norm_act, args, leaves(args))
    assert extra > 4 * args[0].numel() > allowed(config, FP32)


def test_nothing_is_stored_without_gradients() -> None:
    assert kept_bytes(ops.batch_norm_act, act_args(Config(SHAPE, residual=True), FP32), []) == (
        0,
        0,
    )


# ----------------------------------------------------------- two gradients


@pytest.mark.parametrize("activation", ["relu", "silu", "identity", "relu6", "mish"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
def test_fork_is_the_sum(activation: str, training: bool, residual: bool) -> None:
    for dtype in (FP32, FP64, BF16):
        config = Config((3, 8, 5, 6), activation, training=training, residual=residual, last=True)
        args = act_args(config, dtype)
        inputs = leaves(args)
        y, same = ops.batch_norm_act_fork(*args)
        assert torch.equal(y, same) and y.data_ptr() == same.data_ptr()
        dy, dy2 = values(y.shape, 3, dtype), values(y.shape, 4, dtype)
        ours = torch.autograd.grad([y, same], inputs, [dy, dy2])
        found = []
        for convert in (checks.wide, list):
            composite = convert(act_args(config, dtype))
            wanted = leaves(composite)
            out = reference.batch_norm_act(*composite)
            total = dy.to(out) + dy2.to(out)
            found.append(torch.autograd.grad(out, wanted, total))
        checks.assert_no_worse(ours, found[1], found[0], f"{config.name} {dtype}")


def test_fork_with_one_gradient_missing() -> None:
    config = Config(residual=True)
    dy = values(config.shape, 3)
    results = []
    for used in (0, 1, None):
        args = act_args(config, FP32)
        inputs = leaves(args)
        if used is None:
            y = ops.batch_norm_act(*args)
        else:
            y = ops.batch_norm_act_fork(*args)[used]
        results.append(torch.autograd.grad(y, inputs, dy))
    for result in results[:2]:
        checks.devices.assert_same(result, results[2])


# ------------------------------------------------------------- derivatives


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["plain", "residual", "frozen"])
def test_second_derivatives(activation: str, mode: str) -> None:
    config = Config(
        (4, 2, 3), activation, residual=mode == "residual", training=mode != "frozen", sigma=2.5
    )
    args = act_args(config, FP64)
    inputs = leaves(args)
    positions = [i for i in DIFFERENTIABLE if args[i] is not None]

    def function(*tensors: Tensor) -> Tensor:
        full = list(args)
        for i, t in zip(positions, tensors, strict=True):
            full[i] = t
        full[3:6] = [t.clone() for t in args[3:6]]
        result: Tensor = ops.batch_norm_act(*full)
        return result

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_first_gradients_are_the_same_with_create_graph() -> None:
    """The differentiable backward computes what the kernels do."""
    for activation in ACTIVATIONS:
        for join in ("residual", "two"):
            config = Config((3, 8, 4, 5), activation, residual=join == "residual", last=True)
            results = []
            for create_graph in (False, True):
                two = join == "two"
                args = (add_act_args if two else act_args)(config, FP32)
                inputs = leaves(args, (0, 1, 2, 8, 9, 10) if two else DIFFERENTIABLE)
                y = (ops.batch_norm_add_act if two else ops.batch_norm_act)(*args)
                dy = values(y.shape, 3)
                results.append(torch.autograd.grad(y, inputs, dy, create_graph=create_graph))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=f"{activation} {join}")


def test_backward_twice_and_after_a_change() -> None:
    args = act_args(Config(residual=True), FP32)
    inputs = leaves(args)
    y = ops.batch_norm_act(*args)
    dy = values(y.shape, 3)
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    checks.devices.assert_same(torch.autograd.grad(y, inputs, dy, retain_graph=True), first)
    with torch.no_grad():
        args[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, inputs, dy)


def test_output_may_be_changed_in_place() -> None:
    """y is not among what is kept."""
    args = act_args(Config(activation="silu"), FP32)
    inputs = leaves(args)
    dy = values(args[0].shape, 3)
    want = torch.autograd.grad(ops.batch_norm_act(*args) * 2, inputs, dy)
    got = torch.autograd.grad(ops.batch_norm_act(*args).mul_(2), inputs, dy)
    checks.devices.assert_same(got, want)


def test_deterministic_algorithms_are_no_obstacle() -> None:
    args = act_args(Config(residual=True), FP32)
    inputs = leaves(args)
    torch.use_deterministic_algorithms(True)
    try:
        y = ops.batch_norm_act(*args)
        torch.autograd.grad(y, inputs, values(y.shape, 3))
    finally:
        torch.use_deterministic_algorithms(False)


def test_parameters_in_fp32_have_gradients_in_fp32() -> None:
    args = act_args(Config(residual=True, wide=True), BF16)
    inputs = leaves(args)
    grads = torch.autograd.grad(ops.batch_norm_act(*args).sum(), inputs)
    assert [g.dtype for g in grads] == [BF16, FP32, FP32, BF16]
