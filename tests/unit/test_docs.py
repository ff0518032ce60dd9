"""The documents as a whole: links lead somewhere, the index lists all, pictures are up to date."""

import re
from pathlib import Path

import pytest

from sixfold.cache import CachePolicy, LayerShape, cache_nbytes, uncompressed_nbytes
from tools import draw_pictures

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES = sorted((ROOT / "docs").glob("*.md"))


def documents() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    local = [link.partition("#")[0] for link in links if "://" not in link]
    missing = [link for link in local if link and not (page.parent / link).exists()]
    assert missing == []


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {path.name for path in PAGES} - {"README.md"}
    assert pages <= set(LINK.findall(index))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_first_what_it_answers(page: Path) -> None:
    title, blank, answers, *_ = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    assert not blank
    assert answers.startswith("*Answers: ")


@pytest.mark.parametrize("name", draw_pictures.DRAWN)
def test_pictures_are_those_drawn(name: str) -> None:
    committed = (draw_pictures.PICTURES / name).read_text(encoding="utf-8")
    assert committed == draw_pictures.DRAWN[name]()


def test_choosing_bits_states_true_sizes() -> None:
    text = (ROOT / "docs/choosing_bits.md").read_text(encoding="utf-8")
    stated = re.findall(r"`bits=([\d.]+)`.* \| ([\d.]+) \|", text)
    assert len(stated) == 5
    for bits, held in stated:
        policy = CachePolicy.spending(float(bits), {(128, 128)})
        shapes = [LayerShape(8, 128, 128, policy=policy)]
        ratio = cache_nbytes(shapes, tokens=32768) / uncompressed_nbytes(shapes, tokens=32768)
        assert held == f"{16 * ratio:.2f}"
