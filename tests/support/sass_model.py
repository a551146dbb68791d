"""What a kernel's hot loop asks of a multiprocessor, counted in its sm_90 instructions. No GPU needed.

A kernel streams through memory 16 bytes at a time in one loop (step_kernel: in one per dtype). The
hot path is the shortest way around that loop that makes all of its 16-byte accesses: no operand
that may be absent, no unit that lies across an edge, no slow path of a division. Counted along it:
instructions, those of the ALU pipe, and bytes. Against the bandwidth that a copy reaches they say
which share of the issue slots and of the ALUs the kernel needs to be bound by memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Protocol

ARCH = "sm_90"
INSTRUCTION = re.compile(
    r"\s*/\*(?P<address>[0-9a-f]+)\*/\s+(?:@(?P<predicate>!?U?P[0-9T])\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_.]+)\s*(?P<operands>[^;]*?)\s*;"
)
LOAD128 = re.compile(r"LDG?(STS)?\..*\b128\b")  # LDGSTS: to shared memory
STORE128 = re.compile(r"STG?\..*\b128\b")

# An H200. Of its 132 multiprocessors each issues 4 warps' instructions a cycle, 2 of them to ALUs.
COPY_RATE = 4.3e12  # bytes per second that a copy reaches
CYCLES = 132 * 1.98e9
H100_COPY_RATE = 0.70  # of the H200's, with the same multiprocessors
BLOCK_THREADS = 256
ALU = set(
    "IADD3 VIADD IABS LEA LOP LOP3 SHF SHL SHR PRMT SEL FSEL ISETP FSETP PSETP PLOP3 FMNMX IMNMX"
    " VIMNMX VIADDMNMX MOV P2R R2P VOTE F2FP SGXT BMSK HSETP2 HMNMX2".split()
)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str

    def name(self) -> str:
        """Without modifiers."""
        return self.opcode.partition(".")[0]

    def target(self) -> int | None:
        found = re.search(r"(?:^|[ ,])0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found and self.name() in TARGETED else None

    def conditional(self) -> bool:
        """Whether the next one may follow a branch or an exit."""
        return bool(self.predicate) or "," in self.operands


TARGETED = ("BRA", "CALL", "BSSY", "WARPSYNC")
LEAVING = ("BRA", "BRX", "EXIT", "RET")


def functions(sass: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel of cuobjdump's -sass on ``ARCH``, by mangled name."""
    found: dict[str, list[Instruction]] = {}
    arch, body = ARCH, list[Instruction]()
    for line in sass.splitlines():
        if match := INSTRUCTION.match(line):
            address, predicate, opcode, operands = match.groups()
            body.append(Instruction(int(address, 16), predicate or "", opcode, operands))
        elif match := re.match(r"\s*arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            body = []
            if arch == ARCH:
                found[match[1]] = body
    return found


# -------------------------------------------------------------------- control flow


@dataclass
class Block:
    body: list[Instruction]
    next: list[int] = field(default_factory=list)

    def count(self, accesses: re.Pattern[str]) -> tuple[int, int]:
        """How many, and how many of them always: those of an absent operand are predicated off."""
        found = [i for i in self.body if accesses.match(i.opcode)]
        return len(found), sum(not i.predicate for i in found)


def blocks_of(body: list[Instruction]) -> list[Block]:
    """The basic blocks, in the order of their addresses. A called slow path is nobody's successor."""
    targets = {t for i in body if (t := i.target()) is not None}
    blocks: list[Block] = []
    for instruction in body:
        last = blocks[-1].body[-1] if blocks else None
        if last is None or last.name() in (*LEAVING, "CALL") or instruction.address in targets:
            blocks.append(Block([]))
        blocks[-1].body.append(instruction)
    at = {block.body[0].address: k for k, block in enumerate(blocks)}
    switch: Block | None = None  # the nearest indirect branch before
    for k, block in enumerate(blocks):
        last, more = block.body[-1], k + 1 < len(blocks)
        if last.name() == "BRX":
            switch = block
        if last.name() in LEAVING and not last.conditional():
            if switch and more and blocks[k + 1].body[0].address not in targets:
                switch.next.append(k + 1)  # nothing else leads there: a case of the switch
        elif last.name() != "CALL" and more:
            block.next.append(k + 1)
        target = last.target()
        if last.name() == "BRA" and ".DIV" not in last.opcode and target in at:
            block.next.append(at[target])
    return blocks


def ordered(blocks: list[Block]) -> list[int]:
    """The blocks that can be reached, in reverse postorder."""
    order, seen = list[int](), {0}
    stack = [(0, iter(blocks[0].next))]
    while stack:
        k, successors = stack[-1]
        for s in successors:
            if s not in seen:
                seen.add(s)
                stack.append((s, iter(blocks[s].next)))
                break
        else:
            order.append(k)
            stack.pop()
    return order[::-1]


def loops_of(blocks: list[Block], order: list[int]) -> dict[int, set[int]]:
    """The natural loops: header and all blocks, the header too."""
    rank = {k: r for r, k in enumerate(order)}
    before: dict[int, list[int]] = {k: [] for k in order}
    for k in order:
        for s in blocks[k].next:
            before[s].append(k)
    loops: dict[int, set[int]] = {}
    for k in order:
        for header in (s for s in blocks[k].next if rank[s] <= rank[k]):
            loop, todo = {header}, [k]
            while todo:
                if (p := todo.pop()) not in loop:
                    loop.add(p)
                    todo += before[p]
            if header == 0 or 0 not in loop:  # or it can be entered past its header
                loops.setdefault(header, set()).update(loop)
    return loops


def hot_loops(body: list[Instruction]) -> Iterator[tuple[list[Block], list[int], list[int]]]:
    """Blocks, a loop's own ones in order, and those that lead back, for each loop that accesses
    16 bytes at a time: innermost ones first, and of those the one with most accesses. A loop within
    it that does so too is not its own."""
    blocks = blocks_of(body)
    order = ordered(blocks)
    loops = loops_of(blocks, order)

    def accesses(own: Iterable[int]) -> int:
        return sum(blocks[k].count(c)[0] for k in own for c in (LOAD128, STORE128))

    found = []
    for header, loop in loops.items():
        inner = [other for h, other in loops.items() if h != header and other < loop]
        hot = [other for other in inner if accesses(other)]
        own = loop.difference(*hot)
        if accesses(own):
            found.append((bool(hot), -accesses(own), header, own))
    for _, _, header, own in sorted(found, key=lambda f: f[:3]):
        back = [k for k in own if header in blocks[k].next]
        yield blocks, [k for k in order if k in own], back


def ways(
    blocks: list[Block],
    own: list[int],
    back: list[int],
    counts: Callable[[int], Iterable[tuple[int, ...]]],
) -> dict[tuple[int, ...], list[Instruction]]:
    """The shortest way around the loop for each sum of counts, of which a block adds one."""
    rank = {k: r for r, k in enumerate(own)}
    zero = tuple(0 for _ in next(iter(counts(own[0]))))
    # By sum: instructions so far, and the block and sum before.
    best: list[dict[tuple[int, ...], tuple[int, int, tuple[int, ...]]]] = [{} for _ in own]
    best[0][zero] = 0, -1, zero
    leaving = [dict[tuple[int, ...], tuple[int, tuple[int, ...]]]() for _ in own]
    for r, k in enumerate(own):
        cost, added = sum(i.opcode != "NOP" for i in blocks[k].body), list(counts(k))
        for state, (before, _, _) in best[r].items():
            for more in added:
                new = tuple(map(sum, zip(state, more, strict=True)))
                if new not in leaving[r] or before + cost < leaving[r][new][0]:
                    leaving[r][new] = before + cost, state
        for s in blocks[k].next:
            to = rank.get(s, 0)
            if to > r:
                for state, (total, _) in leaving[r].items():
                    if state not in best[to] or total < best[to][state][0]:
                        best[to][state] = total, r, state
    found: dict[tuple[int, ...], tuple[int, int]] = {}
    for k in back:
        for state, (total, _) in leaving[rank[k]].items():
            found[state] = min(found.get(state, (total, rank[k])), (total, rank[k]))
    result = {}
    for end, (_, r) in found.items():
        path, state = list[Instruction](), end
        while r >= 0:
            path = blocks[own[r]].body + path
            _, r, state = best[r][leaving[r][state][1]]
        result[end] = [i for i in path if i.opcode != "NOP"]
    return result


def matches(block: Block, pattern: str) -> int:
    """How many instructions of ``block``, with their operands, ``pattern`` finds."""
    return sum(bool(re.search(pattern, f"{i.opcode} {i.operands}")) for i in block.body)


def hot_path(
    blocks: list[Block], own: list[int], back: list[int], family: Family
) -> tuple[int, list[Instruction]]:
    """How many 16-byte units of each operand one way around the loop handles, and its instructions.

    (0, []) where no way around has ``family``'s accesses.
    """

    def counts(k: int) -> Iterator[tuple[int, ...]]:
        block = blocks[k]
        (loads, always_loads), (stores, always_stores) = map(block.count, (LOAD128, STORE128))
        passed = int(bool(family.passes) and matches(block, family.passes) > 0)
        for more in product(range(always_loads, loads + 1), range(always_stores, stores + 1)):
            yield *more, passed

    sign = 1 if family.fewest else -1
    ends = [
        (sign * units, len(path), path)
        for (loads, stores, passed), path in ways(blocks, own, back, counts).items()
        if (units := loads // family.loads) > 0
        and (loads, stores) == (units * family.loads, units * family.stores)
        and (passed or not family.passes)
    ]
    if not ends:
        return 0, []
    units, _, path = min(ends, key=lambda end: end[:2])
    return sign * units, path


# -------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class Family:
    """Kernels that access the same operands."""

    kernel: str  # a pattern of the short name; its first group is the storage type, or empty
    mode: str
    loads: int  # 16-byte accesses per 16-byte unit
    stores: int
    passes: str = ""  # a pattern of the work that the hot path does and others may leave out
    fewest: bool = False  # no path has fewer accesses: more are of operands that may be absent
    wider: int = 0  # operands that are fp32 beside 16-bit ones, and then take twice the accesses


STORED = {"Bf16": "bf16", "F16": "fp16", "float": "fp32"}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# The multiplications that random numbers are made of.
RANDOM = r"^IMAD\.(WIDE|HI)\.U32 .*-0x(2daee0ad|326172a9)"


def _norm(step: str, inputs: str, loads: int, stores: int) -> Family:
    pattern = rf"batch_norm_{step}_kernel<(\w+), {inputs}(?P<mode>Plain\w*)>"
    return Family(pattern, "", loads, stores, fewest=True)


def _step(rule: str, loads: int, stores: int) -> tuple[Family, Family]:
    """Without and with a running average of the weights."""
    kernel = rf"step_kernel<{rule}()(?:<.*>)?, true, "
    return (
        Family(kernel + "false>", rule, loads, stores),
        Family(kernel + "true>", f"{rule}, average", loads + 1, stores + 1, wider=1),
    )


def _dropout(step: int, mode: str, loads: int, stores: int, passes: str = RANDOM) -> Family:
    pattern = rf"dropout_kernel<(\w+), \(DropoutStep\){step}, false>"
    return Family(pattern, mode, loads, stores, passes)


FAMILIES = (
    _norm("statistics", "", 1, 0),
    _norm("apply", "1, ", 1, 1),
    _norm("apply", "2, ", 2, 1),
    _norm("reduce", "1, ", 2, 0),
    _norm("reduce", "2, ", 3, 0),
    _norm("apply_grad", "1, ", 2, 1),
    _norm("apply_grad", "2, ", 3, 2),
    *_step("Adam", 4, 3),
    *_step("Sgd", 3, 2),  # with momentum
    *_step("Lion", 3, 2),
    *_step("Rmsprop", 3, 2),  # without momentum, as by default
    # Without the loop for double, which converts nothing.
    Family("measure_kernel<false()>", "squares", 1, 0, r"^F2F\.F64\.F32", fewest=True),
    _dropout(0, "scale", 1, 1),
    _dropout(1, "add", 2, 1),
    _dropout(2, "activate", 1, 1),
    _dropout(3, "activate_grad", 2, 1, ""),  # of relu, which needs no random numbers
)


@dataclass(frozen=True)
class Row:
    """Figures of one hot loop. Those of ``FIGURES`` are pinned; the others follow from them."""

    mode: str
    dtype: str
    elements: int  # of one thread's way around the loop
    bits: int  # that these elements read and write
    instructions: int
    alu: int
    registers: int
    blocks: int  # of a multiprocessor at once
    in_flight: int  # bytes that these blocks' loads have under way

    def _share(self, instructions: int, per_cycle: int) -> float:
        return instructions * (8 * COPY_RATE / self.bits) / (CYCLES * per_cycle * 32)

    @property
    def need_issue(self) -> float:
        """The share of issue slots that it takes to be as fast as a copy."""
        return self._share(self.instructions, 4)

    @property
    def need_alu(self) -> float:
        """The share of the ALUs' slots that it takes to be as fast as a copy."""
        return self._share(self.alu, 2)

    def figures(self) -> dict[str, int]:
        """The pinned ones."""
        return {figure: getattr(self, figure) for figure in FIGURES}

    def misses(self, limits: dict[str, float]) -> list[str]:
        """Each limit that the row does not keep to, with its figure."""
        shares = {"need_issue": self.need_issue, "need_alu": self.need_alu}
        return beyond(limits, shares, self.in_flight)


FIGURES = ("elements", "bits", "instructions", "alu", "registers", "blocks", "in_flight")


def resident_blocks(registers: int, shared: int) -> int:
    """How many blocks of ``BLOCK_THREADS`` a multiprocessor holds."""
    by_registers = 65536 // (-(-registers // 8) * 8 * BLOCK_THREADS)
    by_shared = 228 * 1024 // (shared + 1024)  # each block takes 1 KB for itself
    return min(by_registers, by_shared, 2048 // BLOCK_THREADS)


def dtype_of(path: list[Instruction]) -> str:
    """The storage type of a loop of a kernel that has one for each, by its conversions."""
    for dtype, pattern in (
        ("bf16", r"F2FP\.BF16"),
        ("fp16", r"F2FP\.F16|HADD2\.F32"),
        ("bf16", r"IMAD\.U32 .*, 0x10000,"),
    ):
        if any(re.match(pattern, f"{i.opcode} {i.operands}") for i in path):
            return dtype
    return "fp32"


def family_of(name: str) -> tuple[Family, re.Match[str]] | None:
    """The family of the kernel of this short name. None of a kernel that is not hot."""
    for family in FAMILIES:
        match = re.fullmatch(family.kernel, name)
        if match and (match[1] == "" or match[1] in STORED):
            return family, match
    return None


def rows_of(name: str, body: list[Instruction], registers: int, shared: int) -> dict[str, Row]:
    """The rows of one kernel: one, or of a kernel of all dtypes one for each. None if not hot."""
    known = family_of(name)
    if known is None:
        return {}
    family, match = known
    mode = match.groupdict().get("mode") or family.mode
    rows: dict[str, Row] = {}
    for blocks, own, back in hot_loops(body):
        for more in (0, family.wider):
            shape = replace(family, loads=family.loads + more, stores=family.stores + more)
            units, path = hot_path(blocks, own, back, shape)
            if units:
                break
        else:
            continue
        dtype = STORED.get(match[1]) or dtype_of(path)
        row = name if match[1] else f"{name} {dtype}"
        elements = units * 16 // BYTES[dtype]
        mask = elements if "Mask" in mode else 0
        resident = resident_blocks(registers, shared)
        rows.setdefault(
            row,
            Row(
                mode=mode,
                dtype=dtype,
                elements=elements,
                bits=units * 128 * (shape.loads + shape.stores) + mask,
                instructions=len(path),
                alu=sum(i.name() in ALU for i in path),
                registers=registers,
                blocks=resident,
                in_flight=units * shape.loads * 16 * BLOCK_THREADS * resident,
            ),
        )
    return rows


# -------------------------------------------------------------------- limits


class Limited(Protocol):
    """A row of this model or of another one."""

    def misses(self, limits: dict[str, float]) -> list[str]: ...


def beyond(limits: dict[str, float], shares: dict[str, float], in_flight: int) -> list[str]:
    """Each share that is too large, and too few bytes in flight."""
    found = []
    for figure, value in shares.items():
        if value > limits[figure]:
            found.append(f"{figure} {value:.2f} > {limits[figure]:.2f}")
    if in_flight < limits["in_flight"]:
        found.append(f"in_flight {in_flight} < {limits['in_flight']:.0f}")
    return found


def broken_limits(
    rows: Mapping[str, Limited], limits: dict[str, float], excused: dict[str, str]
) -> list[str]:
    """Rows that miss a limit and are not excused, and excuses that say nothing or are not needed."""
    problems = []
    for name, row in rows.items():
        if (missed := row.misses(limits)) and name not in excused:
            problems.append(f"{name}: {', '.join(missed)}")
    for name, reason in excused.items():
        if not reason.strip():
            problems.append(f"{name} is excused without a reason")
        if name not in rows or not rows[name].misses(limits):
            problems.append(f"{name} is excused, and needs no excuse")
    return problems


def document(
    rows: dict[str, Row], limits: dict[str, float], excused: dict[str, str], command: str
) -> str:
    """The page about ``rows``, which ``command`` writes."""
    lines = [
        "# What the CUDA kernels ask of a GPU",
        "",
        "A model, not a measurement: the instructions of each hot loop as compiled for "
        f"{ARCH}, counted along the shortest way around the loop that makes all of its 16-byte "
        "accesses. So without operands that may be absent, edges, and the slow paths of divisions; "
        "of a kernel of all activations, the cheapest. Latency and caches are not in it.",
        "",
        "- B/el: bytes that an element's operands take, each read or written once.",
        "- need issue, need ALU: the shares of an H200's issue slots and ALU slots that the loop "
        f"takes where it is as fast as a copy, which moves {COPY_RATE / 1e12} TB/s. On an H100: "
        f"{H100_COPY_RATE:.2f} of them.",
        "- KB in flight: 16 bytes for each 16-byte load of one way around the loop, of all threads "
        "that a multiprocessor holds.",
        "",
        f"Limits: need issue at most {limits['need_issue']:.2f}, need ALU at most "
        f"{limits['need_alu']:.2f}, in flight at least {limits['in_flight'] / 1024:.0f} KB.",
        "",
        f"Remade by `{command}`; counted by `tests/support/sass_model.py`.",
        "",
        "| kernel | mode | dtype | B/el | instr/el | ALU/el | need issue | need ALU | registers "
        "| blocks/SM | KB in flight |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in sorted(rows.items()):
        per_element = (f"{n / row.elements:.2f}" for n in (row.bits / 8, row.instructions, row.alu))
        cells = [
            f"`{name}`", row.mode, row.dtype, *per_element, f"{row.need_issue:.2f}",
            f"{row.need_alu:.2f}", row.registers, row.blocks, f"{row.in_flight / 1024:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, *excuses(rows, excused)]) + "\n"


def excuses(rows: Mapping[str, Limited], excused: dict[str, str]) -> list[str]:
    """Lines about those of ``rows``."""
    found = [f"- `{name}`: {why}" for name, why in sorted(excused.items()) if name in rows]
    return ["", "Beyond a limit:", "", *found] if found else []
