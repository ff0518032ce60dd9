"""Rows of results that are measured by and by."""

import json
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]


def beside(rows: list[Row], file: Path, *keys: str) -> list[Row]:
    """With what the file has of others: all together take hours."""
    measured = {tuple(row[key] for key in keys) for row in rows}
    old = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    kept = [row for row in old if tuple(row[key] for key in keys) not in measured]
    return [*kept, *rows]
