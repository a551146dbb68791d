"""Batch norm and the dropouts as functions: checks over the samples of database_op_samples.py.

A check gets the function under test and a sample, which holds torch's own function for where there is a
truth to compare with.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import braze.nn.functional as braze_functional
import torch
import torch.utils.checkpoint
from database_op_samples import (
    Sample,
    dropping,
    entries,
    extremes,
    first,
    fresh,
    from_database,
    large,
    layouts,
    of_any_dtype,
    typical,
    wrong_calls,
)
from functorch.compile import aot_function, nop
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal import composite_compliance
from torch.testing._internal.common_utils import noncontiguous_like
from torch_databases import (
    DOUBLE,
    FLOATS,
    SINGLE,
    TOLERANCE,
    Case,
    Check,
    at_seed,
    expand,
    near,
    raises_as,
    register,
    same,
    set_seed,
    warned,
    weights_like,
    with_gradients,
)

ALL_DTYPES = (
    *FLOATS,
    torch.float16,
    torch.complex64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)


# -------------------------------------------------------------------- checks

CHECKS: list[Check] = []
check = functools.partial(register, CHECKS)


def terms(sample: Sample) -> tuple[float, float, float]:
    """scale, shift and the value of what is dropped."""
    p = sample.p
    if "alpha" not in sample.function.__name__:
        return (1 / (1 - p) if p < 1 else 0.0), 0.0, 0.0
    if p == 1:
        return 0.0, 0.0, 0.0
    limit = 1.7580993408473766
    a = ((limit**2 * p + 1) * (1 - p)) ** -0.5
    return a, a * limit * p, a * limit * p - a * limit


def channel_dims(sample: Sample, dims: int) -> int:
    """Dimensions that have a mask of their own."""
    name = sample.function.__name__
    single = {"dropout1d": 2, "dropout3d": 4}.get(name) == dims
    return dims if name in ("dropout", "alpha_dropout") else 1 if single else 2


def assert_dropped(sample: Sample, x: Tensor, y: Tensor) -> Tensor:
    """y is x with some of it dropped; returns what was kept, one bool for each drawn."""
    assert y.shape == x.shape and y.dtype == x.dtype
    scale, shift, dropped_value = terms(sample)
    rtol, atol = TOLERANCE[x.dtype]
    close = functools.partial(torch.isclose, rtol=rtol, atol=atol)
    y, wide = y.detach().double(), x.detach().double()
    kept = close(y, wide * scale + shift)
    dropped = close(y, torch.full_like(y, dropped_value))
    assert bool((kept | dropped).all()), "neither kept nor dropped"
    drawn = channel_dims(sample, x.dim())
    if drawn < x.dim():
        kept, dropped = kept.flatten(drawn).all(-1), dropped.flatten(drawn).all(-1)
        assert bool((kept | dropped).all()), "a channel is half dropped"
    return kept & ~dropped


@check(ALL_DTYPES, of_any_dtype)
def dtypes(f: Any, sample: Sample) -> None:
    """The same dtypes are taken, and give the same dtype."""

    def call(function: Any) -> Tensor:
        result: Tensor = sample.bind(function)(*sample.constants)
        return result

    raises_as(lambda: call(f), lambda: call(sample.function))
    near(call(f).dtype, call(sample.function).dtype)


@check(SINGLE, wrong_calls)
def errors(f: Any, given: Any) -> None:
    """The same type of error, or none."""
    function, args, kwargs = given
    raises_as(lambda: f(*args, **kwargs), lambda: function(*args, **kwargs))


@check(SINGLE, wrong_calls)
def warns(f: Any, given: Any) -> None:
    """Of the same in the same words: Dropout2d of three dimensions, say."""
    function, args, kwargs = given
    expected = warned(lambda: function(*args, **kwargs))
    near(warned(lambda: f(*args, **kwargs)), expected)


@check(FLOATS, from_database)
def forward(f: Any, sample: Sample) -> None:
    """Torch's values; where some are dropped at random, each is torch's of one kept or of one dropped."""
    tensors, theirs = sample.constants, sample.constants
    y, expected = sample.bind(f)(*tensors), sample.bind(sample.function)(*theirs)
    if sample.drops():
        assert_dropped(sample, sample.x, y)
        assert y.stride() == expected.stride()
    else:
        near(y, expected)
        near(tensors, theirs)  # the running statistics


@check(SINGLE, from_database)
def aliases(f: Any, sample: Sample) -> None:
    """Returns the input itself, a view of it or something new where torch does."""

    def relation(function: Any) -> tuple[Any, ...]:
        tensors = sample.constants
        y = sample.bind(function)(*tensors)
        x = tensors[0]
        return y is x, y.data_ptr() == x.data_ptr() and x.numel() > 0, y._is_view()

    near(relation(f), relation(sample.function))


@check(SINGLE, from_database)
def storage(f: Any, sample: Sample) -> None:
    """As large as torch's, and the result begins where torch's does."""

    def about(function: Any) -> tuple[int, int]:
        y = sample.bind(function)(*sample.constants)
        return y.storage_offset(), y.untyped_storage().nbytes()

    near(about(f), about(sample.function))


@check(SINGLE, from_database)
def versions(f: Any, sample: Sample) -> None:
    """Autograd is told of writes to the tensors to which torch writes, and of no others."""

    def written(function: Any) -> list[bool]:
        tensors = [torch.zeros_like(t).copy_(t) for t in sample.constants]
        before = [t._version for t in tensors]
        sample.bind(function)(*tensors)
        return [t._version > v for t, v in zip(tensors, before, strict=True)]

    near(written(f), written(sample.function))


@check(SINGLE, typical)
def keywords(f: Any, sample: Sample) -> None:
    """All arguments by torch's names."""
    names = list(inspect.signature(sample.function).parameters)
    x, *_ = sample.constants
    given = dict(zip(names, (x, *sample.args), strict=False)) | (sample.kwargs or {})
    plain = {n: fresh(v) if isinstance(v, Tensor) else v for n, v in given.items()}
    near(at_seed(lambda: f(**plain))(), at_seed(sample.bind(f))(*sample.constants))


