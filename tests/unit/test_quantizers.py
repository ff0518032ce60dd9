"""What every quantizer promises for every input, usable or not."""

import math
from typing import Any

import pytest
import torch

import sixfold
from sixfold.errors import ShapeError, SixfoldError
from tests.vectors import gaussian, normalized_error, outlier_channels

DIM = 48
QUANTIZERS: list[Any] = [
    sixfold.TurboQuantMSE(DIM, 4),
    sixfold.TurboQuantMSE(DIM, 3.5, scale="unbiased", rotation="orthogonal"),
    sixfold.TurboQuantMSE(DIM, 2, scale="norm"),
    sixfold.TurboQuantProd(DIM, 4),
    sixfold.TurboQuantProd(DIM, 1, projection="gaussian"),
    sixfold.QJL(DIM, 100),
    sixfold.PolarQuant(DIM),
    sixfold.OutlierSplit(DIM, outlier_channels=8),
    sixfold.TrellisQuantizer(DIM, 2),
    sixfold.TrellisQuantizer(DIM, 3.5, scale="unbiased", rotation="orthogonal"),
]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=QUANTIZERS, ids=repr)
def quantizer(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_floating_dtype_gives_the_codes_of_its_values(
    quantizer: Any, dtype: torch.dtype
) -> None:
    x = gaussian(50, DIM, seed=1).to(dtype)
    decoded = quantizer.decode(quantizer.encode(x))
    assert decoded.dtype == torch.float32
    # float64 is normalised in float64, so a scale may round the other way.
    torch.testing.assert_close(
        decoded, quantizer.decode(quantizer.encode(x.float())), rtol=2e-3, atol=1e-5
    )
    queries = gaussian(3, DIM, seed=2).to(dtype)
    assert quantizer.scores(queries, quantizer.encode(x)).dtype == torch.float32


def test_scores_are_inner_products_with_decoded_vectors(quantizer: Any) -> None:
    codes = quantizer.encode(gaussian(2 * 50, DIM, seed=3).view(2, 50, DIM))
    queries = gaussian(2 * 7, DIM, seed=4).view(2, 7, DIM)
    expected = queries @ quantizer.decode(codes).mT
    torch.testing.assert_close(quantizer.scores(queries, codes), expected, rtol=0, atol=1e-4)


def test_zero_vectors_decode_to_zero(quantizer: Any) -> None:
    for zeros in (
        torch.zeros(3, DIM),
        torch.zeros(3, DIM, dtype=torch.float64),
        -torch.zeros(3, DIM),
    ):
        assert (quantizer.decode(quantizer.encode(zeros)) == 0).all()


@pytest.mark.parametrize("size", [1e-26, 1e-9, 1e-3, 1e6, 1e9, 1e13, 1e26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_size_does_not_matter(quantizer: Any, size: float, dtype: torch.dtype) -> None:
    x = torch.nn.functional.normalize(gaussian(200, DIM, seed=5).to(dtype), dim=-1)
    plain = normalized_error(x, quantizer.decode(quantizer.encode(x))).mean()
    scaled = normalized_error(x * size, quantizer.decode(quantizer.encode(x * size))).mean()
    assert scaled.item() == pytest.approx(plain.item(), rel=0.02)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *((size, torch.float32) for size in (1e-44, 1e-12, 1e30, 1e38)),
        *((size, torch.float64) for size in (1e-320, 1e200, 1e307)),
    ],
)
def test_extreme_sizes_stay_finite(quantizer: Any, size: float, dtype: torch.dtype) -> None:
    x = gaussian(20, DIM, seed=6).clamp(-3, 3).to(dtype) * size
    decoded = quantizer.decode(quantizer.encode(x))
    assert decoded.isfinite().all()
    assert (decoded * x.sign() >= 0).float().mean() > 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_spoils_itself_alone(quantizer: Any, bad: float) -> None:
    clean = gaussian(6, DIM, seed=7)
    x = clean.clone()
    x[2, 5] = bad
    channels = {"channels": torch.arange(8)} if isinstance(quantizer, sixfold.OutlierSplit) else {}
    decoded = quantizer.decode(quantizer.encode(x, **channels))
    expected = quantizer.decode(quantizer.encode(clean, **channels))
    others = [0, 1, 3, 4, 5]
    assert torch.equal(decoded[others], expected[others])
    assert decoded[2].isnan().any()
    scores = quantizer.scores(clean[:2], quantizer.encode(x, **channels))
    assert scores[:, 2].isnan().all()
    assert scores[:, others].isfinite().all()


def test_codes_keep_no_graph(quantizer: Any) -> None:
    x = gaussian(2, DIM, seed=0).requires_grad_()
    assert not quantizer.decode(quantizer.encode(x)).requires_grad
    queries = gaussian(3, DIM, seed=1).requires_grad_()
    quantizer.scores(queries, quantizer.encode(x)).sum().backward()
    assert queries.grad is not None
    expected = quantizer.decode(quantizer.encode(x)).sum(0).expand(3, -1)
    torch.testing.assert_close(queries.grad, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_matter(quantizer: Any, dtype: torch.dtype) -> None:
    x, queries = gaussian(20, DIM, seed=0), gaussian(3, DIM, seed=1)
    codes = quantizer.encode(x)
    decoded, scores = quantizer.decode(codes), quantizer.scores(queries, codes)
    with torch.autocast("cpu", dtype=dtype):
        within = quantizer.encode(x)
        assert torch.equal(quantizer.decode(codes), decoded)
        assert torch.equal(quantizer.scores(queries, codes), scores)
    assert torch.equal(quantizer.decode(within), decoded)


def test_default_dtype_does_not_matter(quantizer: Any) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        codes = quantizer.encode(gaussian(2, DIM, seed=0))
        assert quantizer.decode(codes).dtype == torch.float32
        assert quantizer.scores(gaussian(1, DIM, seed=0), codes).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_empty_and_single_vectors(quantizer: Any) -> None:
    empty = quantizer.encode(torch.zeros(2, 0, DIM))
    assert quantizer.decode(empty).shape == (2, 0, DIM)
    assert quantizer.scores(torch.zeros(2, 3, DIM), empty).shape == (2, 3, 0)
    if not isinstance(quantizer, sixfold.OutlierSplit):
        assert quantizer.encode(gaussian(1, DIM, seed=0)[0]).shape == (DIM,)


@pytest.mark.usefixtures("unhooked")
def test_bad_vectors_get_one_clear_error(quantizer: Any) -> None:
    with pytest.raises(ShapeError, match=rf"last axis of x must be dim={DIM}, got shape \(2, 47\)"):
        quantizer.encode(torch.zeros(2, 47))
    with pytest.raises(ShapeError, match="last axis"):
        quantizer.encode(torch.tensor(1.0))
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(SixfoldError, match=r"x must be float16.*got torch\.\w+; convert"):
            quantizer.encode(torch.zeros(2, DIM).to(dtype))


@pytest.mark.usefixtures("unhooked")
def test_bad_queries_get_one_clear_error(quantizer: Any) -> None:
    codes = quantizer.encode(torch.zeros(2, 5, DIM))
    for shape in ((3, DIM), (3, 4, DIM), (2, 2, 4, DIM), (DIM,)):
        with pytest.raises(ShapeError, match="must share batch axes"):
            quantizer.scores(torch.zeros(shape), codes)
    with pytest.raises(ShapeError, match="last axis of queries"):
        quantizer.scores(torch.zeros(2, 4, 47), codes)
    with pytest.raises(SixfoldError, match="queries must be float16"):
        quantizer.scores(torch.zeros(2, 4, DIM, dtype=torch.int32), codes)
    with pytest.raises(SixfoldError, match=r"on meta and codes on cpu; move"):
        quantizer.scores(torch.zeros(2, 4, DIM, device="meta"), codes)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("TurboQuantMSE", {"dim": 0, "bits": 4}),
        ("TurboQuantMSE", {"dim": 8.5, "bits": 4}),
        ("TurboQuantMSE", {"dim": 8, "bits": 9}),
        ("TurboQuantMSE", {"dim": 8, "bits": 1.5}),
        ("TurboQuantMSE", {"dim": 8, "bits": "4"}),
        ("TurboQuantMSE", {"dim": 8, "bits": 4, "scale": "best"}),
        ("TurboQuantMSE", {"dim": 8, "bits": 4, "rotation": "none"}),
        ("TurboQuantMSE", {"dim": 8, "bits": 4, "seed": -1}),
        ("TurboQuantProd", {"dim": 8, "bits": 2.5}),
        ("TurboQuantProd", {"dim": 8, "bits": 2, "projection": "sparse"}),
        ("QJL", {"dim": 8, "projections": 0}),
        ("QJL", {"dim": 0, "projections": 8}),
        ("PolarQuant", {"dim": 8, "bits": ()}),
        ("PolarQuant", {"dim": 8, "bits": (4, 9)}),
        ("PolarQuant", {"dim": 8, "bits": (4, 2.5)}),
        ("OutlierSplit", {"dim": 32}),
        ("OutlierSplit", {"dim": 64, "bits": 0}),
        ("TrellisQuantizer", {"dim": 0, "bits": 2}),
        ("TrellisQuantizer", {"dim": 3, "bits": 2.5}),
        ("TrellisQuantizer", {"dim": 9, "bits": 1, "states": 1024}),
        ("TrellisQuantizer", {"dim": 8, "bits": 5}),
        ("TrellisQuantizer", {"dim": 8, "bits": "2"}),
        ("TrellisQuantizer", {"dim": 8, "bits": 2, "states": 255}),
        ("TrellisQuantizer", {"dim": 8, "bits": 2, "scale": "best"}),
        ("TrellisQuantizer", {"dim": 8, "bits": 2, "rotation": "none"}),
        ("TrellisQuantizer", {"dim": 8, "bits": 2, "seed": -1}),
    ],
)
@pytest.mark.usefixtures("unhooked")
def test_bad_fields_get_one_clear_error(kind: str, fields: dict[str, Any]) -> None:
    with pytest.raises(SixfoldError, match=r"(must|expected|reads).*got"):
        getattr(sixfold, kind)(**fields)


