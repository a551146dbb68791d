"""The figures of the site, as SVG made from the numbers that they show. The colours follow the page's."""

from __future__ import annotations

from html import escape
from typing import NamedTuple


class Bar(NamedTuple):
    """One way to compute it: what each of its passes over memory moves, in bytes an element."""

    label: str
    passes: tuple[tuple[str, float], ...]

    @property
    def total(self) -> float:
        return sum(size for _, size in self.passes)


class Figure(NamedTuple):
    """Ways to compute the same, one below the other."""

    title: str
    bars: tuple[Bar, ...]


F = 4.0  # bytes of an fp32 element
BIT = 1 / 8

FIGURES = {
    "batch_norm_forward": Figure(
        "Batch norm + ReLU, forward in training, fp32",
        (
            Bar("braze", (("statistics: read x", F), ("apply: read x, write y", 2 * F))),
            Bar(
                "two modules",
                (
                    ("statistics: read x", F),
                    ("normalise: read x, write z", 2 * F),
                    ("ReLU: read z, write y", 2 * F),
                ),
            ),
        ),
    ),
    "batch_norm_backward": Figure(
        "Batch norm + ReLU, backward, fp32",
        (
            Bar("braze", (("sums: read dy, x", 2 * F), ("apply: read dy, x, write dx", 3 * F))),
            Bar(
                "two modules",
                (
                    ("ReLU: read dy, y, write dz", 3 * F),
                    ("sums: read dz, x", 2 * F),
                    ("apply: read dz, x, write dx", 3 * F),
                ),
            ),
        ),
    ),
    "join": Figure(
        "ReLU(batch norm + residual), forward in training, fp32",
        (
            Bar(
                "braze",
                (("statistics: read x", F), ("apply: read x, r, write y and bits", 3 * F + BIT)),
            ),
            Bar(
                "three modules",
                (
                    ("statistics: read x", F),
                    ("normalise: read x, write z", 2 * F),
                    ("sum: read z, r, write s", 3 * F),
                    ("ReLU: read s, write y", 2 * F),
                ),
            ),
        ),
    ),
    "dropout": Figure(
        "Dropout, forward and backward, fp32",
        (
            Bar(
                "braze",
                (("forward: read x, write y", 2 * F), ("backward: read dy, write dx", 2 * F)),
            ),
            Bar(
                "a stored mask of bytes",
                (
                    ("forward: read x, write y, mask", 2 * F + 1),
                    ("backward: read dy, mask, write dx", 2 * F + 1),
                ),
            ),
        ),
    ),
    "step": Figure(
        "AdamW, fp32, with clipping under a GradScaler and an average of the weights",
        (
            Bar("braze", (("measure: read g", F), ("update: 4 reads, 3 writes; average", 9 * F))),
            Bar(
                "separate passes",
                (
                    ("unscale: read, write g", 2 * F),
                    ("norm", F),
                    ("clip: read, write g", 2 * F),
                    ("update: 4 reads, 3 writes", 7 * F),
                    ("average", 3 * F),
                ),
            ),
        ),
    ),
    "folding": Figure(
        "What follows a convolution in eval(), ReLU(batch norm + residual), fp32",
        (
            Bar("folded", (("write y, read r", 2 * F),)),
            Bar(
                "four modules",
                (
                    ("write x", F),
                    ("batch norm: read, write", 2 * F),
                    ("sum: 2 reads, write", 3 * F),
                    ("ReLU: read, write", 2 * F),
                ),
            ),
        ),
    ),
}

_WIDTH, _BAR, _LINE = 520, 26, 17
_SHADES = ("#4f7ea8", "#6b9a5b", "#b98a3c", "#a0647f", "#6f6aa8")


def number(value: float) -> str:
    """``12`` or ``16.125``."""
    return f"{value:g}"


def _text(x: float, y: float, text: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{escape(text)}</text>'


def figure(name: str) -> str:
    """The figure as HTML. Raises KeyError for a name that there is none of."""
    title, bars = FIGURES[name]
    scale = (_WIDTH - 8) / max(bar.total for bar in bars)
    parts, y = [], 8.0
    for bar in bars:
        label = f"{bar.label}: {number(bar.total)} bytes an element"
        parts.append(_text(4, y + 13, label, 'font-weight="600"'))
        y += 20
        x = 4.0
        for i, (_, size) in enumerate(bar.passes):
            width = size * scale
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width - 2:.1f}" height="{_BAR}" rx="2" '
                f'fill="{_SHADES[i]}"/>'
            )
            middle = f'fill="#fff" text-anchor="middle" font-size="{14 if width > 40 else 11}"'
            parts.append(_text(x + width / 2 - 1, y + 18, number(size), middle))
            x += width
        y += _BAR + 4
        for i, (what, size) in enumerate(bar.passes):
            parts.append(
                f'<rect x="6" y="{y + 4}" width="10" height="10" rx="2" fill="{_SHADES[i]}"/>'
            )
            parts.append(_text(22, y + 13, f"{what}: {number(size)}", 'font-size="13"'))
            y += _LINE
        y += 12
    told = f"{title}. " + "; ".join(f"{bar.label} {number(bar.total)} bytes" for bar in bars)
    return (
        f'<figure class="bytes"><svg viewBox="0 0 {_WIDTH} {y:.0f}" role="img" '
        f'aria-label="{escape(told)}" fill="currentColor" font-size="15" '
        f'font-family="sans-serif">{"".join(parts)}</svg>'
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )
