"""braze.nn.utils: torch's clipping of gradients, in one pass over all of them."""

from __future__ import annotations

import copy
import inspect
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import braze.nn.utils as ours
import pytest
import torch
import torch.nn.utils as theirs
from torch import Tensor
from torch.nn import Parameter

SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (1,),
    (15,),
    (16,),
    (17,),
    (3, 511),
    (16385,),
    (4, 3, 5, 5),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def parameters(dtypes: list[torch.dtype], scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(0)
    made = []
    for i, shape in enumerate(SHAPES):
        dtype = dtypes[i % len(dtypes)]
        p = Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
        made.append(p)
    made.append(Parameter(torch.zeros(3)))  # without a gradient
    return made


def strided() -> list[Tensor]:
    """Transposed, channels-last, and with gaps."""
    made = []
    for grad in (
        torch.randn(40, 30).t(),
        torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last),
        torch.randn(50, 7)[:, ::2],
        torch.randn(33)[1:],
    ):
        p = Parameter(torch.zeros(grad.shape))
        p.grad = grad
        made.append(p)
    return made


def exact_norm(params: list[Tensor]) -> float:
    grads = [p.grad for p in params if p.grad is not None]
    return math.sqrt(sum(float(g.to(torch.complex128).abs().pow(2).sum()) for g in grads))


def assert_alike(mine: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(mine, expected, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            assert a.grad.stride() == b.grad.stride()
            torch.testing.assert_close(a.grad, b.grad, equal_nan=True)


CASES = [*([d] for d in DTYPES), [torch.float32, torch.bfloat16], [torch.float16, torch.float64]]


@pytest.mark.parametrize("max_norm", [0.0, 0.7, 1e6])
@pytest.mark.parametrize("dtypes", CASES, ids=str)
def test_norm_is_clipped_as_torch_does(dtypes: list[torch.dtype], max_norm: float) -> None:
    mine, expected = parameters(dtypes), parameters(dtypes)
    exact = exact_norm(mine)
    norm, reference = (
        ours.clip_grad_norm_(mine, max_norm),
        theirs.clip_grad_norm_(expected, max_norm),
    )
    assert (norm.dtype, norm.device, norm.shape) == (
        reference.dtype,
        reference.device,
        reference.shape,
    )
    assert float(norm) == pytest.approx(exact, rel=torch.finfo(norm.dtype).eps)
    if all(dtype.itemsize > 2 for dtype in dtypes):  # else torch rounds each norm to 16 bits
        assert_alike(mine, expected)
    assert exact_norm(mine) <= max(max_norm, 0.0) * (1 + 1e-2) or max_norm > exact


@pytest.mark.parametrize("function", ["clip_grad_norm_", "clip_grad_value_"])
def test_any_order_in_memory(function: str) -> None:
    mine = strided()
    expected = copy.deepcopy(mine)
    for a, b in zip(mine, expected, strict=True):
        b.grad = a.grad.clone() if a.grad is not None and a.grad._is_view() else b.grad
    references = [torch.empty_strided(p.grad.shape, p.grad.stride()).copy_(p.grad) for p in mine]  # type: ignore[union-attr]
    for p, grad in zip(expected, references, strict=True):
        p.grad = grad
    getattr(ours, function)(mine, 0.25)
    getattr(theirs, function)(expected, 0.25)
    assert_alike(mine, expected)


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_value_is_clipped_as_torch_does(dtype: torch.dtype) -> None:
    mine, expected = parameters([dtype]), parameters([dtype])
    for p in (mine[6], expected[6]):
        assert p.grad is not None
        p.grad.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    assert ours.clip_grad_value_(mine, 0.5) is None
    theirs.clip_grad_value_(expected, 0.5)
    assert_alike(mine, expected)


def test_complex_gradients_have_no_order() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        ours.clip_grad_value_(parameters([torch.complex64]), 0.5)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_norm_that_is_not_finite(bad: float) -> None:
    def poisoned() -> list[Tensor]:
        made = parameters([torch.float32])
        assert made[7].grad is not None
        made[7].grad[9000] = bad
        return made

    mine, expected = poisoned(), poisoned()
    with pytest.raises(RuntimeError, match="non-finite"):
        ours.clip_grad_norm_(mine, 1.0, error_if_nonfinite=True)
    assert_alike(mine, expected)  # nothing was changed
    ours.clip_grad_norm_(mine, 1.0)
    theirs.clip_grad_norm_(expected, 1.0)
    assert_alike(mine, expected)


def test_squares_that_overflow_fp32_have_a_norm() -> None:
    params = parameters([torch.float32], scale=1e30)
    exact = exact_norm(params)
    assert math.isinf(theirs.get_total_norm([p.grad for p in params if p.grad is not None]))
    assert float(ours.clip_grad_norm_(params, 1.0)) == pytest.approx(exact, rel=1e-6)
    assert exact_norm(params) == pytest.approx(1.0, rel=1e-5)


def test_total_norm_reads_only() -> None:
    params, untouched = parameters([torch.float32]), parameters([torch.float32])
    grads = [p.grad for p in params if p.grad is not None]
    torch.testing.assert_close(ours.get_total_norm(grads), theirs.get_total_norm(grads))
    assert_alike(params, untouched)
    assert float(ours.get_total_norm([])) == 0.0


def sparse() -> list[Tensor]:
    p = Parameter(torch.zeros(5))
    p.grad = torch.tensor([0.0, 3.0, 0.0, 4.0, 0.0]).to_sparse()
    return [p]


def shared() -> list[Tensor]:
    memory = torch.arange(1.0, 9.0)
    made = [Parameter(torch.zeros(6)), Parameter(torch.zeros(6))]
    made[0].grad, made[1].grad = memory[:6], memory[2:]
    return made


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (shared, {"max_norm": 1.0}),
        (lambda: parameters([torch.float32])[2:], {"max_norm": 1.0, "norm_type": math.inf}),
        (lambda: parameters([torch.float32]), {"max_norm": 1.0, "norm_type": 1}),
        (lambda: parameters([torch.float32]), {"max_norm": -1.0}),
        (lambda: parameters([torch.float32]), {"max_norm": 1.0, "foreach": False}),
    ],
)
def test_what_is_torchs_code(make: Any, arguments: dict[str, Any]) -> None:
    mine, expected = make(), make()
    torch.testing.assert_close(
        ours.clip_grad_norm_(mine, **arguments), theirs.clip_grad_norm_(expected, **arguments)
    )
    assert_alike(mine, expected)


