"""Attention on pages in Triton: what the tests of every backend leave out, in its interpreter."""

import pytest
import torch

pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)

from sixfold.errors import BackendError, ShapeError
from sixfold.kernels import attention
from sixfold.kernels._dispatch import implementation
from sixfold.kernels.attention import triton as backend
from sixfold.kernels.types import CodeName
from sixfold.packing import BITS, Bits
from sixfold.trellis import PAGE_BITS, PAGE_STATES, codewords, pages_hold
from tests.kernels.attention_cases import assert_accurate, make_case
from tests.kernels.attention_errors import error_beside_quantization


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention alone: encoding may have another backend."""
    monkeypatch.delenv("SIXFOLD_BACKEND", raising=False)
    monkeypatch.setattr(attention, "implementation", lambda *_: backend)


@pytest.mark.slow
@pytest.mark.parametrize("key_dim", [20, 64, 96, 100, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_every_width_and_dim(bits: float, key_dim: int) -> None:
    case = make_case(key_bits=bits, key_dim=key_dim, lengths=(64, 64, 64))
    assert_accurate(case.run(), case, half=True)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [32, 34, 40, 48, 64, 72, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("bits", PAGE_BITS)
def test_every_trellis_and_dim(bits: Bits, dim: int) -> None:
    if not pages_hold(dim, bits):
        pytest.skip("pages hold no such trellis")
    case = make_case(key_bits=bits, key_dim=dim, lengths=(64, 64, 64), key_code="trellis")
    assert_accurate(case.run(), case, half=True)


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ((1, 40), (2.5, 32)),
        ((2, 36), (1, 64)),
        ((2.5, 48), (3, 72)),
        ((3, 80), (4, 34)),
        ((4, 128), (3, 128)),
    ],
)
def test_trellises_of_mixed_widths(keys: tuple[Bits, int], values: tuple[Bits, int]) -> None:
    (key_bits, key_dim), (value_bits, value_dim) = keys, values
    case = make_case(
        key_bits=key_bits,
        key_dim=key_dim,
        value_bits=value_bits,
        value_dim=value_dim,
        key_code="trellis",
        queries=3,
        groups=4,
        lengths=(64, 20),
    )
    assert_accurate(case.run(), case, half=True)


@pytest.mark.parametrize("trellis", ["keys", "values"])
def test_a_trellis_beside_a_codebook(trellis: str) -> None:
    codes: list[CodeName] = ["trellis", "codebook"]
    key_code, value_code = codes if trellis == "keys" else codes[::-1]
    case = make_case(key_bits=2, value_bits=3, key_code=key_code, value_code=value_code)
    assert_accurate(case.run(), case, half=True)


@pytest.mark.parametrize(
    ("bits", "code"),
    [
        (2.5, "codebook"),
        (4, "codebook"),
        (2.5, "trellis"),
        pytest.param(8, "codebook", marks=pytest.mark.slow),
    ],
)
def test_dims_of_several_tiles(bits: Bits, code: CodeName) -> None:
    case = make_case(
        key_bits=bits, key_dim=576, value_dim=512, batch=1, kv_heads=1, groups=3, key_code=code
    )
    got = case.run()
    assert got.out.shape == (1, 3, 1, 512)
    assert_accurate(got, case, half=True)


@pytest.mark.parametrize("queries", [9, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize("code", ["codebook", "trellis"])
def test_chunks_of_several_blocks_of_rows(code: CodeName, queries: int) -> None:
    case = make_case(queries=queries, groups=9, batch=1, lengths=(64, 20), key_code=code)
    case.first_token = torch.arange(queries)[None] * 2
    assert_accurate(case.run(), case, half=True)


@pytest.mark.parametrize("programs", [1, 1000])
def test_splits_do_not_show(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED_PROGRAMS", programs)
    backend._programs.cache_clear()
    case = make_case(batch=1, lengths=(64, 64, 3, 64, 64, 64, 1))
    case.first_token = torch.tensor([[150]])
    assert_accurate(case.run(), case, half=True)
    backend._programs.cache_clear()


def test_values_of_very_different_scale() -> None:
    """Weights have a unit a row: float16's range does not show."""
    case = make_case(lengths=(64, 64, 64))
    scales = (10.0 ** torch.linspace(-4, 3, 64)).half()
    case.values.dense *= (scales.double() / case.values.scales.double())[..., None]
    case.values.scales[:] = scales
    # Only the small ones are attended: one in a thousand of the largest would drown them.
    small = (torch.arange(case.tokens) % 64 < 8).expand(2, 1, 1, -1)
    case.options["mask"] = small
    got, exact = case.run(), case.expected()
    assert (got.out - exact.out).norm() < 2e-3 * exact.out.norm()


def test_unused_rows_of_a_page_may_be_anything() -> None:
    case = make_case(lengths=(64, 20))
    before = case.run()
    case.values.scales[case.table[:, 1], :, 20:] = torch.nan
    case.keys.scales[case.table[:, 1], :, 20:] = torch.nan
    after = case.run()
    assert torch.equal(before.out, after.out)
    assert torch.equal(before.lse, after.lse)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 30.0])
def test_error_is_a_tenth_of_the_quantization_error(bits: float, sharpness: float) -> None:
    assert error_beside_quantization(bits, 512, sharpness) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sharpness", [1e-3, 8.0])
def test_error_over_a_long_history(bits: float, sharpness: float) -> None:
    assert error_beside_quantization(bits, 8192, sharpness) < 0.1


@pytest.mark.parametrize("bits", [2.5, 4])
def test_codewords_are_halved_once(bits: Bits) -> None:
    book = codewords(PAGE_STATES, bits, torch.device("cpu"))
    halved = [backend._levels(x, float(bits), "trellis") for x in (book, book, 2 * book)]
    assert halved[0] is halved[1]
    assert torch.equal(halved[0], book.half())
    assert torch.equal(halved[2], (2 * book).half())


def test_wrong_pages_are_refused() -> None:
    case = make_case()
    case.values.bits = 3
    with pytest.raises(ShapeError, match="value_codes: expected pages of"):
        case.run()
    case = make_case(key_bits=2, key_code="trellis")
    case.values.bits = 3.5
    with pytest.raises(ShapeError, match=r"trellis pages: expected 1, 2, 2\.5, 3, 4 bits"):
        case.run()
    case = make_case()
    case.query = case.query[:, :3]
    with pytest.raises(ShapeError, match="expected a multiple of the 2 KV heads"):
        case.run()


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        implementation("attention", torch.device("cpu"))


def test_the_operator_is_well_formed() -> None:
    case = make_case(queries=2)
    arguments = (
        case.query,
        *case.pages.pool,
        *case.pages[1:4],
        case.first_token,
        case.keys.centroids,
        case.values.centroids,
        0,
        float(case.keys.bits),
        float(case.values.bits),
        case.keys.code,
        case.values.code,
        case.values.dense.shape[-1],
        None,
        None,
        None,
    )
    torch.library.opcheck(torch.ops.sixfold.page_attention.default, arguments)
