"""What of the vector kernels is compiled where there is no GPU: launches as a GPU would see them.

Import it where TRITON_INTERPRET is not set: interpreted functions cannot be compiled.
"""

from typing import Any, NamedTuple

import torch

from sixfold.cache.policy import SPLITS
from sixfold.codebooks import centroids
from sixfold.kernels._groups import half_bits
from sixfold.kernels._triton import launch
from sixfold.kernels._triton.decode import decode_kernel, decode_pages_kernel
from sixfold.kernels._triton.encode import encode_kernel, encode_pages_kernel
from sixfold.kernels._triton.encode_paths import path_vectors_kernel
from sixfold.kernels._triton.path_pages import search_constants
from sixfold.kernels._triton.search import search_kernel
from sixfold.kernels._triton.store import store_pages_kernel
from sixfold.kernels.encode import Scale
from sixfold.kernels.rotate.triton import rotate_kernel
from sixfold.kernels.scores.triton import constants as scores_constants
from sixfold.kernels.scores.triton import scores_kernel
from sixfold.kernels.scores.triton import warps as scores_warps
from sixfold.kernels.trellis.grid import grid_sizes
from sixfold.kernels.types import CodeName
from sixfold.packing import BITS, Bits, Layout
from sixfold.rotation import Rotation, RotationKind
from sixfold.trellis import PAGE_BITS, PAGE_STATES, codewords

_CPU = torch.device("cpu")
# Head dimensions in use, every class of rotation, and large vectors of a search index: those that
# are no powers of two are encoded by plain PyTorch.
HEAD_DIMS = (64, 128, 256)
OTHER_DIMS = (32, 33, 80, 96, 100, 200)
LARGE_DIMS = (576, 1024, 1536)
# Widths that a cache is likely to have.
WIDTHS: tuple[Bits, ...] = (2, 2.5, 3, 3.5, 4)


