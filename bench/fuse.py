"""How many batch norms of whole models braze.fuse fuses, and whether the models compute what they did.

followed: batch norms whose result goes straight into an activation or a sum, counted in a training forward of
the model as it is. only: those whose result goes nowhere else, too. fused: those of them that
braze.fusion_report says are joined with it; the goal is 95 % of the followed. output, gradient: largest
relative difference of a training step in fp64; eval: of the results in eval() in fp32, where batch norms are
folded; bf16: their error under autocast to bf16, as a multiple of eager's.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any

import braze
import torch
from torch import Tensor, nn

from . import models, rows, view
from .fuse_count import norms_followed
from .rows import Row, Work

GOAL = 95.0  # percent of the batch norms before an activation or a sum
# Relative. In fp64 only the order of sums differs; in fp32 the folded weights are rounded as well; bf16 is a
# multiple of eager's own error.
LIMITS = {"output": 1e-6, "gradient": 1e-6, "eval": 1e-3, "bf16": 2.0}
# Below this, eager's error in bf16 is taken for this: it was lucky.
_ROUNDING = 0.01
_SEED = 0


def _norms(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))


def stir(model: nn.Module) -> None:
    """Gives batch norms parameters and statistics as after training: fresh ones hide what folding does."""
    with torch.no_grad():
        for norm in _norms(model):
            for tensor, low, high in (
                (norm.weight, 0.5, 1.5),
                (norm.bias, -0.5, 0.5),
                (norm.running_mean, -0.5, 0.5),
                (norm.running_var, 0.5, 1.5),
            ):
                if tensor is not None:
                    tensor.uniform_(low, high)


def _relative(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """||ours - theirs|| / max(||theirs||, floor)."""
    if ours.shape != theirs.shape:
        return float("inf")
    size = max(float(torch.linalg.vector_norm(theirs.double())), floor, 1e-300)
    return float(torch.linalg.vector_norm(ours.double() - theirs.double())) / size


def _trained(model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results and running statistics of a training forward, and all gradients, from the same seed."""
    torch.manual_seed(_SEED)
    heads = models.heads(model(x))
    # Random weights: a plain sum has no gradient through a last batch norm. By place, not by layout.
    torch.manual_seed(_SEED + 1)
    losses = [(torch.randn(head.shape, dtype=head.dtype) * head).sum() for head in heads]
    torch.stack(losses).sum().backward()
    buffers = [b.detach() for b in model.buffers() if b.is_floating_point()]
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return [head.detach() for head in heads] + buffers, gradients


