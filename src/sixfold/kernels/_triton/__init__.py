"""Triton kernels and the device functions they share; kernels/*/triton.py launch them."""
