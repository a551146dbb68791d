"""batch_norm_act and batch_norm_add_act against fp64 composites, every pair of options together, and the state
that they keep."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import batch_norm_reference as reference
import op_checks as checks
import pytest
import torch
from batch_norm_reference import ACTIVATIONS, Config, act_args, add_act_args
from op_table import BF16, FP16, FP32, FP64, Args, one_number, values
from torch import Tensor

ops = torch.ops.braze

FACTORS: dict[str, tuple[Any, ...]] = {
    "activation": tuple(ACTIVATIONS),
    "join": ("plain", "residual", "two"),
    "mode": ("training", "eval", "frozen"),
    "last": (False, True),
    "shape": ((6, 5), (3, 17, 9), (2, 9, 5, 7), (2, 4, 3, 4, 5)),
    "dtype": (FP32, FP64, BF16, FP16),
    "wide": (False, True),
}
# Where 16-bit arithmetic, which torch's composite uses, may see another side of a kink.
KINK_TOLERANCE = {FP32: 1e-4, FP64: 1e-10, BF16: 0.05, FP16: 0.01}


def pairs_of(row: dict[str, Any]) -> set[tuple[Any, ...]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(FACTORS, 2)}


def pairwise() -> list[dict[str, Any]]:
    """Few rows in which every pair of values of two factors occurs."""
    every = [dict(zip(FACTORS, row, strict=True)) for row in itertools.product(*FACTORS.values())]
    left = set().union(*map(pairs_of, every))
    rows = []
    while left:
        a, value, b, other = min(left, key=repr)
        row: dict[str, Any] = {a: value, b: other}
        for name in FACTORS:
            if name not in row:
                row[name] = max(
                    FACTORS[name], key=lambda v, n=name, r=row: len(covered({**r, n: v}, left))
                )
        rows.append({name: row[name] for name in FACTORS})
        left -= pairs_of(rows[-1])
    return rows


def covered(row: dict[str, Any], left: set[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The pairs that a row, begun or whole, has."""
    names = [name for name in FACTORS if name in row]
    return [p for x, y in itertools.combinations(names, 2) if (p := (x, row[x], y, row[y])) in left]


ROWS = pairwise()


def row_id(row: dict[str, Any]) -> str:
    words = [row["activation"], row["join"], row["mode"], "NHWC" if row["last"] else "NCHW"]
    words += [f"{len(row['shape'])}d", str(row["dtype"])[6:], *(["wide"] if row["wide"] else [])]
    return "-".join(words)


def test_every_pair_is_covered() -> None:
    seen = set().union(*map(pairs_of, ROWS))
    for a, b in itertools.combinations(FACTORS, 2):
        for value, other in itertools.product(FACTORS[a], FACTORS[b]):
            assert (a, value, b, other) in seen
    assert len(ROWS) < 110


