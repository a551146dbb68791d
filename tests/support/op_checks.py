"""What every operation of op_table.py must do. Each check raises AssertionError; test_ops_controls.py shows
that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import devices
import pytest
import torch
from braze._native import _C
from op_layouts import LAYOUTS
from op_table import Args, Op, Sample, Wrong
from reference import same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# Our error may be half as much again as torch's, or a few units in the last place of the largest element. In
# fp64 the truth is itself no better than that, so that there it is many units.
FACTOR, ULPS, ULPS_FP64 = 1.5, 8.0, 200.0
# What has no larger element is a difference that vanishes.
SMALL = 1e-3
THREADS = (1, 2, 3, 5)
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for t in result if isinstance(t, Tensor)] if result is not None else []


def call(op: Op, args: Args) -> list[Tensor]:
    torch.manual_seed(0)
    return flat(op.overload(*args))


Run = Callable[[Op, Args], list[Tensor]]


def composite_like(outputs: Sequence[Tensor]) -> Run:
    """The composite, which takes over what our call drew."""

    def run(op: Op, args: Args) -> list[Tensor]:
        drawn = [outputs[-1]] if op.random else []
        return flat(op.composite(*drawn, *args))

    return run


def wide(args: Args) -> Args:
    """Copies in fp64, with the same strides where they are dense."""
    return [
        a.detach().to(torch.float64, copy=True)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a.clone()
        if isinstance(a, Tensor)
        else a
        for a in args
    ]


def written(op: Op, args: Args) -> list[Tensor]:
    return [args[i] for i in op.mutated if isinstance(args[i], Tensor)]


def assert_no_worse(
    ours: Sequence[Tensor], torchs: Sequence[Tensor], exact: Sequence[Tensor], what: str
) -> None:
    """err(ours) <= max(FACTOR err(torch), ULPS eps max |exact|), errors against fp64."""
    assert len(ours) == len(exact) == len(torchs), (what, len(ours), len(exact))
    for i, (a, t, e) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert a.shape == e.shape, (what, i, a.shape, e.shape)
        a, t, e = (x.detach().to("cpu") for x in (a, t, e))
        if not a.is_floating_point():
            assert torch.equal(a, e.to(a.dtype)), (what, i)
            continue
        finite = e.isfinite()
        assert torch.equal(a.double()[~finite].nan_to_num(), e[~finite].nan_to_num()), (what, i)
        if not finite.any():
            continue
        error, theirs = ((x.double() - e)[finite].abs().max() for x in (a, t))
        ulps = ULPS_FP64 if a.dtype is torch.float64 else ULPS
        bound = ulps * torch.finfo(a.dtype).eps * max(float(e[finite].abs().max()), SMALL)
        assert error <= max(FACTOR * theirs, bound), (
            f"{what}, tensor {i} {a.dtype} {tuple(a.shape)}: error {error:.3g}, torch's {theirs:.3g}, "
            f"{ulps:.0f} ulp {bound:.3g}"
        )


def compare(op: Op, outputs: list[Tensor], wrote: list[Tensor], args: Args, what: str) -> None:
    """``args``: the arguments, fresh."""
    ours, composite = [*op.view(outputs), *wrote], composite_like(outputs)
    exact_args = wide(args)
    exact = composite(op, exact_args)
    exact += written(op, exact_args)
    theirs = composite(op, args)
    theirs += written(op, args)
    if op.exact:
        devices.assert_same([t.cpu() for t in ours], [t.cpu() for t in theirs])
    else:
        assert_no_worse(ours, theirs, exact, what)


def check_values(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    args = sample.make(dtype)
    ours = call(op, args)
    compare(op, ours, written(op, args), sample.make(dtype), sample.name)


# --------------------------------------------------------------- gradients


def leaves(op: Op, args: Args, positions: Sequence[int] | None = None) -> list[Tensor]:
    wanted = op.differentiable if positions is None else positions
    tensors = [args[i] for i in wanted if isinstance(args[i], Tensor)]
    return [t.requires_grad_() for t in tensors]


def floating(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors if t.is_floating_point()]


def upstream(outputs: list[Tensor]) -> list[Tensor]:
    return [devices.values(y.shape, 90 + i).to(y) for i, y in enumerate(outputs)]


def gradients(
    run: Run,
    op: Op,
    args: Args,
    grads: Sequence[Tensor] | None = None,
    positions: Sequence[int] | None = None,
) -> list[Tensor]:
    inputs = leaves(op, args, positions)
    outputs = [y for y in run(op, args) if y.requires_grad]
    grads = (
        upstream(outputs)
        if grads is None
        else [g.to(y) for g, y in zip(grads, outputs, strict=True)]
    )
    return list(torch.autograd.grad(outputs, inputs, grads))


def check_gradients(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    # Rounded to the sample's dtypes first, so that fp64 sees the same numbers.
    outputs = call(op, sample.make(dtype))
    grads, composite = upstream(floating(outputs)), composite_like(outputs)
    ours = gradients(call, op, sample.make(dtype), grads)
    exact = gradients(composite, op, wide(sample.make(dtype)), grads)
    theirs = gradients(composite, op, sample.make(dtype), grads)
    for got, leaf in zip(ours, leaves(op, sample.make(dtype)), strict=True):
        assert got.dtype == leaf.dtype, (sample.name, got.dtype)
    assert_no_worse(ours, theirs, exact, f"{sample.name}, gradients")


def check_gradcheck(op: Op, sample: Sample) -> None:
    """First and second derivatives by finite differences, along random directions."""
    args = sample.make(torch.float64)
    inputs = leaves(op, args)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        full, rest = list(args), iter(tensors)
        for i in op.mutated:
            full[i] = None if full[i] is None else full[i].clone()
        for i in op.differentiable:
            if full[i] is not None:
                full[i] = next(rest)
        return tuple(y for y in call(op, full) if y.requires_grad)

    try:
        torch.autograd.gradcheck(function, inputs, fast_mode=True)
        torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    except RuntimeError as error:  # GradcheckError is one
        raise AssertionError(f"{sample.name}: {error}") from error


def check_subsets(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    """A gradient has the same bits whichever others are wanted."""
    args = sample.make(dtype)
    present = [i for i in op.differentiable if isinstance(args[i], Tensor)]
    grads = upstream(floating(call(op, args)))
    every = dict(zip(present, gradients(call, op, sample.make(dtype), grads), strict=True))
    for left_out in present:
        for wanted in ([left_out], [i for i in present if i != left_out]):
            if wanted:
                found = gradients(call, op, sample.make(dtype), grads, wanted)
                devices.assert_same(found, [every[i] for i in wanted])


# ------------------------------------------------------- schemas and tracing


def check_opcheck(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    args = sample.make(dtype)
    leaves(op, args)
    # It compares two runs, which draw two masks; check_compile compares them after a seed.
    tests = OPCHECKS[:-1] if op.random else OPCHECKS
    try:
        torch.library.opcheck(op.overload, tuple(args), test_utils=tests)
    except Exception as error:
        raise AssertionError(f"{sample.name}: {error}") from error


def metadata(tensors: Sequence[Tensor]) -> list[Any]:
    """Strides of no elements say nothing."""
    return [
        (tuple(t.shape), t.stride() if t.numel() else None, t.dtype, t.device.type, t.requires_grad)
        for t in tensors
    ]


def check_fake(op: Op, args: Args, what: str) -> None:
    """Shapes, strides, dtypes and devices are told without computing."""
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        told = metadata(call(op, fake))
    real = metadata(call(op, args))
    assert told == real, f"{what}: {told} != {real}"


def check_compile(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    """One graph, and the same bits in values, gradients and written arguments."""
    torch._dynamo.reset()
    operator = getattr(getattr(torch.ops, op.namespace), op.name)
    compiled = torch.compile(lambda *args: operator(*args), backend="aot_eager", fullgraph=True)

    def run_compiled(_: Op, args: Args) -> list[Tensor]:
        torch.manual_seed(0)
        return flat(compiled(*args))

    results = []
    for run in (call, run_compiled):
        args = sample.make(dtype)
        result = run(op, args)
        result += written(op, args)
        if op.differentiable:
            result += gradients(run, op, sample.make(dtype))
        results.append([t.detach() for t in result])
    devices.assert_same(results[1], results[0])


def check_inference(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    args = sample.make(dtype)
    want = call(op, args) + written(op, args)
    with torch.inference_mode():
        args = sample.make(dtype)
        got = call(op, args) + written(op, args)
    devices.assert_same(got, want)


def check_python(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    """The function of the extension is the operator."""
    assert hasattr(_C, op.name), f"bindings.cpp has no {op.name}"
    args, again = sample.make(dtype), sample.make(dtype)
    torch.manual_seed(0)
    got = flat(getattr(_C, op.name)(*again)) + written(op, again)
    want = call(op, args) + written(op, args)
    devices.assert_same([t.detach() for t in got], [t.detach() for t in want])


# ------------------------------------------------------------ side effects


def snapshot(args: Args) -> list[Any]:
    return [(a.detach().clone(), a._version) if isinstance(a, Tensor) else a for a in args]


def assert_untouched(args: Args, before: list[Any], but: Sequence[int], what: str) -> None:
    for i, (arg, seen) in enumerate(zip(args, before, strict=True)):
        if not isinstance(arg, Tensor):
            continue
        changed = not same_bits(arg, seen[0])
        if i in but:
            assert not changed or arg._version > seen[1], f"{what}: {i} changed under its version"
        else:
            assert not changed, f"{what}: argument {i} was changed"
            assert arg._version == seen[1], f"{what}: argument {i} has another version"


def check_only_declared_arguments_change(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    args = sample.make(dtype)
    before = snapshot(args)
    call(op, args)
    assert_untouched(args, before, op.mutated, sample.name)
    if op.differentiable:
        args = sample.make(dtype)
        before = snapshot(args)
        inputs = leaves(op, args)
        outputs = [y for y in call(op, args) if y.requires_grad]
        grads = upstream(outputs)
        arguments = [*args, *grads]
        before += snapshot(grads)
        torch.autograd.grad(outputs, inputs, grads)
        assert_untouched(arguments, before, op.mutated, f"{sample.name}, backward")


def check_rejected(op: Op, wrong: Wrong) -> None:
    args = wrong.make()
    before = snapshot(args)
    with pytest.raises(wrong.error, match=wrong.match):
        call(op, args)
    assert_untouched(args, before, (), wrong.name)


# -------------------------------------------- determinism, devices, layouts


@contextmanager
def restored() -> Iterator[None]:
    threads, instruction_set = torch.get_num_threads(), _C.instruction_set()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        assert _C.set_instruction_set(instruction_set)


def everything(op: Op, sample: Sample, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, written arguments and gradients, on the CPU."""
    args = sample.make(dtype)
    result = call(op, args) + written(op, args)
    if op.differentiable:
        result += gradients(call, op, sample.make(dtype))
    return [t.detach().cpu() for t in result]


