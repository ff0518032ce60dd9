"""What cannot work says so: once, at once, and naming the reason."""

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.errors import ShapeError, SixfoldError, UnsupportedModelError
from tests.e2e.decoding import (
    batch,
    continue_decoding,
    decode,
    forward,
    fused_cache,
    relative_error,
    uncompressed_logits,
)
from tests.e2e.models import fresh_model, tiny_model

T5 = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
BART = transformers.BartConfig(
    vocab_size=97,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
)
MAMBA = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
MAMBA2 = transformers.Mamba2Config(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8
)


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ENCODERS = (
    transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    transformers.BertLMHeadModel(transformers.BertConfig(**SMALL)),
    transformers.ModernBertModel(transformers.ModernBertConfig(**SMALL, pad_token_id=0)),
    transformers.ViTModel(
        transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ),
)


@pytest.mark.parametrize("model", ENCODERS, ids=lambda model: type(model).__name__)
def test_encoders_are_refused(model: PreTrainedModel) -> None:
    """They were accepted, and gave nonsense."""
    attention = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match="is not a decoder"):
        TurboQuantCache.for_model(model)
    assert model.config._attn_implementation == attention


def test_a_bert_that_is_a_decoder_is_not() -> None:
    model = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True))
    assert len(TurboQuantCache.for_model(model.eval()).compressed_layers) == 1


def test_a_model_without_heads_is_refused() -> None:
    """RWKV's config calls its layers attention."""
    config = transformers.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)
    model = transformers.RwkvForCausalLM(config)
    for make in (TurboQuantCache, lambda _: TurboQuantCache.for_model(model)):
        with pytest.raises(UnsupportedModelError, match="no attention heads"):
            make(config)


LATENTS = transformers.DeepseekV3Config(num_hidden_layers=2, qk_rope_head_dim=0)


def test_latents_without_rotary_keys() -> None:
    """One of the two tensors that such a layer caches is empty (Mistral Large 4)."""
    with pytest.raises(UnsupportedModelError, match="qk_rope_head_dim is 0"):
        TurboQuantCache(LATENTS)


@pytest.mark.parametrize(
    ("config", "model_class", "reason"),
    [
        (T5, "T5ForConditionalGeneration", "encoder-decoder"),
        (BART, "BartForConditionalGeneration", "encoder-decoder"),
        (MAMBA, "MambaForCausalLM", "no attention layer"),
        (MAMBA2, "Mamba2ForCausalLM", "no attention layer"),
    ],
)
def test_unsupported_models(config: PreTrainedConfig, model_class: str, reason: str) -> None:
    model = getattr(transformers, model_class)(config)
    attention = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=reason):
        TurboQuantCache.for_model(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        TurboQuantCache(config)
    assert model.config._attn_implementation == attention


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), "llama", None])
def test_not_a_model(thing: object) -> None:
    with pytest.raises(UnsupportedModelError, match=f"got {type(thing).__name__}"):
        TurboQuantCache.for_model(thing)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("thing", [{"hidden_size": 4}, None])
def test_not_a_config(thing: object) -> None:
    with pytest.raises(UnsupportedModelError, match=f"got {type(thing).__name__}"):
        TurboQuantCache(thing)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 9}, "bits"),
        ({"key_bits": 0}, "bits"),
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"recent_window": 1.5}, "recent_window"),
        ({"skip_layers": [2]}, "layer 2 does not exist"),
        ({"per_layer": {-3: {}}}, "layer -3 does not exist"),
        ({"per_layer": {0: {"bits": 4}}}, "unknown fields"),
    ],
)
def test_options_out_of_range(options: dict[str, object], reason: str) -> None:
    with pytest.raises(SixfoldError, match=reason):
        TurboQuantCache.for_model(tiny_model("llama-64"), **options)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama-64", "gpt2"])
def test_switched_away(name: str, attention: str) -> None:
    """The error comes before anything is lost: switched back, the cache goes on."""
    model, data = fresh_model(name), batch(steps=6)
    cache = TurboQuantCache.for_model(model, bits=8)
    forward(model, cache, data, 0, 200)
    model.set_attn_implementation(attention)
    with pytest.raises(UnsupportedModelError, match="switched away"):
        forward(model, cache, data, 200, data.prompt)
    model.set_attn_implementation("sixfold")
    forward(model, cache, data, 200, data.prompt)
    logits = continue_decoding(model, cache, data)
    assert relative_error(logits, uncompressed_logits(name)[:, :6]) < 0.03


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])
def test_another_batch_size(fused: bool) -> None:
    model = fresh_model("llama-64")
    cache = TurboQuantCache.for_model(model, 8) if fused else TurboQuantCache(model.config, 8)
    forward(model, cache, batch(steps=0), 0, 200)
    with pytest.raises(ShapeError, match="reset the cache or select its batch rows"):
        forward(model, cache, batch((220, 210), steps=0), 200, 220)
    cache.reset()
    logits = decode(model, cache, batch(steps=6))
    assert relative_error(logits, uncompressed_logits("llama-64")[:, :6]) < 0.03


def test_another_dtype() -> None:
    model = fresh_model("llama-64")
    cache, data = TurboQuantCache.for_model(model, 8), batch(steps=0)
    forward(model, cache, data, 0, 200)
    with pytest.raises(ShapeError, match=r"torch\.float32.*torch\.bfloat16"):
        forward(model.bfloat16(), cache, data, 200, data.prompt)
    for dtype in (torch.int8, torch.complex64):
        with pytest.raises(SixfoldError, match=r"one of torch\.float16, torch\.bf.*, got torch\."):
            cache.to(dtype=dtype)


def test_attention_that_computes_with_cached_tensors() -> None:
    """JetMoE repeats cached heads before it attends; forced to, an error names what serves it."""
    config = transformers.JetMoeConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=32,
        num_local_experts=2,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    model: PreTrainedModel = transformers.JetMoeForCausalLM(config).eval()
    with pytest.warns(UserWarning, match="JetMoeForCausalLM: its attention computes with cached"):
        cache = TurboQuantCache.for_model(model)
    assert not cache.fused
    forward(model, cache, batch((20,), steps=0), 0, 20)
    model.set_attn_implementation("sixfold")
    cache = TurboQuantCache(model.config)
    cache.layers[0].fused = True
    with pytest.raises(UnsupportedModelError, match=r"use TurboQuantCache\(model\.config"):
        forward(model, cache, batch((20,), steps=0), 0, 20)


def test_keys_attended_twice() -> None:
    """Gemma 4 would do so, were the layers that share their keys fused as well.

    Transformers 5.20 moves the keys that it shares to another device first, and that fails.
    """
    model, data = tiny_model("gemma4"), batch(steps=0)
    cache = fused_cache("gemma4", 4)
    for layer in cache.compressed_layers:
        layer.fused = True
    moves = not hasattr(transformers.cache_utils, "KVSharingDict")
    said = r"the model reads `\.to` of the keys" if moves else "attends twice"
    with pytest.raises(UnsupportedModelError, match=said):
        forward(model, cache, data, 0, 20)
