"""Faults put into the kernels one at a time: each must be found, by a wrong result or a detector.

All faults are compiled into one copy of csrc/cuda; an environment variable switches one on. Barriers
are deleted by the emulator, in the unchanged kernels.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator_build as build
import pytest
from test_emulated_kernels import FEW_BLOCKS, kernels_program, run

pytestmark = pytest.mark.cpu_only("is about the emulator")

KERNELS_FILE, ELEMENTS = "optimizer_kernels.cuh", "elements.cuh"
TABLE, LAUNCH, ZEROS = "device_table.cu", "optimizer_launch.cu", "zeros.cu"
MUTANTS = build.CACHE / "mutants"

# (file, what is there, what stands there instead). A text that occurs several times is changed
# everywhere. `@` around a part limits the change to it: "a @b@ c" puts the mutant in place of b.
EXPRESSIONS = [
    (KERNELS_FILE, "@v < count@; v += kBlockThreads", "v <= count"),
    (KERNELS_FILE, "@v < count@; v += kBlockThreads", "v < count - 1"),
    (KERNELS_FILE, "@k < size - vectorised@;", "k <= size - vectorised"),
    (KERNELS_FILE, "@k < size - vectorised@;", "k < size - vectorised - 1"),
    (KERNELS_FILE, "@k < size - vectorised@;", "k < head"),
    (KERNELS_FILE, "@k < size - vectorised@;", "k >= head && k < size - vectorised"),
    (KERNELS_FILE, "count = @(size - head) / width@", "(size - head + width - 1) / width"),
    (KERNELS_FILE, "(@k < head@ ? 0 : vectorised)", "k <= head"),
    (KERNELS_FILE, "if (@phase >= 0@)", "true"),
    (KERNELS_FILE, "@entries[middle].first_chunk <= chunk@", "entries[middle].first_chunk < chunk"),
    (KERNELS_FILE, "@entries[middle].first_chunk <= chunk@",
     "entries[middle].first_chunk <= chunk + 1"),
    (KERNELS_FILE, "while (@high - low > 1@)", "high - low > 2"),
    (KERNELS_FILE, "if (@skipped@) return;", "false"),
    (KERNELS_FILE, "skipped = @argument.found_inf != nullptr && *argument.found_inf != 0.0f@",
     "false"),
    (KERNELS_FILE, "skipped = @argument.found_inf != nullptr && *argument.found_inf != 0.0f@",
     "argument.found_inf != nullptr && *argument.found_inf > 0.0f"),
    (KERNELS_FILE, "(argument.blocks_done, @gridDim.x@)", "gridDim.x + 1"),
    (KERNELS_FILE, "(argument.blocks_done, @gridDim.x@)", "1u"),
    (KERNELS_FILE, "if (@!is_last_block(argument.blocks_done, gridDim.x)@) return;", "false"),
    (ZEROS, "mode_ = @cudaStreamCaptureModeRelaxed@;", "cudaStreamCaptureModeGlobal"),
    (ZEROS, "~BesideCaptures() { @(void)cudaThreadExchangeStreamCaptureMode(&mode_)@; }", "(void)0"),
    (KERNELS_FILE, "@i < argument.num_tensors@;", "i < argument.num_tensors - 1"),
    (KERNELS_FILE, "@i < argument.num_tensors@;", "i < kBlockThreads && i < argument.num_tensors"),
    (KERNELS_FILE, "if (@prepared_hyper != now[i].hyper || prepared_step != step@)",
     "prepared_step != step"),
    (KERNELS_FILE, "if (@prepared_hyper != now[i].hyper || prepared_step != step@)",
     "prepared_hyper != now[i].hyper || prepared_step < 0"),
    (KERNELS_FILE, "@min(begin + kChunkElements, entry.numel)@", "begin + kChunkElements"),
    (KERNELS_FILE, "(@chunk - entry.first_chunk@) * kChunkElements", "chunk"),
    (KERNELS_FILE, "(@hyper - argument.hypers_begin@)", "hyper"),
    (KERNELS_FILE, "(@hyper - argument.wide_hypers_begin@)", "hyper"),
    (KERNELS_FILE, "make_args(hyper, @1 / scale@, step)", "1.0"),
    (KERNELS_FILE, "@args.l2 != 0 || args.l1 != 0@", "args.l2 != 0 && args.l1 != 0"),
    (KERNELS_FILE, "t.flags |= @prepared[0].penalty@;", "0u"),
    (KERNELS_FILE, "@(flags & (kHasMomentum | kFirst)) == kHasMomentum@", "false"),
    (KERNELS_FILE, "flags = kPlain ? @t.flags & ~kAmsgrad@ : t.flags", "t.flags | kAmsgrad"),
    (KERNELS_FILE, "return k < 2 || (@flags & kAmsgrad@);", "false"),
    (KERNELS_FILE, "if (@has_grad@) grad =", "has_grad && !has_sum"),
    (ELEMENTS, "return @same@ ? phase : -1;", "true"),
    (ELEMENTS, "index * dims[(@c + 1@) * ndim + d]", "c"),
    (ELEMENTS, "@j % 2 == 0@ ? both", "j % 2 != 0"),
    (ELEMENTS, "if (@data[c] == nullptr@) continue;\n      const int mine", "c == kSum"),
    (TABLE, "state = @cudaEventQuery(staging.copied)@", "cudaSuccess"),
    (TABLE, "if (@in_use_ && stream != last_stream_@)", "false"),
    (TABLE, "if (@staging.capacity < bytes@) continue;", "false"),
    (TABLE, "@staging_.size() < kMaxStaging@", "true"),
    (TABLE, "while (begin < bytes && same(begin)) begin += @kCompareBlock@;", "2 * kCompareBlock"),
    (TABLE, "length = @std::min(last + kCompareBlock, bytes)@ - begin",
     "std::max(begin + 1, last)"),
    (TABLE, "@std::min(known, begin)@);", "bytes"),
    (LAUNCH, "resident_from = @all_fit || capturing@ ? 5", "true"),
    (LAUNCH, "for (const HyperRange& r : ranges) hypers += @r.end == 0 ? 0 : r.end - r.begin@;",
     "0"),
    (KERNELS_FILE, "(@entry.dims - argument.dims_begin@)", "entry.dims"),
    (LAUNCH, "if (@bytes + hypers > kArgumentBytes && end > first@) break;", "false"),
    (LAUNCH, "if (@generation_ == work.generation && algorithm_ == kAlgorithm<Op>@)",
     "generation_ == work.generation"),
    (LAUNCH, "if (@generation_ == work.generation && algorithm_ == kAlgorithm<Op>@)",
     "algorithm_ == kAlgorithm<Op>"),
    (LAUNCH, "@!(flags & kAmsgrad)@;", "true"),
    (LAUNCH, "plain = plain && @c != kSum@ &&", "true"),
    (LAUNCH, "if (chunks <= 0 && @!(kOnDevice && has_steps_)@)", "true"),
    (LAUNCH, "if (@capturing@) return cudaErrorStreamCaptureUnsupported;", "false"),
    (LAUNCH, "std::clamp<int64_t>(@chunks@, 1, blocks)", "1"),
]  # fmt: skip
# Statements left out.
STATEMENTS = [
    (TABLE, "  uploaded_.clear();\n"),
    (TABLE, "  (void)mark_read(stream);"),
    (TABLE, "  if (error != cudaSuccess) (void)cudaStreamSynchronize(stream);"),
    (ZEROS, "  error = cudaMemsetAsync(memory, 0, words * sizeof(unsigned int), stream);\n"),
    (ZEROS, "  slab.free += words;\n"),
    (LAUNCH, "    if (const cudaError_t error = table_.upload(stream); error != cudaSuccess) "
             "return error;"),
]  # fmt: skip
# Not here, for no result can show them: a head one vector longer (slower; test_kernel_memory.py
# counts its accesses); a head beyond the tensor's end (leaves no vectors either); phases without the
# chunk's begin (a multiple of every width); `capturing` in the choice of what is resident (captured
# launches are cut so that all fits); a plain tensor without a gradient (it has an accumulator, and
# is not plain for that).

HEADER = """#pragma once
#include <cstdlib>
inline const int braze_mutant = [] {
  const char* text = getenv("BRAZE_MUTANT");
  return text == nullptr ? 0 : atoi(text);
}();
"""


Expressions = Sequence[tuple[str, str, str]]
Statements = Sequence[tuple[str, str]]


def mutants(
    expressions: Expressions = EXPRESSIONS, statements: Statements = STATEMENTS
) -> list[str]:
    """What each fault is; the first has number 1."""
    names = [f"{file}: {old.replace('@', '')} -> {new}" for file, old, new in expressions]
    return names + [f"{file}: without {old.strip()}" for file, old in statements]


def mutated_sources(
    expressions: Expressions = EXPRESSIONS,
    statements: Statements = STATEMENTS,
    into: Path = MUTANTS,
) -> Path:
    """A copy of csrc with all faults in it, off by default."""
    names = {file for file, *_ in (*expressions, *statements)}
    texts = {name: (build.ROOT / "csrc/cuda" / name).read_text() for name in sorted(names)}
    number = 0
    places: dict[tuple[str, str], tuple[str, list[tuple[int, str]]]] = {}
    for file, pattern, new in expressions:
        number += 1
        before, old, after = pattern.split("@")
        assert texts[file].count(before + old + after) > 0, f"{file} no longer has {pattern}"
        places.setdefault((file, pattern), (old, []))[1].append((number, new))
    # Longer patterns first: one may lie within another.
    for (file, pattern), (old, versions) in sorted(places.items(), key=lambda p: -len(p[0][1])):
        before, _, after = pattern.split("@")
        mutated = old
        for version, new in versions:
            mutated = f"(braze_mutant == {version} ? ({new}) : ({mutated}))"
        assert before + old + after in texts[file], f"{file}: {pattern} overlaps another mutant"
        texts[file] = texts[file].replace(before + old + after, before + mutated + after)
    for file, statement in statements:
        number += 1
        assert statement in texts[file], f"{file} no longer has {statement}"
        guard = f"if (braze_mutant != {number}) {{\n{statement}\n}}"
        texts[file] = texts[file].replace(statement, guard)
    for folder in ("cuda", "math", "plan"):
        (into / "csrc" / folder).mkdir(parents=True, exist_ok=True)
        for source in (build.ROOT / "csrc" / folder).iterdir():
            target = into / "csrc" / folder / source.name
            if source.name in texts:
                text = f'#include "mutant.h"\n{texts[source.name]}'
                if source.suffix == ".cuh":
                    text = text.replace("#pragma once\n", "", 1)
                    text = f"#pragma once\n{text}"
                if not target.exists() or target.read_text() != text:
                    target.write_text(text)
            elif source.is_file():
                shutil.copyfile(source, target)
    (into / "csrc/cuda/mutant.h").write_text(HEADER)
    return into / "csrc" / "cuda"


@pytest.fixture(scope="module")
def mutated() -> Path:
    return kernels_program("native", mutated_sources(), name="mutants")


# In the order of what finds most.
KILLERS = (
    ("in order", ("--small", "--stop"), {}),
    ("in order, all lengths", ("--stop",), {}),
    ("pct", ("--small", "--stop"), {"BRAZE_EMULATOR_ORDER": "pct"}),
    ("random", ("--small", "--stop"), {"BRAZE_EMULATOR_ORDER": "random"}),
)


def killer(program: Path, number: int) -> str | None:
    for how, args, env in KILLERS:
        status, output = run(program, *args, BRAZE_MUTANT=str(number), **env)
        if status != 0:
            found = re.search(r"FAILED (\w+)", output)
            what = found[1] if found else f"died with status {status}"
            return f"{how}: {what}"
    return None


def survivors_of(names: Sequence[str], find: Callable[[int], str | None]) -> list[str]:
    """Those of the numbered faults that nothing finds."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as workers:
        killers = list(workers.map(find, range(1, len(names) + 1)))
    for number, (name, how) in enumerate(zip(names, killers, strict=True), 1):
        print(f"{number:3}  {how or 'SURVIVED':45}  {name}")
    pairs = enumerate(zip(names, killers, strict=True), 1)
    return [f"{number}: {name}" for number, (name, how) in pairs if how is None]


