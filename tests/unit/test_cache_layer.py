"""One compressed layer: what it keeps, and how it attends."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels.attention import exact_attention
from sixfold.kernels.encode import encode_pages
from sixfold.kernels.types import Coding, Pool
from tests.layers import (
    Shadow,
    Shape,
    attends_like,
    feed,
    filled,
    nbytes,
    oracle,
    padded,
    padding_mask,
    pages,
)
from tests.memory import reachable_tensors, storage_bytes

# For tests of many steps, where checking shapes would take most of the time.
unhooked = pytest.mark.usefixtures("unhooked")

pytestmark = pytest.mark.usefixtures("exact_arithmetic")

NO_WINDOWS = CachePolicy(sink_tokens=0, recent_window=0)


# ---------------------------------------------------------------- short histories


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_coded_before_a_page_leaves_the_window(dtype: torch.dtype) -> None:
    shape = Shape(dtype=dtype)
    query, keys, values = shape.tokens(127)
    layer = shape.layer()
    out = feed(layer, (query, keys, values), 1, 26, 100)
    assert layer.prefix is None
    assert not layer.history.runs
    assert all(map(torch.equal, layer.dequantized(), (keys, values)))
    last = exact_attention(query[:, :, 27:], keys, values, scaling=shape.scaling, mask=None)
    assert torch.equal(out[:, :, 27:], last)
    feed(layer, shape.tokens(1))
    assert layer.history.tokens == 64
    assert layer.window.tokens == 64


@unhooked
def test_a_one_token_prompt_is_no_special_case() -> None:
    shape = Shape()
    tokens = shape.tokens(200)
    layer, shadow = shape.layer(), Shadow(shape, CachePolicy(), None)
    for query, keys, values in zip(*(x.split(1, 2) for x in tokens), strict=True):
        layer.append(keys, values)
        shadow.append(keys, values)
        out = layer.attend(query, scaling=shape.scaling)
        expected = oracle(query, shadow.keys, shadow.values, shape.scaling)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
        shadow.follow(layer)
    assert layer.history.tokens == 128


def test_an_empty_layer() -> None:
    layer = Shape().layer()
    keys, values = layer.dequantized()
    assert (keys.shape, values.shape) == ((2, 2, 0, 16), (2, 2, 0, 32))
    assert (layer.length, layer.held) == (0, 0)
    layer.crop(3)
    layer.select(torch.tensor([1, 0, 0]))
    layer.fork().compress()
    layer.to(torch.device("cpu"))
    attends_like(layer, *Shape(batch=3).empty(), Shape(batch=3).tokens(150))


def test_no_windows_at_all() -> None:
    layer = filled(128, NO_WINDOWS)
    assert layer.window.tokens == 0
    attends_like(layer, *layer.dequantized(), Shape().tokens(70, 1))


def test_sinks_and_recent_tokens_are_exact() -> None:
    _, keys, values = Shape().tokens(300)
    layer = filled(300)
    for got, original in zip(layer.dequantized(), (keys, values), strict=True):
        assert torch.equal(got[:, :, :4], original[:, :, :4])
        assert torch.equal(got[:, :, -64:], original[:, :, -64:])
        assert not torch.equal(got[:, :, 4:5], original[:, :, 4:5])


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize("chunks", [(300,), (150, 150), (1, 299), (64, 64, 64, 64, 44)])
def test_chunked_prefill(chunks: tuple[int, ...]) -> None:
    shape = Shape()
    tokens = shape.tokens(300)
    layer, shadow = shape.layer(), Shadow(shape, CachePolicy(), None)
    for query, keys, values in zip(*(x.split(chunks, 2) for x in tokens), strict=True):
        shadow.append(keys, values)
        expected = oracle(query, shadow.keys, shadow.values, shape.scaling)
        out = feed(layer, (query, keys, values))
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
        shadow.follow(layer)
    assert layer.history.tokens == 192


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 100, 33])
@pytest.mark.parametrize("bits", [2.5, 4])
def test_batching_commutes_with_encoding(dim: int, bits: float) -> None:
    policy = CachePolicy(key_bits=bits, value_bits=bits)
    shape = Shape(batch=3, key_dim=dim, value_dim=dim)
    tokens = shape.tokens(260)
    whole = shape.layer(policy)
    feed(whole, tokens)
    for row in range(3):
        alone = Shape(batch=1, key_dim=dim, value_dim=dim).layer(policy)
        feed(alone, tuple(x[row : row + 1] for x in tokens))  # type: ignore[arg-type]
        assert whole.prefix is not None
        assert alone.prefix is not None
        assert torch.equal(whole.prefix.key_map.mean[row], alone.prefix.key_map.mean[0])
        for ours, theirs in zip(pages(whole), pages(alone), strict=True):
            assert torch.equal(ours[row], theirs[0])


def test_padded_rows_keep_their_own_sinks() -> None:
    padding = [0, 7, 70, 200]
    layer, (_, keys, _) = padded(padding)
    prefix = layer.prefix
    assert prefix is not None
    assert prefix.padding.tolist() == padding
    assert prefix.count.tolist() == [4, 4, 4, 4]
    for row, start in enumerate(padding):
        assert torch.equal(prefix.sinks.keys[row], keys[row, :, start : start + 4])


def test_nothing_is_coded_before_every_row_has_shown_enough_tokens() -> None:
    layer, _ = padded([0, 215])
    shape, padding = Shape(), torch.tensor([0, 215])
    for step in range(15):
        assert layer.prefix is None
        query, keys, values = shape.tokens(1, step)
        layer.append(keys, values)
        layer.attend(query, scaling=shape.scaling, mask=padding_mask(padding, 1, layer.held))
    # Sinks and MIN_TOKENS more: enough for a key map of the shorter row.
    assert layer.prefix is not None
    assert layer.prefix.padding.tolist() == [0, 215]


@unhooked
@pytest.mark.parametrize("additive", [False, True])
def test_padded_rows_attend_to_their_own_tokens(additive: bool) -> None:
    padding = torch.tensor([0, 7, 70, 200])
    layer, _ = padded(padding.tolist())
    shape = Shape(batch=4)
    for step in range(70):
        keys, values = layer.dequantized()
        query, new_keys, new_values = shape.tokens(1, seed=step)
        layer.append(new_keys, new_values)
        mask = padding_mask(padding, 1, layer.held)
        given = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask
        out = layer.attend(query, scaling=shape.scaling, mask=given)
        keys, values = torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2)
        expected = oracle(query, keys, values, shape.scaling, mask=mask)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert layer.history.tokens > 128


@pytest.mark.parametrize("garbage", [-1e30, torch.inf, torch.nan])
def test_what_padding_holds_does_not_matter(garbage: float) -> None:
    padding = [0, 7, 70]
    (clean, _), (dirty, _) = padded(padding), padded(padding, garbage=garbage)
    assert clean.prefix is not None
    assert dirty.prefix is not None
    assert torch.equal(clean.prefix.key_map.mean, dirty.prefix.key_map.mean)
    assert torch.equal(clean.prefix.key_map.scale, dirty.prefix.key_map.scale)
    for row, count in enumerate(padding):
        for ours, theirs in zip(clean.dequantized(), dirty.dequantized(), strict=True):
            assert torch.equal(ours[row, :, count:], theirs[row, :, count:])


def test_a_padded_row_is_coded_as_if_alone() -> None:
    layer, (query, keys, values) = padded([0, 50])
    alone = Shape(batch=1).layer()
    feed(alone, (query[1:, :, 50:], keys[1:, :, 50:], values[1:, :, 50:]))
    assert layer.prefix is not None
    assert alone.prefix is not None
    # Sums in another order: equal up to rounding, so codes can differ where a value is on an edge.
    torch.testing.assert_close(layer.prefix.key_map.mean[1], alone.prefix.key_map.mean[0])
    torch.testing.assert_close(layer.prefix.key_map.scale[1], alone.prefix.key_map.scale[0])
    ours, theirs = layer.dequantized()[0][1, :, 50:114], alone.dequantized()[0][0, :, :64]
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_a_row_of_nothing_but_padding_does_not_hold_up_the_others() -> None:
    layer, _ = padded([0, 220])
    assert layer.history.tokens > 0
    assert layer.prefix is not None
    assert layer.prefix.count.tolist() == [CachePolicy().sink_tokens, 0]
    # It borrows the map of the rows that have begun.
    for own, borrowed in (layer.prefix.key_map.scale, layer.prefix.key_map.mean):
        assert torch.equal(borrowed, own)


def test_padding_that_masks_show_chunk_by_chunk() -> None:
    padding = torch.tensor([0, 30, 55])
    shape = Shape(batch=3)
    tokens, seen = shape.tokens(150), 0
    layer = shape.layer()
    for query, keys, values in zip(*(x.split(25, 2) for x in tokens), strict=True):
        layer.append(keys, values)
        seen += 25
        mask = padding_mask(padding, 25, seen)
        layer.attend(query, scaling=shape.scaling, mask=mask)
    assert layer.prefix is not None
    assert torch.equal(layer.prefix.padding, padding)
    assert torch.equal(layer.prefix.sinks.keys[2], tokens[1][2, :, 55:59])


# ---------------------------------------------------------------- sliding windows


@unhooked
@pytest.mark.parametrize(
    ("window", "policy"),
    [(window, NO_WINDOWS) for window in (1, 2, 65, 129, 200)]
    + [(window, CachePolicy()) for window in (100, 200)],
)
def test_sliding_window_token_by_token(window: int, policy: CachePolicy) -> None:
    shape = Shape(batch=1)
    tokens = shape.tokens(400)
    layer, shadow = shape.layer(policy, window), Shadow(shape, policy, window)
    for step, (query, keys, values) in enumerate(
        zip(*(x.split(1, 2) for x in tokens), strict=True)
    ):
        layer.append(keys, values)
        shadow.append(keys, values)
        if step % 5 == 0:
            out = layer.attend(query, scaling=shape.scaling)
            expected = oracle(
                query, shadow.keys, shadow.values, shape.scaling, sliding_window=window
            )
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
        else:
            layer.compress()
        shadow.follow(layer)
        assert layer.held == shadow.held
        assert min(step + 1, window - 1) <= layer.held <= window - 1 + 64
    assert layer.evicted == 400 - layer.held


def test_sliding_windows_keep_no_sinks() -> None:
    layer = filled(400, sliding_window=200)
    assert layer.prefix is not None
    assert layer.prefix.sinks.tokens == 0


def test_crop_of_a_sliding_window_needs_the_past() -> None:
    layer = filled(300, sliding_window=100)
    before = [x.clone() for x in layer.tensors()]
    with pytest.raises(SixfoldError, match="activate_past_recording"):
        layer.crop(100)
    assert all(map(torch.equal, layer.tensors(), before))


@pytest.mark.parametrize("window", [100, 200])
def test_recording_the_past_makes_crop_possible(window: int) -> None:
    shape = Shape()
    layer, shadow = shape.layer(sliding_window=window), Shadow(shape, CachePolicy(), window)
    layer.record_past = True
    for seed in range(4):
        query, keys, values = shape.tokens(130, seed)
        layer.append(keys, values)
        shadow.append(keys, values)
        out = layer.attend(query, scaling=shape.scaling)
        expected = oracle(query, shadow.keys, shadow.values, shape.scaling, sliding_window=window)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
        shadow.follow(layer, record_past=True)
        layer.crop(50)
        shadow.crop(50)
        assert torch.equal(layer.dequantized()[0], shadow.keys)
        assert layer.length == shadow.length


@unhooked
def test_padding_leaves_with_the_window() -> None:
    shape = Shape()
    padding = torch.tensor([0, 150])
    layer = shape.layer(NO_WINDOWS, 100)
    query, keys, values = shape.tokens(220)
    layer.append(keys, values)
    own, all_ = torch.arange(220)[:, None], torch.arange(220)
    mask = padding_mask(padding, 220, 220) & (all_ > own - 100)
    layer.attend(query, scaling=shape.scaling, mask=mask)
    assert layer.prefix is not None
    assert layer.prefix.padding.tolist() == [0, 150 - layer.evicted]
    for step in range(130):
        left = (padding - layer.evicted).clamp(min=0)
        assert torch.equal(layer.prefix.padding, left)
        new = shape.tokens(1, step)
        keys, values = (
            torch.cat(pair, 2) for pair in zip(layer.dequantized(), new[1:], strict=True)
        )
        layer.append(*new[1:])
        mask = padding_mask(left, 1, layer.held) & (torch.arange(layer.held) >= layer.held - 100)
        out = layer.attend(new[0], scaling=shape.scaling, mask=mask)
        expected = oracle(new[0], keys, values, shape.scaling, mask=mask)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert not layer.prefix.padding.any()


# ---------------------------------------------------------------- options of attention


@pytest.mark.parametrize(
    "options", [{"softcap": 5.0}, {"sink_logits": torch.tensor([1.0, -2.0, 0.5, 3.0])}, {}]
)
def test_coded_attention_takes_what_exact_attention_takes(options: dict[str, Any]) -> None:
    shape = Shape()
    layer = filled(policy=CachePolicy(key_bits=8, value_bits=8))
    query, new_keys, new_values = shape.tokens(3, 1)
    keys, values = (
        torch.cat(pair, 2) for pair in zip(layer.dequantized(), (new_keys, new_values), strict=True)
    )
    expected = exact_attention(
        query, keys, values, scaling=0.4, mask=padding_mask(torch.zeros(2), 3, 303), **options
    )
    layer.append(new_keys, new_values)
    out = layer.attend(query, scaling=0.4, **options)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    shape = Shape(dtype=dtype)
    layer = filled(shape=shape)
    keys, values = layer.dequantized()
    assert keys.dtype == values.dtype == dtype
    query, new_keys, new_values = shape.tokens(2, 1)
    layer.append(new_keys, new_values)
    out = layer.attend(query, scaling=shape.scaling)
    assert out.dtype == dtype
    expected = oracle(
        query, torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2), shape.scaling
    )
    error = (out.double() - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(dtype).eps + 1e-6


# ---------------------------------------------------------------- errors


@unhooked
def test_wrong_tokens_are_refused_and_nothing_changes() -> None:
    layer = filled()
    before = [x.clone() for x in layer.tensors()]
    wrong = {
        "batch": Shape(batch=3),
        "heads": Shape(kv_heads=4),
        "key dim": Shape(key_dim=8),
        "value dim": Shape(value_dim=8),
        "dtype": Shape(dtype=torch.bfloat16),
    }
    for shape in wrong.values():
        with pytest.raises(ShapeError, match="this layer holds"):
            layer.append(*shape.tokens(1)[1:])
    _, keys, values = Shape().tokens(3)
    with pytest.raises(ShapeError, match="3 keys and 2 values"):
        layer.append(keys, values[:, :, :2])
    assert all(map(torch.equal, layer.tensors(), before))


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("tokens", [100, 300])
def test_a_failing_encoder_loses_no_token(
    side: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape()
    layer, twin = filled(tokens), filled(tokens)

    def failing(
        keys: Tensor, values: Tensor, slots: Tensor, pool: Pool, coding: Coding, *rest: object
    ) -> None:
        if side == "value":
            encode_pages(keys, slots, coding, "key", pool.key_codes, pool.key_scales)
        raise RuntimeError("out of memory")

    new = shape.tokens(100, 1)
    held = [torch.cat(pair, 2) for pair in zip(layer.dequantized(), new[1:], strict=True)]
    with monkeypatch.context() as patch:
        patch.setattr("sixfold.cache.code.store_pages", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            feed(layer, new)
        assert layer.held == tokens + 100
        assert all(map(torch.equal, layer.dequantized(), held))
    feed(twin, new)
    layer.compress()
    assert all(map(torch.equal, layer.dequantized(), twin.dequantized()))
    size = nbytes(layer)
    attends_like(layer, *layer.dequantized(), shape.tokens(10, 2))
    attends_like(twin, *twin.dequantized(), shape.tokens(10, 2))
    assert nbytes(layer) <= size + nbytes(twin) - size


# ---------------------------------------------------------------- autograd


def test_codes_hold_no_graph() -> None:
    shape = Shape()
    layer = shape.layer()
    for seed in range(3):
        query, keys, values = (x.requires_grad_() for x in shape.tokens(150, seed))
        layer.append(keys, values)
        layer.attend(query, scaling=shape.scaling)
    assert not any(x.requires_grad for x in layer.tensors())


def test_inference_mode_may_come_and_go() -> None:
    shape = Shape()
    layer = shape.layer()
    with torch.inference_mode():
        feed(layer, shape.tokens(300))
        layer.select(torch.tensor([1]))
    for seed in range(3):
        feed(layer, Shape(batch=1).tokens(100, seed))
    with torch.no_grad():
        feed(layer, Shape(batch=1).tokens(100, 4))
    with torch.inference_mode():
        feed(layer, Shape(batch=1).tokens(100, 5))
    query, keys, values = (x.requires_grad_() for x in Shape(batch=1).tokens(100, 6))
    layer.append(keys, values)
    layer.attend(query, scaling=shape.scaling).sum().backward()
    assert query.grad is not None


def attend(layer: CompressedLayer, tokens: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    query, keys, values = tokens
    layer.append(keys, values)
    return layer.attend(query, scaling=query.shape[-1] ** -0.5)


def test_one_pass_has_its_gradients() -> None:
    tokens = [x.requires_grad_() for x in Shape().tokens(150)]
    query, keys, values = tokens
    attend(Shape().layer(), (query, keys, values)).square().sum().backward()
    twin = [x.detach().requires_grad_() for x in tokens]
    oracle(*twin, Shape().scaling).square().sum().backward()
    for ours, theirs in zip(tokens, twin, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recent_window", [0, 500])
@pytest.mark.parametrize("read", ["attend", "dequantized"])
def test_gradients_through_cached_tokens_are_refused(read: str, recent_window: int) -> None:
    """Where they would be missing, and only there."""
    shape, policy = Shape(), CachePolicy(recent_window=recent_window)
    trained, constant = shape.layer(policy), shape.layer(policy)
    query, keys, values = shape.tokens(150)
    attend(trained, (query, keys.requires_grad_(), values))
    with torch.no_grad():
        attend(constant, (query, keys, values))

    def loss(layer: CompressedLayer, needs: bool = True) -> Tensor:
        query, keys, values = (x.requires_grad_(needs) for x in shape.tokens(3, 1))
        layer.append(keys, values)
        if read == "dequantized":
            return layer.dequantized()[0].sum()
        return layer.attend(query, scaling=shape.scaling).sum()

    loss(constant).backward()
    with torch.no_grad():
        assert not loss(trained.fork()).requires_grad
    # Also where nothing else would ask for the gradient.
    for needs in (True, False):
        with pytest.raises(SixfoldError, match="no gradient passes through cached tokens"):
            loss(trained.fork(), needs).backward()
    trained.reset()
    loss(trained).backward()


# ---------------------------------------------------------------- surroundings


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_autocast_does_not_matter(dtype: torch.dtype, autocast: torch.dtype) -> None:
    shape = Shape(dtype=dtype)
    layer, twin = shape.layer(), shape.layer()
    for count, seed in ((150, 0), (40, 1), (90, 2), (1, 3)):
        expected = attend(twin, shape.tokens(count, seed))
        with torch.autocast("cpu", dtype=autocast):
            out = attend(layer, shape.tokens(count, seed))
            held = layer.dequantized()
        assert out.dtype == dtype
        assert torch.equal(out, expected)
        assert all(map(torch.equal, held, twin.dequantized()))


def test_queries_of_another_dtype() -> None:
    layer, twin = Shape().layer(), Shape().layer()
    for count, seed in ((150, 0), (1, 1)):
        query, keys, values = Shape().tokens(count, seed)
        query = query.bfloat16()
        expected = attend(twin, (query.float(), keys, values))
        out = attend(layer, (query, keys, values))
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, expected.bfloat16())


@pytest.mark.parametrize("sliding_window", [None, 60])
@pytest.mark.parametrize("columns", [1, -1, -10])
def test_a_mask_for_another_number_of_tokens(columns: int, sliding_window: int | None) -> None:
    """It was made for another cache: nothing tells which tokens it means."""
    layer = Shape().layer(sliding_window=sliding_window)
    feed(layer, Shape().tokens(150))
    query, keys, values = Shape().tokens(3, 1)
    layer.append(keys, values)
    smallest = layer.length if sliding_window is None else 62
    mask = torch.ones(2, 1, 3, (layer.length if columns > 0 else smallest) + columns).bool()
    with pytest.raises(ShapeError, match=f"got one over {mask.shape[3]}"):
        layer.attend(query, scaling=1.0, mask=mask)
    layer.attend(query, scaling=1.0, mask=torch.ones(2, 1, 3, smallest).bool())


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("held", [10, 150])
@pytest.mark.parametrize("shape", [(5, 1, 3), (2, 3, 3), (2, 1, 2)], ids=str)
def test_a_mask_for_other_queries(shape: tuple[int, int, int], held: int) -> None:
    """While nothing is compressed as afterwards."""
    layer = Shape().layer()
    feed(layer, Shape().tokens(held))
    query, keys, values = Shape().tokens(3, 1)
    layer.append(keys, values)
    with pytest.raises(ShapeError, match=r"mask: expected \[2 or 1, 4 or 1, 3, positions\]"):
        layer.attend(query, scaling=1.0, mask=torch.ones(*shape, layer.held).bool())
    layer.attend(query, scaling=1.0, mask=torch.ones(2, 1, 3, layer.held).bool())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kept", [30, 300, 400])
def test_a_copy_goes_on_in_memory_of_its_own(kept: int, copied: Callable[[Any], Any]) -> None:
    """After a decode step, when tokens lie in memory to grow in, and once as much is held."""
    layer = Shape().layer()
    feed(layer, Shape().tokens(kept), kept - 1, 1)
    twin = copied(layer)
    assert storage_bytes(reachable_tensors(twin)) <= storage_bytes(reachable_tensors(layer))
    for seed in range(3):
        tokens = Shape().tokens(1, seed=seed + 1)
        assert torch.equal(feed(twin, tokens), feed(layer, tokens))
