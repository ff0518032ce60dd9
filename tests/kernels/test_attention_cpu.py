"""Attention of the compiled extension: integer arithmetic, beside the error of the codes."""

import dataclasses
import math
from typing import Any, get_args

import pytest
import torch

from sixfold.codebooks import centroids
from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels._dispatch import available_backends
from sixfold.kernels.attention import Partial
from sixfold.kernels.types import CodeName
from sixfold.packing import PAGE_TOKENS, Bits
from sixfold.trellis import PAGE_BITS, pages_hold
from tests.kernels.attention_cases import WIDTHS, Case, assert_as_accurate, make_case, resized
from tests.kernels.attention_errors import error_beside_quantization
from tests.threads import on_threads

if "cpu" not in available_backends("attention"):
    pytest.skip("the extension was not compiled", allow_module_level=True)

from sixfold import _cpu

ISAS = _cpu.available_isas()
CPU = torch.device("cpu")
CODES = get_args(CodeName)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of this processor."""
    monkeypatch.delenv("SIXFOLD_BACKEND", raising=False)
    monkeypatch.setenv("SIXFOLD_ISA", str(request.param))
    return str(request.param)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float arithmetic, which is as accurate as plain PyTorch."""
    monkeypatch.setenv("SIXFOLD_CPU_EXACT", "1")


# ---------------------------------------------------------------- beside the codes' own error


def allowed(bits: Bits, code: CodeName) -> float:
    """Of the codes' error: so little is lost at 4 bits of a trellis that 8-bit levels show."""
    return 0.25 if (bits, code) == (4, "trellis") else 0.1


@pytest.mark.parametrize(("bits", "code"), WIDTHS)
@pytest.mark.parametrize("tokens", [1, 50, 1024, 8192])
@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 8.0, 30.0])
@pytest.mark.usefixtures("isa")
def test_error_is_small_beside_the_quantization_error(
    bits: Bits, code: CodeName, tokens: int, sharpness: float
) -> None:
    assert error_beside_quantization(bits, tokens, sharpness, code=code) < allowed(bits, code)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "code"), WIDTHS)
@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 8.0, 30.0])
@pytest.mark.usefixtures("isa")
def test_error_over_long_histories(bits: Bits, code: CodeName, sharpness: float) -> None:
    assert error_beside_quantization(bits, 131_072, sharpness, code=code) < allowed(bits, code)


@pytest.mark.parametrize(("bits", "code"), WIDTHS)
@pytest.mark.usefixtures("isa")
def test_rounding_weights_loses_no_mass(bits: Bits, code: CodeName) -> None:
    # The mean of the values survives a sum over many tokens, their differences do not.
    assert error_beside_quantization(bits, 8192, 2.0, mean=1.0, code=code) < allowed(bits, code)


SHAPES: list[tuple[int, Bits, CodeName]] = [
    (dim, bits, code)
    for dim in (20, 32, 33, 36, 40, 64, 80, 96, 100, 112, 128, 192, 256)
    for bits, code in WIDTHS
    if (pages_hold(dim, bits) if code == "trellis" else dim not in (32, 36, 40, 64, 112, 128))
]


@pytest.mark.parametrize(("dim", "bits", "code"), SHAPES)
@pytest.mark.usefixtures("isa")
def test_every_width_and_dim(dim: int, bits: Bits, code: CodeName) -> None:
    assert error_beside_quantization(bits, 300, 1.0, dim=dim, code=code) < allowed(bits, code)


# ---------------------------------------------------------------- as accurate as the reference


def everything(**shape: Any) -> Case:
    case = make_case(queries=5, lengths=(64, 7, 64, 64), sharpness=3.0, **shape)
    case.first_token = torch.randint(0, 90, (2, 5))
    case.options |= {
        "logit_offset": torch.randn(2, case.query.shape[1], 5),
        "softcap": 20.0,
        "mask": torch.rand(2, 1, 5, case.tokens) < 0.8,
    }
    return case


