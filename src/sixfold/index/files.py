"""An index in a file (docs/format.md, "An index")."""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from sixfold.arguments import MOST_SEED
from sixfold.errors import FormatError
from sixfold.index.code import BASIS_STEPS, BITS, MOST_DIM, MOST_FITTED, Group, VectorCode
from sixfold.index.ids import objects, repeated
from sixfold.index.lists import MOST_LISTS, centroid_code
from sixfold.index.metric import Metric, offset_dtype
from sixfold.index.rows import MOST_SUM
from sixfold.index.segment import LEARNED, Segment
from sixfold.index.state import MOST_SEGMENTS, State
from sixfold.io import DTYPE_NAMES, TensorSpec, open_container, write_container
from sixfold.packing import PAGE_TOKENS, decode_scale

KIND = "index"
LISTS = "lists."
# How far products of a basis's rows may be from 0 and 1.
ORTHONORMAL = 1e-5
# The square of twice the longest vector, and some.
MOST_OFFSET = 1e37
T = TypeVar("T")


def save_index(
    path: str | os.PathLike[str],
    state: State,
    kind: str = KIND,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write everything; see `Index.save`.

    Args:
        path: Where to.
        state: What to write.
        kind: What the file is, if it holds more than an index.
        beside: What more.
    """
    code = state.code
    tensors: dict[str, Tensor] = {} if code.basis is None else {"basis": code.basis}
    for number, segment in enumerate(state.segments):
        held = _tensors(segment, bool(state.strings))
        tensors |= {f"segments.{number}.{name}": x for name, x in held.items()}
    if state.lists is not None:
        held = _tensors(state.lists, strings=False)
        tensors |= {f"{LISTS}{name}": x for name, x in held.items()}
    description = {
        "dim": code.dim,
        "bits": code.bits,
        "metric": state.metric,
        "seed": code.seed,
        "next_id": state.next_id,
        "strings": state.strings,
        "groups": None if code.basis is None else [list(group) for group in code.groups],
        "used": [segment.used for segment in state.segments],
        "fitted": [segment.fitted for segment in state.segments],
        "lists": None if state.lists is None else state.lists.used,
    }
    write_container(path, kind, description, tensors | dict(beside))


def _tensors(segment: Segment, strings: bool) -> dict[str, Tensor]:
    pages = segment.pages
    held = {
        "mean": segment.mean,
        **_numbered("codes", [x[:pages] for x in segment.codes]),
        **_numbered("scales", [x[:pages] for x in segment.scales]),
        "offsets": segment.offsets[:pages],
        "allowed": torch.from_numpy(segment.allowed[:pages].view(np.uint8).copy()),
    }
    if segment.raw is not None:
        held["raw"] = segment.raw
    if segment.bounds is not None:
        held["bounds"] = torch.from_numpy(segment.bounds.astype(np.int64))
    ids = segment.ids[: segment.used]
    if not strings:
        return held | {"ids": torch.from_numpy(ids.copy())}
    texts = [text.encode() for text in ids]
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    letters = np.frombuffer(b"".join(texts), dtype=np.uint8).copy()
    return held | {"ids": torch.from_numpy(letters), "ids_end": torch.from_numpy(ends)}


def load_index(
    path: str | os.PathLike[str], mmap: bool, kind: str = KIND, beside: Sequence[str] = ()
) -> tuple[State, dict[str, Tensor]]:
    """Check a file, then read it; see `Index.load`.

    Args:
        path: Of the file.
        mmap: Whether to map codes.
        kind: What the file is.
        beside: Names of what it holds more: bytes, as many as there are.

    Returns:
        The index, and what is held beside it.
    """
    with open_container(path, kind) as container:
        described = container.description
        try:
            code, metric, used = _code(described), _metric(described), _used(described)
            strings = described["strings"]
            _check_numbers(described, used)
            lists = _lists(described)
            expected = _expected(code, metric, used, bool(strings), lists, container.specs)
            if described["groups"] is not None:
                expected["basis"] = TensorSpec((code.dim, code.dim), "F64")
            for name in beside:
                expected[name] = TensorSpec((container.specs[name].nbytes,), "U8")
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is damaged: it describes no index ({error}).") from error
        container.expect(expected)
        tensors = container.read(lambda name: mmap and ".codes" in name)
    try:
        code = _with_basis(code, tensors.get("basis"))
        segments = tuple(
            _segment(
                code,
                metric,
                count,
                bool(strings),
                _part(tensors, f"segments.{number}."),
                described["fitted"][number],
            )
            for number, count in enumerate(used)
        )
        centroids = None
        if lists is not None:
            centroids = _centroids(code, metric, lists, _part(tensors, LISTS))
        _check_ids(segments, described["next_id"])
        if len(segments) == MOST_SEGMENTS and segments[-1].bounds is not None:
            raise ValueError("no vectors could be added to it")
    except ValueError as error:
        raise FormatError(f"{path} is damaged: {error}.") from error
    state = State(code, metric, segments, None, None, described["next_id"], strings, centroids)
    # What is mapped is not written to: whatever is added is added to a copy.
    return state.closed() if mmap else state, {name: tensors[name] for name in beside}


def _metric(described: Mapping[str, Any]) -> Metric:
    metric = described["metric"]
    if metric not in get_args(Metric):
        raise ValueError(f"the metric is {metric!r}")
    found: Metric = metric
    return found


def _code(described: Mapping[str, Any]) -> VectorCode:
    """The code without its basis."""
    dim, bits, seed, groups = (described[name] for name in ("dim", "bits", "seed", "groups"))
    if type(dim) is not int or not 1 <= dim <= MOST_DIM:
        raise ValueError(f"dim is {dim!r}")
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits are {bits!r}")
    if type(seed) is not int or not 0 <= seed < MOST_SEED:
        raise ValueError(f"the seed is {seed!r}")
    if groups is None:
        return VectorCode.plain(dim, bits, seed)
    return VectorCode(dim, bits, seed, _groups(dim, groups))


def _used(described: Mapping[str, Any]) -> list[int]:
    used = described["used"]
    if not isinstance(used, list) or len(used) > MOST_SEGMENTS:
        raise ValueError("it has no list of segments")
    if not all(type(n) is int and 0 < n < 2**40 for n in used):
        raise ValueError("segments have no vectors, or too many")
    return used


def _check_numbers(described: Mapping[str, Any], used: Sequence[int]) -> None:
    next_id, strings, fitted = (described[name] for name in ("next_id", "strings", "fitted"))
    if type(next_id) is not int or not 0 <= next_id < 2**63:
        raise ValueError(f"next_id is {next_id!r}")
    if type(strings) is not bool if used else strings is not None:
        raise ValueError(f"strings is {strings!r}")
    numbers = isinstance(fitted, list) and len(fitted) == len(used)
    if not numbers or not all(type(n) is int and 0 < n <= LEARNED for n in fitted):
        raise ValueError("means are fitted to no number of vectors")


def _lists(described: Mapping[str, Any]) -> int | None:
    # Files of before there were lists do not speak of them.
    lists = described.get("lists")
    if lists is not None and (type(lists) is not int or not 1 <= lists <= MOST_LISTS):
        raise ValueError(f"lists is {lists!r}")
    return lists


def _expected(
    code: VectorCode,
    metric: Metric,
    used: Sequence[int],
    strings: bool,
    lists: int | None,
    found: Mapping[str, TensorSpec],
) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    if lists is not None:
        centroids = _vectors_of(centroid_code(code), metric, lists)
        specs |= {f"{LISTS}{name}": spec for name, spec in centroids.items()}
    for number, count in enumerate(used):
        own = _vectors_of(code, metric, count)
        if f"segments.{number}.raw" in found:
            own["raw"] = TensorSpec((count, code.dim), "F32")
        if lists is not None and f"segments.{number}.bounds" in found:
            own["bounds"] = TensorSpec((lists + 1,), "I64")
        if strings:
            letters = found.get(f"segments.{number}.ids")
            shape = letters.shape if letters is not None and len(letters.shape) == 1 else (0,)
            own |= {"ids": TensorSpec(shape, "U8"), "ids_end": TensorSpec((count,), "I64")}
        specs |= {f"segments.{number}.{name}": spec for name, spec in own.items()}
    return specs


def _vectors_of(code: VectorCode, metric: Metric, count: int) -> dict[str, TensorSpec]:
    pages = -(-count // PAGE_TOKENS)
    return {
        "mean": TensorSpec((code.dim,), "F32"),
        **_numbered("codes", [TensorSpec((pages, x.page_bytes), "U8") for x in code.coders]),
        **_numbered("scales", [TensorSpec((pages, PAGE_TOKENS), "F16") for _ in code.coders]),
        "offsets": TensorSpec((pages, PAGE_TOKENS), DTYPE_NAMES[offset_dtype(metric)]),
        "allowed": TensorSpec((8 * pages,), "U8"),
        "ids": TensorSpec((count,), "I64"),
    }


def _groups(dim: int, groups: Any) -> tuple[Group, ...]:
    if not isinstance(groups, list) or not all(
        isinstance(x, list) and len(x) == 2 and type(x[0]) is type(x[1]) is int for x in groups
    ):
        raise ValueError("groups are no pairs of numbers")
    found = tuple(Group(*x) for x in groups)
    falling = all(a.bits > b.bits for a, b in itertools.pairwise(found))
    known = all(x.width > 0 and x.bits in (0, *BITS) for x in found)
    if not falling or not known or sum(x.width for x in found) != dim or not found[0].bits:
        raise ValueError(f"groups are {groups!r}")
    if dim > MOST_FITTED:
        raise ValueError("it has groups of too many coordinates")
    return found


def _with_basis(code: VectorCode, basis: Tensor | None) -> VectorCode:
    if basis is None:
        return code
    if not torch.equal((basis * BASIS_STEPS).round() / BASIS_STEPS, basis):
        raise ValueError("its basis has entries of too many digits")
    exact = torch.eye(code.dim, dtype=torch.float64, device="cpu")
    if not bool(((basis @ basis.mT - exact).abs() <= ORTHONORMAL).all()):
        raise ValueError("its basis is not orthonormal")
    return dataclasses.replace(code, basis=basis)


def _numbered(name: str, each: Sequence[T]) -> dict[str, T]:
    """Members by the names that files give those of groups: one alone has no number."""
    if len(each) == 1:
        return {name: each[0]}
    return {f"{name}.{number}": x for number, x in enumerate(each)}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _centroids(code: VectorCode, metric: Metric, lists: int, held: Mapping[str, Tensor]) -> Segment:
    made = _segment(centroid_code(code), metric, lists, False, held, LEARNED)
    if made.live != lists or not np.array_equal(made.ids[:lists], np.arange(lists)):
        raise ValueError("its lists are not numbered")
    return made


def _bounds(bounds: Tensor | None, used: int) -> np.ndarray | None:
    if bounds is None:
        return None
    ends: np.ndarray = bounds.numpy().copy()
    if ends[0] != 0 or ends[-1] != used or bool((ends[1:] < ends[:-1]).any()):
        raise ValueError("lists do not follow each other")
    return ends


def _segment(
    code: VectorCode,
    metric: Metric,
    used: int,
    strings: bool,
    held: Mapping[str, Tensor],
    fitted: int,
) -> Segment:
    pages = len(held["offsets"])
    codes, scales = (
        tuple(held[key] for key in _numbered(name, code.coders)) for name in ("codes", "scales")
    )
    allowed = held["allowed"].numpy().view("<u8")
    last = used - PAGE_TOKENS * (pages - 1)
    if last < PAGE_TOKENS and int(allowed[-1]) >> last:
        raise ValueError("vectors count that were never added")
    live, raw = int(np.unpackbits(allowed.view(np.uint8)).sum()), held.get("raw")
    if not live:
        raise ValueError("a segment has no vectors")
    most = LEARNED if raw is None else min(2 * fitted, LEARNED)
    if (raw is None) != (fitted == LEARNED) or (raw is not None and used >= most):
        raise ValueError("a mean is fitted to another number of vectors")
    _check_vectors("mean", held["mean"][None], metric)
    _check_bounded("offsets", held["offsets"], MOST_OFFSET)
    if raw is not None:
        _check_vectors("raw", raw, metric)
    for x in map(decode_scale, scales):
        if not bool(((x >= 0) & x.isfinite()).all()):
            raise ValueError("scales are not finite, or negative")
    ids = np.empty(pages * PAGE_TOKENS, dtype=object if strings else np.int64)
    ids[:used] = _texts(held["ids"], held["ids_end"]) if strings else held["ids"].numpy()
    return Segment(
        code,
        metric,
        held["mean"],
        codes,
        scales,
        held["offsets"],
        ids,
        allowed,
        used,
        live,
        raw,
        fitted,
        _bounds(held.get("bounds"), used),
    )


def _texts(letters: Tensor, ends: Tensor) -> np.ndarray:
    text, stops = letters.numpy().tobytes(), ends.tolist()
    starts = [0, *stops[:-1]]
    if any(a > b for a, b in zip(starts, stops, strict=True)) or stops[-1] != len(text):
        raise ValueError("ids do not fit their text")
    # A UnicodeDecodeError is a ValueError.
    return objects((text[a:b].decode() for a, b in zip(starts, stops, strict=True)), len(stops))


def _check_ids(segments: Sequence[Segment], next_id: int) -> None:
    live = [segment.ids[segment.live_slots()] for segment in segments]
    if not live:
        return
    ids = np.concatenate(live)
    if repeated(ids):
        raise ValueError("two vectors have the same id")
    if len(ids) and ids.dtype != object and next_id < min(int(ids.max()) + 1, 2**63 - 1):
        raise ValueError("ids that are in use would be given again")


def _check_vectors(name: str, x: Tensor, metric: Metric) -> None:
    """What `Rows` let in, and `prepared` made of it."""
    # By length, which is the same in any basis.
    most = 1.0 if metric == "cosine" else MOST_SUM / x.shape[1] ** 0.5
    _check_bounded(name, torch.linalg.vector_norm(x.double(), dim=1), 1.01 * most)


def _check_bounded(name: str, x: Tensor, most: float) -> None:
    # Of NaN, false.
    if not bool((x.float().abs() <= most).all()):
        raise ValueError(f"{name} is not finite, or too large")
