"""A cache that holds trellis codes where Sixfold's holds codebook indices: the same bytes.

Windows, sinks, key map, pages and scales are those of `TurboQuantCache`; there is no attention on
trellis codes yet, so layers are decoded to attend. The product's code is read in the same way
beside it, so that nothing but the code differs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from benchmarks.with_layers import with_layers
from sixfold import TrellisQuantizer
from sixfold.cache import CachePolicy
from sixfold.cache.code import Code, MakeCode, PageCode, page_code
from sixfold.codes import TrellisCodes
from sixfold.eval.caches import MakeCache, compressed
from sixfold.kernels._narrow import narrow
from sixfold.kernels.attention import dense_attention, merge_partials, with_sinks
from sixfold.kernels.attention.reference import page_positions
from sixfold.kernels.cached_attention.reference import visible_tokens
from sixfold.kernels.types import KeyMap, Pages, Pool, Softmax, Tokens
from sixfold.packing import PAGE_TOKENS
from sixfold.rotation import Rotation
from sixfold.trellis import codewords, path_bytes


def attend_decoded(
    code: Code,
    query: Float[Tensor, "batch heads queries key_dim"],
    tokens: Sequence[Tokens],
    pages: Sequence[Pages],
    key_map: KeyMap,
    position: Int64[Tensor, " batch"],
    start: Int64[Tensor, " batch"],
    softmax: Softmax,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """`Code.attend` for codes that have no kernels for it: on decoded pages, in float32."""
    own = position[:, None] + torch.arange(query.shape[2], device=query.device)
    held = [visible_tokens(part) for part in tokens]
    for part in pages:
        found = page_positions(part)
        found = found.masked_fill(found < start[:, None], -1)
        held.append((*code.read(part, torch.float32, key_map), found))
    parts = [
        dense_attention(
            query,
            *vectors,
            own,
            scaling=softmax.scaling,
            mask=softmax.mask,
            sliding_window=softmax.sliding_window,
            softcap=softmax.softcap,
        )
        for vectors in held
    ]
    return narrow(with_sinks(merge_partials(parts), softmax.sink_logits).out, query.dtype)


class DecodedCode(PageCode):
    """The product's code, of which attention sees what is decoded."""

    def attend(self, *arguments: Any) -> Tensor:
        """See `Code.attend`."""
        return attend_decoded(self, *arguments)


def decoded_code(policy: CachePolicy, key_dim: int, value_dim: int) -> DecodedCode:
    """The same for a policy."""
    code = page_code(policy, key_dim, value_dim)
    return DecodedCode(code.keys, code.values)


@dataclasses.dataclass(frozen=True)
class TrellisCode:
    """Paths of a trellis in pages, each vector's after the other's."""

    keys: TrellisQuantizer
    values: TrellisQuantizer

    @property
    def page_bytes(self) -> tuple[int, int]:
        """See `Code.page_bytes`."""
        keys, values = (PAGE_TOKENS * path_bytes(x.dim, x.bits) for x in (self.keys, self.values))
        return keys, values

    def tables(self, device: torch.device) -> list[Tensor]:
        """See `Code.tables`."""
        found = []
        for one in (self.keys, self.values):
            rotation = Rotation(one.dim, one.rotation, one.seed)
            found += [rotation.turns(device), rotation.factor(device)]
            found.append(codewords(one.states, one.bits, device))
        return found

    def on(self, device: torch.device) -> "TrellisCode":
        """See `Code.on`."""
        return self

    def store(
        self, keys: Tensor, values: Tensor, slots: Tensor, pool: Pool, key_map: KeyMap
    ) -> None:
        """See `Code.store`."""
        mean, scale, _ = key_map.of_sequences()
        mapped = (keys.float() - mean[:, :, None]) * scale[:, :, None]
        for quantizer, x, codes, scales in (
            (self.keys, mapped, pool.key_codes, pool.key_scales),
            (self.values, values.float(), pool.value_codes, pool.value_scales),
        ):
            coded = quantizer.encode(x.unflatten(2, (-1, PAGE_TOKENS)).transpose(1, 2))
            codes[slots] = coded.packed.flatten(-2)
            scales[slots] = coded.scales

    def read(self, pages: Pages, dtype: torch.dtype, key_map: KeyMap) -> tuple[Tensor, Tensor]:
        """See `Code.read`."""
        pool, slots = pages.pool, pages.slots
        mean, scale, _ = key_map.of_sequences()
        keys = _decoded(self.keys, pool.key_codes[slots], pool.key_scales[slots])
        values = _decoded(self.values, pool.value_codes[slots], pool.value_scales[slots])
        return (keys / scale[:, :, None] + mean[:, :, None]).to(dtype), values.to(dtype)

    def attend(self, *arguments: Any) -> Tensor:
        """See `Code.attend`."""
        return attend_decoded(self, *arguments)


def _decoded(quantizer: TrellisQuantizer, pages: Tensor, scales: Tensor) -> Tensor:
    codes = TrellisCodes(quantizer, pages.unflatten(-1, (PAGE_TOKENS, -1)), scales)
    return quantizer.decode(codes).transpose(1, 2).flatten(2, 3)


def trellis_code(policy: CachePolicy, key_dim: int, value_dim: int) -> Code:
    """A policy's trellis: its scales are those that keys and values have in the product's code."""
    return TrellisCode(
        TrellisQuantizer(key_dim, policy.key_bits, scale="unbiased", seed=policy.seed),
        TrellisQuantizer(value_dim, policy.value_bits, scale="optimal", seed=policy.seed),
    )


def decoded_cache(bits: float, trellis: bool, **options: Any) -> MakeCache:
    """Make `TurboQuantCache`s of trellis codes, or of its own, that attend to what they decode."""
    make_code: MakeCode = trellis_code if trellis else decoded_code

    # Of the same bits for both: codes are compared, not ways to spend them.
    made = compressed(bits, key_bits=bits, value_bits=bits, **options)
    return with_layers(made, lambda: (make_code,))
