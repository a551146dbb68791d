"""Dropout's mask and what becomes of it, slowly, from the documented definition alone."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ALPHA = 1.7580993408473766


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...], rounds: int) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(rounds):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & MASK, first >> 32 ^ c[3] ^ k[1], first & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def halves(number: int) -> tuple[int, int]:
    return number & MASK, number >> 32 & MASK


def threshold(p: float) -> int:
    return round(p * 65536)


@functools.lru_cache(maxsize=1 << 16)
def lanes(block: int, seed: int, offset: int) -> tuple[int, ...]:
    words = philox4x32((*halves(block), *halves(offset)), halves(seed), 7)
    return tuple(half for word in words for half in (word & 0xFFFF, word >> 16))


def mask(numel: int, p: float, seed: int, offset: int, first: int = 0) -> Tensor:
    """Of indices ``first`` (a multiple of 8) to ``first + numel``; True where kept. On the CPU."""
    blocks = range(first // 8, (first + numel + 7) // 8)
    every = [lane for block in blocks for lane in lanes(block, seed, offset)]
    return torch.tensor(every[:numel], dtype=torch.int64, device="cpu") >= threshold(p)


def scale(p: float) -> float:
    t = threshold(p)
    return 0.0 if t == 65536 else 65536 / (65536 - t)


def memory_order(tensor: Tensor) -> list[int]:
    """Dimensions of a dense tensor from the outermost in memory inwards."""
    return sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))


def in_memory_order(flat: Tensor, like: Tensor) -> Tensor:
    """``flat``, whose order is that of the memory of ``like``, with the shape of ``like``."""
    order = memory_order(like)
    inverse = [order.index(d) for d in range(like.dim())]
    return flat.reshape([like.shape[d] for d in order]).permute(inverse)


def element_mask(like: Tensor, p: float, seed: int, offset: int) -> Tensor:
    return in_memory_order(mask(like.numel(), p, seed, offset), like)


def channel_mask(like: Tensor, p: float, seed: int, offset: int) -> Tensor:
    n, c = like.shape[:2]
    shape = (n, c) + (1,) * (like.dim() - 2)
    return mask(n * c, p, seed, offset).reshape(shape).expand(like.shape)


def drop(x: Tensor, keep: Tensor, p: float, alpha: bool = False) -> Tensor:
    """In the dtype of ``x``, rounded once where that is 16 bits; fp32 and fp64 as IEEE operations give it."""
    if not alpha:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        scaled = wide * torch.tensor(scale(p), dtype=wide.dtype, device=wide.device)
        return torch.where(keep, scaled, torch.zeros_like(scaled)).to(x.dtype)
    acts = threshold(p) / 65536
    a = 1 / math.sqrt((ALPHA**2 * acts + 1) * (1 - acts))
    b = a * ALPHA * acts
    wide = x.double()
    return torch.where(keep, wide * a + b, torch.full_like(wide, b - a * ALPHA)).to(x.dtype)
