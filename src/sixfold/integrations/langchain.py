"""`SixfoldVectorStore`: a vector store of LangChain whose vectors take 1 to 8 bits a coordinate."""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

try:
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import VectorStore
    from langchain_core.vectorstores.utils import maximal_marginal_relevance
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'{error}: install what LangChain\'s vector stores need, pip install "sixfold[langchain]"',
        name=error.name,
    ) from error

from sixfold.errors import SixfoldError
from sixfold.index.documents import Document as Held
from sixfold.index.documents import Documents
from sixfold.index.metric import Metric


class SixfoldVectorStore(VectorStore):
    """Documents in memory, found by compressed vectors.

    Everything that a `VectorStore` does, asynchronous twins included. Documents whose ids are held
    are replaced. A filter is a function of a `Document`, or a dictionary of metadata.

    Attributes:
        documents: What holds texts, metadata and vectors.
    """

    def __init__(
        self,
        embedding: Embeddings,
        *,
        bits: int = 4,
        metric: Metric = "cosine",
        documents: Documents | None = None,
    ) -> None:
        """A store without documents.

        Args:
            embedding: What makes vectors of texts.
            bits: 1, 2, 3, 4 or 8 a coordinate.
            metric: `"cosine"`, `"ip"` (inner product) or `"l2"`, whose scores are negative squared
                distances: the highest score is always the best.
            documents: What the store holds already.

        Raises:
            SixfoldError: An argument is out of range.
        """
        self._embedding = embedding
        self.documents = Documents(bits, metric) if documents is None else documents

    @property
    def embeddings(self) -> Embeddings:
        """What makes vectors of texts."""
        return self._embedding

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """The same as `add_documents`, for texts.

        Raises:
            SixfoldError: There is not one of everything for each text, or the embedding's vectors
                are not finite or of another length than those held.
        """
        texts = list(texts)
        vectors = self._embedding.embed_documents(texts)
        return self.documents.put(texts, vectors, metadatas, ids)

    def add_documents(
        self, documents: list[Document], *, ids: list[str] | None = None, **kwargs: Any
    ) -> list[str]:
        """Add documents, or replace those whose ids are held: all, or none where one cannot be.

        Args:
            documents: What to add.
            ids: One for each; by default their own, or new ones.
            kwargs: Ignored.

        Returns:
            The ids.

        Raises:
            SixfoldError: There is not one id for each, or the embedding's vectors are not finite or
                of another length than those held.
        """
        texts = [document.page_content for document in documents]
        own = [document.id for document in documents] if ids is None else ids
        metadata = [document.metadata for document in documents]
        return self.documents.put(texts, self._embedding.embed_documents(texts), metadata, own)

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Remove documents; ids that there are not are left out.

        Raises:
            SixfoldError: No ids are given.
        """
        if ids is None:
            raise SixfoldError("delete: pass the ids of the documents that are to go")
        self.documents.remove(ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents of these ids; those that there are."""
        return [_document(held) for held in self.documents.get(ids)]

    def similarity_search(
        self, query: str, k: int = 4, *, filter: Any = None, **kwargs: Any
    ) -> list[Document]:
        """The `k` documents nearest to a text, the best first."""
        return self.similarity_search_by_vector(self._asked(query), k, filter=filter)

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Any = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The same with scores: the higher, the nearer."""
        return self._found(self._asked(query), k, filter)

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Any = None, **kwargs: Any
    ) -> list[Document]:
        """The `k` documents nearest to a vector, the best first."""
        return [document for document, _ in self._found(embedding, k, filter)]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Any = None,
        **kwargs: Any,
    ) -> list[Document]:
        """`k` documents near to a text and unlike each other.

        Args:
            query: The text.
            k: How many.
            fetch_k: Among how many of the nearest they are chosen.
            lambda_mult: From 0, as unlike each other as can be, to 1, as near to the text.
            filter: Which documents may be found.
            kwargs: Ignored.
        """
        return self.max_marginal_relevance_search_by_vector(
            self._asked(query), k, fetch_k, lambda_mult, filter=filter
        )

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Any = None,
        **kwargs: Any,
    ) -> list[Document]:
        """The same for a vector."""
        with self.documents.unchanged():
            near = [document for document, _ in self._found(embedding, max(k, fetch_k), filter)]
            vectors = list(self.documents.vectors([str(document.id) for document in near]))
        if not near:
            return []
        chosen = maximal_marginal_relevance(np.array(embedding), vectors, lambda_mult, k)
        return [near[number] for number in chosen]

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """A store of these texts; `kwargs` are those of the constructor."""
        store = cls(embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write texts, metadata and vectors to one file, in one step; nothing is pickled.

        Raises:
            SixfoldError: There are no documents, or metadata hold something that is no JSON value.
            OSError: The file cannot be written.
        """
        self.documents.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], embedding: Embeddings) -> Self:
        """Read a store that `save` wrote.

        Args:
            path: Of the file.
            embedding: That which its vectors were made by.

        Raises:
            FormatError: The file holds no documents, or is damaged.
            OSError: It cannot be read.
        """
        return cls(embedding, documents=Documents.load(path))

    def _asked(self, query: str) -> list[float]:
        return self._embedding.embed_query(query)

    def _found(
        self, embedding: Sequence[float], k: int, filter: Any
    ) -> list[tuple[Document, float]]:
        where = None if filter is None else _condition(filter)
        found = self.documents.search(embedding, k, where)
        return [(_document(held), score) for held, score in found]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        """From scores to 0 (unlike) to 1 (the same)."""
        if self.documents.metric == "cosine":
            return lambda score: min(max(score, 0.0), 1.0)
        if self.documents.metric == "l2":
            return lambda score: 1 / (1 + max(-score, 0.0))
        raise SixfoldError(
            "inner products are not bounded, so there is no relevance from 0 to 1: use "
            'similarity_search_with_score, or metric="cosine"'
        )


def _document(held: Held) -> Document:
    # Of its own: whoever changes what was found does not change what is held.
    return Document(id=held.id, page_content=held.text, metadata=copy.deepcopy(held.metadata))


def _condition(filter: Any) -> Callable[[Held], bool]:
    if callable(filter):
        return lambda held: bool(filter(_document(held)))
    if not isinstance(filter, Mapping):
        raise SixfoldError(f"filter must be a function or a dictionary, got {filter!r}")
    wanted = filter.items()
    return lambda held: all(
        name in held.metadata and held.metadata[name] == x for name, x in wanted
    )
