"""Whatever a compiled function calls of Sixfold works: its graph may be interrupted."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import sixfold
from sixfold import TurboQuantCache
from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.rotation import Rotation
from tests.e2e.decoding import batch, forward
from tests.e2e.models import fresh_model
from tests.processes import printed
from tests.versions import traces_models

VECTORS = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))


def quantizer_calls() -> dict[str, Callable[[], Any]]:
    made = {
        "mse": sixfold.TurboQuantMSE(64, bits=4),
        "prod": sixfold.TurboQuantProd(64, bits=3),
        "qjl": sixfold.QJL(64, 64),
        "polar": sixfold.PolarQuant(64),
        "trellis": sixfold.TrellisQuantizer(64, bits=2),
        "split": sixfold.OutlierSplit(64),
    }
    calls: dict[str, Callable[[], Any]] = {"rotation": lambda: Rotation(64).rotate(VECTORS)}
    for name, x in made.items():
        calls[f"{name}.decode"] = lambda x=x: x.decode(x.encode(VECTORS))
        if hasattr(x, "scores"):
            calls[f"{name}.scores"] = lambda x=x: x.scores(VECTORS[:3], x.encode(VECTORS))
    return calls


def index_calls(folder: Path) -> dict[str, Callable[[], Any]]:
    def index(bits: int = 4) -> sixfold.Index:
        made = sixfold.Index(64, bits=bits)
        made.add(VECTORS)
        return made

    def reopened() -> int:
        index().save(folder / "index")
        return len(sixfold.Index.load(folder / "index"))

    def calibrated() -> Any:
        made = sixfold.Index(64, bits=4)
        made.calibrate(VECTORS)
        made.add(VECTORS)
        made.remove([0])
        made.partition(2)
        return made.search(VECTORS[:2], k=3)[1]

    return {
        "index.search": lambda: index().search(VECTORS[:3], k=2)[1],
        "index.decode": lambda: index().decode([5]),
        "index.calibrate": calibrated,
        "index.save": reopened,
    }


def cache_calls(folder: Path) -> dict[str, Callable[[], Any]]:
    model, data = fresh_model("llama-64"), batch(steps=2)
    dense = DynamicCache(config=model.config)
    held = TurboQuantCache.for_model(model, 8, fit_tokens=0)
    for cache in (dense, held):
        forward(model, cache, data, 0, data.prompt)

    def shorter(change: Callable[[TurboQuantCache], Any]) -> tuple[Any, int, int]:
        twin = held.fork()
        change(twin)
        return twin[0][0], twin.get_seq_length(), twin.nbytes

    def reopened() -> Any:
        held.save(folder / "cache")
        return TurboQuantCache.load(folder / "cache", model)[0][0]

    def maps() -> Any:
        held.key_maps().save(folder / "maps")
        return sixfold.KeyMaps.load(folder / "maps").layers[0][0]

    return {
        "crop": lambda: shorter(lambda x: x.crop(-1)),
        "reorder": lambda: shorter(lambda x: x.reorder_cache(torch.tensor([1, 0, 2]))),
        "select": lambda: shorter(lambda x: x.batch_select_indices(torch.tensor([0]))),
        "repeat": lambda: shorter(lambda x: x.batch_repeat_interleave(2)),
        "to": lambda: shorter(lambda x: x.to("cpu", torch.float64)),
        "recover": lambda: shorter(lambda x: x.recover(100)),
        "reset": lambda: held.fork().reset(),
        "repr": lambda: repr(held),
        "list": lambda: [x for x, _, _ in held],
        "static": lambda: held.static(300).get_seq_length(),
        "from_cache": lambda: TurboQuantCache.from_cache(dense, model, 8, fit_tokens=0)[0][0],
        "file": reopened,
        "maps": maps,
    }


def layer_calls() -> dict[str, Callable[[], Any]]:
    keys = VECTORS.view(1, 2, 150, 64)

    def layer() -> CompressedLayer:
        made = CompressedLayer(keys, keys, CachePolicy.spending(4, recent_window=0))
        made.append(keys, keys)
        return made

    def attended() -> Any:
        made = layer()
        made.attend(keys, scaling=0.1)
        made.append(keys[:, :, :1], keys[:, :, :1])
        return made.attend(keys[:, :, :1], scaling=0.1), made.dequantized()

    return {"layer": attended}


def same(x: Any, y: Any) -> bool:
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(same, x, y))
    if isinstance(x, Tensor):
        return torch.equal(x, y)
    return bool(np.array_equal(x, y)) if isinstance(x, np.ndarray) else bool(x == y)


@torch.no_grad()
def print_failures(only: str = "") -> None:
    """Calls that fail, or return something else, where their caller is compiled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        calls = quantizer_calls() | index_calls(path) | cache_calls(path) | layer_calls()
        for name in only.split(",") if only else calls:
            torch.compiler.reset()
            # As a first call, too: kernels are looked for when they are needed.
            compiled = torch.compile(calls[name], backend="eager")
            try:
                works = same(compiled(), calls[name]())
            except Exception:
                works = False
            if not works:
                print(name)
    print("done")


def failures(only: str, backend: str) -> list[str]:
    code = f"from tests.e2e.test_compiled_callers import print_failures as p; p({only!r})"
    return printed(code, SIXFOLD_BACKEND=backend)[:-1]


@traces_models
def test_a_compiled_function_may_call_some() -> None:
    assert not failures("mse.decode,index.search,static,list", "")


@traces_models
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["", "reference"])
def test_a_compiled_function_may_call_everything(backend: str) -> None:
    assert not failures("", backend)
