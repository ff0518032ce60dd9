"""A batch of sequences of different lengths, in memory of somebody else's: each as if alone."""

import dataclasses
import os
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sixfold.codebooks import centroids
from sixfold.errors import ShapeError
from sixfold.kernels._dispatch import available_backends
from sixfold.kernels._native import extension
from sixfold.kernels.attention import attention
from sixfold.kernels.decode import decode_pages
from sixfold.kernels.encode import store_pages
from sixfold.kernels.types import CodeName, Coding, KeyMap, Pages, Past, Pool, Softmax, Tokens
from sixfold.packing import PAGE_TOKENS, Bits, Layout, row_bytes
from sixfold.rotation import Rotation
from sixfold.trellis import codewords
from tests.kernels.attention_cases import page_attention

CPU = torch.device("cpu")
HEADS, KV_HEADS, KEY_DIM, VALUE_DIM = 4, 2, 32, 48
KEY_BITS, VALUE_BITS = 4, 2.5
SINKS = 3
_EXTENSION = extension()
ISAS = [] if isinstance(_EXTENSION, str) else _EXTENSION.available_isas()
BACKENDS = [
    "reference",
    *(f"cpu {isa}" for isa in ISAS),
    # Interpreted: see test_attention_layers_triton.py for a batch that `make test` can wait for.
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in available_backends("attention")
        if name == "triton"
    ),
]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend, and every instruction set of it."""
    name, _, isa = request.param.partition(" ")
    monkeypatch.setenv("SIXFOLD_BACKEND", name)
    monkeypatch.setenv("SIXFOLD_CPU_EXACT", "1")
    if isa:
        monkeypatch.setenv("SIXFOLD_ISA", isa)
    return name


@pytest.fixture(params=get_args(CodeName))
def code(request: pytest.FixtureRequest, backend: str) -> CodeName:
    """What the pages hold."""
    if backend == "triton" and request.param == "trellis":
        pytest.skip("there is no Triton kernel of paths")
    found: CodeName = request.param
    return found


Codings = tuple[Coding, Coding]


def codings(code: CodeName) -> Codings:
    def coding(dim: int, bits: Bits, layout: Layout) -> Coding:
        rotation = Rotation(dim)
        book = codewords(128, bits) if code == "trellis" else centroids(dim, bits)
        scale = "unbiased" if layout == "key" else "optimal"
        return Coding(rotation.turns(CPU), rotation.factor(CPU), book, bits, dim, scale, code)

    return coding(KEY_DIM, KEY_BITS, "key"), coding(VALUE_DIM, VALUE_BITS, "value")


CODINGS = codings("codebook")


def page_bytes(one: Coding) -> int:
    return PAGE_TOKENS * row_bytes(*one.row)


def engine_pool(slots: int, codings: Codings = CODINGS) -> Pool:
    """Pages as an engine holds them: all of a head's page together, heads in blocks, and a gap."""
    sizes = [page_bytes(codings[0]), 128, page_bytes(codings[1]), 128]
    block = torch.full((slots, KV_HEADS + 1, sum(sizes) + 64), 0x7E, dtype=torch.uint8)
    keys, key_scales, values, value_scales = block[:, 1:, 64:].split(sizes, 2)
    scales = (x.view(torch.float16) for x in (key_scales, value_scales))
    return Pool(keys, next(scales), values, next(scales))


@dataclasses.dataclass
class Sequence:
    """One sequence: what it attends with, and what it holds."""

    query: Tensor  # [1, heads, queries, dim], of the last tokens
    keys: Tensor  # [1, kv_heads, tokens, dim], all of them
    values: Tensor
    map_index: int
    start: int  # tokens before are padding

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def pages(self) -> int:
        """Whole pages before the queries' own tokens."""
        return (self.tokens - self.query.shape[2]) // PAGE_TOKENS

    @property
    def recent(self) -> int:
        return self.tokens - self.pages * PAGE_TOKENS


def sequence(tokens: int, queries: int, seed: int, dtype: torch.dtype) -> Sequence:
    generator = torch.Generator().manual_seed(seed)

    def gaussian(heads: int, count: int, dim: int) -> Tensor:
        return torch.randn(1, heads, count, dim, generator=generator).to(dtype)

    return Sequence(
        gaussian(HEADS, queries, KEY_DIM),
        gaussian(KV_HEADS, tokens, KEY_DIM) + 3,
        gaussian(KV_HEADS, tokens, VALUE_DIM),
        seed % 3,
        min(seed % 5, tokens - queries),
    )


