"""Python signal handlers that run while a kernel does: they may raise, and call kernels."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from sixfold.codebooks import centroids
from sixfold.kernels import _native, trellis
from sixfold.kernels.attention import attention
from sixfold.kernels.decode import decode, decode_pages
from sixfold.kernels.encode import encode, encode_pages
from sixfold.kernels.rotate import rotate
from sixfold.kernels.scores import scores
from sixfold.kernels.types import Coding, KeyMap, Pages, Past, Pool, Softmax, Tokens
from sixfold.packing import PAGE_TOKENS, row_bytes
from sixfold.rotation import Rotation
from sixfold.trellis import codewords
from tests.kernels.attention_cases import page_attention

pytestmark = [
    pytest.mark.skipif(isinstance(_native.extension(), str), reason=str(_native.extension())),
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals"),
]

DIM, BITS = 256, 3
BYTES = row_bytes(DIM, BITS)
PAGES = 6_000  # all the same one: long calls in little memory
CPU = torch.device("cpu")
# Dense: as slow as can be had.
ROTATION = Rotation(DIM, "orthogonal")
TURNS, FACTOR = ROTATION.turns(CPU), ROTATION.factor(CPU)
BOOK = centroids(DIM, BITS, CPU)
PATH_BOOK = codewords(128, 2)
CODING = Coding(TURNS, FACTOR, BOOK, BITS, DIM, "optimal")
TABLES: dict[str, Any] = {"turns": TURNS, "factor": FACTOR, "centroids": BOOK}


class Stop(Exception):
    """What a handler raises."""


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls that last longer than the 50 ms between two looks at pending signals."""
    monkeypatch.setenv("SIXFOLD_BACKEND", "cpu")
    monkeypatch.setenv("SIXFOLD_ISA", "portable")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def alarm(handler: Callable[[], object]) -> Iterator[None]:
    """Calls `handler` once, from the handler of a signal that comes while a kernel runs."""
    called: list[object] = []

    def on_signal(_: int, frame: FrameType | None) -> None:
        # Tensors are made elsewhere, which takes time too.
        if not called and frame is not None and frame.f_code.co_filename.endswith("cpu.py"):
            called.append(frame)
            handler()

    before = signal.signal(signal.SIGALRM, on_signal)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pool(slots: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (slots, 1, PAGE_TOKENS * BYTES)
    pages = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return pages, torch.ones(slots, 1, PAGE_TOKENS, dtype=torch.float16)


def query(seed: int, rows: int = 8) -> Tensor:
    return torch.randn(1, 1, rows, DIM, generator=torch.Generator().manual_seed(seed))


def attend_pages(seed: int = 0, pages: int = PAGES) -> Tensor:
    first_token = torch.zeros(1, 8, dtype=torch.int64)
    return page_attention(query(seed), held(pages), CODING, CODING, first_token).out


def held(pages: int) -> Pages:
    starts = torch.arange(pages)[None] * PAGE_TOKENS
    lengths = torch.full((1, pages), PAGE_TOKENS)
    slots = torch.zeros(1, pages, dtype=torch.int64)
    return Pages(Pool(*pool(), *pool()), slots, starts, lengths, 0)


def attend_layer(seed: int = 0, pages: int = PAGES) -> Tensor:
    none = torch.zeros(1, dtype=torch.int64)
    first = torch.tensor([pages * PAGE_TOKENS])
    recent = query(seed + 1)
    return attention(
        query(seed),
        [Tokens(recent, recent, first, none, first + 8)],
        Past.of([held(pages)], KeyMap(torch.zeros(1, 1, DIM), torch.ones(1, 1, DIM)), none),
        CODING,
        CODING,
        first,
        Softmax(0.1),
    )


def encode_whole_pages() -> None:
    x = torch.ones(1, 1, 1024 * PAGE_TOKENS, DIM)
    pages, scales = pool(1024)
    slots = torch.arange(1024)[None]
    encode_pages(x, slots, CODING, "key", pages, scales)


def decode_whole_pages() -> None:
    slots = torch.zeros(1, 1024, dtype=torch.int64)
    decode_pages(*pool(), slots, CODING, "key", torch.float32)


ROWS = 1 << 16
CALLS: dict[str, Callable[[], object]] = {
    "rotate": lambda: rotate(torch.ones(ROWS, DIM), TURNS, FACTOR),
    "encode": lambda: encode(torch.ones(ROWS, DIM), **TABLES, bits=BITS, scale="norm"),
    "decode": lambda: decode(
        torch.zeros(ROWS, BYTES, dtype=torch.uint8),
        torch.ones(ROWS, dtype=torch.float16),
        **TABLES,
        dim=DIM,
        bits=BITS,
    ),
    "scores": lambda: scores(
        torch.ones(256, DIM),
        torch.zeros(ROWS, BYTES, dtype=torch.uint8),
        torch.ones(ROWS, dtype=torch.float16),
        BOOK,
        bits=BITS,
    ),
    "encode_paths": lambda: trellis.encode(
        torch.ones(ROWS >> 5, DIM), TURNS, FACTOR, PATH_BOOK, bits=2, scale="norm"
    ),
    "decode_paths": lambda: trellis.decode(
        torch.zeros(ROWS, DIM // 4, dtype=torch.uint8),
        torch.ones(ROWS, dtype=torch.float16),
        TURNS,
        FACTOR,
        PATH_BOOK,
        dim=DIM,
        bits=2,
    ),
    "score_paths": lambda: trellis.scores(
        torch.ones(256, DIM),
        torch.zeros(ROWS, DIM // 4, dtype=torch.uint8),
        torch.ones(ROWS, dtype=torch.float16),
        PATH_BOOK,
        bits=2,
    ),
    "encode_pages": encode_whole_pages,
    "decode_pages": decode_whole_pages,
    "page_attention": attend_pages,
    "attention": attend_layer,
}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_handler_raises_is_what_the_caller_gets(name: str) -> None:
    def stop() -> None:
        raise Stop

    def until_stopped() -> None:
        for _ in range(1000):
            CALLS[name]()

    with alarm(stop), pytest.raises(Stop):
        until_stopped()


@pytest.mark.parametrize("attend", [attend_pages, attend_layer])
def test_a_handler_may_attend_itself(attend: Callable[..., Tensor]) -> None:
    expected, inner = attend(), attend(5, pages=1000)
    found: list[Tensor] = []
    with alarm(lambda: found.append(attend(5, pages=1000))):
        outer = attend()
    assert len(found) == 1
    assert torch.equal(found[0], inner)
    assert torch.equal(outer, expected)
