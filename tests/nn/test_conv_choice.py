"""Who computes a convolution between batch norms: what BRAZE_CONV says, what is timed, and the file of it.

Times are given; no kernel runs.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import TextIO

import braze
import pytest
import torch
from braze import _build, _cache, _native
from braze.nn import _conv_choice
from braze.nn._conv_choice import Problem, choices, describe, forget, prefers_own

pytestmark = pytest.mark.cpu_only("is about a file")

OURS, CUDNN = (1.0, 2.0), (2.0, 1.0)


def problem(n: int = 1) -> Problem:
    return Problem("a GPU, 9.0", torch.bfloat16, n, 56, 56, 64, 256, 1, 1, 0, True)


def never() -> tuple[float, float]:
    pytest.fail("timed")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the file will be; BRAZE_CONV is auto."""
    monkeypatch.delenv("BRAZE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("BRAZE_CONV", "auto")
    forget()
    yield tmp_path / "braze"
    forget()


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Begins what a process without BRAZE_CONV would do."""

    def begin() -> None:
        monkeypatch.delenv("BRAZE_CONV", raising=False)
        forget()

    return begin


def file_in(folder: Path) -> Path:
    (file,) = folder.glob("conv-*.json")
    return file


def full(_: object, stream: TextIO) -> None:
    """A json.dump for which the disk is too small."""
    stream.write("[")
    raise OSError(28, "No space left on device")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# ------------------------------------------------------------------ BRAZE_CONV


@pytest.mark.parametrize(("mode", "own"), [("cudnn", False), ("braze", True)])
def test_named_side_needs_neither_times_nor_file(
    mode: str, own: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefers_own(problem(), lambda: CUDNN if own else OURS)  # the file says otherwise
    monkeypatch.setenv("BRAZE_CONV", mode)
    forget()
    assert prefers_own(problem(), never) == prefers_own(problem(2), never) == own
    assert _conv_choice._known.cache_info().currsize == 0


def test_auto_times_once(folder: Path) -> None:
    """For every problem; the faster side is taken, and cuDNN of two that are equal."""
    timed = []
    for n, times in enumerate((OURS, CUDNN, (1.0, 1.0))):
        for _ in range(2):
            own = prefers_own(problem(n), lambda n=n, times=times: timed.append(n) or times)
            assert own == (times is OURS)
    assert timed == [0, 1, 2]
    assert [choice.winner for choice in choices().values()] == ["braze", "cudnn", "cudnn"]
    assert choices()[problem()] == (2.0, 1.0, "cudnn")


def test_every_field_of_a_problem_counts() -> None:
    first = problem()
    assert prefers_own(first, lambda: OURS)
    for field in Problem._fields:
        other = torch.float16 if field == "dtype" else "another" if field == "device" else 9
        assert not prefers_own(first._replace(**{field: other}), lambda: CUDNN)
    assert len(choices()) == len(Problem._fields) + 1


@pytest.mark.parametrize("empty", [False, True])
def test_unset_times_nothing(
    empty: bool, folder: Path, unset: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    unset()
    if empty:
        monkeypatch.setenv("BRAZE_CONV", "")
    assert not prefers_own(problem(), never)
    assert choices() == {} and not folder.exists()


def test_unset_takes_what_the_file_says(folder: Path, unset: Callable[[], None]) -> None:
    prefers_own(problem(), lambda: OURS)
    prefers_own(problem(2), lambda: CUDNN)
    before = choices()
    unset()
    assert prefers_own(problem(), never)
    assert not prefers_own(problem(2), never) and not prefers_own(problem(3), never)
    assert choices() == before


def test_another_value_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAZE_CONV", "yes")
    for _ in range(2):
        with pytest.raises(ValueError, match="BRAZE_CONV is 'yes'; it may be cudnn, braze or auto"):
            prefers_own(problem(), never)
    assert braze.build_info()["convolutions"].startswith("BRAZE_CONV is 'yes'; it may be")


def test_nothing_is_timed_or_remembered_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """But what is known holds there, too."""
    prefers_own(problem(2), lambda: OURS)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not prefers_own(problem(), never) and prefers_own(problem(2), never)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert prefers_own(problem(), lambda: OURS)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), ValueError("not so")])
def test_failed_timing_is_cudnn_in_this_process(
    error: Exception, folder: Path, unset: Callable[[], None]
) -> None:
    def fail() -> tuple[float, float]:
        raise error

    said = f"timing a convolution failed, .*n=1, h=56.*{type(error).__name__}: {error}"
    with pytest.warns(UserWarning, match=said):
        assert not prefers_own(problem(), fail)
    assert not prefers_own(problem(), never)
    assert isnan(choices()[problem()].ours) and choices()[problem()].winner == "cudnn"
    prefers_own(problem(2), lambda: OURS)
    unset()
    assert set(choices()) == {problem(2)}


# -------------------------------------------------------------------- the file


def test_another_process_finds_the_choices(folder: Path) -> None:
    """A process of its own, without BRAZE_CONV: dtype and all fields come back as they were."""
    prefers_own(problem(), lambda: OURS)
    program = (
        "import torch\nfrom braze.nn._conv_choice import Problem, choices, describe, prefers_own\n"
        f"print(prefers_own({problem()!r}, None), len(choices()), describe())"
    )
    environ = {key: value for key, value in os.environ.items() if key != "BRAZE_CONV"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environ
    )
    said = f"BRAZE_CONV is not set; 1 choices, 1 of them braze; {file_in(folder)}\n"
    assert done.stdout == f"True 1 {said}", done.stderr


def test_file_is_private(folder: Path) -> None:
    old = os.umask(0)
    try:
        prefers_own(problem(), lambda: OURS)
    finally:
        os.umask(old)
    assert mode_of(folder) == 0o700
    assert {mode_of(path) for path in folder.iterdir()} == {0o600}
    assert {path.suffix for path in folder.iterdir()} == {".json", ".lock"}


@pytest.mark.parametrize("there", [True, False])
def test_disk_is_read_once(
    there: bool, folder: Path, unset: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for problems that the file lacks."""
    if there:
        prefers_own(problem(), lambda: OURS)
    unset()
    read, reads = Path.read_bytes, []

    def counted(path: Path) -> bytes:
        reads.extend([path] * (path.parent == folder))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    assert [prefers_own(problem(n), never) for n in (1, 2, 2, 1)] == [there, False, False, there]
    assert len(reads) == 1


def test_writers_lose_nothing(folder: Path, unset: Callable[[], None]) -> None:
    """Four that all began with an empty file, as processes do; a lock is of a file that was opened, so threads
    stand for them."""
    known = [_conv_choice._Known() for _ in range(4)]
    start = threading.Barrier(len(known))

    def write(which: int) -> None:
        start.wait()
        for n in range(25):
            known[which].add(problem(100 * which + n), _conv_choice._choice(*OURS))

    threads = [threading.Thread(target=write, args=(which,)) for which in range(len(known))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    unset()
    assert set(choices()) == {problem(100 * which + n) for which in range(4) for n in range(25)}
    assert {path.suffix for path in folder.iterdir()} == {".json", ".lock"}


def test_first_writer_decides_for_all(unset: Callable[[], None]) -> None:
    """Processes that timed the same at once, with other results, go on with one choice."""
    first, second = _conv_choice._Known(), _conv_choice._Known()
    assert first.add(problem(), _conv_choice._choice(*OURS)).winner == "braze"
    assert second.add(problem(), _conv_choice._choice(*CUDNN)) == (1.0, 2.0, "braze")
    unset()
    assert prefers_own(problem(), never)


@pytest.mark.parametrize(
    "change", ["version", "interface", "library", "binding", "torch", "cuda", "cudnn", "driver"]
)
def test_stale_choices_are_not_taken(
    change: str,
    folder: Path,
    tmp_path: Path,
    unset: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefers_own(problem(), lambda: OURS)
    before = file_in(folder).read_bytes()
    with monkeypatch.context() as patch:
        if change in ("version", "interface"):
            patch.setattr(_build, change.upper(), "another")
        elif change in ("library", "binding"):
            (tmp_path / "libbraze_cuda.so").write_text(change)
            if change == "library":
                patch.setattr(_native, "PACKAGE", tmp_path)
            else:
                patch.setattr(_native, "CUDA_FILE", tmp_path / "libbraze_cuda.so")
        elif change == "torch":
            patch.setattr(torch, "__version__", "2.99.0")
        elif change == "cuda":
            patch.setattr(torch.version, "cuda", "99.0")
        elif change == "cudnn":
            patch.setattr(torch.backends.cudnn, "version", lambda: 99999)
        else:
            driver = tmp_path / "version"
            driver.write_text("NVRM version: 999.1\nGCC version: any\n")
            patch.setattr(_conv_choice, "_DRIVER", driver)
        forget()
        assert not prefers_own(problem(), lambda: CUDNN)
        assert len(list(folder.glob("conv-*.json"))) == 2
    unset()
    assert prefers_own(problem(), never)
    assert before in [path.read_bytes() for path in folder.glob("conv-*.json")]


@pytest.mark.parametrize("where", ["folder", "file"])
@pytest.mark.parametrize("why", ["group", "world", "link", "owner"])
def test_file_that_others_could_write_is_refused(
    why: str, where: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one warning; and nothing is timed for a file that could not keep it."""
    prefers_own(problem(), lambda: OURS)
    path = folder if where == "folder" else file_in(folder)
    said = "can be written by others"
    if why in ("group", "world"):
        path.chmod(0o770 if why == "group" else 0o707)
    elif why == "link":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to(path.with_name("elsewhere"))
        said = "is a symbolic link"
    else:
        real = os.lstat

        def lstat(name: str | Path) -> os.stat_result:
            info = real(name)
            return os.stat_result((*info[:4], info.st_uid + (Path(name) == path), *info[5:]))

        monkeypatch.setattr(os, "lstat", lstat)
        said = "belongs to user"
    forget()
    with pytest.warns(UserWarning, match=f"{path} {said}.* cuDNN computes them. Remove it, ") as w:
        assert not prefers_own(problem(), never)
        assert not prefers_own(problem(2), never)
    assert len(w) == 1
    assert choices() == {} and f", not used: {path} {said}" in describe()


DAMAGED = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[:-9],
    "binary": lambda whole: b"\xff\xfe\0",
    "other": lambda whole: b'{"a": 1, "b": 2}',
    "key": lambda whole: whole.replace(braze.__version__.encode(), b"9.9.9"),
    "dtype": lambda whole: whole.replace(b"bfloat16", b"bfloat61"),
    "time": lambda whole: whole.replace(b"2.0]", b"null]"),
    "field": lambda whole: whole.replace(b", true]", b"]"),
    "list": lambda whole: whole.replace(b", true]", b", []]"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file_is_set_aside(damage: str, folder: Path, unset: Callable[[], None]) -> None:
    prefers_own(problem(), lambda: OURS)
    file = file_in(folder)
    bad = DAMAGED[damage](file.read_bytes())
    assert bad != file.read_bytes()
    file.write_bytes(bad)
    forget()
    with pytest.warns(UserWarning, match="is damaged .* start anew") as w:
        assert not prefers_own(problem(), lambda: CUDNN)
    assert len(w) == 1
    assert file.with_suffix(".damaged").read_bytes() == bad
    unset()
    assert choices() == {problem(): (2.0, 1.0, "cudnn")}


def test_what_replaced_a_damaged_file_is_not_set_aside(
    folder: Path, unset: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefers_own(problem(), lambda: OURS)
    file = file_in(folder)
    whole = file.read_bytes()
    file.write_bytes(b"")

    @contextmanager
    def locked(path: Path) -> Iterator[None]:
        file.write_bytes(whole)  # another process had the lock until now
        yield

    monkeypatch.setattr(_cache, "locked", locked)
    unset()
    assert prefers_own(problem(), never)
    assert file.read_bytes() == whole and not file.with_suffix(".damaged").exists()


@pytest.mark.parametrize("home", ["none", "unusable", "full"])
def test_without_a_home_choices_live_in_the_process(
    home: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a warning; `braze info` says why."""
    if home == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    elif home == "unusable":
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    else:
        monkeypatch.setattr(json, "dump", full)
    assert prefers_own(problem(), lambda: OURS)
    assert prefers_own(problem(), never)
    said = {"none": "no file, not used: Could not", "unusable": "/dev/null'", "full": "space"}
    assert "1 choices, 1 of them braze" in describe() and said[home] in describe()
    assert not list(folder.glob("*.json"))


def test_file_that_was_unusable_for_a_while_is_used_again(
    folder: Path, unset: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what could not be written was half written."""
    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", full)
        prefers_own(problem(), lambda: OURS)
    assert "not used" in describe()
    prefers_own(problem(2), lambda: OURS)
    assert "not used" not in describe()
    unset()
    assert set(choices()) == {problem(2)}
