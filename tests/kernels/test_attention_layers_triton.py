"""A whole layer on Triton's kernels: the reference's numbers, and no wait for the GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)

from sixfold.cache import CachePolicy
from sixfold.kernels import _tables, attention
from sixfold.kernels.attention import reference
from sixfold.kernels.attention import triton as backend
from sixfold.kernels.types import CodeName
from sixfold.packing import Bits
from tests.kernels.attention_cases import make_case
from tests.kernels.test_attention_layers import OPTIONS, Held, random_mask
from tests.kernels.test_ragged import check_each, sequence
from tests.layers import Shape, feed


@pytest.fixture
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rotations by anything that fake tensors can pass through.
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    monkeypatch.setattr(attention, "implementation", lambda *_: backend)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_kernel_is_the_reference(
    queries: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held.of(300)
    query = held.queries(queries)
    if "mask" in options:
        options = {**options, "mask": random_mask(held, queries, options["mask"])}
    monkeypatch.setattr(attention, "implementation", lambda *_: reference)
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    expected = held.attend(query, **options)
    monkeypatch.setattr(attention, "implementation", lambda *_: backend)
    found = held.attend(query, **options)
    # Operands of 11 bits: 2^-11 of a logit, and as much of a value.
    assert (found - expected).norm() < 3e-3 * expected.norm()


@pytest.mark.parametrize("bits", [2.5, 4])
def test_layers_of_trellis_codes(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    held = Held.of(200, bits=bits, code="trellis")
    query = held.queries(2)
    expected = held.attend(query)
    monkeypatch.setattr(attention, "implementation", lambda *_: backend)
    assert (held.attend(query) - expected).norm() < 3e-3 * expected.norm()


def test_a_layer_stores_and_reads_trellis_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation on Triton: the same codes, the same output but for operands of 11 bits."""
    shape, policy = Shape(1, 1, 2, 32, 32), CachePolicy(2.5, 4, recent_window=4, code="trellis")
    found = []
    for name in ("reference", "triton"):
        monkeypatch.setenv("SIXFOLD_BACKEND", name)
        layer = shape.layer(policy)
        feed(layer, shape.tokens(64 + 4))
        out = feed(layer, shape.tokens(2, seed=1))
        (part,) = layer.history.parts
        found.append((out, part.pool.key_codes, part.pool.value_codes, *layer.dequantized()))
    (expected, *codes), (got, *same_codes) = found
    assert all(map(torch.equal, codes, same_codes))
    assert (got - expected).norm() < 3e-3 * expected.norm()


@pytest.mark.usefixtures("_on_triton")
def test_gradients_come_from_the_reference() -> None:
    held = Held.of(200)
    query = held.queries(2).requires_grad_()
    held.attend(query).sum().backward()
    assert query.grad is not None


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are not looked at, as those on a GPU."""
    monkeypatch.setattr(_tables, "readable", lambda _: False)


@pytest.mark.usefixtures("_on_triton", "trusted")
def test_nothing_depends_on_data() -> None:
    """Fake tensors have no data: whatever asks for some fails."""
    held = Held.of(300)
    query = held.queries(1)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        out = held.attend(mode.from_tensor(query))
    assert out.shape == (2, 6, 1, 48)


class NoKernel:
    """Takes a launch and does nothing."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*_: Any, **__: Any) -> None:
            self.launches += 1

        return launch


@pytest.mark.usefixtures("trusted")
def test_the_launcher_asks_no_tensor_for_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a synchronisation")

    kernels = NoKernel(), NoKernel()
    monkeypatch.setattr(backend, "attend_pages", kernels[0])
    monkeypatch.setattr(backend, "merge_ranges", kernels[1])
    case = make_case(lengths=(64,) * 8, queries=3, batch=1, kv_heads=1)
    case.options |= {"mask": torch.ones(1, 1, 3, 512), "softcap": 3.0}
    case.options["logit_offset"] = torch.zeros(1, 2, 3)
    arguments = case.arguments
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    backend.page_attention(*arguments, **case.options)
    assert [kernel.launches for kernel in kernels] == [1, 1]


@pytest.mark.compile
@pytest.mark.usefixtures("unhooked")
def test_compiles_in_one_graph() -> None:
    case = make_case(queries=2)

    def doubled(query: Tensor, *rest: Any) -> Tensor:
        return backend.page_attention(2 * query, *rest, **case.options).out.relu()

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case.arguments), doubled(*case.arguments))


@pytest.mark.parametrize("code", ["codebook", pytest.param("trellis", marks=pytest.mark.slow)])
def test_a_ragged_batch_in_memory_of_an_engine(
    code: CodeName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them, more slowly: test_ragged.py."""
    monkeypatch.setenv("SIXFOLD_BACKEND", "triton")
    check_each([sequence(n, 1, n, torch.float32) for n in (130, 9)], code, sliding_window=100)
