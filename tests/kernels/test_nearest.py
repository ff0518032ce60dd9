"""The highest scores: the compiled kernel against the reference, and its laws."""

import math

import pytest
import torch
from torch import Tensor

from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels.encode import encode_pages
from sixfold.kernels.nearest import nearest, reference
from sixfold.kernels.types import Coding, VectorPages, VectorPart
from sixfold.packing import PAGE_TOKENS, Bits, row_bytes
from tests.kernels.vector_cases import coding_of
from tests.threads import on_threads
from tests.vectors import gaussian, generator

_cpu = pytest.importorskip("sixfold._cpu")
cpu = pytest.importorskip("sixfold.kernels.nearest.cpu")
ALL = (1 << 8) - 1


@pytest.fixture(autouse=True, params=[*_cpu.available_isas(), "without tiles"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on every instruction set of this processor, the best also without AMX."""
    if request.param == "without tiles":
        if not _cpu.multiplies_tiles():
            pytest.skip("this processor has no AMX")
        monkeypatch.setenv("SIXFOLD_AMX", "0")
        assert not _cpu.multiplies_tiles()
    else:
        monkeypatch.setenv("SIXFOLD_ISA", request.param)
    return str(request.param)


def pages_of(
    count: int, coding: Coding, offsets: torch.dtype | None = torch.float32, seed: int = 0
) -> VectorPages:
    """`count` pages of vectors, all of which count."""
    x = gaussian(count * PAGE_TOKENS, coding.dim, seed=seed)
    codes = torch.empty(count, 1, PAGE_TOKENS * row_bytes(*coding.row), dtype=torch.uint8)
    scales = torch.empty(count, 1, PAGE_TOKENS, dtype=torch.float16)
    encode_pages(x[None, None], torch.arange(count)[None], coding, "key", codes, scales)
    added = None
    if offsets is not None:
        added = torch.randn(count, PAGE_TOKENS, generator=generator(seed)).to(offsets)
    allowed = torch.full((count, 8), ALL, dtype=torch.uint8)
    return VectorPages([VectorPart(codes[:, 0], scales[:, 0], coding)], added, allowed)


def queries_of(count: int, dim: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, weights and constants."""
    rest = gaussian(2, count, seed=seed + 1)
    return gaussian(count, dim, seed=seed), rest[0].contiguous(), rest[1].contiguous()


def taken(pages: VectorPages, which: Tensor | slice) -> VectorPages:
    """Some of the pages, or some of them again and again."""
    parts = [VectorPart(x.codes[which], x.scales[which], x.coding) for x in pages.parts]
    offsets = None if pages.offsets is None else pages.offsets[which]
    return VectorPages(parts, offsets, pages.allowed[which])


def exact_scores(queries: tuple[Tensor, Tensor, Tensor], pages: VectorPages) -> Tensor:
    """All scores in the order of the slots, by the reference."""
    count = len(pages.allowed) * PAGE_TOKENS
    scores, slots = reference.nearest(*queries, pages, best=count)
    return torch.full_like(scores, -math.inf).scatter(1, slots.clamp(min=0), scores)


@pytest.mark.parametrize("offsets", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [1, 2, 2.5, 3, 4, 5, 8])
@pytest.mark.parametrize("dim", [1, 24, 64, 100, 384])
def test_scores_are_those_of_the_reference(
    dim: int, bits: Bits, offsets: torch.dtype | None
) -> None:
    c = coding_of(dim, bits)
    pages, queries = pages_of(5, c, offsets), queries_of(9, dim)
    scores, slots = cpu.nearest(*queries, pages, best=20)
    exact = exact_scores(queries, pages)
    # Six standard deviations of what 8 bits round off: of queries, and of levels, for vectors whose
    # coordinates are about 1.
    step = queries[0].abs().amax(1, keepdim=True) / 127
    rounding = (step**2 * dim + (0.02 * queries[0]).square().sum(1, keepdim=True)) / 12
    bound = 1e-3 + 6 * 1.3 * rounding.sqrt()
    assert (scores - exact.gather(1, slots)).abs().le(bound).all()
    worst, best_left = scores[:, -1], exact.scatter(1, slots, -math.inf).amax(1)
    assert (best_left - worst).le(2 * bound.amax(1)).all()


GROUPS: list[list[tuple[int, Bits]]] = [
    [(32, 8), (64, 4), (96, 2), (32, 1)],
    [(60, 3), (20, 8)],
    [(1, 4)] * 8,
    [(64, 2.5), (24, 5)],
]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("count", [1, 6, 45])
def test_scores_of_parts_are_added(groups: list[tuple[int, Bits]], count: int) -> None:
    """Groups of coordinates with bits of their own: their scores alone, summed."""
    each = [pages_of(5, coding_of(dim, bits), seed=dim) for dim, bits in groups]
    pages = each[0]._replace(parts=[one.parts[0] for one in each])
    queries = queries_of(count, sum(dim for dim, _ in groups))
    every = 5 * PAGE_TOKENS
    scores, slots = cpu.nearest(*queries, pages, best=every)
    zeros = torch.zeros(count)
    total = torch.zeros(count, every).addcmul(queries[1][:, None], each[0].offsets.flatten())
    total += queries[2][:, None]
    for own, one in zip(queries[0].split([dim for dim, _ in groups], 1), each, strict=True):
        found, where = cpu.nearest(own, zeros, zeros, one._replace(offsets=None), best=every)
        total += torch.zeros_like(found).scatter(1, where, found)
    torch.testing.assert_close(scores, total.gather(1, slots), rtol=1e-5, atol=1e-4)
    assert (scores.diff(dim=1) <= 0).all()
    exact = exact_scores(queries, pages).gather(1, slots)
    assert (scores - exact).norm() < 0.03 * exact.norm()
    if count > 1:
        alone = cpu.nearest(*(x[1:2] for x in queries), pages, best=every)
        assert torch.equal(alone[0], scores[1:2])
        assert torch.equal(alone[1], slots[1:2])


def test_scores_descend_and_equal_ones_by_slot() -> None:
    c = coding_of(64, 4)
    pages, queries = pages_of(3, c), queries_of(3, 64)
    # Every page the same: each score three times.
    same = taken(pages, torch.zeros(3, dtype=torch.int64))
    scores, slots = cpu.nearest(*queries, same, best=100)
    assert (scores.diff(dim=1) <= 0).all()
    ties = scores.diff(dim=1) == 0
    assert ties.sum() >= 3 * 60
    assert (slots.diff(dim=1)[ties] > 0).all()
    for bar in (1, 2, 4, 5):
        # Of what is cut off too.
        fewer = cpu.nearest(*queries, same, best=bar)
        assert torch.equal(fewer[1], slots[:, :bar])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_a_query_finds_depends_on_nothing_else(bits: Bits) -> None:
    c = coding_of(96, bits)
    pages, queries = pages_of(70, c), queries_of(150, 96)
    scores, slots = cpu.nearest(*queries, pages, best=11)
    for again in on_threads(lambda: cpu.nearest(*queries, pages, best=11), 1, 2, 3):
        assert torch.equal(again[0], scores)
        assert torch.equal(again[1], slots)
    for some in (slice(0, 1), slice(3, 5), slice(60, 140)):
        alone = cpu.nearest(*(x[some] for x in queries), pages, best=11)
        assert torch.equal(alone[0], scores[some])
        assert torch.equal(alone[1], slots[some])


@pytest.mark.parametrize("share", [0.0, 0.002, 0.3, 0.95])
def test_a_filter_is_what_it_leaves_of_the_whole_ranking(share: float) -> None:
    c = coding_of(64, 4)
    pages, queries = pages_of(20, c), queries_of(4, 64)
    count = 20 * PAGE_TOKENS
    bits = torch.rand(20, 8, 8, generator=generator(0)) < share
    packed = (bits * (1 << torch.arange(8))).sum(2).to(torch.uint8)
    scores, slots = cpu.nearest(*queries, pages, best=count)
    found = cpu.nearest(*queries, pages._replace(allowed=packed), best=30)
    allowed = bits.flatten()
    for q in range(4):
        left = allowed[slots[q]]
        wanted = min(30, int(left.sum()))
        assert torch.equal(found[1][q, :wanted], slots[q][left][:30])
        assert torch.equal(found[0][q, :wanted], scores[q][left][:30])
        assert (found[1][q, wanted:] == -1).all()
        assert (found[0][q, wanted:] == -math.inf).all()


def test_nothing_is_read_where_there_is_nothing() -> None:
    c = coding_of(64, 4)
    pages = pages_of(2, c)
    none = taken(pages, slice(0))
    scores, slots = nearest(*queries_of(2, 64), none, best=3)
    assert (scores == -math.inf).all()
    assert (slots == -1).all()
    scores, slots = nearest(*queries_of(0, 64), pages, best=3)
    assert scores.shape == slots.shape == (0, 3)


def test_scales_that_are_large_or_small() -> None:
    """Those whose sign is a flag."""
    c = coding_of(64, 4)
    x = gaussian(64, 64, seed=3) * torch.logspace(-20, 20, 64)[:, None]
    codes = torch.empty(1, 1, PAGE_TOKENS * row_bytes(*c.row), dtype=torch.uint8)
    scales = torch.empty(1, 1, PAGE_TOKENS, dtype=torch.float16)
    encode_pages(x[None, None], torch.zeros(1, 1).long(), c, "key", codes, scales)
    allowed = torch.full((1, 8), ALL, dtype=torch.uint8)
    pages = VectorPages([VectorPart(codes[:, 0], scales[:, 0], c)], None, allowed)
    query = gaussian(2, 64, seed=5)
    zeros = torch.zeros(2)
    scores, slots = cpu.nearest(query, zeros, zeros, pages, best=64)
    exact = exact_scores((query, zeros, zeros), pages).gather(1, slots)
    length = x.double().norm(dim=1)[slots] * query.norm(dim=1, keepdim=True)
    assert ((scores - exact).abs() <= 0.01 * length).all()
    assert scores.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_arguments_that_do_not_fit(
    backend: str, monkeypatch: pytest.MonkeyPatch, unhooked: None
) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", backend)
    c = coding_of(64, 4)
    pages, (query, weights, constants) = pages_of(2, c), queries_of(3, 64)
    for given in (
        (query[:, :32], weights, constants),
        (query, weights[:2], constants),
        (query, weights, constants[:2]),
    ):
        with pytest.raises(ShapeError):
            nearest(*given, pages, best=2)
    if backend == "cpu":
        (part,) = pages.parts
        for name, cut in {
            "scales": pages._replace(parts=[part._replace(scales=part.scales[:1])]),
            "codes": pages._replace(parts=[part._replace(codes=part.codes[:1])]),
            "offsets": pages._replace(offsets=torch.zeros(1, PAGE_TOKENS)),
        }.items():
            with pytest.raises(SixfoldError, match=name):
                nearest(query, weights, constants, cut, best=2)
    for parts in ([], [*pages.parts] * 9):
        with pytest.raises(ShapeError, match="1 to 8 parts"):
            nearest(query, weights, constants, pages._replace(parts=parts), best=2)


@pytest.mark.parametrize("dim", [4, 60, 64, 68, 200, 1000])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_tiles_multiply_as_other_instructions_do(dim: int, bits: Bits) -> None:
    """Every integer sum is the same, and so is every score."""
    c = coding_of(dim, bits)
    pages, queries = pages_of(5, c), queries_of(45, dim)
    scores, slots = cpu.nearest(*queries, pages, best=30)
    for q in range(0, 45, 5):
        # So few are not worth tiles.
        alone = cpu.nearest(*(x[q : q + 3] for x in queries), pages, best=30)
        assert torch.equal(alone[0], scores[q : q + 3])
        assert torch.equal(alone[1], slots[q : q + 3])
