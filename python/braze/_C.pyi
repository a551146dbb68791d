"""Types of the compiled extension."""

from typing import Any

class StepPlan:
    """An optimizer's parameters and state, compared with Python at every call.

    ``step`` and ``fold`` return ``""`` when done and ``"none"`` when there was no gradient.
    Otherwise nothing was changed, and the word says why the kernels cannot do it: ``"sparse"``,
    ``"subclass"``, ``"dtype"``, ``"differentiable"``, ``"meta"``, ``"device"``, or ``"cuda:0"``.
    """

    def __init__(self, algorithm: str, owner: str) -> None: ...
    def step(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        grad_scale: float = 1.0,
        window_weight: float = -1.0,
        mean: bool = False,
        need_gradient: bool = False,
    ) -> str: ...
    def fold(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        weight: float,
        into_momentum: bool,
    ) -> str: ...
    def reset(self) -> None: ...
    @property
    def rebuilds(self) -> int: ...

def available_instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> bool: ...
