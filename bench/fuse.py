"""How many batch norms of whole models braze.fuse fuses, and whether the models compute what they did."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import braze
import torch
from torch import Tensor, nn

from . import models
from .files import write_json
from .fuse_count import norms_followed

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


def measure(name: str, batch: int, size: int, channels_last: bool) -> dict[str, Any]:
    """One model's row. It never raises, but for a model that is not to be had."""
    row: dict[str, Any] = {"name": name, "ok": False}
    torch.manual_seed(_SEED)
    try:
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
        )
        for key, value in differences(model, x, channels_last):
            row[key] = value
    except models.ModelError:
        raise
    except Exception as error:
        return {**row, "note": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    changed = [key for key, limit in LIMITS.items() if not row[key] <= limit]
    if changed:
        row["note"] = f"CHANGED: {', '.join(changed)}"
    return {**row, "ok": not changed}


def total(rows: Sequence[dict[str, Any]], name: str = "") -> dict[str, Any]:
    """Sums over the rows that were counted, largest differences."""
    counted = [row for row in rows if "followed" in row]
    sums = ("norms", "followed", "fused", "only", "fused_only", "fuse_s")
    result: dict[str, Any] = {key: sum(row[key] for row in counted) for key in sums}
    for key in LIMITS:
        result[key] = max((row[key] for row in counted if key in row), default=0.0)
    result["percent"] = percent(result["fused"], result["followed"])
    result["percent_only"] = percent(result["fused_only"], result["only"])
    result["goal"] = GOAL
    return {"name": " ".join(filter(None, (f"total of {len(rows)}", name))), **result}


def totals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of torchvision's, of timm's, if there are both, and of all."""
    timm = [row for row in rows if row["name"].startswith("timm:")]
    others = [row for row in rows if row not in timm]
    parts = [total(others, "torchvision"), total(timm, "timm")] if timm and others else []
    return [*parts, total(rows)]


def percent(part: int, whole: int) -> float:
    """100 of nothing."""
    return 100.0 * part / whole if whole else 100.0


HEADER = (
    f"{'model':28}{'norms':>6}{'followed':>9}{'fused':>6}{'%':>6}{'only':>6}{'fused':>6}{'%':>6}"
    f"{'fuse s':>8}{'output':>9}{'gradient':>9}{'eval':>9}{'bf16':>9}"
)


def line(row: dict[str, Any]) -> str:
    text = f"{row['name']:28}"
    if "followed" in row:
        shares = [
            f"{percent(row[part], row[whole]):6.1f}" if row[whole] else f"{'-':>6}"
            for part, whole in (("fused", "followed"), ("fused_only", "only"))
        ]
        text += f"{row['norms']:6}{row['followed']:9}{row['fused']:6}{shares[0]}"
        text += f"{row['only']:6}{row['fused_only']:6}{shares[1]}{row['fuse_s']:8.2f}"
        for key in LIMITS:
            form = "9.2f" if key == "bf16" else "9.0e"
            text += f"{row[key]:{form}}" if key in row else f"{'?':>9}"
    return f"{text}  {row['note']}" if "note" in row else text


def main(argv: list[str]) -> int:
    """Returns 0; 1 if a model changed or failed; 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m braze bench fuse",
        description="followed: batch norms whose result goes straight into an activation or a sum, counted in "
        "a training forward of the model as it is. only: those whose result goes nowhere else, too. fused: "
        "those of them that braze.fusion_report says are joined with it; the goal is "
        f"{GOAL:g} %% of the followed. output, gradient: largest relative difference of a training step in "
        "fp64; eval: of the results in eval() in fp32, where batch norms are folded; bf16: their error under "
        "autocast to bf16, as a multiple of eager's.",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="MODEL", help="torchvision's name or timm:NAME (default: many)")
    add("--batch", type=int, default=2, help="images (default 2)")
    add("--size", type=int, default=64, help="pixels on a side (default 64)")
    add("--layout", choices=("NHWC", "NCHW"), default="NHWC", help="default: NHWC")
    add("--missing", action="store_true", help="name what is not fused, and the reported reason")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=Path, help="also write all figures to this file, row by row")
    arguments = parser.parse_args(argv)
    for name in ("batch", "size", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    names = arguments.names
    if not names:
        has_timm = models.is_installed("timm")
        names = [*models.TORCHVISION, *(models.TIMM if has_timm else ())]
        print("" if has_timm else "timm is not installed: torchvision's models only\n", end="")
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    print(HEADER)
    for name in names:
        try:
            row = measure(name, arguments.batch, arguments.size, arguments.layout == "NHWC")
        except models.ModelError as error:
            parser.error(str(error))
        rows.append(row)
        print(line(row), flush=True)
        if arguments.missing:
            for norm, reason in row.get("missing", {}).items():
                elsewhere = " (its result is used elsewhere too)" * (norm in row["used_elsewhere"])
                print(f"    {norm}: {reason or 'no reason reported'}{elsewhere}")
        if arguments.json is not None:
            result = {"build": braze.build_info(), "rows": rows, "totals": totals(rows)}
            write_json(result, arguments.json)
    print("\n".join(line(summed) for summed in totals(rows)))
    everything = totals(rows)[-1]
    if everything["followed"]:
        verdict = "met" if everything["percent"] >= GOAL else "MISSED"
        print(f"goal {GOAL:g} %: {verdict}")
    if arguments.json is not None:
        print(f"\nwritten: {arguments.json}", file=sys.stderr)
    return 0 if all(row["ok"] for row in rows) else 1
