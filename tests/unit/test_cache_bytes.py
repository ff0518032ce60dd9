"""Every byte is counted, known in advance, and few."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config

from sixfold import TurboQuantCache
from sixfold.cache import (
    CachePolicy,
    CompressedLayer,
    LayerShape,
    cache_nbytes,
    uncompressed_nbytes,
)
from tests.layers import Shape, feed
from tests.memory import BytesWritten, peak_allocation, reachable_tensors, storage_bytes

LONG = 32_768
# One layer of an 8-billion-parameter model, batch 1.
BIG = Shape(batch=1, kv_heads=8, groups=4, key_dim=128, value_dim=128, dtype=torch.bfloat16)


def make_cache(layers: list[int | None], **options: Any) -> TurboQuantCache:
    """A fused cache of layers with these sliding windows, without a model."""
    config = Qwen2Config(
        num_hidden_layers=len(layers),
        layer_types=["sliding_attention" if window else "full_attention" for window in layers],
        use_sliding_window=True,
        sliding_window=next((window for window in layers if window), None),
    )
    cache = TurboQuantCache(config, **options)
    for layer in cache.compressed_layers:
        layer.fused = True
    return cache


def step(cache: TurboQuantCache, shape: Shape, count: int, seed: int = 0) -> None:
    """What a model does with `count` tokens, layer by layer."""
    for index in range(len(cache.layers)):
        query, keys, values = shape.tokens(count, seed + index)
        keys, values = cache.update(keys, values, index)
        if not isinstance(keys, torch.Tensor):
            keys.attend(query, scaling=shape.scaling)


def grow(cache: TurboQuantCache, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Add tokens to every layer that nobody attends to."""
    for layer in cache.compressed_layers:
        if layer.store is None:
            layer.lazy_initialization(keys, values)
        assert layer.store is not None
        layer.store.append(keys, values)
        layer.store.compress()


def counted_from_outside(cache: TurboQuantCache) -> int:
    """Memory of all tensors that attributes lead to, and of the tables that coding needs."""
    tensors = reachable_tensors(cache)
    for layer in cache.compressed_layers:
        if layer.store is not None and layer.store.prefix is not None:
            for side in (layer.store.code.keys, layer.store.code.values):
                tensors += side.coding(torch.device("cpu"))[:3]
    return storage_bytes(tensors)


policies = st.builds(
    CachePolicy,
    key_bits=st.sampled_from([1, 2.5, 4, 7]),
    value_bits=st.sampled_from([2, 3.5, 4, 8]),
    sink_tokens=st.sampled_from([0, 1, 4, 70, 200]),
    recent_window=st.sampled_from([0, 1, 64, 100]),
    equalize_keys=st.booleans(),
)


