"""What each warp's memory requests cost, counted on the CPU and pinned in kernel_memory.json.

    PYTHONPATH=tests/support .venv/bin/python tests/cuda/test_kernel_memory.py
        compares with the pinned figures; --pin makes the present figures the pinned ones

Per buffer and kind of access: warp requests, lanes, and 32-byte sectors (global memory) or bank turns
(shared memory). Any difference fails, improvements too: they are pinned, and so cannot be lost unnoticed.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import defaultdict
from pathlib import Path

import emulator_build as build
import pytest

pytestmark = [
    pytest.mark.cpu_only("is about the emulator"),
    pytest.mark.slow("compiles all kernels once more"),
]

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

# Of each launch and access, such as "x read 16" (bytes a lane): [requests, lanes, sectors or bank turns].
Counts = dict[str, dict[str, list[int]]]


def count() -> Counts:
    sources = [*KERNELS.glob("memory*.cpp"), *(build.ROOT / "csrc/cuda").glob("*.cu")]
    program = build.build_program("memory", sorted(sources), VARIANT, include=[KERNELS])
    done = build.run(program)
    assert done.returncode == 0, done.stdout + done.stderr
    totals: Counts = defaultdict(dict)
    for line in done.stdout.splitlines():
        if line.startswith("memory "):
            _, name, *access, requests, lanes, cost = line.split()
            totals[name][" ".join(access)] = [int(requests), int(lanes), int(cost)]
    return dict(totals)


def as_text(counts: Counts) -> str:
    """One line a launch."""
    rows = (f"{json.dumps(name)}: {json.dumps(accesses)}" for name, accesses in counts.items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


def differences(old: Counts, new: Counts) -> list[str]:
    result = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, {}), new.get(name, {})
        for access in sorted(before.keys() | after.keys()):
            if before.get(access) != after.get(access):
                result.append(f"{name}, {access}: {before.get(access)} -> {after.get(access)}")
    return result


@functools.cache
def counted() -> Counts:
    if (reason := build.have(VARIANT)) is not None:
        pytest.skip(reason)
    return count()


def per_request(name: str, access: str) -> float:
    """Sectors, or bank turns."""
    requests, _, cost = counted()[name][access]
    return cost / requests


def test_controls() -> None:
    """Accesses whose cost follows from the hardware's rules."""
    assert per_request("control_strided", "in read 4") == 32  # a sector for each lane
    assert per_request("control_strided", "out write 4") == 4
    assert per_request("control_vector", "in read 16") == 16  # 512 bytes
    assert per_request("control_vector", "out write 16") == 16
    assert per_request("control_transpose", "shared read 4") == 32  # all lanes in one bank
    assert per_request("control_padded_transpose", "shared read 4") == 1
    assert per_request("control_padded_transpose", "shared write 4") == 1
    # ldmatrix of rows in the same banks, and of rows in different ones: a turn for each matrix.
    assert counted()["control_matrices"]["shared read 16"] == [1, 32, 32]
    padded = counted()["control_padded_matrices"]
    assert padded["shared read 16"] == [1, 32, 4]
    # cp.async, of which a quarter of the lanes take zeros, counts once.
    assert padded["shared write 16"] == [1, 32, 4] and padded["in read 16"] == [1, 24, 16]


# Operands that each element has read or written.
OPERANDS = {"adam": 7, "sgd": 5, "fold": 3}
OPERANDS |= {"dropout_scale": 2, "dropout_add": 3, "dropout_activate": 2}
OPERANDS |= {"dropout_activate_grad": 3, "dropout_rows": 2, "dropout_channels_last": 2}
SIZES = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2}
ELEMENTS = 12288


def moved_whole(accesses: dict[str, list[int]]) -> int:
    """Bytes that these accesses move, all with 16 bytes a lane, full warps and no byte in vain."""
    for access, (requests, lanes, sectors) in accesses.items():
        assert access.endswith(" 16"), access
        assert lanes == 32 * requests and sectors == 16 * requests, access
    return sum(lanes * 16 for _, lanes, _ in accesses.values())


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("step", OPERANDS)
def test_vectors_are_coalesced(step: str, dtype: str) -> None:
    """Aligned tensors of one dtype."""
    moved = moved_whole(counted()[f"{step}_{dtype}"])
    assert moved == ELEMENTS * SIZES[dtype] * OPERANDS[step]


@pytest.mark.parametrize("dtype", SIZES)
def test_gradients_are_measured_in_full_sectors(dtype: str) -> None:
    all_of_it = counted()[f"measure_{dtype}"].items()
    accesses = {access: c for access, c in all_of_it if access.startswith("grad ")}
    assert moved_whole(accesses) == ELEMENTS * SIZES[dtype]


@pytest.mark.parametrize("dtype", SIZES)
def test_averages_are_read_and_written_by_vectors(dtype: str) -> None:
    """Beside 16-bit parameters two of them, one after the other: each request is of half sectors."""
    size = max(4, SIZES[dtype])
    averages = {a: c for a, c in counted()[f"averaged_{dtype}"].items() if a.startswith("average ")}
    assert averages.keys() == {"average read 16", "average write 16"}
    for requests, lanes, sectors in averages.values():
        assert lanes * 16 == ELEMENTS * size and lanes == 32 * requests
        assert sectors == requests * (32 if SIZES[dtype] == 2 else 16)


