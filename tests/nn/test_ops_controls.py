"""Every check of op_checks.py notices an operator with the defect it is for, and passes a sound one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import devices
import op_checks as checks
import pytest
import torch
from braze._native import _C
from op_table import FP32, FP64, Op, Sample, Wrong, values
from torch import Tensor

NAMESPACE = "braze_control"
SAMPLE = Sample("sample", lambda dtype: [values((3, 4, 2, 2), 1, dtype), values((4,), 2, dtype)])
Forward = Callable[[Tensor, Tensor], Tensor]


def right(x: Tensor, count: Tensor) -> Tensor:
    """y = x^3, and count goes up."""
    if x.dim() < 2:
        raise ValueError("x must have 2 dimensions")
    count.add_(1)
    return x * x * x


def composite(x: Tensor, count: Tensor) -> Tensor:
    count.add_(1)
    return x**3


def slope(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return grad * 3 * x * x, None


def with_first_spoiled(y: Tensor, amount: float = 1e-3) -> Tensor:
    y = y.clone()
    if y.numel():
        y.view(-1)[0] += amount
    return y


CALLS = 0


def unstable(x: Tensor, count: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return with_first_spoiled(right(x, count), 1e-3 * (CALLS % 3))


def writes_input(x: Tensor, count: Tensor) -> Tensor:
    y = right(x, count)
    x.detach().mul_(2)
    return y


def writes_before_it_checks(x: Tensor, count: Tensor) -> Tensor:
    count.add_(1)
    return right(x, count)


def reads_memory_in_order(x: Tensor, count: Tensor) -> Tensor:
    """As if x were contiguous."""
    y = right(x, count)
    flat = torch.as_strided(x.detach(), (x.numel(),), (1,)) if x.stride() != y.stride() else None
    if flat is None or x.is_contiguous():
        return y
    return flat.view(x.shape) ** 3


def of_threads(x: Tensor, count: Tensor) -> Tensor:
    return with_first_spoiled(right(x, count), 1e-6 * (torch.get_num_threads() == 3))


def of_instruction_set(x: Tensor, count: Tensor) -> Tensor:
    fastest = _C.available_instruction_sets()[0]
    return with_first_spoiled(right(x, count), 1e-6 * (_C.instruction_set() == fastest))


def of_device(x: Tensor, count: Tensor) -> Tensor:
    active = getattr(devices.get(), "_active", False)
    return with_first_spoiled(right(x, count), 1e-3 * active)


def in_inference(x: Tensor, count: Tensor) -> Tensor:
    return with_first_spoiled(right(x, count), 1e-6 * torch.is_inference_mode_enabled())


@pytest.fixture(scope="module")
def library() -> Iterator[torch.library.Library]:
    made = torch.library.Library(NAMESPACE, "FRAGMENT")
    yield made
    made._destroy()


def define(
    library: torch.library.Library,
    name: str,
    forward: Forward = right,
    backward: Callable[..., Any] = slope,
    fake: Callable[[Tensor, Tensor], Tensor] = lambda x, _: torch.empty_like(x),
    schema: str = "(Tensor x, Tensor(a!) count) -> Tensor",
    mutated: tuple[int, ...] = (1,),
) -> Op:
    operators = getattr(torch.ops, NAMESPACE)
    if not hasattr(operators, name):
        kernel = f"{name}_kernel"
        library.define(f"{kernel}{schema}")
        library.impl(kernel, forward, "CPU")
        library.impl(kernel, forward, "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{kernel}", fake, lib=library)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, count: Tensor) -> Any:
                ctx.save_for_backward(x)
                return getattr(operators, kernel)(x, count)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Any:
                return backward(ctx, *grads)

        library.define(f"{name}{schema}")
        library.impl(name, lambda x, count: Function.apply(x, count), "CompositeImplicitAutograd")
    wrong = Wrong("1-d", lambda: [values((3,), 1), values((4,), 2)], ValueError, "2 dimensions")
    return Op(
        name=name,
        samples=(SAMPLE,),
        composite=composite,
        large=(SAMPLE,),
        differentiable=(0,),
        mutated=mutated,
        wrong=(wrong,),
        python=False,
        namespace=NAMESPACE,
    )


CHECKS: dict[str, Callable[[Op], None]] = {
    "values": lambda op: checks.check_values(op, SAMPLE, FP32),
    "gradients": lambda op: checks.check_gradients(op, SAMPLE, FP32),
    "gradcheck": lambda op: checks.check_gradcheck(op, SAMPLE),
    "subsets": lambda op: checks.check_subsets(op, SAMPLE, FP32),
    "opcheck": lambda op: checks.check_opcheck(op, SAMPLE, FP32),
    "fake": lambda op: checks.check_fake(op, SAMPLE.make(FP32), "sample"),
    "compile": lambda op: checks.check_compile(op, SAMPLE, FP32),
    "inference": lambda op: checks.check_inference(op, SAMPLE, FP32),
    "only_declared": lambda op: checks.check_only_declared_arguments_change(op, SAMPLE, FP32),
    "rejected": lambda op: checks.check_rejected(op, op.wrong[0]),
    "bits": lambda op: checks.check_bits(op, SAMPLE, FP32),
    "layout": lambda op: checks.check_layout(op, SAMPLE, FP32, "every_other"),
    "device": lambda op: checks.check_device(op, SAMPLE, FP32, devices.get()),
}


def wrong_slope(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return grad * 3.1 * x * x, None


def unstable_slope(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    global CALLS
    CALLS += 1
    return with_first_spoiled(slope(ctx, grad)[0], 1e-3 * (CALLS % 3)), None


def writing_slope(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    result = slope(ctx, grad)
    grad.zero_()
    return result


# By name: what is wrong, and the checks that must see it.
DEFECTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "value": (
        {"forward": lambda x, count: with_first_spoiled(right(x, count))},
        ("values", "layout", "device"),
    ),
    "gradient": ({"backward": wrong_slope}, ("gradients", "gradcheck", "layout", "device")),
    "unstable": ({"forward": unstable}, ("bits", "inference", "compile")),
    "unstable_gradient": ({"backward": unstable_slope}, ("subsets", "bits")),
    "threads": ({"forward": of_threads}, ("bits",)),
    "instruction_set": ({"forward": of_instruction_set}, ("bits",)),
    "device": ({"forward": of_device}, ("device",)),
    "inference": ({"forward": in_inference}, ("inference",)),
    "undeclared": (
        {"schema": "(Tensor x, Tensor count) -> Tensor", "mutated": ()},
        ("only_declared", "opcheck"),
    ),
    "writes_input": ({"forward": writes_input}, ("only_declared", "opcheck")),
    "writes_gradient": ({"backward": writing_slope}, ("only_declared",)),
    "late_check": ({"forward": writes_before_it_checks}, ("rejected",)),
    "no_check": ({"forward": composite}, ()),
    "layout": ({"forward": reads_memory_in_order}, ("layout",)),
    "fake_shape": (
        {"fake": lambda x, _: x.new_empty(*x.shape[:-1], x.shape[-1] + 1)},
        ("fake", "opcheck"),
    ),
    "fake_dtype": ({"fake": lambda x, _: x.new_empty(x.shape, dtype=FP64)}, ("fake", "opcheck")),
    "fake_strides": (
        {"fake": lambda x, _: torch.empty_like(x, memory_format=torch.channels_last)},
        ("fake", "opcheck"),
    ),
}


@pytest.mark.parametrize("check", CHECKS)
def test_sound_operator_passes(
    check: str, library: torch.library.Library, device: devices.Device
) -> None:
    CHECKS[check](define(library, "sound"))


@pytest.mark.cpu_only("spoils CPU results")
@pytest.mark.parametrize(
    ("defect", "check"), [(d, c) for d, (_, found_by) in DEFECTS.items() for c in found_by]
)
def test_defect_is_found(
    defect: str, check: str, library: torch.library.Library, device: devices.Device
) -> None:
    op = define(library, defect, **DEFECTS[defect][0])
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        CHECKS[check](op)


def test_a_function_that_is_not_the_operator_is_found(
    library: torch.library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = define(library, "sound")
    monkeypatch.setattr(checks, "_C", SimpleNamespace(sound=right))
    checks.check_python(op, SAMPLE, FP32)
    monkeypatch.setattr(
        checks, "_C", SimpleNamespace(sound=lambda x, count: with_first_spoiled(right(x, count)))
    )
    with pytest.raises(AssertionError):
        checks.check_python(op, SAMPLE, FP32)
    monkeypatch.setattr(checks, "_C", SimpleNamespace())
    with pytest.raises(AssertionError, match="has no sound"):
        checks.check_python(op, SAMPLE, FP32)


def test_every_check_has_a_control() -> None:
    found = {check for _, found_by in DEFECTS.values() for check in found_by}
    assert found == set(CHECKS)
    made = {name for name in vars(checks) if name.startswith("check_")}
    assert made == {
        "check_bits",
        "check_compile",
        "check_device",
        "check_fake",
        "check_gradcheck",
        "check_gradients",
        "check_inference",
        "check_layout",
        "check_only_declared_arguments_change",
        "check_opcheck",
        "check_python",
        "check_rejected",
        "check_subsets",
        "check_values",
    }
