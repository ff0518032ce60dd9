"""The caller's surroundings do not leak in: defaults of torch, tensors of other devices."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sixfold
from sixfold._surroundings import outside_autocast
from sixfold.cache import CachePolicy, StaticLayer
from sixfold.errors import SixfoldError
from sixfold.kernels.rotate import rotate
from sixfold.rotation import Rotation
from tests.layers import Shape, feed
from tests.processes import printed
from tests.tiny import tiny_model

CPU = torch.device("cpu")
SOURCES = Path(sixfold.__file__).parent
FACTORIES = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace"),
    *("ones", "rand", "randint", "randn", "randperm", "tensor", "zeros"),
}


def placed_by_the_caller(tree: ast.AST) -> Iterator[int]:
    """Lines on which a tensor is made without saying where."""
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if called and ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES:
            if not any(keyword.arg in ("device", None) for keyword in node.keywords):
                yield node.lineno


def test_every_new_tensor_says_where_it_is() -> None:
    """`torch.set_default_device("cuda")` is no reason to hand an extension other memory."""
    found = [
        f"{path.relative_to(SOURCES)}:{line}"
        for path in sorted(SOURCES.rglob("*.py"))
        for line in placed_by_the_caller(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found
    assert list(placed_by_the_caller(ast.parse("torch.zeros(3)"))) == [1]


QUANTIZERS = """
import torch, sixfold
x = torch.randn(1, 65, 64, device="cpu")
{surroundings}
for one in (
    sixfold.TurboQuantMSE(64, 3), sixfold.TurboQuantProd(64, 3), sixfold.QJL(64, 64),
    sixfold.PolarQuant(64), sixfold.TrellisQuantizer(64, 3),
):
    codes = one.encode(x)
    assert one.scores(x[:, :2], codes).device.type == "cpu", one
    assert one.decode(codes).dtype is torch.float32
print("done")
"""
CACHE = """
import torch, sixfold
from sixfold.integrations.transformers.keyword import cache_argument
from tests.tiny import tiny_model
ids = torch.arange(2, 72, device="cpu").repeat(1, 3)
model = tiny_model()
def run():
    cache = sixfold.TurboQuantCache.for_model(model, 8, fit_tokens=0)
    with torch.no_grad():
        parts = [model(x, **cache_argument(cache)).logits for x in (ids, ids[:, :1])]
    cache.save("{path}")
    loaded = sixfold.TurboQuantCache.load("{path}", model)
    cache.key_maps().save("{path}.maps")
    pinned = sixfold.KeyMaps.load("{path}.maps")
    other = sixfold.TurboQuantCache.for_model(model, 8, key_map=pinned)
    with torch.no_grad():
        parts += [model(x, **cache_argument(c)).logits for c in (loaded, other) for x in (ids,)]
    loaded.reorder_cache(torch.tensor([0], device="cpu"))
    return torch.cat(parts, 1)
