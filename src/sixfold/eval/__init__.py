"""Measurements: distortion of the quantizers, and what a compressed cache costs a model."""
