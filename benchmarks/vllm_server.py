"""Runs vLLM's CPU attention where vLLM is installed: a script for another interpreter.

Started by `vllm_peer`, which sends one line a request and reads one line back. It reads queries,
keys and values from a file and knows nothing of this project: it must not import it.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

BLOCK = 128


def attention(
    tensors: dict[str, torch.Tensor], stored: str
) -> tuple[Callable[[], torch.Tensor], str]:
    """The call to time, and the kernel that vLLM would choose on this processor.

    `stored` is what vLLM calls the dtype of the cache: auto (bfloat16) or fp8_e4m3.

    Only vLLM's compiled operators are loaded, as `vllm.v1.attention.backends.cpu_attn` uses them.
    """
    import vllm._custom_ops as ops

    query, keys, values = (tensors[name][0] for name in ("query", "keys", "values"))
    heads, kv_heads, tokens, dim = query.shape[0], *keys.shape
    # As vLLM chooses; tiles must be asked for before the first use.
    isa = "amx" if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else "vec"
    blocks = -(-tokens // BLOCK)
    dtype = torch.bfloat16 if stored == "auto" else torch.uint8
    cache = torch.zeros(blocks, kv_heads, 2 * BLOCK, dim, dtype=dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    slots = torch.arange(tokens)
    new = [x.transpose(0, 1).contiguous() for x in (keys, values)]
    ops.cpu_attn_reshape_and_cache(*new, key_cache, value_cache, slots, isa, kv_cache_dtype=stored)
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [tokens]))
    scheduled = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        seq_lens=lengths,
        dtype=torch.bfloat16,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
        kv_cache_dtype=stored,
    )
    rows = query.transpose(0, 1).contiguous()
    out = torch.empty_like(rows)
    table = torch.arange(blocks, dtype=torch.int32)[None]
    fixed: dict[str, Any] = {
        "query": rows,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "output": out,
        "query_start_loc": starts,
        "seq_lens": lengths,
        "scale": dim**-0.5,
        "causal": True,
        "alibi_slopes": None,
        "sliding_window": -1,
        "block_table": table,
        "softcap": 0.0,
        "scheduler_metadata": scheduled,
        "s_aux": None,
        "kv_cache_dtype": stored,
    }

    def call() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(**fixed)
        return out.transpose(0, 1)[None]

    return call, isa


def main() -> None:
    """Answer requests: `load FILE THREADS DTYPE`, `time`, `result FILE`; end with the input."""
    # Libraries print as they please: answers have a stream of their own.
    answers, sys.stdout = sys.stdout, sys.stderr
    call: Callable[[], torch.Tensor] | None = None
    for line in sys.stdin:
        verb, *words = line.split()
        if verb == "load":
            torch.set_num_threads(int(words[1]))
            tensors = torch.load(words[0], weights_only=True)
            # The layer before, as every contender has one: its cache is another.
            (call, isa), (lead, _) = (attention(tensors, words[2]) for _ in range(2))
            answer: dict[str, Any] = {"isa": isa}
        elif verb == "time":
            assert call is not None
            lead()
            start = time.perf_counter()
            call()
            answer = {"seconds": time.perf_counter() - start}
        else:
            assert call is not None
            torch.save(call().clone(), words[0])
            answer = {}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
