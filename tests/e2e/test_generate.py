"""`model.generate`: greedy, beams, sampling and assisted, against the model without any cache."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.cache import CompressedLayer
from sixfold.integrations.transformers.keyword import CACHE_KEYWORD, cache_argument
from tests.e2e.decoding import batch, fused_cache, relative_error
from tests.e2e.models import fresh_model, tiny_model

# Shapes are checked in test_architectures.py.
pytestmark = pytest.mark.usefixtures("unhooked")

TOLERANCE = 0.03
NEW_TOKENS = 20
PROMPTS = (184, 130)

both_modes = pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])


def generate(
    model: PreTrainedModel, cache: Any, prompts: tuple[int, ...] = PROMPTS, **options: Any
) -> Any:
    """Sequences, logits and scores of `NEW_TOKENS` tokens after the prompts of `batch`."""
    data = batch(prompts, steps=0)
    torch.manual_seed(3)
    return model.generate(
        data.ids,
        attention_mask=data.mask,
        **cache_argument(cache),
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **{"do_sample": False, **options},
    )


def uncompressed(name: str, **options: Any) -> Any:
    """The same through transformers' own cache and attention."""
    model = tiny_model(name)
    return generate(model, DynamicCache(config=model.config), **options)


def compressed(name: str, fused: bool, **options: Any) -> Any:
    """The same through codes at 8 bits."""
    model = tiny_model(name)
    if fused:
        cache = fused_cache(name, recent_window=0)
    else:
        cache = TurboQuantCache(model.config, 8, recent_window=0)
    out = generate(model, cache, **options)
    assert all(layer.store.history.tokens >= 64 for layer in cache.compressed_layers)
    return out


def step_logits(name: str, sequences: Tensor, prompts: tuple[int, ...] = PROMPTS) -> Tensor:
    """Logits [rows, new tokens, vocabulary] of given sequences, in one pass without any cache."""
    data = batch(prompts, steps=0)
    rows = len(sequences) // len(data.mask)
    mask = torch.cat([data.mask, torch.ones(len(data.mask), NEW_TOKENS, dtype=torch.long)], 1)
    mask = mask.repeat_interleave(rows, 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = tiny_model(name)(
            sequences, attention_mask=mask, position_ids=positions, use_cache=False
        )
    return out.logits[:, data.prompt - 1 : -1]


def check_logits(name: str, out: Any, prompts: tuple[int, ...] = PROMPTS) -> None:
    """What the cache led the model to say is what it says of the same tokens without one."""
    logits = torch.stack(out.logits, 1)
    assert relative_error(logits, step_logits(name, out.sequences, prompts)) < TOLERANCE


def first_difference(actual: Tensor, expected: Tensor) -> Tensor:
    """How many new tokens of every row agree before one does not."""
    return (actual == expected)[:, -NEW_TOKENS:].long().cumprod(1).sum(1)


def check_tokens(name: str, actual: Tensor, expected: Tensor) -> None:
    """Greedy choices agree, or first differ where the uncompressed model is all but undecided."""
    agreed = first_difference(actual, expected)
    logits = step_logits(name, expected)
    for row, step in enumerate(agreed.tolist()):
        if step < NEW_TOKENS:
            scores = logits[row, step]
            ours, theirs = actual[row, step - NEW_TOKENS], expected[row, step - NEW_TOKENS]
            # Both logits err, by TOLERANCE each as `check_logits` has it.
            assert scores[theirs] - scores[ours] < 2**0.5 * TOLERANCE * scores.std()
    assert agreed.float().mean() >= NEW_TOKENS / 2


@both_modes
@pytest.mark.parametrize(
    "name", ["llama-64", "mistral", "gemma2", "gpt2", "gpt-oss", "falcon-alibi", "qwen3-next"]
)
def test_greedy(name: str, fused: bool) -> None:
    expected = uncompressed(name).sequences
    out = compressed(name, fused)
    check_tokens(name, out.sequences, expected)
    check_logits(name, out)


@both_modes
@pytest.mark.parametrize("name", ["llama-64", "mistral", "opt", "deepseek-v3"])
def test_beams(name: str, fused: bool) -> None:
    """The score that a beam has gathered is the score of its tokens."""
    out = compressed(name, fused, num_beams=3, num_return_sequences=3)
    logits = step_logits(name, out.sequences)
    new = out.sequences[:, -NEW_TOKENS:]
    chosen = logits.log_softmax(-1).gather(-1, new.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out.sequences_scores, chosen.mean(1), atol=0.02, rtol=0)
    best = uncompressed(name, num_beams=3).sequences_scores
    assert (best - out.sequences_scores[::3]).abs().max() < 0.1


@both_modes
def test_sampling(fused: bool) -> None:
    options = {"do_sample": True, "temperature": 1.0, "top_k": 20}
    out = compressed("gpt2", fused, **options)
    check_logits("gpt2", out)
    assert torch.equal(out.sequences, compressed("gpt2", fused, **options).sequences)
    # Dice that fall within an error of the edge of a token give another, and all else from there.
    agreed = first_difference(out.sequences, uncompressed("gpt2", **options).sequences)
    assert agreed.float().mean() >= NEW_TOKENS / 2


@both_modes
def test_chunked_prefill(fused: bool) -> None:
    out = compressed("mistral", fused, prefill_chunk_size=50)
    check_logits("mistral", out)


@both_modes
@pytest.mark.parametrize("name", ["llama-64", "mistral", "gemma2", "lfm2", "gemma4"])
def test_assisted(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper that is often right: some of its tokens stay, some are cropped away."""
    removed = []
    crop = CompressedLayer.crop
    monkeypatch.setattr(
        CompressedLayer, "crop", lambda self, count: (removed.append(count), crop(self, count))
    )
    assistant = fresh_model(name)
    generator = torch.Generator().manual_seed(4)
    for parameter in assistant.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * 0.05 * parameter.std())
    out = compressed(name, fused, prompts=(184,), assistant_model=assistant)
    check_logits(name, out, prompts=(184,))
    # Fewer forward passes than tokens, and passes of which only a part was kept.
    calls = len(removed) / len(getattr(out, CACHE_KEYWORD).compressed_layers)
    assert calls < NEW_TOKENS - 2
    assert sum(count > 0 for count in removed) > 1


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 2, 20])
@pytest.mark.parametrize("name", ["llama-64", "gemma3", "gemma4"])
def test_logits_of_the_last_tokens_alone(name: str, keep: int) -> None:
    """Models drop queries that nobody asks for before layers that share keys (Gemma 4)."""
    model, data = tiny_model(name, "eager"), batch((150, 150), steps=0)
    expected = model(data.ids).logits[:, -keep:]
    model = tiny_model(name, "sixfold")
    for cache in (None, DynamicCache(config=model.config), fused_cache(name, 8)):
        found = model(data.ids, **cache_argument(cache), logits_to_keep=keep).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@both_modes
def test_prompt_lookup(fused: bool) -> None:
    out = compressed("llama-64", fused, prompts=(184,), prompt_lookup_num_tokens=4)
    check_logits("llama-64", out, prompts=(184,))
