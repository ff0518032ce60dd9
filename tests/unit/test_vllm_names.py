"""What users of vLLM type, without vLLM: any code, and blocks of the same size."""

from typing import get_args

import pytest

from sixfold.cache.code import page_code
from sixfold.cache.engine import page_nbytes
from sixfold.integrations.vllm.names import WIDTHS, Options, policy, token_nbytes
from sixfold.kernels.types import CodeName
from sixfold.packing import PAGE_TOKENS, Bits


def test_a_code_is_chosen() -> None:
    assert Options.read({"sixfold": {"code": "trellis"}}) == Options(code="trellis")


@pytest.mark.parametrize("dims", [(n, n) for n in range(8, 257, 8)] + [(192, 128), (128, 64)])
@pytest.mark.parametrize("bits", WIDTHS.values())
def test_no_code_changes_the_size_of_a_block(bits: Bits, dims: tuple[int, int]) -> None:
    """vLLM asks a backend for it before there are options."""
    for code in get_args(CodeName):
        pages = page_code(policy(bits, *dims, code=code), *dims)
        assert page_nbytes(pages) == token_nbytes(bits, *dims) * PAGE_TOKENS


def test_a_trellis_is_one() -> None:
    pages = page_code(policy(4, 64, 64, code="trellis"), 64, 64)
    assert (pages.keys.code, pages.values.code) == ("trellis", "trellis")
