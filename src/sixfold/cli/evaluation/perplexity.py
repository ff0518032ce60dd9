"""`sixfold eval perplexity`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from sixfold.cli.common import (
    INTERRUPTED,
    BitsOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    PlotOption,
    ResumeOption,
    TextOption,
    checkpoint,
    load_model,
    parse_bits,
    read_text,
)
from sixfold.cli.evaluation.contenders import UNCOMPRESSED, AgainstOption, contenders, label
from sixfold.cli.render import Output, progress_bar
from sixfold.eval import embedded, machine, plot
from sixfold.eval.estimate import Estimate
from sixfold.eval.long_context import WHY_TWO_NUMBERS, bits_per_value
from sixfold.eval.perplexity import CacheComparison, compare_caches, windows_of
from sixfold.integrations.transformers.summary import LONG_CONTEXT

_COLUMNS = ("cache", "bits (here)", "ppl", "change", "mean KL", "99% KL", "top-1")
FEW_WINDOWS = 4


def perplexity(
    model_name: ModelArgument = embedded.NAME,
    file: TextOption = None,
    bits: BitsOption = "4,3.5,3,2.5,2",
    against: AgainstOption = "",
    window: Annotated[int, typer.Option(min=4, help="Tokens of a window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows, at most.")] = 8,
    prefill: Annotated[
        int | None, typer.Option(min=1, help="Tokens not scored; half a window by default.")
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens a forward pass after that.")] = 64,
    dtype: DtypeOption = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Attend on dequantized tensors, not on the codes.")
    ] = False,
    resume: ResumeOption = None,
    json: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Perplexity and KL to the uncompressed model, with the history read from codes.

    Rows are sorted by the bits held per value of 32,768 tokens, windows and scales included; ± is
    half a 95% interval of the mean over windows, and changes are paired window by window. Ctrl-C
    ends it with the windows that are complete.
    """
    asked_for = {**locals()}
    output, text = Output(json), read_text(file)
    caches = contenders(parse_bits(bits), against, fused=not dequantize)
    model, tokenizer = load_model(model_name, None if dtype is None else dtype.torch)
    ids = windows_of(tokenizer, text, window, windows)
    with progress_bar("reading text") as progress:
        found = compare_caches(
            model,
            ids,
            caches,
            prefill=prefill or window // 2,
            chunk=chunk,
            progress=progress,
            checkpoint=checkpoint(resume, "perplexity", asked_for, model, text),
            partial=True,
        )
    bits_long = {name: bits_per_value(model.config, make(model)) for name, make in caches.items()}
    ranked = sorted(found.items(), key=lambda row: -bits_long[row[0]])
    first = ranked[0][1]
    exact = [label(UNCOMPRESSED), "16.00", f"{first.uncompressed_perplexity:.3f}"]
    output.table(
        f"{model_name}: {first.scored_tokens} tokens in {first.windows} windows of {window}",
        _COLUMNS,
        [[*exact, *["-"] * 4], *(_cells(name, one, bits_long[name]) for name, one in ranked)],
    )
    output.say(f"Bits: per value of {LONG_CONTEXT:,} tokens (of this run). {WHY_TWO_NUMBERS}")
    for note in _doubts(first.windows, len(ids), windows):
        output.say(note)
    asked = {
        "window": window,
        "prefill": prefill or window // 2,
        "chunk": chunk,
        "text": file.name if file else "built in",
        "long_context": LONG_CONTEXT,
    }
    rows = {name: {"bits_long": bits_long[name], **one.to_dict()} for name, one in ranked}
    described = {"model": model_name, "dtype": str(model.dtype).removeprefix("torch.")}
    output.json({**described, "machine": machine.describe(), "asked": asked, "rows": rows})
    if plot_file is not None:
        _draw(model_name, found, bits_long, plot_file)
    if first.windows < len(ids):
        raise typer.Exit(INTERRUPTED)


def _doubts(read: int, found: int, asked: int) -> Iterator[str]:
    """What a reader of few windows should know."""
    if read < found:
        yield f"Stopped after {read} of {found} windows."
    if found < asked:
        yield f"The text holds {found} of the {asked} windows asked for: give a longer --file."
    if read < FEW_WINDOWS:
        yield f"Intervals of fewer than {FEW_WINDOWS} windows say little."


def _cells(name: str, one: CacheComparison, bits_long: float) -> list[str]:
    return [
        label(name),
        f"{bits_long:.2f} ({one.bits_per_value:.2f})",
        f"{one.perplexity:.3f}",
        _plus_minus(one.perplexity_change, "+.2%"),
        _plus_minus(one.kl, ".4f"),
        f"{one.kl_p99:.4f}",
        f"{one.top1_agreement.mean:.1%}",
    ]


def _plus_minus(estimate: Estimate, form: str) -> str:
    half = estimate.half_width
    # The sign of a mean says nothing about its interval; no spaces, to fit 80 columns.
    return f"{estimate.mean:{form}}" + (f"±{half:{form.lstrip('+')}}" if half is not None else "")


def _draw(
    model_name: str,
    found: Mapping[str, CacheComparison],
    bits_long: Mapping[str, float],
    path: Path,
) -> None:
    figure, axes = plot.new_figure(1, width=7, height=5)
    points = {label(name): (bits_long[name], one.kl.mean) for name, one in found.items()}
    ours = {label(name) for name in found if label(name) != name}
    title = f"{Path(model_name).name}: KL to uncompressed, nats (lower left is better)"
    plot.scatter(axes[0], title, points, ours)
    axes[0].set(xlabel=f"bits per value at {LONG_CONTEXT:,} tokens, everything held")
    if any(kl > 0 for _, kl in points.values()):
        axes[0].set_yscale("log")
    plot.save(figure, path)
