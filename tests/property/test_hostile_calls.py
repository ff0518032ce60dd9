"""Whatever a public callable gets for an argument: an answer, or one kind of error; no crash."""

import contextlib
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import sixfold
from sixfold import KeyMaps, TurboQuantCache
from sixfold.cache import CachePolicy, CompressedLayer, LayerShape, StaticLayer
from sixfold.cache.accounting import cache_nbytes, uncompressed_nbytes
from sixfold.codebooks import centroids
from sixfold.errors import SixfoldError
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.kernels.attention import exact_attention
from sixfold.kernels.attention.dense import dense_attention
from sixfold.kernels.decode import decode
from sixfold.kernels.encode import encode
from sixfold.kernels.rotate import rotate
from sixfold.kernels.scores import scores
from sixfold.kernels.trellis import decode as decode_paths
from sixfold.kernels.trellis import encode as encode_paths
from sixfold.kernels.types import KeyMap
from sixfold.rotation import Rotation
from sixfold.trellis import codewords
from tests.layers import Shape, feed
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.usefixtures("unhooked"),
    pytest.mark.filterwarnings(
        "ignore:.*nested tensors is in prototype:UserWarning",
        "ignore:Sparse CSR tensor support:UserWarning",
        "ignore:Casting complex values:UserWarning",
    ),
]

DIM = 16
SHAPE = Shape()

SCALARS: list[Any] = [
    *(None, "4", "", b"4", True, -1, 0, 2, 3.5, 2**40, 2**70, -(2**70), 1j),
    *(math.nan, math.inf, -math.inf, np.int64(4), np.float32(2.5), np.bool_(True)),
    *([], [4], (4, 2), {}, {"a": 1}, {1}, object(), int, ..., slice(0, 2), lambda: 0),
    *(np.array(4), np.array([4, 2]), torch.float32, torch.device("cpu"), "nodevice:7", "cuda"),
    *(torch.tensor(4), torch.tensor(2.5), torch.tensor([4, 5]), torch.tensor(math.nan)),
    *(torch.tensor(4, device="meta"), torch.tensor([True, False]), torch.ones(2, 3).to_sparse()),
]


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def variants(x: Tensor) -> Iterator[Any]:
    """What somebody could pass for `x`: another type, dtype, layout, shape, or other numbers."""
    yield from (x.numpy(), x.tolist(), x.to("meta"), x[None], x.flatten()[0], freed(x))
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn)
    whole = (torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool, torch.complex64)
    yield from (x.to(dtype) for dtype in (*dtypes, *whole) if dtype is not x.dtype)
    yield from (x.to_sparse(), torch.nested.nested_tensor([x, x]), x.mT if x.ndim > 1 else x[::2])
    for axis in range(x.ndim):
        yield x.narrow(axis, 0, 0)
        yield x.narrow(axis, 0, x.shape[axis] // 2)
        yield torch.cat([x, x], axis)
    yield x[..., :1].expand(x.shape)
    if x.is_floating_point():
        yield from (torch.full_like(x, value) for value in (math.nan, math.inf, -1.0, 0.0))
        yield from (x.clone().requires_grad_(), torch.nn.Parameter(x.clone()))
        yield from (torch._neg_view(-x), torch._efficientzerotensor(x.shape, dtype=x.dtype))
        yield x.to(torch.complex64).conj().imag
    elif x.dtype is not torch.bool:
        limits = torch.iinfo(x.dtype)
        yield from (torch.full_like(x, value) for value in (limits.max, limits.min))


def attacks(good: Any) -> Iterator[Any]:
    yield from SCALARS
    if isinstance(good, Tensor):
        yield from variants(good)
    elif isinstance(good, tuple) and hasattr(good, "_fields"):
        for name, field in zip(good._fields, good, strict=True):
            if isinstance(field, Tensor):
                yield from (good._replace(**{name: x}) for x in variants(field))
            yield from (good._replace(**{name: x}) for x in SCALARS)


def check(
    call: Callable[..., object], arguments: dict[str, Any], values: Iterable[Any] | None = None
) -> None:
    """Every argument in turn gets every value of `attacks`, or these."""
    call(**arguments)
    wrong = []
    for name, good in arguments.items():
        for value in attacks(good) if values is None else values:
            try:
                call(**{**arguments, name: value})
            except SixfoldError:
                continue
            except Exception as error:
                if "can't allocate memory" in str(error):
                    # What does not fit into memory may fit into another machine's.
                    continue
                shown = f"{value.dtype} {value.layout}" if isinstance(value, Tensor) else f"{value}"
                wrong.append(f"{name}={shown[:60]}: {type(error).__name__}: {error}"[:200])
    assert not wrong, f"{len(wrong)} errors of another kind:\n" + "\n".join(wrong[:40])


# ---------------------------------------------------------------- quantizers

QUANTIZERS = {
    "TurboQuantMSE": {"bits": 4, "scale": "optimal", "rotation": "hadamard", "seed": 0},
    "TurboQuantProd": {"bits": 4, "projection": "orthogonal", "rotation": "hadamard", "seed": 0},
    "QJL": {"projections": 8, "projection": "orthogonal", "seed": 0},
    "PolarQuant": {"bits": (4, 2, 2, 2), "seed": 0},
    "OutlierSplit": {"outlier_channels": 4, "outlier_bits": 3, "bits": 2, "seed": 0},
    "TrellisQuantizer": {"bits": 2, "states": 256, "scale": "optimal", "seed": 0},
}
every_quantizer = pytest.mark.parametrize("kind", QUANTIZERS)


def vectors() -> Tensor:
    return torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(0))


