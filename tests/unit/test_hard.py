"""Hard models compute what the plain one computes, and break the quantizers they are meant to."""

from functools import lru_cache

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.hard import harden, with_hidden_channels, with_outlier_channels
from sixfold.errors import SixfoldError
from sixfold.eval.caches import compressed, dequantizing
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.eval.peers import peer_caches
from sixfold.eval.perplexity import CacheComparison, compare_caches


@lru_cache
def plain() -> tuple[PreTrainedModel, torch.Tensor, int]:
    """The embedded model, some text and the token of a line break."""
    model, tokenizer = load_embedded()
    ids = torch.tensor(tokenizer(haystack(), verbose=False)["input_ids"])
    return model, ids, tokenizer("\n\n")["input_ids"][-1]


@lru_cache
def hard() -> PreTrainedModel:
    model, ids, line_break = plain()
    return harden(model, ids[:1000], [line_break])


@lru_cache
def biased() -> PreTrainedModel:
    """What Qwen2.5 has: in the first layer an offset of sixty keys, in part turned by RoPE."""
    model, ids, line_break = plain()
    outlying = with_outlier_channels(model)
    return with_hidden_channels(outlying, ids[:1000], [line_break], first_mean=60.0)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(ids[None], use_cache=False).logits[0]
    return found


@torch.no_grad()
def projected(model: PreTrainedModel, name: str, ids: torch.Tensor, layer: int = 1) -> torch.Tensor:
    """What a projection of a layer makes of text, [tokens, heads, head_dim]."""
    found: list[torch.Tensor] = []
    module = getattr(model.model.layers[layer].self_attn, name)
    hook = module.register_forward_hook(lambda _, __, output: found.append(output[0]))
    logits(model, ids)
    hook.remove()
    return found[0].unflatten(-1, (-1, model.config.head_dim))


def test_the_hard_model_is_the_same_function() -> None:
    model, ids, _ = plain()
    text = ids[1000:2000]
    expected, found = logits(model, text), logits(hard(), text)
    # Logits reach 20: sums of 128 terms that are ten times larger lose as many float32 bits.
    assert float(expected.abs().max()) > 10
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_its_keys_share_a_mean_and_some_tokens_are_massive() -> None:
    _, ids, line_break = plain()
    text = ids[1000:2000]
    keys, values = projected(hard(), "k_proj", text), projected(hard(), "v_proj", text)
    mean = keys.mean(0)
    assert bool((mean.norm(dim=-1) > 5 * (keys - mean).norm(dim=-1).mean(0)).all())
    massive = text == line_break
    assert 0 < massive.float().mean() < 0.04
    for x in (keys - mean, values):
        size = x.abs().amax(-1)
        assert float(size[massive].mean()) > 1.5 * float(size[~massive].mean())


def test_an_offset_of_sixty_keys_is_the_same_function() -> None:
    model, ids, _ = plain()
    text = ids[1000:1400]
    expected, found = logits(model, text), logits(biased(), text)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
    keys = projected(biased(), "k_proj", text, layer=0)
    mean = keys.mean(0)
    step = (keys[1:] - keys[:-1]).norm(dim=-1).mean(0)
    assert bool((mean.norm(dim=-1) > 20 * step).all())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("windows", [{}, {"sink_tokens": 0, "recent_window": 0}], ids=str)
def test_an_offset_of_sixty_keys_costs_little_more_than_ten(
    fused: bool, windows: dict[str, int]
) -> None:
    _, ids, _ = plain()
    text, make = ids[2000:2384][None], compressed if fused else dequantizing
    found = [
        compare_caches(one, text, {"4": make(4, **windows)}, prefill=256)["4"].kl.mean
        for one in (hard(), biased())
    ]
    assert found[1] < 3 * found[0]


def test_outlier_channels_are_the_same_function_too() -> None:
    model, ids, _ = plain()
    outlying = with_outlier_channels(model)
    torch.testing.assert_close(
        logits(outlying, ids[:300]), logits(model, ids[:300]), atol=1e-3, rtol=0
    )
    keys = projected(outlying, "k_proj", ids[:300]).square().mean(0).sqrt()
    assert float(keys.max() / keys.median()) > 5


def test_without_mean_and_massive_tokens_keys_stay_small() -> None:
    model, ids, line_break = plain()
    same = with_hidden_channels(model, ids[:1000], [line_break], mean=0, massive=0)
    torch.testing.assert_close(logits(same, ids[:300]), logits(model, ids[:300]), atol=1e-3, rtol=0)
    keys = projected(same, "k_proj", ids[:300])
    assert float(keys.mean(0).norm()) < float(keys.norm(dim=-1).mean()) * 2


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, CacheComparison]]:
    model, ids, _ = plain()
    caches = peer_caches(["vllm-4bit_nc", "q4_0", "turboquant-3.5"])
    caches["4"] = compressed(4, sink_tokens=0, recent_window=0)
    windows = ids[2000:2384][None]
    models = {"plain": model, "hard": hard()}
    return {name: compare_caches(one, windows, caches, prefill=256) for name, one in models.items()}


@pytest.mark.parametrize("peer", ["vllm-4bit_nc", "q4_0", "turboquant-3.5"])
def test_peers_collapse_on_it(found: dict[str, dict[str, CacheComparison]], peer: str) -> None:
    assert found["hard"][peer].kl.mean > 10 * found["plain"][peer].kl.mean


def test_sixfold_does_not(found: dict[str, dict[str, CacheComparison]]) -> None:
    assert found["hard"]["4"].kl.mean < 3 * found["plain"]["4"].kl.mean
    for peer in ("vllm-4bit_nc", "q4_0", "turboquant-3.5"):
        assert found["hard"]["4"].kl.mean < 0.1 * found["hard"][peer].kl.mean


def test_a_text_without_the_massive_tokens_is_refused() -> None:
    model, ids, line_break = plain()
    with pytest.raises(SixfoldError, match="holds none of the massive tokens"):
        harden(model, ids[ids != line_break][:20], [line_break])
