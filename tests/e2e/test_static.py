"""Caches of fixed size: the same logits as the growing cache, step by step, also compiled."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig

from sixfold import TurboQuantCache
from sixfold.errors import SixfoldError, UnsupportedModelError
from sixfold.integrations.transformers.attention import untraced_growth
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.packing import Bits
from tests.e2e.decoding import relative_error
from tests.e2e.models import fresh_model
from tests.processes import printed
from tests.tiny import tiny_model
from tests.versions import traces_models

# Integer arithmetic rounds by the pages a thread gets, which differ.
pytestmark = pytest.mark.usefixtures("exact_arithmetic")

PROMPT, STEPS = 250, 40


def prompt() -> Tensor:
    return torch.randint(2, 384, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def largest_difference(compiled: bool, pinned: bool = False, bits: Bits = 4) -> float:
    """Of the logits of steps that complete a page and of steps that do not."""
    model, ids = tiny_model(), prompt()
    growing = TurboQuantCache.for_model(model, bits, fit_tokens=0)
    model(ids[:, :PROMPT], **cache_argument(growing), use_cache=True)
    if pinned:
        growing = TurboQuantCache.for_model(model, bits, key_map=growing.key_maps())
        model(ids[:, :PROMPT], **cache_argument(growing), use_cache=True)
    static = growing.static(PROMPT + STEPS)
    step = model.forward
    if compiled:
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    worst = 0.0
    # The sixth completes a page.
    for t in range(PROMPT, PROMPT + (10 if compiled else STEPS)):
        token = ids[:, t : t + 1]
        expected = model(token, **cache_argument(growing), use_cache=True).logits
        got = step(
            input_ids=token,
            **cache_argument(static),
            use_cache=True,
            position_ids=torch.full_like(token, t),
        ).logits
        worst = max(worst, float((got - expected).abs().max() / expected.std()))
    return worst


@pytest.mark.parametrize("name", ["llama-64", "mistral", "gemma3"])
def test_positions_go_on_where_a_window_has_moved(name: str) -> None:
    """Also where nobody says which they are."""
    model = fresh_model(name)
    ids = torch.randint(3, 90, (2, 230), generator=torch.Generator().manual_seed(0))
    growing = TurboQuantCache.for_model(model, bits=8, fit_tokens=0)
    with torch.no_grad():
        model(ids[:, :200], **cache_argument(growing))
        static = growing.static(260)
        assert int(static.get_seq_length()) == growing.get_seq_length() == 200
        for t in range(200, 230):
            one = ids[:, t : t + 1]
            logits = [model(one, **cache_argument(x)).logits for x in (growing, static)]
            assert relative_error(logits[1], logits[0]) < 1e-3
        twin = growing.static(260)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        more = torch.cat([ids, ids[:, :1]], 1)
        found = [model.generate(more, **cache_argument(x), **options) for x in (growing, twin)]
    assert torch.equal(*found)


def test_a_static_cache_that_was_not_reset_goes_on() -> None:
    model, ids = tiny_model(), prompt()
    growing = TurboQuantCache.for_model(model, bits=4, fit_tokens=0)
    with torch.no_grad():
        model(ids[:, :PROMPT], **cache_argument(growing), use_cache=True)
        static = growing.static(PROMPT + STEPS)
        for refused in (static.reset, lambda: static.reorder_cache(torch.tensor([1, 0]))):
            with pytest.raises(SixfoldError, match="only decodes"):
                refused()
        model(ids[:, :1], **cache_argument(static), use_cache=True)
    assert int(static.get_seq_length()) == PROMPT + 1


@pytest.mark.parametrize("pinned", [False, True])
def test_a_static_cache_decodes_as_the_growing_one(pinned: bool) -> None:
    assert largest_difference(compiled=False, pinned=pinned) < 1e-4


@traces_models
@pytest.mark.parametrize(
    ("backend", "allowed", "bits"),
    [
        # Codebooks; the search of a trellis is traced for minutes.
        ("reference", 1e-3, 8),
        pytest.param("reference", 1e-3, 4, marks=pytest.mark.slow),
        # Triton's operands have 11 bits: 2^-11 of a logit, and as much of a value.
        pytest.param("triton", 3e-3, 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("pinned", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_step_has_no_graph_break(
    backend: str, allowed: float, bits: Bits, pinned: bool
) -> None:
    asked = f"True, {pinned}, {bits}"
    code = f"from tests.e2e.test_static import largest_difference as d; print(d({asked}))"
    assert float(printed(code, SIXFOLD_BACKEND=backend)[-1]) < allowed


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-64", "mistral", "gemma3"])
def test_tokens_that_a_mask_hides_stay_hidden(name: str) -> None:
    """Among others, where no padding is: at the window's end, in codes, and in what came later."""
    model, ids = fresh_model(name), prompt()[:, :240] % 90
    mask = torch.ones(2, 260, dtype=torch.int64)
    mask[0, 20:120], mask[1, 190:196], mask[0, 203] = 0, 0, 0
    growing = TurboQuantCache.for_model(model, bits=8, fit_tokens=0)
    model(ids[:, :200], attention_mask=mask[:, :200], **cache_argument(growing))
    static = growing.static(260)
    for t in range(200, 240):
        one, at = ids[:, t : t + 1], torch.full((2, 1), t)
        expected, got = (
            model(one, attention_mask=mask[:, :n], position_ids=at, **cache_argument(x)).logits
            for x, n in ((growing, t + 1), (static, 260))
        )
        assert relative_error(got, expected) < 1e-3


