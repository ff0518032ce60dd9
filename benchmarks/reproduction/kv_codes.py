"""What caches were made of: the 2.5- and 3.5-bit split, a codebook bug, PolarQuant and QJL."""

import math
from typing import Any

import torch
from torch import Tensor

from sixfold.codebooks import centroids
from sixfold.eval.distortion import Method, expected_distortion
from sixfold.kernels.decode import decode
from sixfold.kernels.encode import encode
from sixfold.packing import Bits
from sixfold.quantizers import QJL, OutlierSplit, PolarQuant, TurboQuantMSE
from sixfold.quantizers.qjl import Projection
from sixfold.rotation import Rotation

HEAD_DIM = 128
OUTLIERS = 32
VECTORS = 8192
# Coordinates of so many dimensions are Gaussian.
LIMIT = 1_000_000
# Of a 2.5-bit label: 32 channels at 3 bits, 96 at 2; of a 3.5-bit one: 32 at 4, 96 at 3.
SPLITS: tuple[tuple[Bits, Bits, Bits], ...] = ((2.5, 3, 2), (3.5, 4, 3))
SPLIT_PARTS: tuple[tuple[int, Bits], ...] = ((32, 3), (32, 4), (96, 2), (96, 3))
SKETCHES: tuple[tuple[Projection, Method], ...] = (
    ("gaussian", "prod-gaussian"),
    ("orthogonal", "prod"),
)
CPU = torch.device("cpu")


def bits(vectors: int = VECTORS) -> dict[str, Any]:
    """Labels of channel splits, the bits of their codes, and the bits they store."""
    x = _vectors(HEAD_DIM, vectors)
    rows = []
    for label, outlier_bits, rest_bits in SPLITS:
        split = OutlierSplit(HEAD_DIM, OUTLIERS, outlier_bits, rest_bits)
        codes = split.encode(x)
        payload = OUTLIERS * outlier_bits + (HEAD_DIM - OUTLIERS) * rest_bits
        # The channels' numbers are stored once a sequence; codes hold them with every vector.
        stored = codes.outliers.nbytes + codes.rest.nbytes
        rows.append(
            {
                "name": f"paper, {OUTLIERS} channels at {outlier_bits}, the others at {rest_bits}",
                "label": label,
                "codes": payload / HEAD_DIM,
                "stored": 8 * stored / x.numel(),
                "nmse": _nmse(split.decode(codes), x),
            }
        )
        grid = TurboQuantMSE(HEAD_DIM, label)
        pairs = grid.encode(x)
        rows.append(
            {
                "name": "Sixfold, a grid for pairs of coordinates",
                "label": label,
                "codes": label,
                "stored": pairs.bits_per_value,
                "nmse": _nmse(grid.decode(pairs), x),
            }
        )
    return {"vectors": vectors, "rows": rows}


def codebook(vectors: int = VECTORS) -> dict[str, Any]:
    """Codebooks divided by √128, as the authors' code does for parts of 32 and 96 channels.

    Gaussian levels are those that both the right and the wrong division start from; ours are for
    the coordinates of a vector of exactly so many dimensions.
    """
    rows = []
    for dim, width in SPLIT_PARTS:
        x = _vectors(dim, vectors)
        gaussian = centroids(LIMIT, width)
        # Kernels take levels in units of 1/√dim.
        books = {
            "ours": centroids(dim, width),
            "right": gaussian,
            "wrong": gaussian * math.sqrt(dim / HEAD_DIM),
        }
        decoded = {name: _roundtrip(x, book, width) for name, book in books.items()}
        nmse = {name: _nmse(y, x) for name, y in decoded.items()}
        gain = {f"{name}_gain": _gain(y, x) for name, y in decoded.items()}
        rows.append({"dim": dim, "bits": width, **nmse, **gain})
    return {"vectors": vectors, "rows": rows}


def polar(vectors: int = VECTORS) -> dict[str, Any]:
    """PolarQuant beside plain codes of about its size."""
    x = _vectors(HEAD_DIM, vectors)
    rows = []
    quantizers: dict[str, Any] = {
        "PolarQuant 4, 2, 2, 2 (the paper's)": PolarQuant(HEAD_DIM),
        "PolarQuant 4, 3, 3, 3": PolarQuant(HEAD_DIM, (4, 3, 3, 3)),
        "TurboQuant, norms, 3 bits": TurboQuantMSE(HEAD_DIM, 3, scale="norm"),
        "TurboQuant, norms, 3.5 bits": TurboQuantMSE(HEAD_DIM, 3.5, scale="norm"),
        "TurboQuant, norms, 4 bits": TurboQuantMSE(HEAD_DIM, 4, scale="norm"),
    }
    for name, quantizer in quantizers.items():
        codes = quantizer.encode(x)
        nmse = _nmse(quantizer.decode(codes), x)
        bits = _payload(quantizer)
        rows.append({"name": name, "bits": bits, "stored": codes.bits_per_value, "nmse": nmse})
    return {"vectors": vectors, "rows": rows}


def _payload(quantizer: PolarQuant | TurboQuantMSE) -> float:
    """Bits a coordinate of codes, norms and radii, without what pads them to whole words."""
    if isinstance(quantizer, TurboQuantMSE):
        return quantizer.bits + 16 / HEAD_DIM
    angles = sum(width / 2**level for level, width in enumerate(quantizer.bits, 1))
    return float(angles + 16 / 2 ** len(quantizer.bits))


def qjl(vectors: int = VECTORS) -> dict[str, Any]:
    """dim·variance of QJL's inner products with independent queries."""
    x, queries = _vectors(HEAD_DIM, vectors), _vectors(HEAD_DIM, vectors, seed=1)
    rows = []
    for projections in (128, 256, 512):
        row: dict[str, Any] = {"projections": projections, "bits": projections / HEAD_DIM}
        blocks = projections // HEAD_DIM
        # Sketches of HEAD_DIM rows each are independent: their mean has a share of the variance.
        for kind, method in SKETCHES:
            quantizer = QJL(HEAD_DIM, projections, kind)
            codes = quantizer.encode(x)
            found = quantizer.scores(queries[:, None], codes[:, None]).flatten()
            error = (found - (queries * x).sum(1)).double()
            row[kind] = float(HEAD_DIM * error.square().mean())
            theory = expected_distortion(method, HEAD_DIM, 1)
            row[f"{kind}_exact"] = theory / blocks
        rows.append(row)
    return {"vectors": vectors, "rows": rows}


def _vectors(dim: int, count: int, seed: int = 0) -> Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1)


def _roundtrip(x: Tensor, book: Tensor, width: Bits) -> Tensor:
    rotation = Rotation(x.shape[1])
    tables = rotation.turns(CPU), rotation.factor(CPU), book
    rows, scales = encode(x, *tables, bits=width, scale="norm")
    return decode(rows, scales, *tables, dim=x.shape[1], bits=width)


def _nmse(decoded: Tensor, x: Tensor) -> float:
    return float((decoded - x).double().square().sum() / x.double().square().sum())


def _gain(decoded: Tensor, x: Tensor) -> float:
    """What an inner product with a vector of the same direction is multiplied by."""
    return float((decoded * x).double().sum() / x.double().square().sum())
