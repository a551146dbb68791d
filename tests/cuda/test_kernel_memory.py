"""What each warp's memory requests cost, counted on the CPU and pinned in kernel_memory.json.

    PYTHONPATH=tests/support .venv/bin/python tests/cuda/test_kernel_memory.py
        compares with the pinned figures; --pin makes the present figures the pinned ones

Per line of source: warp requests, lanes, and 32-byte sectors (global memory) or bank turns (shared
memory). Any difference fails, improvements too: they are pinned, and so cannot be lost unnoticed.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import emulator_build as build
import pytest

pytestmark = pytest.mark.cpu_only("is about the emulator")

PINNED = Path(__file__).with_name("kernel_memory.json")
PIN = "PYTHONPATH=tests/support .venv/bin/python tests/cuda/test_kernel_memory.py --pin"
KERNELS = build.EMULATOR / "kernels"
VARIANT = "hooks"
# Other compilers merge and split accesses their own way.
build.VARIANTS[VARIANT] = build.Variant(
    ("g++-12",),
    ("-O2", "-Wno-unknown-pragmas", "-DBRAZE_EMULATOR_HOOKS=1"),
    test_flags=("-fsanitize=thread",),
)

# [requests, lanes, sectors or bank turns]
Counts = dict[str, dict[str, list[int]]]


def program() -> Path:
    sources = [*KERNELS.glob("memory*.cpp"), *(build.ROOT / "csrc/cuda").glob("*.cu")]
    sources.sort()
    return build.build_program("memory", sources, VARIANT, include=[KERNELS])


def source_lines(path: Path, addresses: list[str]) -> dict[str, str]:
    """For each address the source line it comes from, outside the emulator's own headers."""
    command = ["addr2line", "-e", str(path), "-a", "-i", *(f"0x{a}" for a in addresses)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines: dict[str, str] = {}
    address = ""
    for line in output.splitlines():
        if line.startswith("0x"):
            address = f"{int(line, 16):x}"
        elif address not in lines and "/emulator/include/" not in line:
            name, _, number = line.split(" (")[0].rpartition(":")
            source = Path(name)
            if not source.is_absolute():
                source = build.ROOT / source
            text = source.read_text().splitlines()[int(number) - 1].strip()
            # The text, not its number: an edit elsewhere in the file changes nothing.
            lines[address] = f"{source.name}: {text}"
    return lines


def count() -> Counts:
    return count_program(program())


def count_program(path: Path) -> Counts:
    done = build.run(path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("memory ")]
    lines = source_lines(path, sorted({row[1] for row in rows}))
    totals: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0, 0]))
    for name, address, space, access, size, *figures in rows:
        total = totals[name][f"{space} {access} {size} bytes: {lines[address]}"]
        for i, figure in enumerate(figures):
            total[i] += int(figure)
    return {name: dict(sorted(places.items())) for name, places in totals.items()}


def differences(old: Counts, new: Counts) -> list[str]:
    result = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, {}), new.get(name, {})
        for place in sorted(before.keys() | after.keys()):
            if before.get(place) != after.get(place):
                result.append(f"{name}, {place}: {before.get(place)} -> {after.get(place)}")
    return result


@functools.cache
def counted() -> Counts:
    if (reason := build.have(VARIANT)) is not None:
        pytest.skip(reason)
    return count()


def per_request(name: str, what: str) -> float:
    """Sectors, or bank turns, of the one place whose description begins so."""
    [(requests, _, cost)] = [c for p, c in counted()[name].items() if p.startswith(what)]
    return cost / requests


def test_controls() -> None:
    """Accesses whose cost follows from the hardware's rules."""
    assert per_request("control_strided", "global read") == 32  # a sector for each lane
    assert per_request("control_strided", "global write") == 4
    assert per_request("control_vector", "global read 16") == 16  # 512 bytes
    assert per_request("control_vector", "global write 16") == 16
    assert per_request("control_transpose", "shared read") == 32  # all lanes in one bank
    assert per_request("control_padded_transpose", "shared read") == 1
    assert per_request("control_padded_transpose", "shared write") == 1


OPERANDS = {"adam": 7, "sgd": 5, "fold": 3}  # read or written
SIZES = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2}


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("algorithm", OPERANDS)
def test_vectors_are_coalesced(algorithm: str, dtype: str) -> None:
    """Aligned tensors of one dtype: 16 bytes a lane, full warps, no byte moved in vain."""
    places = counted()[f"{algorithm}_{dtype}"]
    for place, (requests, lanes, sectors) in places.items():
        assert " 16 bytes: " in place, place
        assert lanes == 32 * requests and sectors == 16 * requests, place
    elements = 12288
    moved = sum(sectors for _, _, sectors in places.values()) * 32
    assert moved == elements * SIZES[dtype] * OPERANDS[algorithm]


def test_misaligned_tensors_keep_their_vectors() -> None:
    vectors = sum(c[1] for p, c in counted()["adam_f32_off_by_1"].items() if " 16 bytes: " in p)
    singles = sum(c[1] for p, c in counted()["adam_f32_off_by_1"].items() if " 4 bytes: " in p)
    # Each of two chunks has a head of three elements and a tail of one.
    assert singles == 2 * 4 * 7
    assert vectors == (12288 - 2 * 4) // 4 * 7


# Passes over the activation: what each kernel of a layer with relu reads and writes of it.
NORM_PASSES = {"statistics": 1, "apply": 2, "reduce": 2, "apply_grad": 3}
NORM_LAYOUTS = ("last_bf16", "last_f32", "last_f64", "planes_bf16", "planes_f32")


@pytest.mark.parametrize("layout", NORM_LAYOUTS)
@pytest.mark.parametrize("step", NORM_PASSES)
def test_activations_are_read_in_full_sectors(step: str, layout: str) -> None:
    """16 bytes a lane, full warps, and each activation once per pass."""
    places = counted()[f"norm_{step}_{layout}"]
    wide = [
        c for p, c in places.items() if p.startswith("global") and "units.cuh" in p and " 16 " in p
    ]
    elements = 2 * 64 * 32 * int(16 / SIZES[layout.split("_")[1]])
    assert (
        sum(c[1] for c in wide) * 16 == elements * SIZES[layout.split("_")[1]] * NORM_PASSES[step]
    )
    for requests, lanes, sectors in wide:
        assert lanes == 32 * requests and sectors == 16 * requests


def test_pinned() -> None:
    drift = differences(json.loads(PINNED.read_text()), counted())
    assert not drift, "\n".join([*drift, f"If that is meant: {PIN}"])


def test_drift_is_found() -> None:
    pinned = json.loads(PINNED.read_text())
    changed = json.loads(PINNED.read_text())
    place = next(iter(changed["adam_f32"]))
    changed["adam_f32"][place][2] += 1
    changed["sgd_f32"].pop(next(iter(changed["sgd_f32"])))
    assert len(differences(pinned, changed)) == 2
    assert len(differences(changed, pinned)) == 2


def main() -> int:
    if (reason := build.have(VARIANT)) is not None:
        print(reason)
        return 1
    new = count()
    if "--pin" in sys.argv[1:]:
        PINNED.write_text(json.dumps(new, indent=1) + "\n")
        print(f"pinned {len(new)} launches in {PINNED.name}")
        return 0
    drift = differences(json.loads(PINNED.read_text()), new)
    print("\n".join([*drift, f"If that is meant: {PIN}"]) if drift else "as pinned")
    return bool(drift)


if __name__ == "__main__":
    sys.exit(main())
