"""Folded convolutions by cuDNN, on stand-ins: the faster way is taken; engines that do not exist; captures."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from cudnn_stand_in import LAYOUTS, MEASURING, NHWC, Cudnn, check, folded, image, module
from torch import Tensor

pytestmark = pytest.mark.cpu_only("has stand-ins for what is CUDA's")


def test_timed_once(cudnn: Cudnn) -> None:
    """For every shape, dtype, format and with or without a residual."""
    model = module()
    x = image()
    for arguments in ((x,), (x, image()), (image(3, 8, 7, 6),), (image(layout=LAYOUTS["nchw"]),)):
        # With parameters in channels-last format, there is one format.
        first = [] if not arguments[0].is_contiguous(memory_format=NHWC) else MEASURING
        check(model, *arguments)
        assert cudnn.take() == [*first, "fused"]
        check(model, *arguments)
        assert cudnn.take() == ["fused"]
    for change in (torch.bfloat16, torch.float32):
        model.to(change)
        check(model, x.to(change))
        assert cudnn.take() == [*(MEASURING if change is torch.bfloat16 else []), "fused"]
    assert cudnn.synchronized == 3


def test_timed_once_for_a_format(cudnn: Cudnn) -> None:
    model = module(layout=LAYOUTS["nchw"])
    for layout in ("nchw", "nhwc"):
        for calls in ([*MEASURING, "fused"], ["fused"]):
            check(model, image(layout=LAYOUTS[layout]))
            assert cudnn.take() == calls


def test_the_slower_one_is_not_taken(cudnn: Cudnn) -> None:
    model = module()
    cudnn.cost["fused"] = 3.0
    check(model, image())
    assert cudnn.take() == [*MEASURING, "apart"]
    cudnn.cost["fused"] = 1.0
    check(model, image())
    assert cudnn.take() == ["apart"]
    check(model, image(1, 8, 7, 6))
    assert cudnn.take() == [*MEASURING, "fused"]


def test_the_best_run_counts(cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch) -> None:
    model = module()
    costs = iter([1.0, 1.0, 1.0, 9.0, 1.0, 9.0])

    def relu(*arguments: Any) -> Tensor:
        cudnn.cost["fused"] = next(costs, 1.0)
        return cudnn.relu(*arguments)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    check(model, image())
    assert cudnn.take() == [*MEASURING, "fused"]


@pytest.mark.parametrize("slow", [3, 5])
def test_many_shapes_are_not_timed(cudnn: Cudnn, slow: int) -> None:
    """From the ninth on, a shape is taken to be like most."""
    model = module()
    for n in range(1, 9):
        cudnn.cost["fused"] = 3.0 if n <= slow else 1.0
        check(model, image(n, 8, 5, 5))
        assert cudnn.take() == [*MEASURING, "apart" if n <= slow else "fused"]
    for n in (9, 10, 9):
        check(model, image(n, 8, 5, 5))
        assert cudnn.take() == ["apart" if slow == 5 else "fused"]


@pytest.mark.parametrize(
    "words",
    [
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph.",
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_no_engine_is_remembered(cudnn: Cudnn, words: str, known: bool) -> None:
    model = module()
    if known:
        check(model, image())
        cudnn.take()
    cudnn.error = RuntimeError(words)
    check(model, image())
    assert cudnn.take() == ["apart"]
    cudnn.error = None
    check(model, image())
    assert cudnn.take() == ["apart"]
    check(model, image(), image())
    assert cudnn.take() == [*MEASURING, "fused"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.OutOfMemoryError("CUDA out of memory, so it was unable to find an engine"),
        ValueError("unable to find an engine"),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_other_errors_are_raised(cudnn: Cudnn, error: Exception, known: bool) -> None:
    model = module()
    if known:
        check(model, image())
    cudnn.error = error
    with pytest.raises(type(error)) as caught:
        model(image())
    assert caught.value is error
    cudnn.error = None
    cudnn.take()
    check(model, image())
    assert cudnn.take() == ["fused"] if known else [*MEASURING, "fused"]


def test_out_of_memory_apart_is_raised(cudnn: Cudnn, monkeypatch: pytest.MonkeyPatch) -> None:
    model = module()
    with monkeypatch.context() as patch:
        patch.setattr(cudnn, "cost", {"fused": 1.0})  # a KeyError in the other
        with pytest.raises(KeyError):
            model(image())
    cudnn.take()
    check(model, image())
    assert cudnn.take() == [*MEASURING, "fused"]


def test_captures_do_not_fold_what_may_still_be_trained(cudnn: Cudnn) -> None:
    """A graph would go on with the weights that were folded, whatever an optimizer does to the parameters."""
    model = module()
    check(model, image())
    cudnn.take()
    for parameter in model.parameters():
        model.requires_grad_(False)
        parameter.requires_grad_()
        cudnn.capturing = True
        check(model, image())
        assert not cudnn.take()
        cudnn.capturing = False
    model.requires_grad_(False)
    cudnn.capturing = True
    check(model, image())
    assert cudnn.take() == ["fused"]


def test_captures_measure_and_fold_nothing(cudnn: Cudnn) -> None:
    model = module().requires_grad_(False)
    cudnn.capturing = True
    check(model, image())
    assert not cudnn.take() and folded(model) is None
    cudnn.capturing = False
    check(model, image())
    cudnn.take()
    cudnn.capturing = True
    check(model, image())
    assert cudnn.take() == ["fused"]
    check(model, image(1, 8, 7, 6))  # not yet timed
    assert cudnn.take() == ["apart"]
    model.conv.weight.mul_(2)
    check(model, image())  # nor folded
    assert not cudnn.take()
    cudnn.capturing = False
    check(model, image(1, 8, 7, 6))
    assert cudnn.take() == [*MEASURING, "fused"]


@pytest.mark.parametrize("captured", [False, True])
def test_what_a_graph_reads_lives_as_long_as_the_convolution(cudnn: Cudnn, captured: bool) -> None:
    model = module().requires_grad_(False)
    check(model, image())
    cudnn.capturing = captured
    check(model, image())
    cudnn.capturing = False
    cudnn.arguments.clear()
    read = weakref.ref(folded(model))
    model.conv.weight.mul_(2)
    check(model, image())
    model.train().eval()
    cudnn.arguments.clear()
    gc.collect()
    assert (read() is not None) == captured
    del model
    gc.collect()
    assert read() is None
