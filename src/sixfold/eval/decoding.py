"""Time and memory of generating one token at a time through a filled cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sixfold.eval.caches import MakeCache, held_bytes
from sixfold.eval.progress import Progress, Steps, no_progress
from sixfold.eval.timing import Case, Contender, Quartiles, measure
from sixfold.integrations.transformers.keyword import cache_argument


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """What a cache costs while it generates.

    Attributes:
        tokens: Tokens in the cache when timing began.
        nbytes: Bytes it then held.
        step: Seconds a generated token.
    """

    tokens: int
    nbytes: int
    step: Quartiles

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second, by the median step."""
        return 1 / self.step.median


def decode_costs(
    model: PreTrainedModel,
    context: Int[Tensor, " tokens"],
    caches: Mapping[str, MakeCache],
    *,
    steps: int = 32,
    progress: Progress = no_progress,
) -> dict[str, DecodeCost]:
    """Fill every cache with the same context, then let them generate in turn.

    Args:
        model: A causal language model.
        context: Token ids of the prefill.
        caches: What to measure, by name.
        steps: Tokens timed, after two that are not.
        progress: Called after every prefill.
    """
    contenders, nbytes = [], {}
    prefills = Steps(progress, len(caches))
    for name, make_cache in caches.items():
        cache = make_cache(model)
        _forward(model, context, cache)
        nbytes[name] = held_bytes(cache)
        contenders.append(Contender(name, partial(_forward, model, context[-1:], cache)))
        prefills.done(name)
    rows = measure(Case(contenders), repeats=steps)
    return {row.name: DecodeCost(len(context), nbytes[row.name], row.seconds) for row in rows}


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: Int[Tensor, " tokens"], cache: Cache) -> None:
    ids = ids[None].to(model.device)
    model(input_ids=ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
