"""Peers compute what their originals compute: by hand, number by number, and against them."""

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

from sixfold.codebooks import lloyd_max
from sixfold.errors import SixfoldError
from sixfold.eval.peers.fp8 import Fp8, to_e4m3
from sixfold.eval.peers.kivi import KiviKeys, KiviValues
from sixfold.eval.peers.llama_cpp import LlamaCpp, hadamard
from sixfold.eval.peers.qjl import QJLKeys, _projection
from sixfold.eval.peers.quantized_cache import HQQ, Quanto
from sixfold.eval.peers.quantizers import PaperMSE, PaperProd, PaperTurboQuant, Polar
from sixfold.eval.peers.scheme import Scheme
from sixfold.eval.peers.uniform import minmax
from sixfold.eval.peers.vllm import VllmFp8Keys, VllmKeys, VllmValues, gaussian_levels


def random_vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def sylvester(order: int) -> Tensor:
    """By its definition: block matrices of block matrices."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(order)


def test_minmax_by_hand() -> None:
    # Levels 0, 1, 2, 3 of step 1; 1.5 rounds to even.
    found = minmax(torch.tensor([[0.0, 0.4, 1.5, 3.0], [7.0, 7.0, 7.0, 7.0]]), 2)
    assert found.tolist() == [[0.0, 0.0, 2.0, 3.0], [7.0, 7.0, 7.0, 7.0]]


def test_e4m3_has_eight_steps_an_octave_and_saturates() -> None:
    x = torch.tensor([1.0, 1.06, 1.07, 1.19, 448.0, 460.0, 1e6, -1e6])
    assert to_e4m3(x).tolist() == [1.0, 1.0, 1.125, 1.25, 448.0, 448.0, 448.0, -448.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fp8_is_that_of_transformers(dtype: torch.dtype) -> None:
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("transformers 5.20 has no cache of fp8")
    first, later = random_vectors(2, 3, 20, 16, dtype=dtype), random_vectors(2, 3, 9, 16, seed=1)
    later = 0.5 * later.clamp(-2, 2).to(dtype)
    layer, scheme = cache_utils.Fp8QuantizedLayer(), Fp8()
    layer.update(first, first)
    keys, _ = layer.update(later, later)
    scale = scheme.calibrate(first)
    mine = [scheme.roundtrip(x, scale).to(dtype) for x in (first, later)]
    assert torch.equal(torch.cat(mine, dim=2), keys)
    held = layer._quantized_keys[0].nbytes + layer._quantized_keys[1].nbytes
    assert scheme.nbytes(2, 3, 29, 16, 2) == held


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("backend", ["quanto", "hqq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quantized_cache_is_that_of_transformers(
    backend: str, bits: int, dtype: torch.dtype
) -> None:
    """Bit by bit; importing hqq warns, so with it installed: ``-W ignore::DeprecationWarning``."""
    package = {"quanto": "optimum", "hqq": "hqq"}[backend]
    if find_spec(package) is None:
        pytest.skip(f"needs {package}, which nothing else here does")
    axis = 1 if backend == "hqq" else 0
    original = HQQQuantizedLayer if backend == "hqq" else QuantoQuantizedLayer
    layer = original(nbits=bits, axis_key=axis, axis_value=axis)
    scheme: Scheme = HQQ(bits) if backend == "hqq" else Quanto(bits)
    x = random_vectors(1, 2, 300, 64, dtype=dtype)
    x[..., 3] *= 20
    layer.update(x[..., :100, :], x[..., :100, :])
    mine = scheme.roundtrip(x[..., :100, :].contiguous(), None)
    # Enough to be flushed, so that the history is quantized a second time.
    seen, _ = layer.update(x[..., 100:250, :], x[..., 100:250, :])
    assert torch.equal(seen[..., :100, :], mine)
    assert (scheme.due(100, 227), scheme.due(100, 228)) == (100, 228)
    again = scheme.roundtrip(torch.cat([mine, x[..., 100:250, :]], dim=2), None)
    seen, _ = layer.update(x[..., 250:, :], x[..., 250:, :])
    assert torch.equal(seen, torch.cat([again, x[..., 250:, :]], dim=2))


@pytest.mark.parametrize("scheme", [Quanto(2), HQQ(2)])
def test_groups_of_64_have_two_numbers_each(scheme: Scheme) -> None:
    x = random_vectors(1, 2, 8, 32)
    read = scheme.roundtrip(x, None)
    # Two vectors of 32 share a group: it has the four levels of 2 bits at most.
    for group in read.view(-1, 64):
        assert len(group.unique()) <= 4
    assert (read - x).square().mean() < 0.3 * x.square().mean()
    assert scheme.nbytes(1, 2, 8, 32, 2) == 2 * 8 * 32 // 4 + 8 * 2 * 2
    with pytest.raises(SixfoldError, match="groups 64 numbers"):
        scheme.roundtrip(x[:, :1, :1], None)


def test_hqq_trades_large_errors_for_many_small_ones() -> None:
    x = random_vectors(1, 1, 64, 64).pow(3)
    fitted, plain = (scheme.roundtrip(x, None) for scheme in (HQQ(2), Quanto(2)))
    assert (fitted - x).abs().pow(0.7).mean() < (plain - x).abs().pow(0.7).mean()


def test_kivi_by_hand() -> None:
    x = random_vectors(1, 2, 128, 64)
    keys, values = (scheme.roundtrip(x, None) for scheme in (KiviKeys(2), KiviValues(2)))
    for channel, first in ((0, 0), (63, 96)):
        group = x[0, 1, first : first + 32, channel].numpy()
        step = (group.max() - group.min()) / 3
        expected = np.rint((group - group.min()) / step) * step + group.min()
        found = keys[0, 1, first : first + 32, channel].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    group = x[0, 1, 5, 32:].numpy()
    step = (group.max() - group.min()) / 3
    expected = np.rint((group - group.min()) / step) * step + group.min()
    np.testing.assert_allclose(values[0, 1, 5, 32:].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_kivi_windows_and_bytes() -> None:
    keys, values = KiviKeys(2), KiviValues(2)
    assert [keys.due(0, total) for total in (100, 128, 300)] == [0, 128, 256]
    assert [values.due(0, total) for total in (100, 128, 300)] == [0, 0, 172]
    # 2 bits and two 16-bit numbers for every 32: 3 bits a value.
    assert (
        keys.nbytes(1, 8, 128, 128, 2) == values.nbytes(1, 8, 128, 128, 2) == 128 * 8 * 128 * 3 // 8
    )


def q4_0_block(x: np.ndarray) -> tuple[list[int], float, list[float]]:
    """ggml's loop over one block."""
    largest, extreme = 0.0, 0.0
    for value in x:
        if largest < abs(value):
            largest, extreme = abs(value), value
    scale = np.float32(extreme) / np.float32(-8)
    inverse = np.float32(1) / scale if scale else np.float32(0)
    codes = [min(15, int(np.float32(value) * inverse + np.float32(8.5))) for value in x]
    stored = float(np.float16(scale))
    return codes, stored, [(code - 8) * stored for code in codes]


