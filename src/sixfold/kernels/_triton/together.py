"""Keys and values to their pages in one launch, on a GPU.

What a decode step stores, a page of a sequence, is a few programs that leave most of the device
idle: it should not wait for them twice.
"""

import torch
from torch import Tensor

from sixfold.kernels._tables import check_table, sequence_maps
from sixfold.kernels._triton import launch
from sixfold.kernels._triton.operators import in_place, operator
from sixfold.kernels._triton.store import store_pages_kernel
from sixfold.kernels.types import Coding, KeyMap, Pool, Scale


def together(keys: Tensor, values: Tensor, key_coding: Coding, value_coding: Coding) -> bool:
    """Whether `store_together` takes them: both have codebooks and are rotated alike."""
    if "trellis" in (key_coding.code, value_coding.code):
        return False
    rotation = launch.rotation(keys.shape[-1], key_coding.turns, key_coding.factor)
    alike = keys.shape == values.shape and key_coding.turns.shape == value_coding.turns.shape
    return alike and launch.encodes(keys, rotation) and launch.encodes(values, rotation)


def store_together(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    pool: Pool,
    key_coding: Coding,
    value_coding: Coding,
    key_map: KeyMap | None,
) -> None:
    """Encode whole pages of both."""
    check_table("slots", slots, len(pool.key_codes))
    _store_pages(
        keys.detach(),
        values.detach(),
        *sequence_maps(key_map, len(slots), *keys.shape[1::2]),
        *key_coding[:3],
        *value_coding[:3],
        *pool,
        slots,
        float(key_coding.bits),
        key_coding.scale,
        float(value_coding.bits),
        value_coding.scale,
    )


@operator(
    "store_pages(Tensor keys, Tensor values, Tensor? mean, Tensor? channel_scale, "
    "Tensor key_turns, Tensor key_factor, Tensor key_centroids, Tensor value_turns, "
    "Tensor value_factor, Tensor value_centroids, Tensor(a!) key_pages, Tensor(b!) key_scales, "
    "Tensor(c!) value_pages, Tensor(d!) value_scales, Tensor slots, float key_bits, "
    "str key_scale, float value_bits, str value_scale) -> ()",
    in_place,
)
def _store_pages(
    keys: Tensor,
    values: Tensor,
    mean: Tensor | None,
    channel_scale: Tensor | None,
    key_turns: Tensor,
    key_factor: Tensor,
    key_centroids: Tensor,
    value_turns: Tensor,
    value_factor: Tensor,
    value_centroids: Tensor,
    key_pages: Tensor,
    key_scales: Tensor,
    value_pages: Tensor,
    value_scales: Tensor,
    slots: Tensor,
    key_bits: float,
    key_scale: Scale,
    value_bits: float,
    value_scale: Scale,
) -> None:
    rotation = launch.rotation(keys.shape[-1], key_turns, key_factor)
    key_code = launch.codebook(keys.shape[-1], key_bits, key_centroids)
    value_code = launch.codebook(keys.shape[-1], value_bits, value_centroids)
    launch.check_pages(key_pages, key_scales, keys.shape[-1], key_bits, "codebook")
    launch.check_pages(value_pages, value_scales, keys.shape[-1], value_bits, "codebook")
    launch.check_vectors(keys, key_scales, slots)
    launch.check_vectors(values, value_scales, slots)
    grid, tile = launch.page_grid(slots, keys.shape[1], rotation, least=4)
    key_words, value_words = (pages.view(torch.int32) for pages in (key_pages, value_pages))
    if grid:
        store_pages_kernel[(*grid, 2)](
            keys,
            values,
            mean,
            channel_scale,
            key_turns.contiguous(),
            key_factor.contiguous(),
            key_centroids.contiguous(),
            value_turns.contiguous(),
            value_factor.contiguous(),
            value_centroids.contiguous(),
            key_words,
            key_scales,
            value_words,
            value_scales,
            slots.contiguous(),
            slots.shape[1],
            keys.shape[1],
            *keys.stride(),
            *values.stride(),
            *key_words.stride()[:2],
            *key_scales.stride()[:2],
            *value_words.stride()[:2],
            *value_scales.stride()[:2],
            HAS_MEAN=mean is not None,
            HAS_SCALE=channel_scale is not None,
            STRETCH=launch.stretch(rotation),
            KEY_SCALE=key_scale,
            KEY_SYMBOL=key_code["SYMBOL"],
            KEY_PAIRED=key_code["PAIRED"],
            VALUE_SCALE=value_scale,
            VALUE_SYMBOL=value_code["SYMBOL"],
            VALUE_PAIRED=value_code["PAIRED"],
            **tile,
            **rotation,
            **launch.EXACT,
        )
