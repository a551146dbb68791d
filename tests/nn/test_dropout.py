"""Dropout's values against the definition: every dtype, layout, size and option, and what in-place leaves."""

from __future__ import annotations

import math
from collections.abc import Callable

import dropout_reference as reference
import pytest
import torch
from braze._native import _C
from braze.nn import _dropout_functional as functional
from reference import same_bits
from torch import Tensor
from torch.nn import functional as F

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Around blocks of 8, vectors, tiles of 256 and 512, windows, and chunks of 8192 and 16384.
SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 127, 129, 255, 256, 257, 511, 512, 513, 1025, 8191, 8193, 16385)


def drawn(action: Callable[[], Tensor], seed: int = 5) -> tuple[Tensor, int, int]:
    """The result, and the seed and offset that the one draw of the action gave."""
    torch.manual_seed(seed)
    state = _C.dropout(torch.ones(1), 0.5, False, False, None, None)[1].tolist()
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    result = action()
    if result.device.type == "cpu":
        assert torch.equal(torch.get_rng_state(), after), "more than one draw, or none"
    return result, state[0] % 2**64, state[1] % 2**64


def check(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    got, want = got.cpu(), want.cpu()
    wrong = (got != want).reshape(-1).nonzero().flatten()
    assert same_bits(got.contiguous(), want.contiguous()), f"{len(wrong)}: {wrong[:5].tolist()}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype: torch.dtype) -> None:
    for numel in SIZES:
        for offset in (0, 1, 3):
            x = torch.randn(numel + offset).to(dtype)[offset:]
            for p in (0.1, 0.5):
                y, *state = drawn(lambda x=x, p=p: functional.dropout(x, p))
                keep = reference.mask(numel, p, *state)
                check(y, reference.drop(x.cpu(), keep, p))


def layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(3, 5, 7, 11).to(dtype)
    return {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.permute(3, 1, 0, 2),
        "one sample": x[:1].contiguous(memory_format=torch.channels_last),
        "one channel": torch.randn(3, 1, 7, 11).to(dtype),
        "one pixel": torch.randn(3, 5, 1, 1).to(dtype),
        "many channels": torch.randn(2, 1500, 2, 2).to(dtype)
        .contiguous(memory_format=torch.channels_last),
        "wide rows": torch.randn(2, 3, 40, 41).to(dtype),
        "columns": torch.randn(3, 5, 7, 22).to(dtype)[..., ::2],
        "expanded": torch.randn(3, 1, 7, 11).to(dtype).expand(3, 5, 7, 11),
        "0-dim": torch.randn(()).to(dtype),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", layouts(torch.float32))
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    x = layouts(dtype)[layout]
    y, *state = drawn(lambda: functional.dropout(x, 0.4))
    like = torch.empty_like(x)
    assert y.stride() == like.stride()
    keep = reference.element_mask(like.cpu(), 0.4, *state)
    check(y, reference.drop(x.cpu(), keep, 0.4))
    residual = torch.randn(x.shape).to(dtype)
    y, *state = drawn(lambda: functional.dropout_add(x, residual, 0.4))
    wide = x.cpu().double() * reference.scale(0.4)
    want = torch.where(keep, wide + residual.cpu().double(), residual.cpu().double())
    torch.testing.assert_close(y.cpu(), want.to(dtype))
    assert same_bits(y.cpu()[~keep], residual.cpu()[~keep])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [name for name in layouts(torch.float32) if name != "0-dim"])
def test_channels(layout: str, dtype: torch.dtype) -> None:
    x = layouts(dtype)[layout]
    y, *state = drawn(lambda: functional.dropout2d(x, 0.4))
    keep = reference.channel_mask(x.cpu(), 0.4, *state)
    check(y, reference.drop(x.cpu(), keep, 0.4))
    for batch, function in (
        (x.flatten(2), functional.dropout1d),
        (x.unsqueeze(4), functional.dropout3d),
    ):
        y, *state = drawn(lambda batch=batch, function=function: function(batch, 0.4))
        keep = reference.channel_mask(batch.cpu(), 0.4, *state)
        check(y, reference.drop(batch.cpu(), keep, 0.4))
        sample = batch[0]
        y, *state = drawn(lambda sample=sample, function=function: function(sample, 0.4))
        keep = reference.channel_mask(sample.cpu()[None], 0.4, *state)[0]
        check(y, reference.drop(sample.cpu(), keep, 0.4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha(dtype: torch.dtype) -> None:
    x = torch.randn(2, 50, 12).to(dtype)
    for feature in (False, True):
        function = functional.feature_alpha_dropout if feature else functional.alpha_dropout
        y, *state = drawn(lambda function=function: function(x, 0.3, training=True))
        mask = reference.channel_mask if feature else reference.element_mask
        want = reference.drop(x.cpu(), mask(x.cpu(), 0.3, *state), 0.3, alpha=True)
        torch.testing.assert_close(y.cpu(), want)
    long = functional.alpha_dropout(torch.randn(1 << 18), 0.3, training=True)
    assert abs(float(long.mean())) < 0.02 and abs(float(long.var()) - 1) < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", functional.ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    parameter = {"leaky_relu": 0.2, "elu": 0.7}.get(activation, 0.0)
    values = [0.0, -0.0, math.inf, -math.inf, 3.0, -3.0, 6.0, 1e-6, -1e-6, 30.0, -30.0]
    x = torch.cat([torch.randn(1500) * 3, torch.tensor(values * 20)]).to(dtype)
    y, *state = drawn(
        lambda: functional.act_dropout(x, activation, 0.4, negative_slope=0.2, alpha=0.7)
    )
    keep = reference.mask(x.numel(), 0.4, *state)
    act = functional.ACTIVATIONS[activation]
    want = torch.where(keep, act(x.cpu().double(), parameter) * reference.scale(0.4), 0.0).to(dtype)
    torch.testing.assert_close(y.cpu(), want, equal_nan=True)
    assert bool((y.cpu()[~keep] == 0).all())


def test_special_values() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, -3.4e38, 3.4e38, -1.0] * 100)
    for dtype in DTYPES:
        y, *state = drawn(lambda dtype=dtype: functional.dropout(x.to(dtype), 0.5))
        keep = reference.mask(x.numel(), 0.5, *state)
        check(y, reference.drop(x.to(dtype).cpu(), keep, 0.5))
        assert not torch.signbit(y.cpu()[~keep]).any() and bool((y.cpu()[~keep] == 0).all())


def test_limits_of_p() -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -2.0] * 64, requires_grad=True)
    for p in (1.0, 1, 1 - 1e-9, math.nextafter(1, 0)):
        for y in (
            functional.dropout(x, p),
            functional.alpha_dropout(x, p, True),
            functional.act_dropout(x, "silu", p),
        ):
            assert bool((y == 0).all())
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert bool((grad == 0).all())
    assert functional.dropout(x, 0.0) is x and functional.dropout(x, 0) is x
    y = functional.dropout(x, 1e-7)  # rounds to 0
    assert same_bits(y.detach(), x.detach()) and y is not x
    for p in (-0.1, 1.1, math.nan, -math.inf):
        for call in (
            lambda p=p: functional.dropout(x, p),
            lambda p=p: functional.dropout(x, p, training=False),
            lambda p=p: functional.alpha_dropout(x, p),
            lambda p=p: functional.feature_alpha_dropout(x, p),
            lambda p=p: functional.dropout1d(x, p),
            lambda p=p: functional.act_dropout(x, "relu", p),
            lambda p=p: functional.dropout_add(x, x, p),
        ):
            before = torch.get_rng_state()
            with pytest.raises(ValueError, match=f"has to be between 0 and 1, but got {p}"):
                call()
            assert torch.equal(before, torch.get_rng_state())


