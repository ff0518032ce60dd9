"""`sixfold eval retrieval`."""

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
from sixfold.eval.ruler import TASKS, Score, measure_retrieval
from sixfold.integrations.transformers.summary import LONG_CONTEXT


def retrieval(
    model_name: ModelArgument = embedded.NAME,
    file: TextOption = None,
    bits: BitsOption = "4,3,2",
    against: AgainstOption = "",
    tasks: Annotated[
        str, typer.Option(help=f"Any of {', '.join(TASKS)}, separated by commas.")
    ] = ",".join(TASKS),
    length: Annotated[int, typer.Option(min=64, help="Tokens of a document.")] = 1024,
    documents: Annotated[int, typer.Option(min=1, help="Documents a task.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the documents' random choices.")] = 0,
    resume: ResumeOption = None,
    json: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Several keys, several values, chains of variables: documents answered in full.

    After RULER's definitions, as text to continue: see what the model does uncompressed before
    reading the other rows. Rows are sorted by the bits held a value.
    """
    asked_for = {**locals()}
    output, text = Output(json), read_text(file)
    caches = with_uncompressed(contenders(parse_bits(bits), against))
    chosen = parse_list(tasks, str, "--tasks")
    model, tokenizer = load_model(model_name)
    with progress_bar("answering") as progress:
        found = measure_retrieval(
            model,
            tokenizer,
            text,
            caches,
            tasks=chosen,
            tokens=length,
            documents=documents,
            seed=seed,
            progress=progress,
            checkpoint=checkpoint(resume, "retrieval", asked_for, model, text),
        )
    held = {name: one.bits_per_value for name, one in next(iter(found.values())).items()}
    names = sorted(caches, key=lambda name: -held[name])
    bits_long = {name: bits_per_value(model.config, caches[name](model)) for name in names}
    output.table(
        f"{model_name}: documents of {length} tokens answered exactly (share of answers found)",
        ["cache", "bits (here)", *chosen],
        [
            [
                label(name),
                f"{bits_long[name]:.2f} ({held[name]:.2f})",
                *(_cell(found[task][name]) for task in chosen),
            ]
            for name in names
        ],
    )
    output.say(f"Bits: per value of {LONG_CONTEXT:,} tokens (here). {WHY_TWO_NUMBERS}")
    rows = {task: {name: found[task][name].to_dict() for name in names} for task in chosen}
    output.json({"model": model_name, "machine": machine.describe(), "rows": rows})
    if plot_file is not None:
        figure, axes = plot.new_figure(1, width=3 + len(chosen), height=2 + 0.3 * len(names))
        grid = [[found[task][name].recall for task in chosen] for name in names]
        plot.heatmap(axes[0], "answers found", grid, [label(name) for name in names], chosen)
        plot.save(figure, plot_file, Path(model_name).name)


def _cell(score: Score) -> str:
    return f"{score.exact}/{score.asked} ({score.recall:.0%})"