@every_quantizer
def test_quantizers(kind: str) -> None:
    check(getattr(sixfold, kind), {"dim": DIM, **QUANTIZERS[kind]})


@every_quantizer
def test_vectors_and_codes(kind: str) -> None:
    quantizer, x = getattr(sixfold, kind)(dim=DIM, **QUANTIZERS[kind]), vectors()
    codes = quantizer.encode(x)
    check(lambda x: quantizer.decode(quantizer.encode(x)), {"x": x})
    check(quantizer.scores, {"queries": x, "codes": codes})
    check(quantizer.decode, {"codes": codes})
    check(lambda index: quantizer.decode(codes[index]), {"index": 0})
    check(lambda device: codes.to(device), {"device": "cpu"})


def test_outlier_channels() -> None:
    quantizer, x = sixfold.OutlierSplit(DIM, 4), vectors()
    check(quantizer.choose_channels, {"x": x})
    check(
        lambda x, channels: quantizer.decode(quantizer.encode(x, channels)),
        {"x": x, "channels": quantizer.choose_channels(x)},
    )


# ---------------------------------------------------------------- key maps


def test_key_maps(tmp_path: Path) -> None:
    mean, scale = torch.zeros(2, DIM), torch.ones(2, DIM)
    maps, pair = KeyMaps({0: (mean, scale)}), KeyMap(mean[None], scale[None])
    check(KeyMaps, {"layers": {0: (mean, scale)}})
    check(lambda **pair: KeyMaps({0: (pair["mean"], pair["scale"])}), named(maps))
    for number in filter(hashes, SCALARS):
        check(lambda layer: KeyMaps({layer: (mean, scale)}), {"layer": 0}, [number])
    check(KeyMaps.of, {"maps": {0: pair}})
    check(lambda key_map: KeyMaps.of({0: key_map}), {"key_map": pair})
    check(lambda layer: maps[layer], {"layer": 0})
    path = tmp_path / "maps"
    for call in (maps.save, KeyMaps.load):
        maps.save(path)
        check(guarded(call), {"path": path})


def named(maps: KeyMaps) -> dict[str, Tensor]:
    return dict(zip(("mean", "scale"), maps.layers[0], strict=True))


def guarded(call: Callable[..., object]) -> Callable[..., object]:
    """`call`, whose `path` may name no file: an `OSError` says so."""

    def run(path: Any) -> object:
        try:
            # Text that names a file would be written to wherever the test runs.
            return None if isinstance(path, str) else call(path)
        except OSError:
            return None

    return run