def test_q4_0_by_hand() -> None:
    x = random_vectors(1, 1, 4, 64)
    x[0, 0, 3] = 0
    found = LlamaCpp("q4_0").roundtrip(x, None)
    for token in range(4):
        for block in range(2):
            part = slice(32 * block, 32 * block + 32)
            _, _, expected = q4_0_block(x[0, 0, token, part].numpy())
            np.testing.assert_allclose(found[0, 0, token, part].numpy(), expected, rtol=1e-6)


def test_q8_0_by_hand() -> None:
    x = random_vectors(1, 1, 1, 32)
    # Steps of exactly 1: halves go away from zero.
    x[..., :3] = torch.tensor([127.0, 2.5, -2.5])
    found = LlamaCpp("q8_0").roundtrip(x, None)[0, 0, 0]
    assert found[:3].tolist() == [127.0, 3.0, -3.0]
    expected = x.sign() * (x.abs() + 0.5).floor()
    assert torch.equal(found, expected.flatten())


def test_llama_cpp_bytes_are_18_and_34_a_block() -> None:
    assert LlamaCpp("q4_0").nbytes(1, 8, 10, 128, 2) == 8 * 10 * 4 * 18
    assert LlamaCpp("q8_0").nbytes(1, 8, 10, 128, 2) == 8 * 10 * 4 * 34
    with pytest.raises(SixfoldError, match="multiple of 32, got 80"):
        LlamaCpp("q4_0").roundtrip(random_vectors(1, 1, 1, 80), None)


