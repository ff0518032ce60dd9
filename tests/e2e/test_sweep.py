"""The sweep of architectures, on some of each outcome; the whole is `tools.sweep_architectures`."""

import json
from importlib.metadata import version

import pytest

from tools import sweep_architectures
from tools.blocks import RESULTS
from tools.sweep_architectures import PerturbedCache, architectures, build, check, compare, decode

pytestmark = pytest.mark.usefixtures("unhooked")

EXPECTED = {
    # Attention beside a state of fixed size, by layer or for all of them.
    "FalconH1ForCausalLM": "fused",
    "Zamba2ForCausalLM": "fused",
    "ZambaForCausalLM": "fused",
    "ZayaForCausalLM": "fused",
    # Layers that attend to an image.
    "MllamaForCausalLM": "fused",
    # An encoder's architecture, and one whose `get_decoder` gives no decoder.
    "ModernBertDecoderForCausalLM": "fused",
    "BertLMHeadModel": "fused",
    # Tokens selected by an indexer, whose keys are held as well.
    "DeepseekV32ForCausalLM": "dequantized",
    # What computes with cached tensors, or has a bias that attention on codes does not know.
    "DiffLlamaForCausalLM": "dequantized",
    "DogeForCausalLM": "dequantized",
    "JetMoeForCausalLM": "dequantized",
    "InklingForCausalLM": "dequantized",
    # Changes some of its states in place when it decodes.
    "Inkling2ForCausalLM": "dequantized",
    # No attention at all.
    "MambaForCausalLM": "refused",
}


COMMITTED = json.loads((RESULTS / "architectures.json").read_text(encoding="utf-8"))


def release(text: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(map(int, text.split(".")[:2]))


SWEPT, INSTALLED = release(COMMITTED["transformers"]), release(version("transformers"))


@pytest.mark.parametrize("name", EXPECTED)
def test_outcome(name: str) -> None:
    if name not in architectures() and INSTALLED < SWEPT:
        pytest.skip(f"{name} is younger than transformers {version('transformers')}")
    *_, row = check(architectures()[name], name)
    assert row["status"] == EXPECTED[name], row
    if row["status"] == "refused":
        assert "no attention layer that Sixfold can compress" in row["reason"]
    else:
        assert len(row["warnings"]) == (row["status"] == "dequantized")


def test_what_is_wrong_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", "LlamaForCausalLM", 1.5)
    expected = decode(model, PerturbedCache(model.config, 0.0))
    monkeypatch.setattr(sweep_architectures, "BITS", 3)
    row = compare(model)
    assert row["status"] == "wrong"
    assert row["fused_error"] > row["tolerance"] > 0
    assert expected.isfinite().all()


def test_nothing_is_wrong() -> None:
    """Every architecture of the committed sweep is right, or refused with a reason."""
    rows = COMMITTED["rows"]
    swept, here = {row["class"] for row in rows}, set(architectures())
    # Older versions lack some, newer ones bring others; the version that was swept has these.
    assert swept == here if INSTALLED == SWEPT else swept & here
    good = {"fused", "partly fused", "dequantized"}
    for row in rows:
        assert row["status"] in {*good, "refused", "not built"}, row
        if row["status"] in good:
            assert max(row["fused_error"], row["dequantized_error"]) <= row["tolerance"]
        else:
            assert row["reason"]
