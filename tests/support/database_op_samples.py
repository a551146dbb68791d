"""Arguments for batch norm and the dropouts: torch's op_db's, and layouts, errors and extremes beside them."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal import common_methods_invocations as database
from torch_databases import argument, set_seed


@dataclass(frozen=True)
class Sample:
    """Arguments of a call. Its tensors are copied for each call, so that none sees another's writes."""

    function: Any
    input: Tensor
    args: tuple[Any, ...] = ()
    kwargs: Any = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(a for a in (self.input, *self.args) if isinstance(a, Tensor))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What can have a gradient, detached from other calls."""
        return tuple(fresh(t) for t in self.tensors if t.requires_grad)

    @property
    def x(self) -> Tensor:
        return fresh(self.input).detach()

    @property
    def constants(self) -> tuple[Tensor, ...]:
        return tuple(fresh(t).detach() for t in self.tensors)

    def bind(self, f: Any, leaves: bool = False, **extra: Any) -> Callable[..., Any]:
        """f as a function of all tensors, or of those that can have a gradient."""

        def bound(*given: Tensor) -> Any:
            left = iter(given)
            arguments = [
                a
                if not isinstance(a, Tensor)
                else next(left)
                if a.requires_grad or not leaves
                else fresh(a)
                for a in (self.input, *self.args)
            ]
            return f(*arguments, **(self.kwargs or {}), **extra)

        return bound

    def drops(self) -> bool:
        """Whether it is a dropout that draws random numbers."""
        return self.dropout and self.training and 0 < self.p and self.input.numel() > 0

    @property
    def dropout(self) -> bool:
        return self.function is not F.batch_norm

    @property
    def p(self) -> float:
        return float(argument(self.function, "p", self.args, self.kwargs or {}))

    @property
    def training(self) -> bool:
        return bool(argument(self.function, "training", self.args, self.kwargs or {}))


def fresh(t: Tensor) -> Tensor:
    """A copy with the same strides, gaps included."""
    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    if all(stride or size <= 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
        copy.copy_(t.detach())
    else:
        copy = t.detach()
    return copy.requires_grad_() if t.requires_grad else copy


@dataclass(frozen=True)
class Entry:
    """A function, and what torch's database has for it."""

    subject: str
    name: str
    samples: Callable[[torch.dtype], Iterator[Any]]

    @property
    def function(self) -> Any:
        return getattr(F, self.name)

    @property
    def dropout(self) -> bool:
        return self.name != "batch_norm"


def entries() -> list[Entry]:
    found = []
    for info in database.op_db:
        known = re.fullmatch(r"nn\.functional\.(batch_norm|\w*dropout\w*)", info.name)
        if known and info.variant_test_name != "without_cudnn":
            name = known[1]
            samples = functools.partial(info.sample_inputs_func, info, "cpu", requires_grad=True)
            subject = "-".join(filter(None, (name, info.variant_test_name)))
            found.append(Entry(subject, name, samples))
    one = functools.partial(
        database.sample_inputs_dropout, None, "cpu", requires_grad=True, valid_input_dim=(2, 3)
    )
    return [*found, Entry("dropout1d", "dropout1d", lambda dtype: one(dtype=dtype))]  # type: ignore[call-arg]


# ------------------------------------------------------------------- samples


@functools.cache
def from_database(entry: Entry, dtype: torch.dtype) -> list[tuple[str, Sample]]:
    return list(_from_database(entry, dtype))


def _from_database(entry: Entry, dtype: torch.dtype) -> Iterator[tuple[str, Sample]]:
    set_seed()
    for index, given in enumerate(entry.samples(dtype)):
        sample = Sample(entry.function, given.input, given.args, given.kwargs)
        shape = "x".join(map(str, given.input.shape)) or "scalar"
        if not entry.dropout:
            yield f"{shape}-{'train' if sample.training else 'eval'}-{index}", sample
            continue
        mode = ("train" if sample.training else "eval") if given.kwargs else "defaults"
        yield f"{shape}-p{sample.p}-{mode}", sample
    if entry.dropout:
        empty = {1: (0,), 2: (2, 0), 3: (0, 3, 2)}
        for shape in empty.values():
            x = torch.zeros(shape, dtype=dtype, requires_grad=True)
            yield (
                f"{'x'.join(map(str, shape))}-p0.5-train",
                Sample(entry.function, x, (), {"p": 0.5, "training": True}),
            )