def test_empty() -> None:
    for shape in ((0,), (3, 0), (0, 4, 5)):
        x = torch.empty(shape, requires_grad=True)
        y = functional.dropout(x, 0.5)
        assert y.shape == shape
        out, state = _C.dropout(x.detach(), 0.5, False, False, None, None)
        assert out.shape == shape and state.shape == (2,)
        assert functional.act_dropout(x, "gelu", 0.5).shape == shape
        assert functional.dropout_add(x, x, 0.5).shape == shape


@pytest.mark.parametrize("layout", layouts(torch.float32))
def test_in_place(layout: str) -> None:
    if layout == "expanded":
        x = layouts(torch.float32)[layout]
        before = torch.get_rng_state()
        with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
            functional.dropout(x, 0.5, inplace=True)
        assert torch.equal(before, torch.get_rng_state())
        return
    for call in (
        lambda x, inplace: functional.dropout(x, 0.4, inplace=inplace),
        lambda x, inplace: functional.alpha_dropout(x, 0.4, True, inplace),
        lambda x, inplace: functional.act_dropout(x, "relu", 0.4, inplace=inplace),
        lambda x, inplace: functional.act_dropout(x, "silu", 0.4, inplace=inplace),
    ):
        x = layouts(torch.float32)[layout]
        want, *_ = drawn(lambda x=x, call=call: call(x, False))
        version = x._version
        got, *_ = drawn(lambda x=x, call=call: call(x, True))
        assert got is x and x._version > version
        check(x, want)


def test_in_place_of_a_leaf_that_requires_grad() -> None:
    x = torch.randn(9, requires_grad=True)
    before, rng = x.detach().clone(), torch.get_rng_state()
    for call in (
        functional.dropout,
        lambda x, inplace: functional.act_dropout(x, "silu", inplace=inplace),
    ):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            call(x, inplace=True)
    assert same_bits(x.detach(), before) and torch.equal(rng, torch.get_rng_state())


@pytest.mark.cpu_only("compares CPU threads and instruction sets")
def test_same_bits_for_threads_and_instruction_sets() -> None:
    used, threads = _C.instruction_set(), torch.get_num_threads()
    shape = (4, 24, 31, 33)

    def results() -> list[Tensor]:
        found = []
        for dtype in DTYPES:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            for call in (
                lambda x=x: functional.dropout(x, 0.3),
                lambda x=x: functional.dropout2d(x, 0.3),
                lambda x=x: functional.dropout2d(x.contiguous(memory_format=torch.channels_last), 0.3),
                lambda x=x: functional.dropout_add(x, x, 0.3),
                lambda x=x: functional.alpha_dropout(x, 0.3, True),
                lambda x=x: functional.act_dropout(x, "leaky_relu", 0.3),
                lambda x=x: functional.act_dropout(x, "gelu" if x.dtype != torch.float64 else "relu", 0.3),
            ):  # fmt: skip
                found.append(drawn(call)[0])
        return found

    want = results()
    try:
        for name in _C.available_instruction_sets():
            assert _C.set_instruction_set(name)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert all(same_bits(a, b) for a, b in zip(results(), want, strict=True)), name
    finally:
        _C.set_instruction_set(used)
        torch.set_num_threads(threads)


def test_not_worse_than_torch_in_16_bits() -> None:
    x = torch.randn(4096)
    exact = x.double() / 0.7
    for dtype in (torch.bfloat16, torch.float16):
        ours = functional.dropout(x.to(dtype), 0.3).double()
        theirs = F.dropout(x.to(dtype), 0.3).double()
        errors = [float(((y - exact).abs() / exact.abs())[y != 0].max()) for y in (ours, theirs)]
        assert errors[0] <= errors[1] * 1.05
