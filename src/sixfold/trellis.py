"""The bit-shift trellis: which state each coordinate is in, its codeword, and how a path is stored.

The floor(dim·bits) bits of a vector are one cyclic number N, and coordinate t is in the state

    s_t = (N >> floor(t·bits)) mod states,

a window of log2(states) bits. From one coordinate to the next `bits` bits leave the window and as
many enter (2 and 3 in turn at 2.5 bits): neighbours share most of their bits, so the encoder
chooses among all paths, and the decoder reads any coordinate by itself. The window of the last
coordinates goes on with the first bits of N (tail-biting): nothing is spent on a start.

Source: Tseng et al. 2024, QTIP (arXiv:2406.11235) §3.1; trellis-coded quantization is Marcellin and
Fischer 1990.
"""

import math
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist

import torch
from jaxtyping import Float32, Int32, Int64, UInt8
from torch import Tensor

from sixfold._surroundings import outside_inference_mode
from sixfold.arguments import choice
from sixfold.errors import SixfoldError
from sixfold.packing import Bits

# states -> bits -> (multiplier, spread) of `quantile_codebook`.
_CODEBOOKS: dict[int, dict[Bits, tuple[int, float]]] = {
    128: {
        1: (59, 0.9),
        2: (29, 1.05),
        2.5: (29, 1.1),
        3: (15, 1.15),
        3.5: (81, 1.2),
        4: (9, 1.2),
    },
    256: {
        1: (123, 0.9),
        2: (185, 1.05),
        2.5: (189, 1.1),
        3: (97, 1.1),
        3.5: (71, 1.15),
        4: (175, 1.15),
    },
    1024: {
        1: (475, 0.85),
        2: (237, 1.05),
        2.5: (775, 1.05),
        3: (123, 1.05),
        3.5: (903, 1.1),
        4: (61, 1.1),
    },
}
STATES = tuple(_CODEBOOKS)
TRELLIS_BITS: tuple[Bits, ...] = (1, 2, 2.5, 3, 3.5, 4)

# Of pages: two windows lie in two bytes at each of these widths (docs/format.md, section 2b).
PAGE_STATES = 128
PAGE_BITS: tuple[Bits, ...] = (1, 2, 2.5, 3, 4)
# In fewer coordinates the seam takes too large a part of what the trellis gains.
_LEAST_DIM = 32

_CPU = torch.device("cpu")
# Coarser than the last bit of any libm, so that every machine gets the same codebooks.
_DIGITS = 10
# Rows are whole 32-bit words, as those of `packing` are.
_ALIGNMENT = 32


def pages_hold(dim: int, bits: Bits) -> bool:
    """Whether pages may hold paths of such vectors: whole bytes, and more than a few windows."""
    return bits in PAGE_BITS and dim >= _LEAST_DIM and path_bits(dim, bits) % 8 == 0


def check_trellis(dim: int, bits: Bits, states: int) -> tuple[Bits, int]:
    """Refuse a trellis that does not exist; returns its width and number of states.

    Raises:
        SixfoldError: There is no such width or number of states, or `dim` coordinates have fewer
            bits than one window.
    """
    bits, states = choice("bits", bits, TRELLIS_BITS), choice("states", states, STATES)
    if path_bits(dim, bits) < window_bits(states):
        raise SixfoldError(
            f"dim·bits must be at least log2(states) = {window_bits(states)}, "
            f"got dim={dim} and bits={bits}"
        )
    return bits, states


def window_bits(states: int) -> int:
    """Bits that make a state."""
    return states.bit_length() - 1


@lru_cache(typed=True)
def starts(dim: int, bits: Bits) -> tuple[int, ...]:
    """Where the window of every coordinate starts, and the bits of a vector as the last entry."""
    return tuple(math.floor(t * bits) for t in range(dim + 1))


