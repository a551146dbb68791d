"""Memory that a step would write twice, or read after writing, is refused and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from braze import optim
from reference import same_bits
from torch import Tensor
from torch.nn import Parameter

FIRST = r"param_groups\[0\]\['params'\]\[0\]"
SECOND = r"param_groups\[0\]\['params'\]\[1\]"


def make(name: str, params: Any) -> Any:
    if name == "SGD":
        return optim.SGD(params, lr=0.1, momentum=0.9)
    return optim.AdamW(params, lr=0.01)


def with_gradients(params: list[Parameter]) -> list[Parameter]:
    for p in params:
        p.grad = torch.ones(p.shape, dtype=p.dtype)
    return params


def everything(optimizer: Any) -> list[Tensor]:
    """Copies of all tensors that the optimizer could write."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [p.grad for p in tensors if p.grad is not None]
    for entry in optimizer.state.values():
        tensors += [value for value in entry.values() if isinstance(value, Tensor)]
    return [t.detach().clone() for t in tensors]


def assert_refused(optimizer: Any, match: str) -> None:
    before = everything(optimizer)
    keys = {id(p): sorted(entry) for p, entry in optimizer.state.items()}
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            optimizer.step()
        after = everything(optimizer)
        assert {id(p): sorted(entry) for p, entry in optimizer.state.items()} == keys
        assert len(after) == len(before)
        assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))


def base(size: int = 64) -> Tensor:
    return torch.arange(float(size))


SELF_OVERLAP: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.ones(1, 4).expand(3, 4),
    "as_strided": lambda: base().as_strided((3, 4), (2, 1)),
    "as_strided, not nested": lambda: base().as_strided((4, 4), (3, 2)),
    "stride 0 inside": lambda: base().as_strided((3, 2, 4), (8, 0, 1)),
}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("case", SELF_OVERLAP)
def test_elements_that_share_memory(case: str, name: str) -> None:
    params = with_gradients([Parameter(base()), Parameter(SELF_OVERLAP[case]())])
    assert_refused(make(name, params), f"elements of {SECOND}.*share memory with each other")


def test_as_strided_without_overlap_works() -> None:
    """Not nested, yet no two indices meet: refusing it would be wrong."""
    storage = base()
    params = with_gradients([Parameter(storage.as_strided((3, 2), (2, 3)))])
    make("SGD", params).step()
    changed = (storage != base()).nonzero().flatten().tolist()
    assert changed == [0, 2, 3, 4, 5, 7]


# Two views of one tensor of 64 elements.
PAIRS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "same storage": lambda x: (x, x),
    "same storage, other shape": lambda x: (x, x.view(8, 8)),
    "partial": lambda x: (x, x[63:]),
    "shifted": lambda x: (x[:40], x[20:]),
    "strided over dense": lambda x: (x[::7], x[14:15]),
    "strided over strided": lambda x: (x[::3], x[1::5]),
    "other dtype": lambda x: (x, x.view(torch.float64)[31:]),
}


def same_twice() -> list[Parameter]:
    x = base()
    return with_gradients([Parameter(x), Parameter(x)])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("case", PAIRS)
def test_two_parameters_that_share_memory(case: str, name: str) -> None:
    params = with_gradients([Parameter(x) for x in PAIRS[case](base())])
    assert_refused(make(name, params), f"{FIRST} and {SECOND} share memory")


def test_two_groups_that_share_memory() -> None:
    first, second = same_twice()
    optimizer = make("AdamW", [{"params": [first]}, {"params": [second], "lr": 1.0}])
    assert_refused(optimizer, rf"{FIRST} and param_groups\[1\]\['params'\]\[0\] share memory")


def test_names_are_in_the_message() -> None:
    first, second = same_twice()
    optimizer = make("SGD", [("encoder.weight", first), ("decoder.weight", second)])
    assert_refused(optimizer, r"\('encoder.weight'\) and .*\('decoder.weight'\) share memory")


