"""Results of benchmarks, made up, in the shape that ``python -m braze bench --json`` writes."""

from __future__ import annotations

from typing import Any

from braze.bench import session


def row(suite: str, name: str, ratio: float, isa: str = "avx512", **more: Any) -> dict[str, Any]:
    def contender(us: float) -> dict[str, Any]:
        return {"warm": {"min_us": us, "median_us": us, "rounds_us": [us, us]}}

    contenders = {"braze": contender(100.0), "torch NHWC": contender(100.0 * ratio)}
    found: dict[str, Any] = {
        "suite": suite,
        "name": name,
        "isa": isa,
        "threads": 2,
        "device": "cpu",
    }
    found |= {"ok": True, "figure": "warm", "contenders": contenders, "theirs": "torch NHWC"}
    found |= {"ratio": ratio, "ratio_min": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio}
    found |= {
        "bytes": 1e6,
        "gb_s": 10.0,
        "floor_us": 50.0,
        "of_floor": 0.5,
        "tags": {"elements": 1000},
    }
    return found | more


def result(*rows: dict[str, Any], date: str = "2026-01-01", **where: Any) -> dict[str, Any]:
    environment = {"machine": "Zen 9, 2 cores", "gpu": None, "torch": "2.13.0", "commit": "abc1234"}
    environment |= {"braze": "0.1.0", **where}
    roofs = {"avx512/2": {"copy_gb_s": 20.0, "matmul_gflops": {"fp32": 100.0}}}
    data = {"format": session.FORMAT, "command": [], "date": date, "roofs": roofs}
    return data | {"environment": environment, "rows": list(rows)}


MANY = [
    *(
        row("optim", f"AdamW / fp32 {name}", 2.5, tags={"elements": elements})
        for name, elements in (("1K", 10**3), ("10K", 10**4), ("1M", 10**6))
    ),
    row("optim", "AdamW / 1000 x 64", 34.0),
    row("optim", "AdamW / 1000 x 64", 30.0, "avx2"),
    row("optim", "A/A AdamW / 1000 x 64", 1.01),
    row("norm", "bf16 NHWC relu N=8 / forward", 2.0),
    row(
        "conv",
        "conv+bn+relu fp32 NHWC inference",
        1.2,
        flops=10**9,
        bytes=None,
        gb_s=None,
        of_floor=None,
    ),
]
