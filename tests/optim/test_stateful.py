"""Random sequences of what training code does to an optimizer, with torch's for-loop as the model."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from braze import optim
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor
from torch.nn import Parameter

SHAPES = ((), (3,), (4, 5), (2, 3, 4), (0,), (17,), (1, 6))
MAX_PARAMETERS = 12
TOLERANCE = 1e-10

Pair = tuple[Parameter, Parameter]


class Machine(RuleBasedStateMachine):
    """Two optimizers over equal parameters; every rule does the same to both."""

    kind = ""
    options: tuple[dict[str, Any], ...] = ()

    @initialize(seed=st.integers(0, 1000), choice=st.integers(0, 3), count=st.integers(1, 4))
    def start(self, seed: int, choice: int, count: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.pairs: list[Pair] = []
        options = dict(self.options[choice % len(self.options)], lr=0.05)
        pairs = [self.new_pair(seed + i) for i in range(count)]
        self.ours: Any = getattr(optim, self.kind)([p for p, _ in pairs], **options)
        self.theirs: Any = getattr(torch.optim, self.kind)(
            [q for _, q in pairs], **options, foreach=False
        )

    def draw(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def new_pair(self, index: int) -> Pair:
        values = self.draw(SHAPES[index % len(SHAPES)])
        pair = Parameter(values.clone()), Parameter(values.clone())
        self.pairs.append(pair)
        return pair

    def pick(self, index: int) -> Pair:
        return self.pairs[index % len(self.pairs)]

    def both(self) -> tuple[Any, Any]:
        return self.ours, self.theirs

    @rule(index=st.integers(0, 20), count=st.integers(1, 3), lr=st.sampled_from([0.01, 0.2]))
    def add_param_group(self, index: int, count: int, lr: float) -> None:
        if len(self.pairs) + count > MAX_PARAMETERS:
            return
        pairs = [self.new_pair(index + i) for i in range(count)]
        self.ours.add_param_group({"params": [p for p, _ in pairs], "lr": lr})
        self.theirs.add_param_group({"params": [q for _, q in pairs], "lr": lr})

    @rule(mask=st.integers(0, 2**MAX_PARAMETERS - 1), times=st.integers(1, 2))
    def step(self, mask: int, times: int) -> None:
        for _ in range(times):
            for i, (p, q) in enumerate(self.pairs):
                if mask >> i & 1:
                    grad = self.draw(p.shape)
                    p.grad, q.grad = grad, grad.clone()
            self.ours.step()
            self.theirs.step()

    @rule(index=st.integers(0, 20))
    def backward_and_step(self, index: int) -> None:
        for p in self.pick(index):
            if p.requires_grad:
                (p * p).sum().backward()
        self.ours.step()
        self.theirs.step()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        for optimizer in self.both():
            optimizer.zero_grad(set_to_none=set_to_none)

    @rule(
        group=st.integers(0, 5),
        key=st.sampled_from(["lr", "weight_decay"]),
        value=st.sampled_from([0.0, 0.01, 0.125, 1]),
        tensor=st.booleans(),
    )
    def change_option(self, group: int, key: str, value: float, tensor: bool) -> None:
        for optimizer in self.both():
            groups = optimizer.param_groups
            groups[group % len(groups)][key] = (
                torch.tensor(float(value), dtype=torch.float64) if tensor and key == "lr" else value
            )

    @rule(index=st.integers(0, 20), how=st.sampled_from(["scale", "transpose", "gaps", "same"]))
    def swap_data(self, index: int, how: str) -> None:
        for p in self.pick(index):
            data = p.data
            if how == "scale":
                p.data = data * 0.5
            elif how == "transpose" and data.dim() >= 2:
                p.data = data.transpose(0, 1).contiguous().transpose(0, 1)
            elif how == "gaps" and data.dim() >= 1:
                p.data = data.repeat_interleave(2, dim=-1)[..., ::2]
            else:
                p.data = data.clone()

    @rule(index=st.integers(0, 20))
    def toggle_requires_grad(self, index: int) -> None:
        for p in self.pick(index):
            p.requires_grad_(not p.requires_grad)

    @rule(index=st.integers(0, 20), value=st.sampled_from([0.0, 0.5]))
    def replace_state(self, index: int, value: float) -> None:
        for optimizer, p in zip(self.both(), self.pick(index), strict=True):
            for key in ("momentum_buffer", "exp_avg"):
                if isinstance(optimizer.state.get(p, {}).get(key), Tensor):
                    optimizer.state[p][key] = torch.full(p.shape, value, dtype=p.dtype)

    @rule(index=st.integers(0, 20))
    def forget_state(self, index: int) -> None:
        for optimizer, p in zip(self.both(), self.pick(index), strict=True):
            optimizer.state.pop(p, None)

    @rule(through_file=st.booleans())
    def reload(self, through_file: bool) -> None:
        for optimizer in self.both():
            saved = optimizer.state_dict()
            if through_file:
                file = io.BytesIO()
                torch.save(saved, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
            optimizer.load_state_dict(saved)

    @rule()
    def exchange_state_dicts(self) -> None:
        """A checkpoint of either library is one of the other."""
        ours, theirs = (copy.deepcopy(x.state_dict()) for x in self.both())
        for saved, other in ((ours, theirs), (theirs, ours)):
            for group, model in zip(saved["param_groups"], other["param_groups"], strict=True):
                assert group.keys() == model.keys()
                # Which of torch's own implementations runs is not the checkpoint's to say here.
                group["foreach"] = model["foreach"]
        self.ours.load_state_dict(theirs)
        self.theirs.load_state_dict(ours)

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy_optimizer(self, how: str) -> None:
        """The copy goes on, with parameters of its own."""
        pairs: list[list[Parameter]] = []
        for name in ("ours", "theirs"):
            optimizer = getattr(self, name)
            params = [pair[len(pairs)] for pair in self.pairs]
            old_grads = [p.grad for p in params]
            if how == "pickle":
                optimizer, params = pickle.loads(pickle.dumps((optimizer, params)))
            else:
                optimizer, params = copy.deepcopy((optimizer, params))
            # Pickle leaves gradients behind.
            for p, grad in zip(params, old_grads, strict=True):
                p.grad = None if grad is None else grad.clone()
            setattr(self, name, optimizer)
            pairs.append(params)
        self.pairs = list(zip(*pairs, strict=True))

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "ours"):
            return
        for i, (p, q) in enumerate(self.pairs):
            close(p.detach(), q.detach(), f"parameter {i}")
            got, want = self.ours.state.get(p, {}), self.theirs.state.get(q, {})
            want = {k: v for k, v in want.items() if v is not None}
            got = {k: v for k, v in got.items() if v is not None}
            assert got.keys() == want.keys(), i
            for key, value in want.items():
                close(got[key], value, f"{key} of {i}")

    @invariant()
    def gradients_are_untouched(self) -> None:
        for p, q in getattr(self, "pairs", []):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                close(p.grad, q.grad, "gradient")


def close(got: Tensor, want: Tensor, what: str) -> None:
    torch.testing.assert_close(
        got, want, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m: f"{what}: {m}"
    )


class SgdMachine(Machine):
    kind = "SGD"
    options = (
        {"momentum": 0.9},
        {},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"momentum": 0.5, "dampening": 0.25, "maximize": True},
    )


class AdamMachine(Machine):
    kind = "Adam"
    options = (
        {},
        {"amsgrad": True, "weight_decay": 0.01},
        {"maximize": True, "eps": 1e-3},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
    )


SETTINGS = settings(
    max_examples=120,
    stateful_step_count=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

SgdMachine.TestCase.settings = SETTINGS
AdamMachine.TestCase.settings = SETTINGS

TestSgd = SgdMachine.TestCase
TestAdam = AdamMachine.TestCase


@pytest.mark.parametrize("kind", ["Sgd", "Adam"])
def test_model_comparison_can_fail(kind: str) -> None:
    machine = {"Sgd": SgdMachine, "Adam": AdamMachine}[kind]()
    machine.start(seed=1, choice=0, count=3)
    machine.step(mask=7, times=2)
    machine.equal()
    machine.ours.param_groups[0]["lr"] *= 1 + 1e-6
    machine.step(mask=7, times=1)
    with pytest.raises(AssertionError):
        machine.equal()
