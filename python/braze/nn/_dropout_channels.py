"""Dropout of whole channels: index ``n * C + c`` of the mask that ``_dropout_functional`` describes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Generator, Tensor
from torch.nn.functional import dropout1d as torch_dropout1d
from torch.nn.functional import dropout2d as torch_dropout2d
from torch.nn.functional import dropout3d as torch_dropout3d
from torch.nn.functional import feature_alpha_dropout as torch_feature_alpha_dropout

from braze.nn._dropout_route import check_p, drop, overridden

__all__ = ["dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"]


def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``alpha_dropout`` of whole channels: ``input`` is (N, C, ...), and channel (n, c) has mask index n *
    C + c.

    As ``torch.nn.functional.feature_alpha_dropout``; everything else as in ``alpha_dropout``.

    Raises:
        RuntimeError: also if ``input`` has fewer than two dimensions.
    """
    return drop(
        torch_feature_alpha_dropout,
        input,
        p,
        training,
        inplace,
        generator,
        alpha=True,
        feature=True,
    )


def _drop_channels(
    torch_function: Callable[..., Tensor],
    ndim: int,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    generator: Generator | None,
) -> Tensor:
    """``ndim``: dimensions of a batch; with one less it is a single sample, except for 2d, where torch reads
    (C, H, W) as (N, C, L). What torch warns of or refuses is left to it."""
    dim = input.dim() if isinstance(input, Tensor) else ndim
    if dim == ndim:
        return drop(torch_function, input, p, training, inplace, generator, feature=True)
    check_p(p)
    if dim != ndim - 1 or ndim == 4 or training is not True or p == 0 or overridden(input):
        return torch_function(input, p, training, inplace)
    output = drop(torch_function, input.unsqueeze(0), p, True, inplace, generator, feature=True)
    return input if inplace else output.squeeze(0)


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``dropout`` of whole channels: (N, C, L), or (C, L) as a single sample. Channel (n, c) has mask index
    n * C + c, in any memory format; the mask is never spread out in memory.

    As ``torch.nn.functional.dropout1d``; arguments, dtypes, errors and differences are those of ``dropout``.

    Raises:
        RuntimeError: also if ``input`` has neither 2 nor 3 dimensions.
    """
    return _drop_channels(torch_dropout1d, 3, input, p, training, inplace, generator)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``dropout`` of whole channels: (N, C, H, W). Channel (n, c) has mask index n * C + c, in any memory
    format.

    As ``torch.nn.functional.dropout2d``; arguments, dtypes, errors and differences are those of
    ``dropout``. Other numbers of dimensions are handed to torch, which warns of them and reads (C, H, W) as
    (N, C, L).

    Raises:
        RuntimeError: also if ``input`` has fewer than 2 dimensions.
    """
    return _drop_channels(torch_dropout2d, 4, input, p, training, inplace, generator)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """``dropout`` of whole channels: (N, C, D, H, W), or (C, D, H, W) as a single sample. Channel (n, c)
    has mask index n * C + c, in any memory format.

    As ``torch.nn.functional.dropout3d``; arguments, dtypes, errors and differences are those of
    ``dropout``. Other numbers of dimensions are handed to torch, which warns of them.
    """
    return _drop_channels(torch_dropout3d, 5, input, p, training, inplace, generator)
