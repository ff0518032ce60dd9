"""What mkdocs does to a page of docs/ before it renders it; on GitHub pages are read as they are.

``<!-- api: sixfold.Name -->`` becomes the description of that name. A link to a file that the site
does not have becomes its path, or a link to the repository where mkdocs.yml names one (`repo_url`).
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
DESCRIBED = re.compile(r"^<!-- api: ([\w.]+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Describe the names that a page asks for, and lead links out of docs/ to the repository."""
    folder = (DOCS / page.file.src_uri).parent
    markdown = DESCRIBED.sub(r"::: \1\n", markdown)
    return LINK.sub(lambda link: _outside(link, folder, config["repo_url"]), markdown)


def _outside(link: re.Match[str], folder: Path, repository: str | None) -> str:
    """A link to a file that the site does not have; a broken one stays, for mkdocs to find."""
    words, target = link[1], (folder / link[2]).resolve()
    if not target.exists() or not target.is_relative_to(ROOT) or target.is_relative_to(DOCS):
        return link[0]
    path = target.relative_to(ROOT).as_posix()
    if repository:
        return f"[{words}]({repository.rstrip('/')}/blob/main/{path}{link[3] or ''})"
    return f"`{path}`" if path.endswith(words) else f"{words} (`{path}`)"
