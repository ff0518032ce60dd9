"""Other ways to launch attention on pages, for `benchmarks.gpu` to time."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

from sixfold.kernels.attention import triton

STAGES, WARPS, PROGRAMS = (1, 2, 5, 7), (1, 2, 4), (2, 4, 8, 16)


def ways(quick: bool) -> list[dict[str, int]]:
    """Stages of the pipeline, warps of a program, and programs a multiprocessor."""
    names = "stages", "warps", "programs"
    each = ((2,), (2, 4), (4,)) if quick else (STAGES, WARPS, PROGRAMS)
    # What is compiled once serves every number of programs.
    return [dict(zip(names, way, strict=True)) for way in product(*each)]


@contextmanager
def launched(stages: int, warps: int, programs: int) -> Iterator[None]:
    """While it lasts attention is launched so."""
    options, usual = triton.launch_options, triton.PROGRAMS_PER_MULTIPROCESSOR
    triton.launch_options = lambda *_: {"num_warps": warps, "num_stages": stages}
    triton.PROGRAMS_PER_MULTIPROCESSOR = programs
    triton._programs.cache_clear()
    try:
        yield
    finally:
        triton.launch_options, triton.PROGRAMS_PER_MULTIPROCESSOR = options, usual
        triton._programs.cache_clear()