def test_sharing_is_noticed_without_a_gradient_and_after_training() -> None:
    first, second = Parameter(base()), Parameter(base())
    optimizer = make("AdamW", [first, second])
    with_gradients([first])
    optimizer.step()
    second.data = first.data
    assert_refused(optimizer, f"{FIRST} and {SECOND} share memory")
    second.data = first.data.clone()
    optimizer.step()


def test_gradient_is_the_parameters_memory() -> None:
    first, second = with_gradients([Parameter(base()), Parameter(base())])
    second.grad = second.data
    assert_refused(
        make("SGD", [first, second]), f"gradient of {SECOND} shares memory with {SECOND}"
    )


@pytest.mark.parametrize("case", ["shifted", "shifted back", "reordered"])
def test_gradient_overlaps_the_parameters_memory(case: str) -> None:
    """A step would read what it has already overwritten, in an order that depends on threads."""
    storage = base(110)
    views = {
        "shifted": (storage[:100], storage[1:101]),
        "shifted back": (storage[1:101], storage[:100]),
        "reordered": (storage[:100].view(10, 10), storage[10:].view(10, 10).t()),
    }
    data, grad = views[case]
    p = Parameter(data)
    p.grad = grad
    assert_refused(make("SGD", [p]), f"gradient of {FIRST}")


def test_interleaved_gradient_works() -> None:
    """Gradient and parameter in one storage without a common element."""
    storage = base()
    p = Parameter(storage[::2])
    p.grad = storage[1::2]
    want = storage[::2] - 0.1 * storage[1::2]
    odd = storage[1::2].clone()
    make("SGD", [p]).step()
    torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=0)
    assert torch.equal(storage[1::2], odd)


def test_state_that_shares_memory() -> None:
    params = with_gradients([Parameter(base()), Parameter(base())])
    optimizer = make("AdamW", params)
    optimizer.step()
    first, second = (optimizer.state[p] for p in params)

    kept = first["exp_avg_sq"]
    first["exp_avg_sq"] = first["exp_avg"]
    assert_refused(
        optimizer, f"exp_avg.. of {FIRST} and state..exp_avg_sq.. of {FIRST} share memory"
    )
    first["exp_avg_sq"] = kept

    kept = second["exp_avg"]
    second["exp_avg"] = first["exp_avg"].view(8, 8)[:].flatten()
    assert_refused(optimizer, f"exp_avg.. of {FIRST} and state..exp_avg.. of {SECOND} share memory")
    second["exp_avg"] = params[0].data
    assert_refused(optimizer, f"{FIRST} and state..exp_avg.. of {SECOND} share memory")
    second["exp_avg"] = kept

    kept = second["step"]
    second["step"] = first["step"]
    assert_refused(optimizer, f"step.. of {FIRST} and state..step.. of {SECOND} share memory")
    second["step"] = kept

    optimizer.step()


def test_expanded_state_is_refused() -> None:
    params = with_gradients([Parameter(torch.ones(3, 4))])
    optimizer = make("SGD", params)
    optimizer.step()
    optimizer.state[params[0]]["momentum_buffer"] = torch.ones(1, 4).expand(3, 4)
    assert_refused(optimizer, f"momentum_buffer.*{FIRST}.*share memory")


@pytest.mark.emulated_only("takes 400 launches")
def test_columns_of_a_matrix_as_parameters() -> None:
    """Every pair interleaves and none overlaps; one element more, and two do."""
    matrix = torch.zeros(400, 400)
    params = with_gradients([Parameter(matrix[:, i]) for i in range(400)])
    make("SGD", params).step()
    assert bool((matrix != 0).all())
    params += with_gradients([Parameter(matrix[399, 200:201])])
    kept = matrix.clone()
    with pytest.raises(ValueError, match=r"\[200\] and .*\[400\] share memory"):
        make("SGD", params).step()
    assert torch.equal(matrix, kept)
