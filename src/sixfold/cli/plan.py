"""`sixfold plan`: how many users, and how long a context, a memory holds."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoConfig, PreTrainedConfig

from sixfold.cache import CachePolicy, LayerShape, cache_nbytes, uncompressed_nbytes
from sixfold.cache.policy import FIT_TOKENS
from sixfold.cli.common import JsonOption, parse_bits, parse_list, parse_size, quiet, unreadable
from sixfold.cli.render import Output, human_bytes
from sixfold.errors import SixfoldError
from sixfold.eval import embedded
from sixfold.integrations.transformers.config import layer_shapes, layer_types
from sixfold.integrations.vllm.capacity import BLOCK_TOKENS, block_capacity
from sixfold.packing import PAGE_TOKENS, Bits

UNCOMPRESSED = 16
LIMIT = 2**40
FORGOTTEN = 10_000  # bytes
MOST = 2**20  # layers, heads or coordinates


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of a model: its config, or plain numbers for identical layers."""

    config: PreTrainedConfig | None
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def most_tokens(self) -> int | None:
        """The longest context the model is made for, where its config says."""
        if self.config is None:
            return None
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def layer_shapes(self, policy: CachePolicy | None) -> list[LayerShape]:
        """The attention layers under one policy; None leaves them uncompressed."""
        if self.config is None:
            one = LayerShape(self.kv_heads, self.head_dim, self.head_dim, policy=policy)
            return [one] * self.layers
        count = len(layer_types(self.config)[0])
        return layer_shapes(self.config, [policy] * count)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What fits at one bit width; 16 bits is the uncompressed cache."""

    bits: float
    users: dict[int, int]
    longest_context: int
    bytes_per_user: dict[int, int]


def plan(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A config.json, a directory or a hub name."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, max=MOST, help="Layers.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, max=MOST, help="Key-value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, max=MOST, help="Coordinates.")] = None,
    memory: Annotated[str, typer.Option(help="Of the device: 80GB is 80·10⁹ bytes.")] = "80GB",
    weights: Annotated[
        str | None,
        typer.Option(
            help="For weights and activations; by default the weights that lie on this machine, "
            "with --vllm 0."
        ),
    ] = None,
    bits: Annotated[
        str, typer.Option(help="Bits per value, separated by commas; 16 is always shown.")
    ] = "4,3,2.5,2",
    contexts: Annotated[
        str, typer.Option(help="Tokens a user, separated by commas.")
    ] = "4096,8192,16384,32768,65536,131072",
    vllm: Annotated[bool, typer.Option(help="Blocks that vLLM has, to the block.")] = False,
    block_size: Annotated[
        int, typer.Option(min=1, max=MOST, help="With --vllm: tokens of a block.")
    ] = BLOCK_TOKENS,
    json: JsonOption = None,
) -> None:
    """How many users x context fit in memory: the cache's own byte accounting."""
    output, shape = Output(json), _shape(model, layers, kv_heads, head_dim)
    # Blocks of vLLM are what it leaves them, which is given as the memory.
    of_model = 0 if vllm else _weights_of(model)
    taken = of_model if weights is None else parse_size(weights)
    free = _memory(memory) - taken
    if free <= 0:
        raise SixfoldError(f"weights of {human_bytes(taken)} leave nothing of a memory of {memory}")
    if vllm:
        _plan_blocks(shape.layer_shapes(None), parse_bits(bits), free, block_size, output)
        return
    sizes = parse_list(contexts, int, "--contexts")
    if min(sizes) < 1:
        raise SixfoldError(f"--contexts: expected positive numbers of tokens, got {contexts!r}")
    found = [_capacity(UNCOMPRESSED, shape.layer_shapes(None), sizes, free)]
    dims = {(one.key_dim, one.value_dim) for one in shape.layer_shapes(None)}
    for width in parse_bits(bits):
        policy = CachePolicy.spending(width, dims, fit_tokens=FIT_TOKENS)
        found.append(_capacity(width, shape.layer_shapes(policy), sizes, free))
    limit = shape.most_tokens

    def shown(tokens: int) -> str:
        return f"{tokens:,}" + "*" * (limit is not None and tokens > limit)

    output.table(
        f"Users that fit in {human_bytes(free)}",
        ["context", "uncompressed", *(f"{one.bits:g} bits" for one in found[1:])],
        [[shown(size), *(f"{one.users[size]:,}" for one in found)] for size in sizes]
        + [["longest, one user", *(shown(one.longest_context) for one in found)]],
    )
    output.say(
        "Bytes as the cache counts them after a prefill: codes, scales, full-precision windows and "
        "tables. A cache that grows token by token holds up to 1/16 more."
    )
    if limit is not None and max(*sizes, *(one.longest_context for one in found)) > limit:
        output.say(f"* beyond the {limit:,} tokens that this model is made for.")
    output.say(_about_weights(taken, asked=weights is not None))
    output.json({"free_bytes": free, "most_tokens": limit, "rows": [asdict(one) for one in found]})