@lru_cache(typed=True)
def advances(dim: int, bits: Bits) -> tuple[int, ...]:
    """Bits that leave the window behind each coordinate."""
    return tuple(end - start for start, end in pairwise(starts(dim, bits)))


def path_bits(dim: int, bits: Bits) -> int:
    """Bits of one vector's path."""
    return dim * int(2 * bits) // 2


def path_bytes(dim: int, bits: Bits) -> int:
    """Bytes of one vector's path, a multiple of 4."""
    return -(-path_bits(dim, bits) // _ALIGNMENT) * (_ALIGNMENT // 8)


@lru_cache(typed=True)
@outside_inference_mode
def _table(
    dim: int, bits: Bits, device: torch.device
) -> tuple[Int64[Tensor, " dim"], Int64[Tensor, " dim"]]:
    start = torch.tensor(starts(dim, bits), device=device)
    return start[:-1], start.diff()


def pack_path(states: Int32[Tensor, "*b dim"], bits: Bits) -> UInt8[Tensor, "*b path_bytes"]:
    """Store paths as the number N, lowest bits first; unused bits are zero.

    Args:
        states: Of every coordinate, each sharing with the next what the trellis says.
        bits: Width in bits per coordinate.
    """
    dim = states.shape[-1]
    start, width = _table(dim, bits, states.device)
    # What leaves each window, over the two bytes that it may touch.
    leaving = (states & ((1 << width) - 1)) << start % 8
    row = states.new_zeros(*states.shape[:-1], path_bytes(dim, bits) + 1)
    row.index_add_(-1, start // 8, (leaving & 255).int())
    row.index_add_(-1, start // 8 + 1, (leaving >> 8).int())
    return row[..., :-1].to(torch.uint8)


def unpack_path(
    rows: UInt8[Tensor, "*b path_bytes"], dim: int, bits: Bits, states: int
) -> Int32[Tensor, "*b {dim}"]:
    """Inverse of `pack_path`."""
    start, total = _table(dim, bits, rows.device)[0], path_bits(dim, bits)
    padded = torch.nn.functional.pad(rows, (0, 2)).int()
    # 24 bits from every byte on: a window behind up to 7 bits.
    words = padded[..., :-2] | padded[..., 1:-1] << 8 | padded[..., 2:] << 16
    window = words[..., start // 8] >> (start % 8).int()
    first = words[..., :1] & (states - 1)
    # Windows that reach the end go on with the first bits; in all others these land above.
    wrap = (total - start).clamp(max=window_bits(states)).int()
    return (window | first << wrap) & (states - 1)


def quantile_codebook(states: int, multiplier: int, spread: float) -> Float32[Tensor, " {states}"]:
    """Normal quantiles of standard deviation `spread`, in the order of an odd `multiplier`.

    State s has the quantile (m·(2s + 1) mod 2·states) / (2·states). The map is a permutation; the
    states that can follow one state get quantiles an equal distance apart, so that one of them is
    near wherever the coordinate lies; and complementing all bits of a state negates its codeword.
    """
    normal, steps = NormalDist(0, spread), range(1, 2 * states, 2)
    quantiles = [multiplier * step % (2 * states) / (2 * states) for step in steps]
    levels = [round(normal.inv_cdf(quantile), _DIGITS) for quantile in quantiles]
    return torch.tensor(levels, dtype=torch.float32, device="cpu")


@lru_cache(typed=True)
@outside_inference_mode
def codewords(states: int, bits: Bits, device: torch.device = _CPU) -> Float32[Tensor, " {states}"]:
    """What each state stands for, in standard deviations of a coordinate.

    Multipliers and spreads were found by trying all odd ones, then spreads a twentieth apart
    (`python -m benchmarks.trellis_choices --search BITS`).

    Args:
        states: One of `STATES`.
        bits: One of `TRELLIS_BITS`.
        device: Of the result. Cached: do not modify.
    """
    return quantile_codebook(states, *_CODEBOOKS[states][bits]).to(device)
