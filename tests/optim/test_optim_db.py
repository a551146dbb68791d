"""braze's classes over the inputs in torch.testing's own optimizer database."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from typing import Any

import braze.optim as optim
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

pytest.importorskip("expecttest")  # which the module below imports
from torch.testing._internal import common_optimizers as database

# 1030 has full vectors, a tail and, in the native step, more than one block.
SHAPES: tuple[tuple[int, ...], ...] = ((10, 5), (10,), (), (0,), (1,), (3, 0, 2), (17,), (1030,))
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
    torch.float64: {"rtol": 1e-13, "atol": 1e-14},
    torch.complex64: {"rtol": 2e-6, "atol": 1e-6},
    torch.complex128: {"rtol": 1e-13, "atol": 1e-14},
}
INFOS = {info.name: info for info in database.optim_db if info.name in ("SGD", "Adam", "AdamW")}
CLASSES = pytest.mark.parametrize("name", sorted(INFOS))


@dataclass(frozen=True)
class Case:
    """One keyword set of the database."""

    name: str
    desc: str
    kwargs: dict[str, Any]

    def ours(self, params: Any, **extra: Any) -> torch.optim.Optimizer:
        cls: type[torch.optim.Optimizer] = getattr(optim, self.name)
        return cls(params, **{**copy.deepcopy(self.kwargs), **extra})

    def theirs(self, params: Any, **extra: Any) -> torch.optim.Optimizer:
        cls: type[torch.optim.Optimizer] = getattr(torch.optim, self.name)
        return cls(params, **{**copy.deepcopy(self.kwargs), "foreach": False, **extra})


def database_cases() -> list[Case]:
    return [
        Case(name, given.desc, given.kwargs)
        for name, info in INFOS.items()
        for given in info.optim_inputs_func(device="cpu", dtype=torch.float32)
    ]


CASES = pytest.mark.parametrize("case", database_cases(), ids=lambda c: f"{c.name}-{c.desc}")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=lambda d: str(d).removeprefix("torch.")
)


def make_params(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, dtype=dtype, generator=generator)) for s in SHAPES]


def set_gradients(params: list[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def train(
    optimizer: torch.optim.Optimizer, params: list[Parameter], steps: int, first: int = 0
) -> None:
    for seed in range(first, first + steps):
        set_gradients(params, seed)
        optimizer.step()


def values(params: list[Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def assert_equal(params: list[Parameter], others: list[Any]) -> None:
    assert all(torch.equal(p, o) for p, o in zip(params, others, strict=True))


def assert_same_states(a: torch.optim.Optimizer, b: torch.optim.Optimizer, **tol: float) -> None:
    left, right = a.state_dict()["state"], b.state_dict()["state"]
    assert left.keys() == right.keys()
    for key in left:
        # fused=True and capturable=True keep the step counts on the device.
        torch.testing.assert_close(dict(left[key]), dict(right[key]), check_device=False, **tol)


@CASES
@DTYPES
def test_default_step_matches_the_for_loop(case: Case, dtype: torch.dtype) -> None:
    mine, reference = make_params(dtype), make_params(dtype)
    start = values(mine)
    ours, theirs = case.ours(mine), case.theirs(reference)
    for seed in range(7):
        for optimizer, params in ((ours, mine), (theirs, reference)):
            train(optimizer, params, 1, first=seed)
        torch.testing.assert_close(values(mine), values(reference), **TOLERANCE[dtype])
    assert_same_states(ours, theirs, **TOLERANCE[dtype])
    assert all(not torch.equal(p, s) for p, s in zip(mine, start, strict=True) if p.numel())


@CASES
@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}, {"fused": False}], ids=str)
def test_every_implementation_flag_gives_the_same_result(
    case: Case, flags: dict[str, bool]
) -> None:
    if flags.get("foreach") and isinstance(case.kwargs.get("lr"), Tensor):
        flags = {**flags, "foreach": False}  # torch refuses a tensor lr with Adam's foreach
    mine, reference = make_params(), make_params()
    ours, theirs = case.ours(mine, **flags), case.theirs(reference)
    train(ours, mine, 5)
    train(theirs, reference, 5)
    torch.testing.assert_close(values(mine), values(reference), **TOLERANCE[torch.float64])
    assert_same_states(ours, theirs, **TOLERANCE[torch.float64])


@CASES
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_matches_the_for_loop_and_the_real_view(case: Case, dtype: torch.dtype) -> None:
    mine, reference = make_params(dtype), make_params(dtype)
    real = [Parameter(torch.view_as_real(p.detach()).clone()) for p in mine]
    optimizers = case.ours(mine), case.theirs(reference), case.ours(real)
    for seed in range(5):
        set_gradients(mine, seed)
        set_gradients(reference, seed)
        for p, source in zip(real, mine, strict=True):
            p.grad = torch.view_as_real(source.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(values(mine), values(reference), **TOLERANCE[dtype])
    for p, r in zip(mine, real, strict=True):
        assert torch.equal(torch.view_as_real(p.detach()), r.detach())
    assert_same_states(optimizers[0], optimizers[1], **TOLERANCE[dtype])


def error_cases() -> list[Any]:
    result = []
    for name, info in INFOS.items():
        for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            description = error.optimizer_error_input.desc
            result.append(pytest.param(name, error, id=f"{name}-{description}"))
    return result


@pytest.mark.parametrize(("name", "error"), error_cases())
def test_constructor_errors_are_torchs(name: str, error: database.ErrorOptimizerInput) -> None:
    given = error.optimizer_error_input
    params = [Parameter(torch.ones(2))] if given.params is None else given.params
    expected = error.error_type
    expects = pytest.warns if issubclass(expected, Warning) else pytest.raises
    with expects(expected, match=error.error_regex) as caught:
        getattr(optim, name)(params, **copy.deepcopy(given.kwargs))
    if not issubclass(expected, Warning):
        assert caught.type is expected


def quadratic(weight: Tensor, bias: Tensor) -> Tensor:
    return (weight.mv(torch.arange(1.0, 6.0, dtype=weight.dtype) / 5) + bias).pow(2).sum()


def scheduled_cases() -> list[Any]:
    return [
        pytest.param(case, index, id=f"{case.name}-{case.desc}-{index}")
        for case in database_cases()
        for index in range(-1, len(INFOS[case.name].scheduler_inputs))
    ]


@pytest.mark.parametrize(("case", "index"), scheduled_cases())
def test_goes_in_the_right_direction_as_torch_does(case: Case, index: int) -> None:
    """Two groups of which one overrides lr and weight decay, with the database's schedulers."""
    factories = INFOS[case.name].scheduler_inputs[index] if index >= 0 else []
    results = []
    for make in (case.ours, case.theirs):
        weight, bias = make_params()[:2]
        groups = [{"params": [weight]}, {"params": [bias], "lr": 0.02, "weight_decay": 0.05}]
        optimizer = make(groups)
        schedulers: list[LRScheduler] = [factory(optimizer) for factory in factories]
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = quadratic(weight, bias)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            for scheduler in schedulers:
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(losses[-1])
                else:
                    scheduler.step()
        losses.append(quadratic(weight, bias).item())
        lrs = [float(group["lr"]) for group in optimizer.param_groups]
        results.append((losses, lrs, values([weight, bias])))
        rises = bool(case.kwargs.get("maximize"))
        assert losses[-1] > losses[0] if rises else losses[-1] < losses[0]
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)