def maps() -> KeyMap:
    generator = torch.Generator().manual_seed(9)
    shape = 3, KV_HEADS, KEY_DIM
    scale = torch.rand(shape, generator=generator) + 0.5
    return KeyMap(3 + torch.randn(shape, generator=generator), scale)


@dataclasses.dataclass
class Batch:
    """Sequences in shared memory: pages in a pool, recent tokens and sinks in rows of others."""

    sequences: list[Sequence]
    pool: Pool
    codings: Codings
    arguments: dict[str, Any]

    @classmethod
    def of(cls, sequences: list[Sequence], codings: Codings = CODINGS, *, seed: int = 0) -> "Batch":
        generator = torch.Generator().manual_seed(seed)
        dtype, batch = sequences[0].query.dtype, len(sequences)
        most = max(max(s.pages for s in sequences), 1)
        slots = torch.randperm(batch * most + 3, generator=generator)[: batch * most]
        slots = slots.view(batch, most)
        pool = engine_pool(batch * most + 3, codings)
        room = max(s.recent for s in sequences) + 2
        rows = torch.randperm(batch + 2, generator=generator)[:batch]
        # Tokens before heads, as engines have them.
        window = [
            torch.full((batch + 2, room, KV_HEADS, dim), torch.nan, dtype=dtype).transpose(1, 2)
            for dim in (KEY_DIM, VALUE_DIM)
        ]
        lengths = torch.zeros(batch, most, dtype=torch.int64)
        every = maps()
        for b, one in enumerate(sequences):
            coded, where = one.pages * PAGE_TOKENS, slots[b : b + 1, : one.pages]
            own = every._replace(map_index=torch.tensor([one.map_index]))
            held = one.keys[:, :, :coded], one.values[:, :, :coded]
            store_pages(*held, where, pool, *codings, own)
            lengths[b, : one.pages] = PAGE_TOKENS
            for x, new in zip(window, (one.keys, one.values), strict=True):
                x[rows[b], :, : one.recent] = new[0, :, coded:]

        def each(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers)

        start = each([s.start for s in sequences])
        stop = each([s.tokens for s in sequences])
        end = start + SINKS
        first = each([s.pages * PAGE_TOKENS for s in sequences])
        sinks = [
            torch.cat([getattr(s, name)[:, :, s.start : s.start + SINKS] for s in sequences])
            for name in ("keys", "values")
        ]
        return cls(
            sequences,
            pool,
            codings,
            {
                "query": torch.cat([s.query for s in sequences]),
                "tokens": [
                    Tokens(sinks[0], sinks[1], start, start, torch.minimum(end, stop)),
                    Tokens(*window, first, end, stop, rows),
                ],
                "pages": [Pages(pool, slots, torch.arange(most)[None] * PAGE_TOKENS, lengths, 0)],
                "key_map": every._replace(map_index=each([s.map_index for s in sequences])),
                "position": each([s.tokens - s.query.shape[2] for s in sequences]),
                "start": end,
                "scaling": KEY_DIM**-0.5,
            },
        )

    def attend(self, **options: Any) -> Tensor:
        arguments = self.arguments | options
        known = {name: arguments.pop(name) for name in ("pages", "key_map", "start")}
        query, tokens = arguments.pop("query"), arguments.pop("tokens")
        past = arguments.pop("past", None) or self.past(**known)
        position = arguments.pop("position")
        return attention(query, tokens, past, *self.codings, position, Softmax(**arguments))

    def past(self, **options: Any) -> Past:
        known = self.arguments | options
        return Past.of(known["pages"], known["key_map"], known["start"])


def check_each(
    sequences: list[Sequence], code: CodeName, mask: Tensor | None = None, **options: Any
) -> None:
    """What a batch gives each sequence is what it gets alone."""
    coded = codings(code)
    batch = Batch.of(sequences, coded)
    together = batch.attend(mask=mask, **options)
    assert together.isfinite().all()
    for b, one in enumerate(sequences):
        own = None if mask is None else mask[b : b + 1, ..., : one.tokens]
        alone = Batch.of([one], coded, seed=7).attend(mask=own, **options)
        tolerance = 2e-2 if one.query.dtype is torch.bfloat16 else 2e-5
        # Tensor cores take operands of 11 bits, in units that depend on where a split begins.
        tolerance = max(tolerance, 4e-3 * (os.environ["SIXFOLD_BACKEND"] == "triton"))
        torch.testing.assert_close(
            together[b : b + 1], alone, rtol=tolerance, atol=tolerance, msg=f"sequence {b}"
        )


