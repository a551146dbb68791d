"""What bounds forward convolutions of ResNet-50 by sass_tensor.py's figures, and the page about both."""

from __future__ import annotations

from dataclasses import dataclass

from sass_model import COPY_RATE, CYCLES, excuses
from sass_tensor import HMMA_CYCLES, WARPS, TensorRow

BATCH, TILE, STEP = 64, 128, 64  # images; pixels of a tile; channels of a step
BYTES_PER_CYCLE = COPY_RATE / CYCLES  # of a multiprocessor's share of the memory


@dataclass(frozen=True)
class Layer:
    size: int  # pixels of a side
    c: int
    k: int
    kernel: int = 1
    normalised: bool = False  # the input has yet to go through its batch norm and relu

    def name(self) -> str:
        return f"{self.kernel}x{self.kernel} {self.c} → {self.k}, {self.size}x{self.size}"


LAYERS = (
    Layer(56, 64, 64),
    Layer(56, 64, 64, kernel=3, normalised=True),
    Layer(56, 64, 256, normalised=True),
    Layer(56, 256, 64),
    Layer(56, 256, 128),
    Layer(28, 128, 512, normalised=True),
    Layer(28, 512, 128),
    Layer(28, 512, 256),
    Layer(14, 256, 1024, normalised=True),
)


@dataclass(frozen=True)
class Need:
    """Cycles of a multiprocessor for one tile of pixels and all channels."""

    memory: float  # each byte once: blocks of other channels find the input in L2
    issue: float
    tensor: float

    def bound(self) -> float:
        """The largest one, as a share of memory's."""
        return max(self.memory, self.issue, self.tensor) / self.memory


def need_of(layer: Layer, rows: dict[str, TensorRow]) -> Need:
    width = 128 if layer.k > 64 else 64
    row, slabs = rows[f"conv_kernel<Bf16, {width}, true>"], -(-layer.k // width)
    taps = layer.kernel**2
    steps = taps * -(-layer.c // STEP)
    each = row.prologue if layer.normalised else row.step
    instructions = slabs * (steps * each + (taps - 1) * row.tap + row.tile)
    weight = layer.c * layer.k * taps * TILE / (BATCH * layer.size**2)  # once for all tiles
    return Need(
        memory=2 * (TILE * (layer.c + layer.k) + weight) / BYTES_PER_CYCLE,
        issue=instructions * WARPS / 4,
        tensor=slabs * steps * row.hmma * HMMA_CYCLES * WARPS / 4,
    )


def table(head: str, numbers: int, rows: list[list[object]]) -> list[str]:
    """In Markdown; the last ``numbers`` columns are numbers."""
    text = len(head.split("|")) - numbers
    cells = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [f"| {head} |", f"|{'---|' * text}{'---:|' * numbers}", *cells, ""]


def document(rows: dict[str, TensorRow], limits: dict[str, float], excused: dict[str, str]) -> str:
    """The page's section about the kernels that multiply."""
    kernels, layers = list[list[object]](), list[list[object]]()
    for name, row in sorted(rows.items()):
        prologue = (row.prologue, f"{row.issue(row.prologue):.2f}") if row.prologue else ("", "")
        beyond = (row.tap, row.tile) if row.tile else ("", "")
        kernels.append([
            f"`{name}`", row.hmma, row.step, f"{row.issue(row.step):.2f}", *prologue, *beyond,
            row.registers, f"{row.shared / 1024:.0f}", row.blocks, f"{row.in_flight / 1024:.0f}",
        ])  # fmt: skip
    for layer in LAYERS if rows else ():
        need = need_of(layer, rows)
        shares = [f"{n / need.memory:.2f}" for n in (need.issue, need.tensor)]
        made = "relu" if layer.normalised else "none"
        layers.append([layer.name(), made, f"{need.memory:.0f}", *shares, f"{need.bound():.2f}"])
    lines = [
        "",
        "## Convolutions",
        "",
        "Instructions of one warp along the shortest way around the loop of steps that makes all "
        "of its HMMA (a 16x8x16 product each) and starts all copies of the next step: without a "
        "prologue, and with relu's or a gradient's, in a weight's gradient both.",
        "",
        "- issue: cycles to issue a step's instructions, as a share of those that the tensor cores "
        f"need for its HMMA: {HMMA_CYCLES:.2f} each, for mma.sync reaches 62 % of Hopper's rate. "
        "Below 1 the tensor cores can be kept busy.",
        "- next tap: instructions more where a step goes on to the next tap of a 3x3 kernel.",
        "- tile: instructions beyond its steps, for a 1x1 kernel of stride 1: the next tile's "
        "pixels, clearing, rounding, storing, and the sums of a batch norm.",
        "- KB in flight: a step's copies, without those for a gradient's prologue, of all blocks "
        "that a multiprocessor holds.",
        "",
        f"Limits: issue at most {limits['issue']:.2f}, with a prologue {limits['issue_prologue']:.2f}; "
        f"in flight at least {limits['in_flight'] / 1024:.0f} KB.",
        "",
        *table(
            "kernel | HMMA | step | issue | with prologue | issue | next tap | tile | registers "
            "| KB shared | blocks/SM | KB in flight",
            11,
            kernels,
        )[:-1],
        *excuses(rows, excused),
        "",
        f"Forward convolutions of ResNet-50 by these figures: bf16, {BATCH} images, an H200. "
        "memory: cycles of a multiprocessor for its share of the bytes of a tile of "
        f"{TILE} pixels, input, output and weight once each; issue, tensor: cycles for instructions "
        "and for HMMA, as shares of these. The largest of the three bounds the layer: bound 1.00 is "
        "as fast as memory, 2.00 takes twice as long. Stalls are not in it, nor is L2, where blocks "
        "of other channels find the input again: where issue or tensor comes near the bound, a "
        "layer is slower than it. Without a prologue, batch norm and relu would read the input and "
        "write it once more.",
        "",
        *table("layer | prologue | memory | issue | tensor | bound", 4, layers)[:-1],
    ]
    return "\n".join(lines) + "\n"
