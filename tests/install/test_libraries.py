"""The libraries of kernels: what they show, what they need, and that bindings of another build are refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_gates
import pytest
from braze import _build, _native

pytestmark = pytest.mark.cpu_only("is about the build")

ROOT = Path(__file__).parents[2]
PACKAGE = Path(_build.__file__ or "").parent
FOLDERS = {"libbraze_kernels.so": ("plan", "cpu"), "libbraze_cuda.so": ("cuda",)}


def names(library: Path, which: str, dynamic: bool = True) -> list[str]:
    """Demangled symbols, of a library those for others; `which`: --defined-only or --undefined-only."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "-C", "--format=just-symbols", which, *["-D"] * dynamic, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def marked(folders: tuple[str, ...]) -> int:
    """Functions that the headers offer to other libraries."""
    headers = [p for folder in folders for p in sorted((ROOT / "csrc" / folder).glob("*.h"))]
    return sum(
        len(re.findall(r"^(?!#define|class).*\bBRAZE_API ", p.read_text(), re.MULTILINE))
        for p in headers
    )


def test_kernels_show_what_is_marked_and_nothing_else() -> None:
    """A template of the standard library, or a function that became visible, would be a second one's."""
    shown = names(PACKAGE / "libbraze_kernels.so", "--defined-only")
    assert all(name.startswith("braze::") for name in shown)
    assert len(shown) == marked(FOLDERS["libbraze_kernels.so"]) > 20


def test_kernels_know_neither_torch_nor_python() -> None:
    needed = names(PACKAGE / "libbraze_kernels.so", "--undefined-only")
    foreign = re.compile(r"\b(at|c10|torch)::|^_?Py")
    assert needed and not [name for name in needed if foreign.search(name)]
    binding = names(Path(_native._C.__file__), "--undefined-only")
    assert [name for name in binding if foreign.search(name)]  # it would be seen


@pytest.mark.slow("makes the build of all CUDA kernels ready")
def test_cuda_kernels_show_and_need_as_little() -> None:
    if reason := cuda_gates.no_nvcc():
        pytest.skip(reason)
    commands = cuda_gates.compile_objects()
    library = cuda_gates.BUILD / "libbraze_cuda.so"
    shown, needed = names(library, "--defined-only"), names(library, "--undefined-only")
    launcher = "braze::cuda::StepLauncher"
    assert all(name.startswith("braze::") for name in shown)
    assert f"{launcher}::step(" in "".join(shown)
    others = [name for name in shown if not name.startswith(launcher)]
    assert len(others) == marked(FOLDERS["libbraze_cuda.so"]) > 10
    for command in commands:  # what the bindings will look for in it
        if command["file"].endswith(".cpp"):
            wanted = names(
                Path(command["directory"], command["output"]), "--undefined-only", dynamic=False
            )
            assert {name for name in wanted if name.startswith("braze::cuda::")} <= set(shown)
    # Its CUDA runtime is inside; the driver is looked for when a GPU is.
    assert not [name for name in needed if re.match(r"cu(da)?[A-Z]|_?Py", name)]


def test_binding_of_another_build_is_refused(tmp_path: Path) -> None:
    """Structs of another layout would be read as if they were ours."""
    package = tmp_path / "braze"
    shutil.copytree(PACKAGE, package, symlinks=False)
    binding = package / Path(_native._C.__file__).name
    content = binding.read_bytes()
    assert content.count(_build.INTERFACE.encode()) >= 1
    binding.write_bytes(content.replace(_build.INTERFACE.encode(), b"x" * len(_build.INTERFACE)))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import braze"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert run.returncode == 1
    assert (
        f"braze's files are of different builds: libbraze_kernels has the interface "
        f"{_build.INTERFACE}, what uses it wants xxxxxxxxxxxx" in run.stderr
    )
