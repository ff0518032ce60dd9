"""`sixfold demo`: what each bit width costs and saves, on the model inside the package."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sixfold.cli.common import (
    BitsOption,
    JsonOption,
    PlotOption,
    TextOption,
    load_model,
    parse_bits,
    read_text,
)
from sixfold.cli.render import Output, human_bytes, progress_bar
from sixfold.eval import embedded, machine, plot
from sixfold.eval.caches import MakeCache, compressed, uncompressed
from sixfold.eval.decoding import DecodeCost, decode_costs
from sixfold.eval.niah import Retrieval, retrieve
from sixfold.eval.perplexity import CacheComparison, compare_caches, windows_of

NEEDLES, WINDOW, PREFILL = 7, 1024, 512
UNCOMPRESSED = "16"
_COLUMNS = ("bits", "needles", "perplexity", "KL, nats", "top-1", "held", "ratio", "tok/s")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; KL and agreement compare with the uncompressed cache."""

    bits: float
    needles_asked: int
    needles_exact: int
    perplexity: float
    kl: float
    kl_half_width: float | None
    kl_p99: float
    top1_agreement: float
    nbytes: int
    compression_ratio: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Workload:
    """The text, and how much is asked about it."""

    text: str
    windows: Tensor
    context: int
    documents: int


def demo(
    bits: BitsOption = "4,3.5,3,2.5,2",
    file: TextOption = None,
    json: JsonOption = None,
    plot_file: PlotOption = None,
    context: Annotated[int, typer.Option(min=256, help="Tokens of a needle document.")] = 2048,
    documents: Annotated[
        int, typer.Option(min=1, help=f"Needle documents; each hides {NEEDLES} needles.")
    ] = 8,
    windows: Annotated[
        int, typer.Option(min=1, help=f"Windows of {WINDOW} tokens for perplexity, at most.")
    ] = 6,
) -> None:
    """Hide needles in a long text and find them again, uncompressed and at every bit width."""
    output, widths, text = Output(json), parse_bits(bits), read_text(file)
    model, tokenizer = load_model(embedded.NAME)
    ids = windows_of(tokenizer, text, WINDOW, windows)
    start = time.perf_counter()
    rows = _measure(model, tokenizer, widths, Workload(text, ids, context, documents))
    seconds = time.perf_counter() - start
    title = f"KV cache of {context} tokens; 16 bits is the uncompressed one"
    output.table(title, _COLUMNS, [_cells(row) for row in rows])
    output.say(_closing(rows, context, ids, seconds))
    output.json(
        {
            "context": context,
            "text": file.name if file else "built in",
            "perplexity_windows": list(ids.shape),
            "seconds": round(seconds, 1),
            "machine": machine.describe(),
            "rows": [asdict(row) for row in rows],
        }
    )
    if plot_file is not None:
        _draw(rows, plot_file)


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    widths: Sequence[float],
    work: Workload,
) -> list[Row]:
    """Every number of the table; the uncompressed cache comes first."""
    lossy: dict[str, MakeCache] = {f"{width:g}": compressed(width) for width in widths}
    caches: dict[str, MakeCache] = {UNCOMPRESSED: uncompressed, **lossy}
    with progress_bar("finding needles") as progress:
        found = retrieve(
            model,
            tokenizer,
            work.text,
            caches,
            lengths=[work.context],
            depths=[index / (NEEDLES - 1) for index in range(NEEDLES)],
            documents=work.documents,
            progress=progress,
        )
    with progress_bar("reading text") as progress:
        compared = compare_caches(model, work.windows, lossy, prefill=PREFILL, progress=progress)
    with progress_bar("timing") as progress:
        repeats = math.ceil(work.context / work.windows.numel())
        context = work.windows.flatten().repeat(repeats)[: work.context]
        costs = decode_costs(model, context, caches, progress=progress)
    plain = costs[UNCOMPRESSED]
    first = _plain_row(found[UNCOMPRESSED], next(iter(compared.values())), plain)
    return [first, *(_row(n, found[n], compared[n], costs[n], plain.nbytes) for n in lossy)]