def typical(entry: Entry, dtype: torch.dtype) -> Iterator[tuple[str, Sample]]:
    """Of dropouts only what drops and one that does not; of batch norm what is not nearly the same."""
    seen = set()
    for name, sample in from_database(entry, dtype):
        if entry.dropout:
            kind: Any = (sample.input.dim(), sample.training)
            wanted = sample.p == 0.5 and sample.input.numel() > 0 and kind not in seen
        else:
            kind = (sample.input.shape, sample.training, *(a is None for a in sample.args))
            wanted = kind not in seen
        if wanted:
            seen.add(kind)
            if sample.input.numel() > 700:  # gradcheck of thousands takes seconds
                less = sample.input.detach()[(slice(3),) * sample.input.dim()]
                sample = replace(sample, input=less.clone().requires_grad_())
            yield name, sample


def dropping(entry: Entry, dtype: torch.dtype) -> Iterator[tuple[str, Sample]]:
    yield from (s for s in typical(entry, dtype) if not entry.dropout or s[1].drops())


def first(entry: Entry, dtype: torch.dtype) -> Iterator[tuple[str, Sample]]:
    """For what takes a compiler."""
    yield from itertools.islice(dropping(entry, dtype), 1)


def large(entry: Entry, dtype: torch.dtype) -> Iterator[tuple[str, Sample]]:
    """Dropouts of so much that two masks are never the same and their mean tells p."""
    if not entry.dropout or entry.subject.endswith("without_train"):
        return
    shape = {"dropout1d": (64, 64, 2), "dropout3d": (64, 64, 1, 2, 1)}.get(
        entry.name, (64, 64, 2, 1)
    )
    for p in (0.1, 0.5):
        x = torch.linspace(1, 2, 8192, dtype=torch.float64).to(dtype).view(shape)
        sample = Sample(entry.function, x.requires_grad_(), (), {"p": p, "training": True})
        yield f"p{p}", sample


def rebuilt(entry: Entry, dtype: torch.dtype, x: Tensor, training: bool = True) -> Sample:
    """A sample of that input."""
    if entry.dropout:
        return Sample(entry.function, x, (), {"p": 0.5, "training": training})
    c = x.shape[1]
    vectors = [torch.linspace(0.5, 1.5 + i, c, dtype=torch.float64).to(dtype) for i in range(4)]
    for v in vectors[2:]:
        v.requires_grad_(v.is_floating_point())
    return Sample(entry.function, x, tuple(vectors), {"training": training})


def layouts(entry: Entry, dtype: torch.dtype) -> Iterator[tuple[str, Sample]]:
    base = torch.linspace(-1, 1, 2 * 4 * 6 * 4 * 6, dtype=torch.float64).to(dtype)
    four, five = base[:1152].view(6, 4, 6, 8), base.view(2, 4, 6, 4, 6)
    made = {
        "contiguous": four,
        "channels_last": four.contiguous(memory_format=torch.channels_last),
        "channels_last_3d": five.contiguous(memory_format=torch.channels_last_3d),
        "transposed": four.transpose(2, 3),
        "permuted": four.permute(3, 2, 0, 1),
        "batch_last": four.permute(1, 2, 3, 0),
        "every_other": four[..., ::2],
        "every_other_row": four[:, :, ::2],
        "some_channels": four[:, 1:3],
        "channels_last_some_channels": four.contiguous(memory_format=torch.channels_last)[:, 1:3],
        "expanded": four[:, :, :1].expand(6, 4, 5, 8),
        "expanded_batch": four[:1].expand(6, 4, 6, 8),
        "shifted": base[1 : 1 + 6 * 4 * 6 * 4].view(6, 4, 6, 4),
        "size_1": four[:, :, :1, :1],
        "one_channel": four[:, :1],
        "three_dims": four[0],
        "three_dims_transposed": four[:, :, 0].transpose(1, 2),
        "two_dims_transposed": four[:, :, 0, 0].t(),
        "two_dims_every_other": four[::2, :, 0, 0],
    }
    for name, view in made.items():
        for training in (True, False):
            x = view.detach().requires_grad_()
            mode = "train" if training else "eval"
            yield f"{name}-{mode}", rebuilt(entry, dtype, x, training)


