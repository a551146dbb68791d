"""A step that is refused says what is wrong and where, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from braze import optim
from reference import same_bits
from torch import Tensor
from torch.nn import Parameter

WHERE = r"param_groups\[1\]\['params'\]\[1\]"


class Setup:
    """Three good parameters before the one that each test spoils, so that a partial step would show."""

    def __init__(self, kind: str, *, trained: bool, names: bool = False) -> None:
        self.params = [Parameter(torch.full((4, 3), float(i + 1))) for i in range(5)]
        self.bad = self.params[3]
        first: list[Any] = self.params[:2]
        second: list[Any] = self.params[2:]
        if names:
            first = [(f"layer{i}.weight", p) for i, p in enumerate(first)]
            second = [(f"head{i}.weight", p) for i, p in enumerate(second)]
        groups: list[dict[str, Any]] = [{"params": first}, {"params": second}]
        if kind == "SGD":
            self.optimizer: Any = optim.SGD(groups, lr=0.1, momentum=0.9)
        else:
            self.optimizer = optim.AdamW(groups, lr=0.1)
        self.key = "momentum_buffer" if kind == "SGD" else "exp_avg_sq"
        self.set_gradients()
        if trained:
            self.optimizer.step()
            self.set_gradients()

    def set_gradients(self) -> None:
        for p in self.params:
            p.grad = torch.ones_like(p)

    def everything(self) -> list[tuple[str, Any]]:
        result: list[tuple[str, Any]] = []
        for i, p in enumerate(self.params):
            result.append((f"p{i}", p.detach().clone() if isinstance(p, Tensor) else p))
            if p.grad is not None:
                result.append((f"grad{i}", p.grad.detach().clone()))
            result.append((f"version{i}", p._version))
            entry = self.optimizer.state.get(p)
            result.append((f"has state{i}", entry is not None))
            for key, value in entry.items() if isinstance(entry, dict) else ():
                result.append((f"{key}{i}", value.clone() if isinstance(value, Tensor) else value))
        return result


def assert_unchanged(before: list[tuple[str, Any]], after: list[tuple[str, Any]]) -> None:
    assert [name for name, _ in after] == [name for name, _ in before]
    for (name, old), (_, new) in zip(before, after, strict=True):
        equal = same_bits(old, new) if isinstance(old, Tensor) else old == new
        assert equal, name


def refused(setup: Setup, error: type[Exception], *fragments: str) -> str:
    """The message; every fragment is in it, the parameter is named, and nothing changed."""
    before = setup.everything()
    with pytest.raises(error) as caught:
        setup.optimizer.step()
    assert_unchanged(before, setup.everything())
    assert not setup.optimizer.updated
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
    return message


PLACE = "param_groups[1]['params'][1]"


@pytest.mark.parametrize("trained", [False, True], ids=["first step", "later"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
class TestGradients:
    def test_wrong_shape(self, kind: str, trained: bool) -> None:
        setup = Setup(kind, trained=trained)
        grad = setup.bad.grad
        if trained:
            setup.optimizer.state.pop(setup.bad)
        setup.bad.data = torch.zeros(6)
        assert setup.bad.grad is grad
        message = refused(setup, ValueError, "the gradient of", PLACE, "[6]", "[4, 3]")
        assert message.startswith(setup.optimizer.__class__.__name__ + ":")

    def test_same_number_of_elements(self, kind: str, trained: bool) -> None:
        setup = Setup(kind, trained=trained)
        if trained:
            setup.optimizer.state.pop(setup.bad)
        setup.bad.data = torch.zeros(3, 4)
        refused(setup, ValueError, "the gradient of", PLACE, "[3, 4]", "[4, 3]")

    def test_complex_gradient(self, kind: str, trained: bool) -> None:
        setup = Setup(kind, trained=trained)
        setup.bad.grad = None
        setup.bad.grad_dtype = torch.complex64
        setup.bad.grad = torch.ones(4, 3, dtype=torch.complex64)
        refused(setup, TypeError, "the gradient of", PLACE, "ComplexFloat", "Float")

    def test_integer_gradient(self, kind: str, trained: bool) -> None:
        setup = Setup(kind, trained=trained)
        setup.bad.grad = None
        setup.bad.grad_dtype = torch.int64
        setup.bad.grad = torch.ones(4, 3, dtype=torch.int64)
        refused(setup, TypeError, "the gradient of", PLACE, "Long", "Float")


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
class TestState:
    def test_wrong_shape(self, kind: str) -> None:
        setup = Setup(kind, trained=True)
        setup.optimizer.state[setup.bad][setup.key] = torch.zeros(3, 4)
        refused(setup, ValueError, f"state['{setup.key}'] of {PLACE}", "[4, 3]", "[3, 4]")

    def test_not_a_tensor(self, kind: str) -> None:
        setup = Setup(kind, trained=True)
        setup.optimizer.state[setup.bad][setup.key] = 1.5
        refused(setup, TypeError, f"state['{setup.key}'] of {PLACE}", "tensor", "float")

    def test_integer(self, kind: str) -> None:
        setup = Setup(kind, trained=True)
        setup.optimizer.state[setup.bad][setup.key] = torch.zeros(4, 3, dtype=torch.int32)
        refused(setup, TypeError, f"state['{setup.key}'] of {PLACE}", "Int", "Float")

    def test_complex(self, kind: str) -> None:
        setup = Setup(kind, trained=True)
        setup.optimizer.state[setup.bad][setup.key] = torch.zeros(4, 3, dtype=torch.complex64)
        refused(setup, TypeError, f"state['{setup.key}'] of {PLACE}", "ComplexFloat", "Float")

    def test_other_device(self, kind: str) -> None:
        setup = Setup(kind, trained=True)
        setup.optimizer.state[setup.bad][setup.key] = torch.zeros(4, 3, device="meta")
        before = [p.detach().clone() for p in setup.params]
        with pytest.raises(
            ValueError, match=rf"state\['{setup.key}'\] of {WHERE}.*{setup.bad.device}.*meta"
        ):
            setup.optimizer.step()
        assert all(same_bits(p.detach(), q) for p, q in zip(setup.params, before, strict=True))

    def test_sparse(self, kind: str) -> None:
        setup = Setup(kind, trained=True)
        setup.optimizer.state[setup.bad][setup.key] = torch.zeros(4, 3).to_sparse()
        before = [p.detach().clone() for p in setup.params]
        with pytest.raises(ValueError, match=rf"state\['{setup.key}'\] of {WHERE}.*dense"):
            setup.optimizer.step()
        assert all(same_bits(p.detach(), q) for p, q in zip(setup.params, before, strict=True))

    def test_entry_is_no_dict(self, kind: str) -> None:
        setup = Setup(kind, trained=True)
        setup.optimizer.state[setup.bad] = [1, 2]
        refused(setup, TypeError, f"state of {PLACE}", "dict", "list")

    def test_repaired_state_steps_again(self, kind: str) -> None:
        setup = Setup(kind, trained=True)
        kept = setup.optimizer.state[setup.bad][setup.key]
        setup.optimizer.state[setup.bad][setup.key] = torch.zeros(3, 4)
        refused(setup, ValueError)
        setup.optimizer.state[setup.bad][setup.key] = kept
        before = setup.bad.detach().clone()
        setup.optimizer.step()
        assert not torch.equal(setup.bad.detach(), before)


@pytest.mark.parametrize(
    ("step", "got"),
    [
        (torch.zeros(2), "[2]"),
        (torch.tensor(1), "Long"),
        (torch.tensor(1.0, dtype=torch.bfloat16), "BFloat16"),
        (1, "int"),
        ("1", "str"),
    ],
    ids=str,
)
def test_step_counter(step: Any, got: str) -> None:
    setup = Setup("AdamW", trained=True)
    setup.optimizer.state[setup.bad]["step"] = step
    refused(setup, TypeError, f"state['step'] of {PLACE}", got)


Spoil = tuple[str, Any, type[Exception], str]
OPTIONS: list[Spoil] = [
    ("lr", "0.1", TypeError, "param_groups[1]['lr'] must be a number, got str"),
    ("lr", None, TypeError, "param_groups[1]['lr'] must be a number, got NoneType"),
    ("lr", torch.ones(2), ValueError, "param_groups[1]['lr'] must be a number or a tensor of one"),
    ("weight_decay", [0.1], TypeError, "param_groups[1]['weight_decay'] must be a number"),
    ("l1", "x", TypeError, "param_groups[1]['l1'] must be a number, got str"),
    ("betas", 0.9, TypeError, "param_groups[1]['betas'] must be a pair of numbers"),
    ("betas", (0.9,), TypeError, "param_groups[1]['betas'] must be a pair of numbers"),
    ("betas", ("a", 0.9), TypeError, "param_groups[1]['betas'] must be a number, got str"),
    ("eps", "tiny", TypeError, "param_groups[1]['eps'] must be a number, got str"),
    ("amsgrad", torch.ones(2), RuntimeError, "Boolean value of Tensor"),
]


@pytest.mark.parametrize("trained", [False, True], ids=["first step", "later"])
@pytest.mark.parametrize(("key", "value", "error", "text"), OPTIONS, ids=str)
def test_option(key: str, value: Any, error: type[Exception], text: str, trained: bool) -> None:
    setup = Setup("AdamW", trained=trained)
    setup.optimizer.param_groups[1][key] = value
    refused(setup, error, text)


@pytest.mark.parametrize("key", ["momentum", "dampening"])
def test_sgd_option(key: str) -> None:
    setup = Setup("SGD", trained=True)
    setup.optimizer.param_groups[1][key] = object()
    refused(setup, TypeError, f"param_groups[1]['{key}'] must be a number, got object")


@pytest.mark.parametrize(("kind", "key"), [("SGD", "momentum"), ("AdamW", "eps"), ("SGD", "lr")])
def test_missing_option(kind: str, key: str) -> None:
    setup = Setup(kind, trained=True)
    del setup.optimizer.param_groups[1][key]
    refused(setup, KeyError, f"param_groups[1] has no '{key}'")


Break = Callable[[Setup], None]


def put_number(setup: Setup) -> None:
    setup.optimizer.param_groups[1]["params"].insert(1, 3.5)


def put_none(setup: Setup) -> None:
    setup.optimizer.param_groups[1]["params"].insert(1, None)


@pytest.mark.parametrize(("spoil", "got"), [(put_number, "float"), (put_none, "NoneType")])
def test_parameter_is_no_tensor(spoil: Break, got: str) -> None:
    setup = Setup("SGD", trained=True)
    before = [p.detach().clone() for p in setup.params]
    spoil(setup)
    with pytest.raises(TypeError, match=f"{WHERE} must be a tensor, got {got}"):
        setup.optimizer.step()
    assert all(same_bits(p.detach(), q) for p, q in zip(setup.params, before, strict=True))


@pytest.mark.parametrize("value", [None, (), "p"])
def test_params_is_no_list(value: Any) -> None:
    setup = Setup("SGD", trained=True)
    before = [p.detach().clone() for p in setup.params]
    setup.optimizer.param_groups[1]["params"] = value
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['params'\] must be a list"):
        setup.optimizer.step()
    assert all(same_bits(p.detach(), q) for p, q in zip(setup.params, before, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("param_groups", (), "param_groups must be a list, got tuple"),
        ("state", [], "state must be a dict, got list"),
    ],
)
def test_containers(name: str, value: Any, text: str) -> None:
    setup = Setup("SGD", trained=True)
    before = [p.detach().clone() for p in setup.params]
    setattr(setup.optimizer, name, value)
    with pytest.raises(TypeError, match=text):
        setup.optimizer.step()
    assert all(same_bits(p.detach(), q) for p, q in zip(setup.params, before, strict=True))


def test_names_are_in_messages() -> None:
    setup = Setup("AdamW", trained=True, names=True)
    setup.optimizer.state[setup.bad]["exp_avg"] = torch.zeros(2)
    refused(setup, ValueError, f"{PLACE} ('head1.weight')", "[4, 3]", "[2]")


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_inference_tensor(kind: str) -> None:
    """Outside inference mode, torch too refuses to write to a tensor made in it."""
    setup = Setup(kind, trained=False)
    with torch.inference_mode():
        frozen = Parameter(torch.ones(3), requires_grad=False)
    frozen.grad = torch.ones(3)
    setup.optimizer.param_groups[1]["params"].append(frozen)
    before = setup.everything()
    with pytest.raises(RuntimeError, match="inference"):
        setup.optimizer.step()
    assert frozen.tolist() == [1.0, 1.0, 1.0]
    assert_unchanged(before, setup.everything())


def test_the_check_sees_a_change() -> None:
    setup = Setup("SGD", trained=True)
    before = setup.everything()
    setup.optimizer.state[setup.params[4]]["momentum_buffer"][3, 2] = 7.0
    with pytest.raises(AssertionError, match="momentum_buffer4"):
        assert_unchanged(before, setup.everything())


def test_freed_memory_is_refused() -> None:
    p = Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = optim.SGD([p], lr=0.1)
    size = p.untyped_storage().size()
    p.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has been freed"):
        optimizer.step()
    p.untyped_storage().resize_(size)
    p.data.fill_(1.0)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((4,), 0.9))


def test_gradient_in_another_parameters_memory_is_refused() -> None:
    first, second = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    first.grad, second.grad = torch.ones(4), first.data
    optimizer = optim.SGD([first, second], lr=0.1)
    with pytest.raises(
        ValueError, match=r"\[1\] shares memory with param_groups\[0\]\['params'\]\[0\]"
    ):
        optimizer.step()
    assert torch.equal(first.detach(), torch.ones(4)) and torch.equal(
        second.detach(), torch.ones(4)
    )


def test_gradient_in_the_states_memory_is_refused() -> None:
    p = Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = optim.Adam([p])
    optimizer.step()
    state = optimizer.state[p]
    p.grad = state["exp_avg"].view(4)
    before = [t.detach().clone() for t in (p, *state.values())]
    with pytest.raises(ValueError, match=r"shares memory with state\['exp_avg'\]"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, (p, *state.values()), strict=True))
