"""Lion against its own formula in torch's operators, which also does what the kernels do not take."""

from __future__ import annotations

import copy
from typing import Any

import braze.optim as optim
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter

KWARGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "lr": 1e-2},
    {"lr": torch.tensor(1e-2), "betas": (0.5, 0.8), "maximize": True},
]


def make_params(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((3, 4), (), (0,), (1030,))
    return [Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def train(optimizer: Any, params: list[Parameter], steps: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return [*(p.detach() for p in params), *(optimizer.state[p]["exp_avg"] for p in params)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
def test_equals_its_formula_in_torch(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = make_params(dtype), make_params(dtype)
    optimizer = optim.Lion(ours, **kwargs)
    reference = optim.Lion._torch_class(theirs, copy.deepcopy(optimizer.defaults))
    torch.testing.assert_close(train(optimizer, ours), train(reference, theirs))


def test_a_watching_mode_sees_the_formula() -> None:
    """The fall-back is the class's own: torch has none."""
    p = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = optim.Lion([p], lr=0.5)

    def step(grad: Tensor) -> Tensor:
        p.grad = grad
        optimizer.step()
        return p.detach().clone()

    graph = make_fx(step)(torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
    assert "sign" in graph.code
    assert p.tolist() == [0.5, 1.5, 1.0]


def test_sparse_gradients_are_refused() -> None:
    p = Parameter(torch.ones(4))
    p.grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="Lion does not support sparse gradients"):
        optim.Lion([p]).step()
    assert torch.equal(p.detach(), torch.ones(4))


def test_nan_in_the_gradient_shows_in_the_parameter() -> None:
    p = Parameter(torch.ones(4))
    p.grad = torch.tensor([float("nan"), 1.0, 0.0, -1.0])
    optim.Lion([p], lr=0.5).step()
    assert p.isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"lr": -1.0}, "learning rate"), ({"betas": (1.0, 0.9)}, "index 0"), ({"l1": -1.0}, "l1"),
     ({"weight_decay": -1.0}, "weight_decay"), ({"accumulation_steps": 0}, "accumulation_steps")],
)  # fmt: skip
def test_bad_arguments(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        optim.Lion([Parameter(torch.ones(1))], **kwargs)


def test_state_dict_and_accumulation() -> None:
    p, q = Parameter(torch.ones(5)), Parameter(torch.ones(5))
    a, b = optim.Lion([p], lr=0.1, accumulation_steps=2), optim.Lion([q], lr=0.1)
    for g in (1.0, -3.0):
        p.grad = torch.full((5,), g)
        a.step()
    q.grad = torch.full((5,), -1.0)
    b.step()
    assert torch.equal(p, q)
    assert a.state_dict()["state"][0].keys() == {"exp_avg"}
    c = optim.Lion([q], lr=0.3)
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    assert c.param_groups[0]["lr"] == 0.1 and torch.equal(
        c.state[q]["exp_avg"], a.state[p]["exp_avg"]
    )
