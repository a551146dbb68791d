"""Types of the compiled extension."""

from typing import Any

from torch import Tensor

class StepPlan:
    """An optimizer's parameters and state, compared with Python at every call.

    ``step`` and ``fold`` return ``""`` when done and ``"none"`` when there was no gradient.
    ``step`` also returns ``"overflow"`` (found_inf is set: nothing was changed) and ``"deferred"`` (done, but
    only the device knows whether found_inf was set and the step did nothing).
    Otherwise nothing was changed, and the word says why the kernels cannot do it: ``"mode"``,
    ``"sparse"``, ``"subclass"``, ``"dtype"``, ``"differentiable"``, ``"meta"``, ``"device"``, or ``"cuda:0"``.
    """

    def __init__(self, rule: str, owner: str) -> None: ...
    def step(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        grad_scale: float = 1.0,
        window_weight: float = -1.0,
        mean: bool = False,
        counts: bool = False,
        loss_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        max_norm: float = -1.0,
        find_overflow: bool = False,
        refuse_overflow: bool = False,
        statistics: bool = False,
        average_weight: float = -1.0,
        device_counts: bool = False,
    ) -> str: ...
    def fold(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        weight: float,
        into_state: bool,
    ) -> str: ...
    def statistics(self) -> list[tuple[Tensor, float, float, float, int, float]]: ...
    def reset(self) -> None: ...
    @property
    def norm(self) -> Tensor | None: ...
    @property
    def found_inf(self) -> Tensor | None: ...
    @property
    def rebuilds(self) -> int: ...

def clip_to_norm(gradients: list[Tensor], max_norm: float, refuse: bool) -> Tensor | None: ...
def clip_to_value(gradients: list[Tensor], limit: float) -> bool: ...
def register_backend(backend: object) -> None:
    """Takes the capsule ``backend`` of ``braze._cuda``. Raises RuntimeError if the builds do not fit."""

def backends() -> list[str]: ...
def dropout_takes(input: Tensor, /) -> bool: ...
def dropout_terms(p: float, alpha: bool, /) -> tuple[float, float, float]:
    """Scale and shift of a kept element, and what a dropped one becomes."""

def fingerprint(tensors: tuple[Tensor | None, ...]) -> int:
    """Changes when one of the tensors is another one, has another memory or version, or, on the CPU, other
    contents."""

def set_memory_reuse(on: bool) -> None: ...
def memory_reuse() -> bool: ...
def memory_kept() -> int: ...
def empty_memory_cache() -> None: ...
def available_instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> bool: ...

# What the binding was compiled against.
TORCH_VERSION: str
# "one", "two" or "curved", in the order of the activations' numbers.
ACTIVATION_SLOPES: dict[str, str]

def __getattr__(name: str) -> Any: ...  # tensor operations, with the arguments of torch.ops.braze's
