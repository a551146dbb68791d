"""Faults put into the batch-norm kernels one at a time: each must be found (see test_kernel_mutants.py)."""

from __future__ import annotations

import re

import emulator_build as build
import pytest
from test_batch_norm_kernels import FEW_BLOCKS, norm_program
from test_emulated_kernels import run
from test_kernel_mutants import barriers_unnoticed, mutants, mutated_sources, survivors_of

pytestmark = pytest.mark.cpu_only("is about the emulator")

UNITS, GRID, LAST_BLOCK = "batch_norm_units.cuh", "batch_norm_grid.cu", "last_block.cuh"
STATISTICS, APPLY = "batch_norm_statistics.cuh", "batch_norm_apply.cuh"
BACKWARD, BACKWARD_LAUNCH = "batch_norm_backward.cuh", "batch_norm_backward.cu"
LAUNCH = "batch_norm_launch.cu"

EXPRESSIONS = [
    (UNITS, "left_ = @thread < active && first < units@ ?", "first < units"),
    (UNITS, "left_ = @thread < active && first < units@ ?", "thread < active"),
    (UNITS, "@(units - 1 - first) / stride + 1@ : 0", "(units - 1 - first) / stride"),
    (UNITS, "@(units - 1 - first) / stride + 1@ : 0", "(units - first) / stride + 1"),
    (UNITS, "from = @kBackwards && left_ > 0@ ?", "false"),
    (UNITS, "start_ = @grid.channels_last@ ?", "false"),
    (UNITS, "row = @grid_.channels_last@ ? row_", "true"),
    (UNITS, "rest = @left_ > 0@ ?", "true"),
    (UNITS, "unit.lanes = @rest >= kLanes@ ? kAll", "rest > 0"),
    (UNITS, "kAll >> (@kLanes - rest@)", "kLanes - rest - 1"),
    (UNITS, "if (@begin < 0@) unit.lanes", "false"),
    (UNITS, "kAll << @-begin@;", "(1 - begin)"),
    (UNITS, "unit.vector = @grid_.aligned@ &&", "true"),
    (UNITS, "&& @unit.lanes == kAll@ &&", "true"),
    (UNITS, "(@grid_.phase + unit.offset@) &", "unit.offset"),
    (UNITS, "if (@word_ < 0@) {", "word_ <= 0"),
    (UNITS, "if (@word_ >= grid_.words@) {", "word_ > grid_.words"),
    (UNITS, "if (@unit.has(j)@) to_storage", "true"),
    (UNITS, "mine = @grid.channels_last@ ? channel + j", "false"),
    (LAST_BLOCK, "== @blocks - 1@;", "blocks"),
    (LAST_BLOCK, "== @blocks - 1@;", "0u"),
    (LAST_BLOCK, "if (@last[0]@) *ticket = 0;", "false"),
    (UNITS, "half = @(n + 1) / 2@;", "n / 2"),
    (UNITS, "if (@row < n - half@) {", "row < half"),
    (UNITS, "if (@row == 0@) {\n#pragma unroll\n      for (int i = 0; i < kTogether", "row < 2"),
    (UNITS, "each = @(grid.splits - 1) / static_cast<uint32_t>(parts) + 1@;",
     "grid.splits / static_cast<uint32_t>(parts)"),
    (UNITS, "end = @first + each < grid.splits@ ?", "true"),
    (UNITS, "@channel < grid.channels@) f(", "true"),
    (UNITS, "columns = @width < threads@ ? width", "true"),
    (STATISTICS, "values += @grid.channels_last@ ?", "true"),
    (STATISTICS, "values += @grid.channels_last@ ?", "false"),
    (STATISTICS, "make_shift(@grid.channels_last@ ?", "true"),
    (STATISTICS, "make_shift(@grid.channels_last@ ?", "false"),
    (STATISTICS, "add_moment(@units[i].has(j)@ ?", "true"),
    (STATISTICS, "if (@!grid.channels_last@) {  // one channel, one shift", "false"),
    (STATISTICS, "if (@lane < lanes@) to[lane]", "true"),
    (STATISTICS, "@b.running_mean == nullptr || m.count == 0@", "b.running_mean == nullptr"),
    (STATISTICS, "if (@b.cumulative@) momentum", "false"),
    (STATISTICS, "(*b.batches_tracked) + @1@)", "0"),
    (STATISTICS, "update(b.running_var, @unbiased_variance_of(m)@)", "variance_of(m)"),
    (STATISTICS, "is_last_block(ticket, finishers) && @threadIdx.x == 0@", "threadIdx.x < 2"),
    (STATISTICS, "if (@a.args.moments == nullptr@) {\n    count_batch", "true"),
    (STATISTICS, "a.tickets + grid.groups, @grid.groups@", "1u"),
    (STATISTICS, "a.ticket, @gridDim.x@)", "1u"),
    (STATISTICS, "process < @a.args.processes@;", "a.args.processes - 1"),
    (STATISTICS, "if (@c < channels@) {", "c < channels - 1"),
    (APPLY, "has_residual = @kInputs == 1 && a.args.residual != nullptr@;", "false"),
    (APPLY, "static_cast<uint8_t>(@bits & units[i].lanes@)", "bits"),
    (BACKWARD, "dy2.load(args.dy2, place, @args.dy2 != nullptr@)", "false"),
    (BACKWARD, "@kInputs == 1 && a.recompute && args.residual != nullptr@", "false"),
    (BACKWARD, "args.mask[place.mask] >> @place.bit@", "0u"),
    (BACKWARD, "if (@kCurved || a.recompute@) {", "kCurved"),
    (BACKWARD, "if (@!kCurved && a.args.mask != nullptr@) {", "false"),
    (BACKWARD, "if (@!grid.channels_last@) {  // one channel", "false"),
    (BACKWARD, "if (@lane < lanes@) to[lane]", "true"),
    (BACKWARD, "@k == 0@ && a.args.sums", "true"),
    (BACKWARD, "@a.args.batch_statistics@ ? make_coefficients", "true"),
    (BACKWARD, "out.set(j, @a.args.batch_statistics@", "true"),
    (BACKWARD, "finish_input<T>(a, k, c, item.number[0], item.number[@1 + k@])", "1"),
    (BACKWARD, "if (@kInputs == 1 && a.args.grad_residual != nullptr@)", "false"),
    (BACKWARD_LAUNCH, "recompute = @args.mask == nullptr@ &&", "false"),
    (BACKWARD_LAUNCH, "reads_x = @reduction || argument.recompute || args.batch_statistics@;",
     "reduction || args.batch_statistics"),
    (BACKWARD_LAUNCH, "reads_x = @reduction || argument.recompute || args.batch_statistics@;",
     "reduction || argument.recompute"),
    (BACKWARD_LAUNCH, "if (@curved && args.mask != nullptr@)", "false"),
    (GRID, "@divide_up(grid.length, 8)@;", "grid.length / 8"),
    (GRID, "grid.aligned && @(grid.phase == -1 || grid.phase == phase)@;", "true"),
    (GRID, "grid.aligned && @!demand.mask@;", "true"),
    (GRID, "lost = @grid.moves_to_phase && !in_phase@ ?", "false"),
    (GRID, "in_phase = @grid.phase == 0@ &&", "true"),
    (GRID, "&& @shape.spatial % vector == 0@;", "true"),
    (GRID, "groups = @divide_up(words, grid.words)@;", "words / grid.words"),
    (GRID, "@divide_up(active, 32)@ * 32", "(active / 32)"),
    (GRID, "@divide_up(units, active * kMaxRun)@);", "1"),
    (GRID, "stride_words = @splits * active % grid.words@;", "0"),
    (LAUNCH, "groups} + @1@;", "0"),
    (LAUNCH, "blocks = std::max(@channel_blocks(args.shape.c)@, 1u)", "0u"),
]  # fmt: skip
STATEMENTS = [
    (STATISTICS, "  update(b.running_mean, m.mean);"),
]  # fmt: skip
# Not here, for no result can show them: the order in which a pass walks; threads of channels beyond
# the last that are sent home at once (their units are empty); units that move to a plane's 16-byte
# boundaries (test_kernel_memory.py counts their accesses).

