"""`sixfold eval distortion`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import typer

from sixfold.cli.common import BitsOption, JsonOption, PlotOption, parse_bits, parse_list
from sixfold.cli.render import Output, progress_bar
from sixfold.eval import plot
from sixfold.eval.distortion import METHODS, Distortion, Method, measure_distortion

_COLUMNS = (
    *("method", "dim", "bits", "held", "MSE", "theory", "paper"),
    *("IP·dim", "paper", "bias"),
)


def distortion(
    dims: Annotated[str, typer.Option(help="Dimensions, separated by commas.")] = "64,128",
    bits: BitsOption = "1,2,2.5,3,3.5,4",
    methods: Annotated[
        str, typer.Option(help=f"Any of {', '.join(METHODS)}, separated by commas.")
    ] = ",".join(METHODS),
    vectors: Annotated[int, typer.Option(min=1, help="Vectors a measurement.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the random vectors and rotations.")] = 0,
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
        _COLUMNS,
        [_cells(one) for one in found],
    )
    output.say(
        "Held: bits per value, scales included. MSE: mean squared error, beside what theory "
        "expects of this quantizer and what the paper prints. IP·dim: squared error of inner "
        "products times the dimension. Bias: by how much they are too large on average."
    )
    output.json({"vectors": vectors, "seed": seed, "rows": [one.to_dict() for one in found]})
    if plot_file is not None:
        _draw(found, sizes[-1], plot_file)


def _cells(one: Distortion) -> list[str]:
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


def _draw(found: Sequence[Distortion], dim: int, path: Path) -> None:
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