def lengths_around_pages(most: int = 3) -> list[int]:
    return [PAGE_TOKENS * n + off for n in range(1, most + 1) for off in (-1, 0, 1)]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 70},
    {"sliding_window": 20},
    {"softcap": 2.0},
    {"sink_logits": torch.linspace(-1, 2, HEADS)},
    {"sliding_window": 100, "softcap": 5.0, "sink_logits": torch.zeros(HEADS)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: "-".join(x) or "plain")
def test_contexts_around_pages(options: dict[str, Any], code: CodeName) -> None:
    sequences = [
        sequence(tokens, 1, seed, torch.float32)
        for seed, tokens in enumerate([*lengths_around_pages(), 30, 200])
    ]
    check_each(sequences, code, **options)


@pytest.mark.parametrize("queries", [3, 20])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=lambda x: "-".join(x) or "plain")
def test_several_queries(options: dict[str, Any], queries: int, code: CodeName) -> None:
    lengths = (queries + 8, 64 + queries, 100, 193)
    sequences = [sequence(n, queries, n, torch.float32) for n in lengths]
    check_each(sequences, code, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype, code: CodeName) -> None:
    check_each([sequence(n, 1, n, dtype) for n in (65, 10, 150)], code)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_are_columns_of_positions(kind: str, code: CodeName) -> None:
    lengths = 60, 130, 65, 200
    seen = torch.rand(4, 1, 2, 200, generator=torch.Generator().manual_seed(3)) < 0.7
    seen[..., 5] = True
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    check_each([sequence(n, 2, n, torch.float32) for n in lengths], code, mask)


def test_sixty_four_sequences(backend: str, code: CodeName) -> None:
    if backend == "triton":
        pytest.skip("the interpreter takes long, and nothing here is new to it")
    check_each([sequence(8 + 3 * n, 1, n, torch.float32) for n in range(64)], code)


def test_sequences_that_hold_no_page(code: CodeName) -> None:
    check_each([sequence(n, 1, n, torch.float32) for n in (20, 64, 9)], code)


def test_pages_of_different_starts() -> None:
    """Pages that were cropped differ in what is valid of them, sequence by sequence."""
    batch = Batch.of([sequence(n, 1, n, torch.float32) for n in (200, 200)])
    (pages,) = batch.arguments["pages"]
    lengths = torch.tensor([[64, 10, 64], [5, 64, 64]])
    cropped = pages._replace(lengths=lengths, starts=lengths.cumsum(1) - lengths)
    query = torch.randn(2, HEADS, 1, KEY_DIM)
    first = torch.tensor([[70], [3]])
    together = page_attention(query, cropped, *CODINGS, first)
    for b in range(2):
        row = slice(b, b + 1)
        own = Pages(batch.pool, *(x[row] for x in cropped[1:4]), 0)
        alone = page_attention(query[row], own, *CODINGS, first[row])
        torch.testing.assert_close(together.out[row], alone.out, rtol=4e-3, atol=4e-3)
        torch.testing.assert_close(together.lse[row], alone.lse, rtol=4e-3, atol=4e-3)
        # Valid tokens alone count, whatever the pages beyond them hold.
        logits = torch.zeros(0)
        keys = decode_keys(own, int(lengths[b].sum()), lengths[b])
        hidden = torch.arange(keys.shape[2]) < first[b]
        grouped = query[row].unflatten(1, (KV_HEADS, -1)).flatten(2, 3)
        logits = (grouped @ keys.mT).masked_fill(hidden, -torch.inf)
        torch.testing.assert_close(
            together.lse[row].flatten(), logits.logsumexp(-1).flatten(), rtol=4e-3, atol=4e-3
        )


