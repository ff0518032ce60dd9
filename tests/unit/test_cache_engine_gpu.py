"""An engine's layer on a GPU that is not there: where tables are, and what waits for them."""

from collections.abc import Iterator
from typing import get_args

import pytest
import torch

from sixfold.cache.engine import EngineLayer
from sixfold.cache.policy import CachePolicy
from sixfold.cache.step import Step
from sixfold.kernels.types import CodeName
from tests.fake_gpu import GPU, FakeGpu

HEADS, KV_HEADS, DIM = 4, 2, 64


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    with FakeGpu() as fake:
        yield fake


def step(gpu: FakeGpu, new: list[int], context: list[int]) -> Step:
    """Sequences of four pages each, every one with a row of its own."""
    rows = torch.arange(4 * len(new)).view(-1, 4)
    sinks = torch.arange(len(new))
    return Step(new, context, gpu.place(rows), rows, sinks, 4)


@pytest.mark.parametrize("code", get_args(CodeName))
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_step_is_copied_once_and_nothing_waits(
    backend: str, code: CodeName, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, chunks and single tokens; the second layer finds every table where it needs it.

    The first prompts are enough for the last key map: until then pages are looked up by block.
    """
    if backend == "triton":
        pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)
    monkeypatch.setenv("SIXFOLD_BACKEND", backend)
    policy = CachePolicy(sink_tokens=4, recent_window=0, code=code)
    layers = [
        EngineLayer(policy, KV_HEADS, DIM, DIM, 28, dtype=torch.bfloat16, device=GPU, sink_rows=7)
        for _ in range(2)
    ]
    blocks = gpu.place(torch.zeros(32, KV_HEADS, layers[0].block_bytes, dtype=torch.uint8))
    for new, context in (
        ([70, 3, 200, *[230] * 4], [0] * 7),
        ([1, 1, 1], [70, 3, 200]),
        ([60, 1, 2], [71, 4, 201]),
    ):
        one = step(gpu, new, context)
        for i, layer in enumerate(layers):
            query, keys, values = (
                gpu.place(torch.zeros(sum(new), heads, DIM, dtype=torch.bfloat16))
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            gpu.uploads = []
            out = layer.attend(query, keys, values, layer.pool(blocks), one, scaling=0.1)
            assert out.device == GPU
            assert out.shape == query.shape
            assert not gpu.waits
            assert i == 0 or not gpu.uploads


def test_what_a_fake_gpu_is_asked_is_noticed() -> None:
    with FakeGpu() as fake:
        x = fake.place(torch.ones(3, 4))
        assert x[0, None].shape == (1, 4)
        mask = x > 0
        for wait in (
            lambda: x.sum().item(),
            lambda: bool(mask.any()),
            lambda: x[mask],
            lambda: x.__setitem__(mask, 0),
            lambda: mask.nonzero(),
            lambda: x.tolist(),
            lambda: x + torch.ones(3, 4),
        ):
            with pytest.raises(RuntimeError):
                wait()
        assert not fake.waits
        x.cpu()
        assert len(fake.waits) == 1
        torch.ones(2).to(x.device)
        assert len(fake.uploads) == 1


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_does_and_nothing_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same steps on both; on the GPU whatever waits for it is an error."""
    monkeypatch.delenv("SIXFOLD_BACKEND", raising=False)
    policy = CachePolicy(key_bits=8, value_bits=8, sink_tokens=4, recent_window=0)
    kinds = [torch.device("cpu"), torch.device("cuda")]
    layers = [
        EngineLayer(policy, KV_HEADS, DIM, DIM, 28, dtype=torch.float32, device=at, sink_rows=7)
        for at in kinds
    ]
    blocks = [
        torch.zeros(32, KV_HEADS, layers[0].block_bytes, dtype=torch.uint8, device=at)
        for at in kinds
    ]
    generator = torch.Generator().manual_seed(0)
    for turn, (new, context) in enumerate(
        [
            # Enough for the last key map.
            ([70, 3, 200, *[230] * 4], [0] * 7),
            ([1, 1, 1], [70, 3, 200]),
            ([60, 1, 2], [71, 4, 201]),
        ]
    ):
        rows = torch.arange(4 * len(new)).view(-1, 4)
        packed = [
            torch.randn(sum(new), heads, DIM, generator=generator)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]
        found = []
        for at, layer, memory in zip(kinds, layers, blocks, strict=True):
            one = Step(new, context, rows.to(at), rows, torch.arange(len(new)), 4)
            own = [x.to(at) for x in packed]
            pool = layer.pool(memory)
            if at.type == "cuda" and turn:
                torch.cuda.set_sync_debug_mode("error")
            try:
                found.append(layer.attend(*own, pool, one, scaling=DIM**-0.5))
            finally:
                if at.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(found[1].cpu(), found[0], atol=0.03, rtol=0)
