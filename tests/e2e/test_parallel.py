"""Models whose weights are shared out among processes: each has a cache of what it computes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from sixfold import TurboQuantCache
from tests.e2e.decoding import batch, continue_decoding, forward, relative_error
from tests.e2e.models import fresh_model

PROCESSES = 2
DATA = batch((200,), steps=6)


def in_tensor_parallel(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()


def fully_sharded(folder: str) -> PreTrainedModel:
    from torch.distributed.fsdp import fully_shard

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def through_a_file(cache: TurboQuantCache, model: PreTrainedModel, path: Path) -> TurboQuantCache:
    cache.save(path)
    return TurboQuantCache.load(path, model)


def filled(cache: Any, model: PreTrainedModel) -> Any:
    forward(model, cache, DATA, 0, DATA.prompt)
    return cache


def one_of_them(rank: int, make: Any, folder: str, expected: Tensor) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    model = make(folder)
    cache = filled(TurboQuantCache.for_model(model, bits=8, fit_tokens=0), model)
    dense = filled(DynamicCache(config=model.config), model)
    pinned = TurboQuantCache.for_model(model, bits=8, key_map=cache.key_maps())
    for each in (
        through_a_file(cache, model, Path(folder) / f"cache-{rank}"),
        cache,
        TurboQuantCache.from_cache(dense, model, bits=8, fit_tokens=0),
        filled(pinned, model),
    ):
        assert relative_error(continue_decoding(model, each, DATA), expected) < 0.05
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("make", [in_tensor_parallel, fully_sharded])
def test_a_cache_in_each_process(make: Any, tmp_path: Path) -> None:
    if make is in_tensor_parallel:
        pytest.importorskip("accelerate", reason="transformers asks for it where there is a plan")
    elif not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch has no FSDP2 on CPUs")
    model = fresh_model("llama-64")
    model.save_pretrained(tmp_path)
    expected = continue_decoding(model, filled(DynamicCache(config=model.config), model), DATA)
    mp.spawn(one_of_them, (make, str(tmp_path), expected), nprocs=PROCESSES)
