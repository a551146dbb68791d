"""One optimizer step, or all that follows backward(), against torch.optim's fastest mode.

Timed is opt.step() with every gradient present. clip, amp, ema: with clipping by the norm, a GradScaler and an
average of the weights, which are one call of braze's; the loss scale is 1 and the limit is never reached, so
that gradients stay as they are. On CUDA also graphs of a step, whether the host waits, and launches.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import braze.amp
import braze.nn.utils
import braze.optim
import torch
from torch.nn import Parameter
from torch.optim.swa_utils import get_ema_multi_avg_fn

from . import peers
from .clock import Call, Cuda
from .harness import DTYPES, Built, Case, Part, Setting, Suite, difference
from .resnet50 import convolutions
from .rows import Row, Work, choose, goal
from .session import commands

OPTIONS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 1e-3, "momentum": 0.9},
    "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-3},
    "RMSprop": {"lr": 1e-3},
    "Lion": {"lr": 1e-4},
}
# Reads and writes of one parameter element, in elements: p, g and the state.
ELEMENTS_MOVED = {"SGD": 5, "Adam": 7, "AdamW": 7, "RMSprop": 5, "Lion": 5}
TORCH_MODES: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
MAX_NORM, DECAY = 1e9, 0.999
CLIP = "clip_grad_norm_"
# On CUDA, of what a copy reaches in the same run.
COPY_GOAL, MODEL_COPY_GOAL, RECIPE_GOAL = 0.95, 0.85, 1.4
# What is checked of a cell before it is timed: elements, at most.
_CHECKED = 2**20


@dataclass(frozen=True)
class Cell:
    """Which tensors are stepped."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "fp32"
    group_each: bool = False
    quick: bool = False

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def bytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    def small(self) -> Cell:
        """What is checked in its place."""
        if self.numel <= _CHECKED:
            return self
        kept, shapes = 0, []
        for shape in self.shapes:
            kept += torch.Size(shape).numel()
            shapes.append(shape)
            if kept > _CHECKED:
                break
        shapes = [s if torch.Size(s).numel() <= _CHECKED else (_CHECKED + 3,) for s in shapes]
        return Cell(self.name, tuple(shapes), self.dtype, self.group_each)

    def groups(self, device: str) -> Any:
        """Parameters with gradients, the same for all optimizers, so that none has the luckier pages."""

        def random(shape: Sequence[int]) -> torch.Tensor:
            return torch.randn(shape, device=device).to(DTYPES[self.dtype])

        params = [Parameter(random(shape)) for shape in self.shapes]
        for p in params:
            p.grad = random(p.shape)
        return [{"params": [p]} for p in params] if self.group_each else params


@dataclass(frozen=True)
class Recipe:
    """What there is beside the step."""

    clip: bool = False
    amp: bool = False
    ema: bool = False

    @property
    def name(self) -> str:
        """ " clip+amp" and so on; nothing for the step alone."""
        parts = [name for name in ("clip", "amp", "ema") if getattr(self, name)]
        return f" {'+'.join(parts)}" if parts else ""

    def bytes_moved(self, cell: Cell, name: str) -> int:
        """The fewest bytes: of the step, the gradients once more, and the average read and written."""
        if name == CLIP:
            return cell.bytes
        return cell.bytes * (ELEMENTS_MOVED[name] + (self.clip or self.amp) + 2 * self.ema)


def resnet50_shapes() -> tuple[tuple[int, ...], ...]:
    """ResNet-50's 161 parameters in the model's order: 53 convolutions, 53 batch norms, 1 linear layer."""
    shapes: list[tuple[int, ...]] = []
    for c in convolutions():
        shapes.extend([(c.outputs, c.inputs, c.kernel, c.kernel), (c.outputs,), (c.outputs,)])
    return (*shapes, (1000, 2048), (1000,))


def _sizes(dtype: str, *powers: int, quick: tuple[int, ...] = ()) -> list[Cell]:
    names = {2: "100", 3: "1K", 4: "10K", 5: "100K", 6: "1M", 7: "10M", 8: "100M"}
    return [Cell(f"{dtype} {names[n]}", ((10**n,),), dtype, quick=n in quick) for n in powers]


THOUSAND = Cell("1000 x 1024", ((1024,),) * 1000, quick=True)
RESNET50 = Cell("ResNet-50", resnet50_shapes(), quick=True)
GROUPS = Cell("465 groups of 64", ((64,),) * 465, group_each=True)
SMALL = Cell("1000 x 64", ((64,),) * 1000, quick=True)
LARGE, LARGE_BF16 = _sizes("fp32", 8)[0], _sizes("bf16", 8)[0]
# Those with a goal on CUDA come first: a run that is cut short has them.
CELLS = (
    THOUSAND,
    RESNET50,
    GROUPS,
    LARGE,
    LARGE_BF16,
    SMALL,
    Cell("1 x 64", ((64,),)),
    Cell("200 x (64x64 + 64)", ((64, 64), (64,)) * 200),
    *_sizes("fp32", 2, 3, 4, 5, 6, 7, quick=(4, 6, 7)),
    *_sizes("bf16", 4, 5, 6, 7, quick=(6, 7)),
    *_sizes("fp16", 6),
)
RECIPE_CELLS = (LARGE, RESNET50, SMALL, _sizes("bf16", 7)[0])
RECIPES = (Recipe(clip=True, amp=True), Recipe(clip=True, amp=True, ema=True))
# AdamW first: a run that is cut short has what most people ask for.
ORDER = ("AdamW", "SGD", "Adam", "RMSprop", "Lion")