def test_mutants(mutated: Path) -> None:
    status, output = run(mutated, "--small", BRAZE_MUTANT="0")
    assert status == 0, f"without a fault the copy must pass\n{output}"
    survivors = survivors_of(mutants(), lambda n: killer(mutated, n))
    assert not survivors, "no test notices:\n" + "\n".join(survivors)


def barriers_unnoticed(
    native: Path, tsan: Path, for_tsan: Sequence[str], for_orders: Sequence[str]
) -> list[str]:
    """The barriers without which TSan reports no race and no result is wrong."""
    status, output = run(native, "--small", "--barriers")
    assert status == 0, output
    sites = [line.split()[1] for line in output.splitlines() if line.startswith("barrier")]
    assert sites, "the kernels have barriers, but none was reached"
    survivors = []
    for site in sites:
        killed_by = []
        for mode in ("A", "B"):
            env = {"BRAZE_EMULATOR_TSAN_MODE": mode, "BRAZE_EMULATOR_DROP_BARRIER": site}
            env["TSAN_OPTIONS"] = "halt_on_error=1:exitcode=66:history_size=4:atexit_sleep_ms=0"
            status, output = run(tsan, "--small", *for_tsan, **env)
            if status != 0 and "data race" in output:
                killed_by.append(f"TSan {mode}")
        for order in ("reverse", "random", "pct"):
            env = {"BRAZE_EMULATOR_ORDER": order, "BRAZE_EMULATOR_DROP_BARRIER": site}
            status, _ = run(native, "--small", "--stop", *for_orders, **env)
            if status != 0:
                killed_by.append(order)
        print(f"{site}: {', '.join(killed_by) or 'SURVIVED'}")
        if not killed_by:
            survivors.append(site)
    return survivors


def test_barriers() -> None:
    survivors = barriers_unnoticed(
        kernels_program("native"),
        kernels_program("tsan"),
        FEW_BLOCKS,
        (*FEW_BLOCKS, "device_counts"),
    )
    assert not survivors, f"nothing notices that these barriers are gone: {survivors}"
