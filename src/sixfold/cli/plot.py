"""Pictures of the tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, ACCENT, QUIET = "#1f2933", "#0b6e99", "#9aa5b1"


def new_figure(
    columns: int, width: float = 4.2, height: float = 3.6
) -> "tuple[Figure, list[Axes]]":
    """A row of plain axes.  The window system is never touched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 3.6), layout="constrained")
    axes = [figure.add_subplot(1, columns, index + 1) for index in range(columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
    return figure, axes


def save(figure: "Figure", path: Path) -> None:
    """Write the figure in the format its name asks for."""
    figure.savefig(path, dpi=150)


def bars(
    axis: "Axes", title: str, values: Mapping[str, float], form: str, log: bool = False
) -> None:
    """Draw one bar a name, its value written on it."""
    drawn = axis.bar(list(values), list(values.values()), color=ACCENT)
    axis.bar_label(drawn, [form.format(value) for value in values.values()], fontsize=8, padding=2)
    axis.set_title(title, fontsize=10, color=INK)
    axis.margins(y=0.15)
    axis.set_ylim(bottom=0)


def heatmap(
    axis: "Axes",
    title: str,
    grid: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> None:
    """Draw fractions from 0 to 1, with their numbers."""
    axis.imshow(grid, vmin=0, vmax=1.5, cmap="YlGn", aspect="auto")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_title(title, fontsize=10, color=INK)
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8)
