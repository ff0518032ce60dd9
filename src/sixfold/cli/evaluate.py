"""`sixfold eval`: distortion, perplexity and needle retrieval."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, cast

import typer

from sixfold.cli import plot
from sixfold.cli.common import (
    BitsOption,
    JsonOption,
    ModelArgument,
    PlotOption,
    TextOption,
    load_model,
    parse_bits,
    parse_list,
    read_text,
)
from sixfold.cli.render import Output, human_bytes, progress_bar
from sixfold.eval import embedded, machine
from sixfold.eval.caches import MakeCache, compressed, uncompressed
from sixfold.eval.distortion import METHODS, Distortion, Method, measure_distortion
from sixfold.eval.niah import Retrieval, retrieve
from sixfold.eval.perplexity import CacheComparison, Estimate, compare_caches, windows_of

_DISTORTION_COLUMNS = (
    *("method", "dim", "bits", "held", "MSE", "theory", "paper"),
    *("IP·dim", "paper", "bias"),
)

app = typer.Typer(help="Measure the quantizers and the compressed cache.", no_args_is_help=True)


@app.command()
def distortion(
    dims: Annotated[str, typer.Option(help="Dimensions, separated by commas.")] = "64,128",
    bits: BitsOption = "1,2,2.5,3,3.5,4",
    methods: Annotated[
        str, typer.Option(help=f"Any of {', '.join(METHODS)}, separated by commas.")
    ] = ",".join(METHODS),
    vectors: Annotated[int, typer.Option(min=1, help="Vectors a measurement.")] = 4096,
    seed: int = 0,
    json: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Squared and inner-product error of the quantizers, beside theory and the paper."""
    output = Output(json)
    chosen = [cast(Method, name) for name in parse_list(methods, str, "--methods")]
    sizes, widths = parse_list(dims, int, "--dims"), parse_bits(bits)
    with progress_bar("quantizing") as progress:
        found = measure_distortion(
            sizes, widths, methods=chosen, vectors=vectors, seed=seed, progress=progress
        )
    output.table(
        "Errors on unit vectors; IP: inner products with queries at 60 degrees",
        _DISTORTION_COLUMNS,
        [_distortion_cells(one) for one in found],
    )
    output.json({"vectors": vectors, "seed": seed, "rows": [one.to_dict() for one in found]})
    if plot_file is not None:
        _draw_distortion(found, sizes[-1], plot_file)