@given(
    policy=policies,
    tokens=st.integers(1, 400),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    dims=st.sampled_from([(16, 16), (20, 32), (64, 48), (33, 5)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([None, 2, 30, 100, 150]),
    skip=st.sampled_from([(), (0,), (1,), (0, 2)]),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.usefixtures("unhooked")
def test_bytes_are_known_before_and_counted_after(
    policy: CachePolicy,
    tokens: int,
    batch: int,
    heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    window: int | None,
    skip: tuple[int, ...],
) -> None:
    shape = Shape(batch, heads, 2, *dims, dtype)
    windows = [None, window, None]
    cache = make_cache(windows, skip_layers=skip, **policy.to_dict())
    step(cache, shape, tokens)
    shapes = [
        LayerShape(heads, *dims, w, None if i in skip else policy) for i, w in enumerate(windows)
    ]
    size = {"tokens": tokens, "batch": batch, "element_size": dtype.itemsize}
    assert cache.nbytes == counted_from_outside(cache)
    assert cache.nbytes == cache_nbytes(shapes, **size)
    step(cache, shape, 3)
    step(cache, shape, 70)
    assert cache.nbytes == counted_from_outside(cache)


def test_nothing_is_forgotten_after_operations() -> None:
    cache, shape = make_cache([None, 100, None], skip_layers=[2]), Shape()
    step(cache, shape, 300)
    cache.activate_past_recording()
    step(cache, shape, 150)
    for operation in (
        lambda: cache.crop(-20),
        lambda: cache.batch_repeat_interleave(3),
        lambda: cache.reorder_cache(torch.tensor([0, 0, 1, 4, 5, 2])),
        lambda: cache.batch_select_indices(torch.tensor([1, 2])),
        lambda: step(cache, shape, 80),
        lambda: cache.to("cpu"),
    ):
        operation()
        assert cache.nbytes == counted_from_outside(cache)


def test_an_empty_cache_holds_nothing() -> None:
    cache = make_cache([None, None])
    assert cache.nbytes == 0
    assert cache.compression_ratio == 1.0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("chunk", [70, 200, 330, 1000])
def test_growth_by_chunks_leaves_no_slab_half_empty(chunk: int, batch: int) -> None:
    shape = dataclasses.replace(Shape(), batch=batch)
    layer, by_page = (CompressedLayer(*shape.empty(), CachePolicy()) for _ in range(2))
    _, keys, values = shape.tokens(4000, seed=chunk)
    for start, stop in itertools.pairwise([0, *range(500, 4001, chunk)]):
        part = keys[:, :, start:stop], values[:, :, start:stop]
        layer.append(*part)
        layer.compress()
        # The same first chunk, and so the same map of keys; then pages come one at a time.
        for piece in [part] if start == 0 else zip(*(x.split(64, 2) for x in part), strict=True):
            by_page.append(*piece)
            by_page.compress()
        slabs = {run.slab for run in layer.history.runs}
        held = sum(slab.pool.key_codes.shape[0] for slab in slabs)
        used = sum(run.slots.numel() for run in layer.history.runs)
        assert held - used <= max(used // 16, 4 * batch)
    assert len(layer.history.runs) > 2
    for ours, theirs in zip(layer.dequantized(), by_page.dequantized(), strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- targets

TARGETS = {4: 3.6, 3: 4.7, 2.5: 5.5, 2: 6.7}


@pytest.mark.parametrize("bits", TARGETS)
@pytest.mark.usefixtures("unhooked")
def test_compression_ratio_at_32k(bits: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Bytes do not depend on what the codes say, and encoding 134 MB takes a while.
    monkeypatch.setattr("sixfold.cache.code.store_pages", lambda *sides: None)
    cache, (_, keys, values) = make_cache([None, None], bits=bits), BIG.tokens(1)
    for _ in range(LONG // 4096):
        grow(cache, keys.expand(-1, -1, 4096, -1), values.expand(-1, -1, 4096, -1))
    assert cache.uncompressed_nbytes == 2 * 2 * 2 * 8 * 128 * LONG
    assert cache.compression_ratio >= TARGETS[bits]
    for _ in range(2000):
        grow(cache, keys, values)
    assert cache.get_seq_length() == LONG + 2000
    assert cache.compression_ratio >= TARGETS[bits]
    assert cache.compression_ratio == cache.uncompressed_nbytes / cache.nbytes
    print(f"{bits} bits: {cache.compression_ratio:.3f}")


@pytest.mark.parametrize("bits", TARGETS)
def test_accounting_agrees_with_the_targets(bits: float) -> None:
    shapes = [LayerShape(8, 128, 128, None, CachePolicy(bits, bits))] * 32
    size = {"tokens": LONG, "batch": 1}
    assert uncompressed_nbytes(shapes, **size) / cache_nbytes(shapes, **size) >= TARGETS[bits]


# ---------------------------------------------------------------- memory and work of a step


@pytest.fixture(scope="module")
def long_layer() -> CompressedLayer:
    """32,768 tokens at 4 bits."""
    layer = BIG.layer()
    for seed in range(8):
        layer.append(*BIG.tokens(LONG // 8, seed)[1:])
        layer.compress()
    return layer


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("queries", [1, 4])
def test_a_decode_step_materialises_nothing_long(queries: int, long_layer: CompressedLayer) -> None:
    layer, tokens = long_layer.fork(), BIG.tokens(queries)
    uncompressed = 2 * 2 * 8 * 128 * LONG
    peak = peak_allocation(lambda: feed(layer, tokens))
    assert peak < 0.15 * uncompressed
    print(f"{queries} queries: {peak / 1e6:.1f} MB, {peak / uncompressed:.1%} of a layer")


@pytest.mark.usefixtures("unhooked")
def test_memory_of_a_step_does_not_grow_with_the_history(long_layer: CompressedLayer) -> None:
    tokens, peaks = BIG.tokens(1), []
    for length in (LONG // 16, LONG // 4):
        layer = long_layer.fork()
        layer.crop(layer.length - length)
        feed(layer, tokens)
        peaks.append(peak_allocation(lambda layer=layer: feed(layer, tokens)))  # type: ignore[misc]
    assert peaks[1] < 1.1 * peaks[0]


def bytes_per_appended_token(history: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Bytes written while 640 tokens arrive one by one; what attention reads is not counted."""
    shape = Shape(batch=1, kv_heads=1, dtype=torch.bfloat16)
    layer = shape.layer()
    with monkeypatch.context() as patch:
        patch.setattr("sixfold.cache.code.store_pages", lambda *sides: None)
        for _ in range(history // 2048):
            layer.append(*shape.tokens(2048)[1:])
            layer.compress()
    (_, keys, values), count = shape.tokens(1), 10 * 64
    with BytesWritten() as written:
        for _ in range(count):
            layer.append(keys, values)
            layer.compress()
    return written.total / count


@pytest.mark.usefixtures("unhooked")
def test_appending_does_not_copy_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = (bytes_per_appended_token(n, monkeypatch) for n in (2048, 65_536))
    # Slabs grow with the history, so that fewer are needed; nothing else may.
    assert long < 1.05 * short
    print(f"{short:.0f} bytes a token after 2k tokens, {long:.0f} after 64k")
