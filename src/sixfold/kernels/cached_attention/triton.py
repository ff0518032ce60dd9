"""Attention over a compressed layer on a GPU: the reference's steps, each on its own kernels.

Pages and rotations, whose cost grows with the history or the model, are Triton's. What remains is
small tensors, in PyTorch, without a host synchronisation, as the capture of a CUDA graph demands.
"""

from sixfold.kernels.attention import triton as _pages
from sixfold.kernels.cached_attention.reference import cached_attention

# Importing the other says whether this install has Triton: without it this backend is missing.
__all__ = ["_pages", "cached_attention"]
