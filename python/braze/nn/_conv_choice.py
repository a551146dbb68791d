"""Whether braze's kernels or cuDNN compute a convolution between batch norms: timed once, and kept in a file.

BRAZE_CONV, read once, when the first such convolution is met, says what decides:

- ``cudnn``, ``braze``: that one, always.
- ``auto``: the file; what it lacks is timed when it is met first, and written to it.
- unset: the file; what it lacks is cuDNN's, and nothing is timed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from braze import _build, _cache, _native

__all__ = ["Choice", "Problem", "choices", "describe", "forget", "mode", "possible", "prefers_own"]

_MODES = ("", "cudnn", "braze", "auto")
_DRIVER = Path("/proc/driver/nvidia/version")


class Problem(NamedTuple):
    """What the times of a convolution depend on; sizes are the input's, and k the output's channels."""

    device: str  # the GPU's name and compute capability
    dtype: torch.dtype
    n: int
    h: int
    w: int
    c: int
    k: int
    kernel: int
    stride: int
    padding: int
    normalised: bool  # the input comes through a batch norm


class Choice(NamedTuple):
    """Milliseconds of forward and backward, not a number where timing failed, and who is chosen."""

    ours: float
    cudnn: float
    winner: str  # braze or cudnn


def _choice(ours: float, cudnn: float) -> Choice:
    return Choice(ours, cudnn, "braze" if ours < cudnn else "cudnn")


def _kernels() -> str:
    """A digest of what has the kernels: libbraze_cuda, or the binding where it has them inside."""
    digest = hashlib.sha256()
    for file in (_native.PACKAGE / "libbraze_cuda.so", _native.CUDA_FILE):
        if file is not None and file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class _Refused(Exception):
    """Others than this user could have written the file."""


class _Known:
    """The choices of this process, and the file, which is read once."""

    def __init__(self) -> None:
        self.choices: dict[Problem, Choice] = {}
        self.file: Path | None = None
        self.unused = ""  # why the file is not used
        self.refused = False
        with self._file_may_fail():
            driver = _DRIVER.read_text().split("\n")[0] if _DRIVER.exists() else ""
            # Whatever makes times stale; the GPU is part of a problem.
            self.key = [
                _build.VERSION,
                _build.INTERFACE,
                _kernels(),
                str(torch.__version__),
                torch.version.cuda,
                torch.backends.cudnn.version(),
                driver,
            ]
            digest = hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:16]
            self.file = _cache.root() / f"conv-{digest}.json"
            self._refuse_others()
            self.choices = self._read(self.file)

    def add(self, problem: Problem, choice: Choice) -> Choice:
        """Keeps a choice here and in the file. Returns the file's own where another process was first."""
        if self.file is None:
            return self.choices.setdefault(problem, choice)
        with self._file_may_fail():
            _cache.make(self.file.parent)
            self._refuse_others()
            with _cache.locked(self.file.with_suffix(".lock")):
                merged = {problem: choice, **self._read(self.file, locked=True)}
                self._write(self.file, merged)
            for other, known in merged.items():
                self.choices.setdefault(other, known)
        return self.choices.setdefault(problem, choice)

    @contextmanager
    def _file_may_fail(self) -> Iterator[None]:
        """Without a home, or with a read-only one, choices live as long as the process."""
        try:
            yield
            self.unused = ""
        except _Refused as error:
            self.refused, self.unused = True, str(error)
            warnings.warn(
                f"{error}, so what it says of convolutions could be someone else's: cuDNN computes them. "
                f"Remove it, set its mode with chmod go-w, or choose another folder with BRAZE_CACHE_DIR.",
                stacklevel=2,
            )
        except (OSError, RuntimeError) as error:
            self.unused = str(error)

    def _refuse_others(self) -> None:
        assert self.file is not None
        for path in (self.file.parent, self.file):
            if os.path.lexists(path) and (why := _cache.not_private(path, path == self.file)):
                raise _Refused(f"{path} {why}")

    def _read(self, file: Path, locked: bool = False) -> dict[Problem, Choice]:
        """What the file has; a damaged one is set aside."""
        try:
            key, rows = json.loads(file.read_bytes())
            if key != self.key:
                raise ValueError(f"it is of {key}")
            return {
                Problem(device, getattr(torch, dtype), *sizes): _choice(float(ours), float(cudnn))
                for (device, dtype, *sizes), ours, cudnn in rows
            }
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as error:
            if not locked:  # another process may be setting it aside, or have written a whole one
                with _cache.locked(file.with_suffix(".lock")):
                    return self._read(file, locked=True)
            aside = file.with_suffix(".damaged")
            file.replace(aside)
            warnings.warn(
                f"{file}, braze's choices of convolutions, is damaged ({error}); it is now {aside}, and "
                f"choices start anew",
                stacklevel=2,
            )
            return {}

    def _write(self, file: Path, known: dict[Problem, Choice]) -> None:
        rows = [
            ((p.device, str(p.dtype).removeprefix("torch."), *p[2:]), choice.ours, choice.cudnn)
            for p, choice in known.items()
        ]
        temporary = file.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)  # of a process that was killed
        with open(temporary, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            json.dump((self.key, rows), stream)
        temporary.replace(file)


_known = cache(_Known)


@cache  # a look into os.environ takes longer than all the rest of a known choice
def mode() -> str:
    """What BRAZE_CONV says, "" if it is not set. Raises ValueError unless it is one of its values."""
    value = os.environ.get("BRAZE_CONV", "")
    if value not in _MODES:
        raise ValueError(f"BRAZE_CONV is {value!r}; it may be cudnn, braze or auto")
    return value


@cache
def possible() -> bool:
    """Whether any convolution could be braze's: where not, nobody need look at one. Raises ValueError as
    ``mode``."""
    if mode() == "":  # nothing is added
        return any(choice.winner == "braze" for choice in _known().choices.values())
    return mode() != "cudnn"


def forget() -> None:
    """Forgets what this process knows: BRAZE_CONV and the file are read anew."""
    mode.cache_clear()
    possible.cache_clear()
    _known.cache_clear()


def prefers_own(problem: Problem, measure: Callable[[], tuple[float, float]]) -> bool:
    """Whether braze's kernels are to compute ``problem``, on the current device.

    ``measure`` gives the milliseconds of braze's kernels and of cuDNN with braze's batch norm, forward and
    backward. It is called with ``BRAZE_CONV=auto`` only, once for a problem, and not while the current stream
    is capturing, when an unknown problem is cuDNN's for this call. What it raises becomes a warning, and cuDNN
    computes the problem until the process ends. Raises ValueError for another value of BRAZE_CONV.
    """
    decides = mode()
    if decides in ("cudnn", "braze"):
        return decides == "braze"
    known = _known()
    choice = known.choices.get(problem)
    if choice is None:
        if decides != "auto" or known.refused or _capturing():
            return False
        try:
            measured = _choice(*measure())
        except Exception as error:
            known.choices[problem] = _choice(math.nan, math.nan)
            warnings.warn(
                f"timing a convolution failed, and cuDNN computes it until the process ends: {problem}: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
            return False
        choice = known.add(problem, measured)
    return choice.winner == "braze"


def _capturing() -> bool:
    # A torch without CUDA cannot be asked the second.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def choices() -> dict[Problem, Choice]:
    """What is known by now: the file's choices, and those of this process."""
    return dict(_known().choices)


def describe() -> str:
    """One line: what BRAZE_CONV says, how many choices there are, and where they are kept. Never raises."""
    try:
        decides = mode() or "not set"
    except ValueError as error:
        return str(error)
    known = _known()
    own = sum(choice.winner == "braze" for choice in known.choices.values())
    unused = f", not used: {known.unused}" if known.unused else ""
    return (
        f"BRAZE_CONV is {decides}; {len(known.choices)} choices, {own} of them braze; "
        f"{known.file or 'no file'}{unused}"
    )
