"""The cache of a peer: what attention sees of it, and what it says it holds."""

import pytest
import torch
from torch import Tensor

from sixfold.errors import SixfoldError
from sixfold.eval.caches import fork, held_bytes, uncompressed
from sixfold.eval.embedded import haystack
from sixfold.eval.long_context import stored_nbytes
from sixfold.eval.peers import ALL, PEERS, peer_caches
from sixfold.eval.peers.cache import PeerCache, PeerLayer
from sixfold.eval.peers.kivi import KiviKeys, KiviValues
from sixfold.eval.peers.quantized_cache import Quanto
from sixfold.eval.peers.vllm import VllmKeys, VllmValues
from sixfold.eval.perplexity import compare_caches, windows_of
from sixfold.integrations.transformers.config import layer_shapes
from tests.tiny import tiny_model, tiny_tokenizer


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn((1, 2, count, 32), generator=torch.Generator().manual_seed(seed))


def test_a_pass_sees_itself_exactly_and_its_past_from_codes() -> None:
    layer = PeerLayer(VllmKeys(4), VllmValues(4))
    first, later = tokens(10), tokens(3, seed=1)
    keys, values = layer.update(first, first)
    assert torch.equal(keys, first)
    keys, values = layer.update(later, later)
    assert torch.equal(keys[:, :, :10], VllmKeys(4).roundtrip(first, None))
    assert torch.equal(values[:, :, :10], VllmValues(4).roundtrip(first, None))
    assert torch.equal(keys[:, :, 10:], later)
    assert layer.get_seq_length() == 13
    # (16 + 2) + (16 + 4) bytes a token and head.
    assert layer.nbytes == 2 * 13 * 38


def test_tokens_that_wait_are_exact_and_counted_whole() -> None:
    layer = PeerLayer(KiviKeys(2), KiviValues(2))
    x = tokens(300)
    layer.update(x[:, :, :200], x[:, :, :200])
    keys, values = layer.update(x[:, :, 200:], x[:, :, 200:])
    assert torch.equal(keys[:, :, 128:], x[:, :, 128:])
    assert torch.equal(keys[:, :, :128], KiviKeys(2).roundtrip(x[:, :, :128], None))
    assert torch.equal(values[:, :, 72:], x[:, :, 72:])
    assert not torch.equal(values[:, :, 71], x[:, :, 71])
    # 256 keys and 172 values are codes now: 2 bits, and two float32 for 32 of them.
    codes = 2 * 32 * (256 + 172) * (2 / 8 + 2 * 4 / 32)
    assert layer.nbytes == codes + 2 * 32 * 4 * (44 + 128)


def test_a_flush_quantizes_again_what_was_read_back() -> None:
    layer, x = PeerLayer(Quanto(2), Quanto(2)), tokens(200)
    layer.update(x[:, :, :20], x[:, :, :20])
    once = Quanto(2).roundtrip(x[:, :, :20].contiguous(), None)
    keys, _ = layer.update(x[:, :, 20:147], x[:, :, 20:147])
    assert torch.equal(keys[:, :, :20], once)
    keys, _ = layer.update(x[:, :, 147:148], x[:, :, 147:148])
    assert torch.equal(keys[:, :, 20:], x[:, :, 20:148])
    again = Quanto(2).roundtrip(torch.cat([once, x[:, :, 20:148]], dim=2), None)
    keys, _ = layer.update(x[:, :, 148:], x[:, :, 148:])
    assert torch.equal(keys[:, :, :148], again)


def test_a_fork_goes_its_own_way() -> None:
    cache = PeerCache(tiny_model().config, *PEERS["kivi-2"])
    for index in range(2):
        cache.update(tokens(140), tokens(140), index)
    twin, before = fork(cache), held_bytes(cache)
    twin.update(tokens(200, seed=1), tokens(200, seed=1), 0)
    assert (cache.get_seq_length(0), twin.get_seq_length(0)) == (140, 340)
    assert held_bytes(cache) == before < held_bytes(twin)
    cache.update(tokens(1), tokens(1), 0)
    assert cache.get_seq_length(0) == 141


@pytest.mark.parametrize("name", PEERS)
def test_bytes_can_be_told_before_there_is_a_cache(name: str) -> None:
    config, x = tiny_model().config, tokens(300)
    cache = PeerCache(config, *PEERS[name])
    for index in range(2):
        cache.update(x, x, index)
    shapes = layer_shapes(config, [None, None])
    assert stored_nbytes(*PEERS[name], shapes, tokens=300, element_size=4) == cache.nbytes


def test_cropping_is_refused() -> None:
    cache = PeerCache(tiny_model().config, *PEERS["fp8"])
    assert cache.nbytes == 0
    cache.update(tokens(4), tokens(4), 0)
    with pytest.raises(SixfoldError, match="only grows"):
        cache.crop(-1)


def test_every_peer_measures_a_model() -> None:
    windows = windows_of(tiny_tokenizer(), haystack(), 300, count=1)
    caches = peer_caches([ALL]) | {"same": uncompressed}
    found = compare_caches(tiny_model(), windows, caches, prefill=200, chunk=64)
    assert list(found) == [*PEERS, "same"]
    for name in PEERS:
        assert found[name].kl.mean > 1e-6
        assert found[name].nbytes < found["same"].nbytes
    kl = {name: one.kl.mean for name, one in found.items()}
    assert kl["q8_0"] < 0.1 * kl["q4_0"]
    for kind in ("quanto", "hqq", "kivi"):
        assert kl[f"{kind}-4"] < 0.3 * kl[f"{kind}-2"]
    assert kl["turboquant-3.5"] < 0.5 * kl["turboquant-2.5"]
    assert kl["vllm-4bit_nc"] < kl["vllm-k3v4_nc"] < kl["vllm-3bit_nc"]


def test_names_are_checked_before_anything_runs() -> None:
    assert list(peer_caches(["qjl", "fp8", "qjl"])) == ["qjl", "fp8"]
    with pytest.raises(SixfoldError, match="no peer 'kivi-3'; expected 'all' or some of fp8"):
        peer_caches(["kivi-3"])