# ---------------------------------------------------------------- kernels


def kernel_calls() -> dict[str, tuple[Callable[..., object], dict[str, Any]]]:
    rotation, cpu = Rotation(DIM), torch.device("cpu")
    tables = {"turns": rotation.turns(cpu), "factor": rotation.factor(cpu)}
    coding = {**tables, "centroids": centroids(DIM, 4)}
    x = vectors()
    rows, scales = encode(x, **coding, bits=4, scale="optimal")
    paths = {**tables, "codewords": codewords(256, 2), "bits": 2}
    path_rows, path_scales = encode_paths(x, **paths, scale="optimal")
    query, keys, values = torch.randn(3, 1, 2, 5, DIM)
    exact = {"query": query, "keys": keys, "values": values, "scaling": 0.1}
    mask, positions = torch.ones(1, 1, 5, 5, dtype=torch.bool), torch.arange(5)
    return {
        "rotate": (rotate, {"x": x, **tables, "inverse": False}),
        "encode": (encode, {"x": x, **coding, "bits": 4, "scale": "optimal"}),
        "decode": (decode, {"rows": rows, "scales": scales, **coding, "dim": DIM, "bits": 4}),
        "scores": (
            scores,
            {
                "queries": x,
                "rows": rows,
                "scales": scales,
                "centroids": coding["centroids"],
                "bits": 4,
            },
        ),
        "encode paths": (encode_paths, {"x": x, **paths, "scale": "optimal"}),
        "decode paths": (
            decode_paths,
            {"rows": path_rows, "scales": path_scales, **paths, "dim": DIM},
        ),
        "exact attention": (
            exact_attention,
            {**exact, "mask": mask, "softcap": 3.0, "sink_logits": torch.zeros(2)},
        ),
        "dense attention": (
            dense_attention,
            {**exact, "positions": positions[None], "query_positions": positions[None]},
        ),
    }


KERNELS = kernel_calls()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpu":
        pytest.importorskip("sixfold._cpu")
        if "paths" in name:
            pytest.skip("there is one backend")
    monkeypatch.setenv("SIXFOLD_BACKEND", backend)
    check(*KERNELS[name])


def test_what_was_refused_leaves_no_trace() -> None:
    """Tables are remembered by numbers, and NumPy's are equal to Python's."""
    x, width = torch.ones(2, 40), np.float32(2.5)
    tables = {"turns": Rotation(40).turns(x.device), "factor": Rotation(40).factor(x.device)}
    book = centroids(40, 2.5)
    with contextlib.suppress(SixfoldError):
        encode(x, **tables, centroids=book, bits=width, scale="optimal")
    shape = Shape(key_dim=40, value_dim=40)
    layer = shape.layer(CachePolicy(key_bits=2.5, value_bits=2.5, recent_window=0))
    assert feed(layer, shape.tokens(200)).isfinite().all()


# ---------------------------------------------------------------- layers


def test_policies_and_sizes() -> None:
    check(CachePolicy, CachePolicy().to_dict())
    check(CachePolicy.spending, {"bits": 3, "dims": [(64, 64)]})
    shape = {"kv_heads": 2, "key_dim": 64, "value_dim": 64, "sliding_window": 100}
    for count in (cache_nbytes, uncompressed_nbytes):
        made = LayerShape(**shape, policy=CachePolicy())
        check(count, {"shapes": [made], "tokens": 300, "batch": 1, "element_size": 2})
        check(
            lambda count=count, **fields: count([LayerShape(**fields)], tokens=300),
            {**shape, "policy": CachePolicy()},
        )


