"""What is compared with what. The first case of a width is what the others are measured against."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.evaluate import NO_WINDOWS
from benchmarks.recipe import variants
from benchmarks.recipe.models import with_value_map
from benchmarks.recipe.variants import MakeVariant, Variant
from sixfold.kernels.types import CodeName
from sixfold.packing import Bits

PREFILL = 384
"""Tokens of a cache's first chunk."""

Change: TypeAlias = Callable[[PreTrainedModel, Int[Tensor, " tokens"]], PreTrainedModel]


@dataclass(frozen=True)
class Case:
    """One way to spend a budget.

    Attributes:
        label: What is special about it.
        bits: The budget: bits a value.
        options: Of `TurboQuantCache`.
        variant: What the product does not offer.
        change: A change of the model that keeps its function.
    """

    label: str
    bits: Bits
    options: dict[str, Any] = field(default_factory=lambda: dict(NO_WINDOWS))
    variant: MakeVariant = Variant
    change: Change | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Every option: a codebook, keys and values alike, where the case does not say."""
        alike = {"key_bits": self.bits, "value_bits": self.bits}
        return {"code": "codebook", **alike, **self.options}


@dataclass(frozen=True)
class Study:
    """Cases to compare, and on what."""

    cases: tuple[Case, ...]
    models: tuple[str, ...] = ("plain", "hard")
    needles: bool = False


_BUDGETS: dict[CodeName, dict[Bits, tuple[tuple[Bits, Bits], ...]]] = {
    "codebook": {
        4: ((4, 4), (5, 3)),
        3.5: ((3.5, 3.5), (4, 3)),
        3: ((3, 3), (3.5, 2.5), (4, 2)),
        2.5: ((2.5, 2.5), (3, 2)),
        2: ((2, 2), (3, 1)),
    },
    # Of widths that pages of a trellis have.
    "trellis": {
        4: ((4, 4),),
        3.5: ((4, 3), (3, 4)),
        3: ((3, 3), (4, 2)),
        2.5: ((2.5, 2.5), (3, 2), (4, 1)),
        2: ((2, 2), (3, 1)),
    },
}


def _splits(code: CodeName, **windows: Any) -> tuple[Case, ...]:
    return tuple(
        Case(
            f"keys {k:g}, values {v:g}",
            bits,
            {"key_bits": k, "value_bits": v, "code": code, **windows},
        )
        for bits, pairs in _BUDGETS[code].items()
        for k, v in pairs
    )


def _varied(widths: tuple[Bits, ...], made: dict[str, MakeVariant]) -> tuple[Case, ...]:
    return tuple(
        Case(label, bits, variant=variant) for label, variant in made.items() for bits in widths
    )


def _layers() -> tuple[Case, ...]:
    """Four layers, the same bits in all."""
    by_layer: dict[Bits, dict[str, tuple[Bits, ...]]] = {
        2.5: {
            "the same in all": (2.5, 2.5, 2.5, 2.5),
            "first 4, others 2": (4, 2, 2, 2),
            "last 4, others 2": (2, 2, 2, 4),
            "first and last 3, others 2": (3, 2, 2, 3),
            "first and last 2, others 3": (2, 3, 3, 2),
        },
        3: {
            "the same in all": (3, 3, 3, 3),
            "first and last 4, others 2": (4, 2, 2, 4),
            "first and last 3.5, others 2.5": (3.5, 2.5, 2.5, 3.5),
            "first and last 2.5, others 3.5": (2.5, 3.5, 3.5, 2.5),
        },
    }
    return tuple(
        Case(label, bits, {**NO_WINDOWS, "per_layer": _widths(widths)})
        for bits, rows in by_layer.items()
        for label, widths in rows.items()
    )


def _widths(widths: tuple[Bits, ...]) -> dict[int, dict[str, Any]]:
    return {layer: {"key_bits": b, "value_bits": b} for layer, b in enumerate(widths)}


def _windows() -> tuple[Case, ...]:
    rows = [(4, 64), (0, 64), (8, 64), (16, 64), (4, 0), (4, 32), (4, 128), (0, 0)]
    return tuple(
        Case(f"{sinks} first, {recent} last", 2.5, {"sink_tokens": sinks, "recent_window": recent})
        for sinks, recent in rows
    )


def _value_maps() -> tuple[Case, ...]:
    maps: dict[str, Change | None] = {
        "as they are": None,
        "centred": lambda model, ids: with_value_map(model, ids, center=True, weigh=False),
        "weighted": lambda model, ids: with_value_map(model, ids, center=False, weigh=True),
        "centred and weighted": lambda model, ids: with_value_map(
            model, ids, center=True, weigh=True
        ),
    }
    return tuple(
        Case(label, bits, change=change)
        for label, change in maps.items()
        for bits in (4.0, 2.5, 2.0)
    )


STUDIES: dict[str, Study] = {
    "splits": Study(_splits("codebook", **NO_WINDOWS), needles=True),
    "splits_windows": Study(_splits("codebook")),
    "splits_trellis": Study(_splits("trellis", **NO_WINDOWS), needles=True),
    "splits_trellis_windows": Study(_splits("trellis")),
    "key_scales": Study(
        _varied(
            (4, 2.5, 2),
            {
                "unbiased": Variant,
                "optimal": variants.scales("optimal", "optimal"),
                "norm": variants.scales("norm", "optimal"),
            },
        )
    ),
    "value_scales": Study(
        _varied(
            (4, 2.5, 2),
            {
                "optimal": Variant,
                "norm": variants.scales("unbiased", "norm"),
                "unbiased": variants.scales("unbiased", "unbiased"),
            },
        )
    ),
    "spread": Study(
        _varied(
            (3, 2),
            {
                "fourth powers": Variant,
                "squares": variants.moment(2),
                "eighth powers": variants.moment(8),
                "fourth powers, without massive tokens": variants.without_massive,
                "squares, massive tokens exact": variants.exact_massive(2),
            },
        ),
        models=("plain", "hard", "massive x2"),
    ),
    "first_tokens": Study(
        _varied(
            (3, 2),
            {
                "all 384": Variant,
                **{f"first {n}": variants.first_tokens(n) for n in (16, 32, 64, 128, 256)},
            },
        )
    ),
    "maps": Study(
        _varied(
            (3, 2),
            {
                "once, a scale a channel": Variant,
                "a scale a RoPE pair": variants.shared_by_pairs,
                "anew in every step": variants.recoded,
            },
        ),
        models=("plain", "hard", "massive x2"),
    ),
    "value_maps": Study(_value_maps()),
    "windows": Study(_windows()),
    "layers": Study(_layers()),
    "codes": Study(
        _varied(
            (3.5, 2.5),
            {
                "2-D grid": Variant,
                "half the channels a bit more": variants.channel_split(PREFILL),
            },
        )
    ),
}
