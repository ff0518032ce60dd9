"""What the engine's process really takes, once every block was written."""

from random import Random
from typing import Any

import pytest

from sixfold.cache.accounting import LayerShape
from sixfold.integrations.vllm.capacity import BlockCapacity, block_capacity
from tests.vllm.conftest import Job

pytestmark = pytest.mark.slow

LAYERS, KV_HEADS, DIM = 4, 2, 64
TOKENS, PROMPT, REQUESTS = 2**16, 2048, 4
MIB = 2**20
# What temporary tensors leave behind in the allocator, and pages of libraries that are first used.
NOISE = 8 * MIB
# Of a token in a list of this process's: a reference and a number.
LISTED = 8 + 28


def capacity(bits: int | None, memory: int) -> BlockCapacity:
    """As `sixfold plan --vllm` says it."""
    return block_capacity([LayerShape(KV_HEADS, DIM, DIM)] * LAYERS, bits, memory)


def beside_blocks() -> int:
    """What ours may take beside the blocks: raw pages, and the scratch of a prompt's attention."""
    token = 2 * DIM * KV_HEADS * 2
    raw = REQUESTS * (4 * 64 + 2 * 4) * token * LAYERS
    # The prompt's own keys and values, and what is copied of them on the way.
    scratch = 4 * PROMPT * token
    return raw + scratch


@pytest.fixture(scope="module")
def filled(job: Job) -> Any:
    def fill(bits: int | None, memory: int) -> Any:
        """Serve as many different prompts as there are blocks for, so that all are written."""
        order = Random(0)
        count = capacity(bits, memory).tokens // PROMPT
        # The last token is generated, and never stored.
        prompts = [[order.randrange(3, 1024) for _ in range(PROMPT - 1)] for _ in range(count)]
        found = job(
            {"prompts": prompts, "max_tokens": 1},
            kv_cache_memory_bytes=memory,
            block_size=128,
            max_num_seqs=REQUESTS,
            max_num_batched_tokens=PROMPT,
            **({} if bits is None else {"attention_backend": f"SIXFOLD_{bits}BIT"}),
        )
        assert found["capacity"] == capacity(bits, memory).tokens
        return found

    return fill


def test_memory_shrinks_as_the_blocks_do(filled: Any) -> None:
    """The same tokens in fewer bytes, and more tokens in the same; all else is alike."""
    memory = TOKENS * 4 * DIM * KV_HEADS * LAYERS
    block = capacity(4, memory).block_bytes
    less = TOKENS // 128 * block
    plain, same_tokens, same_bytes = filled(None, memory), filled(4, less), filled(4, memory)
    assert plain["capacity"] == same_tokens["capacity"] == TOKENS
    assert same_bytes["capacity"] > 3.7 * TOKENS
    resident = {
        name: found["resident"]
        for name, found in (
            ("uncompressed", plain),
            ("4 bits, same tokens", same_tokens),
            ("4 bits, same bytes", same_bytes),
        )
    }
    print({name: [round(x / MIB, 1) for x in both] for name, both in resident.items()})
    started, ended = zip(*resident.values(), strict=True)
    # vLLM writes zeros to all blocks when it starts: they are there from then on.
    assert abs(started[0] - started[1] - (memory - less)) < NOISE
    saved, added = ended[0] - ended[1], ended[2] - ended[0]
    assert memory - less - beside_blocks() - NOISE < saved < memory - less + NOISE
    prompts = (same_bytes["capacity"] - TOKENS) * LISTED
    assert -block - NOISE < added - prompts < beside_blocks() + NOISE
