"""The highest scores: the compiled kernel against the reference, and its laws."""

import math

import pytest
import torch
from torch import Tensor

from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels.encode import encode_pages
from sixfold.kernels.nearest import nearest, reference
from sixfold.kernels.types import Coding, VectorPages
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
    return VectorPages(codes[:, 0], scales[:, 0], added, allowed)


def queries_of(count: int, dim: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, weights and constants."""
    rest = gaussian(2, count, seed=seed + 1)
    return gaussian(count, dim, seed=seed), rest[0].contiguous(), rest[1].contiguous()


def exact_scores(queries: tuple[Tensor, Tensor, Tensor], pages: VectorPages, c: Coding) -> Tensor:
    """All scores in the order of the slots, by the reference."""
    count = pages.scales.numel()
    scores, slots = reference.nearest(*queries, pages, c, best=count)
    return torch.full_like(scores, -math.inf).scatter(1, slots.clamp(min=0), scores)


@pytest.mark.parametrize("offsets", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [1, 2, 2.5, 3, 4, 5, 8])
@pytest.mark.parametrize("dim", [1, 24, 64, 100, 384])
def test_scores_are_those_of_the_reference(
    dim: int, bits: Bits, offsets: torch.dtype | None
) -> None:
    c = coding_of(dim, bits)
    pages, queries = pages_of(5, c, offsets), queries_of(9, dim)
    scores, slots = cpu.nearest(*queries, pages, c, best=20)
    exact = exact_scores(queries, pages, c)
    # Six standard deviations of what 8 bits round off: of queries, and of levels, for vectors whose
    # coordinates are about 1.
    step = queries[0].abs().amax(1, keepdim=True) / 127
    rounding = (step**2 * dim + (0.02 * queries[0]).square().sum(1, keepdim=True)) / 12
    bound = 1e-3 + 6 * 1.3 * rounding.sqrt()
    assert (scores - exact.gather(1, slots)).abs().le(bound).all()
    worst, best_left = scores[:, -1], exact.scatter(1, slots, -math.inf).amax(1)
    assert (best_left - worst).le(2 * bound.amax(1)).all()


def test_scores_descend_and_equal_ones_by_slot() -> None:
    c = coding_of(64, 4)
    pages, queries = pages_of(3, c), queries_of(3, 64)
    # Every page the same: each score three times.
    same = VectorPages(*(x[:1].expand(3, -1).contiguous() for x in pages if x is not None))
    scores, slots = cpu.nearest(*queries, same, c, best=100)
    assert (scores.diff(dim=1) <= 0).all()
    ties = scores.diff(dim=1) == 0
    assert ties.sum() >= 3 * 60
    assert (slots.diff(dim=1)[ties] > 0).all()
    for bar in (1, 2, 4, 5):
        # Of what is cut off too.
        fewer = cpu.nearest(*queries, same, c, best=bar)
        assert torch.equal(fewer[1], slots[:, :bar])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_a_query_finds_depends_on_nothing_else(bits: Bits) -> None:
    c = coding_of(96, bits)
    pages, queries = pages_of(70, c), queries_of(150, 96)
    scores, slots = cpu.nearest(*queries, pages, c, best=11)
    for again in on_threads(lambda: cpu.nearest(*queries, pages, c, best=11), 1, 2, 3):
        assert torch.equal(again[0], scores)
        assert torch.equal(again[1], slots)
    for some in (slice(0, 1), slice(3, 5), slice(60, 140)):
        alone = cpu.nearest(*(x[some] for x in queries), pages, c, best=11)
        assert torch.equal(alone[0], scores[some])
        assert torch.equal(alone[1], slots[some])


@pytest.mark.parametrize("share", [0.0, 0.002, 0.3, 0.95])
def test_a_filter_is_what_it_leaves_of_the_whole_ranking(share: float) -> None:
    c = coding_of(64, 4)
    pages, queries = pages_of(20, c), queries_of(4, 64)
    count = 20 * PAGE_TOKENS
    bits = torch.rand(20, 8, 8, generator=generator(0)) < share
    packed = (bits * (1 << torch.arange(8))).sum(2).to(torch.uint8)
    scores, slots = cpu.nearest(*queries, pages, c, best=count)
    found = cpu.nearest(*queries, pages._replace(allowed=packed), c, best=30)
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
    none = VectorPages(*(x[:0] for x in pages if x is not None))
    scores, slots = nearest(*queries_of(2, 64), none, c, best=3)
    assert (scores == -math.inf).all()
    assert (slots == -1).all()
    scores, slots = nearest(*queries_of(0, 64), pages, c, best=3)
    assert scores.shape == slots.shape == (0, 3)


def test_scales_that_are_large_or_small() -> None:
    """Those whose sign is a flag."""
    c = coding_of(64, 4)
    x = gaussian(64, 64, seed=3) * torch.logspace(-20, 20, 64)[:, None]
    codes = torch.empty(1, 1, PAGE_TOKENS * row_bytes(*c.row), dtype=torch.uint8)
    scales = torch.empty(1, 1, PAGE_TOKENS, dtype=torch.float16)
    encode_pages(x[None, None], torch.zeros(1, 1).long(), c, "key", codes, scales)
    allowed = torch.full((1, 8), ALL, dtype=torch.uint8)
    pages = VectorPages(codes[:, 0], scales[:, 0], None, allowed)
    query = gaussian(2, 64, seed=5)
    zeros = torch.zeros(2)
    scores, slots = cpu.nearest(query, zeros, zeros, pages, c, best=64)
    exact = exact_scores((query, zeros, zeros), pages, c).gather(1, slots)
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
            nearest(*given, pages, c, best=2)
    if backend == "cpu":
        for name in ("scales", "offsets", "allowed"):
            cut = pages._replace(**{name: getattr(pages, name)[:1]})
            with pytest.raises(SixfoldError, match=name):
                nearest(query, weights, constants, cut, c, best=2)


@pytest.mark.parametrize("dim", [4, 60, 64, 68, 200, 1000])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_tiles_multiply_as_other_instructions_do(dim: int, bits: Bits) -> None:
    """Every integer sum is the same, and so is every score."""
    c = coding_of(dim, bits)
    pages, queries = pages_of(5, c), queries_of(45, dim)
    scores, slots = cpu.nearest(*queries, pages, c, best=30)
    for q in range(0, 45, 5):
        # So few are not worth tiles.
        alone = cpu.nearest(*(x[q : q + 3] for x in queries), pages, c, best=30)
        assert torch.equal(alone[0], scores[q : q + 3])
        assert torch.equal(alone[1], slots[q : q + 3])
