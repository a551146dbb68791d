"""Whatever is changed between two steps, the next step sees it: compared with torch's for-loop in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from braze import optim
from torch import nn
from torch.nn import Parameter

Change = Callable[["Side"], None]
KINDS = ["SGD", "Adam", "AdamW"]
SHAPES = ((5, 4), (7,), (), (3, 2, 4, 2))


class Side:
    """One of the two optimizers that are treated alike."""

    def __init__(self, library: Any, kind: str) -> None:
        generator = torch.Generator().manual_seed(31)
        self.library, self.kind = library, kind
        self.params = [
            Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES
        ]
        options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01}
        if kind == "SGD":
            options["momentum"] = 0.9
        if library is torch.optim:
            options["foreach"] = False
        self.optimizer = getattr(library, kind)(
            [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.05}], **options
        )
        self.gradients = torch.Generator().manual_seed(32)
        self.skip: set[int] = set()

    def step(self) -> None:
        for i, p in enumerate(self.params):
            grad = torch.randn(p.shape, generator=self.gradients, dtype=torch.float64)
            p.grad = None if i in self.skip else grad.to(p.dtype)
        self.optimizer.step()

    @property
    def buffer(self) -> str:
        return "momentum_buffer" if self.kind == "SGD" else "exp_avg"

    def state(self, i: int) -> dict[str, Any]:
        return self.optimizer.state[self.params[i]]


def assert_equal(ours: Side, theirs: Side, tolerance: float = 1e-12) -> None:
    for i, (p, q) in enumerate(zip(ours.params, theirs.params, strict=True)):
        torch.testing.assert_close(
            p.detach(), q.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"{i}: {m}"
        )
        expected = theirs.optimizer.state.get(q, {})
        got = ours.optimizer.state.get(p, {})
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=tolerance, atol=tolerance)


def compare(kind: str, *changes: Change) -> Side:
    """Two steps, then each change followed by two steps, on both sides. Returns braze's side."""
    ours, theirs = Side(optim, kind), Side(torch.optim, kind)
    for change in (None, *changes):
        for side in (ours, theirs):
            if change is not None:
                change(side)
            side.step()
            side.step()
        assert_equal(ours, theirs)
    return ours


def swap_data(side: Side) -> None:
    side.params[0].data = side.params[0].data.clone() * 2


def swap_data_in_place(side: Side) -> None:
    """Another storage behind the same strides, and the old one reused by another tensor."""
    old = side.params[0].data
    side.params[0].data = old.clone()
    old.fill_(torch.nan)


def swap_strides(side: Side) -> None:
    side.params[0].data = side.params[0].data.t().contiguous().t()


def swap_shape(side: Side) -> None:
    p = side.params[0]
    p.data = torch.ones(6, 2, dtype=p.dtype)
    for key, value in side.state(0).items():
        if key != "step":
            side.state(0)[key] = torch.full_like(p.data, float(value.abs().mean()))


def swap_to_view(side: Side) -> None:
    p = side.params[0]
    p.data = p.data.repeat_interleave(2, dim=1)[:, ::2]


def toggle_requires_grad(side: Side) -> None:
    for p in side.params[:2]:
        p.requires_grad_(not p.requires_grad)


def remove_param(side: Side) -> None:
    p = side.optimizer.param_groups[0]["params"].pop(0)
    side.params.remove(p)


def exchange_param(side: Side) -> None:
    side.params[1] = Parameter(torch.ones(9, dtype=torch.float64))
    side.optimizer.param_groups[0]["params"][1] = side.params[1]


def append_param(side: Side) -> None:
    side.params.append(Parameter(torch.ones(9, dtype=torch.float64)))
    side.optimizer.param_groups[1]["params"].append(side.params[-1])


def new_list(side: Side) -> None:
    group = side.optimizer.param_groups[0]
    group["params"] = list(reversed(group["params"]))


def remove_group(side: Side) -> None:
    group = side.optimizer.param_groups.pop(0)
    side.params = [p for p in side.params if all(p is not q for q in group["params"])]


def reorder_groups(side: Side) -> None:
    side.optimizer.param_groups.reverse()


def exchange_group(side: Side) -> None:
    side.optimizer.param_groups[1] = dict(side.optimizer.param_groups[1], lr=0.3)


def new_groups(side: Side) -> None:
    side.optimizer.param_groups = [dict(g, lr=0.2) for g in side.optimizer.param_groups]


def add_param_group(side: Side) -> None:
    side.params.append(Parameter(torch.ones(9, dtype=torch.float64)))
    side.optimizer.add_param_group({"params": [side.params[-1]], "lr": 0.3})


def some_gradients(side: Side) -> None:
    side.skip = {0, 2}


def other_gradients(side: Side) -> None:
    side.skip = {1}


def no_gradients(side: Side) -> None:
    side.skip = set(range(10))


def replace_state(side: Side) -> None:
    side.state(0)[side.buffer] = torch.full((5, 4), 0.25, dtype=torch.float64)


def clear_state(side: Side) -> None:
    side.state(0).clear()


def drop_state(side: Side) -> None:
    del side.optimizer.state[side.params[0]]


def replace_inner_state(side: Side) -> None:
    old = side.state(1)
    side.optimizer.state[side.params[1]] = {k: v.clone() + 1 for k, v in old.items()}


def replace_all_state(side: Side) -> None:
    state = side.optimizer.state
    fresh = type(state)(dict)
    fresh.update({p: {k: v.clone() for k, v in e.items()} for p, e in state.items()})
    for entry in state.values():
        for value in entry.values():
            value.fill_(torch.nan)
    side.optimizer.state = fresh


