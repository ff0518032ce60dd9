"""A reader of Sixfold files written from docs/format.md: numpy and the standard library alone."""

import hashlib
import json
import math
import struct
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PAGE = 64
PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1"}


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Description and tensors of a file, its digest checked (section 7)."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "sixfold"
    assert metadata["version"] in ("1", "2")
    digest = hashlib.sha256()
    parts = [metadata["kind"].encode(), metadata["description"].encode()]
    tensors = {}
    for name, info in sorted(header.items()):
        start, stop = info["data_offsets"]
        shape = ",".join(str(size) for size in info["shape"])
        parts += [f"{name} {info['dtype']} {shape}".encode(), body[start:stop]]
        tensors[name] = _tensor(body[start:stop], info["dtype"]).reshape(info["shape"])
    for part in parts:
        digest.update(struct.pack("<Q", len(part)) + part)
    assert digest.hexdigest() == metadata["sha256"]
    return json.loads(metadata["description"]), tensors


def _tensor(data: bytes, dtype: str) -> Array:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, DTYPES[dtype])


def symbols(page: Array, count: int, width: int, side: str) -> Array:
    """Symbols [64, count] of the bytes of a page, one at a time (sections 2 and 3)."""
    found = np.zeros((PAGE, count), dtype=int)
    start = 0
    for w in PLANES[width]:
        size = 4 * math.ceil(count * w / 32)
        for t in range(PAGE):
            for i in range(count):
                k, lane = i % size, i // size
                offset = (
                    (t // 16) * 16 * size + (k // 4) * 64 + (t % 16) * 4 + k % 4
                    if side == "key"
                    else (t // 4) * 4 * size + k * 4 + t % 4
                )
                bits = (int(page[start + offset]) >> (lane * w)) & ((1 << w) - 1)
                found[t, i] = found[t, i] << w | bits
        start += PAGE * size
    assert start == len(page)
    return found


def states(page: Array, dim: int, bits: float, side: str) -> Array:
    """States [64, dim] of the paths of a page (sections 2 and 3)."""
    total = int(dim * bits)
    size = 4 * math.ceil(total / 32)
    rows = symbols(page, size, 8, side)
    found = np.zeros((PAGE, dim), dtype=int)
    for t, row in enumerate(rows):
        number = int.from_bytes(bytes(row.astype("u1").tolist()), "little")
        number += number << total
        found[t] = [number >> math.floor(i * bits) & 127 for i in range(dim)]
    return found


# Factor of the states and standard deviation, by bits (section 5).
TRELLIS = {1: (59, 0.9), 2: (29, 1.05), 2.5: (29, 1.1), 3: (15, 1.15), 4: (9, 1.2)}


def codewords(bits: float) -> Array:
    """What the 128 states of a trellis stand for (section 5)."""
    factor, deviation = TRELLIS[bits]
    normal = NormalDist(0, deviation)
    return np.array([normal.inv_cdf(factor * (2 * s + 1) % 256 / 256) for s in range(128)])


def scale(stored: Array) -> Array:
    """Scales as numbers (section 4)."""
    numbers, bits = stored.astype(float), stored.view(np.uint16) & np.uint16(0x7FFF)
    upper = (bits.astype(np.uint32) << 17).view(np.float32)
    flagged = np.where(bits < 0x3800, upper, -65536 * numbers)
    return np.where(numbers < 0, flagged, numbers)


def levels(dim: int, bits: int) -> Array:
    """Lloyd-Max levels of a coordinate, by Lloyd's own iteration on a fine grid (section 5)."""
    u = (np.arange(400_000) + 0.5) / 400_000 * 2 - 1
    u = u * min(math.sqrt(dim), 12)
    density = (1 - u**2 / dim) ** ((dim - 3) / 2)
    mass = np.concatenate(([0], np.cumsum(density)))
    moment = np.concatenate(([0], np.cumsum(density * u)))
    found = np.interp((np.arange(2**bits) + 0.5) / 2**bits, mass[1:] / mass[-1], u)
    for _ in range(2000):
        edges = np.searchsorted(u, (found[1:] + found[:-1]) / 2)
        cells = np.concatenate(([0], edges, [len(u)]))
        found = np.diff(moment[cells]) / np.diff(mass[cells])
    return found


def rotation(dim: int, seed: int) -> Array:
    """R of a power of two (section 5)."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < dim:
        hadamard = np.kron([[1, 1], [1, -1]], hadamard)
    raw = np.random.Philox(np.random.SeedSequence([seed, dim, 0])).random_raw(3 * dim)
    points = ((raw >> np.uint64(12)) + 0.5) / 2.0**51 - 1
    matrix = np.eye(dim)
    for x, y in points.reshape(3, 2, dim // 2):
        cosine, sine = x / np.hypot(x, y), y / np.hypot(x, y)
        low, high = matrix[: dim // 2], matrix[dim // 2 :]
        turned = cosine[:, None] * low - sine[:, None] * high
        matrix = np.concatenate([turned, sine[:, None] * low + cosine[:, None] * high])
        matrix = hadamard @ matrix
    return matrix / dim**1.5


def decoded(layer: dict[str, Any], tensors: dict[str, Array], side: str) -> Array:
    """Keys or values of the tokens in pages, [batch, kv_heads, tokens, dim] (sections 5 and 6)."""
    policy, dim = layer["policy"], layer[f"{side}_dim"]
    bits, inverse = policy[f"{side}_bits"], rotation(dim, policy["seed"])
    trellis = policy.get("code") == "trellis" and bits in TRELLIS and dim >= 32
    book = codewords(bits) if trellis else levels(dim, bits)
    codes, scales = tensors[f"{side}_codes"], scale(tensors[f"{side}_scales"])
    batch, pages, heads = codes.shape[:3]
    rows: list[Array] = []
    for n in range(batch):
        for head in range(heads):
            tokens = []
            for page in range(pages):
                data = codes[n, page, head]
                q = states(data, dim, bits, side) if trellis else symbols(data, dim, bits, side)
                vectors = (scales[n, page, head][:, None] * book[q]) @ inverse
                tokens.append(vectors[: layer["page_lengths"][page]])
            rows.append(np.concatenate(tokens))
    found = np.stack(rows).reshape(batch, heads, -1, dim)
    if side == "key":
        mean, channel_scale = tensors["key_map.mean"], tensors["key_map.scale"]
        found = found / channel_scale[:, :, None] + mean[:, :, None]
    return found


def history(layer: dict[str, Any], tensors: dict[str, Array], side: str) -> Array:
    """All keys or values a layer holds: pages, window, sinks in their places (section 8)."""
    window = tensors[f"window.{side}s"]
    found = np.concatenate([decoded(layer, tensors, side), window], 2)
    for n, count in enumerate(tensors["sinks.count"]):
        start = tensors["padding"][n]
        found[n, :, start : start + count] = tensors[f"sinks.{side}s"][n, :, :count]
    return found
