"""What a long measurement has found so far, in a file: stopped at any moment, it can go on."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sixfold.errors import FormatError, SixfoldError

T = TypeVar("T")

KIND = "sixfold checkpoint"
VERSION = 1


class Checkpoint:
    """The parts of a measurement that are done, by name; without a file nothing is remembered.

    The file is text, a JSON value a line: first what is measured, then pairs of a name and what was
    found, each written as it is found. A last line that was cut off is measured again.
    """

    def __init__(self, path: Path | None = None, question: Mapping[str, Any] | None = None) -> None:
        """Begin a file, or read one that was begun.

        Args:
            path: The file; None for none.
            question: What is measured and how, as plain JSON values: who goes on must ask the same.

        Raises:
            FormatError: The file is something else, or damaged.
            SixfoldError: It was begun by another measurement.
        """
        self._path, self._found = path, dict[str, Any]()
        if path is None:
            return
        head = {"kind": KIND, "version": VERSION, "question": dict(question or {})}
        begun = path.read_bytes() if path.exists() else b""
        if not begun:
            self._write(head)
            return
        # What follows the last line break is a line that was cut off.
        whole = begun[: begun.rfind(b"\n") + 1]
        first, *rest = self._lines(whole)
        self._check(first, json.loads(json.dumps(head)))
        self._found = self._pairs(rest)
        if len(whole) < len(begun):
            os.truncate(path, len(whole))

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def once(self, name: str, measure: Callable[[], T]) -> T:
        """What was found by that name, or else what `measure` finds, which is written down.

        Args:
            name: Of this part of the measurement.
            measure: Returns a plain JSON value.
        """
        if name not in self._found:
            self._found[name] = measure()
            if self._path is not None:
                self._write([name, self._found[name]])
        found: T = self._found[name]
        return found

    def _write(self, value: Any) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _lines(self, text: bytes) -> list[Any]:
        try:
            return [json.loads(line) for line in text.decode("utf-8").splitlines()] or [None]
        except ValueError as error:
            raise self._foreign() from error

    def _check(self, first: Any, head: Mapping[str, Any]) -> None:
        if not isinstance(first, dict) or first.get("kind") != KIND:
            raise self._foreign()
        theirs, ours = first.get("question"), head["question"]
        if first.get("version") != VERSION or not isinstance(theirs, dict):
            raise FormatError(f"{self._path} is of another version of Sixfold: give another file")
        names = sorted({n for n in theirs.keys() | ours if theirs.get(n) != ours.get(n)})
        if names:
            was = ", ".join(f"{n} {theirs.get(n)!r} (here {ours.get(n)!r})" for n in names)
            raise SixfoldError(
                f"{self._path} was begun by another measurement: {was}. Ask the same, or give "
                "another file."
            )

    def _pairs(self, lines: list[Any]) -> dict[str, Any]:
        for line in lines:
            if not isinstance(line, list) or len(line) != 2 or not isinstance(line[0], str):
                raise self._foreign()
        return {name: found for name, found in lines}

    def _foreign(self) -> FormatError:
        return FormatError(
            f"{self._path} is no checkpoint of a measurement, or damaged: give another file"
        )