@check(SINGLE, typical)
def anomaly_detection(f: Any, sample: Sample) -> None:
    bound = at_seed(sample.bind(f, leaves=True))
    expected = with_gradients(bound, sample.leaves)
    with torch.autograd.detect_anomaly(check_nan=True):
        same(with_gradients(bound, sample.leaves), expected)


@check(SINGLE, typical)
def function_mode(f: Any, sample: Sample) -> None:
    """A mode of torch functions sees the call, and may put another in its place."""

    class Counts(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Counts():
        sample.bind(f)(*sample.constants)
    assert sample.function.__name__ in seen


@check(SINGLE, from_database)
def grad_mode(f: Any, sample: Sample) -> None:
    """requires_grad, is_leaf and is_inference as torch's, in every mode."""

    def flags(function: Any) -> list[Any]:
        found = []
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            leaves = sample.leaves
            with mode():
                y = sample.bind(function, leaves=True)(*leaves)
            found.append((y.requires_grad, y.is_leaf, y.is_inference()))
        return found

    near(flags(f), flags(sample.function))


@check(FLOATS, from_database)
def gradient(f: Any, sample: Sample) -> None:
    """Torch's; of dropouts, the scale where kept and 0 where dropped."""
    y, *grads = with_gradients(at_seed(sample.bind(f, leaves=True)), sample.leaves)
    if not sample.drops():
        bound = sample.bind(sample.function, leaves=True)
        near([y, *grads], with_gradients(at_seed(bound), sample.leaves), 2.0)
        return
    kept = assert_dropped(sample, sample.x, y)
    if sample.p == 0.5 and sample.x.abs().min() > 0.05:  # or dropped and kept look the same
        wide = weights_like(y) * terms(sample)[0]
        kept = kept.view(kept.shape + (1,) * (y.dim() - kept.dim()))
        near(grads, [torch.where(kept, wide, 0 * wide)], 2.0)


@check(SINGLE, from_database)
def seeds(f: Any, sample: Sample) -> None:
    """The same seed gives the same result, in sequence too, and draws where torch draws."""
    bound = sample.bind(f)
    first = at_seed(bound)(*sample.constants)
    second = bound(*sample.constants)
    same(at_seed(bound)(*sample.constants), first)
    same(bound(*sample.constants), second)

    def draws(function: Any) -> bool:
        set_seed()
        before = torch.get_rng_state()
        sample.bind(function)(*sample.constants)
        return not torch.equal(before, torch.get_rng_state())

    near(draws(f), draws(sample.function))


@check(FLOATS, large)
def keep_rate(f: Any, sample: Sample) -> None:
    """Within five deviations of p, other for another seed and for the next call."""
    bound = sample.bind(f)
    found = []
    for call in (at_seed(bound), bound, at_seed(bound, 6)):
        kept = assert_dropped(sample, sample.x, call(sample.x))
        p, n = sample.p, kept.numel()
        assert abs(float(kept.double().mean()) - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
        found.append(kept)
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@check(SINGLE, dropping)
def same_mask(f: Any, sample: Sample) -> None:
    """The seed that gives a result with torch's function gives it with this one."""
    expected = at_seed(sample.bind(sample.function))(*sample.constants)
    near(at_seed(sample.bind(f))(*sample.constants), expected)


@check(SINGLE, large)
def special_values(f: Any, sample: Sample) -> None:
    """Infinities and nan become what torch makes of them when dropped: nan."""
    for value in (float("nan"), float("inf")):
        x = torch.full_like(sample.x, value)
        assert bool(sample.bind(f)(x).isfinite().logical_not().all()), value


@check(FLOATS, extremes)
def extreme_values(f: Any, sample: Sample) -> None:
    """Torch's, and torch's running statistics and gradients: nan and infinite where they are."""
    if sample.drops():
        y = sample.bind(f)(sample.x)
        scaled = sample.x * terms(sample)[0] + terms(sample)[1]
        dropped = torch.full_like(y, terms(sample)[2])
        rtol, atol = TOLERANCE[y.dtype]
        close = functools.partial(torch.isclose, y, rtol=rtol, atol=atol, equal_nan=True)
        assert bool((close(scaled) | close(dropped) | y.isnan()).all())
        return

    def run(function: Any) -> list[Any]:
        tensors = [fresh(t) for t in sample.tensors]
        y = sample.bind(function)(*tensors)
        leaves = [t for t in tensors if t.requires_grad]
        found = [y, *tensors[1:], *torch.autograd.grad(y, leaves, weights_like(y))]
        return [torch.stack([t.isnan(), t.isposinf(), t.isneginf()]) for t in found]

    near(run(f), run(sample.function))


@check(SINGLE, large)
def negative_zero(f: Any, sample: Sample) -> None:
    """A dropped negative element is -0."""
    y = sample.bind(f)(-sample.x)
    assert bool(y.signbit().all())


# ------------------------------------------------------------------ in place


@check(FLOATS, from_database)
def inplace(f: Any, sample: Sample) -> None:
    """Gives the same as out of place at the same seed, in the input, of a new version."""
    if not sample.dropout:
        return
    expected = at_seed(sample.bind(f))(*sample.constants)
    x = sample.x
    y = at_seed(sample.bind(f, inplace=True))(x)
    assert y is x
    same(x, expected)

    def version(function: Any) -> int:
        given = sample.x
        sample.bind(function, inplace=True)(given)
        return int(given._version > 0)

    near(version(f), version(sample.function))


@check(FLOATS, dropping)
def inplace_gradient(f: Any, sample: Sample) -> None:
    if not sample.dropout:
        return
    leaves = sample.leaves
    expected = with_gradients(at_seed(sample.bind(f, leaves=True)), leaves)
    bound = sample.bind(f, leaves=True, inplace=True)
    same(with_gradients(at_seed(lambda x: bound(x.clone())), leaves), expected)
    # of a view: everything beside it keeps its gradient
    halves = with_gradients(
        at_seed(lambda x: (z := torch.stack([x, x]).clone(), bound(z[0]))[0]), leaves
    )
    same(halves[0][0], expected[0])
    same(halves[0][1], leaves[0].detach())


# ------------------------------------------------------------------- layouts


@check(FLOATS, typical)
def noncontiguous(f: Any, sample: Sample) -> None:
    """Values and gradients do not depend on the strides."""
    bound = at_seed(sample.bind(f, leaves=True))
    strided = tuple(noncontiguous_like(t) for t in sample.leaves)
    near(with_gradients(bound, strided), with_gradients(bound, sample.leaves), 2.0)


@check(SINGLE, layouts)
def strides(f: Any, sample: Sample) -> None:
    """Of the result and of the gradient are torch's."""

    def found(function: Any) -> list[Any]:
        leaves = sample.leaves
        y = sample.bind(function, leaves=True)(*leaves)
        (grad,) = torch.autograd.grad(y.sum(), leaves[:1])
        return [y.stride(), grad.stride()]

    near(found(f), found(sample.function))


@check((torch.float32, torch.bfloat16), layouts)
def layout_values(f: Any, sample: Sample) -> None:
    y, *grads = with_gradients(at_seed(sample.bind(f, leaves=True)), sample.leaves)
    if sample.drops():
        assert_dropped(sample, sample.x, y)
        return
    wide = tuple(t.detach().double().requires_grad_() for t in sample.leaves)
    # of the statistics' rounded values, which are no leaves
    double = Sample(
        sample.function,
        sample.input.double(),
        tuple(a.double() for a in sample.args),
        sample.kwargs,
    )
    truth = with_gradients(double.bind(sample.function, leaves=True), wide)
    near([y, *grads], [t.to(y.dtype) for t in truth], 4.0)


@check(SINGLE, layouts)
def gradient_layouts(f: Any, sample: Sample) -> None:
    """Incoming gradients of any strides give the same."""
    y = at_seed(sample.bind(f, leaves=True))(*(leaves := sample.leaves))
    ones = torch.ones(1).expand(y.shape)
    grads = {
        "expanded": ones,
        "contiguous": ones.contiguous(),
        "strided": torch.ones(*y.shape, 2)[..., 0],
        "like_output": torch.ones_like(y),
        "transposed": torch.ones(y.shape[::-1]).permute(*range(y.dim())[::-1]),
    }
    found = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in grads.values()]
    for other in found[1:]:
        near(other, found[0])


# ------------------------------------------------------------------ autograd


def _check_gradients(f: Any, sample: Sample, check: Any, **kwargs: Any) -> None:
    assert check(at_seed(sample.bind(f, leaves=True)), sample.leaves, **kwargs)


@check(DOUBLE, typical)
def gradcheck(f: Any, sample: Sample) -> None:
    _check_gradients(f, sample, torch.autograd.gradcheck, fast_mode=True)


@check(DOUBLE, typical)
def gradcheck_batched(f: Any, sample: Sample) -> None:
    _check_gradients(f, sample, torch.autograd.gradcheck, fast_mode=True, check_batched_grad=True)


@check(DOUBLE, typical)
def gradcheck_forward(f: Any, sample: Sample) -> None:
    _check_gradients(
        f,
        sample,
        torch.autograd.gradcheck,
        fast_mode=True,
        check_forward_ad=True,
        check_backward_ad=False,
        check_undefined_grad=False,
    )


@check(DOUBLE, typical)
def gradgradcheck(f: Any, sample: Sample) -> None:
    _check_gradients(
        f, sample, torch.autograd.gradgradcheck, fast_mode=True, check_batched_grad=True
    )


@check(DOUBLE, typical)
def forward_over_reverse(f: Any, sample: Sample) -> None:
    _check_gradients(
        f,
        sample,
        torch.autograd.gradgradcheck,
        fast_mode=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=False,
        check_undefined_grad=False,
    )


@check(SINGLE, dropping)
def forward_mode_keeps_the_mask(f: Any, sample: Sample) -> None:
    """Forward-mode AD draws at a seed what the plain call draws."""
    bound = at_seed(sample.bind(f))
    expected = bound(*sample.constants)
    with forward_ad.dual_level():
        x, *others = sample.constants
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        near(forward_ad.unpack_dual(bound(dual, *others)).primal, expected)


@check(SINGLE, dropping)
def backward_twice(f: Any, sample: Sample) -> None:
    leaves = sample.leaves
    y = sample.bind(f, leaves=True)(*leaves)
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    near(torch.autograd.grad(y.sum(), leaves, create_graph=True), first)


@check(SINGLE, dropping)
def checkpoint(f: Any, sample: Sample) -> None:
    bound = sample.bind(f, leaves=True)

    def grads(function: Any) -> list[Any]:
        leaves = sample.leaves
        y = at_seed(function)(*leaves)
        y.backward(weights_like(y))
        return [y.detach(), *(t.grad for t in leaves)]

    expected = grads(bound)
    for reentrant in (True, False):
        again = functools.partial(torch.utils.checkpoint.checkpoint, bound, use_reentrant=reentrant)
        near(grads(again), expected)


@check(SINGLE, dropping)
def saved_tensor_hooks(f: Any, sample: Sample) -> None:
    bound = at_seed(sample.bind(f, leaves=True))
    expected = with_gradients(bound, sample.leaves)
    with torch.autograd.graph.save_on_cpu():
        same(with_gradients(bound, sample.leaves), expected)


@check(SINGLE, typical)
def partial_gradients(f: Any, sample: Sample) -> None:
    """Each tensor may be the only one that needs a gradient."""
    bound = at_seed(sample.bind(f))
    tensors = sample.tensors
    for i, wanted in enumerate(tensors):
        if not wanted.requires_grad:
            continue

        def alone(function: Any, i: int = i) -> Tensor:
            given = [fresh(t).detach() for t in tensors]
            given[i].requires_grad_()
            y = function(*given)
            return torch.autograd.grad(y, given[i], torch.ones_like(y))[0]

        if sample.drops():
            assert_dropped(sample, torch.ones_like(wanted), alone(bound)) if not terms(sample)[
                1
            ] else None
        else:
            near(alone(bound), alone(at_seed(sample.bind(sample.function))), 2.0)


# ---------------------------------------------------------------- torch.func


@check(SINGLE, typical)
def func_grad(f: Any, sample: Sample) -> None:
    """torch.func.grad gives autograd's gradient at the same seed."""
    bound = at_seed(sample.bind(f, leaves=True))
    _, *expected = with_gradients(lambda *t: bound(*t).sum(), sample.leaves)
    loss = torch.func.grad(lambda *t: bound(*t).sum(), tuple(range(len(sample.leaves))))
    weight = (
        torch.ones(()) * with_gradients(lambda x: x * 1, (torch.ones((), requires_grad=True),))[1]
    )
    near([g * weight for g in loss(*(t.detach() for t in sample.leaves))], expected, 2.0)


@check(SINGLE, typical)
def func_vjp(f: Any, sample: Sample) -> None:
    bound = at_seed(sample.bind(f, leaves=True))
    y, pull = torch.func.vjp(bound, *(t.detach() for t in sample.leaves))
    near([y, *pull(weights_like(y))], with_gradients(bound, sample.leaves), 2.0)


@check(FLOATS, typical)
def func_jvp(f: Any, sample: Sample) -> None:
    """The transpose of vjp, in the input's shape and dtype."""
    bound = at_seed(sample.bind(f, leaves=True))
    leaves = tuple(t.detach() for t in sample.leaves)
    y, tangent = torch.func.jvp(bound, leaves, tuple(torch.ones_like(t) for t in leaves))
    assert tangent.shape == y.shape and tangent.dtype == y.dtype, tangent.dtype
    _, pull = torch.func.vjp(bound, *leaves)
    pulled = sum(g.double().sum() for g in pull(torch.ones_like(y)))
    rtol, _ = TOLERANCE[y.dtype]
    size = float(tangent.double().abs().sum()) + 1
    assert abs(float(tangent.double().sum() - pulled)) <= 4 * rtol * size


@check(DOUBLE, dropping)
def func_hessian(f: Any, sample: Sample) -> None:
    """Reverse over reverse gives autograd's at the same seed."""
    _hessian(f, sample, torch.func.jacrev)


@check(DOUBLE, dropping)
def func_hessian_by_jacfwd(f: Any, sample: Sample) -> None:
    """Forward over reverse, which calls the function under vmap."""
    _hessian(f, sample, functools.partial(torch.func.jacfwd, randomness="same"))


def _hessian(f: Any, sample: Sample, jacobian: Any) -> None:
    bound = at_seed(sample.bind(f, leaves=True))
    x, *others = (t.detach() for t in sample.leaves)
    if x.numel() > 130:
        return

    def loss(x: Tensor) -> Tensor:
        return bound(x, *others).pow(3).sum()

    near(jacobian(torch.func.grad(loss))(x), torch.autograd.functional.hessian(loss, x), 10.0)


def _batched(sample: Sample, n: int = 3) -> Tensor:
    return torch.stack([sample.x] * n)


@check(SINGLE, dropping)
def vmap_same(f: Any, sample: Sample) -> None:
    if not sample.dropout:
        return
    y = torch.vmap(sample.bind(f), randomness="same")(_batched(sample))
    for part in y:
        assert_dropped(sample, sample.x, part)
        same(part, y[0])


@check(SINGLE, large)
def vmap_different(f: Any, sample: Sample) -> None:
    for in_dims, x in ((0, _batched(sample)), (1, torch.stack([sample.x] * 3, 1))):
        y = torch.vmap(sample.bind(f), in_dims=in_dims, randomness="different")(x)
        kept = [assert_dropped(sample, sample.x, part) for part in y]
        assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])


