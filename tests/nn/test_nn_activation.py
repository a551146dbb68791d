"""Which activations can be fused, and by which names, modules and functions they may be given."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import braze.nn as bnn
import braze.nn.functional as bF
import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS, CASES
from braze.nn._activation import ACTIVATIONS as rows
from braze.nn._activation import NAMES, Activation, resolve
from nn_cases import assert_near, make_input
from torch import Tensor, nn


def forms() -> Iterator[tuple[Any, Activation]]:
    for name, case in CASES.items():
        for form in case.forms:
            given = getattr(torch.Tensor, form) if isinstance(form, str) else form
            options = getattr(form, "keywords", {}) | getattr(form, "__dict__", {})
            keys = [key for key in ("negative_slope", "alpha") if key in options]
            yield given, Activation(name, options[keys[0]] if keys else 0.0)


GIVEN: list[tuple[Any, Activation]] = [
    (None, Activation("identity")),
    *((name, Activation(name)) for name in NAMES if name not in ("leaky_relu", "elu")),
    ("leaky_relu", Activation("leaky_relu", 0.01)),
    ("elu", Activation("elu", 1.0)),
    (nn.Identity(), Activation("identity")),
    (nn.ReLU, Activation("relu")),
    (nn.LeakyReLU, Activation("leaky_relu", 0.01)),
    (bnn.SiLU(), Activation("silu")),
    (bF.relu, Activation("relu")),
    (functools.partial(F.relu, inplace=True), Activation("relu")),
    *forms(),
]


def without_address(value: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def test_all_have_a_case_and_a_number() -> None:
    assert set(NAMES) == set(rows) == set(CASES)


@pytest.mark.parametrize(("given", "meant"), GIVEN, ids=without_address)
def test_resolve(given: Any, meant: Activation) -> None:
    assert resolve(given) == meant


def test_negative_slope() -> None:
    assert resolve("leaky_relu", 0.3).parameter == 0.3
    assert resolve(F.leaky_relu, 0.3).parameter == 0.3
    assert resolve(nn.LeakyReLU(0.1), 0.3).parameter == 0.1
    assert resolve("relu", 0.3).parameter == 0.0


class Doubled(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    module = nn.ReLU()
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    "given",
    [
        "swish",
        "",
        nn.Softplus(2.0),
        nn.Softplus(threshold=10.0),
        functools.partial(F.softplus, beta=2.0),
        nn.PReLU(),
        nn.Hardtanh(-2.0, 2.0),
        functools.partial(F.hardtanh, min_val=0.0),
        Doubled(),
        Doubled,
        F.softmax,
        lambda z: z,
        functools.partial(F.relu, negative_slope=1.0),
        functools.partial(F.gelu, torch.ones(1)),
    ],
    ids=without_address,
)
def test_what_cannot_be_fused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"cannot be fused; use one of identity, relu, .*mish.*"):
        bnn.BatchNormAct2d(3, activation=given)
    with pytest.raises(ValueError, match="cannot be fused"):
        bnn.ConvBNAct2d(3, 4, 1, activation=given)
    with pytest.raises(ValueError, match="cannot be fused"):
        bF.batch_norm_act(torch.ones(2, 3), None, None, training=True, activation=given)


def test_hooks_would_be_lost() -> None:
    with pytest.raises(ValueError, match="hooks"):
        bnn.BatchNormAct2d(3, activation=hooked())


def test_neither_name_nor_function() -> None:
    with pytest.raises(TypeError, match=r"activation must be a name.*got int"):
        bnn.BatchNormAct2d(3, activation=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, joined: bool, training: bool) -> None:
    module = bnn.BatchNormAct2d(5, activation=name, negative_slope=0.2).train(training)
    truth = nn.BatchNorm2d(5).double().train(training)
    x = make_input("NHWC")
    r = make_input("NCHW", 1).detach().requires_grad_() if joined else None
    y = module(x, r)

    wide, wide_r = (None if t is None else t.detach().double().requires_grad_() for t in (x, r))
    z = truth(wide) if wide_r is None else truth(wide) + wide_r
    expected = ACTIVATIONS[name](z, module.activation_parameter)
    assert_near(y, expected, "output")
    dy = torch.randint(-64, 65, y.shape) / 32
    inputs = [t for t in (x, module.weight, module.bias, r) if t is not None]
    wides = [t for t in (wide, truth.weight, truth.bias, wide_r) if t is not None]
    found = torch.autograd.grad(y, inputs, dy)
    wanted = torch.autograd.grad(expected, wides, dy.double())
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert_near(a, b, f"gradient {i}", 4)


def test_in_front_of_the_shown_activation() -> None:
    assert "activation='relu'" in repr(bnn.BatchNormAct2d(3))
    assert "negative_slope=0.2" in repr(bnn.BatchNormAct1d(3, activation=nn.LeakyReLU(0.2)))
    assert "alpha=2.0" in repr(bnn.SyncBatchNormAct(3, activation=nn.ELU(2.0)))
