"""Run every architecture of transformers, tiny and random, through a compressed cache.

    python -m tools.sweep_architectures --json docs/results/architectures.json

Each class runs in a process of its own, which may crash or hang without stopping the others.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.models.auto import modeling_auto

from sixfold import TurboQuantCache
from sixfold.errors import UnsupportedModelError
from sixfold.integrations.transformers.keyword import cache_argument
from tools.tiny import VOCAB, fill, tiny_arguments

# Two pages and 56 tokens, and a sequence with as much padding as a page; the eighth token decoded
# completes the third page.
PROMPTS = (184, 107)
STEPS = 12
BITS = 8
NO_WINDOWS: dict[str, Any] = {"sink_tokens": 0, "recent_window": 0, "fit_tokens": 0}
# Root mean square error of a vector at 8 bits (arXiv:2504.19874, theorem 1), and with it that of
# the 8-bit arithmetic of the fused kernels.
ERROR = (3**0.5 * torch.pi / 2 * 4**-BITS + 0.01**2) ** 0.5
# Errors of codes and this noise are of one size, not one draw: half as much again is no accident.
MARGIN = 1.5
# Wrong keys and values must miss the tolerance by this factor, or the comparison says nothing.
POWER = 5.0
SECONDS = 300
# Spreads of the attention logits, tried until the comparison says something.
GAINS = (1.5, 0.4)


class PerturbedCache(DynamicCache):
    """An uncompressed cache with an error of given size in every vector; prefill is exact."""

    def __init__(self, config: Any, error: float) -> None:
        super().__init__(config=config)
        self.error = error
        self.generator = torch.Generator().manual_seed(3)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store tokens with their errors; return them without on the first call."""
        noisy = self._noisy(key_states), self._noisy(value_states)
        held = super().update(*noisy, *args, **kwargs)
        return (key_states, value_states) if key_states.shape[2] > 1 else held

    def _noisy(self, x: Tensor) -> Tensor:
        size = x.square().mean(-1, keepdim=True).sqrt()
        return x + self.error * size * torch.randn(x.shape, generator=self.generator)


def architectures() -> dict[str, str]:
    """Class → model type, of every causal language model and image-text-to-text model."""
    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    classes = {name: model_type for model_type, name in [*images.items(), *text.items()]}
    return dict(sorted(classes.items()))


def build(model_type: str, class_name: str, gain: float) -> PreTrainedModel:
    """A tiny random model with attention logits of spread `gain`.

    Raises:
        Exception: Whatever the last config that was tried raised.
    """
    cls = getattr(transformers, class_name)
    config_class = cls.config_class or transformers.CONFIG_MAPPING[model_type]
    failure: Exception | None = None
    for arguments in tiny_arguments(config_class):
        try:
            config = config_class(**arguments)
            if class_name.endswith(("LMHeadModel", "ForCausalLM", "Decoder")):
                config.is_decoder = True
            config._attn_implementation = "eager"
            torch.manual_seed(0)
            model: PreTrainedModel = cls(config).eval()
            for path, parameter in model.named_parameters():
                fill(path, parameter.data, gain)
            decode(model, DynamicCache(config=model.config), steps=1)
            return model
        except Exception as error:
            # Of the first, smallest config: later ones are guesses.
            failure = failure or error
    assert failure is not None
    raise failure