def test_misaligned_tensors_keep_their_vectors() -> None:
    accesses = counted()["adam_f32_off_by_1"]
    # Each of two chunks has a head of three elements and a tail of one.
    assert sum(c[1] for access, c in accesses.items() if access.endswith(" 4")) == 2 * 4 * 7
    wide = sum(c[1] for access, c in accesses.items() if access.endswith(" 16"))
    assert wide == (ELEMENTS - 2 * 4) // 4 * 7


@pytest.mark.parametrize("dtype", ("f32", "bf16"))
@pytest.mark.parametrize("step", [step for step in OPERANDS if step.startswith("dropout")])
def test_misaligned_tensors_are_coalesced_too(step: str, dtype: str) -> None:
    """Element by element, but a warp's requests are one stretch, one sector more than aligned."""
    accesses = counted()[f"{step}_{dtype}_off_by_1"]
    for access, (requests, lanes, sectors) in accesses.items():
        assert access.endswith(f" {SIZES[dtype]}") and lanes == 32 * requests, access
        assert sectors <= (SIZES[dtype] + 1) * requests, access
    assert sum(lanes for _, lanes, _ in accesses.values()) == ELEMENTS * OPERANDS[step]


# What each kernel of a layer with relu reads and writes of the activation's size, once a pass.
NORM_PASSES = {"statistics": ("x",), "apply": ("x", "y"), "reduce": ("x", "dy")}
NORM_PASSES["apply_grad"] = ("x", "dy", "dx")
NORM_LAYOUTS = ("last_bf16", "last_f32", "last_f64", "planes_bf16", "planes_f32")


@pytest.mark.parametrize("layout", NORM_LAYOUTS)
@pytest.mark.parametrize("step", NORM_PASSES)
def test_activations_are_read_in_full_sectors(step: str, layout: str) -> None:
    buffers = NORM_PASSES[step]
    all_of_it = counted()[f"norm_{step}_{layout}"].items()
    accesses = {access: c for access, c in all_of_it if access.split()[0] in buffers}
    assert {access.split()[0] for access in accesses} == set(buffers)
    assert moved_whole(accesses) == 2 * 64 * 32 * 16 * len(buffers)


# Channels before and after; 256 pixels after.
CONV_LAYERS = {"1x1": (64, 128), "1x1_narrow": (128, 64), "3x3": (64, 64), "3x3_stride_2": (64, 64)}
CONV_STEPS = ("forward", "input_grad", "weight_grad")


@pytest.mark.parametrize("layer", CONV_LAYERS)
@pytest.mark.parametrize("step", CONV_STEPS)
def test_convolutions_have_no_bank_conflicts(step: str, layer: str) -> None:
    accesses = counted()[f"conv_{step}_{layer}"]
    for access in ("shared read 16", "shared write 16"):
        _, lanes, turns = accesses[access]
        assert 8 * turns == lanes, access


@pytest.mark.parametrize("layer", CONV_LAYERS)
@pytest.mark.parametrize("step", CONV_STEPS)
def test_convolutions_move_full_sectors(step: str, layer: str) -> None:
    tensors = {"forward": {"x", "weight", "output"}, "weight_grad": {"x", "d", "output"}}
    wanted = tensors.get(step, {"x", "d", "output", "weight", "result"})
    found = set()
    for access, (_, lanes, sectors) in counted()[f"conv_{step}_{layer}"].items():
        buffer, _, size = access.split()
        if buffer in wanted:
            found.add(buffer)
            assert size == "16" and 2 * sectors <= lanes, access
    assert found == wanted


@pytest.mark.parametrize("layer", ("1x1", "1x1_narrow"))
def test_convolutions_of_one_tap_move_each_element_once(layer: str) -> None:
    c, k = CONV_LAYERS[layer]
    forward, back = counted()[f"conv_forward_{layer}"], counted()[f"conv_input_grad_{layer}"]
    slabs = -(-c // 64)
    assert forward["x read 16"][1] * 8 == 256 * c and forward["output write 16"][1] * 8 == 256 * k
    assert back["d read 16"][1] * 8 == back["output read 16"][1] * 8 == slabs * 256 * k
    assert back["x read 16"][1] * 8 == back["result write 16"][1] * 8 == 256 * c


def test_pinned() -> None:
    drift = differences(json.loads(PINNED.read_text()), counted())
    assert not drift, "\n".join([*drift, f"If that is meant: {PIN}"])


def test_drift_is_found() -> None:
    pinned = json.loads(PINNED.read_text())
    changed = json.loads(PINNED.read_text())
    changed["adam_f32"]["param read 16"][2] += 1
    changed["sgd_f32"].pop("grad read 16")
    assert len(differences(pinned, changed)) == 2
    assert len(differences(changed, pinned)) == 2


def main() -> int:
    if (reason := build.have(VARIANT)) is not None:
        print(reason)
        return 1
    new = count()
    if "--pin" in sys.argv[1:]:
        PINNED.write_text(as_text(new))
        print(f"pinned {len(new)} launches in {PINNED.name}")
        return 0
    drift = differences(json.loads(PINNED.read_text()), new)
    print("\n".join([*drift, f"If that is meant: {PIN}"]) if drift else "as pinned")
    return bool(drift)


if __name__ == "__main__":
    sys.exit(main())