def check_bits(op: Op, sample: Sample, dtype: torch.dtype) -> None:
    """Runs, threads and instruction sets do not change a bit."""
    with restored():
        torch.set_num_threads(1)
        want = everything(op, sample, dtype)
        devices.assert_same(everything(op, sample, dtype), want)
        for threads in THREADS[1:]:
            torch.set_num_threads(threads)
            devices.assert_same(everything(op, sample, dtype), want)
        for name in _C.available_instruction_sets():
            assert _C.set_instruction_set(name)
            devices.assert_same(everything(op, sample, dtype), want)


def check_device(op: Op, sample: Sample, dtype: torch.dtype, device: devices.Device) -> None:
    """The device's kernels are as right as the CPU's have to be."""
    with device.on():
        args = sample.make(dtype)
        ours = call(op, args)
        wrote = written(op, args)
        grads = gradients(call, op, sample.make(dtype)) if op.differentiable else []
        again = [t.cpu() for t in call(op, sample.make(dtype))]
    with device.off():
        compare(op, ours, wrote, sample.make(dtype), f"{sample.name} on the device")
        if grads:
            composite = composite_like(ours)
            exact = gradients(composite, op, wide(sample.make(dtype)))
            theirs = gradients(composite, op, sample.make(dtype))
            assert_no_worse(grads, theirs, exact, f"{sample.name} on the device, gradients")
    devices.assert_same(again, [t.cpu() for t in ours])


