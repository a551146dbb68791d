"""The table of optimizer cases whose resulting bits are compared between devices and machines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import braze.optim
import torch
from torch import Tensor
from torch.nn import Parameter

# Around every vector width, block and chunk boundary; the first is a 0-dim tensor.
SIZES: tuple[tuple[int, ...], ...] = (
    (),
    *((n,) for n in (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257)),
    *((n,) for n in (1023, 1025, 2047, 2049, 4095, 4097)),
    (5, 7, 3),
)
LARGE: tuple[tuple[int, ...], ...] = tuple(
    (n,) for n in (8191, 8193, 16383, 16385, 32767, 32769, 65535, 65536, 65537, 131073)
)
FEW: tuple[tuple[int, ...], ...] = ((), (7,), (129,), (1025,), (6, 5, 4, 3))
MANY: tuple[tuple[int, ...], ...] = ((1,), (3,), (8,), (33,)) * 300

fp32, fp64, bf16, fp16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAMES = {fp32: "fp32", fp64: "fp64", bf16: "bf16", fp16: "fp16", torch.complex64: "complex64"}


def values(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Finite numbers between 2^-9 and 2 and zeros of both signs, from a hash: the same with any torch."""
    real = torch.view_as_real(torch.empty(0, dtype=dtype)).dtype if dtype.is_complex else dtype
    count = torch.Size(shape).numel() * (2 if dtype.is_complex else 1)
    raw = hashlib.shake_128(key.encode()).digest(8 * count)
    words = torch.frombuffer(bytearray(raw or bytes(8)), dtype=torch.int32)[: 2 * count].view(-1, 2)
    # 24 bits and a power of two: exact in fp32. One in 64 is zero.
    x = (words[:, 0] >> 8).to(torch.float32) * 2.0**-22
    x = x * torch.pow(2.0, -(words[:, 1] & 7).to(torch.float32))
    x = torch.where((words[:, 1] >> 8) & 63 == 0, x * 0.0, x).to(real)
    return torch.view_as_complex(x.view(*shape, 2)) if dtype.is_complex else x.view(shape)


UPDATES = 3
WEIGHTS = (1.0, 2.5, 0.25)
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Golden:
    """``run``: what it computes on a device, on the CPU. ``short``: run first, and under the (slow) sanitizers.
    ``tolerance``: of a tensor's largest element; None: every bit."""

    name: str
    run: Callable[[str], Results]
    short: bool = False
    tolerance: float | None = None


@dataclass(frozen=True)
class Case:
    """One optimizer over one list of tensors, three updates."""

    name: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = fp32
    grad_dtype: torch.dtype | None = None
    shapes: tuple[tuple[int, ...], ...] = FEW
    layout: str = "dense"
    group_each: bool = False
    # Micro-batches an update; 0: weighted accumulate() before step().
    micro: int = 1
    # GradScaler's loss scale; the second step then overflows and must change nothing.
    scale: float = 1.0
    short: bool = False
    tolerance: ClassVar[None] = None

    def run(self, device: str) -> Results:
        """Every parameter and every state tensor after it."""
        place, place_grad = LAYOUTS[self.layout]
        params = []
        for i, shape in enumerate(self.shapes):
            x = values(f"{self.name}/p{i}", shape, self.dtype).to(device)
            params.append(Parameter(place(x)))
        groups: Any = [{"params": [p]} for p in params] if self.group_each else params
        opt: Any = getattr(braze.optim, self.optimizer)(groups, lr=0.05, **self.options)
        grad_dtype = self.grad_dtype or self.dtype
        micro = self.micro or len(WEIGHTS)
        for step in range(UPDATES * micro):
            for i, p in enumerate(params):
                g = values(f"{self.name}/g{i}/{step}", tuple(p.shape), grad_dtype).to(device)
                if grad_dtype != self.dtype:
                    p.grad_dtype = grad_dtype
                p.grad = place_grad(g)
            if self.scale != 1.0:
                opt.grad_scale = torch.full((), self.scale, device=device)
                opt.found_inf = torch.full((), float(step == 1), device=device)
            if self.micro == 0:
                opt.accumulate(WEIGHTS[step % micro])
            if self.micro != 0 or (step + 1) % micro == 0:
                opt.step()
        results = {}
        for i, p in enumerate(params):
            results[f"p{i}"] = p.detach().cpu()
            if self.layout != "dense":  # what lies between and around the elements must stay
                memory = torch.empty(0, dtype=torch.uint8, device=device).set_(p.untyped_storage())
                results[f"p{i}.memory"] = memory.cpu()
            for key, value in sorted(opt.state[p].items()):
                if isinstance(value, Tensor):
                    results[f"p{i}.{key}"] = value.detach().cpu()
        return results