@check(SINGLE, typical)
def vmap_error(f: Any, sample: Sample) -> None:
    """Raises where torch does: random numbers under a transform that was not told how."""
    if sample.dropout:

        def call(function: Any) -> Tensor:
            result: Tensor = torch.vmap(sample.bind(function))(_batched(sample))
            return result

        raises_as(lambda: call(f), lambda: call(sample.function))


@check(SINGLE, large)
def vmap_unbatched(f: Any, sample: Sample) -> None:
    """An input that all share gets a mask for each, or one for all."""
    x = sample.x
    for randomness in ("different", "same"):
        y = torch.vmap(lambda w: sample.bind(f)(x) * w, randomness=randomness)(torch.ones(3))
        kept = [assert_dropped(sample, x, part) for part in y]
        assert torch.equal(kept[0], kept[1]) is (randomness == "same")


@check(SINGLE, large)
def vmap_inplace(f: Any, sample: Sample) -> None:
    y = torch.vmap(lambda x: sample.bind(f, inplace=True)(x.clone()), randomness="different")(
        _batched(sample)
    )
    for part in y:
        assert_dropped(sample, sample.x, part)


@check(SINGLE, typical)
def vmap_loop(f: Any, sample: Sample) -> None:
    """vmap of what draws nothing, over all tensors, equals a loop."""
    if sample.drops():
        return
    bound = sample.bind(f)
    scales = (1.0, 0.5, 2.0)
    given = [torch.stack([t * s for s in scales]) for t in sample.constants]
    expected = torch.stack([bound(*(fresh(t[i]) for t in given)) for i in range(3)])
    near(torch.vmap(bound)(*given), expected, 2.0)