def test_sparse_gradients_fail_as_in_torch() -> None:
    with pytest.raises(Exception) as expected:
        theirs.clip_grad_norm_(sparse(), 1.0)
    with pytest.raises(type(expected.value)):
        ours.clip_grad_norm_(sparse(), 1.0)


def test_parameters_in_any_form() -> None:
    def all_of(params: list[Tensor]) -> Iterator[Tensor]:
        yield from params

    for give in (lambda p: p, tuple, all_of, iter):
        params = parameters([torch.float32])
        expected = exact_norm(params)
        assert float(ours.clip_grad_norm_(give(params), 1.0)) == pytest.approx(expected, rel=1e-6)
        assert exact_norm(params) == pytest.approx(1.0, rel=1e-5)
    one = parameters([torch.float32])[7]
    ours.clip_grad_norm_(one, 1.0)
    assert exact_norm([one]) == pytest.approx(1.0, rel=1e-5)
    with pytest.warns(UserWarning, match="empty generator"):
        ours.clip_grad_norm_(all_of([]), 1.0)
    assert float(ours.clip_grad_norm_([Parameter(torch.zeros(2))], 1.0)) == 0.0


def test_versions_tell_of_the_change() -> None:
    params = parameters([torch.float32])
    grad = params[7].grad
    assert grad is not None
    for function in (ours.clip_grad_norm_, ours.clip_grad_value_):
        before = grad._version
        function(params, 0.1)
        assert grad._version > before


def test_same_bits_for_any_number_of_threads_and_split() -> None:
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = [Parameter(torch.zeros(100_003)) for _ in range(3)]
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            norm = float(ours.clip_grad_norm_(params, 1.0))
            found.add((norm, *(float(p.grad.double().sum()) for p in params)))  # type: ignore[union-attr]
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_imports_as_torchs() -> None:
    from braze.nn.utils import clip_grad, parametrize, rnn

    assert clip_grad.clip_grad_norm_ is ours.clip_grad_norm_ is not theirs.clip_grad_norm_
    assert parametrize is theirs.parametrize and rnn is theirs.rnn
    assert ours.clip_grads_with_norm_ is theirs.clip_grads_with_norm_
    for name in ("clip_grad_norm_", "clip_grad_value_", "get_total_norm"):
        mine, torchs = (inspect.signature(getattr(m, name)).parameters for m in (ours, theirs))
        assert [(p.name, p.default) for p in mine.values()] == [
            (p.name, p.default) for p in torchs.values()
        ]
    assert set(ours.__all__) >= set(theirs.__all__)
    assert all(hasattr(ours, name) for name in ours.__all__)


def test_install_puts_them_where_frameworks_look() -> None:
    program = (
        "import torch, braze, braze.nn.utils as u\n"
        "before = torch.nn.utils.clip_grad_norm_\n"
        "braze.install()\n"
        "assert torch.nn.utils.clip_grad_norm_ is u.clip_grad_norm_\n"
        "assert torch.amp.GradScaler is braze.amp.GradScaler\n"
        "p = torch.nn.Parameter(torch.zeros(3)); p.grad = torch.full((3,), 2.0)\n"
        "assert float(torch.nn.utils.clip_grad_norm_([p], 1.0, norm_type=1)) == 6.0\n"
        "torch.nn.utils.clip_grad_value_([p], 0.1, foreach=True)\n"
        "braze.uninstall()\n"
        "assert torch.nn.utils.clip_grad_norm_ is before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
