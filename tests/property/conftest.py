"""Fixtures of the property tests."""

from hypothesis import settings

# The first example of a size makes codebooks and rotations; how long that takes is not tested.
settings.register_profile("sixfold", deadline=None)
settings.load_profile("sixfold")
