"""Errors a user can act on: each message says what was expected, what came, and what to do."""


class SixfoldError(ValueError):
    """Anything Sixfold refuses to do, from an unknown bit width to foreign codes."""


class ShapeError(SixfoldError):
    """A tensor or index does not fit the dimensions of what it is used with."""


class OutOfRangeError(ShapeError, IndexError):
    """An index of codes or layers that do not exist; an `IndexError` too, which ends iteration."""


class FormatError(SixfoldError):
    """Bytes that are not a readable Sixfold file: truncated, foreign, or from a later version."""


class UnsupportedModelError(SixfoldError):
    """A model whose attention layout cannot be read, or has no compressed form."""


class BackendError(SixfoldError):
    """A kernel backend that is unknown or that this install lacks."""
