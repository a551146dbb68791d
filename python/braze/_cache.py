"""braze's folder in the user's cache, which must be nobody else's, and its locks."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def root() -> Path:
    """BRAZE_CACHE_DIR, or braze in XDG_CACHE_HOME, or ~/.cache/braze. Raises RuntimeError without a home."""
    if named := os.environ.get("BRAZE_CACHE_DIR"):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, says the XDG base directory specification.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "braze"


def make(folder: Path) -> None:
    """Makes ``folder``, for this user only, where there is none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def not_private(path: Path, file: bool = False) -> str:
    """What lets others than this user write to the folder, or file, ``path``; "" if nothing does."""
    info = os.lstat(path)
    if stat.S_ISLNK(info.st_mode):
        return "is a symbolic link"
    if not (stat.S_ISREG if file else stat.S_ISDIR)(info.st_mode):
        return f"is not a {'file' if file else 'folder'}"
    if info.st_uid != os.geteuid():
        return f"belongs to user {info.st_uid}, and this is user {os.geteuid()}"
    if info.st_mode & 0o022:
        return f"can be written by others (mode {stat.S_IMODE(info.st_mode):04o})"
    return ""


@contextmanager
def locked(file: Path, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock ``file``; calls ``waits`` before it waits for another process that has it.

    The kernel releases it with the process, so it cannot go stale.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(file, flags, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
