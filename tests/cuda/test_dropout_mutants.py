"""Faults put into dropout's kernels one at a time: each must give a wrong result or a report.

All are compiled into one copy of the sources; an environment variable switches one on.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator_build as build
import pytest
from test_dropout_kernels import program, run
from test_kernel_mutants import HEADER

pytestmark = pytest.mark.cpu_only("is about the emulator")

KERNELS, LAUNCH = "cuda/dropout_kernels.cuh", "cuda/dropout_launch.cu"
PLAN = "plan/dropout.h"
COPY = build.CACHE / "dropout_mutants" / "csrc"

# (file, what is there, what stands in the place of the part between @ and @)
FAULTS = [
    (KERNELS, "is_kept(lanes.lane(@k@), threshold)", "k ^ 1"),
    (KERNELS, "random_lanes(random.seed, @random.offset@, block)", "0"),
    (KERNELS, "random_lanes(@random.seed@, random.offset, block)", "random.seed & 0xffffffff"),
    (KERNELS, "random_lanes(random.seed, random.offset, @block@)", "block & 0xfffffff"),
    (KERNELS, "if (@index / kLanesPerBlock != held@)", "held < 0"),
    (KERNELS, "(block_bits >> (@index % kLanesPerBlock@) & 1u)", "j % kLanesPerBlock"),
    (KERNELS, "if (@++within == length@)", "++within > length"),
    (KERNELS, "const int64_t length = @last ? a.mask.channels : a.mask.spatial@;", "a.mask.spatial"),
    (KERNELS, "narrow = @a.numel <= INT32_MAX@;", "true"),
    (KERNELS, "index = @last ? start + within : start@;", "start"),
    (KERNELS, "int64_t start = @last ? divide(row, a.mask.spatial, narrow) * a.mask.channels : row@;",
     "last ? row * a.mask.channels : row"),
    (KERNELS, "start = @last ? divide(row, a.mask.spatial, narrow) * a.mask.channels : row@;\n    }", "start"),
    (KERNELS, "static_cast<uint64_t>(base) / kLanesPerBlock + @threadIdx.x % 32@;", "threadIdx.x"),
    (KERNELS, "__shfl_sync(0xffffffffu, own, @place / kLanesPerBlock@)", "threadIdx.x % 32"),
    (KERNELS, "(theirs >> @place % kLanesPerBlock@ &", "0"),
    (KERNELS, "& @((1u << kWidth) - 1)@) << j", "0xffu"),
    (KERNELS, "if (@kWidth == 1 && i >= a.numel@) continue;\n      x[k]", "false"),
    (KERNELS, "if (@kWidth == 1 && i >= a.numel@) continue;\n      const uint32_t", "false"),
    (KERNELS, "kept = bits >> @(first + k) * kWidth@;", "k * kWidth"),
    (KERNELS, "((kept >> @j@ & 1u) != 0", "0"),
    (KERNELS, "if (@a.used != nullptr && chunk == 0 && threadIdx.x == 0@)", "false"),
    (KERNELS, "aligned = @addresses % 16 == 0@;", "true"),
    (KERNELS, "aligned = @addresses % 16 == 0@;", "addresses % 4 == 0"),
    (KERNELS, "reinterpret_cast<uint64_t>(a.x) | @reinterpret_cast<uint64_t>(a.out)@", "0"),
    (KERNELS, "int tile = warp; tile < @kTilesPerChunk@;", "kTilesPerChunk - 1"),
    (KERNELS, "base = @chunk * kDropoutChunk@ + tile", "static_cast<int>(chunk * kDropoutChunk)"),
    (KERNELS, "wide = aligned && @base + kTileElements <= a.numel@;", "base <= a.numel"),
    (KERNELS, "if (@a.needs_mask()@)", "a.step != DropoutStep::add"),
    (LAUNCH, "(args.numel + @kDropoutChunk - 1@) / kDropoutChunk", "0"),
    (LAUNCH, "std::max<int64_t>(@chunks@, 1)", "chunks - 1"),
    (LAUNCH, "if (chunks == 0 && @args.used == nullptr@) return", "true"),
    (LAUNCH, "(args.step, @args.mask.kind != DropoutMask::element@)", "false"),
    (PLAN, "state.seed = @seed_pointer == nullptr@ ?", "true"),
    (PLAN, "@offset + static_cast<uint64_t>(*offset_pointer)@;",
     "static_cast<uint64_t>(*offset_pointer)"),
]  # fmt: skip


def mutated_sources() -> Path:
    """A copy of csrc with all faults in it, off by default; returns its cuda folder."""
    files = {name: (build.ROOT / "csrc" / name).read_text() for name, _, _ in FAULTS}
    places: dict[tuple[str, int, int], list[tuple[int, str]]] = {}
    for number, (name, pattern, new) in enumerate(FAULTS, 1):
        before, old, after = pattern.split("@")
        begin = files[name].find(before + old + after)
        assert begin >= 0, f"{name} no longer has {pattern}"
        span = (begin + len(before), begin + len(before) + len(old))
        places.setdefault((name, *span), []).append((number, new))
    # From the end, inner before outer: earlier positions stay what they are.
    for (name, begin, end), versions in sorted(places.items(), key=lambda p: (-p[0][1], p[0][2])):
        text = files[name]
        mutated = text[begin:end]
        for number, new in versions:
            mutated = f"(braze_mutant == {number} ? ({new}) : ({mutated}))"
        files[name] = text[:begin] + mutated + text[end:]
    for folder in ("cuda", "math", "plan"):
        (COPY / folder).mkdir(parents=True, exist_ok=True)
        for source in (build.ROOT / "csrc" / folder).iterdir():
            name = f"{folder}/{source.name}"
            if name in files:
                text = files[name].replace("#pragma once\n", "", 1)
                once = "#pragma once\n" if source.suffix != ".cu" else ""
                include = '#include "../cuda/mutant.h"\n'
                (COPY / name).write_text(f"{once}{include}{text}")
            elif source.is_file():
                shutil.copyfile(source, COPY / name)
    (COPY / "cuda/mutant.h").write_text(HEADER)
    return COPY / "cuda"


def test_mutants() -> None:
    cuda = mutated_sources()
    native = program("native", cuda, "dropout_mutants", [COPY])
    asan = program("asan", cuda, "dropout_mutants", [COPY])
    for built in (native, asan):
        status, output = run(built, "--small", BRAZE_MUTANT="0")
        assert status == 0, f"without a fault the copy must pass\n{output}"

    def killer(number: int) -> str | None:
        for how, built, args in (
            ("native", native, ("--small", "--stop")),
            ("all lengths", native, ("--stop",)),
            ("asan", asan, ("--small", "--stop")),
        ):
            if run(built, *args, BRAZE_MUTANT=str(number))[0] != 0:
                return how
        return None

    with ThreadPoolExecutor(max_workers=2) as workers:
        killers = list(workers.map(killer, range(1, len(FAULTS) + 1)))
    for (_, pattern, new), how in zip(FAULTS, killers, strict=True):
        print(f"{how or 'SURVIVED':14}{pattern} -> {new}")
    survivors = [
        f"{p} -> {n}" for (_, p, n), how in zip(FAULTS, killers, strict=True) if how is None
    ]
    assert not survivors, "\n".join(survivors)
