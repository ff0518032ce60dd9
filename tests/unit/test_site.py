"""The site of docs/: it builds without a warning, has every page, and names what the code has."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sixfold
import sixfold.cache
import sixfold.errors
from tools import site_hooks

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# A table or a list that mkdocs has taken for words, which GitHub would not.
UNRENDERED = re.compile(r"<p>(?:\||(?:(?!</p>).)*\n- )", re.DOTALL)

NEEDED = ("mkdocs", "material", "mkdocstrings_handlers.python")


def missing() -> list[str]:
    found = []
    for name in NEEDED:
        try:
            here = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            here = None
        if here is None:
            found.append(name)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built in a process of its own: what mkdocs imports warns of much."""
    if lacking := missing():
        pytest.skip(f"the site cannot be built without {', '.join(lacking)}: pip install '.[dev]'")
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(built)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return built


def article(site: Path, page: Path) -> str:
    """The words of a page, without what surrounds them on the site."""
    folder = site if page.stem == "README" else site / page.stem
    text = (folder / "index.html").read_text(encoding="utf-8")
    return text[text.index("<article") : text.index("</article>")]


def test_the_navigation_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = text[text.index("\nnav:") : text.index("\nvalidation:")]
    named = re.findall(r": (\w+\.md)$", navigation, re.MULTILINE)
    assert sorted(named) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_site_shows_tables_and_lists_as_such(site: Path, page: Path) -> None:
    shown, written = article(site, page), page.read_text(encoding="utf-8")
    assert not UNRENDERED.search(shown)
    assert shown.count("<table") == len(re.findall(r"^\| ?:?-", written, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_asks_no_other_server_for_anything(site: Path, page: Path) -> None:
    folder = site if page.stem == "README" else site / page.stem
    text = (folder / "index.html").read_text(encoding="utf-8")
    loaded = r"<(?:script|img|iframe)[^>]*src=|<link[^>]*(?:stylesheet|preconnect|icon)\"[^>]*href="
    assert re.findall(rf"(?:{loaded})\"http[^>]*>", text) == []


def test_every_public_name_is_described(site: Path) -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    listed = {name.rpartition(".")[2] for name in re.findall(r"^\| `([\w.]+)`", page, re.MULTILINE)}
    asked = {name.rpartition(".")[2] for name in site_hooks.DESCRIBED.findall(page)}
    errors = {name for name in dir(sixfold.errors) if name.endswith("Error")}
    public = {*sixfold.__all__, *sixfold.cache.__all__, *errors} - {"__version__"}
    assert public <= listed == asked
    shown = article(site, ROOT / "docs/api.md")
    assert "api: " not in shown
    assert ":::" not in shown
    for name in site_hooks.DESCRIBED.findall(page):
        assert re.search(rf'id="[\w.]*\b{name.rpartition(".")[2]}"', shown), name


def test_links_out_of_the_documents_become_paths_or_links_to_a_repository() -> None:
    class Page:
        class file:
            src_uri = "cpu.md"

    def shown(markdown: str, repository: str | None = None) -> str:
        config = {"repo_url": repository}
        return site_hooks.on_page_markdown(markdown, page=Page, config=config)

    outside = "[notes](../benchmarks/NOTES.md#a)"
    assert shown(outside) == "notes (`benchmarks/NOTES.md`)"
    assert shown("[NOTES.md](../benchmarks/NOTES.md)") == "`benchmarks/NOTES.md`"
    there = "https://example.org/sixfold/blob/main/benchmarks/NOTES.md#a"
    assert shown(outside, "https://example.org/sixfold/") == f"[notes]({there})"
    for kept in ("[x](gpu.md)", "[x](../benchmarks/MISSING.md)", "[x](https://example.org)"):
        assert shown(kept) == kept