def decode_keys(pages: Pages, tokens: int, lengths: Tensor) -> Tensor:
    """Keys in the rotated domain."""
    bare = CODINGS[0]._replace(turns=torch.empty(0, 2, KEY_DIM // 2), factor=torch.eye(KEY_DIM))
    dense = decode_pages(*pages.pool[:2], pages.slots, bare, "key", torch.float32)
    valid = (torch.arange(PAGE_TOKENS) < lengths[:, None]).flatten()
    assert int(valid.sum()) == tokens
    return dense[:, :, valid]


def test_foreign_memory_is_written_where_it_is() -> None:
    """Codes land in the engine's blocks, bit for bit as in memory of our own; gaps stay."""
    one = sequence(3 * PAGE_TOKENS, 1, 1, torch.bfloat16)
    slots = torch.tensor([[4, 0, 2]])
    key_map = maps()._replace(map_index=torch.tensor([2]))
    foreign = engine_pool(5)
    before = foreign.key_codes.untyped_storage().tolist()
    own = Pool(*(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in foreign))
    for pool in (foreign, own):
        store_pages(one.keys, one.values, slots, pool, *CODINGS, key_map)
    for ours, theirs in zip(own, foreign, strict=True):
        assert torch.equal(ours[slots[0]], theirs[slots[0]])
    for name in ("key_codes", "value_codes"):
        assert (getattr(foreign, name)[[1, 3]] == 0x7E).all()
    after = foreign.key_codes.untyped_storage().tolist()
    written = 3 * KV_HEADS * (page_bytes(CODINGS[0]) + page_bytes(CODINGS[1]) + 256)
    assert sum(x != y for x, y in zip(before, after, strict=True)) <= written
    arguments = slots, CODINGS[0], "key", torch.float32, key_map
    decoded = [decode_pages(*pool[:2], *arguments) for pool in (foreign, own)]
    assert torch.equal(*decoded)


def test_what_is_hidden_may_hold_anything() -> None:
    """Before `start`, under a mask, outside of a window: NaN there reaches no result."""
    lengths = 200, 150
    sequences = [sequence(n, 1, n, torch.float32) for n in lengths]
    mask = torch.ones(2, 1, 1, 200, dtype=torch.bool)
    mask[..., :64] = False
    mask[..., 140:145] = False
    for options in ({"sliding_window": 60}, {"mask": mask}):
        batch = Batch.of(sequences)
        expected = batch.attend(**options)
        (pages,) = batch.arguments["pages"]
        for name in ("key_scales", "value_scales"):
            getattr(batch.pool, name)[pages.slots[:, 0]] = torch.nan
        window = batch.arguments["tokens"][1]
        for b in range(2):
            first = int(window.first[b])
            hidden = slice(max(140 - first, 0), max(145 - first, 0))
            if "mask" in options:
                window.keys[window.slots[b], :, hidden] = torch.nan
                window.values[window.slots[b], :, hidden] = torch.nan
        assert torch.equal(batch.attend(**options), expected)


def test_tables_may_be_views() -> None:
    batch = Batch.of([sequence(n, 1, n, torch.float32) for n in (150, 20, 200)])
    expected = batch.attend()

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x + 1], -1)[..., 0]

    arguments = batch.arguments
    arguments["tokens"] = [
        Tokens(x.keys, x.values, *(y if y is None else strided(y) for y in x[2:]))
        for x in arguments["tokens"]
    ]
    key_map = arguments["key_map"]
    arguments["key_map"] = key_map._replace(map_index=strided(key_map.map_index))
    (pages,) = arguments["pages"]
    slots, lengths = strided(pages.slots), strided(pages.lengths)
    arguments["pages"] = [pages._replace(slots=slots, lengths=lengths)]
    for name in ("position", "start"):
        arguments[name] = strided(arguments[name])
    torch.testing.assert_close(batch.attend(), expected)


@pytest.mark.parametrize("copied", [False, True])
def test_a_table_that_is_written_to_is_read_anew(copied: bool) -> None:
    """What a backend remembers of pages is never their numbers."""
    batch = Batch.of([sequence(n, 1, n, torch.float32) for n in (200, 210)])
    (pages,) = batch.arguments["pages"]
    # One that backends read as it is, or one that they copy.
    table = torch.full((2, 9), 10**6)[:, :3] if copied else torch.empty_like(pages.slots)
    table[:] = pages.slots
    past = batch.past(pages=[pages._replace(slots=table)])
    first = batch.attend(past=past)
    table[:] = pages.slots.flip(0)
    assert not torch.allclose(batch.attend(past=past), first)
    table[:] = pages.slots
    assert torch.equal(batch.attend(past=past), first)
    table[:] = 10**6
    with pytest.raises(ShapeError, match=r"pages\.slots"):
        batch.attend(past=past)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_nothing_to_compute(empty: int) -> None:
    batch = Batch.of([sequence(100, 1, 1, torch.float32)])
    shape = [1, HEADS, 1, KEY_DIM]
    shape[empty] = 0
    none = torch.zeros(0, dtype=torch.int64) if empty == 0 else torch.zeros(1, dtype=torch.int64)
    out = batch.attend(query=torch.zeros(shape), tokens=[], pages=[], position=none, start=none)
    assert out.shape == (*shape[:3], VALUE_DIM)


