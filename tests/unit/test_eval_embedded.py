"""The model inside the package: small, honest about its shape, and able to retrieve."""

from pathlib import Path

import pytest
import torch

from sixfold.errors import SixfoldError
from sixfold.eval import embedded
from sixfold.eval.caches import compressed, uncompressed
from sixfold.eval.niah import retrieve


def test_files_are_small_and_explained() -> None:
    with embedded.folder() as path:
        names = {file.name for file in path.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
        assert sum(file.stat().st_size for file in path.iterdir()) <= 8_000_000
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_loads_ready_to_run(dtype: torch.dtype) -> None:
    model, tokenizer = embedded.load_embedded(dtype)
    assert (model.dtype, model.training) == (dtype, False)
    config = model.config
    assert config.head_dim >= 64
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 2048
    text = "The secret number of Miriam is 48213."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_it_finds_needles_through_codes() -> None:
    model, tokenizer = embedded.load_embedded()
    caches = {"16": uncompressed, "4": compressed(4)}
    found = retrieve(model, tokenizer, embedded.haystack(), caches, lengths=[1024])
    assert found["16"].asked == 5
    assert found["16"].exact == found["4"].exact == 5


def test_an_install_without_the_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "files", lambda _: tmp_path)
    with pytest.raises(SixfoldError, match="the embedded model is missing from this install"):
        embedded.load_embedded()
