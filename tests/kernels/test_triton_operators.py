"""Triton's launchers as operators: well formed, traced whole, and never waiting for the device."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)

from sixfold import TurboQuantMSE
from sixfold.cache import CachePolicy
from sixfold.cache.static import StaticLayer
from sixfold.kernels._triton import together
from sixfold.kernels.decode import triton as decode_triton
from sixfold.kernels.encode import reference as encode_reference
from sixfold.kernels.encode import triton as encode_triton
from sixfold.kernels.rotate import triton as rotate_triton
from sixfold.kernels.scores import triton as scores_triton
from sixfold.kernels.types import CodeName, Coding, KeyMap, Pool
from sixfold.packing import Bits
from tests.kernels.test_attention_layers_triton import NoKernel
from tests.kernels.vector_cases import (
    SLOTS,
    assert_same_codes,
    coding_of,
    maps_of,
    paged_vectors,
    pages_of,
    tables,
)
from tests.layers import Shape, feed
from tests.vectors import gaussian

OPERATORS = torch.ops.sixfold
DIM, BITS = 32, 3
# The others take seconds each.
FAST = ("rotate", "encode_pages")

Stored = tuple[Tensor, Tensor, Tensor, Pool, Coding, Coding, KeyMap]


def stored_pages(
    key_bits: Bits = 4, value_bits: Bits = 2.5, dim: int = DIM, value_dim: int | None = None
) -> Stored:
    """Arguments of `store_pages`."""
    value_dim = value_dim or dim
    return (
        paged_vectors(dim, torch.bfloat16),
        paged_vectors(value_dim, torch.bfloat16),
        SLOTS,
        Pool(*pages_of(dim, key_bits), *pages_of(value_dim, value_bits)),
        coding_of(dim, key_bits, "unbiased"),
        coding_of(value_dim, value_bits),
        KeyMap(*maps_of(dim)),
    )


def assert_same_pool(ours: Pool, theirs: Pool) -> None:
    assert_same_codes(ours[:2], theirs[:2])
    assert_same_codes(ours[2:], theirs[2:])


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator but that of attention, which has a test of its own."""
    arrays = tables(DIM, BITS)
    x, (pages, scales) = gaussian(512, DIM, seed=3).view(2, 2, 128, DIM), pages_of(DIM, BITS)
    rows, stored = encode_reference.encode(x, *arrays, bits=BITS, scale="optimal")
    keys, values, _, pool, key_coding, value_coding, key_map = stored_pages()
    return {
        "rotate": (x, *arrays[:2], True),
        "encode": (x, *arrays, 3.0, "optimal"),
        "encode_pages": (x, None, None, *arrays, pages, scales, SLOTS, 3.0, "norm", "value"),
        "store_pages": (
            *(keys, values, *key_map[:2], *key_coding[:3], *value_coding[:3], *pool, SLOTS),
            *(float(key_coding.bits), key_coding.scale),
            *(float(value_coding.bits), value_coding.scale),
        ),
        "decode": (rows, stored, *arrays, DIM, 3.0),
        "decode_pages": (
            *(pages, scales, SLOTS, *maps_of(DIM), *arrays),
            *(DIM, 3.0, "codebook", "key", torch.bfloat16, False),
        ),
        "scores": (x, rows, stored, arrays[2], 3.0),
    }


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in calls()],
)
def test_operators_are_well_formed(name: str) -> None:
    torch.library.opcheck(getattr(OPERATORS, name).default, calls()[name])


KERNELS = {
    "rotate": (rotate_triton, "rotate_kernel"),
    "encode": (encode_triton, "encode_kernel"),
    "encode_pages": (encode_triton, "encode_pages_kernel"),
    "store_pages": (together, "store_pages_kernel"),
    "decode": (decode_triton, "decode_kernel"),
    "decode_pages": (decode_triton, "decode_pages_kernel"),
    "scores": (scores_triton, "scores_kernel"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_launchers_ask_no_tensor_for_its_content(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a synchronisation")

    kernel, arguments = NoKernel(), calls()[name]
    monkeypatch.setattr(*KERNELS[name], kernel)
    for what in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, what, refuse)
    getattr(OPERATORS, name).default(*arguments)
    assert kernel.launches == 1


@pytest.mark.parametrize(
    ("options", "launches"),
    [
        ({}, 1),
        ({"dim": 33, "key_bits": 3.5, "value_bits": 3}, 1),
        ({"dim": 32, "value_dim": 64, "value_bits": 4}, 2),
    ],
    ids=str,
)
def test_keys_and_values_are_stored_at_once(
    options: dict[str, Any], launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    expected, got = stored_pages(**options), stored_pages(**options)
    encode_reference.store_pages(*expected)
    encode_triton.store_pages(*got)
    assert_same_pool(got[3], expected[3])
    kernel = NoKernel()
    monkeypatch.setattr(together, "store_pages_kernel", kernel)
    monkeypatch.setattr(encode_triton, "encode_pages_kernel", kernel)
    encode_triton.store_pages(*got)
    assert kernel.launches == launches


def test_wide_values_are_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    keys, values, *doubled = stored_pages()
    *_, expected, _, _, _ = stored_pages()
    wide, rest = (keys.double(), values.double(), SLOTS), doubled[2:]
    encode_triton.store_pages(*wide, doubled[1], *rest)
    encode_reference.store_pages(*wide, expected, *rest)
    assert_same_pool(doubled[1], expected)


def quantized(bits: Bits) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Everything a quantizer does."""
    quantizer = TurboQuantMSE(DIM, bits)

    def work(x: Tensor) -> tuple[Tensor, ...]:
        codes = quantizer.encode(2 * x)
        scores = quantizer.scores(x[:3], codes)
        return codes.packed, codes.scales, quantizer.decode(codes), scores

    return work


def check_quantizers_compile() -> None:
    """To be run without shape checks: encode, decode and scores of a quantizer in one graph."""
    x = gaussian(40, DIM, seed=1)
    for bits in (4, 2.5):
        work = quantized(bits)
        expected = work(x)
        # Code that has met other numbers is traced with variable ones, which choose no tables.
        torch.compiler.reset()
        found = torch.compile(work, fullgraph=True, backend="aot_eager")(x)
        assert all(map(torch.equal, found, expected))


@torch.no_grad()
def check_static_layer_compiles(code: CodeName = "codebook") -> None:
    """To be run without shape checks: a layer's steps, one of which completes a page."""
    shape, policy = Shape(1, 1, 2, DIM, DIM), CachePolicy(recent_window=4, code=code)
    growing = shape.layer(policy)
    feed(growing, shape.tokens(64 + 64 + 2))
    static = StaticLayer(growing, max_tokens=200)
    held = int(static.pages)

    def step(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        static.append(keys, values)
        return static.attend(query, scaling=shape.scaling)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for seed in range(4):
        tokens = shape.tokens(1, seed)
        # Operands of 11 bits, and sums over other splits.
        torch.testing.assert_close(compiled(*tokens), feed(growing, tokens), rtol=3e-3, atol=3e-3)
    assert int(static.pages) == held + 1


@pytest.mark.slow
def test_what_users_call_compiles_in_one_graph() -> None:
    # A process of its own: shape checks and what torch compiles do not mix.
    code = (
        "from tests.kernels import test_triton_operators as t;"
        "t.check_quantizers_compile(); t.check_static_layer_compiles();"
        "t.torch.compiler.reset(); t.check_static_layer_compiles('trellis')"
    )
    changes = {"JAXTYPING_DISABLE": "1", "SIXFOLD_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | changes,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