@torch.no_grad()
def decode(model: PreTrainedModel, cache: Cache, steps: int = STEPS) -> Tensor:
    """Logits of a left-padded batch's continuation, a token at a time, after a prefill."""
    longest, total = max(PROMPTS), max(PROMPTS) + steps
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (len(PROMPTS), longest + STEPS), generator=generator)[:, :total]
    mask = (torch.arange(total) >= longest - torch.tensor(PROMPTS)[:, None]).long()
    ids = ids.masked_fill(mask == 0, 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    for start, stop in [(0, longest), *((i, i + 1) for i in range(longest, total))]:
        out = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            **cache_argument(cache),
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
    return torch.stack(logits[1:], 1).float()


def check(model_type: str, class_name: str) -> Iterator[dict[str, Any]]:
    """What becomes of one architecture, better known with every row; never raises."""
    row: dict[str, Any] = {"model_type": model_type, "class": class_name}
    for gain in GAINS:
        try:
            model = build(model_type, class_name, gain)
        except Exception as error:
            yield {**row, "status": "not built", "reason": _said(error)}
            return
        yield {**row, "status": "failed", "reason": "the process died or hung once it was built"}
        try:
            result = compare(model)
        except UnsupportedModelError as error:
            result = {"status": "refused", "reason": _said(error)}
        except Exception as error:
            result = {"status": "failed", "reason": _said(error)}
        yield {**row, **result}
        if result["status"] != "undecided":
            return


def compare(model: PreTrainedModel) -> dict[str, Any]:
    """Errors of both modes beside the tolerance, and the status that follows.

    Raises:
        UnsupportedModelError: Sixfold refuses the model.
    """
    plain = TurboQuantCache(model.config, BITS, **NO_WINDOWS)
    reference = DynamicCache(config=model.config)
    expected = decode(model, reference)
    if not any(getattr(layer, "is_initialized", True) for layer in reference.layers):
        return {"status": "not built", "reason": "the model does not use the cache it is given"}

    def missed(cache: Cache) -> float:
        return float((decode(model, cache) - expected).norm() / expected.norm())

    tolerance = MARGIN * missed(PerturbedCache(model.config, ERROR))
    row: dict[str, Any] = {"tolerance": tolerance}
    row["wrong_keys"] = missed(PerturbedCache(model.config, 1.0))
    row["dequantized_error"] = missed(plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused = TurboQuantCache.for_model(model, BITS, **NO_WINDOWS)
    row["warnings"] = [str(w.message) for w in caught]
    layers = fused.compressed_layers
    row["layers"] = {"all": len(fused), "compressed": len(layers)}
    row["layers"]["fused"] = sum(layer.fused for layer in layers)
    row["fused_error"] = missed(fused)
    encoded = [layer.store is not None and layer.store.history.tokens for layer in layers]
    worst = max(row["fused_error"], row["dequantized_error"])
    row["status"] = _status(fused, worst, row)
    if not all(encoded):
        row |= {"status": "failed", "reason": f"pages of each layer after decoding: {encoded}"}
    return row


def _status(cache: TurboQuantCache, worst: float, row: dict[str, Any]) -> str:
    if not worst <= row["tolerance"]:
        return "wrong"
    if row["wrong_keys"] < POWER * row["tolerance"]:
        return "undecided"
    if cache.fused:
        return "fused"
    return "partly fused" if row["layers"]["fused"] else "dequantized"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def sweep(chosen: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One row for every architecture, each checked in a process of its own."""
    context = multiprocessing.get_context("fork")
    for class_name, model_type in chosen.items():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, model_type, class_name))
        process.start()
        sender.close()
        row = {"model_type": model_type, "class": class_name, "status": "not built"}
        row["reason"] = f"the process died, or was not ready after {SECONDS} s"
        # The worker closes its end when it has no more to say.
        with contextlib.suppress(EOFError):
            while receiver.poll(SECONDS):
                row = receiver.recv()
        process.kill()
        process.join()
        yield row


def _work(sender: Any, model_type: str, class_name: str) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123
    for row in check(model_type, class_name):
        sender.send(row)


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweep, print a line for each architecture, and write all of them to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--only", help="classes or model types, separated by commas")
    options = parser.parse_args(arguments)
    known = architectures()
    only = options.only.split(",") if options.only else list(known)
    chosen = {name: kind for name, kind in known.items() if name in only or kind in only}
    transformers.logging.set_verbosity_error()
    rows = []
    for row in sweep(chosen):
        rows.append(row)
        errors = [f"{row[k]:.1e}" for k in _ERRORS if k in row]
        print(row["class"], row["status"], *errors, row.get("reason", ""), flush=True)
    document = {"transformers": transformers.__version__, "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


_ERRORS = ("fused_error", "dequantized_error", "tolerance", "wrong_keys")

if __name__ == "__main__":
    main()
