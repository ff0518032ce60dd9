"""The compiled trellis against its reference, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels.trellis import reference
from sixfold.packing import Bits, decode_scale
from sixfold.rotation import Rotation, RotationKind
from sixfold.trellis import STATES, TRELLIS_BITS, codewords, starts, window_bits
from tests.kernels.vector_cases import DTYPES, SCALES, assert_same_bits, assert_same_codes, mixed
from tests.threads import on_threads
from tests.vectors import gaussian

_cpu = pytest.importorskip("sixfold._cpu")
cpu = pytest.importorskip("sixfold.kernels.trellis.cpu")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=_cpu.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on every instruction set of this processor."""
    monkeypatch.setenv("SIXFOLD_ISA", request.param)
    # What the references call must not be what they are compared with.
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    return str(request.param)


def tables(
    dim: int, bits: Bits, states: int, kind: RotationKind = "hadamard"
) -> tuple[Tensor, Tensor, Tensor]:
    rotation = Rotation(dim, kind, seed=1)
    return rotation.turns(CPU), rotation.factor(CPU), codewords(states, bits)


def check_encode(x: Tensor, bits: Bits, states: int, scale: str = "optimal") -> None:
    arguments = (x, *tables(x.shape[-1], bits, states))
    assert_same_codes(
        cpu.encode(*arguments, bits=bits, scale=scale),
        reference.encode(*arguments, bits=bits, scale=scale),
    )


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("dim", [33, 64, 80, 96, 128])
def test_encode(dim: int, bits: Bits, states: int) -> None:
    check_encode(mixed(5 if states > 256 else 12, dim, seed=dim), bits, states)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_encode_few_coordinates(bits: Bits, states: int) -> None:
    """The seam's windows then go round the vector, more than once."""
    for dim in range(1, 17):
        if starts(dim, bits)[-1] >= window_bits(states):
            check_encode(mixed(4, dim, seed=dim), bits, states)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_encode_any_dtype_and_scale(dtype: torch.dtype, scale: str) -> None:
    for bits in (2.5, 4):
        check_encode(mixed(20, 64, seed=1).to(dtype), bits, 128, scale)


@pytest.mark.parametrize("shape", [(), (1,), (2, 0), (0,), (3, 22), (64,), (65,)])
def test_encode_any_batch(shape: tuple[int, ...]) -> None:
    for bits in (2, 3):
        check_encode(
            gaussian(66, 32, seed=2)[: torch.Size(shape).numel()].view(*shape, 32), bits, 128
        )


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: x[::2],
        lambda x: x[:, 1:49],
        lambda x: x[:1].expand(9, -1),
    ],
)
def test_encode_any_strides(strided: Callable[[Tensor], Tensor]) -> None:
    check_encode(strided(gaussian(40, 64, seed=3)), 2, 256)


def test_encode_many() -> None:
    """Outliers in a row, which few vectors have, are where sums stop growing."""
    for bits in (1, 2, 2.5):
        check_encode(gaussian(700, 64, seed=4), bits, 128)


