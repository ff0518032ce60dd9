"""Texts beside vectors: all or none, in threads, in one file."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sixfold.errors import FormatError, ShapeError, SixfoldError
from sixfold.index import Index
from sixfold.index.documents import KIND, Documents
from sixfold.index.files import save_index

DIM = 32
VECTORS = np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)


def filled(count: int = 50, **options: Any) -> Documents:
    documents = Documents(**options)
    texts = [f"text {i}" for i in range(count)]
    documents.put(
        texts, VECTORS[:count], [{"number": i} for i in range(count)], list(map(str, range(count)))
    )
    return documents


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_what_is_found_is_what_the_index_finds(metric: Any) -> None:
    documents, index = filled(metric=metric), Index(DIM, 4, metric)
    index.add(VECTORS[:50], list(map(str, range(50))))
    scores, ids = index.search(VECTORS[7], 5)
    found = documents.search(VECTORS[7], 5)
    assert [x.document.id for x in found] == ids.tolist()
    assert [x.score for x in found] == scores.tolist()
    assert found[0].document == ("7", "text 7", {"number": 7})
    few = documents.search(VECTORS[7], 5, lambda x: x.metadata["number"] in (3, 8))
    assert {x.document.id for x in few} == {"3", "8"}
    assert documents.search(VECTORS[7], where=lambda _: False) == []


def test_ids() -> None:
    documents = Documents()
    assert documents.search(VECTORS[0]) == documents.get(["a"]) == []
    assert documents.put([], []) == []
    ids = documents.put(["a", "b", "c"], VECTORS[:3], ids=["x", None, "x"])
    assert ids[::2] == ["x", "x"]
    assert [x.text for x in documents.get(["x", ids[1], "nobody"])] == ["c", "b"]
    assert len(documents) == 2
    assert documents.remove(["x", "nobody", "x"]) == 1
    assert documents.remove([]) == 0
    assert [x.document.text for x in documents.search(VECTORS[0], 9)] == ["b"]
    documents.remove(ids)
    assert documents.search(VECTORS[0]) == []
    assert documents.vectors([]).shape == (0, DIM)


@pytest.mark.parametrize(
    ("texts", "vectors", "metadata", "ids"),
    [
        (["a", "b"], VECTORS[:1], None, None),
        (["a"], VECTORS[0], None, None),
        (["a"], VECTORS[:1, :5], None, None),
        (["a", "b"], [[1.0] * DIM, [np.nan] * DIM], None, ["50", "51"]),
        (["a", "b"], VECTORS[:2], [{}], None),
        (["a", "b"], VECTORS[:2], None, ["50"]),
        (["a", 3], VECTORS[:2], None, None),
        (["a", "b"], VECTORS[:2], [{}, 3], None),
        (["a", "b"], VECTORS[:2], [{}, {3: 3}], None),
        (["a", "b"], VECTORS[:2], None, ["50", 3]),
        ("ab", VECTORS[:2], None, None),
    ],
)
def test_all_or_none(texts: Any, vectors: Any, metadata: Any, ids: Any) -> None:
    documents = filled()
    before = documents.search(VECTORS[0], 50)
    with pytest.raises((SixfoldError, ShapeError)):
        documents.put(texts, vectors, metadata, ids)
    assert documents.search(VECTORS[0], 50) == before
    assert len(documents) == 50


def test_a_file_holds_everything(tmp_path: Path) -> None:
    documents, path = filled(bits=2, metric="l2"), tmp_path / "documents"
    documents.put(["ä😀\0"], VECTORS[55:56], [{"deep": [1, None, {"x": 2.5}]}], [""])
    documents.remove(["3"])
    documents.save(path)
    again = Documents.load(path)
    assert (again.bits, again.metric, len(again)) == (2, "l2", 50)
    for vector in VECTORS[:5]:
        assert again.search(vector, 50) == documents.search(vector, 50)
    assert again.get([""]) == documents.get([""])
    again.put(["more"], VECTORS[:1])
    assert len(again) == 51


def test_what_cannot_be_saved_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(SixfoldError, match="no documents"):
        Documents().save(tmp_path / "documents")
    documents = filled(3)
    documents.put(["x"], VECTORS[:1], [{"path": tmp_path}])
    with pytest.raises(SixfoldError, match="JSON values"):
        documents.save(tmp_path / "documents")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"3",
        b"[3]",
        b"[[1, 2, 3]]",
        b'[["0", "text"]]',
        b'[["0", "text", {}], ["2", "text", {}]]',
        b'[["0", "text", {}]]',
        b'[["0", "text", {}], ["1", "text", 3]]',
        b'[["0", "\xff", {}], ["1", "text", {}]]',
        b"[" * 100_000,
    ],
)
def test_damaged_documents_are_refused(text: bytes, tmp_path: Path) -> None:
    index = Index(DIM, 4)
    index.add(VECTORS[:2], ["0", "1"])
    letters = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)
    save_index(tmp_path / "damaged", index._state, KIND, {"documents": letters})
    with pytest.raises(FormatError):
        Documents.load(tmp_path / "damaged")


def test_files_of_another_kind(tmp_path: Path) -> None:
    filled().save(tmp_path / "documents")
    with pytest.raises(FormatError, match="'documents', expected a 'index'"):
        Index.load(tmp_path / "documents")
    index = Index(DIM, 4)
    index.add(VECTORS)
    index.save(tmp_path / "index")
    with pytest.raises(FormatError, match="'index', expected a 'documents'"):
        Documents.load(tmp_path / "index")
    save_index(tmp_path / "bare", index._state, KIND)
    with pytest.raises(FormatError, match="describes no index"):
        Documents.load(tmp_path / "bare")


def test_searches_beside_changes_miss_nothing() -> None:
    documents, failures = filled(), []
    done = threading.Event()

    def search() -> None:
        while not done.is_set():
            found = documents.search(VECTORS[7], 5)
            if len(found) != 5 or found[0].document.id != "7":
                failures.append(found)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(200):
        documents.put(
            [f"more {i}"], VECTORS[7:8] * 0.9 + 0.1 * VECTORS[i % 50], ids=[f"more {i % 9}"]
        )
        documents.remove([f"more {(i + 5) % 9}"])
    done.set()
    for thread in threads:
        thread.join()
    assert not failures


class Interrupt(BaseException):
    """What a user's key raises."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", ["put", "replace", "remove"])
