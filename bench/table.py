"""Tables for a person. Standard library only.

Columns are written as one text: a row's keys, which are the headings too, each with a format that has a width,
as in "name:<16 torch_us:11.1f".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


def _columns(columns: str) -> list[tuple[str, str, str]]:
    """Keys, formats, and the formats of a text that stands in their place."""
    pairs = (column.split(":") for column in columns.split())
    return [(k, form, re.sub(r"^(\d+).*", r">\1", form)) for k, form in pairs]


def header(columns: str) -> str:
    """The headings, each where its figures end, or its texts begin."""
    return "".join(f"{key.replace('_', ' '):{text}}" for key, _, text in _columns(columns))


def line(row: Mapping[str, Any], columns: str) -> str:
    """One row, and its note at the end; a dash where it has nothing."""
    values = [(row.get(key), form, text) for key, form, text in _columns(columns)]
    cells = (f"{'-':{text}}" if v is None else f"{v:{form}}" for v, form, text in values)
    return f"{''.join(cells)}  {row.get('note', '')}".rstrip()


def table(rows: Iterable[Mapping[str, Any]], columns: str) -> str:
    """The headings and all rows."""
    return "\n".join([header(columns), *(line(row, columns) for row in rows)])
