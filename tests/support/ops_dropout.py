"""The dropout operators' entries of the table."""

from __future__ import annotations

import batch_norm_reference as reference
import torch
from braze.nn.functional import dropout_mask
from op_table import Args, Op, Sample, Wrong, values
from torch import Tensor

SHAPES = ((7,), (4, 5), (3, 8, 5, 7), (0, 3), (2, 3, 4, 5, 2))
FEATURE_SHAPE = (3, 5, 4, 6)
LARGE_SHAPE = (7, 33, 41, 43)
# SELU's lower limit, -scale alpha.
LIMIT = 1.0507009873554805 * 1.6732632423543772


def kept(x: Tensor, state: Tensor, p: float, feature: bool) -> Tensor:
    """Whether each element stays: the mask is indexed in the order of memory, or by channel."""
    seed, offset = state.tolist()
    if feature:
        n, c = x.shape[:2]
        mask = dropout_mask(n * c, p, seed, offset, device=x.device)
        return mask.view(n, c, *([1] * (x.dim() - 2))).expand(x.shape)
    mask = dropout_mask(x.numel(), p, seed, offset, device=x.device)
    return mask.as_strided(x.shape, torch.empty_like(x).stride())


def rounded(p: float) -> float:
    return round(p * 65536) / 65536


def apply(
    x: Tensor,
    state: Tensor,
    p: float,
    alpha: bool = False,
    feature: bool = False,
    gradient: bool = False,
) -> Tensor:
    q, mask = rounded(p), kept(x, state, p, feature)
    if q == 1.0:
        return x * 0.0
    if not alpha:
        return torch.where(mask, x / (1 - q), 0.0)
    scale = ((1 + LIMIT**2 * q) * (1 - q)) ** -0.5
    shift = 0.0 if gradient else scale * LIMIT * q
    return torch.where(mask, x * scale + shift, 0.0 if gradient else scale * LIMIT * (q - 1))


def dropout(
    state: Tensor, x: Tensor, p: float, alpha: bool = False, feature: bool = False
) -> list[Tensor]:
    return [apply(x, state, p, alpha, feature), state]


def dropout_in_place(
    state: Tensor, x: Tensor, p: float, alpha: bool = False, feature: bool = False
) -> Tensor:
    x.copy_(apply(x.clone(), state, p, alpha, feature))
    return state


def dropout_add(state: Tensor, x: Tensor, residual: Tensor, p: float) -> list[Tensor]:
    return [apply(x, state, p) + residual, state]


def act_dropout(
    state: Tensor, x: Tensor, p: float, activation: str, parameter: float = 0.0
) -> list[Tensor]:
    mask = kept(x, state, p, False)
    y = reference.ACTIVATIONS[activation](x, parameter)
    return [torch.where(mask, y / (1 - rounded(p)), 0.0), state]


def act_dropout_in_place(
    state: Tensor, x: Tensor, p: float, activation: str, parameter: float = 0.0
) -> Tensor:
    x.copy_(act_dropout(state, x.clone(), p, activation, parameter)[0])
    return state


def act_dropout_backward(
    grad: Tensor, x: Tensor, state: Tensor, p: float, activation: str, parameter: float
) -> Tensor:
    slope = reference.derivative(x, activation, parameter)
    return torch.where(kept(x, state, p, False), grad * slope / (1 - rounded(p)), 0.0)


def state_of(seed: int) -> Tensor:
    return torch.tensor([seed, 3], dtype=torch.int64, device=values((1,), 1).device)


def plain(*rest: object) -> tuple[Sample, ...]:
    def make(shape: tuple[int, ...]) -> Sample:
        name = "x".join(map(str, shape))
        return Sample(name, lambda dtype: [values(shape, 1, dtype), *rest])

    return tuple(map(make, SHAPES))


def one(name: str, *rest: object, shape: tuple[int, ...] = FEATURE_SHAPE) -> Sample:
    return Sample(name, lambda dtype: [values(shape, 1, dtype), *rest])


def applied(name: str, seed: int, *rest: object) -> Sample:
    return Sample(name, lambda dtype: [values(FEATURE_SHAPE, 1, dtype), state_of(seed), *rest])


