"""Our own contenders: every bit width, on every instruction set that is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sixfold.cache import CachePolicy
from sixfold.eval.timing import Case, Contender
from sixfold.kernels._dispatch import available_backends, implementation
from sixfold.kernels.types import CodeName
from sixfold.packing import Bits


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line chose.

    Attributes:
        bits: Widths of our contenders.
        codes: Codes of the pages of caches.
        isas: Values of SIXFOLD_ISA to compare; empty for the default alone.
        vllm_python: An interpreter that has vllm, or None.
        model: For `generate`: embedded, random or both.
        steps: Decode steps a sample of `step` and `generate`.
    """

    bits: Sequence[Bits] = (4, 3, 2, 3.5, 2.5)
    codes: Sequence[CodeName] = (CachePolicy.code,)
    isas: Sequence[str] = ()
    vllm_python: str | None = None
    model: str = "both"
    steps: int = 32


def variants(operation: str, case: Case, options: Options) -> Case:
    """The same case, our contenders (which state their bits) on each instruction set asked for."""
    backend = implementation(operation, torch.device("cpu")).__name__.split(".")[-1]
    contenders: list[Contender] = []
    for one in case.contenders:
        if "bits" not in one.notes:
            contenders.append(one)
            continue
        one = replace(one, notes={**one.notes, "backend": backend})
        isas = options.isas if backend == "cpu" else ()
        contenders += [_on(one, isa) for isa in isas] or [one]
    return replace(case, contenders=contenders)


def _on(one: Contender, isa: str) -> Contender:
    return replace(
        one,
        name=f"{one.name} ({isa})",
        environment={**one.environment, "SIXFOLD_ISA": isa},
        notes={**one.notes, "isa": isa},
    )


def on_the_reference(operation: str, case: Case) -> list[Contender]:
    """Our contenders on the plain PyTorch reference, if that is not what runs anyway."""
    if "cpu" not in available_backends(operation):
        return []
    return [
        replace(
            one,
            name=f"{one.name}, reference",
            environment={**one.environment, "SIXFOLD_BACKEND": "reference"},
            notes={**one.notes, "backend": "reference"},
        )
        for one in case.contenders
        if "bits" in one.notes
    ]
