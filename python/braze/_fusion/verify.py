"""Does the fused model compute what the model did? Outputs, gradients and running statistics, on an example."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from braze.nn import functional

__all__ = ["FusionError", "check_same"]

# Relative, of the whole tensor: in fp64 only the order of sums differs.
_LIMITS = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}
_NAMES = "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split()
_DROPOUTS = frozenset(getattr(library, name) for library in (F, functional) for name in _NAMES)


class FusionError(RuntimeError):
    """The fused model does not compute what the model did, which is left as it was."""


class _NoDropout(TorchFunctionMode):
    """Dropout gives its input, as masks differ from torch's."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        return function(*args, **(kwargs or {}))


def _without_dropout(model: nn.Module) -> None:
    """Modules too: those of braze have no torch function."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def _tensors(value: Any) -> list[Tensor]:
    leaves = tree_flatten(value)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _results(model: nn.Module, example: Any, training: bool) -> Iterator[tuple[str, Tensor]]:
    model.train(training)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _NoDropout(), torch.enable_grad():
        torch.manual_seed(0)
        outputs = _tensors(_call(model, example))
    mode = "training" if training else "evaluation"
    for i, output in enumerate(outputs):
        yield f"output {i} in {mode}", output.detach()
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    differentiable = [output for output in outputs if output.requires_grad]
    if parameters and differentiable:
        weights = [
            torch.linspace(-1.0, 1.0, o.numel(), device=o.device, dtype=o.dtype).view(o.shape)
            for o in differentiable
        ]
        gradients = torch.autograd.grad(
            differentiable, [p for _, p in parameters], weights, allow_unused=True
        )
        for (name, parameter), gradient in zip(parameters, gradients, strict=True):
            found = torch.zeros_like(parameter) if gradient is None else gradient
            yield f"the gradient of {name} in {mode}", found.detach()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            yield f"buffer {name} after {mode}", buffer.detach().clone()


def _own_results(model: nn.Module, example: Any, training: bool) -> Iterator[tuple[str, Tensor]]:
    """Evaluation in the model's own dtype, without gradients, where convolutions are folded."""
    model.train(training)
    with _NoDropout(), torch.no_grad():
        for i, output in enumerate(_tensors(_call(model, example))):
            yield f"output {i} in evaluation under no_grad", output


def _compare(
    before: nn.Module,
    after: nn.Module,
    example: Any,
    training: bool,
    run: Callable[[nn.Module, Any, bool], Iterator[tuple[str, Tensor]]],
) -> None:
    expected = dict(run(before, copy.deepcopy(example), training))
    found = dict(run(after, copy.deepcopy(example), training))
    if expected.keys() != found.keys():
        missing = sorted(expected.keys() ^ found.keys())
        raise FusionError(f"the fused model does not give the same tensors: {', '.join(missing)}")
    # Gradients that cancel to nothing are compared with the size of the others.
    scale = max((_norm(t) for name, t in expected.items() if "gradient" in name), default=0.0)
    for name, tensor in expected.items():
        other = found[name]
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise FusionError(
                f"{name} is {list(other.shape)} {other.dtype} after fusing, and was "
                f"{list(tensor.shape)} {tensor.dtype}"
            )
        size = _norm(tensor)
        if "gradient" in name:
            size = max(size, 1e-6 * scale)
        error = _norm(other.double() - tensor.double())
        limit = _LIMITS[tensor.dtype]
        if not error <= limit * size + 1e-12:
            raise FusionError(
                f"{name} differs by {error / max(size, 1e-300):.3g} (relative) after fusing; up to "
                f"{limit:g} is rounding. The model is unfused again. Please report the model's code; "
                "braze.fusion_report(model) says what was fused where"
            )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double())) if tensor.numel() else 0.0


def _double(value: Any) -> Any:
    def wide(leaf: Any) -> Any:
        is_real = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.double() if is_real else leaf

    return tree_map(wide, value)


def check_same(before: nn.Module, after: nn.Module, example: Any) -> None:
    """Raises FusionError unless both compute the same from ``example``: a tensor, a tuple or list of positional
    arguments, or a mapping of keyword arguments.

    In fp64 in training and evaluation, without dropout, where only the order of sums may differ; then in the
    model's own dtype in evaluation without gradients. Runs copies of both; the two are not changed.
    """
    copies = [copy.deepcopy(before), copy.deepcopy(after)]
    for model in copies:
        _without_dropout(model)
    _compare(copies[0], copies[1], example, False, _own_results)
    wide = [model.double() for model in copies]
    for training in (True, False):
        _compare(wide[0], wide[1], _double(example), training, _results)
