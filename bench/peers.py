"""Who else braze can be timed against: ``--against``. What is not installed is said, never hidden."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .clock import Call


@dataclass(frozen=True)
class Peer:
    """``classes``: by torch's name of an optimizer the peer's, in ``module``; ``options``: what it needs to
    compute the same."""

    package: str
    module: str = ""
    classes: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_here(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def step(self, name: str, groups: Any, options: Mapping[str, Any]) -> Call:
        cls = getattr(importlib.import_module(self.module), self.classes[name])
        step: Call = cls(groups, **options, **self.options.get(name, {})).step
        return step


_SAME = {"SGD": "SGD32bit", "Adam": "Adam32bit", "AdamW": "AdamW32bit"}
# torchao's and flashoptim's keep their state in fewer bits: less memory moved, other results.
PEERS = {
    "torch": Peer("torch"),
    "compile": Peer("torch"),
    "apex": Peer(
        "apex",
        "apex.optimizers",
        {"SGD": "FusedSGD", "Adam": "FusedAdam", "AdamW": "FusedAdam"},
        {"Adam": {"adam_w_mode": False}},
    ),
    "bitsandbytes": Peer("bitsandbytes", "bitsandbytes.optim", _SAME),
    "torchao": Peer("torchao", "torchao.optim", {"Adam": "Adam8bit", "AdamW": "AdamW8bit"}),
    "flashoptim": Peer(
        "flashoptim", "flashoptim", {"SGD": "FlashSGD", "Adam": "FlashAdam", "AdamW": "FlashAdamW"}
    ),
}


def missing(names: Iterable[str]) -> list[str]:
    """What to say of those that are not installed."""
    absent = [PEERS[name] for name in names if not PEERS[name].is_here]
    return [f"{p.package} is not installed: left out (pip install {p.package})" for p in absent]


def optimizers(
    against: Iterable[str], name: str, groups: Any, options: Mapping[str, Any]
) -> dict[str, Callable[[], Call]]:
    """Makers of the steps of those that have that optimizer."""
    makers: dict[str, Callable[[], Call]] = {}
    for who in against:
        peer = PEERS[who]
        if name in peer.classes and peer.is_here:
            makers[who] = partial(peer.step, name, groups, options)
        elif who == "compile" and hasattr(torch.optim, name):
            makers[who] = lambda: torch.compile(
                getattr(torch.optim, name)(groups, **options, foreach=True).step
            )
    return makers


def compiled(against: Iterable[str], call: Call) -> dict[str, Callable[[], Call]]:
    """torch.compile of what torch runs, if it is asked for."""
    return {"compile": lambda: torch.compile(call)} if "compile" in against else {}