KILLERS = (
    ("in order", ("--small", "--stop"), {}),
    ("in order, all lengths", ("--stop",), {}),
    ("pct", ("--small", "--stop"), {"BRAZE_EMULATOR_ORDER": "pct"}),
    ("random", ("--small", "--stop"), {"BRAZE_EMULATOR_ORDER": "random"}),
)


def test_mutants() -> None:
    sources = mutated_sources(EXPRESSIONS, STATEMENTS, build.CACHE / "batch_norm_mutants")
    program = norm_program("native", sources, name="batch_norm_mutants")
    status, output = run(program, "--small", BRAZE_MUTANT="0")
    assert status == 0, f"without a fault the copy must pass\n{output}"

    def killer(number: int) -> str | None:
        for how, args, env in KILLERS:
            status, output = run(program, *args, BRAZE_MUTANT=str(number), **env)
            if status != 0:
                found = re.search(r"FAILED (\w+)", output)
                return f"{how}: {found[1] if found else f'died with status {status}'}"
        return None

    survivors = survivors_of(mutants(EXPRESSIONS, STATEMENTS), killer)
    assert not survivors, "no test notices:\n" + "\n".join(survivors)


def test_barriers() -> None:
    survivors = barriers_unnoticed(
        norm_program("native"), norm_program("tsan"), FEW_BLOCKS, FEW_BLOCKS
    )
    assert not survivors, f"nothing notices that these barriers are gone: {survivors}"