def test_layers() -> None:
    layer, new = SHAPE.layer(), SHAPE.tokens(1)
    feed(layer, SHAPE.tokens(150))
    query, keys, values = new
    like = {"keys": keys, "values": values, "policy": CachePolicy(), "sliding_window": 100}

    def step(query: Any, keys: Any, values: Any, **options: Any) -> Tensor:
        fork = layer.fork()
        fork.append(keys, values)
        return fork.attend(query, **options)

    check(
        lambda keys, values, **rest: CompressedLayer(keys, values, **rest).append(keys, values),
        like,
    )
    tokens = {"query": query, "keys": keys, "values": values}
    mask = torch.ones(keys.shape[0], 1, 1, 151, dtype=torch.bool)
    heads = torch.zeros(query.shape[1])
    check(step, {**tokens, "scaling": 0.1, "softcap": 3.0, "mask": mask, "sink_logits": heads})
    for method in (CompressedLayer.crop, CompressedLayer.take_back):
        check(lambda n, method=method: method(layer.fork(), n), {"n": 1})
    check(lambda rows: layer.fork().select(rows), {"rows": torch.tensor([1, 0])})
    check(lambda device: layer.fork().to(device), {"device": torch.device("cpu")})
    check(lambda n: StaticLayer(layer, n), {"n": 300})


# ---------------------------------------------------------------- the cache of transformers


@pytest.fixture(scope="module")
def filled() -> TurboQuantCache:
    cache = TurboQuantCache.for_model(tiny_model(), 4, fit_tokens=0)
    with torch.no_grad():
        tiny_model()(prompt(), **cache_argument(cache), use_cache=True)
    return cache


def prompt() -> Tensor:
    return torch.randint(2, 384, (2, 150), generator=torch.Generator().manual_seed(0))


def shapes(cache: TurboQuantCache) -> list[tuple[int, ...]]:
    stores = [layer.store for layer in cache.compressed_layers]
    return [(x.length, x.window.tokens, *x.padding.shape) if x else () for x in stores]


def unchanged(cache: TurboQuantCache, method: str) -> Callable[..., object]:
    """`method` of a fork of `cache`, which an error must leave as it was."""

    def run(**arguments: Any) -> object:
        fork = cache.fork()
        try:
            return getattr(fork, method)(**arguments)
        except Exception:
            assert shapes(fork) == shapes(cache), f"{method} has failed on the way"
            raise

    return run


def method_calls() -> dict[str, dict[str, Any]]:
    token, rows = torch.ones(2, 2, 1, 32), torch.tensor([1, 0])
    return {
        "update": {"key_states": token, "value_states": token, "layer_idx": 0},
        "update_conv_state": {"conv_states": token, "layer_idx": 0, "state_idx": 0},
        "update_recurrent_state": {"recurrent_states": token, "layer_idx": 0, "state_idx": 0},
        "crop": {"tokens_to_remove": -1},
        "reorder_cache": {"beam_idx": rows},
        "batch_select_indices": {"indices": rows},
        "batch_repeat_interleave": {"repeats": 2},
        "static": {"max_tokens": 300},
        "to": {"device": "cpu", "dtype": torch.bfloat16},
        "__getitem__": {"layer": 0},
        "get_seq_length": {"layer_idx": 0},
        "get_mask_sizes": {"query_length": 1, "layer_idx": 0},
        "get_max_length": {"layer_idx": 0},
    }


METHODS = method_calls()


