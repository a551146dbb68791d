"""Batch norm on hard values: large means, constants, overflow, NaN, denormals; against fp64."""

from __future__ import annotations

import batch_norm_reference as reference
import braze  # noqa: F401  (registers the operators)
import pytest
import torch
from batch_norm_reference import Config, act_args
from devices import MODE
from op_table import BF16, FP16, FP32, FP64, values
from torch import Tensor

ops = torch.ops.braze
EPS = 1e-5


def laid_out(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if last else x.contiguous()


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance as found in the batch, in fp64."""
    c = x.shape[1]
    mean, var = (torch.zeros(c, device=x.device, dtype=x.dtype) for _ in range(2))
    ops.batch_norm_act(x, None, None, mean, var, None, 1.0, EPS, True, "identity", 0.0, None)
    n = x.numel() // c
    return mean.double(), var.double() * (n - 1) / n


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.double()
    return wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)


LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])


@LAYOUTS
@pytest.mark.parametrize("mean_in_sigmas", [0.0, 1.0, 30.0, -30.0])
@pytest.mark.parametrize("shape", [(8, 16, 56, 56), (64, 70, 7, 7), (1, 3, 300, 300)])
def test_statistics(shape: tuple[int, ...], mean_in_sigmas: float, last: bool) -> None:
    """The variance within 1e-6 of itself, the mean within 1e-6 sigma; running_var rounds once more."""
    sigma = 2.0
    x = laid_out(values(shape, 1) * sigma + mean_in_sigmas * sigma, last)
    (mean, var), (true_mean, true_var) = statistics(x), exact(x)
    assert ((var - true_var) / true_var).abs().max() < 1e-6
    # The mean is rounded to fp32 on its way out.
    rounding = true_mean.abs() * 2.0**-24
    assert ((mean - true_mean).abs() - rounding).max() < 1e-6 * sigma


@LAYOUTS
def test_a_first_value_far_from_the_mean(last: bool) -> None:
    """Whatever number is subtracted before squaring, one outlier must not spoil the others."""
    x = values((4, 8, 32, 32), 1) + 3.0
    x[0, :, 0, 0] = 300.0
    x = laid_out(x, last)
    (mean, var), (true_mean, true_var) = statistics(x), exact(x)
    assert ((var - true_var) / true_var).abs().max() < 5e-6
    assert (mean - true_mean).abs().max() < 1e-5


@LAYOUTS
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_mean_of_a_million_sigmas(dtype: torch.dtype, last: bool) -> None:
    """Mean 1e4, sigma 1e-2: fp32 has ten values within a sigma, and what it has is used exactly."""
    x = laid_out((values((8, 6, 28, 28), 1, FP64) * 1e-2 + 1e4).to(dtype), last)
    (mean, var), (true_mean, true_var) = statistics(x), exact(x)
    assert ((var - true_var) / true_var).abs().max() < 1e-5
    assert (mean - true_mean).abs().max() < 1e-3
    y = ops.batch_norm_act(x, None, None, None, None, None, 0.1, EPS, True, "identity", 0.0, None)
    z = (x.double() - true_mean.view(1, -1, 1, 1)) / (true_var.view(1, -1, 1, 1) + EPS).sqrt()
    assert (y.double() - z).abs().max() < 1e-4


@LAYOUTS
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e4])
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16])
def test_constant_channel(dtype: torch.dtype, value: float, last: bool) -> None:
    """Variance 0: y is the bias, and the gradient is finite."""
    x = laid_out(torch.full((4, 9, 5, 5), value, dtype=dtype, device=values((1,), 1).device), last)
    weight, bias = values((9,), 1, dtype), values((9,), 2, dtype)
    x.requires_grad_()
    y = ops.batch_norm_act(x, weight, bias, None, None, None, 0.1, EPS, True, "identity", 0.0, None)
    want = bias.view(1, -1, 1, 1).expand_as(y)
    torch.testing.assert_close(y, want, rtol=0, atol=0 if dtype is not FP64 else 1e-8)
    (dx,) = torch.autograd.grad(y, x, values(y.shape, 3, dtype))
    assert dx.isfinite().all()


@LAYOUTS
@pytest.mark.parametrize("size", [6, 20])  # 20: planes of one channel in several images
def test_huge_values_give_no_nan(size: int, last: bool) -> None:
    x = values((4, 3, size, size), 1)
    x[:, 1] *= 1e30
    x = laid_out(x, last)
    y = ops.batch_norm_act(x, None, None, None, None, None, 0.1, EPS, True, "relu", 0.0, None)
    assert not y.isnan().any()
    wide = x.double()
    want = reference.batch_norm_act(wide, *[None] * 5, 0.1, EPS, True, "relu", 0.0, None)
    # The CPU takes sums of squares beyond fp32 again in double, devices find an infinite variance.
    known = slice(None, None, 1 if MODE == "cpu" else 2)
    torch.testing.assert_close(y[:, known].double(), want[:, known], rtol=1e-5, atol=1e-5)
    y64 = ops.batch_norm_act(wide, *[None] * 5, 0.1, EPS, True, "relu", 0.0, None)
    torch.testing.assert_close(y64, want, rtol=1e-9, atol=1e-9)


@LAYOUTS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["relu", "silu", "relu6", "hardswish", "gelu"])
def test_one_bad_value_stays_in_its_channel(activation: str, bad: float, last: bool) -> None:
    x = laid_out(values((4, 5, 6, 7), 1), last)
    rest = (0.1, EPS, True, activation, 0.0, None)
    good = ops.batch_norm_act(x, *[None] * 5, *rest)
    x[2, 3, 1, 1] = bad
    x.requires_grad_()
    y = ops.batch_norm_act(x, *[None] * 5, *rest)
    keep = [0, 1, 2, 4]
    # Not the same bits: sums of squares beyond fp32 are taken again in double, for all of a block.
    torch.testing.assert_close(y.detach()[:, keep], good[:, keep], rtol=1e-6, atol=1e-6)
    assert y.detach()[:, 3].isnan().all()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx[:, keep].isfinite().all() and dx[:, 3].isnan().any()


@pytest.mark.parametrize("activation", reference.TWO_SLOPES)
def test_nan_in_the_residual(activation: str) -> None:
    args = act_args(Config(activation=activation, residual=True), FP32)
    args[11][0, 0, 0, 0] = torch.nan
    y = ops.batch_norm_act(*args)
    assert y.isnan().sum() == 1 and y[0, 0, 0, 0].isnan()


@LAYOUTS
def test_denormals(last: bool) -> None:
    """Variance far below eps, in numbers that have lost digits."""
    x = laid_out(values((4, 5, 6, 6), 1) * 1e-40, last)
    weight, bias = values((5,), 2), values((5,), 3)
    y = ops.batch_norm_act(x, weight, bias, None, None, None, 0.1, EPS, True, "identity", 0.0, None)
    torch.testing.assert_close(y, bias.view(1, -1, 1, 1).expand_as(y), rtol=1e-6, atol=1e-12)
    small = values((4, 5, 6, 6), 1) * 1e-20
    mean, var = statistics(laid_out(small, last))
    assert (mean - small.double().mean((0, 2, 3))).abs().max() < 1e-27 and (var < 1e-37).all()


@LAYOUTS
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("activation", reference.KINKS)
def test_at_a_kink_the_gradient_is_torchs(activation: str, dtype: torch.dtype, last: bool) -> None:
    """z exactly on the kinks, by frozen statistics that make z = x."""
    kinks = reference.KINKS[activation]
    points = torch.tensor([-0.0, *kinks, *(k + 0.5 for k in kinks)], device=values((1,), 1).device)
    x = laid_out(points.repeat(2, 3, 1, 1).to(dtype), last)
    zero, one = torch.zeros(3, device=x.device), torch.ones(3, device=x.device)
    parameter = reference.PARAMETERS.get(activation, 0.0)

    def ours(t: Tensor) -> Tensor:
        frozen = (None, None, zero, one, None, 0.1, 0.0, False)
        result: Tensor = ops.batch_norm_act(t, *frozen, activation, parameter, None)
        return result

    def torchs(t: Tensor) -> Tensor:
        return reference.ACTIVATIONS[activation](t, parameter)

    found = []
    for function in (ours, torchs):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        found.append((y.detach(), torch.autograd.grad(y.sum(), leaf)[0]))
    tolerance = 1e-6 if dtype is FP32 else 8e-3
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
