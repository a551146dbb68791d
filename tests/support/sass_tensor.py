"""What the convolution kernels ask of a multiprocessor, counted as in sass_model.py. No GPU needed.

A block multiplies in steps, ways around the loop that has all of the kernel's HMMA: of those that
start all copies of the next step the shortest, without a prologue and with one (of relu). Around it
conv_kernel has a loop of tiles, and in that one, where a tile is stored in parts, one of parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import sass_model
from sass_model import BLOCK_THREADS, STORE128, Instruction, matches

WARPS = BLOCK_THREADS // 32
# Of 2048 multiply-adds: a quarter of a multiprocessor makes 512 a cycle, of which mma.sync reaches 62 %.
HMMA_CYCLES = 2048 / (0.62 * 512)
ROWS = 4  # pixels whose chunks a thread copies, each of which is compared with their number
PIXELS, RELU = r"^ISETP\.(GE|LT)\.U32", r"^F2FP\S*\.RELU"


@dataclass(frozen=True)
class Plan:
    """What the sources say of a kernel: a thread's work in a step, and in a part of a tile."""

    copies: int  # of 16 bytes
    shared: int  # bytes of dynamic shared memory: kBytes of the kernel's layout
    prologue: tuple[int, int, int] | None  # copies, FFMA, relus of pairs
    sums: int = 0  # FFMA
    stores: int = 0  # of 16 bytes; 0: there is no loop of tiles
    parts: int = 0


def plan_of(name: str) -> Plan | None:
    """Of a kernel by its short name; None: it multiplies nothing."""
    if found := re.fullmatch(r"conv_kernel<\w+, (\d+), (true|false)>", name):
        columns, forward = int(found[1]), found[2] == "true"
        both = 0 if forward or columns > 64 else ROWS  # copies of x, beside those of d
        copies, kept = ROWS + columns // 32, 6 if forward else 4
        prologue = (copies, 8 * ROWS, 4 * ROWS) if forward else (copies + both, 16 * both, 0)
        return Plan(
            copies,
            16 * BLOCK_THREADS * (2 * (copies + both) + kept),
            prologue if any(prologue[1:]) else None,
            sums=32 if forward else 64,
            stores=4,
            parts=columns // 64,
        )
    if found := re.fullmatch(r"conv_weight_grad_kernel<\w+, (\d+)>", name):
        rows = int(found[1]) // 32  # of d, and as many of x; two of the input
        copies = 2 * rows + 2
        return Plan(rows + 2, 16 * BLOCK_THREADS * 2 * copies, (copies, 16 * rows + 16, 8))
    return None


@dataclass(frozen=True)
class TensorRow:
    """Figures of one kernel, all of them pinned; instructions are a warp's."""

    hmma: int  # of a step
    step: int
    prologue: int  # a step with it; 0: there is none
    tap: int  # more in a step that goes on to the next tap of a 3x3 kernel
    tile: int  # beyond its steps
    registers: int
    shared: int
    blocks: int
    in_flight: int

    def issue(self, instructions: int) -> float:
        """Cycles that it takes to issue them, as a share of those of a step's HMMA."""
        return instructions / (self.hmma * HMMA_CYCLES)

    def figures(self) -> dict[str, int]:
        return dict(vars(self))

    def misses(self, limits: dict[str, float]) -> list[str]:
        shares = {"issue": self.issue(self.step), "issue_prologue": self.issue(self.prologue)}
        return sass_model.beyond(limits, shares, self.in_flight)


FIGURES = tuple(TensorRow.__annotations__)


def row_of(name: str, body: list[Instruction], registers: int, static: int) -> TensorRow | None:
    """The row of one kernel; None: it multiplies nothing. ValueError: it is not made as planned."""
    plan = plan_of(name)
    if plan is None:
        return None
    blocks = sass_model.blocks_of(body)
    order = sass_model.ordered(blocks)
    loops = sass_model.loops_of(blocks, order)
    hmma = sum(matches(block, "^HMMA") for block in blocks)

    def has(loop: set[int], pattern: str) -> int:
        return sum(matches(blocks[k], pattern) for k in loop)

    full = sorted((loop for loop in loops.values() if has(loop, "^HMMA") == hmma), key=len)
    if not hmma or len(full) < (2 if plan.stores else 1):
        raise ValueError(f"{name}: {len(full)} loops have all of its {hmma} HMMA")
    step, tiles = full[0], full[-1]

    def lengths(loop: set[int], *wanted: int, mark: Callable[[int], int]) -> dict[int, int]:
        """Of the shortest way that does what is wanted, for each sum of marks: instructions."""

        def counts(k: int) -> Iterator[tuple[int, ...]]:
            hmma, ffma, relus, stores = (
                matches(blocks[k], p) for p in ("^HMMA", "^FFMA", RELU, STORE128.pattern)
            )
            copies = [i.predicate for i in blocks[k].body if i.opcode.startswith("LDGSTS")]
            prologue, sums = (ffma, 0) if k in step else (0, ffma)
            for n in range(copies.count(""), len(copies) + 1):
                yield hmma, n, prologue, relus, sums, stores, mark(k)

        (header,) = (h for h, other in loops.items() if other is loop)
        own = [k for k in order if k in loop]
        paths = sass_model.ways(blocks, own, [k for k in own if header in blocks[k].next], counts)
        found = {done[-1]: len(path) for done, path in paths.items() if done[:-1] == wanted}
        if not found:
            raise ValueError(f"{name}: no way around a loop has {wanted}")
        return found

    def shortest(loop: set[int], *wanted: int) -> int:
        return lengths(loop, *wanted, mark=lambda _: 0)[0]

    instructions = shortest(step, hmma, plan.copies, 0, 0, 0, 0)
    prologue = shortest(step, hmma, *plan.prologue, 0, 0) if plan.prologue else 0
    tap = tile = 0
    if plan.stores:
        work = hmma, plan.copies, 0, 0
        # Behind the step's barrier a tap ends, or does not.
        (barrier,) = (k for k in step if matches(blocks[k], "^BAR"))
        ends = [lengths(step, *work, 0, 0, mark=end.__eq__) for end in blocks[barrier].next]
        tap = max(found.get(1, 0) for found in ends) - instructions
        # The way on to another tile has a tile's pixels more to compare than the shortest of all.
        by_pixels = lengths(
            tiles, *work, plan.sums, plan.stores, mark=lambda k: matches(blocks[k], PIXELS)
        )
        if (fewest := min(by_pixels) + ROWS) not in by_pixels:
            raise ValueError(f"{name}: no way on to another tile compares its pixels")
        tile = by_pixels[fewest] - instructions
        if plan.parts > 1:
            inner = (loop for loop in loops.values() if loop < tiles and not loop & step)
            part = next(loop for loop in inner if has(loop, STORE128.pattern))
            tile += (plan.parts - 1) * shortest(part, 0, 0, 0, 0, plan.sums, plan.stores)
    # The 1 KB that each block takes for itself is in `static`, and resident_blocks() adds it.
    shared = plan.shared + max(0, static - 1024)
    resident = sass_model.resident_blocks(registers, shared)
    in_flight = 16 * BLOCK_THREADS * plan.copies * resident
    return TensorRow(
        hmma, instructions, prologue, tap, tile, registers, shared, resident, in_flight
    )
