"""Dropout masks whose bits are compared between devices and machines."""

from __future__ import annotations

from dataclasses import dataclass

from braze.nn.functional import dropout_mask
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """One mask: a function of these four numbers alone."""

    numel: int
    p: float
    seed: int
    offset: int
    # Part of the selection that runs under the (slow) sanitizers.
    short: bool = False

    @property
    def name(self) -> str:
        return f"dropout/{self.numel}/{self.p}/{self.seed:x}-{self.offset:x}"

    def run(self, device: str) -> dict[str, Tensor]:
        place = "cpu" if device == "emulated" else device
        return {"mask": dropout_mask(self.numel, self.p, self.seed, self.offset, place).cpu()}


# Around a block's eight lanes, vectors and chunks; every word of key and counter; rare and frequent p.
MASKS = (
    *(Mask(n, 0.5, 1, 0, n < 100) for n in (1, 7, 8, 9, 15, 17, 63, 65, 1023, 1025, 65535, 65537)),
    *(Mask(4097, p, 2, 4, p == 0.1) for p in (0.0, 1e-5, 0.1, 0.9, 0.99999, 1.0)),
    *(
        Mask(1000, 0.3, seed, offset)
        for seed in (0, 0xFFFFFFFF, 0x100000000, 0xFEDCBA9876543210)
        for offset in (0, 0xFFFFFFFF, 0x100000000, 0x0123456789ABCDEF)
    ),
)
