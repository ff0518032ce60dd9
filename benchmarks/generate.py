"""Whole models, uncompressed and compressed: tokens a second of generation, and the prefill.

The embedded model reads text. The other has the shape of eight layers of Llama 3 8B and random
weights. Before generation a prompt of up to 2k tokens is run through the model; a longer one would
take minutes, so random keys and values are put into the caches instead (`filled` in the results
says which).
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.ours import Options, variants
from benchmarks.peers import cache_bytes, installed_peers
from sixfold.cache.accounting import uncompressed_nbytes
from sixfold.eval.caches import MakeCache, compressed, uncompressed
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.eval.speed import contender_name
from sixfold.eval.timing import Case, Contender
from sixfold.integrations.transformers.config import uncompressed_shapes
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.integrations.transformers.layer import TurboQuantLayer

TOKENS = (1024, 32768)
PREFILL_TOKENS = (1024, 2048)
LONGEST_PROMPT = 2048
# Bytes up to which other quantized caches take part: they expand all they hold in every step.
LARGEST_PEER = 2**29
CHUNK = 4096
BITS = (4,)


def cases(tokens: int, options: Options) -> dict[str, Callable[[], Case]]:
    """Generation after `tokens` tokens: a case for each model."""
    return _by_model(tokens, options, _generation)


def prefill_cases(tokens: int, options: Options) -> dict[str, Callable[[], Case]]:
    """A prompt of `tokens` tokens into an empty cache: a case for each model."""
    return _by_model(tokens, options, _prefill)


ContenderOf: TypeAlias = Callable[[PreTrainedModel, str, MakeCache, Tensor, Options], Contender]


def _by_model(
    tokens: int, options: Options, contender: ContenderOf
) -> dict[str, Callable[[], Case]]:
    made: dict[str, Callable[[], Case]] = {
        "embedded": partial(_embedded_case, tokens, options, contender),
        "random": partial(_random_case, tokens, options, contender),
    }
    return made if options.model == "both" else {options.model: made[options.model]}


def random_llama(layers: int = 8, width: int = 4096) -> LlamaForCausalLM:
    """Layers of Llama 3 8B (32 query and 8 key heads of 128) with random bfloat16 weights."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_attention_heads=width // 128,
        num_key_value_heads=max(width // 512, 1),
        head_dim=128,
        vocab_size=4096,
        max_position_embeddings=2**18,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # As a plain module: transformers wraps `to` in a type that hides its argument.
    module: torch.nn.Module = model
    module.to(torch.bfloat16).to_empty(device="cpu").eval()
    # Its frequencies are a buffer that no weight file would have filled either.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.uniform_(parameter, -0.03, 0.03, generator=generator)
    return model


def _random_case(tokens: int, options: Options, contender: ContenderOf) -> Case:
    model = random_llama()
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=_seeded(tokens))
    return _case(model, ids, options, contender)


def _embedded_case(tokens: int, options: Options, contender: ContenderOf) -> Case:
    model, tokenizer = load_embedded(torch.bfloat16)
    ids = tokenizer(haystack(), return_tensors="pt", verbose=False)["input_ids"]
    ids = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
    return _case(model, ids, options, contender)


def _case(model: PreTrainedModel, ids: Tensor, options: Options, contender: ContenderOf) -> Case:
    caches: dict[str, MakeCache] = {"transformers DynamicCache, sdpa": uncompressed}
    if _uncompressed(model, ids.shape[1]) <= LARGEST_PEER:
        caches |= installed_peers()
    contenders = [contender(model, name, make, ids, options) for name, make in caches.items()]
    for bits, code in itertools.product(options.bits, options.codes):
        make = compressed(bits, code=code)
        one = contender(model, contender_name(bits, code), make, ids, options)
        contenders.append(replace(one, notes={**one.notes, "bits": bits, "code": code}))
    return variants("attention", Case(contenders), options)


def _uncompressed(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of an uncompressed cache."""
    return uncompressed_nbytes(uncompressed_shapes(model.config), tokens=tokens)


def _generation(
    model: PreTrainedModel, name: str, make: MakeCache, ids: Tensor, options: Options
) -> Contender:
    cache = make(model)
    real = ids.shape[1] <= LONGEST_PROMPT
    if real:
        _forward(model, ids, cache)
    else:
        _fill(cache, model, ids.shape[1])
    notes = {
        "held_bytes": cache_bytes(cache),
        "filled": "by the model" if real else "random keys and values",
    }

    def generate() -> None:
        for _ in range(options.steps):
            _forward(model, ids[:, -1:], cache)

    return Contender(name, generate, steps=options.steps, notes=notes)


def _prefill(
    model: PreTrainedModel, name: str, make: MakeCache, ids: Tensor, options: Options
) -> Contender:
    return Contender(name, lambda: _forward(model, ids, make(model)))


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: Tensor, cache: Cache) -> None:
    model(input_ids=ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)


@torch.no_grad()
def _fill(cache: Cache, model: PreTrainedModel, tokens: int) -> None:
    """Put random keys and values into every layer, as many at a time as a prefill in chunks."""
    config = model.config
    generators = [_seeded(index) for index in range(config.num_hidden_layers)]
    for first in range(0, tokens, CHUNK):
        size = (1, config.num_key_value_heads, min(CHUNK, tokens - first), config.head_dim)
        for index, generator in enumerate(generators):
            keys, values = (torch.randn(size, generator=generator).bfloat16() for _ in range(2))
            cache.update(keys, values, index)
            layer = cache.layers[index]
            if isinstance(layer, TurboQuantLayer) and layer.fused:
                # Tokens of a fused layer are compressed when attended, which nobody needs here.
                assert layer.store is not None
                layer.store.compress()


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