expected = run()
{surroundings}
assert torch.equal(run(), expected)
print("done")
"""


@pytest.mark.parametrize("program", [QUANTIZERS, CACHE], ids=["quantizers", "cache"])
@pytest.mark.parametrize(
    "surroundings",
    ['torch.set_default_device("meta")', "torch.set_default_dtype(torch.float64)"],
    ids=["device", "dtype"],
)
def test_defaults_of_torch(program: str, surroundings: str, tmp_path: Path) -> None:
    """In a process of its own, as one that writes to memory of nobody would end it."""
    if program is CACHE and "device" in surroundings:
        # Models make positions and masks wherever the default is.
        program = program.replace("model(x,", "on_cpu(x,").replace(
            "expected = run()",
            'def on_cpu(*a, **k):\n    with torch.device("cpu"):\n        return model(*a, **k)\n'
            "expected = run()",
        )
    code = program.format(surroundings=surroundings, path=tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.stdout.split() == ["done"], (done.returncode, done.stderr[-3000:])


@pytest.mark.parametrize("held", [40, 200], ids=["raw", "coded"])
@pytest.mark.parametrize("what", ["mask", "tokens", "query"])
def test_tensors_of_another_device_are_refused(what: str, held: int) -> None:
    """The memory of one is no address of the other."""
    shape = Shape()
    layer = shape.layer(CachePolicy(4, fit_tokens=0))
    feed(layer, shape.tokens(held))
    query, keys, values = shape.tokens(1, 1)
    elsewhere = torch.device("meta")
    mask = torch.ones(shape.batch, 1, 1, held + 1, dtype=torch.bool)
    if what == "mask":
        mask = mask.to(elsewhere)
    elif what == "tokens":
        keys, values = keys.to(elsewhere), values.to(elsewhere)
    else:
        query = query.to(elsewhere)

    def step() -> None:
        layer.append(keys, values)
        layer.attend(query, scaling=1.0, mask=mask)

    with pytest.raises(SixfoldError, match=r"device|meta"):
        step()


@pytest.mark.parametrize("device_type", ["xpu", "mtia", "privateuseone"])
def test_autocast_of_any_device_is_off_within(
    device_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = {device_type}

    class Off:
        """What `torch.autocast` does where such a device is."""

        def __init__(self, name: str, enabled: bool) -> None:
            self.name = name

        def __enter__(self) -> None:
            on.remove(self.name)

        def __exit__(self, *_: object) -> None:
            on.add(self.name)

    monkeypatch.setattr(torch._C, "_is_any_autocast_enabled", lambda: bool(on))
    monkeypatch.setattr(torch, "is_autocast_enabled", on.__contains__)
    monkeypatch.setattr(torch, "autocast", Off)
    assert outside_autocast(lambda: set(on))() == set()
    assert on == {device_type}


def test_an_uncompressed_layer_follows_its_model() -> None:
    cache = sixfold.TurboQuantCache.for_model(tiny_model(), skip_layers=[0])
    shape = Shape(key_dim=64, value_dim=64)
    for device in ("cpu", "meta"):
        _, keys, values = (x.to(device) for x in shape.tokens(3))
        for layer in range(len(cache.layers)):
            if layer == 0 or device == "cpu":
                cache.update(keys, values, layer)
    assert cache.layers[0].keys.device.type == "meta"
    assert cache.layers[0].get_seq_length() == 6


INFERENCE = """
import gc, torch, sixfold
from sixfold.cache import CachePolicy, CompressedLayer

@torch.inference_mode()
def use_all(code):
    x = torch.randn(1, 2, 200, 64)
    for one in (
        sixfold.TurboQuantMSE(64, 2.5), sixfold.TurboQuantProd(64, 3), sixfold.PolarQuant(64),
        sixfold.QJL(64, 64), sixfold.QJL(64, 64, projection="gaussian"),
        sixfold.TrellisQuantizer(64, 2.5), sixfold.TurboQuantMSE(64, 4, rotation="orthogonal"),
    ):
        one.scores(x[:, :, :2], one.encode(x))
    layer = CompressedLayer(x, x, CachePolicy(4, 4, code=code))
    layer.append(x.clone(), x.clone())
    layer.attend(x[:, :, :1], scaling=1.0)
    layer.compress(now=True)
    layer.attend(x[:, :, :1], scaling=1.0)

use_all("codebook")
use_all("trellis")
gc.collect()
kept = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
print(len(kept) > 10, sum(x.is_inference() for x in kept))
"""


def test_nothing_that_is_kept_is_of_inference_mode() -> None:
    """Tables serve whoever comes later, and autograd cannot save a tensor of that mode."""
    assert printed(INFERENCE) == ["True", "0"]


def test_a_static_layer_of_inference_mode_decodes_outside_of_it() -> None:
    shape = Shape()
    with torch.inference_mode():
        layer = shape.layer(CachePolicy(fit_tokens=0))
        feed(layer, shape.tokens(200))
        static = StaticLayer(layer, 300)
    query, keys, values = shape.tokens(1, seed=1)
    static.append(keys, values)
    static.attend(query, scaling=shape.scaling)
    assert int(static.count) == 201


def test_what_inference_mode_cannot_do_is_said_by_torch() -> None:
    """The arguments fit together: how they were made is another matter."""
    tables = Rotation(64).turns(CPU), Rotation(64).factor(CPU)
    with torch.inference_mode():
        turns, factor = (x.clone() for x in tables)
    with pytest.raises(RuntimeError, match=r"^Inference tensors cannot be saved"):
        rotate(torch.randn(3, 64, requires_grad=True), turns, factor)
