"""What is measured of the trellis, and that its tables hold what was."""

from benchmarks import trellis, trellis_choices


def test_tables_hold_what_was_measured() -> None:
    row = trellis.distortion(32, 2, vectors=64, rotations=1)
    assert row["bound"] < row["error"]["256"] < 0.8 * row["error"][trellis.SCALAR]
    shipped, random = (
        trellis_choices.error(trellis_choices.CODEBOOKS[name](2), 2, dim=32, vectors=64)
        for name in (trellis_choices.SHIPPED, "random normal codewords")
    )
    assert shipped < 0.95 * random
    with trellis_choices.seam(1):
        careless = trellis_choices.error(trellis_choices.CODEBOOKS["shipped"](2), 2, 32, 64)
    assert careless > 1.05 * shipped