def _weights_of(model: str | None) -> int:
    """Bytes of the weights beside a config, or of those in the package; 0 where there are none."""
    if model is None:
        return 0
    if model == embedded.NAME:
        with embedded.folder() as path:
            return _weights_of(str(path))
    given = Path(model)
    folder = given.parent if given.is_file() else given
    sizes = (
        sum(file.stat().st_size for file in folder.glob(name))
        for name in ("*.safetensors", "pytorch_model*.bin")
    )
    return next(filter(None, sizes), 0)


def _about_weights(taken: int, *, asked: bool) -> str:
    if not taken:
        return "No memory is set aside for weights and activations: give --weights."
    if asked:
        return f"{human_bytes(taken)} are set aside for weights and activations."
    return f"{human_bytes(taken)} are set aside for this model's weights, none for activations."


def _memory(text: str) -> int:
    """Bytes of a device; a small number without a unit is a unit forgotten."""
    size = parse_size(text)
    if size < FORGOTTEN and text.strip().isdigit():
        raise SixfoldError(f"--memory {text}: {size} bytes hold no cache; did you mean {text}GB?")
    return size


def _plan_blocks(
    shapes: Sequence[LayerShape],
    bits: Sequence[Bits],
    free: int,
    block_size: int,
    output: Output,
) -> None:
    """What vLLM's log will say."""
    if block_size % PAGE_TOKENS:
        raise SixfoldError(
            f"--block-size: expected a multiple of {PAGE_TOKENS} tokens, got {block_size}"
        )
    widths: list[Bits | None] = [None, *bits]
    found = [block_capacity(shapes, width, free, block_size) for width in widths]
    plain = found[0].tokens
    output.table(
        f"vLLM's blocks of {block_size} tokens in {human_bytes(free)}",
        ["bits", "bytes a block", "blocks", "tokens", "beside uncompressed"],
        [
            [
                "uncompressed" if width is None else f"{width:g}",
                f"{one.block_bytes:,}",
                f"{one.blocks:,}",
                f"{one.tokens:,}",
                f"{one.tokens / plain:.2f}×" if plain else "-",
            ]
            for width, one in zip(widths, found, strict=True)
        ],
    )
    output.say(
        f"vLLM's CPU platform takes blocks of {BLOCK_TOKENS} tokens, from 0.33 on of {PAGE_TOKENS} "
        "for Sixfold (--block-size). Beside them each running request has up to 132 uncompressed "
        "tokens (docs/vllm.md)."
    )
    rows = [
        {"bits": width or UNCOMPRESSED, **asdict(one)}
        for width, one in zip(widths, found, strict=True)
    ]
    output.json({"free_bytes": free, "rows": rows})


def _shape(
    model: str | None, layers: int | None, kv_heads: int | None, head_dim: int | None
) -> Shape:
    numbers = (layers, kv_heads, head_dim)
    if model is not None and numbers == (None, None, None):
        return Shape(_read_config(model), 0, 0, 0)
    if model is not None or layers is None or kv_heads is None or head_dim is None:
        raise SixfoldError("give either MODEL, or all of --layers, --kv-heads and --head-dim")
    return Shape(None, layers, kv_heads, head_dim)


def _read_config(name: str) -> PreTrainedConfig:
    quiet()
    if name == embedded.NAME:
        with embedded.folder() as path:
            return _read_config(str(path))
    with unreadable("the config of", name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name)
    return config


def _capacity(
    bits: float, shapes: Sequence[LayerShape], contexts: Sequence[int], free: int
) -> Capacity:
    count = uncompressed_nbytes if bits == UNCOMPRESSED else cache_nbytes

    def users(tokens: int) -> int:
        return _largest(lambda batch: count(shapes, tokens=tokens, batch=batch) <= free)

    return Capacity(
        bits=bits,
        users={tokens: users(tokens) for tokens in contexts},
        longest_context=_largest(lambda tokens: count(shapes, tokens=tokens) <= free),
        bytes_per_user={tokens: count(shapes, tokens=tokens) for tokens in contexts},
    )


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits; 0 if not even 1 does."""
    return bisect.bisect_left(range(1, LIMIT), True, key=lambda number: not fits(number))
