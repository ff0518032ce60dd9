"""The bytes of codes: what is stored today must be read, and written, the same forever."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sixfold
from sixfold.codebooks import lloyd_max
from sixfold.codes import Codes
from sixfold.kernels.encode import encode
from sixfold.pair_grids import pair_grid
from sixfold.rotation import random_bits

SEED = 5


def integers(n: int, dim: int) -> Tensor:
    """Integers of ±1000, exact in float32, that no library's random generator can change."""
    words = random_bits(n * dim, SEED, n, dim)
    return torch.from_numpy((words % np.uint64(2001)).astype(np.float32) - 1000).view(n, dim)


def digest(codes: Codes) -> str:
    """Hash of all tensors of the codes, in order, little-endian."""
    state = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        state.update(tensor.contiguous().numpy().tobytes())
        return tensor

    codes._map(add)
    return state.hexdigest()[:16]


def test_two_bit_codes_by_hand() -> None:
    # Rotation by the identity; ‖x‖ = 6, so u = sqrt(4)·x/6 = x/3, and boundaries are -1, 0, 1.
    x = torch.tensor([[-5.0, 3.0, -1.0, 1.0]])
    book = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    packed, scales = encode(x, torch.ones(0, 2, 2), torch.eye(4), book, bits=2, scale="norm")
    # The second coordinate is on a boundary: the lower level. One symbol per byte at stride 4.
    assert packed.tolist() == [[0, 2, 1, 2]]
    assert scales.tolist() == [3.0]


def test_codebook_values() -> None:
    assert lloyd_max(128, 2)[2:].tolist() == LEVELS_128_2
    assert pair_grid(128, 5)[:2].tolist() == PAIRS_128_5
    assert pair_grid(128, 7)[:2].tolist() == PAIRS_128_7


LEVELS_128_2 = [0.4524532505, 1.5051929784]
PAIRS_128_5 = [[0.2679392007, 0.0311941198], [0.2993192523, -0.6399153404]]
PAIRS_128_7 = [[0.1517919513, 0.1263553447], [0.1655353522, 0.3909647433]]
GOLDEN: dict[Any, str] = {
    sixfold.TurboQuantMSE(64, 1): "8354ab45383450cd",
    sixfold.TurboQuantMSE(64, 2): "28aa62dd9749e783",
    sixfold.TurboQuantMSE(64, 2.5): "900ed985bbf946b0",
    sixfold.TurboQuantMSE(128, 3): "2b67539f8310027c",
    sixfold.TurboQuantMSE(128, 3.5): "7b8188097d59470a",
    sixfold.TurboQuantMSE(128, 4): "9a7d83ec9d19e537",
    sixfold.TurboQuantMSE(128, 5): "b49807ce3e209661",
    sixfold.TurboQuantMSE(80, 6): "fc1fd69c1edec09a",
    sixfold.TurboQuantMSE(96, 7): "451e948fb1323f35",
    sixfold.TurboQuantMSE(256, 8): "391a1f3a84bd19ec",
    sixfold.TurboQuantMSE(128, 4, "unbiased"): "5282374aa51950f7",
    sixfold.TurboQuantMSE(92, 4, "norm"): "e56a84bc9e7301fe",
    sixfold.TurboQuantMSE(100, 3, rotation="orthogonal", seed=7): "8a69452a6412f467",
    sixfold.TurboQuantMSE(7, 2.5, seed=1): "e474a4c16ff58229",
    sixfold.TurboQuantProd(128, 3): "51f02810f3ab4c17",
    sixfold.TurboQuantProd(64, 2, "gaussian"): "f644099af6d8b16a",
    sixfold.QJL(64, 100): "4f62c5315ad48575",
    sixfold.PolarQuant(120): "3c2cd480fed34d01",
    sixfold.OutlierSplit(128): "8635ee98359b0c22",
    sixfold.TrellisQuantizer(64, 1): "fdec3b77cc598267",
    sixfold.TrellisQuantizer(128, 2): "0cdfd75a46c205d2",
    sixfold.TrellisQuantizer(128, 2.5): "46687f002bc9756f",
    sixfold.TrellisQuantizer(64, 2.5, 128): "bdf7e1d522690d68",
    sixfold.TrellisQuantizer(96, 3, 1024): "ebe578f705110519",
    sixfold.TrellisQuantizer(80, 3.5, scale="unbiased"): "4777c8740887e6fb",
    sixfold.TrellisQuantizer(256, 4, scale="norm"): "4fd5de169f2c351d",
    sixfold.TrellisQuantizer(37, 2.5, 1024, rotation="orthogonal", seed=7): "bf3a7a131aee1029",
}


@pytest.mark.parametrize("quantizer", GOLDEN, ids=repr)
def test_bytes_are_the_golden_ones(quantizer: Any) -> None:
    assert digest(quantizer.encode(integers(24, quantizer.dim))) == GOLDEN[quantizer]