def of_any_dtype(entry: Entry, dtype: torch.dtype) -> Iterator[tuple[str, Sample]]:
    for training in (True, False):
        x = torch.ones(2, 3, 4, 5).to(dtype)
        for mixed in (False, True) if not entry.dropout else (False,):
            sample = rebuilt(entry, torch.float32 if mixed else dtype, x, training)
            yield f"{'train' if training else 'eval'}{'-mixed' * mixed}", sample


def wrong_calls(entry: Entry, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Name, (torch's function, arguments)."""
    x = torch.linspace(-1, 1, 120, dtype=dtype).view(2, 3, 4, 5)
    leaf = x.clone().requires_grad_()
    if entry.dropout:
        given = {
            "negative_p": ((x, -0.1), {}),
            "p_above_1": ((x, 1.1), {"training": True}),
            "p_nan": ((x, float("nan"), True), {}),
            "p_inf": ((x, float("inf"), True), {}),
            "p_str": ((x, "0.5", True), {}),
            "p_none": ((x, None, True), {}),
            "p_tensor": ((x, torch.tensor(0.5), True), {}),
            "p_int": ((x, 1, True), {}),
            "p_bool": ((x, True, True), {}),
            "no_tensor": ((3.0, 0.5, True), {}),
            "none": ((None, 0.5, True), {}),
            "list": (([x], 0.5, True), {}),
            "numpy": ((x.numpy(), 0.5, True), {}),
            "training_none": ((x, 0.5, None), {}),
            "training_int": ((x, 0.5, 1), {}),
            "training_tensor": ((x, 0.5, torch.tensor(True)), {}),
            "inplace_leaf": ((leaf, 0.5, True, True), {}),
            "inplace_leaf_p1": ((leaf, 1.0, True, True), {}),
            "inplace_leaf_eval": ((leaf, 0.5, False, True), {}),
            "inplace_expanded": ((x[:1].expand(4, 3, 4, 5), 0.5, True, True), {}),
            "unknown_keyword": ((x,), {"ratio": 0.5}),
            "too_many": ((x, 0.5, True, False, None, None), {}),
            "nothing": ((), {}),
            "sparse": ((x.to_sparse(), 0.5, True), {}),
            "sparse_eval": ((x.to_sparse(), 0.5, False), {}),
            "six_dims": ((x.view(1, 2, 3, 4, 5, 1), 0.5, True), {}),
            "two_dims": ((x.view(6, 20), 0.5, True), {}),
            "one_dim": ((x.view(120), 0.5, True), {}),
            "scalar": ((x.view(120)[0], 0.5, True), {}),
        }
    else:
        m, v = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
        grad = m.clone().requires_grad_()
        given = {
            "no_statistics": ((x, None, None), {"training": False}),
            "mean_alone": ((x, m, None), {"training": False}),
            "var_alone": ((x, None, v), {"training": False}),
            "mean_alone_training": ((x, m, None), {"training": True}),
            "var_alone_training": ((x, None, v), {"training": True}),
            "short_mean": ((x, m[:2], v), {"training": True}),
            "short_var": ((x, m, v[:2]), {"training": False}),
            "short_weight": ((x, m, v, m[:2]), {"training": True}),
            "short_bias": ((x, m, v, m, m[:2]), {"training": True}),
            "two_dim_weight": ((x, m, v, v.view(3, 1)), {"training": True}),
            "two_dim_mean": ((x, m.view(3, 1), v), {"training": True}),
            "one_value": ((x[:1, :, :1, :1], m, v), {"training": True}),
            "one_dim": ((x.view(120), m, v), {"training": True}),
            "scalar": ((x.view(120)[0], m, v), {"training": True}),
            "negative_eps": ((x, m, v, None, None, True, 0.1, -1.0), {}),
            "zero_eps": ((x, m, v, None, None, True, 0.1, 0.0), {}),
            "negative_eps_eval": ((x, m, v, None, None, False, 0.1, -0.5), {}),
            "momentum_none": ((x, m, v, None, None, True, None), {}),
            "momentum_str": ((x, m, v, None, None, True, "0.1"), {}),
            "momentum_nan": ((x, m.clone(), v.clone(), None, None, True, float("nan")), {}),
            "eps_none": ((x, m, v, None, None, True, 0.1, None), {}),
            "eps_tensor": ((x, m, v, None, None, True, 0.1, torch.tensor(0.1)), {}),
            "momentum_tensor": ((x, m.clone(), v.clone(), None, None, True, torch.tensor(0.1)), {}),
            "training_none": ((x, m, v, None, None, None), {}),
            "training_int": ((x, m.clone(), v.clone(), None, None, 1), {}),
            "no_tensor": ((3.0, m, v), {"training": True}),
            "none": ((None, m, v), {"training": True}),
            "unknown_keyword": ((x, m, v), {"axis": 1}),
            "nothing": ((), {}),
            "other_dtype_weight": ((x, m, v, v.double()), {"training": True}),
            "half_weight": ((x, m, v, v.half()), {"training": True}),
            "other_dtype_mean": ((x, m.double(), v), {"training": True}),
            "half_statistics": ((x, m.half(), v.half()), {"training": True}),
            "double_statistics": ((x, m.double(), v.double()), {"training": True}),
            "integers": ((x.long(), m, v), {"training": True}),
            "complex": ((x.to(torch.complex64), m, v), {"training": False}),
            "sparse": ((x.to_sparse(), m, v), {"training": True}),
            "meta_weight": ((x, m, v, v.to("meta")), {"training": True}),
            "expanded_mean": ((x, m[:1].expand(3), v.clone()), {"training": True}),
            "expanded_mean_eval": ((x, m[:1].expand(3), v), {"training": False}),
            "mean_requires_grad": ((x, grad, v.clone()), {"training": True}),
            "var_requires_grad": ((x, m.clone(), grad), {"training": True}),
            "mean_requires_grad_eval": ((x, grad, v), {"training": False}),
            "mean_requires_grad_input_too": ((leaf, grad, v), {"training": False}),
            "statistics_twice": ((x, v.clone(), v), {"training": True}),
            "no_channels": ((x[:, :0], m[:0], v[:0]), {"training": True}),
            "no_space": ((x[:, :, :0], m.clone(), v.clone()), {"training": True}),
            "no_space_eval": ((x[:, :, :0], m, v), {"training": False}),
            "no_batch": ((x[:0], m, v), {"training": True}),
        }
    for name, (args, kwargs) in given.items():
        yield name, (entry.function, args, kwargs)


def extremes(entry: Entry, dtype: torch.dtype) -> Iterator[tuple[str, Sample]]:
    """Of dropout what is kept is worth its value; of batch norm one channel is extreme."""
    for name, value in {
        "nan": float("nan"),
        "inf": float("inf"),
        "minus_inf": -float("inf"),
        "largest": torch.finfo(dtype).max,
        "tiny": torch.finfo(dtype).tiny,
        "denormal": torch.finfo(dtype).tiny / 8,
        "minus_zero": -0.0,
    }.items():
        for kind in ("one", "channel"):
            for training in (True, False):
                x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(4, 3, 5).to(dtype)
                x[:, 1, :] = value if kind == "channel" else x[:, 1, :]
                x[2, 1, 3] = value
                x = (x[0] if entry.name == "dropout1d" else x).requires_grad_()
                mode = "train" if training else "eval"
                yield f"{name}-{kind}-{mode}", rebuilt(entry, dtype, x, training)