def _flags() -> Iterator[tuple[str, str, dict[str, Any]]]:
    sgd: dict[str, dict[str, Any]] = {
        "plain": {},
        "momentum": {"momentum": 0.9},
        "dampening": {"momentum": 0.9, "dampening": 0.3},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "maximize": {"momentum": 0.9, "maximize": True},
        "decay": {"momentum": 0.9, "weight_decay": 0.1},
        "l1": {"momentum": 0.9, "l1": 0.01},
        "all": dict(momentum=0.9, nesterov=True, maximize=True, weight_decay=0.1, l1=0.01),
        "fused": {"momentum": 0.9, "fused": True},
    }
    adam: dict[str, dict[str, Any]] = {
        "plain": {},
        "amsgrad": {"amsgrad": True},
        "maximize": {"maximize": True},
        "decay": {"weight_decay": 0.1},
        "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "l1": {"l1": 0.01},
        "betas": {"betas": (0.5, 0.75), "eps": 1e-3},
        "all": {"amsgrad": True, "maximize": True, "weight_decay": 0.1, "l1": 0.01},
        "fused": {"fused": True},
        "capturable": {"capturable": True},
        "capturable-amsgrad": {"capturable": True, "amsgrad": True, "weight_decay": 0.1},
    }
    yield from (("SGD", name, options) for name, options in sgd.items())
    yield from (("Adam", name, options) for name, options in adam.items())
    for name in ("plain", "amsgrad", "maximize", "l1", "all", "fused", "capturable"):
        yield "AdamW", name, adam[name]


MAIN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("SGD", {"momentum": 0.9}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
)


def _cases() -> Iterator[Case]:
    for optimizer, flag, options in _flags():
        for dtype in (fp32, fp64, bf16, fp16):
            short = dtype in (fp32, bf16) and flag in ("momentum", "amsgrad", "capturable", "all")
            yield Case(f"{optimizer}/{flag}/{NAMES[dtype]}", optimizer, options, dtype, short=short)
    for optimizer, options in MAIN:
        for dtype in (fp32, fp64, bf16, fp16):
            name = NAMES[dtype]
            yield Case(f"{optimizer}/sizes/{name}", optimizer, options, dtype, None, SIZES)
            yield Case(f"{optimizer}/large/{name}", optimizer, options, dtype, None, LARGE)
            short = dtype in (fp32, bf16) and optimizer == "AdamW"
            for layout in list(LAYOUTS)[1:]:  # the first is dense
                title = f"{optimizer}/{layout}/{name}"
                yield Case(title, optimizer, options, dtype, layout=layout, short=short)
        for dtype, grad in ((fp32, bf16), (fp32, fp16), (bf16, fp32), (fp16, fp32), (fp64, fp32)):
            name = f"{optimizer}/grad-{NAMES[grad]}/{NAMES[dtype]}"
            yield Case(name, optimizer, options, dtype, grad, short=optimizer == "AdamW")
        yield Case(f"{optimizer}/complex", optimizer, options, torch.complex64)
        yield Case(f"{optimizer}/many/fp32", optimizer, options, fp32, None, MANY)
        yield Case(f"{optimizer}/groups/fp32", optimizer, options, shapes=SIZES, group_each=True)
        for dtype in (fp32, bf16, fp16):
            name = NAMES[dtype]
            yield Case(f"{optimizer}/scaler/{name}", optimizer, options, dtype, scale=1024.0)
            # The norm's sum has another order on each device, which no fp32 factor shows.
            clipped = {**options, "max_grad_norm": 0.5, "ema_decay": 0.75}
            yield Case(f"{optimizer}/clipped/{name}", optimizer, clipped, dtype, short=True)
            for mode in ("mean", "sum"):
                both = {**options, "accumulation": mode}
                stepped = {**both, "accumulation_steps": 3}
                yield Case(f"{optimizer}/micro-{mode}/{name}", optimizer, stepped, dtype, micro=3)
                yield Case(f"{optimizer}/weights-{mode}/{name}", optimizer, both, dtype, micro=0)
    for dtype in (fp32, bf16, fp16):
        for name, options in (
            ("plain", {}),
            ("momentum", {"momentum": 0.9}),
            ("all", {"momentum": 0.9, "weight_decay": 0.1, "l1": 0.01, "maximize": True}),
        ):
            three = {**options, "accumulation_steps": 3}
            short = name == "all"
            yield Case(f"CAG/{name}/{NAMES[dtype]}", "CAG", three, dtype, micro=3, short=short)


def _misaligned(offset: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def place(x: torch.Tensor) -> torch.Tensor:
        flat = torch.zeros(x.numel() + offset, dtype=x.dtype, device=x.device)
        return flat[offset:].view(x.shape).copy_(x)

    return place


def _every_other(x: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype, device=x.device)
    return wide[..., 0].copy_(x)


def _transposed(x: torch.Tensor) -> torch.Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


# How a parameter and its gradient lie in memory.
LAYOUTS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "dense": (_same, _same),
    "misaligned": (_misaligned(1), _misaligned(3)),
    "misaligned-grad": (_same, _misaligned(1)),
    "strided": (_every_other, _same),
    "strided-both": (_every_other, _every_other),
    "transposed": (_transposed, _transposed),
    "transposed-grad": (_same, _transposed),
}
CASES: tuple[Case, ...] = tuple(_cases())
