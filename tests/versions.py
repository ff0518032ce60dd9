"""What the oldest declared versions cannot do by themselves: tests of it are skipped there."""

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

traces_models = pytest.mark.skipif(
    TORCH < (2, 7), reason="torch 2.6 cannot trace the forward pass of transformers 5"
)