@check(SINGLE, dropping)
def vmap_of_grad(f: Any, sample: Sample) -> None:
    """Gradients by sample."""
    bound = sample.bind(f, leaves=True)
    leaves = tuple(torch.stack([t.detach()] * 2) for t in sample.leaves)
    per_sample = torch.vmap(torch.func.grad(lambda *t: bound(*t).sum()), randomness="same")
    found = per_sample(*leaves)
    same(found[0], found[1])
    assert found.shape == leaves[0].shape


@check(SINGLE, typical)
def functionalize(f: Any, sample: Sample) -> None:
    bound = at_seed(sample.bind(f))
    near(torch.func.functionalize(bound)(*sample.constants), bound(*sample.constants))


# ------------------------------------------------------------------- tracing


def _graph_equals(f: Any, sample: Sample, trace: Callable[[Any, Any], Any]) -> None:
    """What is traced gives at a seed what was traced, values and gradients."""
    bound = sample.bind(f)
    traced = trace(bound, sample.constants)
    near(at_seed(traced)(*sample.constants), at_seed(bound)(*sample.constants))


@check(SINGLE, typical)
def make_fx_real(f: Any, sample: Sample) -> None:
    _graph_equals(f, sample, lambda g, given: make_fx(g, tracing_mode="real")(*given))


