"""llama2.c checkpoints: the same function in transformers, and the tokenizer beside it."""

import math
import os
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sixfold.errors import FormatError
from training import llama2c

ASSETS = Path(os.environ.get("SIXFOLD_ASSETS", "shared/assets"))
SHAPE = llama2c.Shape(16, 24, 2, 4, 2, 40, 32, tied=True)


def write(path: Path, shape: llama2c.Shape) -> dict[str, npt.NDArray[np.float32]]:
    """A random checkpoint, and its tensors."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, size in shape.tensors().items():
        spread = 1 / math.sqrt(size[-1])
        tensors[name] = rng.normal(0, spread, size).astype("<f4")
        if "norm" in name:
            tensors[name] += np.float32(1)
    vocabulary = shape.vocab_size if shape.tied else -shape.vocab_size
    header = (shape.dim, shape.hidden_dim, shape.n_layers, shape.n_heads, shape.n_kv_heads)
    data = struct.pack("<7i", *header, vocabulary, shape.seq_len)
    path.write_bytes(data + b"".join(tensor.tobytes() for tensor in tensors.values()))
    return tensors


def normalized(
    x: npt.NDArray[np.float64], weight: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def forward(
    shape: llama2c.Shape, w: dict[str, npt.NDArray[np.float32]], ids: list[int]
) -> npt.NDArray[np.float64]:
    """run.c, token by token and head by head, with neighbouring channels rotated."""
    size, group = shape.head_dim, shape.n_heads // shape.n_kv_heads
    keys: list[list[npt.NDArray[np.float64]]] = [[] for _ in range(shape.n_layers)]
    values: list[list[npt.NDArray[np.float64]]] = [[] for _ in range(shape.n_layers)]
    logits = []

    def rotated(x: npt.NDArray[np.float64], position: int) -> npt.NDArray[np.float64]:
        out = x.reshape(-1, size).copy()
        for i in range(0, size, 2):
            angle = position * 10000 ** (-i / size)
            real, imaginary = out[:, i].copy(), out[:, i + 1].copy()
            out[:, i] = real * math.cos(angle) - imaginary * math.sin(angle)
            out[:, i + 1] = real * math.sin(angle) + imaginary * math.cos(angle)
        return out

    for position, token in enumerate(ids):
        x = w["embed_tokens"][token].astype(np.float64)
        for layer in range(shape.n_layers):
            h = normalized(x, w["input_layernorm"][layer])
            query = rotated(w["self_attn.q_proj"][layer] @ h, position)
            keys[layer].append(rotated(w["self_attn.k_proj"][layer] @ h, position))
            values[layer].append((w["self_attn.v_proj"][layer] @ h).reshape(-1, size))
            heads = []
            for head in range(shape.n_heads):
                scores = np.array([k[head // group] @ query[head] for k in keys[layer]])
                weights = np.exp(scores / math.sqrt(size))
                seen = np.stack([v[head // group] for v in values[layer]])
                heads.append(weights @ seen / weights.sum())
            x = x + w["self_attn.o_proj"][layer] @ np.concatenate(heads)
            h = normalized(x, w["post_attention_layernorm"][layer])
            gate = w["mlp.gate_proj"][layer] @ h
            inner = gate / (1 + np.exp(-gate)) * (w["mlp.up_proj"][layer] @ h)
            x = x + w["mlp.down_proj"][layer] @ inner
        output = w.get("lm_head", w["embed_tokens"])
        logits.append(output @ normalized(x, w["norm"]))
    return np.stack(logits)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_original(tmp_path: Path, tied: bool) -> None:
    shape = llama2c.Shape(16, 24, 2, 4, 2, 40, 32, tied)
    tensors = write(tmp_path / "model.bin", shape)
    assert (tmp_path / "model.bin").stat().st_size % 4 == 0
    found_shape, found = llama2c.read_checkpoint(tmp_path / "model.bin")
    assert found_shape == shape
    assert all(np.array_equal(found[name].numpy(), tensors[name]) for name in tensors)
    ids = [1, 7, 39, 7, 0, 22, 3]
    with torch.no_grad():
        logits = llama2c.to_llama(found_shape, found)(torch.tensor([ids])).logits[0]
    np.testing.assert_allclose(logits.numpy(), forward(shape, tensors, ids), atol=1e-5)


@pytest.mark.parametrize("change", [-4, 4])
def test_files_of_another_length_are_refused(tmp_path: Path, change: int) -> None:
    write(tmp_path / "model.bin", SHAPE)
    data = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes((data + bytes(4))[: len(data) + change])
    with pytest.raises(FormatError, match=f"the file has {len(data) + change}"):
        llama2c.read_checkpoint(tmp_path / "model.bin")
    (tmp_path / "model.bin").write_bytes(b"short")
    with pytest.raises(FormatError, match="5 bytes, fewer than a llama2"):
        llama2c.read_checkpoint(tmp_path / "model.bin")


def piece(text: str, score: float, kind: int = 1) -> bytes:
    raw = text.encode()
    inner = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score)
    inner += b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(inner)]) + inner


def test_merges_go_by_the_scores_of_pieces(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("\u2581", 0.0, 1)]
    pieces += [(letter, -9.0, 1) for letter in "abc"]
    pieces += [("bc", -1.0, 1), ("ab", -2.0, 1), ("\u2581a", -3.0, 1)]
    path = tmp_path / "tok.model"
    path.write_bytes(b"".join(piece(*one) for one in pieces) + b"\x12\x02\x20\x69")
    assert llama2c.read_pieces(path) == pieces
    tokenizer = llama2c.to_tokenizer(path, 32)
    # "bc" outranks "ab", which leaves the space to "a"; what is not in the vocabulary is unknown.
    assert tokenizer.tokenize("abc ab?") == ["\u2581a", "bc", "\u2581", "ab", "<unk>"]
    assert tokenizer("abc")["input_ids"] == [1, 9, 7]
    assert tokenizer.decode(tokenizer("abc ab")["input_ids"], skip_special_tokens=True) == "abc ab"


@pytest.mark.parametrize(
    ("folder", "binary", "tokenizer", "limit"),
    [
        # Perplexity a token on stories, as their makers' losses lead to expect.
        ("stories260K", "stories260K.bin", "tok512.model", 6.5),
        ("babyllama_tok105", "model5000.bin", "tok105.model", 3.2),
    ],
)
def test_real_models_tell_stories(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    binary: str,
    tokenizer: str,
    limit: float,
) -> None:
    source = ASSETS / "models" / folder
    if not source.is_dir():
        pytest.skip(f"needs {binary} in SIXFOLD_ASSETS/models/{folder}, which is not here")
    arguments = [str(source / binary), str(tmp_path), "--tokenizer", str(source / tokenizer)]
    monkeypatch.setattr("sys.argv", ["llama2c", *arguments])
    llama2c.main()
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    words = AutoTokenizer.from_pretrained(tmp_path)
    text = (ASSETS / "text/TinyStories-valid_30KB.txt").read_text(encoding="utf-8")
    ids = words(text[:2000], return_tensors="pt", verbose=False)["input_ids"]
    window = ids[:, : model.config.max_position_embeddings]
    with torch.no_grad():
        loss = float(model(window, labels=window).loss)
    assert math.exp(loss) < limit
    start = words("Once upon a time", return_tensors="pt")["input_ids"]
    out = model.generate(start, max_new_tokens=40, attention_mask=torch.ones_like(start))
    assert words.decode(out[0], skip_special_tokens=True).startswith("Once upon a time, there was")
