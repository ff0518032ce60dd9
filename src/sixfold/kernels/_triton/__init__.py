"""Device functions that several Triton kernels share."""