class Call:
    """One row as a call of ours and of the composite, with the gradient of y."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.dtype = row["dtype"]
        self.two = row["join"] == "two"
        self.config = Config(
            row["shape"],
            row["activation"],
            training=row["mode"] == "training",
            residual=row["join"] == "residual",
            last=row["last"],
            wide=row["wide"],
        )

    def args(self) -> Args:
        make = add_act_args if self.two else act_args
        return make(self.config, self.dtype)

    @property
    def ours(self) -> Callable[..., Tensor]:
        return ops.batch_norm_add_act if self.two else ops.batch_norm_act

    @property
    def composite(self) -> Callable[..., Tensor]:
        return reference.batch_norm_add_act if self.two else reference.batch_norm_act

    @property
    def differentiable(self) -> tuple[int, ...]:
        return (0, 1, 2, 8, 9, 10) if self.two else (0, 1, 2, 11)

    @property
    def mutated(self) -> tuple[int, ...]:
        return (3, 4, 5, 11, 12, 13) if self.two else (3, 4, 5)

    def run(self, function: Callable[..., Tensor], args: Args) -> list[Tensor]:
        with torch.no_grad():
            y = function(*args)
        return [y, *(args[i] for i in self.mutated if args[i] is not None)]

    def gradient(self) -> Tensor:
        """Zero where rounding may choose the derivative."""
        args = checks.wide(self.args())
        args[17 if self.two else 9] = "identity"
        with torch.no_grad():
            z = self.composite(*args)
        tolerance = KINK_TOLERANCE[self.dtype]
        dy = values(self.config.shape, 7, self.dtype)
        return dy.masked_fill(reference.near_kinks(z, self.config.activation, tolerance), 0.0)

    def gradients(self, function: Callable[..., Tensor], args: Args, dy: Tensor) -> list[Tensor]:
        inputs = [args[i].requires_grad_() for i in self.differentiable if args[i] is not None]
        y = function(*args)
        return list(torch.autograd.grad(y, inputs, dy.to(y)))


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_against_fp64(row: dict[str, Any]) -> None:
    call = Call(row)
    exact = call.run(call.composite, checks.wide(call.args()))
    theirs = call.run(call.composite, call.args())
    checks.assert_no_worse(call.run(call.ours, call.args()), theirs, exact, "values")
    if row["mode"] == "eval":
        return
    dy = call.gradient()
    assert (dy != 0).float().mean() > 0.5
    exact = call.gradients(call.composite, checks.wide(call.args()), dy)
    theirs = call.gradients(call.composite, call.args(), dy)
    ours = call.gradients(call.ours, call.args(), dy)
    checks.assert_no_worse(ours, theirs, exact, "gradients")


# ------------------------------------------------------ every tail and block

CHANNELS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 130)
PIXELS = (2, 3, 7, 9, 16, 17, 31, 33, 64, 127, 129, 255, 257, 513, 1025)


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_sizes(dtype: torch.dtype, last: bool) -> None:
    shapes = [(1, c, p, 1) for c, p in zip(itertools.cycle(CHANNELS), PIXELS, strict=False)]
    shapes += [(3, c, PIXELS[i % 7], 2) for i, c in enumerate(CHANNELS)]
    for shape in shapes:
        call = Call(
            {
                "shape": shape,
                "activation": "silu",
                "join": "residual",
                "mode": "training",
                "last": last,
                "dtype": dtype,
                "wide": True,
            }
        )
        exact = call.run(call.composite, checks.wide(call.args()))
        theirs = call.run(call.composite, call.args())
        checks.assert_no_worse(call.run(call.ours, call.args()), theirs, exact, f"{shape}")
        dy = call.gradient()
        exact = call.gradients(call.composite, checks.wide(call.args()), dy)
        theirs = call.gradients(call.composite, call.args(), dy)
        ours = call.gradients(call.ours, call.args(), dy)
        checks.assert_no_worse(ours, theirs, exact, f"{shape}, gradients")


# ----------------------------------------------------------- running statistics


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_running_statistics(momentum: float | None) -> None:
    """Several batches; the variance is the unbiased one."""
    c, mean, var = 5, torch.zeros(5), torch.ones(5)
    tracked = one_number(0, torch.int64)
    expected = [torch.zeros(c, dtype=FP64), torch.ones(c, dtype=FP64)]
    for batch in range(1, 5):
        x = values((7, c, 3), batch) * batch + batch
        ops.batch_norm_act(
            x, None, None, mean, var, tracked, momentum, 1e-5, True, "relu", 0.0, None
        )
        factor = 1 / batch if momentum is None else momentum
        flat = x.double().transpose(0, 1).reshape(c, -1)
        for old, new in zip(expected, (flat.mean(1), flat.var(1, unbiased=True)), strict=True):
            old.mul_(1 - factor).add_(factor * new.to(old))
        assert int(tracked) == batch
        torch.testing.assert_close(mean.double(), expected[0].to(mean.device), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var.double(), expected[1].to(var.device), rtol=1e-6, atol=1e-6)


def test_statistics_are_used_biased() -> None:
    x = values((2, 3, 2), 1)
    y = ops.batch_norm_act(x, None, None, None, None, None, 0.1, 0.0, True, "identity", 0.0, None)
    flat = y.double().transpose(0, 1).reshape(3, -1)
    torch.testing.assert_close(
        flat.var(1, unbiased=False), torch.ones_like(flat[:, 0]), rtol=1e-6, atol=0
    )


def test_evaluation_changes_nothing() -> None:
    args = act_args(Config(training=False), FP32)
    before = checks.snapshot(args)
    ops.batch_norm_act(*args)
    checks.assert_untouched(args, before, (), "evaluation")


def test_empty_batch_counts_and_keeps_statistics() -> None:
    args = act_args(Config((0, 3, 4, 4)), FP32)
    before = [a.clone() for a in args[3:6]]
    y = ops.batch_norm_act(*args)
    assert y.shape == (0, 3, 4, 4)
    assert torch.equal(args[3], before[0]) and torch.equal(args[4], before[1])
    assert int(args[5]) == int(before[2]) + 1


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1), (1, 4, 1, 1, 1)])
def test_one_value_per_channel_is_refused_in_torchs_words(shape: tuple[int, ...]) -> None:
    args = act_args(Config(shape), FP32)
    with pytest.raises(ValueError) as theirs:
        torch.nn.functional.batch_norm(args[0], None, None, training=True)
    with pytest.raises(ValueError) as ours:
        ops.batch_norm_act(*args)
    assert str(theirs.value).replace("torch.Size(", "").rstrip(")") in str(ours.value)
    ops.batch_norm_act(*act_args(Config(shape, training=False), FP32))  # fine in evaluation


@pytest.mark.parametrize("strided", [1, 2, 3, 4])
def test_strided_vectors(strided: int) -> None:
    """weight, bias and running statistics may be views."""
    results = []
    for spread in (False, True):
        args = act_args(Config(residual=True), FP32)
        if spread:
            vector = args[strided]
            memory = vector.new_zeros(2 * vector.numel())
            args[strided] = memory[::2].copy_(vector)
        inputs = [args[i].requires_grad_() for i in (0, 1, 2, 11)]
        y = ops.batch_norm_act(*args)
        grads = torch.autograd.grad(y, inputs, values(y.shape, 3))
        results.append([y.detach(), *grads, args[3], args[4]])
    checks.devices.assert_same(results[1], results[0])


def test_residual_of_another_dtype_and_a_broadcast_one() -> None:
    args = act_args(Config(), BF16)
    wide = values((4, 5, 3, 7), 2)
    y = ops.batch_norm_act(*args[:11], wide)
    assert y.dtype is FP32
    args = act_args(Config(), FP32)
    row = values((1, 5, 1, 7), 2).requires_grad_()
    y = ops.batch_norm_act(*args[:11], row)
    torch.testing.assert_close(y, reference.batch_norm_act(*act_args(Config(), FP32)[:11], row))
    assert torch.autograd.grad(y.sum(), row)[0].shape == row.shape
