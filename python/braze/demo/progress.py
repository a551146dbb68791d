"""A progress bar for a terminal."""

from __future__ import annotations

import shutil
import sys
from time import monotonic


class Progress:
    """One line that is redrawn, at most ten times a second; silent where there is no terminal."""

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._drawn = 0.0
        self._active = sys.stdout.isatty()

    def update(self, done: int, note: str) -> None:
        """Show ``done`` of the total and a short note."""
        if not self._active or (monotonic() - self._drawn < 0.1 and done < self._total):
            return
        self._drawn = monotonic()
        filled = 24 * done // self._total
        bar = "█" * filled + "░" * (24 - filled)
        line = f"{self._label} {bar} {done}/{self._total}  {note}"
        print("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    def clear(self) -> None:
        """Remove the line."""
        if self._active:
            print("\r\x1b[K", end="", flush=True)
