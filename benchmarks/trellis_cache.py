"""A cache that holds trellis codes where Sixfold's holds codebook indices: the same bytes.

Windows, sinks, key map, pages and scales are those of `TurboQuantCache`; there is no attention on
trellis codes yet, so layers are decoded to attend. `TurboQuantMSE` is read in the same way beside
it, so that nothing but the code differs.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sixfold import TrellisQuantizer, TurboQuantCache
from sixfold.cache.attend import Mask, fit_mask
from sixfold.cache.coder import Coder
from sixfold.cache.dense import DenseTokens
from sixfold.cache.layer import CompressedLayer
from sixfold.cache.pages import Run
from sixfold.cache.prefix import Prefix
from sixfold.codes import TrellisCodes
from sixfold.eval.caches import MakeCache
from sixfold.integrations.transformers.layer import TurboQuantLayer
from sixfold.kernels.attention import exact_attention
from sixfold.kernels.types import KeyMap, Scale
from sixfold.packing import PAGE_TOKENS
from sixfold.trellis import codewords, path_bytes


class TrellisCoder(Coder):
    """Paths of a trellis in pages, each vector's after the other's."""

    @property
    def quantizer(self) -> TrellisQuantizer:
        """The scales are those that keys and values have in `Coder`."""
        scale: Scale = "unbiased" if self.layout == "key" else "optimal"
        return TrellisQuantizer(self.dim, self.bits, scale=scale, seed=self.seed)

    @property
    def page_bytes(self) -> int:
        """Bytes of one head's codes of a page, without scales."""
        return PAGE_TOKENS * path_bytes(self.dim, self.bits)

    def tables(self, device: torch.device) -> list[Tensor]:
        """Every tensor that coding needs beside the pages."""
        turns, factor, _ = super().tables(device)
        return [turns, factor, codewords(self.quantizer.states, self.bits, device)]

    def _storage(self, run: Run) -> tuple[Tensor, Tensor]:
        keys, key_scales, values, value_scales = run.slab.pool
        return (keys, key_scales) if self.layout == "key" else (values, value_scales)

    def write(self, run: Run, x: Tensor, key_map: KeyMap | None = None) -> None:
        """Encode whole pages, mapped if there is a map."""
        x = x.float()
        if key_map is not None:
            x = (x - key_map.mean[:, :, None]) * key_map.scale[:, :, None]
        codes = self.quantizer.encode(x.unflatten(2, (-1, PAGE_TOKENS)).transpose(1, 2))
        pages, scales = self._storage(run)
        pages[run.slots] = codes.packed.flatten(-2)
        scales[run.slots] = codes.scales

    def read(self, run: Run, dtype: torch.dtype, key_map: KeyMap | None = None) -> Tensor:
        """Decode a run of whole pages and undo the map."""
        pages, scales = self._storage(run)
        rows = pages[run.slots].unflatten(-1, (PAGE_TOKENS, -1))
        codes = TrellisCodes(self.quantizer, rows, scales[run.slots])
        x = self.quantizer.decode(codes).transpose(1, 2).flatten(2, 3)
        if key_map is not None:
            x = x / key_map.scale[:, :, None] + key_map.mean[:, :, None]
        return x.to(dtype)


class DecodedLayer(CompressedLayer):
    """A layer that attends to what it reads back of its codes, exactly."""

    def attend(
        self,
        query: Tensor,
        *,
        scaling: float,
        mask: Mask | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """See `CompressedLayer.attend`."""
        options: dict[str, Any] = {"softcap": softcap, "sink_logits": sink_logits}
        if self.prefix is None:
            return super().attend(query, scaling=scaling, mask=mask, **options)
        mask = None if mask is None else fit_mask(mask, self.held)
        out = exact_attention(query, *self.dequantized(), scaling=scaling, mask=mask, **options)
        self.compress()
        return out


class TrellisLayer(DecodedLayer):
    """The same with trellis codes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.key_coder, self.value_coder = (
            TrellisCoder(one.layout, one.dim, one.bits, one.seed)
            for one in (self.key_coder, self.value_coder)
        )

    def _write(self, run: Run, chunk: DenseTokens, prefix: Prefix) -> None:
        assert isinstance(self.key_coder, TrellisCoder)
        assert isinstance(self.value_coder, TrellisCoder)
        self.key_coder.write(run, chunk.keys, prefix.key_map)
        self.value_coder.write(run, chunk.values)


class _DecodedCacheLayer(TurboQuantLayer):
    """Transformers' side of `DecodedLayer`."""

    store_type: ClassVar[Callable[..., CompressedLayer]] = DecodedLayer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn batch, heads, dims, dtype and device from the first tokens."""
        self.adopt(self.store_type(key_states, value_states, self.policy, self.sliding_window))


class _TrellisCacheLayer(_DecodedCacheLayer):
    store_type = TrellisLayer


def decoded_cache(bits: float, trellis: bool, **options: Any) -> MakeCache:
    """Make `TurboQuantCache`s of trellis codes, or of its own, that attend to what they decode."""
    kind = _TrellisCacheLayer if trellis else _DecodedCacheLayer

    def make(model: PreTrainedModel) -> TurboQuantCache:
        # Of the same bits for both: codes are compared, not ways to spend them.
        cache = TurboQuantCache.for_model(model, key_bits=bits, value_bits=bits, **options)
        cache.layers = [
            kind(layer.policy, layer.sliding_window, layer.fused)
            for layer in cache.compressed_layers
        ]
        return cache

    return make