class Variant(NamedTuple):
    """One specialisation of a kernel; `types` names every argument that is no constant."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool = False
    # Whether products must not be fused into sums.
    exact: bool = True


_TABLES = {"turns": "*fp32", "factor": "*fp32", "centroids": "*fp32"}
_SYMBOLS = ("SYMBOL", "PAIRED")
_PAGE_STRIDES = {name: "i32" for name in ("page_slot", "page_head", "scale_slot", "scale_head")}


def _rotation(dim: int, kind: RotationKind) -> dict[str, Any]:
    rotation = Rotation(dim, kind)
    return launch.rotation(dim, rotation.turns(_CPU), rotation.factor(_CPU))


def _code(dim: int, bits: Bits, kind: RotationKind, code: CodeName = "codebook") -> dict[str, Any]:
    paths = code == "trellis"
    book = codewords(PAGE_STATES, bits) if paths else centroids(dim, bits)
    return _rotation(dim, kind) | launch.codebook(dim, bits, book, code)


def _variant(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], least: int = 1
) -> Variant:
    tile = launch.tile(constants, least)
    constants = constants | {"N": tile["N"]}
    return Variant(name, kernel, types, constants, tile["num_warps"], 3)


def rotate(dim: int, inverse: bool = False, kind: RotationKind = "hadamard") -> Variant:
    """`rotate_kernel` on float32 vectors."""
    types = {"x": "*fp32", "turns": "*fp32", "factor": "*fp32", "out": "*fp32", "count": "i32"}
    constants = _rotation(dim, kind)
    constants |= {"SHRINK": launch.shrink(constants), "INVERSE": inverse}
    direction = ", inverse" * inverse
    name = f"rotate dim {dim}{', dense' * (constants['ROUNDS'] == 0)}{direction}"
    return _variant(name, rotate_kernel, types, constants)


def encode(dim: int, bits: Bits, scale: Scale = "optimal") -> Variant:
    """`encode_kernel` on float32 vectors."""
    types = {"x": "*fp32", **_TABLES, "rows": "*i32", "scales": "*fp16", "count": "i32"}
    constants = _code(dim, bits, "hadamard")
    constants |= {"STRETCH": launch.stretch(constants), "SCALE": scale}
    return _variant(f"encode {bits:g} bits, dim {dim}", encode_kernel, types, constants)


def encode_pages(dim: int, bits: Bits, layout: Layout) -> Variant:
    """`encode_pages_kernel` as a cache stores bfloat16 keys or values."""
    keys = layout == "key"
    types = {
        "x": "*bf16",
        **({"mean": "*fp32", "channel_scale": "*fp32"} if keys else {}),
        **_TABLES,
        "pages": "*i32",
        "scales": "*fp16",
        "slots": "*i64",
        **{name: "i32" for name in ("n_pages", "heads", "x_batch", "x_head", "x_token")},
        **_PAGE_STRIDES,
    }
    constants = _code(dim, bits, "hadamard")
    constants |= {
        "STRETCH": launch.stretch(constants),
        "SCALE": "unbiased" if keys else "optimal",
        "LAYOUT": layout,
        "HAS_MEAN": keys,
        "HAS_SCALE": keys,
        # What Triton makes of a stride of one by itself.
        "x_channel": 1,
        **({} if keys else {"mean": None, "channel_scale": None}),
    }
    name = f"encode_pages {bits:g} bits, dim {dim}, {layout}"
    return _variant(name, encode_pages_kernel, types, constants, least=4)


def store_pages(dim: int, key_bits: Bits, value_bits: Bits) -> Variant:
    """`store_pages_kernel` as a cache stores bfloat16 keys and values."""
    sides = ("key", "value")
    types = {"keys": "*bf16", "values": "*bf16", "mean": "*fp32", "channel_scale": "*fp32"}
    for side in sides:
        types |= {f"{side}_{name}": kind for name, kind in _TABLES.items()}
    for side in sides:
        types |= {f"{side}_pages": "*i32", f"{side}_scales": "*fp16"}
    types |= {"slots": "*i64", "n_pages": "i32", "heads": "i32"}
    types |= {f"{side}_{axis}": "i32" for side in sides for axis in ("batch", "head", "token")}
    types |= {f"{side}_{stride}": "i32" for side in sides for stride in _PAGE_STRIDES}
    constants = _rotation(dim, "hadamard")
    constants |= {"STRETCH": launch.stretch(constants), "HAS_MEAN": True, "HAS_SCALE": True}
    for side, bits, scale in zip(
        sides, (key_bits, value_bits), ("unbiased", "optimal"), strict=True
    ):
        code = launch.codebook(dim, bits, centroids(dim, bits))
        constants |= {f"{side.upper()}_{name}": value for name, value in code.items()}
        constants |= {f"{side.upper()}_SCALE": scale, f"{side}_channel": 1}
    name = f"store_pages {key_bits:g} and {value_bits:g} bits, dim {dim}"
    return _variant(name, store_pages_kernel, types, constants, least=4)


def path_vectors(dim: int, bits: Bits, layout: Layout, searched: bool) -> Variant:
    """`path_vectors_kernel` before or after the search of bfloat16 keys or values."""
    variant, sizes = encode_pages(dim, bits, layout), grid_sizes(bits)
    types = variant.types | {"places": "*i16", "words": "*i16", "pages": "*u8", "first": "i32"}
    types["book"] = types.pop("centroids")
    constants = {name: x for name, x in variant.constants.items() if name not in _SYMBOLS}
    constants |= {
        "SEARCHED": searched,
        "UNIT": sizes.unit,
        "INTERVALS": sizes.intervals,
        "LARGEST": sizes.largest,
        "HALF_BITS": half_bits(bits, "trellis"),
    }
    name = f"path_vectors {'scales' if searched else 'places'}, {bits:g} bits, dim {dim}, {layout}"
    return variant._replace(name=name, kernel=path_vectors_kernel, types=types, constants=constants)


def search(dim: int, bits: Bits, layout: Layout) -> Variant:
    """`search_kernel`, in whole numbers alone."""
    constants = search_constants(dim, bits, layout)
    types = {"places": "*i16", "words": "*i16"}
    types |= {"history": "*u8" if constants["MOST"] == 0xFF else "*i16", "pages": "*u8"}
    types |= {"slots": "*i64", "first": "i32"}
    types |= {name: "i32" for name in ("page_slot", "page_head", "heads")}
    name = f"search {bits:g} bits, dim {dim}, {layout}"
    return Variant(name, search_kernel, types, constants, 1, 1)


def decode(dim: int, bits: Bits) -> Variant:
    """`decode_kernel`."""
    types = {"rows": "*u8", "scales": "*fp16", **_TABLES, "out": "*fp32", "count": "i32"}
    constants = _code(dim, bits, "hadamard")
    constants |= {"SHRINK": launch.shrink(constants)}
    return _variant(f"decode {bits:g} bits, dim {dim}", decode_kernel, types, constants)


def decode_pages(
    dim: int,
    bits: Bits,
    layout: Layout,
    rotated: bool = False,
    code: CodeName = "codebook",
) -> Variant:
    """`decode_pages_kernel` to bfloat16."""
    keys = layout == "key" and not rotated
    types = {
        "pages": "*u8",
        "scales": "*fp16",
        "slots": "*i64",
        **({"mean": "*fp32", "channel_scale": "*fp32"} if keys else {}),
        **_TABLES,
        "out": "*fp32" if rotated else "*bf16",
        "n_pages": "i32",
        "heads": "i32",
        **_PAGE_STRIDES,
    }
    constants = _code(dim, bits, "hadamard", code)
    constants |= {
        "SHRINK": launch.shrink(constants),
        "HALF_BITS": half_bits(bits, code),
        "LAYOUT": layout,
        "ROTATED": rotated,
        "HAS_MEAN": keys,
        "HAS_SCALE": keys,
        **({} if keys else {"mean": None, "channel_scale": None}),
    }
    kind = "trellis " * (code == "trellis")
    name = f"decode_pages {kind}{bits:g} bits, dim {dim}, {layout}{', rotated' * rotated}"
    return _variant(name, decode_pages_kernel, types, constants)


def scores(dim: int, bits: Bits, queries: int = 16) -> Variant:
    """`scores_kernel`; sums in any order."""
    types = {"queries": "*fp32", "rows": "*u8", "scales": "*fp16", "centroids": "*fp32"}
    types |= {"products": "*fp32", "n_queries": "i32", "n": "i32"}
    constants = scores_constants(dim, bits, queries)
    constants |= launch.codebook(dim, bits, centroids(dim, bits))
    name = f"scores {bits:g} bits, dim {dim}, {constants['QUERIES']} queries"
    options = (scores_warps(constants), 2)
    return Variant(name, scores_kernel, types, constants, *options, tensor_cores=True, exact=False)


def representative() -> list[Variant]:
    """One variant a kernel and way of working: what every change compiles."""
    return [
        rotate(128),
        rotate(80, inverse=True),
        rotate(33),
        store_pages(128, 4, 2.5),
        encode_pages(96, 3, "value"),
        path_vectors(128, 2.5, "key", searched=False),
        path_vectors(128, 2.5, "key", searched=True),
        search(128, 2.5, "key"),
        decode(128, 4),
        decode_pages(128, 3, "key"),
        scores(128, 4),
    ]


def variants() -> list[Variant]:
    """Everything that is promised to compile: every width, every dimension, not all of both."""
    layouts: tuple[Layout, ...] = ("key", "value")
    dims = (*HEAD_DIMS, *OTHER_DIMS, *LARGE_DIMS)
    codes = [(128, bits) for bits in BITS]
    codes += [(dim, bits) for dim in HEAD_DIMS if dim != 128 for bits in WIDTHS]
    return [
        *(rotate(dim, inverse) for dim in dims for inverse in (False, True)),
        rotate(128, kind="orthogonal"),
        *(encode(dim, 4) for dim in (*HEAD_DIMS, *OTHER_DIMS, 1024)),
        *(encode(128, bits) for bits in BITS if bits != 4),
        *(store_pages(dim, bits, bits) for dim, bits in codes),
        *(store_pages(128, *bits) for bits in ((4, 2.5), *SPLITS["codebook"].values())),
        *(store_pages(dim, 4, 2) for dim in OTHER_DIMS),
        # Keys and values of different dimensions.
        *(encode_pages(dim, 4, layout) for dim in HEAD_DIMS for layout in layouts),
        *(encode_pages(dim, bits, "key") for dim in OTHER_DIMS for bits in (3, 3.5)),
        *(
            path_vectors(dim, bits, layout, searched)
            for dim, bits, layout in (
                *((dim, 4, "key") for dim in (*HEAD_DIMS, 32, 80, 96, 200)),
                *((128, bits, "value") for bits in PAGE_BITS),
            )
            for searched in (False, True)
        ),
        *(search(128, bits, layout) for bits in PAGE_BITS for layout in layouts),
        *(search(dim, 2, "key") for dim in (64, 80, 256)),
        *(decode(dim, 4) for dim in dims),
        *(decode_pages(128, bits, "value") for bits in BITS),
        *(decode_pages(dim, 4, "key") for dim in (*HEAD_DIMS, *OTHER_DIMS)),
        decode_pages(128, 4, "key", rotated=True),
        *(decode_pages(128, bits, "value", code="trellis") for bits in PAGE_BITS),
        *(decode_pages(dim, 4, "key", code="trellis") for dim in (*HEAD_DIMS, 80, 96)),
        decode_pages(128, 2.5, "key", rotated=True, code="trellis"),
        *(scores(128, bits) for bits in BITS),
        *(scores(dim, 4, queries=64) for dim in dims),
    ]