@check(SINGLE, typical)
def make_fx_fake(f: Any, sample: Sample) -> None:
    _graph_equals(f, sample, lambda g, given: make_fx(g, tracing_mode="fake")(*given))


@check(SINGLE, typical)
def make_fx_symbolic(f: Any, sample: Sample) -> None:
    _graph_equals(f, sample, lambda g, given: make_fx(g, tracing_mode="symbolic")(*given))


@check(SINGLE, first)
def make_fx_other_size(f: Any, sample: Sample) -> None:
    """What is traced with symbolic shapes runs with a larger batch."""
    if sample.input.dim() < 2:
        return
    bound = sample.bind(f)
    traced = make_fx(bound, tracing_mode="symbolic")(*sample.constants)

    def larger() -> tuple[Tensor, ...]:
        x, *others = sample.constants
        return torch.cat([x, x * 2]), *others

    near(at_seed(traced)(*larger()), at_seed(bound)(*larger()))


@check(SINGLE, dropping)
def make_fx_inplace(f: Any, sample: Sample) -> None:
    if not sample.dropout:
        return
    inplace = sample.bind(f, inplace=True)

    def bound(x: Tensor) -> Tensor:
        y = x * 1
        inplace(y)
        return y + 1

    for trace in (
        lambda x: make_fx(bound, tracing_mode="fake")(x),
        lambda x: torch.func.functionalize(bound),
    ):
        near(at_seed(trace(sample.x))(sample.x), at_seed(bound)(sample.x))


