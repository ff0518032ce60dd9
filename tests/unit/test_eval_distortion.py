"""Measured distortion against theory and against the numbers the paper prints."""

import pytest

from sixfold.errors import SixfoldError
from sixfold.eval.distortion import (
    PAPER_INNER_PRODUCT,
    PAPER_MSE,
    Distortion,
    expected_distortion,
    has_prod,
    measure_distortion,
)


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, float], Distortion]:
    rows = measure_distortion([128], [1, 2, 3, 3.5, 4], vectors=1024)
    return {(row.method, row.bits): row for row in rows}


def test_theory_meets_the_paper() -> None:
    for bits, printed in PAPER_MSE.items():
        # Printed with one or two digits, and 3 bits rounded down from 0.0345 (paper.md §1).
        assert expected_distortion("norm", 100_000, bits) == pytest.approx(printed, rel=0.16)
    for bits, printed in PAPER_INNER_PRODUCT.items():
        theory = expected_distortion("prod-gaussian", 100_000, bits)
        assert theory == pytest.approx(printed, rel=0.16)
    assert expected_distortion("prod", 100_000, 1) == pytest.approx(0.5708, abs=1e-3)


def test_measurement_meets_theory(found: dict[tuple[str, float], Distortion]) -> None:
    for row in found.values():
        # First order in 1/dim for two methods, and 1,024 vectors: within 4 %.
        assert row.mse == pytest.approx(row.expected_mse, rel=0.04), row
        if row.mse_bound is not None:
            assert row.lower_bound < row.mse < row.mse_bound
        if row.inner_product_bound is not None:
            assert row.inner_product_error < row.inner_product_bound


def test_bias_shows_where_there_is_one(found: dict[tuple[str, float], Distortion]) -> None:
    for (method, _), row in found.items():
        expected = -row.expected_mse if method in ("norm", "optimal") else 0
        assert row.inner_product_bias == pytest.approx(expected, abs=0.01), row


def test_stored_bits_count_scales(found: dict[tuple[str, float], Distortion]) -> None:
    assert found["norm", 4].bits_per_value == 4 + 16 / 128
    assert found["prod", 4].bits_per_value == 4 + 32 / 128


def test_prod_is_left_out_where_it_does_not_exist() -> None:
    assert [bits for bits in (1, 2, 2.5, 3.5) if has_prod(bits)] == [1, 2, 3.5]
    rows = measure_distortion([32], [2.5], methods=["optimal", "prod"], vectors=8)
    assert [row.method for row in rows] == ["optimal"]


@pytest.mark.usefixtures("unhooked")
def test_unknown_methods_and_dimensions_are_refused() -> None:
    with pytest.raises(SixfoldError, match=r"methods must be among norm, .* got \['best'\]"):
        measure_distortion([32], [2], methods=["best"])  # type: ignore[list-item]
    with pytest.raises(SixfoldError, match="dims must be at least 2, got 1"):
        measure_distortion([64, 1], [2])
