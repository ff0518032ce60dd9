"""Pictures of the tables."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, ACCENT, QUIET = "#1f2933", "#0b6e99", "#9aa5b1"


def new_figure(count: int, width: float = 4.2, height: float = 3.6) -> "tuple[Figure, list[Axes]]":
    """Plain axes in rows of at most six.  The window system is never touched."""
    from matplotlib.figure import Figure

    rows = -(-count // 6)
    columns = -(-count // rows)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
    return figure, axes


def save(figure: "Figure", path: Path, title: str = "") -> None:
    """Write the figure, under a title that names its model, in the format its name asks for."""
    if title:
        figure.suptitle(title, fontsize=10, color=INK)
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


def scatter(
    axis: "Axes", title: str, points: Mapping[str, tuple[float, float]], accented: Collection[str]
) -> None:
    """Draw one named point a row, some in the accent colour."""
    for name, (x, y) in points.items():
        colour = ACCENT if name in accented else QUIET
        axis.plot(x, y, "o", color=colour, markersize=5)
        axis.annotate(name, (x, y), (4, 3), textcoords="offset points", fontsize=7, color=INK)
    axis.set_title(title, fontsize=10, color=INK)
    axis.margins(x=0.15)


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
