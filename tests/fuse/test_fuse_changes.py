"""Hooks on a fused model, changes to it, and the check by an example."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import braze
import pytest
import torch
from fuse_cases import Residual, bn, conv, image
from torch import Tensor, nn
from torch.nn.utils import parametrizations

pytestmark = pytest.mark.cpu_only("is about modules, which are the same on every device")

# --- hooks ---


def _fused_residual() -> tuple[Residual, Residual]:
    torch.manual_seed(0)
    model = Residual().double()
    return braze.fuse(copy.deepcopy(model)), model


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in ("bn1", "bn2", "relu", "conv1", "")
        for kind in ("forward", "forward_pre", "full_backward")
        if (name, kind) != ("bn2", "full_backward")  # whose result the sum is stored in
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_hooks_run(name: str, kind: str, before: bool) -> None:
    """Registered before or after fusing, on a module that is part of a fused call or on the block."""
    torch.manual_seed(0)
    plain = Residual().double()
    plain.relu = nn.ReLU()  # backward hooks forbid writing in place
    fused = braze.fuse(copy.deepcopy(plain)) if not before else copy.deepcopy(plain)
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    def hook(which: int) -> Callable[..., None]:
        def run(module: nn.Module, *values: Any) -> None:
            first = values[-1]
            while isinstance(first, tuple):
                first = first[0]
            seen[which].append(first.detach().clone())

        return run

    for i, model in enumerate((fused, plain)):
        getattr(model.get_submodule(name), f"register_{kind}_hook")(hook(i))
    if before:
        braze.fuse(fused)
    for model in (fused, plain):
        (model(image().requires_grad_()) * image(seed=1)).sum().backward()
    assert len(seen[0]) == len(seen[1]) > 0
    for ours, theirs in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_hook_may_change_the_result() -> None:
    fused, plain = _fused_residual()
    for model in (fused, plain):
        model.bn2.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(fused(image()), plain(image()), rtol=1e-9, atol=1e-9)


def test_global_hooks_see_every_module() -> None:
    fused, plain = _fused_residual()
    counts = {}
    for name, model in (("fused", fused), ("plain", plain)):
        count = [0]
        handle = nn.modules.module.register_module_forward_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + 1)
        )
        try:
            model(image())
        finally:
            handle.remove()
        counts[name] = count[0]
    assert counts["fused"] == counts["plain"] == 7


# --- changes after fusing ---


def test_attributes_and_children_may_change() -> None:
    fused, plain = _fused_residual()
    x = image()

    def same() -> None:
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-9)

    same()
    for model in (fused, plain):
        model.relu = nn.LeakyReLU(0.3)
    same()
    for model in (fused, plain):
        model.relu.negative_slope = 0.7
    same()
    for model in (fused, plain):
        torch.manual_seed(1)
        model.downsample = nn.Sequential(conv(), bn()).double()
    same()
    for model in (fused, plain):
        model.bn1 = nn.Identity()
    same()
    for model in (fused, plain):
        model.conv2 = parametrizations.weight_norm(model.conv2)
    same()
    for model in (fused, plain):
        model.bn2 = nn.GroupNorm(2, 4).double()
    same()


def test_a_sequential_may_change() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(conv(), bn(), nn.ReLU(), conv(), bn(), nn.ReLU()).double()
    fused = braze.fuse(copy.deepcopy(plain))
    x = image()

    def same() -> None:
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-9)

    same()
    for model in (fused, plain):
        model.append(nn.Sigmoid())
    same()
    for model in (fused, plain):
        del model[2]
    same()
    for model in (fused, plain):
        model[1] = nn.BatchNorm2d(4, eps=0.3).double()
    same()
    torch.testing.assert_close(fused[:3](x), plain[:3](x), rtol=1e-9, atol=1e-9)
    assert type(fused[:3]).__name__ == "Sequential"


def test_a_replaced_forward_is_called() -> None:
    fused, _ = _fused_residual()
    fused.forward = lambda x: x * 0
    assert not fused(image()).any()
    del fused.forward
    fused.bn1.forward = lambda x: x * 0
    plain = braze.unfuse(copy.deepcopy(fused))
    torch.testing.assert_close(fused(image()), plain(image()))


def test_other_dtypes_raise_what_torch_raises() -> None:
    fused, plain = _fused_residual()
    for model in (fused, plain):
        model.bn1.float()
        with pytest.raises(RuntimeError):
            model(image())
    fused, plain = _fused_residual()
    for model in (fused, plain):
        with pytest.raises(ValueError, match="expected 4D input"):
            nn.Module.__call__(model.bn1, image(3, 4))
        with pytest.raises(RuntimeError):
            model(image(3, 5, 6, 6))


# --- the check by an example ---


def test_an_example_is_compared_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = Residual(4, 6)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    braze.fuse(model, example=image().float(), channels_last=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert braze.fusion_report(model).joined


@pytest.mark.parametrize("what", ["norm_act", "conv_bn_act"])
def test_a_difference_is_found_and_undone(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control: a fused call that is wrong by a thousandth."""
    from braze._fusion import calls

    original = getattr(calls, what)
    monkeypatch.setattr(calls, what, lambda *args: original(*args) * 1.001)
    model = nn.Sequential(conv(), bn(), nn.ReLU()) if what == "conv_bn_act" else Residual()
    if what == "norm_act":
        monkeypatch.setattr("braze._fusion.match.calls.norm_act", calls.norm_act)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(braze.FusionError, match=r"differs by .* after fusing"):
        braze.fuse(model, example=image().float())
    assert [type(module) for module in model.modules()] == classes
    assert "_braze_fuse_options" not in model.__dict__


def test_an_example_that_does_not_fit() -> None:
    model = nn.Sequential(conv(), bn(), nn.ReLU())
    with pytest.raises(RuntimeError):
        braze.fuse(model, example=image(3, 5, 4, 4).float())
    assert type(model) is nn.Sequential and type(model[1]) is nn.BatchNorm2d


def test_no_model() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        braze.fuse(3)  # type: ignore[type-var]
