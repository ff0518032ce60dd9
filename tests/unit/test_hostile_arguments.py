"""Whatever is passed, there is one kind of error, and nothing has changed when it is raised."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sixfold
from sixfold.cache import CachePolicy, CompressedLayer, StaticLayer
from sixfold.codebooks import centroids, expected_mse, lloyd_max, polar_angles
from sixfold.errors import SixfoldError
from sixfold.io import open_container, write_container
from sixfold.kernels.attention import exact_attention
from sixfold.kernels.decode import decode
from sixfold.kernels.encode import encode
from sixfold.kernels.rotate import rotate
from sixfold.kernels.scores import scores
from sixfold.rotation import Rotation
from tests.layers import Shape, feed

pytestmark = [
    pytest.mark.usefixtures("unhooked"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning"),
]

DIM = 16
SHAPE = Shape()
NO_NUMBERS: list[Any] = [
    *(None, "4", "", b"4", True, np.bool_(True), 2.5000001, math.nan, math.inf, 1j, 2**70, 10**400),
    *([4, 5], {}, {1}, object(), torch.tensor([4, 5]), np.array([4, 2]), torch.tensor(math.nan)),
    *(torch.tensor(4, device="meta"), torch.tensor(True)),
]
NO_WORDS: list[Any] = [None, "best", 1, True, [], {}, np.array(["norm", "optimal"]), object()]


def shown(value: object) -> str:
    """In a test's name, which may not depend on where an object lies."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"{value.bit_length()} bits"
    return "object" if type(value) is object else str(value)[:30]


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


NO_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda _: None,
    "text": lambda _: "x",
    "number": lambda _: 1.0,
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
    "integers": lambda x: x.long(),
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "no axis": lambda _: torch.tensor(1.0),
    "wider": lambda x: torch.cat([x, x[..., :1]], -1),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "mkldnn": lambda x: x.to_mkldnn(),
    "freed": freed,
}


def spec(kind: str, **fields: Any) -> Callable[[str, Any], object]:
    return lambda name, value: getattr(sixfold, kind)(**{**fields, name: value})


SPECS = {
    "mse": (spec("TurboQuantMSE", dim=DIM, bits=4), ("dim", "bits", "seed")),
    "prod": (spec("TurboQuantProd", dim=DIM, bits=4), ("dim", "bits", "seed")),
    "qjl": (spec("QJL", dim=DIM, projections=8), ("dim", "projections", "seed")),
    "polar": (spec("PolarQuant", dim=DIM), ("dim", "seed")),
    "split": (
        spec("OutlierSplit", dim=DIM, outlier_channels=4),
        ("dim", "outlier_channels", "outlier_bits", "bits", "seed"),
    ),
    "trellis": (spec("TrellisQuantizer", dim=DIM, bits=2), ("dim", "bits", "states", "seed")),
    "rotation": (
        lambda name, value: Rotation(**{"dim": DIM, name: value}),
        ("dim", "seed"),
    ),
    "policy": (
        lambda name, value: CachePolicy(**{name: value}),
        ("key_bits", "value_bits", "sink_tokens", "recent_window", "seed"),
    ),
}
NUMBERS = [(make, name) for make, names in SPECS.values() for name in names]
NUMBER_IDS = [f"{kind}.{name}" for kind, (_, names) in SPECS.items() for name in names]


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(SixfoldError) as caught:
        call()
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize(("make", "name"), NUMBERS, ids=NUMBER_IDS)
def test_fields_take_numbers_alone(make: Callable[[str, Any], Any], name: str) -> None:
    for value in NO_NUMBERS:
        # A seed may have more bits than an index.
        if not (name == "seed" and type(value) is int and make is not SPECS["policy"][0]):
            refused(lambda value=value: make(name, value))


@pytest.mark.parametrize("code", ["huffman", "", 4, None, ["trellis"], torch.tensor(1.0)])
def test_a_policy_has_a_code_that_there_is(code: Any) -> None:
    refused(lambda: CachePolicy(code=code))
    refused(lambda: CachePolicy.spending(3, code=code))


@pytest.mark.parametrize(("make", "name"), NUMBERS, ids=NUMBER_IDS)
def test_numbers_of_other_libraries_are_numbers(make: Callable[[str, Any], Any], name: str) -> None:
    number = 256 if name == "states" else 8 if name == "dim" else 2
    expected = make(name, number)
    for value in (np.int64(number), np.array(number), torch.tensor(number)):
        made = make(name, value)
        assert made == expected
        assert hash(made) == hash(expected)
        assert type(getattr(made, name)) is int


