"""Folded convolutions by cuDNN, on stand-ins: which are no fused calls, and which are not folded at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import pytest
import torch
from braze import _native
from braze.nn import _fold, _fold_cudnn
from braze.nn._conv_bn import conv_bn_act
from cudnn_stand_in import MEASURING, NHWC, Cudnn, check, folded, image, module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.cpu_only("has stand-ins for what is CUDA's")


# What is not for the fused call is a folded convolution and one kernel.
APART: dict[str, Callable[[pytest.MonkeyPatch], dict[str, Any]]] = {
    "groups": lambda patch: {"groups": 2},
    "three channels": lambda patch: {"inputs": 3, "dtype": torch.bfloat16},
    "four outputs": lambda patch: {"outputs": 4, "dtype": torch.float16},
    "16 bits, contiguous": lambda patch: {
        "layout": torch.contiguous_format,
        "dtype": torch.bfloat16,
    },
    "silu": lambda patch: {"activation": "silu"},
    "identity": lambda patch: {"activation": "identity"},
    "cudnn.enabled": lambda patch: {},
    "cudnn.deterministic": lambda patch: {},
    "no cuDNN": lambda patch: _set(patch, torch.backends.cudnn, "is_available", lambda: False),
    "deterministic algorithms": lambda patch: _set(
        patch, torch, "are_deterministic_algorithms_enabled", lambda: True
    ),
    # 2 x 8 x 7 x 6, and 4 or 12 outputs
    "a large input": lambda patch: {
        "outputs": 4,
        **_set(patch, _fold_cudnn, "_MAX_NUMEL", 671),
    },
    "a large output": lambda patch: {
        "outputs": 12,
        **_set(patch, _fold_cudnn, "_MAX_NUMEL", 1007),
    },
    # Controls.
    "": lambda patch: {},
    "three channels in fp32": lambda patch: {"inputs": 3},
    "not so large": lambda patch: _set(patch, _fold_cudnn, "_MAX_NUMEL", 672),
}


# Not by assignment, which torch's own test tools forbid for the whole process.
FLAGS = {
    "cudnn.enabled": {"enabled": False},
    "cudnn.deterministic": {"enabled": True, "deterministic": True},
}


def _set(patch: pytest.MonkeyPatch, where: Any, name: str, value: Any) -> dict[str, Any]:
    patch.setattr(where, name, value)
    return {}


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("adds", [False, True])
def test_what_is_not_fused(
    cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch, name: str, adds: bool
) -> None:
    kwargs = {"dtype": torch.float32, "layout": NHWC, **APART[name](monkeypatch)}
    model = module(**kwargs)
    place = {"dtype": kwargs["dtype"], "layout": kwargs["layout"]}
    x = image(2, kwargs.get("inputs", 8), 7, 6, **place)
    residual = image(2, kwargs.get("outputs", 8), 7, 6, **place) if adds else None
    is_control = name in list(APART)[-3:]
    for expected_calls in ([*MEASURING, "fused"], ["fused"]):
        with torch.backends.cudnn.flags(**FLAGS.get(name, {"enabled": True})):
            y = check(model, x, residual)
        assert y.is_contiguous(memory_format=kwargs["layout"])
        assert cudnn.take() == (expected_calls if is_control else ["apart"])
    assert cudnn.synchronized == 1


def test_residuals_added_in_place_have_the_results_dtype(cudnn: Cudnn) -> None:
    model, x, residual = module(torch.bfloat16), image(dtype=torch.bfloat16), image()
    conv_bn_act(model.conv, model.bn, x, "relu", 0.0, residual, inplace=True)
    assert cudnn.take() == [*MEASURING, "fused"]
    assert torch.equal(cudnn.arguments[-1]["z"], residual.bfloat16())


def test_residuals_in_another_format_are_not_fused(cudnn: Cudnn) -> None:
    check(module(), image(), image(layout=torch.contiguous_format))
    assert cudnn.take() == ["apart"]


class Subclass(Tensor):
    pass


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Conv(nn.Conv2d):
    pass


def _with(model: Any, **attributes: Any) -> Any:
    for path, value in attributes.items():
        owner, _, name = path.partition("__")
        setattr(getattr(model, owner), name, value)
    return model


def _global_hook() -> AbstractContextManager[None]:
    stack = ExitStack()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    stack.callback(handle.remove)
    return stack


def _of_inference() -> Any:
    with torch.inference_mode():
        model = module()
        return _with(model, conv__weight=nn.Parameter(model.conv.weight.clone()))


FAKE = FakeTensorMode()


def _fake(model: Any) -> Any:
    for child in (model.conv, model.bn):
        for name, parameter in child._parameters.items():
            child._parameters[name] = FAKE.from_tensor(parameter)
        for name, buffer in child._buffers.items():
            child._buffers[name] = FAKE.from_tensor(buffer)
    return model


Refused = tuple[Callable[[], Any], Callable[[], tuple[Any, ...]], Callable[[], Any]]


def _refused(
    make: Callable[[], Any] = module,
    inputs: Callable[[], tuple[Any, ...]] = lambda: (image(),),
    context: Callable[[], Any] = nullcontext,
) -> Refused:
    return make, inputs, context


# What is not folded at all.
REFUSED: dict[str, Refused] = {
    "control": _refused(),
    "gradients": _refused(context=torch.enable_grad),
    "statistics of the batch": _refused(lambda: module().train()),
    "no running statistics": _refused(lambda: module(track_running_stats=False)),
    "padding by name": _refused(lambda: module(padding="same")),
    "circular padding": _refused(lambda: module(padding_mode="circular")),
    "another class": _refused(
        lambda: _with(module(), conv____class__=Conv),
    ),
    "a hook": _refused(lambda: _with(module(), conv__forward=lambda x: x)),
    "a global hook": _refused(context=_global_hook),
    "fp64": _refused(lambda: module(torch.float64), lambda: (image(dtype=torch.float64),)),
    "a subclass": _refused(inputs=lambda: (image().as_subclass(Subclass),)),
    "a weight of a subclass": _refused(
        lambda: _with(
            module(), conv__weight=nn.Parameter(torch.randn(8, 8, 3, 3).as_subclass(Subclass))
        )
    ),
    "an empty batch": _refused(inputs=lambda: (image(0, 8, 7, 6),)),
    "a residual to broadcast": _refused(inputs=lambda: (image(), image(1, 8, 7, 6))),
    "a residual of another dtype": _refused(
        lambda: module(torch.bfloat16), lambda: (image(dtype=torch.bfloat16), image())
    ),
    "a residual of a subclass": _refused(
        inputs=lambda: (image(), image().as_subclass(Subclass)),
    ),
    "parameters of inference mode": _refused(_of_inference),
    "a fake tensor": _refused(
        make=lambda: _fake(module()),
        inputs=lambda: (FAKE.from_tensor(image()),),
    ),
    "a mode": _refused(context=Mode),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_folded(cudnn: Cudnn, name: str) -> None:
    make, inputs, context = REFUSED[name]
    model = make()
    x, *residual = inputs()
    with context():  # ConvBNAct2d would sort some of them out
        conv_bn_act(model.conv, model.bn, x, "relu", 0.0, *residual)
    taken = cudnn.take()
    assert bool(taken) == (name == "control")
    assert (folded(model) is not None) == (name == "control")


def test_transforms_and_traces_are_not_folded(cudnn: Cudnn) -> None:
    model = module()
    torch.func.vmap(model)(image(3, 2 * 8, 7, 6).view(3, 2, 8, 7, 6))
    torch.func.jvp(model, (image(),), (image(),))
    torch.jit.trace(model, image(), check_trace=False)
    torch.compile(model, backend="eager")(image())
    torch.export.export(model, (image(),))
    assert not cudnn.take() and folded(model) is None


@pytest.mark.parametrize(
    "x",
    [image().as_subclass(Subclass), torch.randn(8, 8, 6), torch.randn(2, 8, 0, 6)],
    ids=["a subclass", "unbatched", "empty"],
)
def test_inputs_that_modules_sort_out(cudnn: Cudnn, x: Tensor) -> None:
    """And fused models do not."""
    model = module(padding=3)
    result = _fold.folded_conv_bn_act(model.conv, model.bn, x, "relu", 0.0, None, False)
    assert result is None and not cudnn.take()


def test_without_kernels_nothing_is_folded(cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "CUDA_FILE", None)
    model = module()
    check(model, image())
    assert not cudnn.take() and folded(model) is None


@pytest.mark.parametrize("bias", [False, True])
def test_wrong_inputs_get_torchs_errors(cudnn: Cudnn, bias: bool) -> None:
    model = module(padding=0, bias=bias)
    for x in (image()[0], image(2, 4, 7, 6), image(2, 8, 2, 2), image().bfloat16()):
        with pytest.raises((RuntimeError, ValueError)) as ours:
            model(x)
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            model.bn(model.conv(x))
        assert str(ours.value) == str(theirs.value)
    assert not cudnn.take()
