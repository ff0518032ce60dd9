"""Measurements of the kernels, for developers; `sixfold bench` is the short form."""
