"""`sixfold eval sensitivity`."""

from collections.abc import Sequence
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
    read_text,
)
from sixfold.cli.render import Output, progress_bar
from sixfold.eval import embedded, machine, plot
from sixfold.eval.perplexity import windows_of
from sixfold.eval.sensitivity import FINEST, SIDES, Sensitivity, measure_sensitivity

WORST = 3
"""Sides of layers that are named."""


def sensitivity(
    model_name: ModelArgument = embedded.NAME,
    file: TextOption = None,
    bits: BitsOption = "4,3,2",
    window: Annotated[int, typer.Option(min=4, help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows, at most.")] = 4,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens a forward pass.")] = 64,
    resume: ResumeOption = None,
    json: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Mean KL when a single layer's keys, or values, are compressed and all else is not.

    The other side of that layer has 8 bits, the most there is; no tokens stay in full precision.
    """
    asked_for = {**locals()}
    output, widths, text = Output(json), parse_bits(bits), read_text(file)
    widths += [] if FINEST in widths else [FINEST]
    model, tokenizer = load_model(model_name)
    ids = windows_of(tokenizer, text, window, windows)
    with progress_bar("compressing layers") as progress:
        found = measure_sensitivity(
            model,
            ids,
            widths,
            prefill=window // 2,
            chunk=chunk,
            progress=progress,
            checkpoint=checkpoint(resume, "sensitivity", asked_for, model, text),
        )
    layers = sorted({one.layer for one in found})
    output.table(
        f"{model_name}: mean KL, nats; the other side at {FINEST} bits",
        ["layer", *(f"{side} {width:g}" for side in SIDES for width in widths)],
        [
            [str(layer), *(f"{one.kl.mean:.5f}" for one in found if one.layer == layer)]
            for layer in layers
        ],
    )
    output.say(_reading(found, min(widths)))
    rows = [one.to_dict() for one in found]
    output.json({"model": model_name, "machine": machine.describe(), "rows": rows})
    if plot_file is not None:
        _draw(model_name, found, widths, plot_file)


def _reading(found: Sequence[Sensitivity], width: float) -> str:
    """What the table says: which layers to protect, and which numbers are noise."""
    floor = {(one.layer, one.side): one.kl.mean for one in found if one.bits == FINEST}
    costs = [
        (one.kl.mean - floor[one.layer, one.side], f"{one.side} of layer {one.layer}")
        for one in found
        if one.bits == width
    ]
    worst = sorted(costs, reverse=True)[:WORST]
    named = ", ".join(f"{name} ({cost:.4f})" for cost, name in worst)
    return (
        f"{FINEST} bits are as good as exact, so the columns of {FINEST} bits are the floor: the "
        "rounding of the model's own arithmetic. Numbers near it say nothing about a layer. Most "
        f"above the floor at {width:g} bits: {named}; give these more by per_layer or skip_layers."
    )


def _draw(
    model_name: str, found: Sequence[Sensitivity], widths: Sequence[float], path: Path
) -> None:
    figure, axes = plot.new_figure(len(SIDES))
    for axis, side in zip(axes, SIDES, strict=True):
        for width in widths:
            line = [one for one in found if one.side == side and one.bits == width]
            axis.plot(
                [one.layer for one in line], [one.kl.mean for one in line], ".-", label=f"{width:g}"
            )
        axis.set(title=f"KL, nats: {side} of one layer", xlabel="layer", yscale="log")
        axis.locator_params(axis="x", integer=True)
    # What the sides cost is to be compared.
    axes[1].sharey(axes[0])
    axes[0].autoscale()
    axes[0].legend(title="bits", fontsize=8, frameon=False)
    plot.save(figure, path, Path(model_name).name)
