"""A whole training step after backward(): unscale, find overflows, clip, step, average the weights.

torch's recipe with each of its modes, against one call of braze. The loss scale is 1 and the limit of the norm
is never reached, so that gradients stay as they are; torch multiplies by both all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import braze.amp
import braze.nn.utils
import braze.optim
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .cells import ELEMENTS_MOVED, OPTIONS, Cell, resnet50_shapes, torch_optimizers
from .cuda_clock import Step

MAX_NORM, DECAY = 1e9, 0.999
CLIP = "clip_grad_norm_"

CELLS = (
    Cell("1000 x 64", ((64,),) * 1000, torch.float32, 10, 10),
    Cell("ResNet-50", resnet50_shapes(), torch.float32, 1.7, 1.7),
    Cell("fp32 100M", ((100_000_000,),), torch.float32, 1.7, 1.7),
    Cell("bf16 16M", ((2**24,),), torch.bfloat16, 1.7, 1.7),
)


@dataclass(frozen=True)
class Recipe:
    """What there is beside the step."""

    clip: bool
    amp: bool
    ema: bool

    def __bool__(self) -> bool:
        return self.clip or self.amp or self.ema

    def goal(self, cell: Cell, name: str) -> float:
        if name == CLIP:
            return 10.0 if len(cell.shapes) == 1000 else 1.0
        if not self:
            return cell.goal_sgd if name == "SGD" else cell.goal_adam
        return max(cell.goal_adam, 1.8 if self.ema else 0.0)

    def bytes_moved(self, cell: Cell, name: str) -> int:
        """The fewest bytes: the gradients once more, and the average read and written."""
        if name == CLIP:
            return cell.bytes
        return cell.bytes * (ELEMENTS_MOVED[name] + (self.clip or self.amp) + 2 * self.ema)


def _parameters(groups: Any) -> list[torch.Tensor]:
    return [p for g in groups for p in g["params"]] if isinstance(groups[0], dict) else groups


def _scaler(cls: Any, device: str) -> Any:
    scaler = cls(device, init_scale=1.0, growth_interval=2**30)
    scaler.scale(torch.ones((), device=device))  # makes its tensors
    return scaler


def _torch_recipe(optimizer: Any, params: list[torch.Tensor], recipe: Recipe, device: str) -> Step:
    if not recipe:
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


def contenders(groups: Any, name: str, recipe: Recipe, device: str) -> dict[str, Step]:
    """The recipe with each of torch's modes, and braze's."""
    params = _parameters(groups)
    if name == CLIP:
        return {
            "foreach": lambda: torch.nn.utils.clip_grad_norm_(params, MAX_NORM),
            "braze": lambda: braze.nn.utils.clip_grad_norm_(params, MAX_NORM),
        }
    calls = {
        mode: _torch_recipe(make(groups), params, recipe, device)
        for mode, make in torch_optimizers(name).items()
    }
    ours = getattr(braze.optim, name)(
        groups,
        **OPTIONS[name],
        **({"max_grad_norm": MAX_NORM} if recipe.clip else {}),
        **({"ema_decay": DECAY} if recipe.ema else {}),
    )
    if not recipe.amp:
        return {**calls, "braze": ours.step}
    scaler = _scaler(braze.amp.GradScaler, device)

    def step() -> None:
        scaler.step(ours)
        scaler.update()

    return {**calls, "braze": step}
