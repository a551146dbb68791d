"""The CUDA step gives the CPU's bits, in one launch, whatever it is given. On the emulated device, or CUDA."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from braze import optim
from devices import CPU, Device, assert_same, everything, same_on_both, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Flags
from test_layouts import CASES as LAYOUTS
from test_numerics import CASES, OTHER_DTYPES, case_id, make_optimizer
from test_numerics_values import specials
from torch import Tensor
from torch.nn import Parameter

STEPS = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES += (torch.complex64, torch.complex128)
CHUNK = 8192


@dataclass(frozen=True)
class Spec:
    """One parameter: its values, and how it, its gradients and its state lie in memory."""

    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None

    def parameter(self, where: torch.device, seed: int) -> Parameter:
        shape, layout, _, _ = LAYOUTS[self.layout]
        shape = shape if self.shape is None else self.shape
        p = Parameter(layout(values(shape, seed, self.dtype).to(where)))
        p.grad_dtype = self.grad_dtype or self.dtype
        return p

    def gradient(self, p: Parameter, seed: int) -> Tensor:
        made = values(p.shape, 7919 + seed, self.grad_dtype or self.dtype)
        return LAYOUTS[self.layout][2](made.to(p.device))

    def lay_out_state(self, p: Parameter, entry: dict[str, Any]) -> None:
        layout = LAYOUTS[self.layout][3]
        for key in entry.keys() - {"step"}:
            if layout is not None:
                entry[key] = layout(entry[key])


def parameters(specs: list[Spec], where: torch.device) -> list[Parameter]:
    return [spec.parameter(where, i) for i, spec in enumerate(specs)]


def set_gradients(specs: list[Spec], params: list[Parameter], step: int) -> None:
    for i, (spec, p) in enumerate(zip(specs, params, strict=True)):
        p.grad = spec.gradient(p, 1000 * step + i)


def train(
    kind: str, flags: Flags, specs: list[Spec], where: torch.device, steps: int = STEPS
) -> list[Tensor]:
    params = parameters(specs, where)
    optimizer = make_optimizer(kind, params, flags)
    for step in range(steps):
        set_gradients(specs, params, step)
        optimizer.step()
        if step == 0:
            for spec, p in zip(specs, params, strict=True):
                spec.lay_out_state(p, optimizer.state.get(p, {}))
    return everything(optimizer)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(("kind", "flags"), CASES, ids=case_id)
def test_every_layout(device: Device, kind: str, flags: Flags, dtype: torch.dtype) -> None:
    specs = [Spec(layout, dtype) for layout in LAYOUTS]
    same_on_both(device, lambda where: train(kind, flags, specs, where))


SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 255, 256, 257, 1023, 1025, CHUNK - 1, CHUNK, CHUNK + 1)


@pytest.mark.parametrize("dtype", DTYPES[:5], ids=case_id)
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_every_size_and_alignment(
    device: Device, kind: str, fused: bool | None, dtype: torch.dtype
) -> None:
    flags = {"lr": 0.1, "fused": fused, **({"momentum": 0.9} if kind == "sgd" else {})}
    specs = [
        Spec(layout, dtype, shape=(size,))
        for size in (*SIZES, 3 * CHUNK + 5)
        for layout in ("contiguous", "offset 1", "offset 2", "offset 3", "offset state")
    ]
    same_on_both(device, lambda where: train(kind, flags, specs, where, 2))


@pytest.mark.parametrize("layout", ["contiguous", "offset state", "gapped gradient"])
@pytest.mark.parametrize(("kind", "flags"), [CASES[2], CASES[7], CASES[11], CASES[14]], ids=case_id)
def test_gradient_and_state_of_another_dtype(
    device: Device, kind: str, flags: Flags, layout: str
) -> None:
    """All combinations in one optimizer: what one tensor is must not leak into the next."""
    specs = [Spec(layout, dtype, grad) for dtype, grad, _ in OTHER_DTYPES]

    def scenario(where: torch.device) -> list[Tensor]:
        params = parameters(specs, where)
        optimizer = make_optimizer(kind, params, flags)
        for step in range(STEPS):
            set_gradients(specs, params, step)
            optimizer.step()
            for p, (_, _, state) in zip(params, OTHER_DTYPES, strict=True):
                entry = optimizer.state.get(p, {})
                for key in entry.keys() - {"step"} if step == 0 else ():
                    entry[key] = entry[key].to(state)
        return everything(optimizer)

    same_on_both(device, scenario)


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=case_id)
@pytest.mark.parametrize(("kind", "flags"), CASES, ids=case_id)
def test_special_values(device: Device, kind: str, flags: Flags, dtype: torch.dtype) -> None:
    """NaN, infinities, zeros of both signs, denormals and the largest values, each with each."""

    def scenario(where: torch.device) -> list[Tensor]:
        odd = specials(dtype).to(where)
        p = Parameter(odd.repeat_interleave(odd.numel()))
        optimizer = make_optimizer(kind, [p], flags)
        for step in range(STEPS):
            p.grad = odd.roll(step).repeat(odd.numel())
            optimizer.step()
        return everything(optimizer)

    same_on_both(device, scenario)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1, "nesterov": True, "momentum": 0.5}),
    ("AdamW", {"lr": 0.01}),
    ("AdamW", {"lr": 0.01, "amsgrad": True, "fused": True}),
    ("Adam", {"lr": 0.01, "capturable": True, "weight_decay": 0.1}),
    ("CAG", {"lr": 0.1, "momentum": 0.9, "accumulation_steps": 2}),
    ("CAG", {"lr": 0.1, "accumulation_steps": 3}),
    ("AdamW", {"lr": 0.01, "accumulation_steps": 2}),
    ("SGD", {"lr": 0.1, "l1": 0.01, "accumulation_steps": 2, "accumulation": "sum"}),
]
EACH = pytest.mark.parametrize(("name", "options"), KINDS, ids=str)


@EACH
def test_accumulation_and_strided_sums(device: Device, name: str, options: dict[str, Any]) -> None:
    specs = [Spec(layout, dtype) for layout in LAYOUTS for dtype in (DTYPES[1], DTYPES[0])]

    def scenario(where: torch.device) -> list[Tensor]:
        params = parameters(specs, where)
        optimizer = getattr(optim, name)(params, **options)
        found = []
        for step in range(7):
            set_gradients(specs, params, step)
            if step == 4:
                optimizer.accumulate(3.0)
                set_gradients(specs, params, 100)
            optimizer.step()
            found += everything(optimizer)[:40]
        return found + everything(optimizer)

    same_on_both(device, scenario)


spec = st.builds(
    Spec,
    layout=st.sampled_from([k for k in LAYOUTS if k not in ("larger than a chunk", "12-d")]),
    dtype=st.sampled_from(DTYPES),
)


@EACH
@settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_life(device: Device, name: str, options: dict[str, Any], data: st.DataObject) -> None:
    """Lists of any tensors, with what training code does between the steps."""
    specs = data.draw(st.lists(spec, min_size=1, max_size=9))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(specs)), max_size=2)))
    acts = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(
                    ["step", "step", "none", "half", "wider", "moved", "lr", "load", "group"]
                ),
                st.integers(0, 2**9 - 1),
            ),
            min_size=2,
            max_size=8,
        )
    )

    def scenario(where: torch.device) -> list[Tensor]:
        params = parameters(specs, where)
        bounds = [0, *cuts, len(specs)]
        groups = [
            {"params": params[a:b], "lr": 0.1 / (1 + i)}
            for i, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        optimizer = getattr(optim, name)(groups, **options)
        grown = list(specs)
        for turn, (act, mask) in enumerate(acts):
            set_gradients(grown, params, turn)
            if act == "none":
                optimizer.zero_grad(set_to_none=bool(mask & 1))
            for i, p in enumerate(params):
                if act == "half" and mask >> (i % 9) & 1:
                    p.grad = None
                elif act == "wider" and mask >> (i % 9) & 1 and not p.is_complex():
                    p.grad = None
                    p.grad_dtype = None  # any
                    p.grad = values(p.shape, turn, torch.float64).to(where)
                elif act == "moved" and mask >> (i % 9) & 1:
                    p.data = p.data.clone()
            if act == "lr":
                for group in optimizer.param_groups:
                    group["lr"] = 0.01 * (mask % 7)
            elif act == "load":
                optimizer.load_state_dict(optimizer.state_dict())
            elif act == "group":
                added = grown[mask % len(grown)]
                grown.append(added)
                params.append(added.parameter(where, mask))
                optimizer.add_param_group({"params": [params[-1]], "lr": 0.3})
                params[-1].grad = added.gradient(params[-1], mask)
            optimizer.step()
        return everything(optimizer)

    same_on_both(device, scenario)


COUNTS = pytest.mark.parametrize("fused", [None, True], ids=["CPU counts", "device counts"])


@COUNTS
@pytest.mark.parametrize("groups", [1, 465])
@pytest.mark.parametrize("count", [1, 161, 1000, 5000])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_one_launch_a_step(
    device: Device, name: str, count: int, groups: int, fused: bool | None
) -> None:
    if groups > count:
        pytest.skip("fewer parameters than groups")
    options = {"momentum": 0.9} if name == "SGD" else {}

    def scenario(where: torch.device) -> list[Tensor]:
        params = [Parameter(values((1 + i % 4,), i).to(where)) for i in range(count)]
        lists = [{"params": params[i::groups], "lr": 0.1 / (1 + i)} for i in range(groups)]
        optimizer = getattr(optim, name)(lists, fused=fused, **options)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = values(p.shape, i + step).to(where)
            if where == CPU and not device.emulated:
                optimizer.step()
                continue
            launches = device.launches(optimizer.step)
            assert launches in (0 if counting == "none" else 1, None), step
        return everything(optimizer)

    counting = "one"
    with device.on():
        got = scenario(device.place)
    counting = "none"
    with device.off():
        want = scenario(CPU)
    assert_same(got, want)


def test_folding_is_one_launch_and_nothing_is_none(device: Device) -> None:
    with device.on():
        params = [Parameter(torch.ones(5, device=device.place)) for _ in range(300)]
        optimizer = optim.AdamW(params, accumulation_steps=2)
        assert device.launches(optimizer.step) in (0, None)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones(5, device=device.place)
            assert device.launches(optimizer.step) in (1, None)


@pytest.mark.emulated_only("compares with kernels that are made not to run")
def test_the_comparison_sees_a_kernel_that_does_nothing(device: Device) -> None:
    assert device.emulated
    device.module.set_null_launch(True)
    with pytest.raises(AssertionError, match="elements differ"):
        same_on_both(device, lambda where: train(*CASES[1], [Spec()], where))


@pytest.mark.emulated_only("is about the emulator's null launch")
@EACH
def test_steps_without_kernels(device: Device, name: str, options: dict[str, Any]) -> None:
    """What benchmarks of the host's cost rely on: everything but the kernels happens."""
    assert device.emulated
    with device.on():
        device.module.set_null_launch(True)
        specs = [Spec("channels_last parameter"), Spec("offset 1", torch.bfloat16)]
        params = parameters(specs, CPU)
        before = [p.detach().clone() for p in params]
        optimizer = getattr(optim, name)(params, **options)
        for step in range(6):
            set_gradients(specs, params, step)
            assert device.launches(optimizer.step) == 1
        assert_same([p.detach() for p in params], before)


@pytest.mark.emulated_only("draws schedules of the emulator")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", ["reverse", "random", "pct"])
def test_any_schedule(device: Device, order: str, seed: int) -> None:
    assert device.emulated
    with device.schedule(order, seed):
        for case in (CASES[2], CASES[12], ("adam", {"lr": 0.1, "fused": True})):
            specs = [Spec(layout) for layout in LAYOUTS]
            same_on_both(device, lambda where, c=case, s=specs: train(*c, s, where))