@pytest.mark.parametrize("groups", range(1, 11))
@pytest.mark.parametrize(
    ("bits", "code"),
    [(2.5, "codebook"), (4, "codebook"), (8, "codebook"), (2.5, "trellis"), (4, "trellis")],
)
@pytest.mark.usefixtures("isa", "exact")
def test_exact_arithmetic(bits: Bits, code: CodeName, groups: int) -> None:
    value_dim = 104 if code == "trellis" else 100
    case = everything(key_bits=bits, key_dim=80, value_dim=value_dim, groups=groups, key_code=code)
    assert_as_accurate(case.run(), case.expected(torch.float32), case.expected())


@pytest.mark.parametrize("key_dim", [32, 40, 72, 96, 128, 256])
@pytest.mark.parametrize("key_bits", PAGE_BITS)
@pytest.mark.usefixtures("isa", "exact")
def test_exact_arithmetic_of_every_trellis(key_bits: Bits, key_dim: int) -> None:
    """Keys of one width and values of the next; where a trellis has no such dim, a codebook."""
    value_bits = PAGE_BITS[PAGE_BITS.index(key_bits) - 1]
    case = everything(
        key_bits=key_bits,
        value_bits=value_bits,
        key_dim=key_dim,
        value_dim=336 - key_dim,
        key_code="trellis",
    )
    assert_as_accurate(case.run(), case.expected(torch.float32), case.expected())


@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 30.0])
@pytest.mark.usefixtures("isa", "exact")
def test_exact_arithmetic_of_flat_and_peaked_softmax(sharpness: float) -> None:
    case = make_case(key_dim=128, lengths=(64,) * 40, queries=3, sharpness=sharpness)
    assert_as_accurate(case.run(), case.expected(torch.float32), case.expected())