def test_ties_and_codewords_from_any_address() -> None:
    x = gaussian(70, 32, seed=5)
    turns, factor, book = tables(32, 2, 128)
    for words in (torch.zeros(128), book.sign(), book * 100):
        for bits in (2, 2.5, 4):
            arguments = x, turns, factor, torch.nn.functional.pad(words, (1, 0))[1:]
            assert_same_codes(
                cpu.encode(*arguments, bits=bits, scale="unbiased"),
                reference.encode(*arguments, bits=bits, scale="unbiased"),
            )


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("dim", [10, 33, 64, 80, 128])
def test_decode(dim: int, bits: Bits, states: int, kind: RotationKind) -> None:
    turns, factor, book = tables(dim, bits, states, kind)
    rows, stored = reference.encode(
        mixed(20, dim, seed=dim), turns, factor, book, bits=bits, scale="optimal"
    )
    # Any row decodes, not only those that a search finds.
    rows[::2] = torch.randint(256, rows[::2].shape, generator=torch.Generator().manual_seed(1))
    total = starts(dim, bits)[-1]
    kept = [min(max(total - 8 * byte, 0), 8) for byte in range(rows.shape[-1])]
    rows &= torch.tensor([(1 << count) - 1 for count in kept], dtype=torch.uint8)
    arguments = rows, stored, turns, factor, book
    got = cpu.decode(*arguments, dim=dim, bits=bits)
    expected = reference.decode(*arguments, dim=dim, bits=bits)
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got, expected, rtol=2**-22, atol=1e-12, equal_nan=True)
    if len(turns):
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize(
    ("dim", "batch", "n", "n_queries"),
    [(20, (2,), 33, 3), (80, (), 500, 9), (64, (3,), 0, 3), (128, (2, 2), 40, 0)],
)
def test_scores(
    dim: int, batch: tuple[int, ...], n: int, n_queries: int, bits: Bits, states: int
) -> None:
    _, _, book = tables(dim, bits, states)
    total = starts(dim, bits)[-1]
    random = torch.Generator().manual_seed(2)
    paths = torch.randint(256, (*batch, n, -(-total // 32) * 4), generator=random)
    paths[..., total // 8 + (total % 8 > 0) :] = 0
    rows = paths.to(torch.uint8)
    if total % 8:
        rows[..., total // 8] &= (1 << total % 8) - 1
    stored = torch.rand(*batch, n, generator=random).half()
    stored[..., n // 2 : n // 2 + 1] = torch.nan
    queries = torch.randn(*batch, n_queries, dim, generator=random)
    got = cpu.scores(queries, rows, stored, book, bits=bits)
    levels = reference.expand(rows, book, dim=dim, bits=bits).double()
    exact = queries.double() @ levels.mT * decode_scale(stored)[..., None, :]
    # Rounding of sums of dim products.
    bound = queries.norm(dim=-1)[..., None] * decode_scale(stored)[..., None, :] * dim**0.5
    assert (((got - exact).abs() <= 2**-20 * bound) | exact.isnan()).all()
    assert torch.equal(got.isnan(), exact.isnan())


def test_scores_have_gradients() -> None:
    book = codewords(128, 2)
    rows, stored = torch.zeros(3, 8, dtype=torch.uint8), torch.ones(3).half()
    queries = gaussian(2, 32, seed=1).requires_grad_()
    cpu.scores(queries, rows, stored, book, bits=2).sum().backward()
    assert queries.grad is not None


def test_number_of_threads_does_not_show() -> None:
    turns, factor, book = tables(128, 2, 128)
    x = gaussian(1000, 128, seed=1)

    def everything() -> list[Tensor]:
        rows, stored = cpu.encode(x, turns, factor, book, bits=2, scale="optimal")
        return [
            rows,
            stored,
            cpu.decode(rows, stored, turns, factor, book, dim=128, bits=2),
            cpu.scores(x[:5], rows, stored, book, bits=2),
        ]

    alone, together = on_threads(everything, 1, 5)
    for one, other in zip(alone, together, strict=True):
        assert_same_bits(other, one)


@pytest.mark.usefixtures("unhooked")
def test_tensors_that_do_not_fit_are_refused() -> None:
    turns, factor, book = tables(64, 2, 128)
    x = gaussian(5, 64, seed=1)
    with pytest.raises(ShapeError, match=r"codewords: expected one of \(128, 256, 1024\)"):
        cpu.encode(x, turns, factor, book[:100], bits=2, scale="norm")
    with pytest.raises(ShapeError, match="expected opposite ones for states of opposite bits"):
        cpu.encode(x, turns, factor, book.roll(1), bits=2, scale="norm")
    rows, stored = cpu.encode(x, turns, factor, book, bits=2, scale="norm")
    with pytest.raises(ShapeError, match="rows: expected"):
        cpu.decode(rows[:, :-4], stored, turns, factor, book, dim=64, bits=2)
    with pytest.raises(ShapeError, match="rows: expected"):
        cpu.scores(x[None], rows, stored, book, bits=2)
