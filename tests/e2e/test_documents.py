"""Every line of Python that README and the documents show runs as it stands.

Models of a hub are stood for by the tiny one. The blocks of a page run one after the other, in a
folder that holds nothing but a text, `document.txt`. Older versions of transformers get a cache by
another name, as README says.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sixfold.eval.embedded import haystack
from sixfold.integrations.transformers.keyword import CACHE_KEYWORD

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHAT = "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }}\n{% endfor %}"
HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")
# What README shows first.
MOST_LINES = 12

pytestmark = pytest.mark.usefixtures("unhooked")


def blocks(page: Path) -> list[str]:
    found: list[str] = FENCE.findall(page.read_text(encoding="utf-8"))
    return found


def pages() -> list[Path]:
    documents = (path for folder in ("docs", "src") for path in (ROOT / folder).rglob("*.md"))
    return [page for page in sorted([*ROOT.glob("*.md"), *documents]) if blocks(page)]


@pytest.fixture
def hub(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever model is asked for, it is the tiny one, which can chat."""
    read_model, read_tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained

    def model(name: str, **options: Any) -> Any:
        assert HUB_NAME.fullmatch(name), f"{name} is no name of a hub"
        return read_model(model_dir, **options)

    def tokenizer(name: str, **options: Any) -> Any:
        assert HUB_NAME.fullmatch(name), f"{name} is no name of a hub"
        return read_tokenizer(model_dir, chat_template=CHAT, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_snippets_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page.name == "langchain.md":
        # `make test-langchain` runs it where there is none.
        pytest.importorskip("langchain_core", reason="LangChain is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "document.txt").write_text(haystack()[:3000], encoding="utf-8")
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        code = re.sub(r"\bcache=(?=\w)", f"{CACHE_KEYWORD}=", block)
        exec(compile(code, str(page), "exec"), names)
    if "print(" in "".join(blocks(page)):
        assert capsys.readouterr().out.strip()


def test_readme_shows_few_lines_first() -> None:
    first = blocks(ROOT / "README.md")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= MOST_LINES


def test_pages_that_show_python_are_found() -> None:
    assert {"README.md", "engine.md", "quickstart.md"} <= {page.name for page in pages()}
