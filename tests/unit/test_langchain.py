"""LangChain's own suite for vector stores, and what it does not ask."""

import asyncio
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sixfold.errors import FormatError, SixfoldError
from sixfold.index import Index

pytest.importorskip("langchain_core", reason="LangChain is not installed")
suites = pytest.importorskip("langchain_tests.integration_tests.vectorstores")

from langchain_core.documents import Document  # noqa: E402
from langchain_core.embeddings import DeterministicFakeEmbedding  # noqa: E402

from sixfold.integrations.langchain import SixfoldVectorStore  # noqa: E402

EMBEDDING = DeterministicFakeEmbedding(size=64)


class TestConformance(suites.VectorStoreIntegrationTests):  # type: ignore[misc,name-defined]
    @pytest.fixture
    def vectorstore(self) -> SixfoldVectorStore:
        return SixfoldVectorStore(self.get_embeddings())


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/langchain.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert [x.metadata for x in names["pages"]] == [{"page": 2}]
    assert len(names["retriever"].invoke("Owls")) == len(names["store"].documents) == 2


def filled(count: int = 40, **options: object) -> SixfoldVectorStore:
    texts = [f"text {i}" for i in range(count)]
    metadata = [{"number": i, "even": i % 2 == 0} for i in range(count)]
    ids = [str(i) for i in range(count)]
    return SixfoldVectorStore.from_texts(texts, EMBEDDING, metadata, ids=ids, **options)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_nearest_is_the_text_itself(metric: str, bits: int) -> None:
    store = filled(metric=metric, bits=bits)
    for i in (0, 7, 39):
        found = store.similarity_search_with_score(f"text {i}", k=3)
        assert found[0][0].page_content == f"text {i}"
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True)


def test_scores_are_those_of_an_index() -> None:
    store, index = filled(), Index(64, 4)
    vectors = np.array(EMBEDDING.embed_documents([f"text {i}" for i in range(40)]))
    index.add(vectors, [str(i) for i in range(40)])
    scores, ids = index.search(vectors[5], 4)
    found = store.similarity_search_with_score("text 5", k=4)
    assert [document.id for document, _ in found] == ids.tolist()
    assert [score for _, score in found] == pytest.approx(scores.tolist())


def test_filters() -> None:
    store = filled()
    even = store.similarity_search("text 7", k=40, filter={"even": True})
    assert sorted(x.metadata["number"] for x in even) == list(range(0, 40, 2))
    few = store.similarity_search("text 7", k=5, filter=lambda x: x.metadata["number"] < 3)
    assert {x.id for x in few} == {"0", "1", "2"}
    assert store.similarity_search("text 7", filter={"odd": True}) == []
    assert (
        store.as_retriever(search_kwargs={"k": 1, "filter": {"number": 9}}).invoke("x")[0].id == "9"
    )
    with pytest.raises(SixfoldError, match="function or a dictionary"):
        store.similarity_search("text 7", filter=3)


def test_relevance_is_from_0_to_1() -> None:
    for metric in ("cosine", "l2"):
        pairs = filled(metric=metric).similarity_search_with_relevance_scores("text 3", k=40)
        assert all(0 <= score <= 1 for _, score in pairs)
        assert pairs[0][1] > 0.9
    with pytest.raises(SixfoldError, match="not bounded"):
        filled(metric="ip").similarity_search_with_relevance_scores("text 3")


def test_documents_unlike_each_other() -> None:
    store = filled()
    store.add_texts(["text 3"] * 3, ids=["a", "b", "c"])
    near = store.max_marginal_relevance_search("text 3", k=4, fetch_k=10, lambda_mult=0.3)
    assert [x.page_content for x in near].count("text 3") == 1
    assert len(near) == 4
    assert SixfoldVectorStore(EMBEDDING).max_marginal_relevance_search("x") == []


def test_files(tmp_path: Path) -> None:
    store, path = filled(), tmp_path / "store"
    store.add_documents([Document(page_content="ä😀", metadata={"list": [1, None, {"x": 2.5}]})])
    store.delete(["4"])
    store.save(path)
    again = SixfoldVectorStore.load(path, EMBEDDING)
    for text in ("text 3", "text 4", "ä😀"):
        expected = store.similarity_search_with_score(text, k=41)
        assert again.similarity_search_with_score(text, k=41) == expected
    again.add_texts(["another"])
    assert len(again.documents) == len(store.documents) + 1 == 41
    with pytest.raises(FormatError, match="'documents', expected a 'index'"):
        Index.load(path)
    index = Index(64, 4)
    index.add(np.ones(64))
    index.save(path)
    with pytest.raises(FormatError, match="'index', expected a 'documents'"):
        SixfoldVectorStore.load(path, EMBEDDING)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(SixfoldError, match="no documents"):
        SixfoldVectorStore(EMBEDDING).save(tmp_path / "store")
    store = filled(2)
    store.add_documents([Document(page_content="x", metadata={"path": tmp_path})])
    with pytest.raises(SixfoldError, match="JSON values"):
        store.save(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_all_or_none() -> None:
    store = filled(3)
    with pytest.raises(SixfoldError):
        store.add_texts(["a", "b"], ids=["one"])
    with pytest.raises(SixfoldError, match="finite"):
        store.documents.put(["a", "b"], np.array([[1.0] * 64, [np.nan] * 64]), ids=["a", "b"])
    with pytest.raises(SixfoldError):
        store.documents.put(["a"], np.ones((1, 63)))
    with pytest.raises(SixfoldError, match="pass the ids"):
        store.delete()
    assert len(store.documents) == 3
    assert store.get_by_ids(["a", "b", "2"]) == store.get_by_ids(["2"])
    with pytest.raises(SixfoldError, match="bits"):
        SixfoldVectorStore(EMBEDDING, bits=5)


def test_what_was_found_may_be_changed() -> None:
    store = filled(3)
    store.get_by_ids(["1"])[0].metadata["number"] = 99
    store.similarity_search("text 1")[0].metadata.clear()
    assert store.get_by_ids(["1"])[0].metadata["number"] == 1


def test_threads_and_tasks() -> None:
    store, failures = filled(), []

    def search() -> None:
        for _ in range(100):
            found = store.similarity_search("text 7", k=3)
            if found[0].page_content != "text 7" or len(found) != 3:
                failures.append(found)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(100):
        store.add_texts([f"more {i}"], ids=[f"more {i % 10}"])
        store.delete([f"more {(i + 5) % 10}"])
    for thread in threads:
        thread.join()
    assert not failures

    async def at_once() -> list[list[Document]]:
        await store.aadd_texts(["later"], ids=["later"])
        return await asyncio.gather(*(store.asimilarity_search("later", k=1) for _ in range(5)))

    assert [x[0].id for x in asyncio.run(at_once())] == ["later"] * 5