def added(shape: tuple[int, ...]) -> Sample:
    name = "x".join(map(str, shape))
    return Sample(name, lambda dtype: [values(shape, 1, dtype), values(shape, 2, dtype), 0.3])


def backward_of(activation: str, parameter: float = 0.0) -> Sample:
    def make(dtype: torch.dtype) -> Args:
        x = [values(FEATURE_SHAPE, seed, dtype) for seed in (1, 2)]
        return [*x, state_of(11), 0.3, activation, parameter]

    return Sample(activation, make)


def wrong_p(*rest: object) -> Wrong:
    return Wrong(
        "p", lambda: [values((3,), 1), 1.5, *rest], ValueError, "between 0 and 1, but got 1.5"
    )


INTEGERS = Wrong(
    "integers", lambda: [torch.ones(3, dtype=torch.int64), 0.5], TypeError, "input must be"
)

DROPOUT_OPS = (
    Op(
        name="dropout",
        samples=(
            *plain(0.3),
            one("none", 0.0),
            one("all", 1.0),
            one("alpha", 0.4, True),
            one("feature", 0.5, False, True),
            one("feature-alpha", 0.5, True, True),
        ),
        composite=dropout,
        large=(one("large", 0.5, shape=LARGE_SHAPE),),
        differentiable=(0,),
        wrong=(wrong_p(), INTEGERS),
        random=True,
        python=False,
    ),
    Op(
        name="dropout_",
        samples=(*plain(0.3), one("alpha", 0.4, True), one("feature", 0.5, False, True)),
        composite=dropout_in_place,
        large=(one("large", 0.5, shape=LARGE_SHAPE),),
        activations=(),
        mutated=(0,),
        wrong=(wrong_p(), INTEGERS),
        random=True,
        python=False,
    ),
    Op(
        name="dropout_apply",
        samples=(
            applied("plain", 11, 0.3, False, False, False),
            applied("alpha", -1, 0.3, True, False, False),
            applied("alpha-gradient", 5, 0.3, True, False, True),
            applied("feature", 2**62, 0.3, False, True, False),
        ),
        composite=apply,
        differentiable=(0,),
        wrong=(
            Wrong(
                "state",
                lambda: [values((3,), 1), state_of(1)[:1], 0.5],
                ValueError,
                "`rng_state` must be a contiguous tensor",
            ),
        ),
    ),
    Op(
        name="dropout_add",
        samples=tuple(map(added, SHAPES)),
        composite=dropout_add,
        large=(added(LARGE_SHAPE),),
        activations=(0, 1),
        differentiable=(0, 1),
        wrong=(
            Wrong(
                "residual",
                lambda: [values((3,), 1), values((4,), 1), 0.5],
                ValueError,
                "residual must have input's shape",
            ),
        ),
        random=True,
        python=False,
    ),
    Op(
        name="act_dropout",
        samples=(
            *plain(0.3, "relu"),
            *(one(a, 0.3, a, 0.2) for a in ("silu", "leaky_relu", "gelu_tanh")),
        ),
        composite=act_dropout,
        large=(one("large", 0.5, "silu", shape=LARGE_SHAPE),),
        differentiable=(0,),
        wrong=(
            wrong_p("relu"),
            Wrong(
                "activation",
                lambda: [values((3,), 1), 0.5, "swish"],
                ValueError,
                "activation is 'swish'",
            ),
        ),
        random=True,
        python=False,
    ),
    Op(
        name="act_dropout_",
        samples=(*plain(0.3, "relu"), one("mish", 0.3, "mish")),
        composite=act_dropout_in_place,
        activations=(),
        mutated=(0,),
        wrong=(wrong_p("relu"),),
        random=True,
        python=False,
    ),
    Op(
        name="act_dropout_backward",
        samples=(backward_of("silu"), backward_of("leaky_relu", 0.2), backward_of("tanh")),
        composite=act_dropout_backward,
        activations=(),
        wrong=(
            Wrong(
                "shape",
                lambda: [values((3,), 1), values((4,), 1), state_of(1), 0.5, "silu"],
                ValueError,
                "grad must have saved's shape",
            ),
        ),
        python=False,
    ),
)
