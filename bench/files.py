"""Result files that survive a kill: written whole, renamed into place, copied at once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any


def slug(name: str) -> str:
    """A device's name as a folder name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def write_text(path: Path, text: str) -> None:
    """Replaces the file in one step; a reader, or a kill, sees the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(data: Any, *paths: Path) -> None:
    """Writes the same JSON to every path."""
    text = json.dumps(data, indent=1) + "\n"
    for path in paths:
        write_text(path, text)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in that file; None if it is missing or no JSON object (a damaged file is measured anew)."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def collect_folder() -> Path | None:
    """The folder named by ``OUT``, if it is set: results are copied there too."""
    folder = os.environ.get("OUT", "")
    return Path(folder) if folder and Path(folder).is_dir() else None
