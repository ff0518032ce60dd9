"""`sixfold generate`: text from any model through a compressed cache."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from sixfold.cli.common import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    TextOption,
    load_model,
    read_text,
)
from sixfold.cli.render import Output, human_bytes, waiting
from sixfold.errors import SixfoldError
from sixfold.eval import machine
from sixfold.eval.caches import (
    MakeCache,
    compressed,
    half_precision_bytes,
    held_bytes,
    uncompressed,
)
from sixfold.eval.long_context import WHY_TWO_NUMBERS, bits_per_value
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.integrations.transformers.summary import LONG_CONTEXT

GREEDY = {"do_sample": False}


class TimedStreamer(TextStreamer):
    """Streams text as it comes, or only notes when it came."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, visible: bool, on_first: Callable[[], None]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.visible, self.on_first = visible, on_first
        self.arrivals: list[float] = []

    def put(self, value: Any) -> None:
        """Take the prompt first, then one token at a time."""
        self.arrivals.append(time.perf_counter())
        if len(self.arrivals) == 2:
            self.on_first()
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is certain."""
        if self.visible:
            print(text, end="\n" if stream_end else "", flush=True)

    @property
    def tokens_per_second(self) -> float | None:
        """Speed from the first generated token on, prefill excluded; None for fewer than two."""
        steps = self.arrivals[1:]
        return (len(steps) - 1) / (steps[-1] - steps[0]) if len(steps) > 1 else None


@dataclass(frozen=True, slots=True)
class Run:
    """One generation; ratios are those of 16 bits per value to the bytes held."""

    cache: str
    text: str
    prompt_tokens: int
    new_tokens: int
    tokens_in_cache: int
    nbytes: int
    compression_ratio: float
    long_ratio: float
    tokens_per_second: float | None


def generate(
    model_name: ModelArgument,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    file: TextOption = None,
    bits: Annotated[float, typer.Option(help="Bits per value: 1 to 8, 2.5 or 3.5.")] = 4,
    key_bits: Annotated[float | None, typer.Option(help="Bits of the keys, if other.")] = None,
    value_bits: Annotated[float | None, typer.Option(help="Bits of the values, if other.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of sampling; 0 takes the most likely token.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of sampling, the same for every cache.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1; by default the GPU, if there is one.")
    ] = None,
    dtype: DtypeOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also run uncompressed.")] = False,
    json: JsonOption = None,
) -> None:
    """Continue a prompt and say how many bytes the cache took.

    With both --file and --prompt the prompt follows the text of the file. A chat model gets both as
    one message of its user with --chat.
    """
    output, text = Output(json), _prompt(prompt, file)
    model, tokenizer = load_model(model_name, None if dtype is None else dtype.torch, device)
    ids = _ids(tokenizer, text, chat).to(model.device)
    caches: dict[str, MakeCache] = {
        f"{bits:g} bits": compressed(bits, key_bits=key_bits, value_bits=value_bits)
    }
    if compare:
        caches["uncompressed"] = uncompressed
    visible = json != Path("-")
    runs = []
    for name, make in caches.items():
        if compare:
            output.say(f"--- {name}")
        torch.manual_seed(seed)
        run = _run(model, tokenizer, ids, name, make, max_new_tokens, visible, temperature)
        runs.append(run)
    output.table(
        f"{model_name}, {runs[0].prompt_tokens} prompt tokens",
        ["cache", "tokens held", "bytes held", "smaller", "at 32k", "tokens/s"],
        [_cells(run) for run in runs],
    )
    output.say(
        f"Smaller: bytes at 16 bits per value over bytes held, now and at {LONG_CONTEXT:,} tokens. "
        f"{WHY_TWO_NUMBERS}"
    )
    if tokenizer.chat_template is not None and not chat:
        output.say(
            "The model has a chat template, which --chat applies: without it answers suffer."
        )
    output.json({"model": model_name, "machine": machine.describe(), "runs": [*map(asdict, runs)]})


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is None and file is None:
        raise SixfoldError("give the text to continue by --prompt, by --file, or by both")
    parts = [*([] if file is None else [read_text(file)]), *([] if prompt is None else [prompt])]
    text = "\n\n".join(parts)
    if not text.strip():
        raise SixfoldError("the prompt is empty; give some text to continue")
    return text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> Int[Tensor, "1 tokens"]:
    if not chat:
        plain: Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
        return plain
    if tokenizer.chat_template is None:
        raise SixfoldError("this model has no chat template: leave out --chat")
    message = [{"role": "user", "content": text}]
    found: Any = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    chatted: Tensor = found["input_ids"]
    return chatted


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, "1 tokens"],
    name: str,
    make_cache: MakeCache,
    max_new_tokens: int,
    visible: bool,
    temperature: float,
) -> Run:
    cache, size = make_cache(model), ids.shape[1]
    sampling = {"do_sample": True, "temperature": temperature} if temperature else GREEDY
    with torch.no_grad(), waiting(f"reading {size:,} tokens") as stop:
        streamer = TimedStreamer(tokenizer, visible, stop)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(cache),
            max_new_tokens=max_new_tokens,
            **sampling,
            streamer=streamer,
        )
    new = out[0, size:]
    return Run(
        cache=name,
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        prompt_tokens=size,
        new_tokens=len(new),
        tokens_in_cache=int(cache.get_seq_length()),
        nbytes=held_bytes(cache),
        compression_ratio=half_precision_bytes(cache) / held_bytes(cache),
        long_ratio=16 / bits_per_value(model.config, cache),
        tokens_per_second=streamer.tokens_per_second,
    )


def _cells(run: Run) -> list[str]:
    speed = "-" if run.tokens_per_second is None else f"{run.tokens_per_second:.1f}"
    return [
        run.cache,
        str(run.tokens_in_cache),
        human_bytes(run.nbytes),
        f"{run.compression_ratio:.2f}x",
        f"{run.long_ratio:.2f}x",
        speed,
    ]