@check(SINGLE, dropping)
def aot(f: Any, sample: Sample) -> None:
    """Ahead-of-time autograd traces forward and backward that give the same at a seed."""
    bound = sample.bind(f, leaves=True)
    statistics = [a for a in sample.args if isinstance(a, Tensor) and not a.requires_grad]
    if statistics:  # constants of the graph may not be written
        sample = Sample(
            sample.function,
            sample.input,
            (None, None, *sample.args[2:]),
            {**(sample.kwargs or {}), "training": True},
        )
        bound = sample.bind(f, leaves=True)
    compiled = aot_function(bound, nop)
    near(
        with_gradients(at_seed(compiled), sample.leaves),
        with_gradients(at_seed(bound), sample.leaves),
        2.0,
    )


@check(SINGLE, first)
def compiled(f: Any, sample: Sample) -> None:
    """torch.compile(backend="aot_eager") gives the same at a seed, values and gradients."""
    bound = sample.bind(f)
    torch._dynamo.reset()

    def run(function: Any) -> list[Any]:
        given = [fresh(t) for t in sample.tensors]
        y = at_seed(function)(*given)
        return [y.detach(), *torch.autograd.grad(y.sum(), [t for t in given if t.requires_grad])]

    near(run(torch.compile(bound, backend="aot_eager", fullgraph=True)), run(bound), 2.0)


