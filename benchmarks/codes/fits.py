"""Ways to code keys and values that are compared: each is fitted to the beginning of a sequence."""

from typing import TypeAlias

import torch
from jaxtyping import Float32
from torch import Tensor

from benchmarks.codes.imitated import Beginning, Coded, Fit
from sixfold import TrellisQuantizer, TurboQuantMSE
from sixfold.codebooks import centroids, expected_mse
from sixfold.kernels.types import Scale
from sixfold.packing import decode_scale, encode_scale
from sixfold.rotation import Rotation

Matrices: TypeAlias = Float32[Tensor, "kv_heads dim dim"]

# What keeps second moments that few tokens showed from being singular.
RIDGE = 1e-3
QUARTERS = 4
# So many dimensions that the coordinates of a turned vector are normal.
NORMAL = 4096


def code_of(states: int | None, dim: int, bits: float, scale: Scale) -> Coded:
    """The product's, or a trellis of so many states."""
    if states is None:
        scalar = TurboQuantMSE(dim, bits, scale)
        return lambda x: scalar.decode(scalar.encode(x))
    trellis = TrellisQuantizer(dim, bits, states, scale)
    return lambda x: trellis.decode(trellis.encode(x))


def keys_by(states: int | None = None) -> Fit:
    """Keys through the product's map."""

    def fit(begun: Beginning, bits: float) -> Coded:
        code = code_of(states, begun.keys.shape[-1], bits, "unbiased")
        mean, scale = begun.key_map.mean[0][:, None], begun.key_map.scale[0][:, None]
        return lambda x: code((x - mean) * scale) / scale + mean

    return fit


def values_by(states: int | None = None, *, center: bool = False, weigh: bool = False) -> Fit:
    """Values as they are, or through the map of docs/recipe.md.

    Args:
        states: Of a trellis; the product's code without.
        center: Whether their mean is taken off.
        weigh: Whether channels are scaled to what the output projection makes of them.
    """

    def fit(begun: Beginning, bits: float) -> Coded:
        values, code = begun.values, code_of(states, begun.values.shape[-1], bits, "optimal")
        mean = values.mean(1, keepdim=True) * center
        scale = torch.ones_like(mean)
        if weigh:
            spread = (values - mean).square().mean(1, keepdim=True).sqrt()
            read = begun.output.diagonal(dim1=1, dim2=2).sqrt()[:, None]
            scale = (read / spread).sqrt()
        return lambda x: code((x - mean) * scale) / scale + mean

    return fit


def keys_in_quarters(extra: tuple[int, ...], *, shrink: float) -> Fit:
    """Keys in the basis that decorrelates them as queries see them, with more bits where more lies.

    With W = L·Lᵀ the queries' second moment and U the eigenvectors of Lᵀ·C·L, C that of the keys,
    k' = Uᵀ·Lᵀ(k - mean) has uncorrelated coordinates that queries weigh alike.

    Args:
        extra: What each of four quarters of the coordinates has beyond the width, the largest
            first; nothing in all.
        shrink: Share of the off-diagonal moments that is given up; 1: a diagonal map, sorted.
    """

    def fit(begun: Beginning, bits: float) -> Coded:
        mean = begun.key_map.mean[0][:, None]
        moved = begun.keys - mean
        moment = moved.mT @ moved / moved.shape[1]
        return _in_quarters(moment, begun.asked, mean, bits, extra, shrink, "unbiased")

    return fit


def values_in_quarters(extra: tuple[int, ...], *, shrink: float) -> Fit:
    """The same for values, as the output projection reads them."""

    def fit(begun: Beginning, bits: float) -> Coded:
        mean = torch.zeros_like(begun.values[:, :1])
        moment = begun.values.mT @ begun.values / begun.values.shape[1]
        return _in_quarters(moment, begun.output, mean, bits, extra, shrink, "optimal")

    return fit


def _in_quarters(
    moment: Matrices,
    weights: Matrices,
    mean: Tensor,
    bits: float,
    extra: tuple[int, ...],
    shrink: float,
    scale: Scale,
) -> Coded:
    assert bits == int(bits), "quarters have whole bits"
    factor = torch.linalg.cholesky(_shrunk(weights, shrink).double())
    found = torch.linalg.eigh(factor.mT @ _shrunk(moment, shrink).double() @ factor)
    spread, basis = found.eigenvalues.flip(-1), found.eigenvectors.flip(-1)
    size = spread.shape[-1] // QUARTERS
    turned = torch.block_diag(*[Rotation(size).rotate(torch.eye(size)).double()] * QUARTERS)
    # Coordinates of a quarter have one variance once they are turned: that of their average.
    unit = spread.unflatten(-1, (QUARTERS, size)).mean(-1).clamp(min=1e-20).rsqrt()
    forward = factor @ basis @ turned * unit.repeat_interleave(size, -1)[:, None]
    there, back = forward.float(), torch.linalg.inv(forward).float()
    widths = [int(bits) + more for more in extra]
    return lambda x: _by_quarters((x - mean) @ there, widths, scale) @ back + mean


def _shrunk(moment: Matrices, share: float) -> Matrices:
    diagonal = moment.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(-1, keepdim=True)
    return moment * (1 - share) + torch.diag_embed(share * diagonal + ridge)


def _by_quarters(x: Tensor, widths: list[int], scale: Scale) -> Tensor:
    """Every quarter through its own codebook, with one 16-bit scale a vector."""
    size = x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
    unit = x / size
    parts = zip(unit.chunk(QUARTERS, -1), widths, strict=True)
    coded = torch.cat([_nearest(part, width, scale) for part, width in parts], -1)
    product = (unit * coded).sum(-1, keepdim=True)
    if scale == "unbiased":
        best = unit.square().sum(-1, keepdim=True) / product
    else:
        best = product / coded.square().sum(-1, keepdim=True)
    return coded * decode_scale(encode_scale(size * best))


def _nearest(x: Tensor, bits: int, scale: Scale) -> Tensor:
    book = centroids(NORMAL, bits)
    found = book[torch.bucketize(x.contiguous(), (book[1:] + book[:-1]) / 2)]
    # Quarters are unbiased each by itself: one factor for all would spoil those of many bits.
    return found / (1 - expected_mse(NORMAL, bits)) if scale == "unbiased" else found
