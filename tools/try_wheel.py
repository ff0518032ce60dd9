"""Whether an installed wheel works: its compiled module loads, and agrees with plain PyTorch.

For environments that hold the wheel and nothing else: python tools/try_wheel.py
"""

import os

import torch

import sixfold
from sixfold.kernels._native import compiled


def scores(backend: str) -> torch.Tensor:
    """Inner products of a few vectors and queries, from codes."""
    os.environ["SIXFOLD_BACKEND"] = backend
    vectors = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    quantizer = sixfold.TurboQuantMSE(dim=128, bits=4)
    return quantizer.scores(vectors[:4], quantizer.encode(vectors))


def main() -> None:
    """Print what was found, or end with an error."""
    native = compiled()
    torch.testing.assert_close(scores("cpu"), scores("reference"), rtol=1e-4, atol=1e-2)
    print(f"sixfold {sixfold.__version__} works, with {native.__file__}")


if __name__ == "__main__":
    main()