def swap_state_data(side: Side) -> None:
    tensor = side.state(0)[side.buffer]
    tensor.data = tensor.data.clone() * 3


def transpose_state(side: Side) -> None:
    """The same object, with other strides and then other values."""
    tensor = side.state(0)[side.buffer]
    tensor.data = tensor.data.t().contiguous().t()


def resize_state(side: Side) -> None:
    """In place, to nothing and back: the memory is another one."""
    tensor = side.state(0)[side.buffer]
    tensor.resize_(0).untyped_storage().resize_(0)
    tensor.resize_(5, 4).fill_(0.5)


def move_state_offset(side: Side) -> None:
    tensor = side.state(0)[side.buffer]
    storage = torch.cat([torch.full((3,), torch.nan, dtype=torch.float64), tensor.flatten()])
    tensor.set_(storage.untyped_storage(), 3, (5, 4), (4, 1))


def resize_storage(side: Side) -> None:
    """As FSDP frees and regains a parameter's memory."""
    p = side.params[0]
    kept, size = p.detach().clone(), p.untyped_storage().nbytes()
    p.untyped_storage().resize_(0)
    blocker = torch.empty(size, dtype=torch.uint8)
    p.untyped_storage().resize_(size)
    p.detach().copy_(kept)
    del blocker


def swap_tensors(side: Side) -> None:
    other = Parameter(side.params[0].detach().t().contiguous().t() + 1)
    side.params[0].grad = None
    torch.utils.swap_tensors(side.params[0], other)


def swap_state_tensors(side: Side) -> None:
    other = torch.full((5, 4), 0.75, dtype=torch.float64)
    torch.utils.swap_tensors(side.state(0)[side.buffer], other)


def load_state(side: Side) -> None:
    saved = copy.deepcopy(side.optimizer.state_dict())
    side.step()
    side.optimizer.load_state_dict(saved)


def to_float_and_back(side: Side) -> None:
    """What nn.Module.to does: new data behind the same Parameter."""
    module = nn.Module()
    module.p, module.q = side.params[0], side.params[3]
    module.to(torch.float32).to(torch.float64)
    assert module.p is side.params[0]


def no_change(side: Side) -> None:
    pass


CHANGES: list[Change] = [
    swap_data, swap_data_in_place, swap_strides, swap_shape, swap_to_view, toggle_requires_grad,
    remove_param, exchange_param, append_param, new_list, remove_group, reorder_groups,
    exchange_group, new_groups, add_param_group, some_gradients, other_gradients, no_gradients,
    replace_state, clear_state, drop_state, replace_inner_state, replace_all_state,
    swap_state_data, transpose_state, resize_state, move_state_offset, resize_storage,
    swap_tensors, swap_state_tensors, load_state, to_float_and_back, no_change,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_change_between_steps(change: Change, kind: str) -> None:
    compare(kind, change, no_change)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_one_after_another(kind: str) -> None:
    # Without those after which state belongs to no parameter, or there is nothing to compare.
    left_out = (remove_group, remove_param, exchange_param, no_gradients, swap_shape)
    chain = [c for c in CHANGES if c not in left_out]
    compare(kind, *chain)
    compare(kind, *reversed(chain))


def test_comparison_sees_a_missed_change() -> None:
    ours, theirs = Side(optim, "SGD"), Side(torch.optim, "SGD")
    swap_data(ours)
    ours.step()
    theirs.step()
    with pytest.raises(AssertionError):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("what", ["parameter", "state"])
def test_data_becomes_conjugate(what: str) -> None:
    """The same memory, sizes, strides and dtype; only the tensor's conjugate bit differs.

    Only for SGD: torch's Adam refuses such tensors, and its foreach code, which it prefers on a GPU, too.
    """
    results = []
    for library in (optim, torch.optim):
        p = Parameter(torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128))
        optimizer = library.SGD([p], lr=0.5, momentum=0.9, foreach=False)
        for step in range(3):
            p.grad = torch.tensor([1 + 1j, 2j], dtype=torch.complex128)
            optimizer.step()
            if step == 0:
                target = p if what == "parameter" else optimizer.state[p]["momentum_buffer"]
                target.data = target.data.conj()
        results.append(p.detach().resolve_conj())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_module_to_other_dtype_keeps_training() -> None:
    """The state stays fp32 and the parameter becomes bf16."""
    module = nn.Linear(5, 3)
    optimizer = optim.AdamW(module.parameters(), lr=0.1)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        module.to(dtype)
        before = module.weight.detach().clone()
        optimizer.zero_grad()
        module(torch.ones(2, 5, dtype=dtype)).sum().backward()
        optimizer.step()
        difference = (module.weight.detach().double() - before.double()).abs()
        assert 0.05 < float(difference.min()) <= float(difference.max()) < 0.2
    assert optimizer.state[module.weight]["exp_avg"].dtype == torch.float32
    assert float(optimizer.state[module.weight]["step"]) == 4


def test_two_optimizers_share_parameters() -> None:
    sides = []
    for library in (optim, torch.optim):
        first, second = Side(library, "SGD"), Side(library, "AdamW")
        for group, other in zip(
            second.optimizer.param_groups, first.optimizer.param_groups, strict=True
        ):
            group["params"] = list(other["params"])
        second.params = first.params
        for _ in range(3):
            first.step()
            second.step()
        sides.append((first, second))
    assert_equal(sides[0][0], sides[1][0])
    assert_equal(sides[0][1], sides[1][1])