@torch.no_grad()
def test_chunks_of_attention_stay_apart() -> None:
    """Llama 4 attends within chunks: what is before the chunk of a query is hidden from it."""
    config = Llama4TextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        intermediate_size_mlp=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        attention_chunk_size=160,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Llama4ForCausalLM(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    ids = prompt()[:, :280] % 97
    growing = TurboQuantCache.for_model(model, bits=8, fit_tokens=0)
    model(ids[:, :200], **cache_argument(growing))
    static = growing.static(300)
    for t in range(200, 280):
        one, at = ids[:, t : t + 1], torch.full((2, 1), t)
        expected, got = (
            model(one, position_ids=at, **cache_argument(x)).logits for x in (growing, static)
        )
        assert relative_error(got, expected) < 1e-3


@torch.no_grad()
def test_generation_continues_in_a_static_cache() -> None:
    model, ids = tiny_model(), prompt()
    growing = TurboQuantCache.for_model(model, bits=8)
    model(ids[:, :PROMPT], **cache_argument(growing), use_cache=True)
    static = growing.static(PROMPT + STEPS)
    expected, got = (
        model.generate(
            ids[:, : PROMPT + 1], **cache_argument(cache), max_new_tokens=20, do_sample=False
        )
        for cache in (growing.fork(), static)
    )
    assert torch.equal(got, expected)


@torch.no_grad()
def test_inference_mode_may_end_before_the_cache_does() -> None:
    model, ids = tiny_model(), prompt()
    cache = TurboQuantCache.for_model(model, bits=4)
    with torch.inference_mode():
        model(ids[:, :PROMPT], **cache_argument(cache), use_cache=True)
        static = cache.static(PROMPT + STEPS)
    with torch.no_grad():
        for t in range(PROMPT, PROMPT + STEPS):
            step = {"input_ids": ids[:, t : t + 1], "use_cache": True}
            position = torch.full((2, 1), t)
            found = model(**step, **cache_argument(static), position_ids=position).logits
            expected = model(**step, **cache_argument(cache)).logits
            assert float((found - expected).abs().max() / expected.std()) < 1e-3


def test_bytes_are_those_of_the_room() -> None:
    model, ids = tiny_model(), prompt()
    growing = TurboQuantCache.for_model(model, bits=4)
    model(ids[:, :PROMPT], **cache_argument(growing), use_cache=True)
    small, large = growing.static(300), growing.static(3000)
    pages = -(-(3000 - 64) // 64) - -(-(300 - 64) // 64)
    # Two layers, sequences and heads; 64 tokens of two rows of 16 bytes, and of two scales.
    codes = 2 * 2 * 2 * 64 * 2 * (16 + 2)
    assert 1 <= (large.nbytes - small.nbytes) / (pages * codes) < 1.05
    assert small.uncompressed_nbytes == growing.uncompressed_nbytes


@torch.no_grad()
def test_what_a_static_cache_cannot_do_says_so(tmp_path: Path) -> None:
    model, ids = tiny_model(), prompt()
    growing = TurboQuantCache.for_model(model, bits=4)
    with pytest.raises(SixfoldError, match="prefill it first"):
        growing.static(100)
    model(ids[:, :20], **cache_argument(growing), use_cache=True)
    with pytest.raises(SixfoldError, match="still too few"):
        growing.static(100)
    model(ids[:, 20:PROMPT], **cache_argument(growing), use_cache=True)
    static = growing.static(400)
    # As accelerate's offloading does before every step.
    assert static.to("cpu") is static
    for attempt in (
        lambda: static.crop(-1),
        lambda: static.fork(),
        lambda: static.to(dtype=torch.float16),
        lambda: static.to("meta"),
        lambda: static.reorder_cache(torch.tensor([1, 0])),
        lambda: static.save(tmp_path / "x.sixfold"),
        lambda: static.static(500),
    ):
        with pytest.raises(SixfoldError, match="only decodes"):
            attempt()
    skipping = TurboQuantCache.for_model(model, bits=4, skip_layers=[0])
    model(ids[:, :PROMPT], **cache_argument(skipping), use_cache=True)
    with pytest.raises(UnsupportedModelError, match="needs every layer compressed"):
        skipping.static(400)


def test_torch_that_takes_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.6: its `disable` knows no `reason`, and the package could not be imported."""
    disable = torch.compiler.disable
    monkeypatch.setattr(
        torch.compiler, "disable", lambda fn=None, recursive=True: disable(fn, recursive)
    )
    assert untraced_growth(lambda: 3)() == 3
