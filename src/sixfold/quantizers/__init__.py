"""Vector quantizers: frozen specs with three verbs, `encode`, `decode` and `scores`."""

from sixfold.quantizers.mse import TurboQuantMSE
from sixfold.quantizers.polar import PolarQuant
from sixfold.quantizers.prod import TurboQuantProd
from sixfold.quantizers.qjl import QJL
from sixfold.quantizers.split import OutlierSplit
from sixfold.quantizers.trellis import TrellisQuantizer

__all__ = [
    "QJL",
    "OutlierSplit",
    "PolarQuant",
    "TrellisQuantizer",
    "TurboQuantMSE",
    "TurboQuantProd",
]