@pytest.mark.parametrize("held", ["nothing", "tokens"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_of_the_cache(name: str, held: str, filled: TurboQuantCache) -> None:
    cache = filled if held == "tokens" else TurboQuantCache.for_model(tiny_model())
    if name == "static" and held == "nothing":
        pytest.skip("there is nothing that could be static")
    call = unchanged(cache, name)
    if name.endswith("state"):
        # A cache of attention layers has no states: every call is refused.
        with pytest.raises(SixfoldError, match="has no"):
            call(**METHODS[name])
        call = expected_to_fail(call)
    check(call, METHODS[name])


def expected_to_fail(call: Callable[..., object]) -> Callable[..., object]:
    def run(**arguments: Any) -> None:
        with pytest.raises(SixfoldError):
            call(**arguments)

    return run


def test_new_caches() -> None:
    model, options = tiny_model(), {"skip_layers": (0,), "per_layer": {0: {"key_bits": 8}}}
    policy = {**CachePolicy().to_dict(), **options, "bits": 4, "key_map": None}
    check(lambda **given: TurboQuantCache.for_model(model, **given), policy)
    check(TurboQuantCache.for_model, {"model": model})
    check(TurboQuantCache, {"config": model.config})
    named = filter(hashes, SCALARS)
    nested = [y for x in SCALARS for y in ({0: x}, {0: {"key_bits": x}})]
    nested += [y for x in named for y in ({x: {}}, {0: {x: 4}})]
    check(
        lambda per_layer: TurboQuantCache(model.config, per_layer=per_layer),
        {"per_layer": {0: {}}},
        nested,
    )
    check(
        lambda skip: TurboQuantCache(model.config, skip_layers=skip),
        {"skip": [0]},
        [[x] for x in SCALARS],
    )


def hashes(value: Any) -> bool:
    return isinstance(value, Hashable) and type(value) is not slice


def test_caches_from_others(tmp_path: Path, filled: TurboQuantCache) -> None:
    model = tiny_model()
    source = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(), **cache_argument(source), use_cache=True)
    mask = torch.ones(2, 150, dtype=torch.int64)
    check(
        TurboQuantCache.from_cache,
        {"source": source, "model": model, "bits": 4, "attention_mask": mask},
    )
    for name in ("keys", "values"):
        check(
            lambda held, name=name: from_changed(source, name, held),
            {"held": getattr(source.layers[0], name)},
        )
    path = tmp_path / "cache"
    check(guarded(filled.save), {"path": path})
    check(guarded(lambda path: TurboQuantCache.load(path, model)), {"path": path})
    check(
        lambda **given: TurboQuantCache.load(path, **given),
        {"model": model, "check_weights": True, "key_map": filled.key_maps()},
    )


def from_changed(source: DynamicCache, name: str, value: Any) -> TurboQuantCache:
    """A cache from one whose first layer holds `value`."""
    layer = source.layers[0]
    kept = getattr(layer, name)
    try:
        setattr(layer, name, value)
        return TurboQuantCache.from_cache(source, tiny_model())
    finally:
        setattr(layer, name, kept)


@pytest.mark.parametrize(
    "quantizer",
    [sixfold.TurboQuantMSE(64, 4), sixfold.TurboQuantProd(64, 4), sixfold.PolarQuant(64)],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_tensors_that_stand_for_others_are_refused(quantizer: Any) -> None:
    """As torch.vmap and torch.func make them: they have no memory of their own."""
    x = torch.randn(3, 5, 64)
    for transformed in (
        lambda: torch.vmap(quantizer.encode)(x),
        lambda: torch.func.grad(lambda y: quantizer.decode(quantizer.encode(y)).sum())(x),
    ):
        with pytest.raises(SixfoldError, match=r"inside torch\.vmap"):
            transformed()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_derivatives_in_forward_mode_are_refused() -> None:
    """Codes have none: what was passed on would lack their part, without a word."""
    x, tangent = torch.randn(2, 2, 200, 64), torch.ones(2, 2, 200, 64)
    layer = CompressedLayer(x, x, CachePolicy(key_bits=4, value_bits=4))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        for call in (
            lambda: sixfold.TurboQuantMSE(64, 4).encode(dual),
            lambda: layer.append(dual, x),
            lambda: layer.append(x, dual),
        ):
            with pytest.raises(SixfoldError, match="derivative in forward mode"):
                call()
        # Nothing was added; and what has no derivative is taken.
        layer.append(x, x)
        layer.attend(x[:, :, :1], scaling=1.0)
        layer.compress(now=True)
        for holder in (layer, StaticLayer(layer, 300)):
            columns = 200 if holder is layer else 300
            mask = torch.autograd.forward_ad.make_dual(
                torch.zeros(2, 1, 1, columns), torch.ones(2, 1, 1, columns)
            )
            for query, options in (
                (dual[:, :, :1], {}),
                (x[:, :, :1], {"mask": mask}),
                (x[:, :, :1], {"sink_logits": dual[0, :, 0, 0]}),
            ):
                with pytest.raises(SixfoldError, match="derivative in forward mode"):
                    holder.attend(query, scaling=1.0, **options)
    assert layer.held == 200
