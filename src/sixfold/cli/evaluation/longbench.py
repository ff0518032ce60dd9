"""`sixfold eval longbench`."""

from pathlib import Path
from typing import Annotated

import typer

from sixfold.cli.common import (
    BitsOption,
    JsonOption,
    PlotOption,
    ResumeOption,
    checkpoint,
    load_model,
    parse_bits,
)
from sixfold.cli.evaluation.contenders import (
    AgainstOption,
    contenders,
    label,
    with_uncompressed,
)
from sixfold.cli.render import Output, progress_bar
from sixfold.eval import embedded, machine, plot
from sixfold.eval.longbench import find_datasets, measure_longbench


def longbench(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Its files, such as qasper_e.jsonl.")
    ],
    model_name: Annotated[
        str, typer.Option("--model", help="A local directory, a hub name, or `embedded`.")
    ] = embedded.NAME,
    bits: BitsOption = "4,3.5,2.5",
    against: AgainstOption = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Longest prompt; by default the model's context less 512."),
    ] = None,
    chat: Annotated[bool, typer.Option(help="Ask through the chat template.")] = False,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Questions a dataset, at most.")
    ] = None,
    resume: ResumeOption = None,
    json: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """LongBench-E from a local copy of its data: points out of 100, by dataset."""
    asked_for = {**locals()}
    output, data = Output(json), find_datasets(folder)
    caches = with_uncompressed(contenders(parse_bits(bits), against))
    model, tokenizer = load_model(model_name)
    # The longest answers have 512 tokens.
    room = max_tokens or max(model.config.max_position_embeddings - 512, 2)
    with progress_bar("answering") as progress:
        found = measure_longbench(
            model,
            tokenizer,
            data,
            caches,
            max_tokens=room,
            chat=chat,
            questions=questions,
            progress=progress,
            checkpoint=checkpoint(resume, "longbench", asked_for, model, str(data)),
        )
    mean = {name: sum(one[name].score for one in found.values()) / len(found) for name in caches}
    lines = [
        [task, str(next(iter(one.values())).asked), *(f"{one[name].score:.2f}" for name in caches)]
        for task, one in found.items()
    ]
    output.table(
        f"{model_name}: LongBench-E, prompts of at most {room} tokens",
        ["dataset", "questions", *map(label, caches)],
        [*lines, ["mean", "", *(f"{one:.2f}" for one in mean.values())]],
    )
    output.say(
        "Points: by each dataset's own metric, 100 if every answer is right. Names of Sixfold's "
        "caches give their bits per value."
    )
    rows = {task: {n: one.to_dict() for n, one in scores.items()} for task, scores in found.items()}
    document = {"model": model_name, "machine": machine.describe(), "mean": mean, "rows": rows}
    output.json(document)
    if plot_file is not None:
        figure, axes = plot.new_figure(1, width=2 + 1.2 * len(mean))
        points = {label(name): one for name, one in mean.items()}
        plot.bars(axes[0], "LongBench-E, mean of datasets", points, "{:.1f}")
        plot.save(figure, plot_file, Path(model_name).name)
