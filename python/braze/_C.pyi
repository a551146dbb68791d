"""Types of the compiled extension."""

from typing import Any

from torch import Generator, Tensor

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
    ) -> str: ...
    def fold(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        weight: float,
        into_state: bool,
    ) -> str: ...
    def reset(self) -> None: ...
    @property
    def rebuilds(self) -> int: ...

def register_backend(backend: object) -> None:
    """Takes the capsule ``backend`` of ``braze._cuda``. Raises RuntimeError if the builds do not fit."""

def backends() -> list[str]: ...
def dropout(
    input: Tensor,
    p: float,
    alpha: bool,
    feature: bool,
    generator: Generator | None,
    distinct: Tensor | None,
    /,
) -> tuple[Tensor, Tensor]: ...
def dropout_(
    input: Tensor, p: float, alpha: bool, feature: bool, generator: Generator | None, /
) -> Tensor: ...
def dropout_apply(
    input: Tensor, rng_state: Tensor, p: float, alpha: bool, feature: bool, gradient: bool, /
) -> Tensor: ...
def dropout_add(
    input: Tensor,
    residual: Tensor,
    p: float,
    generator: Generator | None,
    distinct: Tensor | None,
    /,
) -> tuple[Tensor, Tensor]: ...
def act_dropout(
    input: Tensor,
    p: float,
    activation: str,
    parameter: float,
    generator: Generator | None,
    distinct: Tensor | None,
    /,
) -> tuple[Tensor, Tensor]: ...
def act_dropout_(
    input: Tensor,
    p: float,
    activation: str,
    parameter: float,
    generator: Generator | None,
    /,
) -> Tensor: ...
def dropout_takes(input: Tensor, /) -> bool: ...
def dropout_terms(p: float, alpha: bool, /) -> tuple[float, float, float]:
    """Scale and shift of a kept element, and what a dropped one becomes."""

def fingerprint(tensors: tuple[Tensor | None, ...]) -> int:
    """Changes when one of the tensors is another one, has another memory or version, or, on the CPU, other
    contents."""

def available_instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def set_instruction_set(name: str) -> bool: ...

# Tensor operations: torch.ops.braze has the same ones, with their schemas, for torch.compile.

def batch_norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    parameter: float,
    residual: Tensor | None,
    /,
) -> Tensor:
    """act(bn(input) + residual). training: with the batch's statistics, else with the running ones."""

def batch_norm_act_fork(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    parameter: float,
    residual: Tensor | None,
    /,
) -> tuple[Tensor, Tensor]:
    """The same, as two tensors in one memory, whose gradients are added inside the backward kernels."""

def batch_norm_add_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    input2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    num_batches_tracked2: Tensor | None,
    momentum2: float | None,
    eps2: float,
    training: bool,
    activation: str,
    parameter: float,
    /,
) -> Tensor:
    """act(bn(input) + bn2(input2))."""

def batch_norm_add_act_fork(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    input2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    num_batches_tracked2: Tensor | None,
    momentum2: float | None,
    eps2: float,
    training: bool,
    activation: str,
    parameter: float,
    /,
) -> tuple[Tensor, Tensor]:
    """The same twice, as batch_norm_act_fork."""

# The steps on their own, for statistics over several processes; T is float64 for float64, else float32.

def batch_norm_moments(input: Tensor, /) -> Tensor:
    """T [3, C]: mean, sum of squared deviations, count."""

def batch_norm_combine(
    moments: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    /,
) -> Tensor:
    """moments [processes, 3, C] to T [5, C]: mean, its rounding error, invstd, scale, shift."""

def batch_norm_apply(
    input: Tensor, stats: Tensor, residual: Tensor | None, activation: str, parameter: float, /
) -> tuple[Tensor, Tensor]:
    """The output, and one bit per element where the backward wants it (else empty)."""

def batch_norm_reduce(
    grad: Tensor,
    input: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
    parameter: float,
    /,
) -> Tensor:
    """T [2, C]: the sums of d and of d (input - mean), with d the gradient before the activation."""

def batch_norm_apply_grad(
    grad: Tensor,
    input: Tensor,
    stats: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    sums: Tensor,
    count: Tensor,
    activation: str,
    parameter: float,
    need_residual: bool,
    /,
) -> tuple[Tensor, Tensor]:
    """Gradients of input and residual (else empty); count: T, 0-d, the values per channel in sums."""
