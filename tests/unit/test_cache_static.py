"""The layer of fixed size against the one that grows."""

import copy
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.cache.code import PageCode
from sixfold.cache.dense import DenseTokens
from sixfold.cache.pages import Slab
from sixfold.cache.prefix import Prefix
from sixfold.cache.static import StaticLayer
from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels.types import CodeName, Coding, KeyMap, Pool, Tokens

# Integer arithmetic rounds by the pages a thread gets, which differ.
pytestmark = pytest.mark.usefixtures("exact_arithmetic")

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 32


def tokens(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(BATCH, KV_HEADS, count, DIM, generator=generator) for _ in range(2))
    return torch.randn(BATCH, HEADS, count, DIM, generator=generator), keys, values


def prefilled(
    count: int = 200,
    sliding_window: int | None = None,
    padding: int = 0,
    device: str = "cpu",
    key_map: KeyMap | None = None,
    code: CodeName = "codebook",
) -> CompressedLayer:
    query, keys, values = (x.to(device) for x in tokens(count, seed=0))
    policy = CachePolicy(key_bits=4, value_bits=3, recent_window=16, code=code)
    layer = CompressedLayer(keys, values, policy, sliding_window, key_map)
    layer.append(keys, values)
    mask = None
    if padding:
        mask = torch.ones(BATCH, 1, count, count, dtype=torch.bool, device=device).tril()
        mask[0, :, :, :padding] = False
    layer.attend(query, scaling=DIM**-0.5, mask=mask)
    return layer


@pytest.mark.parametrize("sliding_window", [None, 100, 150])
@pytest.mark.parametrize("padding", [0, 70])
@pytest.mark.parametrize("code", ["codebook", "trellis"])
def test_every_step_is_that_of_the_growing_layer(
    sliding_window: int | None, padding: int, code: CodeName
) -> None:
    growing = prefilled(sliding_window=sliding_window, padding=padding, code=code)
    static = StaticLayer(growing, max_tokens=growing.held + 80)
    places = [x.data_ptr() for x in static.tensors()]
    sinks = torch.tensor([0.5, -1.0, 0.0, 2.0])
    held = growing.held
    for step in range(80):
        query, keys, values = tokens(1, seed=step + 1)
        growing.append(keys, values)
        static.append(keys, values)
        options = {"scaling": DIM**-0.5, "softcap": 20.0, "sink_logits": sinks}
        expected = growing.attend(query, **options)
        torch.testing.assert_close(static.attend(query, **options), expected, atol=1e-5, rtol=0)
    assert static.length == held + 80
    assert [x.data_ptr() for x in static.tensors()] == places


def test_pages_of_a_cropped_layer_keep_their_lengths() -> None:
    growing = prefilled(300)
    growing.crop(100)
    query, keys, values = tokens(1, seed=1)
    static = StaticLayer(growing, max_tokens=400)
    growing.append(keys, values)
    static.append(keys, values)
    expected = growing.attend(query, scaling=0.2)
    torch.testing.assert_close(static.attend(query, scaling=0.2), expected, atol=1e-5, rtol=0)


def test_a_full_layer_fails_rather_than_forget() -> None:
    growing = prefilled()
    static = StaticLayer(growing, max_tokens=growing.held + 1)
    _, keys, values = tokens(1, seed=1)
    static.append(keys, values)
    with pytest.raises(RuntimeError, match="static cache is full"):
        static.append(keys, values)


def test_what_cannot_be_static_says_so() -> None:
    _, keys, values = tokens(1, seed=1)
    empty = CompressedLayer(keys, values, CachePolicy())
    with pytest.raises(SixfoldError, match="prefill a page and the recent window"):
        StaticLayer(empty, max_tokens=100)
    layer = prefilled()
    with pytest.raises(SixfoldError, match=f"at least the {layer.held} tokens held, got 3"):
        StaticLayer(layer, max_tokens=3)
    _, keys, values = tokens(2, seed=1)
    with pytest.raises(ShapeError, match=r"one torch\.float32 token a step"):
        StaticLayer(layer, max_tokens=300).append(keys, values)


class OnDevice(TorchDispatchMode):
    """Refuses what would read, or write, another device than a GPU: it would wait for it."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        out = function(*arguments, **(options or {}))
        found = {
            x.device.type
            for x in tree_leaves((arguments, options, out))
            if isinstance(x, torch.Tensor)
        }
        assert found <= {"meta"}, f"{function} meets tensors on {found}"
        return out


def faked(x: Any) -> Any:
    """The tensors of a layer without their data, as if on a GPU."""
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    if type(x) is tuple:
        return tuple(map(faked, x))
    if isinstance(x, Coding | KeyMap | Pool | Tokens):
        return type(x)(*map(faked, x))
    if isinstance(x, StaticLayer | Slab | Prefix | DenseTokens | PageCode):
        twin = copy.copy(x)
        for name, part in vars(x).items():
            object.__setattr__(twin, name, faked(part))
        return twin
    return x


@pytest.mark.parametrize("sliding_window", [None, 100])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_step_on_a_gpu_waits_for_nothing(
    sliding_window: int | None, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that is captured may not. Fake tensors refuse what depends on data."""
    pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)
    shape = 1, KV_HEADS, DIM
    key_map = KeyMap(torch.zeros(shape), torch.ones(shape)) if pinned else None
    growing = prefilled(sliding_window=sliding_window, key_map=key_map)
    static = StaticLayer(growing, max_tokens=growing.held + 80)
    monkeypatch.setenv("SIXFOLD_BACKEND", "triton")
    with FakeTensorMode():
        layer, sinks = faked(static), faked(torch.zeros(HEADS))
        query, keys, values = map(faked, tokens(1, seed=1))
        with OnDevice():
            layer.append(keys, values)
            out = layer.attend(query, scaling=DIM**-0.5, softcap=20.0, sink_logits=sinks)
    assert out.shape == (BATCH, HEADS, 1, DIM)


@pytest.mark.gpu
@pytest.mark.parametrize("sliding_window", [None, 100])
def test_a_captured_step_is_replayed_over_pages(sliding_window: int | None) -> None:
    """One CUDA graph decodes whatever follows, whether or not it completes a page."""
    growing = prefilled(sliding_window=sliding_window, device="cuda")
    eager, captured = (StaticLayer(growing, max_tokens=growing.held + 150) for _ in range(2))
    query, keys, values = (x.cuda() for x in tokens(1, seed=0))

    def step(layer: StaticLayer) -> torch.Tensor:
        layer.append(keys, values)
        return layer.attend(query, scaling=DIM**-0.5)

    # Kernels are compiled, and workspaces found, before anything is captured.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.testing.assert_close(step(captured), step(eager))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(captured)

    before = int(eager.pages)
    for seed in range(140):
        for buffer, new in zip((query, keys, values), tokens(1, seed), strict=True):
            buffer.copy_(new)
        graph.replay()
        torch.testing.assert_close(out, step(eager))
    assert int(captured.pages) == int(eager.pages) == before + 2
    assert captured.length == eager.length == growing.held + 143
