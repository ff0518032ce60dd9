"""Key maps as a value: fitted once, kept in a file, given to any number of caches."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold._surroundings import ordinary_tensors, untraced
from sixfold.arguments import MOST_COORDINATES, floating, rows, settle, shown, whole
from sixfold.cache.validate import check_map
from sixfold.errors import FormatError, OutOfRangeError, ShapeError, SixfoldError
from sixfold.io import TensorSpec, open_container, write_container
from sixfold.kernels.types import KeyMap

KIND = "key-maps"
# Far beyond any model.
MOST_LAYERS = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class KeyMaps:
    """One key map a layer and KV head, for every sequence alike (docs/key_map.md).

    Maps are exact for any model and text: which one is used moves only the error of the codes.
    The tensors are the object's own and never change, so caches and threads may share it.

    Attributes:
        layers: By the number of the layer, mean and channel scale of its keys, each
            [kv_heads, key_dim] in float32 on the CPU. Scales are positive.
    """

    layers: Mapping[int, tuple[Float32[Tensor, "heads dim"], Float32[Tensor, "heads dim"]]]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise SixfoldError(
                f"key maps must be a mapping such as {{0: (mean, scale)}}, got {shown(self.layers)}"
            )
        numbers = [whole("the number of a layer", n, 0, MOST_LAYERS) for n in self.layers]
        checked = {n: _checked(n, x) for n, x in zip(numbers, self.layers.values(), strict=True)}
        settle(self, layers=dict(sorted(checked.items())))

    @classmethod
    def of(cls, maps: Mapping[int, KeyMap]) -> Self:
        """One map a layer for all sequences whose maps these are, each counted alike.

        A map that all sequences share is taken as it is. Of different ones the mean is averaged,
        and so is the logarithm of the scale.

        Raises:
            SixfoldError: They are no maps by the number of their layers.
        """
        if not isinstance(maps, Mapping):
            raise SixfoldError(f"maps must be a mapping such as {{0: key_map}}, got {shown(maps)}")
        return cls({layer: _average(layer, key_map) for layer, key_map in maps.items()})

    def __getitem__(self, layer: int) -> KeyMap:
        """The map of a layer, as kernels take it: one, for sequences that name it 0.

        Raises:
            OutOfRangeError: There is none of this layer.
        """
        number = whole("the number of a layer", layer, 0, MOST_LAYERS)
        if number not in self.layers:
            raise OutOfRangeError(f"layer {number} has no key map: there are {list(self.layers)}.")
        mean, scale = self.layers[number]
        return KeyMap(mean[None], scale[None])

    @untraced
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that `load` reads (docs/format.md, section 9).

        Args:
            path: Where to. An existing file is replaced in one step, once the new one is whole.

        Raises:
            SixfoldError: `path` is no path.
            OSError: The file cannot be written.
        """
        described = {str(layer): list(mean.shape) for layer, (mean, _) in self.layers.items()}
        tensors = {
            f"layers.{layer}.{name}": x
            for layer, pair in self.layers.items()
            for name, x in zip(("mean", "scale"), pair, strict=True)
        }
        write_container(path, KIND, {"layers": described}, tensors)

    @classmethod
    @untraced
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote. For which model is checked when a cache is made.

        Raises:
            SixfoldError: `path` is no path.
            FormatError: Not such a file, cut short or damaged, or with numbers no key map has.
            OSError: The file cannot be read.
        """
        with open_container(path, KIND) as container:
            try:
                layers = _layers(container.description)
            except (KeyError, TypeError, ValueError) as error:
                raise FormatError(
                    f"{path} is damaged: its description is wrong ({error})."
                ) from error
            container.expect(
                {
                    f"layers.{layer}.{name}": TensorSpec(shape, "F32")
                    for layer, shape in layers.items()
                    for name in ("mean", "scale")
                }
            )
            tensors = container.read()
        try:
            return cls(
                {n: (tensors[f"layers.{n}.mean"], tensors[f"layers.{n}.scale"]) for n in layers}
            )
        except SixfoldError as error:
            raise FormatError(f"{path}: {error}") from error


def shared(key_map: KeyMap, batch: int) -> KeyMap:
    """One map for all of `batch` sequences, held once."""
    index = torch.zeros(batch, dtype=torch.int64, device=key_map.mean.device)
    return key_map._replace(map_index=index)


def check_pinned(key_map: Any, heads: int, dim: int) -> None:
    """Refuse what is no single map for keys of `heads` heads and `dim` coordinates.

    Raises:
        SixfoldError: It is no `KeyMap` in float32.
        ShapeError: It is for other keys.
    """
    if not isinstance(key_map, KeyMap) or key_map.map_index is not None:
        raise SixfoldError(f"key_map must be a KeyMap without an index, got {shown(key_map)}")
    for name, x in (("mean", key_map.mean), ("scale", key_map.scale)):
        floating(f"key_map.{name}", x)
        if x.shape != (1, heads, dim) or x.dtype is not torch.float32:
            raise ShapeError(
                f"key_map.{name}: expected float32 [1, {heads}, {dim}], one map for the KV heads "
                f"of this layer, got {x.dtype} {list(x.shape)}: it was made for another model."
            )


def _checked(layer: int, pair: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise SixfoldError(f"layer {layer}: expected a pair (mean, scale), got {shown(pair)}")
    for name, x in zip(("mean", "scale"), pair, strict=True):
        floating(f"{name} of layer {layer}", x)
        if x.ndim != 2 or not x.numel() or x.is_meta:
            raise ShapeError(
                f"{name} of layer {layer}: expected [kv_heads, key_dim] in memory, got "
                f"{list(x.shape)} on {x.device}"
            )
    mean, scale = (_own(x) for x in pair)
    if mean.shape != scale.shape:
        raise ShapeError(
            f"layer {layer}: expected a scale for every channel, got mean {list(mean.shape)} and "
            f"scale {list(scale.shape)}"
        )
    try:
        check_map(mean, scale)
    except FormatError as error:
        raise SixfoldError(f"layer {layer}: {error}") from error
    return mean, scale


def _own(x: Float[Tensor, "heads dim"]) -> Float32[Tensor, "heads dim"]:
    # What inference mode makes cannot be used outside of it by autograd.
    with ordinary_tensors():
        own = torch.empty(x.shape, dtype=torch.float32, device="cpu")
        return own.copy_(x.detach())


def _average(layer: int, key_map: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(key_map, KeyMap):
        raise SixfoldError(f"layer {layer}: expected a KeyMap, got {shown(key_map)}")
    for name, x in (("mean", key_map.mean), ("scale", key_map.scale)):
        floating(f"{name} of layer {layer}", x)
        if x.ndim != 3 or x.shape != key_map.mean.shape or not x.numel() or x.is_meta:
            raise ShapeError(
                f"{name} of layer {layer}: expected [maps, kv_heads, key_dim] in memory, alike, "
                f"got {list(x.shape)} on {x.device}"
            )
    if key_map.map_index is not None:
        index = rows(f"map_index of layer {layer}", key_map.map_index, len(key_map.mean))
        key_map = key_map._replace(map_index=index)
    mean, scale, _ = key_map.of_sequences()
    if bool((mean == mean[:1]).all() & (scale == scale[:1]).all()):
        return mean[0], scale[0]
    return mean.mean(0), scale.log().mean(0).exp()


def _layers(description: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    """Number of every layer described, and the shape of its map.

    Raises:
        KeyError, TypeError, ValueError: The description is none.
    """
    described = description["layers"]
    if not isinstance(described, dict):
        raise TypeError(f"expected the shapes of maps by layer, got {shown(described)}")
    found: dict[int, tuple[int, int]] = {}
    for name, shape in described.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 7 and name == str(int(name))):
            raise ValueError(f"expected the number of a layer, got {shown(name)}")
        if type(shape) is not list or len(shape) != 2 or not all(map(_size, shape)):
            raise ValueError(f"layer {name}: expected [kv_heads, key_dim], got {shown(shape)}")
        found[int(name)] = (shape[0], shape[1])
    return found


def _size(n: Any) -> bool:
    return type(n) is int and 1 <= n <= MOST_COORDINATES