class TestRefusals:
    """Tables that lead outside are refused before anything is read."""

    @pytest.fixture
    def batch(self) -> Batch:
        return Batch.of([sequence(n, 1, n, torch.float32) for n in (150, 20, 200)])

    @pytest.mark.parametrize("slot", [-1, 2**40])
    def test_slots(self, batch: Batch, slot: int) -> None:
        (pages,) = batch.arguments["pages"]
        pages.slots[1, 2] = slot
        with pytest.raises(ShapeError, match=rf"pages\.slots: expected slots 0 to .*got {slot}"):
            batch.attend()

    @pytest.mark.parametrize("length", [-1, 65])
    def test_lengths(self, batch: Batch, length: int) -> None:
        (pages,) = batch.arguments["pages"]
        pages.lengths[2, 0] = length
        with pytest.raises(ShapeError, match=rf"pages\.lengths: expected 0 to 64.*got {length}"):
            batch.attend()

    def test_starts(self, batch: Batch) -> None:
        (pages,) = batch.arguments["pages"]
        pages.starts[0, 1] = -3
        with pytest.raises(ShapeError, match=r"pages\.starts: expected positions from 0"):
            batch.attend()

    @pytest.mark.parametrize("row", [-1, 5])
    def test_rows_of_tokens(self, batch: Batch, row: int) -> None:
        batch.arguments["tokens"][1].slots[0] = row
        with pytest.raises(ShapeError, match=rf"tokens\.slots: expected.*got {row}"):
            batch.attend()

    @pytest.mark.parametrize("number", [-1, 3])
    def test_maps(self, batch: Batch, number: int) -> None:
        batch.arguments["key_map"].map_index[0] = number
        with pytest.raises(ShapeError, match=rf"key_map\.map_index: expected.*got {number}"):
            batch.attend()

    def test_pools_of_different_sizes(self, batch: Batch) -> None:
        (pages,) = batch.arguments["pages"]
        pool = pages.pool._replace(value_codes=pages.pool.value_codes[:2])
        batch.arguments["pages"] = [pages._replace(pool=pool)]
        with pytest.raises(ShapeError, match=r"value_codes|pages: expected pools"):
            batch.attend()

    def test_maps_that_are_too_few(self, batch: Batch) -> None:
        key_map = batch.arguments["key_map"]
        batch.arguments["key_map"] = KeyMap(key_map.mean[:1], key_map.scale[:1])
        with pytest.raises(ShapeError, match="key_map"):
            batch.attend()

    def test_nothing_is_written_if_values_do_not_fit(self, batch: Batch) -> None:
        one = sequence(PAGE_TOKENS, 1, 1, torch.float32)
        before = [x.view(torch.uint8).clone() for x in batch.pool]
        for values in (one.values[..., :-1], one.values[:, :, :-1]):
            with pytest.raises(ShapeError, match="values"):
                store_pages(one.keys, values, torch.tensor([[0]]), batch.pool, *CODINGS)
        assert all(map(torch.equal, [x.view(torch.uint8) for x in batch.pool], before))

    @pytest.mark.parametrize("index", [-1, 3])
    def test_maps_when_pages_are_written(self, batch: Batch, index: int) -> None:
        one = sequence(PAGE_TOKENS, 1, 1, torch.float32)
        key_map = maps()._replace(map_index=torch.tensor([index]))
        with pytest.raises(ShapeError, match="key_map"):
            store_pages(one.keys, one.values, torch.tensor([[0]]), batch.pool, *CODINGS, key_map)

    @pytest.mark.parametrize("name", ["position", "first", "start", "stop"])
    def test_positions_before_0(self, batch: Batch, name: str) -> None:
        if name == "position":
            batch.arguments[name][1] = -1
        else:
            getattr(batch.arguments["tokens"][1], name)[1] = -1
        with pytest.raises(ShapeError, match="expected positions from 0"):
            batch.attend()

    def test_a_mask_without_columns(self, batch: Batch) -> None:
        with pytest.raises(ShapeError, match="mask: expected a column"):
            batch.attend(mask=torch.ones(3, 1, 1, 100, dtype=torch.bool))

    def test_pages_that_overlap_others_when_written(self, batch: Batch) -> None:
        slots = torch.tensor([[0, len(batch.pool.key_codes)]])
        one = sequence(2 * PAGE_TOKENS, 1, 1, torch.float32)
        with pytest.raises(ShapeError, match=r"slots: expected.*got"):
            store_pages(one.keys, one.values, slots, batch.pool, *CODINGS)