@pytest.mark.parametrize(
    ("dim", "rotation", "size"), [(128, -1, 128), (192, -1, 64), (128, 64, 64)]
)
def test_llama_cpp_rotates_by_the_blocks_it_says(dim: int, rotation: int, size: int) -> None:
    x = random_vectors(1, 1, 3, dim)
    matrix = torch.block_diag(*[sylvester(size)] * (dim // size))
    expected = LlamaCpp("q4_0").roundtrip(x @ matrix, None) @ matrix
    torch.testing.assert_close(LlamaCpp("q4_0", rotation).roundtrip(x, None), expected)


def test_llama_cpp_does_not_rotate_head_dimensions_that_64_does_not_divide() -> None:
    x = random_vectors(1, 1, 3, 96)
    rotated, plain = (LlamaCpp("q4_0", rotation).roundtrip(x, None) for rotation in (-1, 0))
    assert torch.equal(rotated, plain)


def test_hadamard_is_sylvesters_and_its_own_inverse() -> None:
    x = random_vectors(5, 16)
    torch.testing.assert_close(hadamard(x, 16), x @ sylvester(16))
    torch.testing.assert_close(hadamard(hadamard(x, 16), 16), x)


@pytest.mark.parametrize("bits", [3, 4])
def test_vllm_levels_are_nearly_the_gaussian_optimum(bits: int) -> None:
    levels = gaussian_levels(128, bits) * math.sqrt(128)
    torch.testing.assert_close(levels, -levels.flip(0), atol=1e-5, rtol=0)
    # arXiv:2504.19874 has the density of the sphere; at this dimension a Gaussian to 2 %.
    optimum = torch.tensor(lloyd_max(4096, bits), dtype=torch.float32)
    torch.testing.assert_close(levels, optimum, rtol=0.02, atol=0.005)


def test_vllm_keys_by_hand() -> None:
    x = random_vectors(1, 1, 3, 64)
    levels, matrix = gaussian_levels(64, 3), sylvester(64)
    for token in range(3):
        vector = x[0, 0, token]
        rotated = matrix @ (vector / vector.norm())
        nearest = torch.stack([levels[(levels - value).abs().argmin()] for value in rotated])
        expected = matrix @ (nearest / nearest.norm()) * vector.norm().half().float()
        torch.testing.assert_close(VllmKeys(3).roundtrip(x, None)[0, 0, token], expected)


def test_vllm_values_by_hand() -> None:
    x = random_vectors(1, 1, 2, 32)
    found = VllmValues(4).roundtrip(x, None)
    for token in range(2):
        vector = x[0, 0, token].numpy()
        low, scale = vector.min(), (vector.max() - vector.min()) / np.float32(15)
        codes = [min(max(int((value - low) / scale + 0.5), 0), 15) for value in vector]
        expected = [c * float(np.float16(scale)) + float(np.float16(low)) for c in codes]
        np.testing.assert_allclose(found[0, 0, token].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "values", "slot"),
    [
        (VllmFp8Keys(), VllmValues(4), 196),
        (VllmKeys(4), VllmValues(4), 134),
        (VllmKeys(3), VllmValues(4), 118),
        (VllmKeys(3), VllmValues(3), 102),
    ],
)
def test_vllm_slots_are_those_of_its_own_table(keys: Scheme, values: Scheme, slot: int) -> None:
    assert keys.nbytes(1, 8, 10, 128, 2) + values.nbytes(1, 8, 10, 128, 2) == 8 * 10 * slot


def test_vllm_refuses_what_it_cannot_rotate() -> None:
    with pytest.raises(SixfoldError, match="power of two of 16 or more, got 96"):
        VllmKeys(4).roundtrip(random_vectors(1, 1, 1, 96), None)


@pytest.mark.parametrize(("bits", "named"), [(2, 2.5), (3, 3.5)])
def test_paper_turboquant_holds_what_its_name_says(bits: int, named: float) -> None:
    scheme = PaperTurboQuant(bits)
    # Beside the byte of every outlier channel.
    assert scheme.nbytes(1, 8, 1000, 128, 2) == 8 * (1000 * 128 * named / 8 + 32)


def test_paper_turboquant_keeps_the_channels_of_the_first_chunk() -> None:
    scheme = PaperTurboQuant(2)
    first, later = random_vectors(1, 2, 50, 64), random_vectors(1, 2, 50, 64, seed=1)
    first[..., 7] *= 10
    later[..., 9] *= 10
    channels = scheme.calibrate(first)
    assert channels.shape == (1, 2, 16)
    assert bool((channels == 7).any())
    codes = scheme._quantizer(64).encode(later, channels)
    assert torch.equal(scheme.roundtrip(later, channels), scheme._quantizer(64).decode(codes))
    assert not torch.equal(scheme.calibrate(later), channels)


def test_bytes_of_the_other_papers() -> None:
    # 3.875 bits; b bits and one or two 16-bit numbers a vector of 128.
    assert Polar().nbytes(1, 1, 1, 128, 2) == 62
    assert PaperMSE(4).nbytes(1, 1, 1, 128, 2) == 66
    assert PaperProd(4).nbytes(1, 1, 1, 128, 2) == 68
    # 256 signs and a norm twice; eight channels a group of 32.
    assert QJLKeys().nbytes(1, 1, 128, 128, 2) == 128 * 2 * (32 + 2) + 4 * 8


def test_qjl_logits_are_those_of_its_kernel() -> None:
    x, query = random_vectors(1, 1, 64, 128), random_vectors(128, seed=1)
    x[0, 0, :, 5] *= 20
    scheme = QJLKeys()
    read = scheme.roundtrip(x, None)
    matrix = _projection(128, 256)
    torch.testing.assert_close(matrix[:128] @ matrix[:128].mT, 128 * torch.eye(128))
    for token in (0, 40):
        group = x[0, 0, token // 32 * 32 :][:32]
        outliers = group.norm(dim=0).topk(8).indices
        assert 5 in outliers
        outlying = torch.zeros(128).index_fill(0, outliers, 1.0)
        key, expected = x[0, 0, token], 0.0
        for part in (outlying, 1 - outlying):
            signs = torch.sign(matrix @ (key * part))
            norm = (key * part).norm().half().float()
            expected += math.sqrt(math.pi / 2) / 256 * norm * (signs @ (matrix @ (query * part)))
        assert float(read[0, 0, token] @ query) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("scheme", "low", "high"),
    [(PaperMSE(4), 0.007, 0.011), (PaperProd(4), 0.04, 0.065), (Polar(), 0.028, 0.036)],
)
def test_errors_are_those_of_the_papers(scheme: Scheme, low: float, high: float) -> None:
    x = random_vectors(1, 2, 200, 128)
    error = (scheme.roundtrip(x, None) - x).square().sum() / x.square().sum()
    assert low < error < high