@CASES
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_tensor_lr_equals_the_same_float(case: Case, shape: tuple[int, ...]) -> None:
    rate = 0.01  # as fp64, or the tensor would be another number than the float
    mine, reference = make_params(), make_params()
    ours = case.ours(mine, lr=torch.full(shape, rate, dtype=torch.float64))
    theirs = case.ours(reference, lr=rate)
    train(ours, mine, 4)
    train(theirs, reference, 4)
    assert_equal(mine, reference)
    ours.param_groups[0]["lr"].fill_(0.0)
    ours.param_groups[0]["weight_decay"] = 0.0
    before = values(mine)
    train(ours, mine, 1, first=4)
    assert_equal(mine, before)


@CLASSES
def test_fused_refuses_meta_parameters_until_they_are_real(name: str) -> None:
    model = torch.nn.Linear(3, 2, device="meta", dtype=torch.float64)
    optimizer = getattr(optim, name)(model.parameters(), lr=0.1, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating"):
        optimizer.step()
    assert not any(optimizer.state.values())
    model.to_empty(device=torch.ones(1).device)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0)
            p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.step()
    expected = 2.0 - 0.1 if name != "AdamW" else 2.0 * (1 - 0.1 * 1e-2) - 0.1
    for p in model.parameters():
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected), rtol=0, atol=1e-8)


@CASES
@pytest.mark.parametrize("maker", ["ours", "theirs"])
def test_state_dict_is_complete(case: Case, maker: str) -> None:
    """Training resumes bit for bit from a state_dict of braze's or of torch's."""
    mine, other = make_params(), make_params()
    ours = case.ours(mine)
    source = getattr(case, maker)(other)
    train(source, other, 3)
    with torch.no_grad():
        for p, o in zip(mine, other, strict=True):
            p.copy_(o)
    ours.load_state_dict(copy.deepcopy(source.state_dict()))
    train(ours, mine, 3, first=3)
    train(source, other, 3, first=3)
    exact = {"rtol": 0.0, "atol": 0.0}
    close = exact if maker == "ours" else TOLERANCE[torch.float64]
    torch.testing.assert_close(values(mine), values(other), **close)