def differences(before: nn.Module, x: Tensor, channels_last: bool) -> Iterator[tuple[str, float]]:
    """Largest relative difference of what a model and its fused copy compute, by tensor.

    ``output``: results and running statistics of a training forward in fp64. ``gradient``: of the parameters,
    in fp64; one that is next to nothing beside the largest is compared with a millionth of that. ``eval``:
    results in eval() under inference_mode in fp32, where braze folds batch norms into convolutions. ``bf16``:
    the error of these under autocast to bf16, against eager in fp32, as a multiple of eager's own. Dropout of
    single elements or channels is off: torch's masks depend on the memory layout.
    """
    before = copy.deepcopy(before)
    for module in before.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0

    def fused(model: nn.Module) -> nn.Module:
        # Stochastic depth stays torch's, so that a seed drops the same.
        return braze.fuse(copy.deepcopy(model), channels_last=channels_last, dropout=False)

    wide = copy.deepcopy(before).double()
    our_results, our_gradients = _trained(fused(wide), x.double())
    results, gradients = _trained(wide, x.double())
    floor = 1e-6 * max(float(torch.linalg.vector_norm(g)) for g in gradients.values())
    yield "output", max(_relative(a, b) for a, b in zip(our_results, results, strict=True))
    yield "gradient", max(_relative(our_gradients[k], g, floor) for k, g in gradients.items())
    both = fused(before).eval(), copy.deepcopy(before).eval()
    with torch.inference_mode():
        ours, theirs = (models.heads(model(x)) for model in both)
        yield "eval", max(_relative(a, b) for a, b in zip(ours, theirs, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            narrow = [models.heads(model(x)) for model in both]
    ours_error, error = (max(map(_relative, heads, theirs)) for heads in narrow)
    yield "bf16", ours_error / max(error, _ROUNDING)


def measure(name: str, batch: int, size: int, channels_last: bool, row: Row) -> None:
    """One model's row."""
    torch.manual_seed(_SEED)
    model = models.load(name)
    stir(model)
    x = models.example(name, batch, size)
    # On a copy: a forward in training mode changes running statistics.
    followed = norms_followed(copy.deepcopy(model), x)
    fused = copy.deepcopy(model)
    start = time.perf_counter()
    braze.fuse(fused, channels_last=channels_last)
    row["fuse_s"] = time.perf_counter() - start
    report = braze.fusion_report(fused)
    joined = set(report.joined)
    row.update(
        norms=sum(1 for _ in _norms(model)),
        followed=len(followed.every),
        fused=len(joined.intersection(followed.every)),
        only=len(followed.only),
        fused_only=len(joined.intersection(followed.only)),
        missing={n: report.left.get(n, "") for n in followed.every if n not in joined},
        used_elsewhere=sorted(set(followed.every).difference(followed.only)),
        more=sorted(joined.difference(followed.every)),
        **dict(differences(model, x, channels_last)),
    )
    changed = [key for key, limit in LIMITS.items() if not row[key] <= limit]
    if changed:
        row["ok"], row["note"] = False, f"CHANGED: {', '.join(changed)}"


def total(measured: Sequence[dict[str, Any]], name: str = "") -> dict[str, Any]:
    """Sums over the rows that were counted, largest differences."""
    counted = [row for row in measured if "followed" in row]
    sums = ("norms", "followed", "fused", "only", "fused_only", "fuse_s")
    result: dict[str, Any] = {key: sum(row[key] for row in counted) for key in sums}
    for key in LIMITS:
        result[key] = max((row[key] for row in counted if key in row), default=0.0)
    result["percent"] = percent(result["fused"], result["followed"])
    result["percent_only"] = percent(result["fused_only"], result["only"])
    result["goal"] = GOAL
    return {"name": " ".join(filter(None, (f"total of {len(measured)}", name))), **result}


def totals(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of torchvision's, of timm's, if there are both, and of all."""
    timm = [row for row in measured if row["name"].startswith("timm:")]
    others = [row for row in measured if row not in timm]
    parts = [total(others, "torchvision"), total(timm, "timm")] if timm and others else []
    return [*parts, total(measured)]


def percent(part: int, whole: int) -> float:
    """100 of nothing."""
    return 100.0 * part / whole if whole else 100.0


# Headings of the table, each with the format of its figures.
COLUMNS = {
    **dict.fromkeys(("norms", "followed", "fused"), "d"),
    "percent": ".1f",
    **dict.fromkeys(("only", "fused_only"), "d"),
    "percent_only": ".1f",
    "fuse_s": ".2f",
    **dict.fromkeys(("output", "gradient", "eval"), ".0e"),
    "bf16": ".2f",
}


def figures(row: Row) -> list[str]:
    """The row's figures, as COLUMNS says."""
    shares = {}
    if "followed" in row:
        shares["percent"] = percent(row["fused"], row["followed"])
        shares["percent_only"] = percent(row["fused_only"], row["only"])
    known = row | shares
    return [format(known[key], form) if key in known else "-" for key, form in COLUMNS.items()]


def show(everything: Sequence[Row]) -> None:
    from rich.table import Table

    table = Table("")
    for key in COLUMNS:
        table.add_column(key.replace("_", " "), justify="right")
    for row in everything:
        table.add_row(row["name"], *figures(row))
    view.console().print(table)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="*", metavar="MODEL", help="torchvision's name or timm:NAME (default: many)")
    add("--batch", type=rows.count, default=2, help="images (default 2)")
    add("--size", type=rows.count, default=64, help="pixels on a side (default 64)")
    add("--layout", choices=("NHWC", "NCHW"), default="NHWC", help="default: NHWC")
    add("--missing", action="store_true", help="name what is not fused, and the reported reason")
    add("--threads", type=rows.count, help="of the CPU (default: torch's)")
    rows.add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Returns :func:`rows.run`'s code: 1 if a model changed or failed."""
    view.require()
    names = arguments.names
    if not names:
        has_timm = models.is_installed("timm")
        names = models.TORCHVISION + (models.TIMM if has_timm else [])
        print("" if has_timm else "timm is not installed: torchvision's models only\n", end="")
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    result: dict[str, Any] = {"build": braze.build_info(), "rows": []}

    def work(name: str) -> Work:
        fixed = (name, arguments.batch, arguments.size, arguments.layout == "NHWC")
        return Work(name, lambda row: measure(*fixed, row))

    def lines(row: Row) -> str:
        result["totals"] = totals(result["rows"])
        text = [
            f"{row['name']}  {row.get('fused', '-')}/{row.get('followed', '-')} {row.get('note', '')}"
        ]
        for norm, reason in (row.get("missing", {}) if arguments.missing else {}).items():
            elsewhere = " (its result is used elsewhere too)" * (norm in row["used_elsewhere"])
            text.append(f"    {norm}: {reason or 'no reason reported'}{elsewhere}")
        return "\n".join(text)

    code = rows.run(map(work, rows.choose(names, arguments.filter)), arguments, result, lines)
    show([*result["rows"], *result.get("totals", [])])
    everything = total(result["rows"])
    if everything["followed"]:
        print(f"goal {GOAL:g} %: {'met' if everything['percent'] >= GOAL else 'MISSED'}")
    return code
