"""Key maps as a value: what they take, what they keep, and the files they are kept in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sixfold import KeyMaps, SixfoldError
from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.cache.key_maps import KIND
from sixfold.errors import FormatError, ShapeError
from sixfold.io import open_container, write_container
from sixfold.kernels.types import KeyMap

HEADS, DIM = 2, 8

pytestmark = pytest.mark.usefixtures("unhooked")


def pair(seed: int = 0, heads: int = HEADS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = 9 * torch.randn(heads, DIM, generator=generator)
    return mean, torch.rand(heads, DIM, generator=generator) + 0.5


def maps() -> KeyMaps:
    return KeyMaps({3: pair(1), 0: pair(0, heads=1)})


def same(one: KeyMaps, other: KeyMaps) -> bool:
    return list(one.layers) == list(other.layers) and all(
        torch.equal(x, y)
        for n in one.layers
        for x, y in zip(one.layers[n], other.layers[n], strict=True)
    )


def test_layers_are_in_order_and_of_any_shape() -> None:
    found = maps()
    assert list(found.layers) == [0, 3]
    assert found[0].mean.shape == (1, 1, DIM)
    assert found[3].scale.shape == (1, HEADS, DIM)
    assert found[3].map_index is None


def test_what_is_given_may_change_afterwards() -> None:
    mean, scale = pair()
    found = KeyMaps({0: (mean, scale)})
    mean.zero_()
    scale.zero_()
    assert same(found, KeyMaps({0: pair()}))


def test_any_floating_dtype_becomes_float32() -> None:
    found = KeyMaps({0: tuple(x.half() for x in pair())})
    assert {x.dtype for x in found.layers[0]} == {torch.float32}


def test_maps_made_in_inference_mode_serve_autograd() -> None:
    with torch.inference_mode():
        found = KeyMaps({0: pair()})
    query = torch.ones(HEADS, DIM, requires_grad=True)
    (query / found[0].scale).sum().backward()
    assert query.grad is not None


MEAN, SCALE = pair()
UNUSABLE: dict[str, tuple[Any, str]] = {
    "no mapping": ([pair()], "must be a mapping"),
    "nothing": ({}, "must be a mapping"),
    "a negative layer": ({-1: pair()}, "number of a layer"),
    "a name": ({"0": pair()}, "number of a layer"),
    "True": ({True: pair()}, "number of a layer"),
    "one tensor": ({0: MEAN}, "pair"),
    "three": ({0: (MEAN, SCALE, SCALE)}, "pair"),
    "a list": ({0: (MEAN.tolist(), SCALE)}, "mean of layer 0 must be a torch tensor"),
    "integers": ({0: (MEAN.int(), SCALE)}, "mean of layer 0 must be float16"),
    "a batch": ({0: (MEAN[None], SCALE[None])}, "kv_heads, key_dim"),
    "no coordinates": ({0: (MEAN[:, :0], SCALE[:, :0])}, "kv_heads, key_dim"),
    "no memory": ({0: (MEAN.to("meta"), SCALE)}, "in memory"),
    "other heads": ({0: (MEAN, SCALE[:1])}, "a scale for every channel"),
    "NaN": ({0: (MEAN * torch.nan, SCALE)}, "layer 0: key_map.mean"),
    "a huge mean": ({0: (MEAN * 1e30, SCALE)}, "layer 0: key_map.mean"),
    "beyond float32": ({0: (MEAN.double() * 1e300, SCALE)}, "layer 0: key_map.mean"),
    "no scale": ({0: (MEAN, SCALE * 0)}, "layer 0: key_map.scale"),
    "a negative scale": ({0: (MEAN, -SCALE)}, "layer 0: key_map.scale"),
    "an infinite scale": ({0: (MEAN, SCALE * torch.inf)}, "layer 0: key_map.scale"),
}


@pytest.mark.parametrize(("layers", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_what_is_no_map_is_refused(layers: Any, message: str) -> None:
    with pytest.raises(SixfoldError, match=message):
        KeyMaps(layers)


def test_one_map_of_several_sequences_is_taken_as_it_is() -> None:
    mean, scale = pair()
    shared = KeyMap(mean[None], scale[None], torch.zeros(3, dtype=torch.int64))
    own = KeyMap(mean.expand(3, -1, -1), scale.expand(3, -1, -1))
    for key_map in (shared, own, KeyMap(mean[None], scale[None])):
        assert same(KeyMaps.of({0: key_map}), KeyMaps({0: pair()}))


def test_of_different_maps_means_are_averaged_and_logarithms_of_scales() -> None:
    mean, scale = (torch.stack(x) for x in zip(pair(0), pair(1), strict=True))
    # The first sequence twice: it counts twice.
    found = KeyMaps.of({0: KeyMap(mean, scale, torch.tensor([0, 1, 0]))})
    torch.testing.assert_close(found.layers[0][0], (2 * mean[0] + mean[1]) / 3)
    torch.testing.assert_close(found.layers[0][1], (scale[0] ** 2 * scale[1]) ** (1 / 3))


def test_a_file_holds_the_same_maps(tmp_path: Path) -> None:
    maps().save(tmp_path / "maps.safetensors")
    assert same(KeyMaps.load(str(tmp_path / "maps.safetensors")), maps())


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    maps().save(path)
    with open_container(path, KIND) as container:
        return container.description, container.read()


LAYERS: dict[str, Any] = {
    "no layers": None,
    "a list": [[2, 8]],
    "nothing": {},
    "a negative number": {"-1": [HEADS, DIM]},
    "a leading zero": {"00": [HEADS, DIM]},
    "another script": {"٣": [HEADS, DIM]},
    "a superscript": {"²": [HEADS, DIM]},
    "a huge number": {"9" * 5000: [HEADS, DIM]},
    "a huge layer": {"9999999": [HEADS, DIM]},
    "no shape": {"0": None},
    "text": {"0": "28"},
    "one axis": {"0": [DIM]},
    "a fraction": {"0": [1.0, DIM]},
    "True": {"0": [True, DIM]},
    "no heads": {"0": [0, DIM]},
    "a huge head": {"0": [1, 2**62]},
    "another shape": {"0": [1, DIM + 1], "3": [HEADS, DIM]},
    "a layer less": {"3": [HEADS, DIM]},
    "a layer more": {"0": [1, DIM], "1": [1, DIM], "3": [HEADS, DIM]},
}


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_a_description_that_is_wrong_is_refused(layers: Any, tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    _, tensors = contents(path)
    write_container(path, KIND, {} if layers is None else {"layers": layers}, tensors)
    with pytest.raises(FormatError, match=r"maps\.safetensors"):
        KeyMaps.load(path)


@pytest.mark.parametrize("name", ["layers.3.mean", "layers.3.scale"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -1e30, 1e30])
def test_a_number_that_no_map_has_is_refused(name: str, number: float, tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    description, tensors = contents(path)
    tensors[name][1, 5] = number
    write_container(path, KIND, description, tensors)
    with pytest.raises(FormatError, match=r"maps\.safetensors: layer 3"):
        KeyMaps.load(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_another_dtype_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    description, tensors = contents(path)
    write_container(path, KIND, description, {n: x.to(dtype) for n, x in tensors.items()})
    with pytest.raises(FormatError, match="expected"):
        KeyMaps.load(path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    maps().save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:60], whole[:-9] + b"\x01" + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            KeyMaps.load(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write_container(path, "transformers-cache", {"layers": {}}, {"x": torch.zeros(1)})
    with pytest.raises(FormatError, match="expected a 'key-maps'"):
        KeyMaps.load(path)
    with pytest.raises(SixfoldError, match="path must be"):
        KeyMaps.load(3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        KeyMaps.load(tmp_path / "missing")


def test_maps_of_other_keys_are_refused_by_a_layer() -> None:
    keys = torch.zeros(1, HEADS, 0, DIM)
    mean, scale = (x[None] for x in pair())
    index = torch.zeros(1, dtype=torch.int64)
    for key_map, error in (
        ((mean, scale), SixfoldError),
        (KeyMap(mean, scale, index), SixfoldError),
        (KeyMap(mean.double(), scale), ShapeError),
        (KeyMap(mean[:, :1], scale[:, :1]), ShapeError),
        (KeyMap(mean[..., :4], scale[..., :4]), ShapeError),
        (KeyMap(mean.repeat(2, 1, 1), scale.repeat(2, 1, 1)), ShapeError),
    ):
        with pytest.raises(error, match="key_map"):
            CompressedLayer(keys, keys, CachePolicy(), None, key_map)  # type: ignore[arg-type]