@check(SINGLE, typical)
def jit_trace(f: Any, sample: Sample) -> None:
    """A trace does what was traced."""
    _trace_or_export(
        f, sample, lambda g, given: torch.jit.trace(g, given, check_trace=False), False
    )


@check(SINGLE, dropping)
def jit_trace_keeps_the_mask(f: Any, sample: Sample) -> None:
    _trace_or_export(f, sample, lambda g, given: torch.jit.trace(g, given, check_trace=False), True)


class _Calls(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def _export(g: Any, given: Any) -> Any:
    return torch.export.export(_Calls(g), given, strict=False).module()


@check(SINGLE, dropping)
def export(f: Any, sample: Sample) -> None:
    _trace_or_export(f, sample, _export, False)


@check(SINGLE, dropping)
def export_keeps_the_mask(f: Any, sample: Sample) -> None:
    _trace_or_export(f, sample, _export, True)


def _symbolic_trace(f: Any, sample: Sample) -> Any:
    class Calls(torch.nn.Module):
        def forward(self, input: Any) -> Any:
            return f(input, *sample.args, **(sample.kwargs or {}))

    traced = torch.fx.symbolic_trace(Calls())
    return lambda input, *others: traced(input)


@check(SINGLE, typical)
def fx_symbolic_trace(f: Any, sample: Sample) -> None:
    _trace_or_export(f, sample, lambda g, given: _symbolic_trace(f, sample), False)


@check(SINGLE, dropping)
def fx_symbolic_trace_keeps_the_mask(f: Any, sample: Sample) -> None:
    _trace_or_export(f, sample, lambda g, given: _symbolic_trace(f, sample), True)


def _trace_or_export(f: Any, sample: Sample, trace: Any, mask: bool) -> None:
    bound = sample.bind(f)
    traced = trace(bound, sample.constants)
    y = at_seed(traced)(*sample.constants)
    if mask or not sample.drops():
        near(y, at_seed(bound)(*sample.constants))
    else:
        assert_dropped(sample, sample.x, y)


@check(SINGLE, typical)
def jit_script(f: Any, sample: Sample) -> None:
    _trace_or_export(f, sample, lambda g, given: sample.bind(torch.jit.script(f)), False)


@check(SINGLE, first)
def jit_script_keeps_the_mask(f: Any, sample: Sample) -> None:
    _trace_or_export(f, sample, lambda g, given: sample.bind(torch.jit.script(f)), True)


# ------------------------------------------------------- other kinds of tensors


@check(FLOATS, typical)
def fake_tensors(f: Any, sample: Sample) -> None:
    """A fake tensor's result and gradients have what a real one's have."""

    def about(t: Tensor | None) -> Any:
        return None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)

    def found(leaves: tuple[Tensor, ...], bound: Any) -> list[Any]:
        y = bound(*leaves)
        grads = torch.autograd.grad(y.sum(), [t for t in leaves if t.requires_grad])
        return [about(y), *map(about, grads)]

    expected = found(tuple(fresh(t) for t in sample.tensors), sample.bind(f))
    again = [fresh(t) for t in sample.tensors]
    with FakeTensorMode() as mode:
        fakes = tuple(mode.from_tensor(t) for t in again)
        near(found(fakes, sample.bind(f)), expected)


check(SINGLE, layouts)(fake_tensors)


@check(SINGLE, typical)
def meta_tensors(f: Any, sample: Sample) -> None:
    given = [t.to("meta") for t in sample.constants]
    y = sample.bind(f)(*given)
    expected = sample.bind(sample.function)(*given)
    assert y.device.type == "meta" and y.shape == expected.shape and y.dtype == expected.dtype
    assert y.stride() == expected.stride()


@check(SINGLE, typical)
def negative_views(f: Any, sample: Sample) -> None:
    """A tensor with the negative bit is worth what it says."""
    bound = at_seed(sample.bind(f, leaves=True))
    leaves = sample.leaves
    _, *expected = plain = with_gradients(bound, leaves)
    lazy = tuple(torch._neg_view(-t.detach()).requires_grad_() for t in leaves)
    assert lazy[0].is_neg()
    near(with_gradients(bound, lazy), plain, 2.0)
    assert expected


