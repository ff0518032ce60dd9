"""What vLLM does with an attention backend, on tensors of a test: requests, blocks, metadata.

On a GPU metadata is on two sides: query starts and lengths on the host, block tables on the device
only, batches padded for graphs. Nothing here needs one.
"""

import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from sixfold.cache.fill import Fill
from sixfold.integrations.vllm import beside, metadata
from sixfold.integrations.vllm import impl as impl_module
from sixfold.integrations.vllm.backend import Sixfold8Bit
from sixfold.integrations.vllm.names import token_nbytes
from sixfold.packing import PAGE_TOKENS

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 64, 2


def configuration(requests: int = 8, **sixfold: Any) -> Any:
    """Of vLLM, as far as the backend reads it."""
    return SimpleNamespace(
        additional_config={"sixfold": sixfold},
        speculative_config=None,
        kv_transfer_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=requests, max_num_batched_tokens=512),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1),
        cache_config=SimpleNamespace(),
        model_config=SimpleNamespace(dtype=torch.float32, is_hybrid=False, max_model_len=1024),
    )


@dataclass
class Request:
    """Queries, keys and values of all its tokens in each layer, and its blocks."""

    vectors: list[tuple[Tensor, Tensor, Tensor]]
    done: int = 0
    blocks: list[int] = field(default_factory=list)


def request(tokens: int, seed: int, prefix: "Request | None" = None, shared: int = 0) -> Request:
    """One of random vectors; the first `shared` tokens are those of another."""
    generator = torch.Generator().manual_seed(seed)
    vectors = [
        (
            torch.randn(tokens, HEADS, DIM, generator=generator),
            torch.randn(tokens, KV_HEADS, DIM, generator=generator),
            torch.randn(tokens, KV_HEADS, DIM, generator=generator),
        )
        for _ in range(LAYERS)
    ]
    if prefix is not None:
        for own, other in zip(vectors, prefix.vectors, strict=True):
            for x, y in zip(own, other, strict=True):
                x[:shared] = y[:shared]
    return Request(vectors)


