"""Parts of documents that are written from files of results."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/results"


@dataclass(frozen=True)
class Block:
    """A part of a document that is written from a file of results."""

    document: Path
    results: Path
    name: str
    table: Callable[[dict[str, Any]], str]
    section: str | None = None

    def data(self) -> dict[str, Any]:
        """The results, or the section of them that this block shows."""
        results: dict[str, Any] = json.loads(self.results.read_text(encoding="utf-8"))
        part: dict[str, Any] = results["sections"][self.section] if self.section else results
        return part

    def rendered(self) -> str:
        """The document with the block replaced."""
        text = self.document.read_text(encoding="utf-8")
        begin, end = f"<!-- {self.name}:begin -->", f"<!-- {self.name}:end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise SystemExit(f"{self.document} must hold the markers {begin!r} and {end!r}")
        return f"{before}{begin}\n{self.table(self.data())}\n{end}{after}"


def table_row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
