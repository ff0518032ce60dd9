"""Texts and their metadata beside the vectors by which they are found: what adapters stand on."""

import contextlib
import copy
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from sixfold.arguments import sequence, shown, whole
from sixfold.errors import FormatError, ShapeError, SixfoldError
from sixfold.index.files import load_index, save_index
from sixfold.index.index import Index
from sixfold.index.metric import Metric
from sixfold.index.state import State

KIND = "documents"
_TEXTS = "documents"
# Half of a surrogate pair, as texts cut in the middle have it: Python's JSON reads it so.
_AS_JSON = "surrogatepass"


class Document(NamedTuple):
    """A text.

    Attributes:
        id: By which it is replaced and removed.
        text: What it says.
        metadata: JSON values by their names.
    """

    id: str
    text: str
    metadata: dict[str, Any]


class Found(NamedTuple):
    """A document, and the score of its vector: the higher, the nearer."""

    document: Document
    score: float


class Documents:
    """Documents in memory, found by vectors of which an `Index` holds a few bits a coordinate.

    Its methods may be called from several threads at the same time.

    Attributes:
        index: The vectors; None until the first document says how long they are.
    """

    def __init__(self, bits: int = 4, metric: Metric = "cosine", seed: int = 0) -> None:
        """No documents; see `Index` for the arguments.

        Raises:
            SixfoldError: An argument is out of range.
        """
        # For its checks: better now than with the first document.
        Index(1, bits, metric, seed=seed)
        self.bits, self.metric, self.seed = bits, metric, seed
        self.index: Index | None = None
        self._held: dict[str, Document] = {}
        # The index that is being changed, what it was before, and what documents there are then.
        self._change: tuple[Index, State, dict[str, Document]] | None = None
        self._lock: Any = threading.RLock()

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self._known())

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """A block during which no other thread changes anything.

        Raises:
            SixfoldError: From a signal handler that interrupts such a block, or a change.
        """
        if self._lock._is_owned():
            raise SixfoldError("the documents are in use by what this call interrupted")
        with self._lock:
            self._settle()
            yield

    def _settle(self) -> None:
        """Finish a change: one that was interrupted has changed the index, or nothing."""
        if self._change is not None:
            index, before, held = self._change
            if index._state is not before:
                self.index, self._held = index, held
            self._change = None

    def _known(self) -> dict[str, Document]:
        if self._change is not None and not self._lock._is_owned():
            with self._lock:
                self._settle()
        return self._held

    def put(
        self,
        texts: Any,
        vectors: Any,
        metadata: Any = None,
        ids: Any = None,
    ) -> list[str]:
        """Add documents, or replace those whose ids are held: all, or none where one cannot be.

        Args:
            texts: What they say: strings.
            vectors: [n, dim], one for each.
            metadata: A mapping for each; by default an empty one.
            ids: A string for each, or None for a new one. Of two that are equal the later counts.

        Returns:
            The ids.

        Raises:
            ShapeError: There is not one of everything for each text, or vectors have another
                length than those held.
            SixfoldError: Vectors are not finite, or an argument is none of its kind.
        """
        texts = sequence("texts", texts)
        count = len(texts)
        metadata = [{}] * count if metadata is None else sequence("metadata", metadata)
        given = [None] * count if ids is None else sequence("ids", ids)
        for name, each in (("metadata", metadata), ("ids", given)):
            if len(each) != count:
                raise ShapeError(f"{name}: expected one for each of {count} texts, got {len(each)}")
        known = [uuid.uuid4().hex if x is None else _id(x) for x in given]
        rows = np.asarray(vectors, dtype=np.float32)
        if count == 0:
            return []
        if rows.ndim != 2 or len(rows) != count:
            raise ShapeError(f"vectors: expected [{count}, dim], got {list(rows.shape)}")
        new = {
            id: (Document(id, _text("a text", text), _metadata(about)), row)
            for id, text, about, row in zip(known, texts, metadata, rows, strict=True)
        }
        with self.unchanged():
            index = self.index
            if index is None:
                index = Index(rows.shape[1], self.bits, self.metric, seed=self.seed)
            held = self._held | {id: document for id, (document, _) in new.items()}
            self._change = index, index._state, held
            index.add(np.stack([row for _, row in new.values()]), list(new), upsert=True)
            self._settle()
        return known

    def remove(self, ids: Any) -> int:
        """Remove documents; returns how many of these ids there were."""
        with self.unchanged():
            gone = {id for id in sequence("ids", ids) if id in self._held}
            if gone and self.index is not None:
                held = {id: x for id, x in self._held.items() if id not in gone}
                self._change = self.index, self.index._state, held
                self.index.remove(list(gone))
                self._settle()
        return len(gone)

    def get(self, ids: Any) -> list[Document]:
        """The documents of these ids; those that there are."""
        held = self._known()
        return [held[id] for id in sequence("ids", ids) if id in held]

    def search(
        self, vector: Any, k: int = 10, where: Callable[[Document], bool] | None = None
    ) -> list[Found]:
        """The `k` nearest documents, the best first.

        Args:
            vector: [dim].
            k: How many.
            where: Which may be found; by default all.

        Raises:
            ShapeError: The vector has another length than those held.
            SixfoldError: It is not finite, or `k` is no number of documents.
        """
        k, query = whole("k", k, 1), np.asarray(vector, dtype=np.float32)
        held = self._held
        found = self._search(query, k, where)
        unchanged = self._held is held and self._change is None
        if unchanged or self._lock._is_owned():
            return found
        # Something was changed meanwhile.
        with self.unchanged():
            return self._search(query, k, where)

    def _search(
        self, query: np.ndarray, k: int, where: Callable[[Document], bool] | None
    ) -> list[Found]:
        held, index = self._held, self.index
        allowed = None if where is None else [id for id, x in held.items() if where(x)]
        if index is None or not held or allowed == []:
            return []
        scores, ids = index.search(query, min(k, len(held)), filter=allowed)
        pairs = zip(ids.tolist(), scores.tolist(), strict=True)
        return [Found(held[id], score) for id, score in pairs if id in held]

    def vectors(self, ids: Any) -> np.ndarray:
        """The vectors of documents as the index knows them, [n, dim].

        Raises:
            OutOfRangeError: There is no such document.
        """
        if self.index is None:
            return np.empty((0, 0), dtype=np.float32)
        return self.index.decode(list(ids))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one file, in one step; nothing is pickled.

        Raises:
            SixfoldError: There are no documents, or metadata hold something that is no JSON value.
            OSError: The file cannot be written.
        """
        with self.unchanged():
            if self.index is None:
                raise SixfoldError("there are no documents to save: add some before")
            try:
                text = json.dumps([list(x) for x in self._held.values()], ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise SixfoldError(
                    f"metadata must be JSON values (text, numbers, lists, ...) to be saved: {error}"
                ) from error
            letters = torch.frombuffer(bytearray(text.encode(errors=_AS_JSON)), dtype=torch.uint8)
            with self.index._alone():
                save_index(path, self.index._state, KIND, {_TEXTS: letters})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read documents that `save` wrote.

        Raises:
            FormatError: The file holds no documents, or is damaged.
            OSError: It cannot be read.
        """
        state, beside = load_index(path, False, KIND, (_TEXTS,))
        index = Index._of(state)
        held = _read(path, beside[_TEXTS].numpy().tobytes())
        if set(held) != set(index.ids.tolist()):
            raise FormatError(f"{path} is damaged: its documents are not those of its vectors.")
        documents = cls(index.bits, index.metric, index.seed)
        documents.index, documents._held = index, held
        return documents


def _read(path: str | os.PathLike[str], text: bytes) -> dict[str, Document]:
    try:
        rows = [Document(*row) for row in json.loads(text)]
        return {
            _id(x.id): Document(x.id, _text("a text", x.text), _metadata(x.metadata)) for x in rows
        }
    except (ValueError, TypeError, RecursionError, SixfoldError) as error:
        raise FormatError(f"{path} is damaged: its documents cannot be read ({error}).") from error


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SixfoldError(f"{name} must be a string, got {shown(value)}")
    return value


def _id(value: Any) -> str:
    text = _text("an id", value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SixfoldError(f"an id must be text that UTF-8 can hold, got {text!r}") from error
    return text


def _metadata(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise SixfoldError(f"metadata must map names to values, got {shown(value)}")
    # Whoever changes theirs changes nothing here.
    return copy.deepcopy(dict(value))