def _plain_row(found: Retrieval, compared: CacheComparison, cost: DecodeCost) -> Row:
    return Row(
        bits=float(UNCOMPRESSED),
        needles_asked=found.asked,
        needles_exact=found.exact,
        perplexity=compared.uncompressed_perplexity,
        kl=0.0,
        kl_half_width=None,
        kl_p99=0.0,
        top1_agreement=1.0,
        nbytes=cost.nbytes,
        compression_ratio=1.0,
        tokens_per_second=cost.tokens_per_second,
    )


def _row(
    bits: str, found: Retrieval, compared: CacheComparison, cost: DecodeCost, plain_bytes: int
) -> Row:
    return Row(
        bits=float(bits),
        needles_asked=found.asked,
        needles_exact=found.exact,
        perplexity=compared.perplexity,
        kl=compared.kl.mean,
        kl_half_width=compared.kl.half_width,
        kl_p99=compared.kl_p99,
        top1_agreement=compared.top1_agreement.mean,
        nbytes=cost.nbytes,
        compression_ratio=plain_bytes / cost.nbytes,
        tokens_per_second=cost.tokens_per_second,
    )


def _cells(row: Row) -> list[str]:
    error = f" ± {row.kl_half_width:.4f}" if row.kl_half_width is not None else ""
    plain = row.bits == float(UNCOMPRESSED)
    return [
        f"{row.bits:g}",
        f"{row.needles_exact}/{row.needles_asked}",
        f"{row.perplexity:.3f}",
        "-" if plain else f"{row.kl:.4f}{error}",
        "-" if plain else f"{row.top1_agreement:.1%}",
        human_bytes(row.nbytes),
        f"{row.compression_ratio:.2f}x",
        f"{row.tokens_per_second:.0f}",
    ]


def _closing(rows: Sequence[Row], context: int, windows: Tensor, seconds: float) -> str:
    """Say what was measured, on what, and what it does not show."""
    return (
        f"Measured in {seconds:.0f} s on {machine.one_line()}, in bfloat16. "
        f"Needles: {rows[0].needles_asked} numbers of five digits hidden in texts of {context} "
        f"tokens, all digits right under greedy decoding. Perplexity, KL and top-1: "
        f"{len(windows)} windows of {windows.shape[1]} tokens, scored after the first {PREFILL}, "
        "history read from the codes; KL is from the uncompressed model, ± half a 95 % interval "
        "over windows. Bytes: every tensor held after the prefill, the full-precision first and "
        "last tokens and all tables included, which weigh the more the shorter the context. "
        "Limits: the model is tiny (a few million parameters), so quality on large ones must be "
        "measured on them; tokens/s is the whole model's, on the kernels `sixfold doctor` names."
    )


def _draw(rows: Sequence[Row], path: Path) -> None:
    names = [f"{row.bits:g}" for row in rows]
    figure, axes = plot.new_figure(4, width=3.4)
    needles = {n: 100 * r.needles_exact / r.needles_asked for n, r in zip(names, rows, strict=True)}
    kl = {n: r.kl for n, r in zip(names[1:], rows[1:], strict=True)}
    ratio = {n: r.compression_ratio for n, r in zip(names, rows, strict=True)}
    speed = {n: r.tokens_per_second for n, r in zip(names, rows, strict=True)}
    plot.bars(axes[0], "needles found exactly, %", needles, "{:.0f}")
    plot.bars(axes[1], "KL to uncompressed, nats", kl, "{:.4f}")
    plot.bars(axes[2], "compression, x", ratio, "{:.2f}")
    plot.bars(axes[3], "tokens/s", speed, "{:.0f}")
    for axis in axes:
        axis.set_xlabel("bits a value (16: uncompressed)")
    plot.save(figure, path, "the model inside the package")
