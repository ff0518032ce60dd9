"""Sixfold: compress the key-value cache of any decoder transformer to 2-4 bits a value.

Importing this package loads PyTorch and the quantizers, and no host framework: the cache for
transformers is imported when `TurboQuantCache` is first asked for.
"""

from typing import TYPE_CHECKING

from sixfold._version import __version__
from sixfold.cache import KeyMaps
from sixfold.errors import SixfoldError
from sixfold.index import Index
from sixfold.quantizers import (
    QJL,
    OutlierSplit,
    PolarQuant,
    TrellisQuantizer,
    TurboQuantMSE,
    TurboQuantProd,
)

if TYPE_CHECKING:
    from sixfold.integrations.transformers import TurboQuantCache

__all__ = [
    "QJL",
    "Index",
    "KeyMaps",
    "OutlierSplit",
    "PolarQuant",
    "SixfoldError",
    "TrellisQuantizer",
    "TurboQuantCache",
    "TurboQuantMSE",
    "TurboQuantProd",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Import the transformers integration on first use (PEP 562)."""
    if name != "TurboQuantCache":
        raise AttributeError(f"module 'sixfold' has no attribute {name!r}")
    try:
        from sixfold.integrations.transformers import TurboQuantCache
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "TurboQuantCache needs transformers: pip install 'sixfold[transformers]'"
        ) from error
    return TurboQuantCache


def __dir__() -> list[str]:
    """What users may type; the cache, too, which is not imported yet."""
    return sorted(__all__)