def torch_optimizers(name: str, dtype: str) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Constructors of what braze's class is measured against: the modes of torch's class, else its formula
    in torch's operators."""
    ours, theirs = getattr(braze.optim, name), getattr(torch.optim, name, None)
    if theirs is None:
        written = ours._torch_class
        return {"for-loop": lambda groups: written(groups, ours(groups, **OPTIONS[name]).defaults)}
    known = inspect.signature(theirs).parameters
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {}
    for mode, flags in TORCH_MODES.items():
        given = {flag: value for flag, value in flags.items() if flag in known}
        if given.items() >= {k: v for k, v in flags.items() if v}.items():
            found[mode] = partial(theirs, **OPTIONS[name], **given)
    if name == "SGD" and dtype != "fp32" and _fused_sgd_is_broken():
        del found["fused"]
    return found


def _fused_sgd_is_broken() -> bool:
    """torch 2.13's fused SGD leaves whole blocks of 16-bit parameters untouched: not a contender."""
    p = Parameter(torch.ones(64, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.5, momentum=0.9, fused=True).step()
    return not bool((p == 0.5).all())


def _parameters(groups: Any) -> list[torch.Tensor]:
    return [p for g in groups for p in g["params"]] if isinstance(groups[0], dict) else groups


def _scaler(cls: Any, device: str) -> Any:
    """Its scale stays 1."""
    scaler = cls(device, init_scale=1.0, growth_interval=2**30)
    scaler.scale(torch.ones((), device=device))
    return scaler


def _torch_recipe(
    optimizer: torch.optim.Optimizer, params: list[torch.Tensor], recipe: Recipe, device: str
) -> Call:
    if not recipe.name:
        return optimizer.step
    scaler = _scaler(torch.amp.GradScaler, device) if recipe.amp else None
    averages = [p.detach().clone() for p in params] if recipe.ema else None
    average: Callable[..., None] = get_ema_multi_avg_fn(DECAY)

    def step() -> None:
        if scaler is not None and recipe.clip:
            scaler.unscale_(optimizer)
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if averages is not None:
            average(averages, params, 1)

    return step


def _braze_recipe(groups: Any, name: str, recipe: Recipe, device: str, **mode: bool) -> Call:
    ours = getattr(braze.optim, name)(
        groups,
        **OPTIONS[name],
        **mode,
        **({"max_grad_norm": MAX_NORM} if recipe.clip else {}),
        **({"ema_decay": DECAY} if recipe.ema else {}),
    )
    if not recipe.amp:
        step: Call = ours.step
        return step
    scaler = _scaler(braze.amp.GradScaler, device)

    def scaled() -> None:
        scaler.step(ours)
        scaler.update()

    return scaled


def _makers(cell: Cell, name: str, recipe: Recipe, setting: Setting) -> dict[str, Any]:
    """The step with each of torch's modes, braze's, the peers', and on CUDA graphs."""
    groups, device = cell.groups(setting.device), setting.device
    params = _parameters(groups)
    if name == CLIP:
        return {
            "torch foreach": lambda: partial(torch.nn.utils.clip_grad_norm_, params, MAX_NORM),
            "braze": lambda: partial(braze.nn.utils.clip_grad_norm_, params, MAX_NORM),
        }
    modes = torch_optimizers(name, cell.dtype)
    makers: dict[str, Any] = {
        f"torch {mode}": lambda make=make: _torch_recipe(make(groups), params, recipe, device)
        for mode, make in modes.items()
    }
    makers["braze"] = partial(_braze_recipe, groups, name, recipe, device)
    if recipe.name:
        return makers
    if isinstance(setting.clock, Cuda):
        graph, last = setting.clock.graph, [*modes.values()][-1]
        capturable = {} if name == "SGD" else {"capturable": True}
        # RMSprop has no fused in torch, and Lion is not in torch at all.
        if "fused" in inspect.signature(getattr(braze.optim, name)).parameters:
            makers["braze fused"] = partial(makers["braze"], fused=True)
        makers["torch graph"] = lambda: graph(last(groups, **capturable).step)
        makers["braze graph"] = lambda: graph(makers["braze"](**capturable))
    return makers | peers.optimizers(setting.against, name, groups, OPTIONS[name])


def _check(cell: Cell, name: str, recipe: Recipe, setting: Setting) -> float:
    """Two steps of braze's and of torch's, from the same numbers."""
    small = cell.small()
    results: list[list[Any]] = []
    for _ in range(2):
        torch.manual_seed(0)
        groups = small.groups(setting.device)
        params = _parameters(groups)
        if name == CLIP:
            torch_clip, braze_clip = torch.nn.utils.clip_grad_norm_, braze.nn.utils.clip_grad_norm_
            (torch_clip if not results else braze_clip)(params, 0.5)
        elif not results:
            # The last mode: in fp16 the for-loop's eps is 0, and 0 / 0 is no number.
            make = [*torch_optimizers(name, cell.dtype).values()][-1]
            call = _torch_recipe(make(groups), params, recipe, setting.device)
            call(), call()
        else:
            call = _braze_recipe(groups, name, recipe, setting.device)
            call(), call()
        results.append([p.grad if name == CLIP else p for p in params])
    return difference(results[1], results[0])


def _goals(cell: Cell, name: str, recipe: Recipe, row: Row) -> list[dict[str, Any]]:
    """Those that the row has on CUDA."""
    if row["device"] != "cuda":
        return []
    found, title = [], row["name"]
    ours = row["contenders"]["braze"]
    wall = ours["warm"]["median_us"]
    on_device = ours["device"]["median_us"] or wall
    ratio, share = row["ratio"], row["floor_us"] / on_device
    if recipe.name:
        waits = row["host_waits"]
        found.append(goal(f"{title}: host waits, none", float(waits), not waits))
        if cell.numel >= 10**8:
            text = f"{title}: at least {RECIPE_GOAL} x torch's"
            found.append(goal(text, ratio, ratio >= RECIPE_GOAL))
        return found
    if cell == THOUSAND and name == "AdamW":
        found.append(goal(f"{title}: at most 60 us a step", wall, wall <= 60))
    if cell == RESNET50 and name == "AdamW":
        text = f"{title}: end to end at least {MODEL_COPY_GOAL} of a copy"
        found.append(goal(text, row["of_floor"], row["of_floor"] >= MODEL_COPY_GOAL))
    if cell.group_each:
        found.append(goal(f"{title}: at least 100 x torch", ratio, ratio >= 100))
    if cell == LARGE:
        found.append(goal(f"{title}: at least {COPY_GOAL} of a copy", share, share >= COPY_GOAL))
    return found


def _case(cell: Cell, name: str, recipe: Recipe = Recipe()) -> Case:
    def build(setting: Setting) -> Built:
        makers = _makers(cell, name, recipe, setting)
        return Built(makers, lambda: _check(cell, name, recipe, setting))

    tags = {
        "optimizer": name,
        "dtype": cell.dtype,
        "elements": cell.numel,
        "tensors": len(cell.shapes),
        "recipe": "clip alone" if name == CLIP else recipe.name.strip() or "step",
    }
    # Parameters, gradients, seven modes' states, foreach's temporaries, fp32 sources.
    needs = cell.bytes * (2 + 2 * 7 + 4) + 2 * 4 * cell.numel
    part = Part(build, recipe.bytes_moved(cell, name), needs=needs)
    # A few of many: --quick has three minutes for everything.
    quick = cell.quick and (name == "AdamW" or (name == "SGD" and cell.numel > 10**6))
    title = f"{name}{'' if name == CLIP else recipe.name} / {cell.name}"
    return Case(title, tags, (part,), quick, partial(_goals, cell, name, recipe))


CASES = (
    *(
        _case(cell, name)
        for cell in CELLS
        for name in ORDER
        # In fp16 the eps of torch's RMSprop, which has no fused mode, is 0: its results are no numbers.
        if (name, cell.dtype) != ("RMSprop", "fp16")
    ),
    *(_case(c, name, r) for c in RECIPE_CELLS for name in ("AdamW", "SGD") for r in RECIPES),
    *(_case(cell, CLIP) for cell in RECIPE_CELLS),
)


def _launches(cell: Cell, name: str, setting: Setting, row: Row) -> None:
    """After all times: the profiler may slow down launches from then on."""
    assert isinstance(setting.clock, Cuda)
    row["launches"] = {}
    for mode, make in _makers(cell, name, Recipe(), setting).items():
        (call := make())()
        row["launches"][mode] = setting.clock.kernels(call)


def _more(arguments: argparse.Namespace, setting: Setting) -> list[Work]:
    if not isinstance(setting.clock, Cuda):
        return []
    pairs = {
        f"launches / {name} / {cell.name}": (cell, name)
        for cell in CELLS[:4]
        for name in ("AdamW", "SGD")
    }
    wanted = choose([*pairs], arguments.filter) if arguments.filter else [*pairs]
    return [Work(n, partial(_launches, *pairs[n], setting)) for n in wanted]


SUITE = Suite("optim", lambda arguments: CASES, 1.5, {"cpu": "warm", "cuda": "warm"}, more=_more)
add_arguments, run = commands(SUITE)
