"""Draw the pictures of docs/how_it_works.md: ``python -m tools.draw_pictures``.

Plain SVG, the same bytes on every machine; a test draws them again.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from sixfold.codebooks import lloyd_max
from sixfold.rotation import Rotation
from tools.blocks import ROOT

PICTURES = ROOT / "docs/pictures"
INK, QUIET, ACCENT, WARM = "#24292f", "#8c959f", "#1f6f8b", "#d9822b"
DIM, BITS = 32, 3


def outlier_key() -> list[float]:
    """A key of length 1 as models make them: few channels carry most of it."""
    key = [((7 * index + 3) % 11 - 5) / 10 for index in range(DIM)]
    key[5], key[20] = 6.0, -4.5
    length = sum(x * x for x in key) ** 0.5
    return [x / length for x in key]


def rotated(key: Sequence[float]) -> list[float]:
    """The same key after the randomized Hadamard rotation."""
    turned = Rotation(DIM).rotate(torch.tensor(key, dtype=torch.float32))
    return [round(x, 4) for x in turned.tolist()]


def rotation_picture() -> str:
    """Coordinates before and after the rotation, with the levels they are rounded to."""
    # The codebook is that of coordinates of variance 1.
    key, levels = outlier_key(), [float(x) / DIM**0.5 for x in lloyd_max(DIM, BITS)]
    parts = [
        *_bars(20, "a key: two channels carry it", key, []),
        *_bars(390, f"rotated: alike, so {2**BITS} levels fit all", rotated(key), levels),
    ]
    return _svg(760, 275, parts)


def cache_picture() -> str:
    """What is exact, what is codes, and how both are merged."""
    parts: list[str] = []
    x = 20
    boxes = [("first 4", 60, WARM)]
    boxes += [("page of 64", 100, ACCENT)] * 4 + [("last 64 to 127", 140, WARM)]
    for label, width, colour in boxes:
        parts.append(_box(x, 50, width, 44, colour))
        parts.append(_text(x + width / 2, 77, label, "#ffffff"))
        x += width + 8
    parts.append(_text(20, 36, "tokens, oldest to newest", INK, "start"))
    parts.append(
        _text(320, 116, "codes of 2 to 4 bits per value, never decoded as a whole", ACCENT)
    )
    parts.append(_text(50, 116, "exact", WARM))
    parts.append(_text(600, 116, "exact", WARM))
    parts.append(_box(190, 150, 270, 40, INK))
    parts.append(_text(325, 175, "partial results, merged by log-sum-exp", "#ffffff"))
    for start, end in ((50, 220), (290, 325), (585, 430)):
        parts.append(_arrow(start, 122, end, 150))
    parts.append(_arrow(325, 190, 325, 222))
    parts.append(_text(325, 240, "the output of attention, rotated back once", INK))
    return _svg(680, 255, parts)


def _bars(left: float, title: str, values: Sequence[float], levels: Sequence[float]) -> list[str]:
    middle, scale, step = 165.0, 165.0, 10.5
    right = left + step * len(values)
    parts = [_text(left, 20, title, INK, "start")]
    for level in levels:
        y = middle - scale * level
        parts.append(_line(left - 4, y, right, y, QUIET, ' stroke-dasharray="3 3"'))
    parts.append(_line(left - 4, middle, right, middle, INK))
    for index, value in enumerate(values):
        top = middle - scale * max(value, 0)
        parts.append(_box(left + step * index, top, step - 3, scale * abs(value), ACCENT))
    return parts


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" '
        f'fill="{colour}"/>'
    )


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, more: str = "") -> str:
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}"{more}/>'
    )


def _arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return _line(x, y, to_x, to_y, INK, ' marker-end="url(#head)"')


def _text(x: float, y: float, words: str, colour: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'font-family="sans-serif" font-size="13">\n'
        '<defs><marker id="head" orient="auto" markerWidth="8" markerHeight="8" refX="7" refY="4">'
        f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


DRAWN = {"rotation.svg": rotation_picture, "cache.svg": cache_picture}


def main(folder: Path = PICTURES) -> None:
    """Write every picture."""
    folder.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        (folder / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