def test_specs_are_values() -> None:
    assert sixfold.TurboQuantMSE(64, 3) == sixfold.TurboQuantMSE(dim=64, bits=3, scale="optimal")
    assert len({sixfold.TurboQuantMSE(64, 3), sixfold.TurboQuantMSE(64, 3)}) == 1


def test_optimal_scale_beats_every_other() -> None:
    x = gaussian(300, DIM, seed=8)
    errors = {}
    for scale in ("optimal", "norm", "unbiased"):
        quantizer = sixfold.TurboQuantMSE(DIM, 2, scale=scale)
        errors[scale] = normalized_error(x, quantizer.decode(quantizer.encode(x)))
    # Up to the rounding of the stored scale.
    assert (errors["optimal"] <= errors["norm"] + 1e-6).all()
    assert (errors["optimal"] <= errors["unbiased"] + 1e-6).all()


def test_split_finds_the_channels_and_keeps_them() -> None:
    quantizer = sixfold.OutlierSplit(DIM, outlier_channels=4)
    x = outlier_channels(2 * 30, DIM, seed=9).view(2, 30, DIM)
    codes = quantizer.encode(x)
    assert codes.channels.unique().tolist() == list(range(0, DIM, 12))
    kept = quantizer.encode(gaussian(2 * 5, DIM, seed=0).view(2, 5, DIM), codes.channels[:, 0])
    assert torch.equal(kept.channels[:, 0], codes.channels[:, 0])


@pytest.mark.usefixtures("unhooked")
def test_split_needs_tokens() -> None:
    with pytest.raises(ShapeError, match="token axis"):
        sixfold.OutlierSplit(DIM, outlier_channels=4).encode(torch.zeros(DIM))


@pytest.mark.usefixtures("unhooked")
def test_advice_fits_the_input(quantizer: Any) -> None:
    array = torch.zeros(3, DIM).numpy()
    with pytest.raises(SixfoldError, match=r"numpy.ndarray; convert it with torch.as_tensor"):
        quantizer.encode(array)
    assert quantizer.encode(torch.as_tensor(array)).shape == (3, DIM)
