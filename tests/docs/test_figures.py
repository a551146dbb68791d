"""The bytes that the figures show are those of the kernels, as docs/cuda_model.md counts their operands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only("is about texts")

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
try:
    import figures
finally:
    sys.path.remove(str(DOCS))


def operand_bytes(kernel: str) -> float:
    """Column B/el of the model; where several modes have the kernel's name, all agree."""
    page = (DOCS / "cuda_model.md").read_text()
    rows = re.findall(rf"^\| `{re.escape(kernel)}` \|.*?\|.*?\| ([\d.]+) \|", page, re.MULTILINE)
    assert len(rows) == 1, kernel
    return float(rows[0])


# Operands that a kernel may do without are not in the model: a residual, the average of the weights.
@pytest.mark.parametrize(
    ("figure", "kernels", "optional"),
    [
        (
            "batch_norm_forward",
            (
                "batch_norm_statistics_kernel<float, PlainIdentity>",
                "batch_norm_apply_kernel<float, 1, PlainRelu>",
            ),
            0,
        ),
        (
            "batch_norm_backward",
            (
                "batch_norm_reduce_kernel<float, 1, PlainRelu>",
                "batch_norm_apply_grad_kernel<float, 1, PlainRelu>",
            ),
            0,
        ),
        (
            "join",
            (
                "batch_norm_statistics_kernel<float, PlainIdentity>",
                "batch_norm_apply_kernel<float, 1, PlainMask>",
            ),
            4,
        ),
        ("step", ("measure_kernel<false> fp32", "step_kernel<Adam, true, true> fp32"), 0),
    ],
)
def test_bytes(figure: str, kernels: tuple[str, ...], optional: int) -> None:
    ours, *others = figures.FIGURES[figure].bars
    model = sum(map(operand_bytes, kernels)) + optional
    assert ours.total == pytest.approx(model, abs=0.01)
    assert all(other.total > ours.total for other in others)


def test_every_figure_is_shown_and_says_its_numbers() -> None:
    """One that no page shows, or whose text for readers without images is old, would go unseen."""
    pages = "\n".join(page.read_text() for page in DOCS.rglob("*.md"))
    shown = re.findall(r"<!-- figure:(\w+) -->", pages)
    assert sorted(shown) == sorted(figures.FIGURES)
    for name, figure in figures.FIGURES.items():
        svg = figures.figure(name)
        for bar in figure.bars:
            assert f"{bar.label} {figures.number(bar.total)} bytes" in svg