def test_an_interrupted_change_is_made_or_not(
    operation: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, name = filled(), "remove" if operation == "remove" else "add"
    own = getattr(Index, name)

    def interrupted(*args: Any, **options: Any) -> None:
        if when == "after":
            own(*args, **options)
        raise Interrupt

    changes: dict[str, Callable[[], Any]] = {
        "put": lambda: documents.put(["new"], VECTORS[7:8], ids=["new"]),
        "replace": lambda: documents.put(["new"], VECTORS[7:8], ids=["7"]),
        "remove": lambda: documents.remove(["7"]),
    }
    with monkeypatch.context() as patched:
        patched.setattr(Index, name, interrupted)
        with pytest.raises(Interrupt):
            changes[operation]()
    made = when == "after"
    expected = {"put": 50 + made, "replace": 50, "remove": 50 - made}[operation]
    assert len(documents) == expected
    texts = {x.document.text for x in documents.search(VECTORS[7], 2)}
    assert ("new" in texts) == (made and operation != "remove")
    documents.save(tmp_path / "documents")
    assert len(Documents.load(tmp_path / "documents")) == expected
    assert documents.remove(["7"]) == (0 if made and operation == "remove" else 1)


def test_a_score_is_that_of_the_text_beside_it() -> None:
    documents, failures, done = filled(), [], threading.Event()

    def search() -> None:
        while not done.is_set():
            for found in documents.search(VECTORS[0], 50):
                near = found.score > 0.9
                if found.document.id == "x" and near != (found.document.text == "near"):
                    failures.append(found)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(300):
        vector = VECTORS[:1] if i % 2 else -VECTORS[:1]
        documents.put(["near" if i % 2 else "far"], vector, ids=["x"])
    done.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_texts_that_were_cut(tmp_path: Path) -> None:
    documents = Documents()
    documents.put(["\ud83d"], VECTORS[:1], [{"x": "\ude00"}], ["a"])
    documents.save(tmp_path / "documents")
    assert Documents.load(tmp_path / "documents").get(["a"]) == documents.get(["a"])
    with pytest.raises(SixfoldError, match="UTF-8"):
        documents.put(["x"], VECTORS[:1], ids=["\ud83d"])


def test_metadata_is_of_its_own() -> None:
    documents, about = Documents(), {"list": [1]}
    documents.put(["x"], VECTORS[:1], [about], ["x"])
    about["list"].append(2)
    assert documents.get(["x"])[0].metadata == {"list": [1]}


def test_metadata_is_what_json_says(tmp_path: Path) -> None:
    documents = Documents()
    about = {"text": "x", "number": 1.5, "nothing": None, "list": [1, [2]], "nan": float("nan")}
    documents.put(["x"], VECTORS[:1], [about], ["x"])
    documents.save(tmp_path / "x")
    [found] = Documents.load(tmp_path / "x").get(["x"])
    assert json.dumps(found.metadata) == json.dumps(about)