def test_codes_of_a_numpy_width_are_those_of_its_number() -> None:
    x = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0))
    width: Any = np.float32(2.5)
    quantizer = sixfold.TurboQuantMSE(DIM, width)
    expected = sixfold.TurboQuantMSE(DIM, 2.5).encode(x)
    assert torch.equal(quantizer.encode(x).packed, expected.packed)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("TurboQuantMSE", name) for name in ("scale", "rotation")),
        *(("TurboQuantProd", name) for name in ("projection", "rotation")),
        *(("TrellisQuantizer", name) for name in ("scale", "rotation")),
    ],
)
def test_fields_take_their_words_alone(kind: str, name: str) -> None:
    for value in NO_WORDS:
        refused(lambda value=value: spec(kind, dim=DIM, bits=2)(name, value))


@pytest.mark.parametrize("no_tensor", NO_TENSORS)
@pytest.mark.parametrize(
    "quantizer",
    [
        sixfold.TurboQuantMSE(DIM, 4),
        sixfold.TurboQuantProd(DIM, 4),
        sixfold.QJL(DIM, 8),
        sixfold.PolarQuant(DIM),
        sixfold.OutlierSplit(DIM, 4),
        sixfold.TrellisQuantizer(DIM, 2),
    ],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_quantizers_take_vectors_alone(quantizer: Any, no_tensor: str) -> None:
    x = torch.ones(2, 3, DIM)
    codes, hostile = quantizer.encode(x), NO_TENSORS[no_tensor](x)
    for verb in (quantizer.encode, quantizer.decode, lambda v: quantizer.scores(v, codes)):
        refused(lambda verb=verb: verb(hostile))
    refused(lambda: quantizer.scores(x, hostile))


@pytest.mark.parametrize(
    "index",
    ["a", 2**70, 2, -3, 1.5, (0, 0, 0), slice(None, None, -1), torch.ones(3, dtype=torch.bool), {}],
    ids=str,
)
def test_codes_have_no_other_index(index: Any) -> None:
    codes = sixfold.TurboQuantProd(DIM, 4).encode(torch.ones(2, 3, DIM))
    refused(lambda: codes[index])


@pytest.mark.parametrize("device", ["", "4", "nodevice:7", -1, 2**70, 1.5, [], torch.float32])
def test_there_is_no_such_device(device: Any) -> None:
    codes, layer = sixfold.QJL(DIM, 8).encode(torch.ones(2, DIM)), SHAPE.layer()
    refused(lambda: codes.to(device))
    refused(lambda: layer.to(device))


def test_codes_of_no_vectors_have_no_bits() -> None:
    assert sixfold.QJL(DIM, 8).encode(torch.ones(0, DIM)).bits_per_value == 0


@pytest.mark.parametrize("table", [lloyd_max, centroids, expected_mse, polar_angles])
def test_codebooks_take_numbers_alone(table: Callable[[Any, Any], object]) -> None:
    for value in [*NO_NUMBERS, 0, -1]:
        refused(lambda value=value: table(value, 4))
        refused(lambda value=value: table(4, value))
    refused(lambda: table(4, 2**40))


def kernel_calls() -> list[tuple[Callable[..., object], dict[str, Any]]]:
    rotation, book, cpu = Rotation(DIM), centroids(DIM, 4), torch.device("cpu")
    tables = {"turns": rotation.turns(cpu), "factor": rotation.factor(cpu)}
    coding = {**tables, "centroids": book}
    x = torch.ones(2, 3, DIM)
    rows, scales = encode(x, *coding.values(), bits=4, scale="optimal")
    states = torch.ones(1, 2, 3, DIM)
    return [
        (rotate, {"x": x, **tables}),
        (encode, {"x": x, **coding, "bits": 4, "scale": "optimal"}),
        (decode, {"rows": rows, "scales": scales, **coding, "dim": DIM, "bits": 4}),
        (scores, {"queries": x, "rows": rows, "scales": scales, "centroids": book, "bits": 4}),
        (exact_attention, {"query": states, "keys": states, "values": states, "scaling": 1.0}),
    ]


KERNELS = kernel_calls()
HOSTILE: list[Any] = [None, "x", [1.0], {}, object(), b"4", torch.ones(2, 3, DIM).to_sparse()]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("kernel", "arguments"), KERNELS, ids=lambda x: getattr(x, "__name__", ""))
def test_kernels_name_the_argument_they_refuse(
    kernel: Callable[..., object],
    arguments: dict[str, Any],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "cpu":
        pytest.importorskip("sixfold._cpu")
    monkeypatch.setenv("SIXFOLD_BACKEND", backend)
    kernel(**arguments)
    for name in arguments:
        for value in HOSTILE:
            refused(lambda name=name, value=value: kernel(**{**arguments, name: value}))


@pytest.mark.parametrize(
    "scaling", [math.nan, math.inf, "1", None, torch.ones(2), 10**400, -(10**5000)], ids=shown
)
def test_logits_are_not_scaled_by_no_number(scaling: Any) -> None:
    layer = SHAPE.layer()
    query = feed_one(layer)
    refused(lambda: layer.attend(query, scaling=scaling))


def feed_one(layer: CompressedLayer) -> Tensor:
    query, keys, values = SHAPE.tokens(1)
    layer.append(keys, values)
    return query


@pytest.mark.parametrize("held", [0, 150])
@pytest.mark.parametrize("no_tensor", NO_TENSORS)
def test_layers_take_tokens_alone(no_tensor: str, held: int) -> None:
    layer = SHAPE.layer()
    if held:
        feed(layer, SHAPE.tokens(held))
    before = [x.clone() for x in layer.tensors()]
    query, keys, values = SHAPE.tokens(1)
    hostile = NO_TENSORS[no_tensor]
    refused(lambda: layer.append(hostile(keys), values))
    refused(lambda: layer.append(keys, hostile(values)))
    assert all(map(torch.equal, layer.tensors(), before))
    layer.append(keys, values)
    refused(lambda: layer.attend(hostile(query), scaling=1.0))


ROWS: list[Any] = [
    *(None, 1, [0, 1], np.array([0]), torch.tensor(1), torch.tensor([0.0]), torch.tensor([[0]])),
    *(torch.tensor([2]), torch.tensor([-3]), torch.tensor([2**62])),
    *(torch.ones(3, dtype=torch.bool), torch.tensor([0, 1]).to_sparse()),
]


@pytest.mark.parametrize("rows", ROWS, ids=shown)
def test_layers_have_no_other_sequences(rows: Any) -> None:
    layer = SHAPE.layer()
    feed(layer, SHAPE.tokens(150))
    before = [x.clone() for x in layer.tensors()]
    refused(lambda: layer.select(rows))
    assert all(map(torch.equal, layer.tensors(), before))


def test_bytes_are_numbers_of_sequences() -> None:
    layer, other = SHAPE.layer(), SHAPE.layer()
    for one, dtype in ((layer, torch.uint8), (other, torch.int64)):
        feed(one, SHAPE.tokens(150))
        one.select(torch.tensor([1, 1], dtype=dtype))
    assert torch.equal(layer.dequantized()[0], other.dequantized()[0])


@pytest.mark.parametrize("count", NO_NUMBERS, ids=shown)
def test_layers_count_in_whole_numbers(count: Any) -> None:
    layer = SHAPE.layer()
    feed(layer, SHAPE.tokens(150))
    for method in (layer.crop, layer.take_back, lambda n: StaticLayer(layer, n)):
        refused(lambda method=method: method(count))
    assert layer.length == 150


@pytest.mark.parametrize("value", [None, 3, b"x", [], object()], ids=shown)
def test_files_take_what_they_can_hold(value: Any, tmp_path: Path) -> None:
    path, tensors = tmp_path / "file", {"x": torch.ones(2)}
    refused(lambda: write_container(value, "kind", {}, tensors))
    refused(lambda: write_container(path, value, {}, tensors))
    refused(lambda: write_container(path, "kind", {"a": {1}}, tensors))
    refused(lambda: write_container(path, "kind", {}, {"x": value}))
    refused(lambda: write_container(path, "kind", {}, {"x": torch.ones(2, device="meta")}))
    refused(lambda: write_container(path, "kind", {}, {"x": torch.ones(2).int()}))
    refused(lambda: open_container(value, "kind").__enter__())
    assert not path.exists()


def test_lazy_tensors_are_written_with_their_numbers(tmp_path: Path) -> None:
    lazy = {"negative": torch._neg_view(torch.ones(2)), "zero": torch._efficientzerotensor(2)}
    write_container(tmp_path / "file", "kind", {}, lazy)
    with open_container(tmp_path / "file", "kind") as container:
        found = container.read()
    assert found["negative"].tolist() == [-1, -1]
    assert found["zero"].tolist() == [0, 0]