@app.command()
def perplexity(
    model_name: ModelArgument = embedded.NAME,
    file: TextOption = None,
    bits: BitsOption = "4,3.5,3,2.5,2",
    window: Annotated[int, typer.Option(min=4, help="Tokens of a window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows, at most.")] = 8,
    prefill: Annotated[
        int | None, typer.Option(min=1, help="Tokens not scored; half a window by default.")
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens a forward pass after that.")] = 64,
    json: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Perplexity and KL to the uncompressed model, with the history read from codes."""
    output, widths, text = Output(json), parse_bits(bits), read_text(file)
    model, tokenizer = load_model(model_name)
    ids = windows_of(tokenizer, text, window, windows)
    caches = {f"{width:g}": compressed(width) for width in widths}
    with progress_bar("reading text") as progress:
        found = compare_caches(
            model, ids, caches, prefill=prefill or window // 2, chunk=chunk, progress=progress
        )
    first = next(iter(found.values()))
    output.table(
        f"{model_name}: {first.scored_tokens} tokens in {first.windows} windows of {window}",
        ["bits", "perplexity", "nats lost", "mean KL", "99% KL", "top-1", "held", "ratio"],
        [["16", f"{first.uncompressed_perplexity:.3f}", *["-"] * 6]]
        + [_perplexity_cells(name, one) for name, one in found.items()],
    )
    rows = {name: one.to_dict() for name, one in found.items()}
    output.json({"model": model_name, "machine": machine.describe(), "rows": rows})
    if plot_file is not None:
        figure, axes = plot.new_figure(1)
        kl = {name: one.kl.mean for name, one in found.items()}
        plot.bars(axes[0], "KL to uncompressed, nats, by bits", kl, "{:.4f}")
        plot.save(figure, plot_file)


@app.command()
def niah(
    model_name: ModelArgument = embedded.NAME,
    file: TextOption = None,
    bits: BitsOption = "4,3,2",
    lengths: Annotated[str, typer.Option(help="Document lengths in tokens.")] = "512,1024,2048",
    depths: Annotated[str, typer.Option(help="Depths, 0 first to 1 last.")] = "0,0.25,0.5,0.75,1",
    documents: Annotated[int, typer.Option(min=1, help="Documents a length.")] = 2,
    seed: int = 0,
    json: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Exact retrieval of numbers hidden in a text, by length and depth."""
    output, widths, text = Output(json), parse_bits(bits), read_text(file)
    sizes, places = parse_list(lengths, int, "--lengths"), parse_list(depths, float, "--depths")
    model, tokenizer = load_model(model_name)
    caches: dict[str, MakeCache] = {"16": uncompressed}
    caches |= {f"{width:g}": compressed(width) for width in widths}
    with progress_bar("finding needles") as progress:
        found = retrieve(
            model,
            tokenizer,
            text,
            caches,
            lengths=sizes,
            depths=places,
            documents=documents,
            seed=seed,
            progress=progress,
        )
    output.table(
        f"{model_name}: needles found exactly",
        ["bits", *(f"{size} tokens" for size in sizes), "all"],
        [_niah_cells(name, one, sizes) for name, one in found.items()],
    )
    rows = {name: one.to_dict() for name, one in found.items()}
    output.json({"model": model_name, "machine": machine.describe(), "rows": rows})
    if plot_file is not None:
        _draw_niah(found, sizes, places, plot_file)


def _distortion_cells(one: Distortion) -> list[str]:
    def printed(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    return [
        one.method,
        str(one.dim),
        f"{one.bits:g}",
        f"{one.bits_per_value:.3f}",
        f"{one.mse:.4f}",
        f"{one.expected_mse:.4f}",
        printed(one.paper_mse),
        f"{one.inner_product_error:.4f}",
        printed(one.paper_inner_product),
        f"{one.inner_product_bias:+.1%}",
    ]


def _perplexity_cells(name: str, one: CacheComparison) -> list[str]:
    return [
        name,
        f"{one.perplexity:.3f}",
        f"{one.nll_increase.mean:+.4f}",
        _plus_minus(one.kl),
        f"{one.kl_p99:.4f}",
        f"{one.top1_agreement.mean:.1%}",
        human_bytes(one.nbytes),
        f"{one.compression_ratio:.2f}x",
    ]


def _plus_minus(estimate: Estimate) -> str:
    error = estimate.standard_error
    return f"{estimate.mean:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _niah_cells(name: str, one: Retrieval, sizes: Sequence[int]) -> list[str]:
    parts = [Retrieval(tuple(cell for cell in one.cells if cell.tokens == size)) for size in sizes]
    return [name, *(f"{part.exact}/{part.asked}" for part in (*parts, one))]


def _draw_distortion(found: Sequence[Distortion], dim: int, path: Path) -> None:
    figure, axes = plot.new_figure(2)
    fields = {
        "mse": f"squared error, dim {dim}",
        "inner_product_error": "inner-product error · dim",
    }
    widths = sorted({one.bits for one in found})
    for axis, (field, title) in zip(axes, fields.items(), strict=True):
        for method in METHODS:
            line = [one for one in found if one.method == method and one.dim == dim]
            errors = [getattr(one, field) for one in line]
            axis.plot([one.bits for one in line], errors, ".-", label=method)
        axis.set(title=title, xlabel="bits a value", yscale="log")
    axes[0].plot(widths, [4**-bits for bits in widths], "--", color=plot.QUIET, label="4^-bits")
    axes[0].legend(fontsize=8, frameon=False)
    plot.save(figure, path)


def _draw_niah(
    found: Mapping[str, Retrieval], sizes: Sequence[int], depths: Sequence[float], path: Path
) -> None:
    figure, axes = plot.new_figure(len(found), width=3)
    for axis, (name, one) in zip(axes, found.items(), strict=True):
        share = {(cell.tokens, cell.depth): cell.exact / cell.asked for cell in one.cells}
        grid = [[share[size, depth] for size in sizes] for depth in depths]
        labels = [f"{depth:g}" for depth in depths], [str(size) for size in sizes]
        plot.heatmap(axis, f"{name} bits", grid, *labels)
        axis.set(xlabel="tokens", ylabel="depth")
    plot.save(figure, path)
