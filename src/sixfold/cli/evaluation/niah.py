"""`sixfold eval niah`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from sixfold.cli.common import (
    BitsOption,
    JsonOption,
    ModelArgument,
    PlotOption,
    ResumeOption,
    TextOption,
    checkpoint,
    load_model,
    parse_bits,
    parse_list,
    read_text,
)
from sixfold.cli.evaluation.contenders import (
    AgainstOption,
    contenders,
    label,
    with_uncompressed,
)
from sixfold.cli.render import Output, progress_bar
from sixfold.eval import embedded, machine, plot
from sixfold.eval.long_context import WHY_TWO_NUMBERS, bits_per_value
from sixfold.eval.niah import Retrieval, retrieve
from sixfold.integrations.transformers.summary import LONG_CONTEXT


def niah(
    model_name: ModelArgument = embedded.NAME,
    file: TextOption = None,
    bits: BitsOption = "4,3,2",
    against: AgainstOption = "",
    lengths: Annotated[str, typer.Option(help="Document lengths in tokens.")] = "512,1024,2048",
    depths: Annotated[str, typer.Option(help="Depths, 0 first to 1 last.")] = "0,0.25,0.5,0.75,1",
    documents: Annotated[int, typer.Option(min=1, help="Documents a length.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the documents' random choices.")] = 0,
    resume: ResumeOption = None,
    json: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Exact retrieval of numbers hidden in a text, by length and depth.

    Rows are sorted by the bits held a value of the longest documents.
    """
    asked_for = {**locals()}
    output, text = Output(json), read_text(file)
    caches = with_uncompressed(contenders(parse_bits(bits), against))
    sizes, places = parse_list(lengths, int, "--lengths"), parse_list(depths, float, "--depths")
    model, tokenizer = load_model(model_name)
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
            checkpoint=checkpoint(resume, "niah", asked_for, model, text),
        )
    found = dict(sorted(found.items(), key=lambda row: -row[1].bits_per_value))
    bits_long = {name: bits_per_value(model.config, caches[name](model)) for name in found}
    output.table(
        f"{model_name}: needles found exactly",
        ["cache", "bits (here)", *(f"{size} tokens" for size in sizes), "all"],
        [_cells(name, one, sizes, bits_long[name]) for name, one in found.items()],
    )
    output.say(
        "Needles: numbers hidden in a text, found if every digit is right. Bits: per value of "
        f"{LONG_CONTEXT:,} tokens (of the longest documents here). {WHY_TWO_NUMBERS}"
    )
    rows = {name: {"bits_long": bits_long[name], **one.to_dict()} for name, one in found.items()}
    output.json({"model": model_name, "machine": machine.describe(), "rows": rows})
    if plot_file is not None:
        _draw(model_name, found, sizes, places, plot_file)


def _cells(name: str, one: Retrieval, sizes: Sequence[int], bits_long: float) -> list[str]:
    parts = [Retrieval(tuple(cell for cell in one.cells if cell.tokens == size)) for size in sizes]
    bits = f"{bits_long:.2f} ({one.bits_per_value:.2f})"
    return [label(name), bits, *(f"{part.exact}/{part.asked}" for part in (*parts, one))]


def _draw(
    model_name: str,
    found: Mapping[str, Retrieval],
    sizes: Sequence[int],
    depths: Sequence[float],
    path: Path,
) -> None:
    figure, axes = plot.new_figure(len(found), width=3, height=3)
    for axis, (name, one) in zip(axes, found.items(), strict=True):
        share = {(cell.tokens, cell.depth): cell.exact / cell.asked for cell in one.cells}
        grid = [[share[size, depth] for size in sizes] for depth in depths]
        labels = [f"{depth:g}" for depth in depths], [str(size) for size in sizes]
        plot.heatmap(axis, label(name), grid, *labels)
        axis.set(xlabel="tokens", ylabel="depth")
    plot.save(figure, path, f"{Path(model_name).name}: needles found exactly")
