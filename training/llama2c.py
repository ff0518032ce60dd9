"""Turn a llama2.c checkpoint into a transformers model: ``python -m training.llama2c M.bin OUT``.

The layout is llama2.c's first ("legacy") one: seven int32, dim, hidden_dim, n_layers, n_heads,
n_kv_heads, vocab_size (negative if the output matrix is stored) and seq_len; then float32
tensors, kind by kind over all layers. llama2.c rotates neighbouring channels (2i, 2i + 1) of a
head, transformers channels (i, i + head_dim / 2): rows of the query and key projections are
reordered, which changes no logit. Source: github.com/karpathy/llama2.c, run.c and export.py.
"""

import argparse
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sixfold.errors import FormatError

HEADER = struct.Struct("<7i")
UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
SPACE = "\u2581"
_NORMAL_PIECE = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """The seven numbers a checkpoint begins with; `tied` instead of the sign of vocab_size."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool

    @property
    def head_dim(self) -> int:
        """Channels a head."""
        return self.dim // self.n_heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names, as transformers has them, and shapes in the order of the file."""
        layers, dim, kv = self.n_layers, self.dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens": (self.vocab_size, dim),
            "input_layernorm": (layers, dim),
            "self_attn.q_proj": (layers, dim, dim),
            "self_attn.k_proj": (layers, kv, dim),
            "self_attn.v_proj": (layers, kv, dim),
            "self_attn.o_proj": (layers, dim, dim),
            "post_attention_layernorm": (layers, dim),
            "mlp.gate_proj": (layers, self.hidden_dim, dim),
            "mlp.down_proj": (layers, dim, self.hidden_dim),
            "mlp.up_proj": (layers, self.hidden_dim, dim),
            "norm": (dim,),
            # Cosines and sines, which transformers computes.
            "frequencies": (2, self.seq_len, self.head_dim // 2),
        }
        return shapes if self.tied else shapes | {"lm_head": (self.vocab_size, dim)}


def read_checkpoint(path: Path) -> tuple[Shape, dict[str, Tensor]]:
    """Read a checkpoint as llama2.c wrote it.

    Raises:
        FormatError: The file is shorter or longer than its header says, or no such file.
    """
    data = path.read_bytes()
    if len(data) < HEADER.size:
        raise FormatError(f"{path} has {len(data)} bytes, fewer than a llama2.c header")
    dim, hidden_dim, layers, heads, kv_heads, vocab_size, seq_len = HEADER.unpack_from(data)
    sizes = dim, hidden_dim, layers, heads, kv_heads, abs(vocab_size), seq_len
    shape = Shape(*sizes, vocab_size > 0)
    plausible = min(sizes) > 0 and shape.dim % shape.n_heads == 0
    counts = (
        {name: int(np.prod(size)) for name, size in shape.tensors().items()} if plausible else {}
    )
    expected = HEADER.size + 4 * sum(counts.values())
    if not plausible or len(data) != expected:
        raise FormatError(
            f"{path} is no llama2.c checkpoint of the first layout: its header {shape} asks for "
            f"{expected} bytes, the file has {len(data)}"
        )
    values = torch.tensor(np.frombuffer(data, "<f4", offset=HEADER.size))
    parts = values.split(list(counts.values()))
    named = zip(shape.tensors().items(), parts, strict=True)
    return shape, {name: part.view(size) for (name, size), part in named}


def to_llama(shape: Shape, tensors: dict[str, Tensor]) -> LlamaForCausalLM:
    """The same function as a transformers model, in float32."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden_dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    state = dict(_state(shape, tensors))
    state["lm_head.weight"] = tensors.get("lm_head", tensors["embed_tokens"])
    model.load_state_dict(state)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, do_sample=False)
    model.eval()
    return model


def _state(shape: Shape, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if name in ("embed_tokens", "norm"):
            yield f"model.{name}.weight", tensor
        elif name not in ("frequencies", "lm_head"):
            for index, weight in enumerate(tensor):
                if name in ("self_attn.q_proj", "self_attn.k_proj"):
                    weight = halves_rotated(weight, shape.head_dim)
                yield f"model.layers.{index}.{name}.weight", weight


def halves_rotated(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection, from neighbouring RoPE channels to half a head apart."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))
    rotated: Tensor = pairs.transpose(1, 2).flatten(0, 2)
    return rotated


def read_pieces(path: Path) -> list[tuple[str, float, int]]:
    """Text, score and kind of every piece of a sentencepiece model.

    A protocol buffer, of which field 1 holds pieces, and of a piece fields 1 to 3 these three.
    """
    pieces = []
    for field, value in _fields(path.read_bytes()):
        if field == 1 and isinstance(value, bytes):
            text, score, kind = "", 0.0, _NORMAL_PIECE
            for inner, part in _fields(value):
                if inner == 1 and isinstance(part, bytes):
                    text = part.decode()
                elif inner == 2 and isinstance(part, bytes):
                    (score,) = struct.unpack("<f", part)
                elif inner == 3 and isinstance(part, int):
                    kind = part
            pieces.append((text, score, kind))
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a protocol buffer message: numbers, or the bytes of anything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise FormatError(f"not a sentencepiece model: wire type {wire} at byte {at}")
        yield field, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise FormatError("not a sentencepiece model: it ends within a number")
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def to_tokenizer(path: Path, max_length: int) -> PreTrainedTokenizerFast:
    """The BPE tokenizer of a sentencepiece model: merges are ranked by the scores of pieces."""
    pieces = read_pieces(path)
    vocabulary = {text: index for index, (text, _, _) in enumerate(pieces)}
    merges = [
        (-score, text[:cut], text[cut:])
        for text, score, kind in pieces
        for cut in range(1, len(text))
        if kind == _NORMAL_PIECE and text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    ranked = [(left, right) for _, left, right in sorted(merges)]
    bytes_too = "<0x00>" in vocabulary
    tokenizer = Tokenizer(
        models.BPE(vocabulary, ranked, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=bytes_too)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the .bin file")
    parser.add_argument("out", type=Path, help="folder to write, for from_pretrained")
    parser.add_argument("--tokenizer", type=Path, help="its sentencepiece .model file")
    arguments = parser.parse_args()
    shape, tensors = read_checkpoint(arguments.model)
    to_llama(shape, tensors).save_pretrained(arguments.out)
    if arguments.tokenizer is not None:
        to_tokenizer(arguments.tokenizer, shape.seq_len).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
