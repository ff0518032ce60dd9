"""What is compared at each width. The first lead of a width is the product as it is."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.codes.fits import keys_by, keys_in_quarters, values_by, values_in_quarters
from benchmarks.codes.imitated import Fit, imitated
from sixfold import TurboQuantCache
from sixfold.eval.caches import MakeCache, compressed
from sixfold.integrations.transformers.layer import TurboQuantLayer
from sixfold.packing import Bits

# Bits beyond the width, by quarters of the coordinates.
QUARTERS = (1, 0, 0, -1)


@dataclass(frozen=True)
class Lead:
    """One way to code keys and values.

    Attributes:
        label: What it is.
        keys: How keys are coded; by the product's kernels, with values, where it is None.
        values: How values are coded.
        options: Of `TurboQuantCache`.
    """

    label: str
    keys: Fit | None = None
    values: Fit | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def cache(self, bits: Bits) -> MakeCache:
        """Make caches that hold this."""
        make_product = compressed(bits, code="codebook", **self.options)
        if self.keys is None or self.values is None:
            return make_product
        fits = self.keys, self.values

        def make(model: PreTrainedModel) -> TurboQuantCache:
            cache = make_product(model)
            assert isinstance(cache, TurboQuantCache)
            outputs = output_moments(model)
            cache.layers = [
                _layer(layer, fits, output)
                for layer, output in zip(cache.compressed_layers, outputs, strict=True)
            ]
            return cache

        return make


def _layer(layer: TurboQuantLayer, fits: tuple[Fit, Fit], output: Tensor) -> TurboQuantLayer:
    code = imitated(layer.policy, fits, output)
    return TurboQuantLayer(
        layer.policy, layer.sliding_window, layer.fused, lambda *_: code, code.fit
    )


# Every lead of every window asks for those of one model.
@lru_cache(maxsize=1)
def output_moments(model: PreTrainedModel) -> list[Tensor]:
    """Of every layer, for each KV head: WᵀW of the columns W of `o_proj` that read it, summed."""
    found, heads = [], model.config.num_key_value_heads
    layers: Any = model.base_model.layers
    for layer in layers:
        weight, dim = layer.self_attn.o_proj.weight.float(), layer.self_attn.head_dim
        columns = weight.unflatten(1, (heads, -1, dim))
        found.append(torch.einsum("ohgd,ohge->hde", columns, columns))
    return found


def even(bits: Bits) -> dict[str, Bits]:
    """Options that give keys and values the same."""
    return {"key_bits": bits, "value_bits": bits}


PRODUCT = Lead("as it is")
TRELLIS = {states: (keys_by(states), values_by(states)) for states in (128, 256)}
WINDOW = {"recent_window": 128}


def leads(bits: Bits) -> list[Lead]:
    """Those of a width. Most are tried at 2.5 bits, where keys and values have whole bits."""
    found = [
        PRODUCT,
        Lead("window of 128", options=WINDOW),
        Lead("trellis, 128 states", *TRELLIS[128]),
        Lead("trellis, 128 states, window of 128", *TRELLIS[128], WINDOW),
    ]
    if bits != 2.5:
        return found
    trellis_keys, trellis_values = TRELLIS[128]
    quarters = (("in their own basis", 0.1), ("in sorted channels", 1.0))
    return [
        *found,
        Lead("trellis, 256 states", *TRELLIS[256]),
        Lead("trellis, keys and values alike", *TRELLIS[128], even(bits)),
        Lead("trellis for keys alone", trellis_keys, values_by()),
        Lead("trellis for values alone", keys_by(), trellis_values),
        Lead("values centred and weighed", keys_by(), values_by(center=True, weigh=True)),
        *(
            Lead(
                f"keys {basis}, quarters of 4, 3, 3 and 2 bits",
                keys_in_quarters(QUARTERS, shrink=shrink),
                values_by(),
            )
            for basis, shrink in quarters
        ),
        Lead(
            "values in their own basis, quarters of 3, 2, 2 and 1 bits",
            keys_by(),
            values_in_quarters(QUARTERS, shrink=0.1),
        ),
    ]
