"""One clear error for each kind of unusable input."""

from torch import Tensor

from sixfold.arguments import floating
from sixfold.codes import Codes
from sixfold.errors import ShapeError, SixfoldError


def check_vectors(x: Tensor, dim: int, name: str = "x") -> None:
    """Refuse vectors of another dimension or of a dtype without fractions.

    Raises:
        SixfoldError: `x` is not a tensor, or not of float16, bfloat16, float32 or float64.
        ShapeError: The last axis is not `dim`.
    """
    floating(name, x)
    if x.ndim == 0 or x.shape[-1] != dim:
        raise ShapeError(f"the last axis of {name} must be dim={dim}, got shape {tuple(x.shape)}")


def check_queries(queries: Tensor, codes: Codes) -> None:
    """Refuse queries that do not line up with codes.

    Raises:
        SixfoldError: Unusable dtype, or another device than the codes.
        ShapeError: The shapes are not [*batch, queries, dim] and [*batch, n, dim].
    """
    check_vectors(queries, codes.spec.dim, "queries")
    if (
        queries.ndim < 2
        or queries.ndim != len(codes.shape)
        or queries.shape[:-2] != codes.shape[:-2]
    ):
        raise ShapeError(
            "queries [*batch, n_queries, dim] and codes [*batch, n, dim] must share batch axes, "
            f"got {tuple(queries.shape)} and {tuple(codes.shape)}"
        )
    if queries.device != codes.device:
        raise SixfoldError(
            f"queries are on {queries.device} and codes on {codes.device}; move one with .to()"
        )