def laid_out(op: Op, sample: Sample, dtype: torch.dtype, layout: str, only: int | None) -> Args:
    args = sample.make(dtype)
    for i in op.activations:
        if isinstance(args[i], Tensor) and (only is None or i == only):
            args[i] = LAYOUTS[layout](args[i].detach())
    return args


def check_layout(op: Op, sample: Sample, dtype: torch.dtype, layout: str) -> None:
    """All activations in this layout, and only one of them."""
    several = [i for i in op.activations if isinstance(sample.make(dtype)[i], Tensor)]
    for only in (None, *(several if len(several) > 1 else ())):
        what = f"{sample.name}, {layout} {only}"
        args = laid_out(op, sample, dtype, layout, only)
        ours = call(op, args)
        compare(op, ours, written(op, args), laid_out(op, sample, dtype, layout, only), what)
        check_fake(op, laid_out(op, sample, dtype, layout, only), what)
        if op.differentiable:
            composite = composite_like(ours)
            grads = gradients(call, op, laid_out(op, sample, dtype, layout, only))
            exact = gradients(composite, op, wide(laid_out(op, sample, dtype, layout, only)))
            theirs = gradients(composite, op, laid_out(op, sample, dtype, layout, only))
            assert_no_worse(grads, theirs, exact, f"{what}, gradients")