@CASES
def test_older_state_dicts_load(case: Case) -> None:
    """Before the newer flags existed, and with the step count as a number."""
    mine, other = make_params(), make_params()
    ours, twin = case.ours(mine), case.ours(other)
    train(ours, mine, 2)
    train(twin, other, 4)
    older = copy.deepcopy(ours.state_dict())
    for group in older["param_groups"]:
        for flag in INFOS[case.name].not_og_supported_flags:
            group.pop(flag, None)
        group.pop("decoupled_weight_decay", None)
    for entry in older["state"].values():
        if "step" in entry:
            entry["step"] = int(entry["step"])
    if case.kwargs.get("maximize"):
        for group in older["param_groups"]:
            group["maximize"] = True
    ours.load_state_dict(older)
    train(ours, mine, 2, first=2)
    assert_equal(mine, other)
    if case.name != "SGD":
        assert all(isinstance(ours.state[p]["step"], Tensor) for p in mine)


@CASES
@pytest.mark.parametrize("from_named", [True, False])
def test_loads_from_and_to_named_parameters(case: Case, from_named: bool) -> None:
    mine, other = make_params(), make_params()
    named = [(f"layer{i}", p) for i, p in enumerate(mine if not from_named else other)]
    ours = case.ours(mine if from_named else named)
    source = case.ours(named if from_named else other)
    train(source, other, 2)
    train(ours, mine, 2)
    ours.state.clear()
    ours.load_state_dict(source.state_dict())
    names = [name for name, _ in named]
    assert ours.param_groups[0]["param_names"] == names  # torch adopts a checkpoint's names
    train(ours, mine, 2, first=2)
    train(source, other, 2, first=2)
    assert_equal(mine, other)


@CASES
def test_weights_only_round_trip(case: Case) -> None:
    mine, other = make_params(), make_params()
    ours, again = case.ours(mine), case.ours(other)
    train(ours, mine, 2)
    train(again, other, 2)
    again.state.clear()
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_states(ours, again, rtol=0, atol=0)
    train(ours, mine, 2, first=2)
    train(again, other, 2, first=2)
    assert_equal(mine, other)


@CASES
def test_deepcopy_has_the_same_public_attributes_and_continues(case: Case) -> None:
    mine = make_params()
    ours = case.ours(mine)
    train(ours, mine, 2)
    twin_params, twin = copy.deepcopy((mine, ours))

    def public(optimizer: torch.optim.Optimizer) -> dict[str, type]:
        return {n: type(getattr(optimizer, n)) for n in dir(optimizer) if not n.startswith("_")}

    assert public(twin) == public(ours)
    train(ours, mine, 2, first=2)
    train(twin, twin_params, 2, first=2)
    assert_equal(mine, twin_params)


@CASES
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_never_written(case: Case, scaled: bool) -> None:
    mine, reference = make_params(), make_params()
    ours, theirs = case.ours(mine), case.theirs(reference)
    for seed in range(3):
        set_gradients(mine, seed)
        set_gradients(reference, seed)
        if scaled:
            for p in mine:
                p.grad.mul_(8.0)
            ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.zeros(())  # type: ignore[attr-defined]
        kept = [(p.grad, p.grad.clone(), p.grad._version) for p in mine]
        ours.step()
        theirs.step()
        for p, (grad, value, version) in zip(mine, kept, strict=True):
            assert p.grad is grad
            assert grad._version == version
            assert torch.equal(grad, value)
    torch.testing.assert_close(values(mine), values(reference), **TOLERANCE[torch.float64])


@CASES
def test_no_op_without_gradients(case: Case) -> None:
    mine = make_params()
    before = values(mine)
    ours = case.ours(mine)
    ours.step()
    assert_equal(mine, before)
    assert not ours.state
    set_gradients(mine[:1], 0)  # the others stay without state
    ours.step()
    assert set(ours.state) <= {mine[0]}
    assert_equal(mine[1:], before[1:])


@CASES
def test_zero_gradients_only_decay(case: Case) -> None:
    mine, reference = make_params(), make_params()
    before = values(mine)
    decays = case.kwargs.get("weight_decay", 1e-2 if case.name == "AdamW" else 0.0) != 0.0
    for make, params in ((case.ours, mine), (case.theirs, reference)):
        optimizer = make(params)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    torch.testing.assert_close(values(mine), values(reference), **TOLERANCE[torch.float64])
    assert torch.equal(mine[0], before[0]) is not decays


@CASES
def test_prints_as_torchs(case: Case) -> None:
    params = make_params()
    assert repr(case.ours(params, foreach=False)) == repr(case.theirs(params))
    assert repr(case.ours(params)).startswith(f"{case.name} (\nParameter Group 0\n")