@pytest.mark.parametrize("groups", range(1, 11))
@pytest.mark.parametrize(("bits", "code"), WIDTHS)
@pytest.mark.usefixtures("isa")
def test_integers_do_what_floats_do(
    bits: Bits, code: CodeName, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    value_dim = 40 if code == "trellis" else 36
    case = everything(key_bits=bits, groups=groups, value_dim=value_dim, key_code=code)
    got = case.run()
    monkeypatch.setenv("SIXFOLD_CPU_EXACT", "1")
    exact = case.run()
    # Of logits of standard deviation 3 and more: random symbols are no Gaussian codewords.
    narrow = bits <= 4
    assert (got.out - exact.out).norm() < (0.06 if narrow else 0.002) * exact.out.norm()
    seen = exact.lse > -math.inf
    assert torch.equal(got.lse > -math.inf, seen)
    assert (got.lse - exact.lse)[seen].abs().max() < (0.2 if narrow else 0.01)


@pytest.mark.parametrize("value_size", [2.0**-90, 2.0**-20, 2.0**20, 2.0**90])
@pytest.mark.parametrize("bits", [2, 3.5, 4, 8])
@pytest.mark.usefixtures("isa")
def test_sizes_do_not_matter_to_integers(value_size: float, bits: Bits) -> None:
    case = make_case(key_bits=bits, queries=3)
    expected, got = resized(case, 1, 1).run(), resized(case, 1 / value_size, value_size).run()
    torch.testing.assert_close(got.out / value_size, expected.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.lse, expected.lse)


@pytest.mark.parametrize("queries", [1, 2, 9, 70, 130])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.usefixtures("isa")
def test_rows_do_not_depend_on_what_they_are_computed_with(queries: int, code: CodeName) -> None:
    case = make_case(queries=queries, key_dim=36, groups=3, lengths=(64, 30), key_code=code)
    whole = case.run()
    assert whole.out.isfinite().all()
    for i in {0, queries // 2, queries - 1}:
        one = dataclasses.replace(
            case, query=case.query[:, :, i : i + 1], first_token=case.first_token[:, i : i + 1]
        ).run()
        torch.testing.assert_close(one.out, whole.out[:, :, i : i + 1], rtol=0.1, atol=0.02)


@pytest.mark.parametrize("pages", [1, 40, 300])
@pytest.mark.parametrize("queries", [1, 65])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.usefixtures("isa")
def test_threads_change_no_bit(pages: int, queries: int, code: CodeName) -> None:
    case = make_case(key_dim=36, lengths=(64,) * pages, queries=queries, batch=1, key_code=code)
    results = on_threads(case.run, 1, 2, 7)
    for other in results[1:]:
        assert torch.equal(other.out, results[0].out)
        assert torch.equal(other.lse, results[0].lse)


# ---------------------------------------------------------------- what must show, what must not


def poison(case: Case, side: str, token: int) -> None:
    """The scale of one token of the first sequence, all heads, becomes NaN."""
    slot = case.table[0, token // PAGE_TOKENS]
    getattr(case, side).scales[slot, :, token % PAGE_TOKENS] = math.nan


@pytest.mark.parametrize(("bits", "code"), [(4, "codebook"), (8, "codebook"), (2.5, "trellis")])
@pytest.mark.parametrize("arithmetic", ["exact", "integer"])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.usefixtures("isa")
def test_a_token_that_is_not_finite_shows(
    side: str, arithmetic: str, bits: Bits, code: CodeName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIXFOLD_CPU_EXACT", str(int(arithmetic == "exact")))
    case = make_case(key_bits=bits, queries=2, lengths=(64,) * 20, key_code=code)
    case.first_token = torch.tensor([[0, 101], [0, 101]])
    clean = case.run()
    poison(case, side, 100)
    got = case.run()
    assert got.out[0, :, 0].isnan().all()
    assert got.lse[0, :, 0].isnan().all() == (side == "keys")
    # Queries that do not attend the token, but for the anchor of a softmax, which rows choose
    # together; and other sequences.
    torch.testing.assert_close(got.out[0, :, 1], clean.out[0, :, 1], rtol=1e-6, atol=1e-6)
    assert torch.equal(got.out[1], clean.out[1])


@pytest.mark.parametrize("hidden_by", ["first_token", "mask", "additive", "length"])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize(("bits", "code"), [(2.5, "codebook"), (8, "codebook"), (2.5, "trellis")])
@pytest.mark.usefixtures("isa")
def test_what_is_hidden_spoils_nothing(
    bits: Bits, code: CodeName, side: str, hidden_by: str
) -> None:
    case = make_case(key_bits=bits, lengths=(64, 64, 50), key_code=code)
    mask = torch.ones(2, 1, 1, case.tokens, dtype=torch.bool)
    token = 20
    if hidden_by == "first_token":
        case.first_token[:] = 21
    elif hidden_by == "length":
        token = 128 + 55
    else:
        mask[..., 20] = False
        added = torch.where(mask, 0.5, -math.inf)
        case.options["mask"] = mask if hidden_by == "mask" else added
    clean = case.run()
    poison(case, side, token)
    got = case.run()
    assert torch.equal(got.out, clean.out)
    assert torch.equal(got.lse, clean.lse)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("isa")
def test_a_query_that_is_not_finite_shows(bits: Bits, value: float) -> None:
    case = make_case(key_bits=bits, queries=2)
    clean = case.run()
    case.query[0, 1, 1, 5] = value
    got = case.run()
    spoiled = got.out.isnan().all(-1)
    assert spoiled[0, 1, 1]
    assert spoiled.sum() == 1
    assert torch.equal(got.out[~spoiled], clean.out[~spoiled])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("isa")
def test_nothing_to_attend(bits: Bits) -> None:
    case = make_case(key_bits=bits, lengths=(64, 64))
    case.first_token[:] = 128
    got = case.run()
    assert not got.out.any()
    assert got.lse.eq(-math.inf).all()
    case.table, case.lengths = case.table[:, :0], case.lengths[:0]
    empty = case.run()
    assert not empty.out.any()
    assert empty.lse.eq(-math.inf).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("isa")
def test_zero_queries_and_zero_scales(bits: Bits) -> None:
    case = make_case(key_bits=bits)
    case.query.zero_()
    flat = case.run()
    torch.testing.assert_close(flat.lse, torch.full_like(flat.lse, math.log(128)))
    case.values.scales.zero_()
    assert not case.run().out.any()


@pytest.mark.usefixtures("isa")
def test_logits_may_be_huge() -> None:
    case = make_case(sharpness=1e6)
    case.options["logit_offset"] = torch.full((2, 4, 1), -3e6)
    got = case.run()
    assert got.out.isfinite().all()
    assert got.lse.isfinite().all()


@pytest.mark.usefixtures("isa", "exact")
def test_codebooks_are_told_apart_by_contents() -> None:
    case = make_case()
    before = case.run()
    case.values.centroids = case.values.centroids.clone()
    case.values.centroids *= 2
    torch.testing.assert_close(case.run().out, 2 * before.out)


# ---------------------------------------------------------------- refusals


def changed(case: Case, **changes: Any) -> Partial:
    return dataclasses.replace(case, **changes).run()


@pytest.mark.usefixtures("unhooked", "isa")
class TestRefusals:
    def test_slots_outside_of_the_pool(self) -> None:
        case = make_case()
        for slot in (-1, len(case.keys.codes)):
            table = case.table.clone()
            table[1, 1] = slot
            with pytest.raises(
                SixfoldError, match=rf"pages.slots: expected slots 0 to 4, got {slot}"
            ):
                changed(case, table=table)

    @pytest.mark.parametrize("length", [65, -1])
    def test_impossible_lengths(self, length: int) -> None:
        case = make_case()
        with pytest.raises(SixfoldError, match=f"pages.lengths: expected 0 to 64.*got {length}"):
            changed(case, lengths=torch.tensor([length, 64]))

    def test_a_mask_that_is_too_narrow(self) -> None:
        case = make_case()
        case.options["mask"] = torch.ones(2, 1, 1, 127, dtype=torch.bool)
        with pytest.raises(SixfoldError, match=r"position up to 127, got 127 columns"):
            case.run()

    def test_a_mask_of_another_batch(self) -> None:
        case = make_case()
        case.options["mask"] = torch.ones(3, 1, 1, 128, dtype=torch.bool)
        with pytest.raises(ShapeError, match=r"mask: expected \[2 or 1, 4 or 1, 1, positions\]"):
            case.run()

    def test_pages_of_other_bits(self) -> None:
        case = make_case(key_bits=4)
        case.keys.bits = 3
        with pytest.raises(ShapeError, match="key_codes: expected a"):
            case.run()

    def test_a_codebook_of_other_bits(self) -> None:
        case = make_case()
        case.values.centroids = centroids(64, 3)
        with pytest.raises(ShapeError, match="centroids: expected"):
            case.run()

    def test_codewords_that_are_not_opposite(self) -> None:
        case = make_case(key_code="trellis")
        case.values.centroids = case.values.centroids.clone()
        case.values.centroids[3] += 1
        with pytest.raises(SixfoldError, match=r"codewords of a trellis.*got others for s = 3"):
            case.run()

    def test_heads_that_are_no_multiple(self) -> None:
        case = make_case()
        with pytest.raises(ShapeError, match="expected a multiple of the 2 KV heads"):
            changed(case, query=case.query[:, :3])

    def test_an_instruction_set_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SIXFOLD_ISA", "mmx")
        with pytest.raises(SixfoldError, match=r"SIXFOLD_ISA must be .*portable"):
            make_case().run()


def test_inputs_need_not_be_contiguous(isa: str) -> None:
    case = make_case(queries=3)
    whole = case.run()
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    case.first_token = case.first_token[:, :1].expand(-1, 3)
    case.table = case.table.mT.contiguous().mT
    assert torch.equal(case.run().out, whole.out), isa