class Engine:
    """Runs steps of requests through the builder and every layer.

    Attributes:
        builder: Of the backend.
        device: Where tensors of the model are.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        kernel: Any,
        *,
        gpu: bool = True,
        fake: Any = None,
        blocks: int = 64,
        padding: int = 2,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        config: Any = None,
    ) -> None:
        """With this kernel for prompts, and memory as on a GPU or a CPU.

        With a `FakeGpu` tensors of the device are those of a GPU, without data.
        """
        self.device = torch.device("cpu" if fake is None else "cuda:0")
        self.padding, self.mode = padding, fake or contextlib.nullcontext()
        self.host: list[list[int]] = []
        if fake is not None:
            # What a copy of a real table would give.
            patch.setattr(metadata, "host_table", lambda table: self.host[: len(table)])
            # Where memory is, and what a table says, cannot be asked of tensors without data.
            patch.setattr(impl_module, "overlap", lambda one, other: "none")
            patch.setattr(Fill, "blocks", property(lambda fill: [*range(len(fill.beginning))]))
        config = config or configuration()
        self.impls = [
            Sixfold8Bit.impl(
                HEADS,
                DIM,
                DIM**-0.5,
                KV_HEADS,
                sliding_window=window,
                logits_soft_cap=softcap,
                sinks=sinks,
            )
            for _ in range(LAYERS)
        ]
        layers = {f"layers.{i}": SimpleNamespace(impl=impl) for i, impl in enumerate(self.impls)}
        of = beside.Beside.of
        sizes = SimpleNamespace(of=lambda config, options, gpu: of(config, options, gpu=kind))
        kind = gpu
        patch.setattr(metadata, "Beside", sizes)
        patch.setattr(metadata, "kernel", lambda impls, config, device: kernel)
        patch.setattr(metadata, "announce", lambda *_: None)
        patch.setattr(metadata, "uncompressed", lambda config: [])
        patch.setattr(metadata, "get_layers_from_vllm_config", lambda *_: layers)
        self.names, self.config = [*layers], config
        self.build()
        content = PAGE_TOKENS * token_nbytes(8, DIM, DIM) // PAGE_TOKENS
        shape = (blocks, KV_HEADS, PAGE_TOKENS, content)
        self.caches = [self.place(torch.zeros(shape, dtype=torch.uint8)) for _ in range(LAYERS)]
        order = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(0)) + 1
        self.free = order.tolist()

    def build(self) -> None:
        """A builder, which opens all layers."""
        spec = SimpleNamespace(head_size_v=DIM)
        with self.mode:
            self.builder = metadata.SixfoldMetadataBuilder(
                spec, self.names, self.config, self.device
            )

    def place(self, x: Tensor) -> Tensor:
        """On the device."""
        if self.device.type == "cpu":
            return x
        placed: Tensor = self.mode.place(x)
        return placed

    def common(self, running: list[tuple[Request, int]]) -> CommonAttentionMetadata:
        """What vLLM tells of a step, before it counts its tokens as done."""
        new = [count for _, count in running]
        lengths = [one.done + count for one, count in running]
        for (one, _), length in zip(running, lengths, strict=True):
            while len(one.blocks) * PAGE_TOKENS < length:
                one.blocks.append(self.free.pop())
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
        starts = torch.cat([starts, starts[-1:].expand(self.padding)])
        batch = len(running) + self.padding
        table = torch.zeros(batch, 16, dtype=torch.int32)
        for row, (one, _) in zip(table, running, strict=False):
            row[: len(one.blocks)] = torch.tensor(one.blocks, dtype=torch.int32)
        self.host = table.tolist()
        seq_lens = torch.tensor(lengths + [0] * self.padding, dtype=torch.int32)
        tokens = sum(new) + self.padding
        return CommonAttentionMetadata(
            query_start_loc=self.place(starts),
            query_start_loc_cpu=starts,
            seq_lens=self.place(seq_lens),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=batch,
            num_actual_tokens=tokens,
            max_query_len=max(new),
            max_seq_len=max(lengths),
            block_table_tensor=self.place(table),
            slot_mapping=self.place(torch.zeros(tokens, dtype=torch.int64)),
        )

    def inputs(self, running: list[tuple[Request, int]], layer: int) -> list[Tensor]:
        """Packed vectors of the new tokens, and of padding that is anything."""
        found = []
        for i in range(3):
            parts = [one.vectors[layer][i][one.done : one.done + n] for one, n in running]
            junk = torch.full((self.padding, *parts[0].shape[1:]), torch.nan)
            found.append(self.place(torch.cat([*parts, junk])))
        return found

    def step(self, running: list[tuple[Request, int]]) -> list[list[Tensor]]:
        """Outputs of every request's new tokens, in every layer."""
        common = self.common(running)
        with self.mode:
            built = self.builder.build(0, common)
        found: list[list[Tensor]] = [[] for _ in running]
        for layer, (impl, cache) in enumerate(zip(self.impls, self.caches, strict=True)):
            query, keys, values = self.inputs(running, layer)
            out = self.place(torch.full(query.shape, torch.nan))
            with self.mode, self.watch(layer):
                impl.forward(None, query, keys, values, cache, built, out)
            sizes = [count for _, count in running]
            with self.mode:
                outputs = out[: sum(sizes)].split(sizes)
            for own, x in zip(found, outputs, strict=True):
                own.append(x)
        for one, count in running:
            one.done += count
        return found

    def watch(self, layer: int) -> contextlib.AbstractContextManager[Any]:
        """Around the attention of a layer."""
        return contextlib.nullcontext()

    def end(self, one: Request, shared: int = 0) -> None:
        """Give back its blocks: vLLM tells the backend nothing of it."""
        self.free = one.blocks[shared:] + self.free
        one.blocks = []


def exact(
    one: Request,
    layer: int,
    first: int,
    count: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of tokens from `first` on, uncompressed, [tokens, heads, dim]."""
    query, keys, values = one.vectors[layer]
    query = query[first : first + count].double()
    keys, values = (
        x[: first + count].double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values)
    )
    logits = torch.einsum("qhd,khd->hqk", query, keys) * DIM**-0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rows, columns = torch.arange(first, first + count)[:, None], torch.arange(first + count)
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    logits = logits.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, count, 1)
        logits = torch.cat([logits, column], 2)
    weights = logits.softmax(2)[:, :, : first + count]
    return torch.einsum("hqk,khd->qhd", weights, values).float()
