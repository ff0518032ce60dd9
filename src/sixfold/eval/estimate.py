"""Means over windows of text, and how sure of them one can be."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over windows.

    Attributes:
        mean: Mean of the windows' own means.
        standard_error: Its standard error; None when there is a single window.
        half_width: Half of its 95 % interval, by Student's t; None likewise.
    """

    mean: float
    standard_error: float | None
    half_width: float | None

    @classmethod
    def over(cls, windows: Float[Tensor, " windows"]) -> "Estimate":
        """Estimate from one value a window."""
        count = len(windows)
        if count == 1:
            return cls(float(windows.mean()), None, None)
        error = float(windows.std() / math.sqrt(count))
        return cls(float(windows.mean()), error, half_width(error, count))


def half_width(standard_error: float, windows: int) -> float:
    """Half of the 95 % interval of a mean over so many windows, at least two."""
    return _student(windows - 1) * standard_error


# 97.5 % quantiles of Student's t with 1 to 10 degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t, to 0.001."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    # Cornish-Fisher around the normal quantile.
    z, n = 1.959964, freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
