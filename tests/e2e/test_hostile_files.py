"""A file whose digest is right may still be hostile: it is refused, or works."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sixfold import TurboQuantCache
from sixfold.errors import FormatError
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.integrations.transformers.storage import KIND
from sixfold.io import open_container, write_container
from tests.e2e.decoding import batch, forward
from tests.e2e.models import tiny_model

# Thousands of caches: checking shapes would take most of the time.
pytestmark = pytest.mark.usefixtures("unhooked")

Contents = tuple[dict[str, Any], dict[str, Tensor]]

# What is attacked: pages beside padding and sinks, no page yet, windows, layers that are kept.
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "pages": ("llama-20", (150, 100), {"bits": 3}),
    "no page": ("llama-64", (40, 30), {}),
    "sliding": ("mistral", (248, 203), {"recent_window": 0}),
    "dense": ("gemma2", (248, 203), {"skip_layers": [1]}),
    "dense sliding": ("gemma2", (248, 203), {"skip_layers": [0], "bits": 2.5}),
    "convolutions": ("lfm2", (150, 150), {}),
}
FAST = ("pages", "convolutions")
NUMBERS = [-1, 0, 1, 2, 63, 65, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)]
OTHERS = [None, True, False, 1.5, 1e308, "1", [], [1], {}, "F32", "full_attention"]
WHOLE = [-1, 0, 1, 47, 150, 151, 1000, 2**31, 2**62, 2**63 - 1, 2**63 - 64, -(2**63), 1 - 2**63]
REAL = [float("nan"), float("inf"), float("-inf"), -1.0, -0.0, 0.0, 1e-45, 1e-30, 6e4, 1e30, 3e38]


def contents(case: str, path: Path) -> Contents:
    name, prompts, options = CASES[case]
    model, data = tiny_model(name), batch(prompts)
    cache = TurboQuantCache.for_model(model, **options)
    forward(model, cache, data, 0, data.prompt)
    cache.save(path)
    with open_container(path, KIND) as container:
        return container.description, container.read()


def changed_number(description: Any, source: random.Random) -> None:
    """Replace a value anywhere in a description, or take it away."""
    places = list(_places(description))
    where, key = source.choice(places)
    choice = source.random()
    if choice < 0.1:
        del where[key]
    elif choice < 0.3 and type(where[key]) is int:
        where[key] += source.choice([-64, -1, 1, 64])
    else:
        where[key] = copy.deepcopy(source.choice(NUMBERS if choice < 0.8 else OTHERS))


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def changed_tensor(tensors: dict[str, Tensor], source: random.Random) -> None:
    """Replace a few numbers of a tensor, or all, or take it away, or turn its axes around."""
    name = source.choice(sorted(tensors))
    tensor = tensors[name] = tensors[name].clone()
    choice = source.random()
    if choice < 0.03:
        del tensors[name]
    elif choice < 0.06:
        tensors[name] = tensor.transpose(0, -1).contiguous()
    elif tensor.dtype is torch.uint8:
        tensor.random_(0, 256, generator=torch.Generator().manual_seed(source.getrandbits(32)))
    elif tensor.numel():
        count = source.choice([1, 1, 3, tensor.numel()])
        index = torch.tensor([source.randrange(tensor.numel()) for _ in range(count)])
        value = source.choice(WHOLE if tensor.dtype is torch.int64 else REAL)
        replacement = torch.tensor(value).to(tensor.dtype)
        if count == tensor.numel():
            tensor.fill_(replacement)
        else:
            tensor.view(-1)[index] = replacement


@torch.no_grad()
def survives(case: str, path: Path, fused: bool) -> bool:
    """Whether the file is refused, or loaded and attended with finite results."""
    name = CASES[case][0]
    model = tiny_model(name)
    try:
        cache = TurboQuantCache.load(path, model)
    except FormatError:
        return False
    for layer in cache.compressed_layers:
        layer.fused = fused
    if not fused:
        model = tiny_model(name, "eager")
    ids = torch.full((len(batch(CASES[case][1]).ids), 3), 5)
    for step in (ids, ids[:, :1]):
        logits = model(step, **cache_argument(cache)).logits
        assert logits.isfinite().all()
    return True


@pytest.mark.parametrize(
    "case",
    [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_thousands_of_changes(case: str, tmp_path: Path) -> None:
    path, source = tmp_path / "file", random.Random(0)
    description, tensors = contents(case, path)
    assert survives(case, path, fused=True)
    loaded = 0
    for number in range(350):
        changed = copy.deepcopy(description), dict(tensors)
        for _ in range(source.choice([1, 1, 2])):
            if source.random() < 0.5:
                changed_number(changed[0]["layers"], source)
            elif changed[1]:
                changed_tensor(changed[1], source)
        write_container(path, KIND, *changed)
        loaded += survives(case, path, fused=number % 2 == 0)
    # Codes may be any, and so may numbers that nobody reads.
    assert 10 < loaded < 300


FIELDS = ["batch", "kv_heads", "key_dim", "value_dim", "window_tokens", "evicted", "sinks"]


@pytest.mark.parametrize("value", [-1, 0, 2**31, 2**63 - 1, 2**63, 10**30])
@pytest.mark.parametrize("field", FIELDS)
def test_a_number_of_the_description(field: str, value: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    description, tensors = contents("pages", path)
    if description["layers"][0][field] == value:
        pytest.skip("this is what it is")
    for layer in description["layers"]:
        layer[field] = value
    write_container(path, KIND, description, tensors)
    with pytest.raises(FormatError, match=f"{path.name}.*(layer 0|missing|expected)"):
        TurboQuantCache.load(path, tiny_model("llama-20"))


@pytest.mark.parametrize(
    ("case", "name", "value"),
    [
        ("pages", "padding", 2**63 - 1),
        ("pages", "padding", 2**63 - 64),
        ("pages", "padding", -1),
        ("no page", "padding", 41),
        ("pages", "sinks.count", 5),
        ("pages", "sinks.count", -(2**63)),
        ("pages", "sinks.keys", float("nan")),
        ("pages", "sinks.values", float("inf")),
        ("pages", "key_map.mean", float("nan")),
        ("pages", "key_map.scale", 0.0),
        ("pages", "key_map.scale", -1.0),
        ("pages", "key_map.scale", 1e-30),
        ("pages", "key_map.scale", float("nan")),
        ("pages", "key_scales", float("nan")),
        ("pages", "value_scales", float("-inf")),
        ("pages", "window.keys", float("nan")),
        ("pages", "window.values", 3e38),
        ("no page", "query_energy", -1.0),
        ("no page", "query_energy", float("inf")),
        ("sliding", "padding", 2**62),
        ("dense", "layers.1.keys", float("nan")),
        ("convolutions", "conv_states.0", float("inf")),
    ],
)
def test_a_number_of_a_tensor(case: str, name: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "file"
    description, tensors = contents(case, path)
    (first, *_) = [key for key in sorted(tensors) if key.endswith(name)]
    tensors[first].view(-1)[-1] = value
    write_container(path, KIND, description, tensors)
    with pytest.raises(
        FormatError,
        match=rf"{path.name}, layer \d: {name.split('.', 2)[-1] if 'layers' in name else name}",
    ):
        TurboQuantCache.load(path, tiny_model(CASES[case][0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cache_that_could_not_be_loaded_is_not_saved(value: float, tmp_path: Path) -> None:
    model, data = tiny_model("llama-64"), batch((150, 100))
    cache = TurboQuantCache.for_model(model)
    forward(model, cache, data, 0, data.prompt)
    store = cache.layers[1].store
    assert store is not None
    store.window.values[0, 0, 3, 2] = value
    with pytest.raises(FormatError, match=r"window\.values"):
        cache.save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_what_nobody_reads_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "file"
    description, tensors = contents("pages", path)
    for side in ("key", "value"):
        scales = tensors[f"layers.0.{side}_scales"]
        for row, padding in enumerate(tensors["layers.0.padding"].tolist()):
            scales[row, 0, :, padding : padding + 4] = float("nan")  # four sinks
    write_container(path, KIND, description, tensors)
    assert survives("pages", path, fused=True)
    assert survives("pages", path, fused=False)
