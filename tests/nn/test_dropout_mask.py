"""Dropout's mask: Random123's known answers, the definition bit by bit, and its statistics."""

from __future__ import annotations

import math

import dropout_reference as reference
import pytest
import torch
from braze._native import _C
from braze.nn._dropout_functional import dropout, dropout_mask
from torch import Tensor

# Counter and key, then words of 7 and of 10 rounds (Random123's kat_vectors).
KNOWN = (
    (
        (0,) * 4,
        (0,) * 2,
        "5f6fb709 0d893f64 4f121f81 4f730a48",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        "5207ddc2 45165e59 4d8ee751 8c52f662",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "4dfccaba 190a87f0 c47362ba b6b5242a",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
)


@pytest.mark.parametrize("counter, key, seven, ten", KNOWN)
def test_known_answers_of_the_reference(
    counter: tuple[int, ...], key: tuple[int, ...], seven: str, ten: str
) -> None:
    """The C++ formula has the same test in tests/emulator/kernels/dropout_tests.cpp."""
    for rounds, words in ((7, seven), (10, ten)):
        got = " ".join(f"{word:08x}" for word in reference.philox4x32(counter, key, rounds))
        assert got == words
    # And so of the library: the lanes of a block, from the thresholds that they reach.
    if counter[:2] == (0, 0):
        lanes = [int(seven.replace(" ", "")[k : k + 4], 16) for k in range(0, 32, 4)]
        lanes = [lanes[i ^ 1] for i in range(8)]
        for i, lane in enumerate(lanes):
            assert dropout_mask(8, lane / 65536, 0, 0)[i]
            assert not dropout_mask(8, (lane + 1) / 65536, 0, 0)[i]


SEEDS = ((0, 0), (1, 4), (0x123456789ABCDEF0, 0), (2**64 - 1, 2**64 - 1), (5, 7 << 33 | 3))


@pytest.mark.parametrize("seed, offset", SEEDS)
def test_mask_is_the_definition(seed: int, offset: int) -> None:
    for numel in (0, 1, 7, 8, 9, 511, 512, 513, 2000):
        for p in (0.0, 1e-9, 0.1, 0.5, 1 / 3, 65535 / 65536, 1.0):
            want = reference.mask(numel, p, seed, offset)
            assert torch.equal(dropout_mask(numel, p, seed, offset).cpu(), want), (numel, p)


@pytest.mark.cpu_only("compares CPU threads and instruction sets")
def test_mask_is_the_same_for_every_instruction_set_and_number_of_threads() -> None:
    want = dropout_mask(100_003, 0.3, 12345, 6)
    assert torch.equal(want[:4000].cpu(), reference.mask(4000, 0.3, 12345, 6))
    used, threads = _C.instruction_set(), torch.get_num_threads()
    try:
        for name in _C.available_instruction_sets():
            assert _C.set_instruction_set(name)
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                assert torch.equal(dropout_mask(100_003, 0.3, 12345, 6), want), (name, count)
    finally:
        _C.set_instruction_set(used)
        torch.set_num_threads(threads)


def test_mask_of_signed_seed_and_errors() -> None:
    assert torch.equal(dropout_mask(99, 0.5, -1, 0), dropout_mask(99, 0.5, 2**64 - 1, 0))
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            dropout_mask(1, p, 0, 0)
    with pytest.raises(ValueError, match="numel must not be negative, got -1"):
        dropout_mask(-1, 0.5, 0, 0)
    with pytest.raises(ValueError, match="seed must have 64 bits"):
        dropout_mask(1, 0.5, 2**64, 0)
    with pytest.raises(ValueError, match="offset must have 64 bits"):
        dropout_mask(1, 0.5, 0, -(2**63) - 1)


def z_of_mean(mask: Tensor, keep: float) -> float:
    n = mask.numel()
    return float((mask.double().sum() - n * keep) / math.sqrt(n * keep * (1 - keep)))


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two masks, as a z-score."""
    x, y = a.double(), b.double()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).mean() / (x.std() * y.std()) * math.sqrt(a.numel()))


def z_of_lags(mask: Tensor) -> Tensor:
    """Correlation with itself 1 to 4096 places on, as z-scores."""
    x = mask.double() - mask.double().mean()
    spectrum = torch.fft.rfft(x, 2 * len(x))
    sums = torch.fft.irfft(spectrum.abs() ** 2)[1:4097]
    return sums / (float(x.var()) * math.sqrt(len(x)))


@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_statistics(p: float) -> None:
    keep = 1 - round(p * 65536) / 65536
    calls = [dropout_mask(1 << 16, p, seed, offset).cpu() for seed in (3, 4) for offset in (0, 4)]
    assert all(abs(z_of_mean(call, keep)) < 5 for call in calls)
    for i, a in enumerate(calls):
        for b in calls[i + 1 :]:
            assert abs(correlation(a, b)) < 5
    long = dropout_mask(1 << 18, p, 11, 0).cpu()
    z = z_of_lags(long)
    assert z.abs().max() < 6 and abs(float(z.mean())) < 0.5
    rows = long.reshape(-1, 512).double()
    rows = rows - rows.mean(1, keepdim=True)
    cosine = torch.corrcoef(rows)
    cosine.fill_diagonal_(0)
    assert cosine.abs().max() * math.sqrt(512) < 6.5


def test_statistics_can_fail() -> None:
    """Controls: masks with the faults that the tests above are for."""
    good = dropout_mask(1 << 16, 0.5, 3, 0).cpu()
    assert abs(z_of_mean(good, 0.52)) > 5
    assert abs(correlation(good, good)) > 5
    assert abs(correlation(good, ~good)) > 5
    repeated = torch.cat([good, good[:4000]])[: 1 << 16]
    repeated[3000:] = repeated[:-3000].clone()
    assert z_of_lags(repeated).abs().max() > 6


def test_no_block_repeats() -> None:
    """64-bit blocks of 2^18 elements: a repetition has probability 5e-13."""
    bits = dropout_mask(1 << 18, 0.5, 21, 0).cpu().reshape(-1, 64).long()
    words = (bits << torch.arange(64, device="cpu")).sum(1)
    assert words.unique().numel() == words.numel()


def test_calls_are_independent() -> None:
    torch.manual_seed(0)
    masks = [dropout(torch.ones(1 << 16), 0.5).cpu() != 0 for _ in range(4)]
    for i, a in enumerate(masks):
        for b in masks[i + 1 :]:
            assert abs(correlation(a, b)) < 5
