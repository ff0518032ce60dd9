"""How far decoded vectors and inner products are from the originals, beside what theory says.

Vectors are Gaussian; every query has cosine ½ with its vector, so that a bias of the estimated
inner products shows (a query independent of the vector has none to estimate).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.codebooks import expected_mse
from sixfold.errors import SixfoldError
from sixfold.eval.progress import Progress, Steps, no_progress
from sixfold.packing import BITS, Bits
from sixfold.quantizers import TurboQuantMSE, TurboQuantProd

Method: TypeAlias = Literal["norm", "optimal", "unbiased", "prod", "prod-gaussian"]
METHODS: tuple[Method, ...] = get_args(Method)

PAPER_MSE: dict[float, float] = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}
PAPER_INNER_PRODUCT: dict[float, float] = {1: 1.57, 2: 0.56, 3: 0.18, 4: 0.047}

_COSINE = 0.5


@dataclass(frozen=True, slots=True)
class Distortion:
    """One quantizer at one dimension and width; errors are relative to unit vectors.

    Attributes:
        method: Scale of `TurboQuantMSE`, or projection of `TurboQuantProd`.
        dim: Coordinates a vector.
        bits: Bits a coordinate.
        bits_per_value: Bits stored a coordinate, scales and padding included.
        mse: E‖x - decode(encode(x))‖².
        expected_mse: Its value in theory; for "optimal" and "unbiased" to first order in 1/dim.
        mse_bound: The paper's guarantee, (√3·π/2)·4^-bits; None where it gives none.
        paper_mse: The figure the paper prints.
        inner_product_error: dim·E(estimate - ⟨query, x⟩)².
        inner_product_bound: The paper's guarantee, √3·π²·4^-bits; None where it gives none.
        paper_inner_product: The figure the paper prints.
        inner_product_bias: Mean estimate over mean inner product, less 1.
        lower_bound: 4^-bits; no quantizer has a smaller squared error.
    """

    method: Method
    dim: int
    bits: float
    bits_per_value: float
    mse: float
    expected_mse: float
    mse_bound: float | None
    paper_mse: float | None
    inner_product_error: float
    inner_product_bound: float | None
    paper_inner_product: float | None
    inner_product_bias: float
    lower_bound: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def measure_distortion(
    dims: Sequence[int],
    widths: Sequence[Bits],
    *,
    methods: Sequence[Method] = METHODS,
    vectors: int = 4096,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[Distortion]:
    """Measure every method at every dimension and width that it has.

    Args:
        dims: Dimensions.
        widths: Bits a coordinate.
        methods: Which quantizers.
        vectors: Gaussian vectors a measurement.
        seed: Of the vectors, the queries and the rotations.
        progress: Called after every measurement.

    Raises:
        SixfoldError: A dimension, width or method that does not exist.
    """
    if unknown := set(methods) - set(METHODS):
        raise SixfoldError(f"methods must be among {', '.join(METHODS)}, got {sorted(unknown)}")
    if min(dims) < 2:
        raise SixfoldError(f"dims must be at least 2, got {min(dims)}")
    cases = [
        (method, dim, bits)
        for dim in dims
        for bits in widths
        for method in methods
        if has_prod(bits) or not method.startswith("prod")
    ]
    found, steps = [], Steps(progress, len(cases))
    for case in cases:
        found.append(_measure(*case, vectors, seed))
        steps.done(case[0])
    return found


def has_prod(bits: Bits) -> bool:
    """Whether `TurboQuantProd` exists at this width: one of its bits is spent on signs."""
    return bits == 1 or bits - 1 in BITS


def expected_distortion(method: Method, dim: int, bits: Bits) -> float:
    """Squared error of a unit vector in theory.

    A Gaussian sketch of d signs has error π/2 - 1/d; one with orthogonal rows of norm √d has
    1/E|row·x|² - 1, which tends to π/2 - 1 (paper.md's constants at d = ∞).
    """
    if method.startswith("prod"):
        residual = 1.0 if bits == 1 else expected_mse(dim, bits - 1)
        if method == "prod-gaussian":
            return residual * (math.pi / 2 - 1 / dim)
        ratio = math.exp(2 * (math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2)))
        return residual * (math.pi * ratio / dim - 1)
    error = expected_mse(dim, bits)
    return error / (1 - error) if method == "unbiased" else error


def _quantizer(method: Method, dim: int, bits: Bits, seed: int) -> TurboQuantMSE | TurboQuantProd:
    if method == "prod":
        return TurboQuantProd(dim, bits, seed=seed)
    if method == "prod-gaussian":
        return TurboQuantProd(dim, bits, projection="gaussian", seed=seed)
    return TurboQuantMSE(dim, bits, scale=method, seed=seed)


def _measure(method: Method, dim: int, bits: Bits, vectors: int, seed: int) -> Distortion:
    x, queries = _pairs(dim, vectors, seed)
    quantizer: Any = _quantizer(method, dim, bits, seed)
    codes = quantizer.encode(x)
    mse = (quantizer.decode(codes) - x).double().square().sum(1).mean()
    # A batch of one vector and one query each: all pairs would be a large matrix for nothing.
    estimates = quantizer.scores(queries[:, None], codes[:, None]).double().flatten()
    wide, gaussian = method == "norm", method == "prod-gaussian"
    return Distortion(
        method=method,
        dim=dim,
        bits=bits,
        bits_per_value=codes.bits_per_value,
        mse=float(mse),
        expected_mse=expected_distortion(method, dim, bits),
        mse_bound=math.sqrt(3) * math.pi / 2 * 4**-bits if wide else None,
        paper_mse=PAPER_MSE.get(bits) if wide else None,
        inner_product_error=float(dim * (estimates - _COSINE).square().mean()),
        inner_product_bound=math.sqrt(3) * math.pi**2 * 4**-bits if gaussian else None,
        paper_inner_product=PAPER_INNER_PRODUCT.get(bits) if gaussian else None,
        inner_product_bias=float(estimates.mean() / _COSINE - 1),
        lower_bound=4.0**-bits,
    )


def _pairs(
    dim: int, vectors: int, seed: int
) -> tuple[Float[Tensor, "vectors dim"], Float[Tensor, "vectors dim"]]:
    """Random unit vectors, and for each a unit query at 60 degrees to it."""
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, vectors, dim, generator=generator, dtype=torch.float64, device="cpu")
    x /= x.norm(dim=1, keepdim=True)
    other -= (other * x).sum(1, keepdim=True) * x
    other /= other.norm(dim=1, keepdim=True)
    queries = _COSINE * x + math.sqrt(1 - _COSINE**2) * other
    return x.float(), queries.float()