@check(SINGLE, typical)
def conjugate_views(f: Any, sample: Sample) -> None:
    """The imaginary part of a conjugate."""
    bound = at_seed(sample.bind(f))
    expected = bound(*sample.constants)
    x, *others = sample.constants
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg()
    near(bound(lazy, *others), expected)


@check((torch.complex64,), of_any_dtype)
def complex_numbers(f: Any, sample: Sample) -> None:
    """At the same seed as torch, whose code they run."""
    if sample.dropout:
        x = sample.x.conj()
        near(at_seed(sample.bind(f))(x), at_seed(sample.bind(sample.function))(x))


class _Sub(Tensor):
    pass


@check(SINGLE, typical)
def subclass(f: Any, sample: Sample) -> None:
    """The result is of the input's class."""
    x, *others = sample.constants
    assert type(sample.bind(f)(x.as_subclass(_Sub), *others)) is _Sub


@check(SINGLE, typical)
def parameters(f: Any, sample: Sample) -> None:
    x, *others = sample.constants
    y = sample.bind(f)(torch.nn.Parameter(x), *others)
    expected = sample.bind(sample.function)(torch.nn.Parameter(x.clone()), *others)
    assert type(y) is type(expected)


@check(SINGLE, large)
def nested_jagged(f: Any, sample: Sample) -> None:
    _nested(f, sample, torch.jagged)


@check(SINGLE, large)
def nested_strided(f: Any, sample: Sample) -> None:
    _nested(f, sample, torch.strided)


def _nested(f: Any, sample: Sample, layout: torch.layout) -> None:
    parts = [torch.ones(2, 4), torch.ones(5, 4)]
    x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    y = sample.bind(f)(x)
    assert y.is_nested and y.layout is layout
    for part, got in zip(parts, y.unbind(), strict=True):
        assert_dropped(sample, part, got)
    y.sum().backward() if layout is torch.jagged else None


@check(SINGLE, typical)
def autocast(f: Any, sample: Sample) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = sample.bind(f)(*sample.constants)
        expected = sample.bind(sample.function)(*sample.constants)
    assert y.dtype == expected.dtype


@check(SINGLE, typical)
def copy_on_write(f: Any, sample: Sample) -> None:
    """What is only read stays unmaterialized, forward and backward."""
    lazy = [torch._lazy_clone(fresh(t).detach()) for t in sample.tensors]
    for t, source in zip(lazy, sample.tensors, strict=True):
        t.requires_grad_(source.requires_grad)
    y = sample.bind(f)(*lazy)
    if y.requires_grad:
        torch.autograd.grad(
            y, [t for t in lazy if t.requires_grad], torch.ones_like(y), allow_unused=True
        )
    for i, t in enumerate(lazy):
        written = not sample.dropout and i in (1, 2) and not sample.tensors[i].requires_grad
        assert written or not t.numel() or torch._C._is_cow_tensor(t), i


@check(DOUBLE, typical)
def composite(f: Any, sample: Sample) -> None:
    """Torch's helpers of tensors that only its dispatcher understands: forward, backward, forward AD."""
    bound = sample.bind(f, leaves=True)
    op = at_seed(bound)
    composite_compliance.check_with_mode(op, sample.leaves, {}, _near_anyhow)
    composite_compliance.check_all_permutations(op, sample.leaves, {}, _near_anyhow)


def _near_anyhow(actual: Any, expected: Any, **_: Any) -> None:
    near(actual, expected)


@check(DOUBLE, typical)
def composite_backward(f: Any, sample: Sample) -> None:
    op = at_seed(sample.bind(f, leaves=True))
    composite_compliance.check_backward_formula(op, sample.leaves, {}, assert_equal_fn=_near_anyhow)


@check(DOUBLE, dropping)
def composite_forward_ad(f: Any, sample: Sample) -> None:
    op = at_seed(sample.bind(f, leaves=True))
    composite_compliance.check_forward_ad_formula(
        op, sample.leaves, {}, assert_equal_fn=_near_anyhow
    )


@check(SINGLE, typical)
def dispatch_mode(f: Any, sample: Sample) -> None:
    """A mode that only passes on changes nothing."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    bound = at_seed(sample.bind(f))
    expected = bound(*sample.constants)
    with Passes():
        near(bound(*sample.constants), expected)


def cases() -> Iterator[Case]:
    for entry in entries():
        ours = getattr(braze_functional, entry.name)
        yield from expand(entry.subject, CHECKS, entry.function, ours, entry)
