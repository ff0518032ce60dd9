"""The sections of docs/command_line.md, one a command, written from the commands themselves.

python -m tools.command_line
"""

from collections.abc import Iterator
from typing import Any, cast

import typer

from sixfold.cli.app import app
from tools.blocks import ROOT

PAGE = ROOT / "docs/command_line.md"
BEGIN, END = "<!-- commands:begin -->", "<!-- commands:end -->"
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
# What each command answers, and a line to try; a test parses it with the command.
EXAMPLES = {
    "sixfold demo": (
        "What does each number of bits cost and save, on the small model inside the package?",
        "sixfold demo --plot demo.png",
    ),
    "sixfold generate": (
        "What does my model write with a compressed cache, and how many bytes does that take?",
        f"sixfold generate {SMOLLM} --chat --prompt 'What is a cache?' --compare",
    ),
    "sixfold plan": (
        "How many users, and how long a context, fit into the memory of my device?",
        "sixfold plan --layers 32 --kv-heads 8 --head-dim 128 --memory 80GB --weights 16GB",
    ),
    "sixfold bench": (
        "How fast are the kernels on this machine, beside PyTorch's attention?",
        "sixfold bench --op attention --tokens 32768",
    ),
    "sixfold doctor": (
        "Which kernels run on this machine, and why not faster ones?",
        "sixfold doctor",
    ),
    "sixfold index build": (
        "How small do the vectors of a file become?",
        "sixfold index build vectors.npy vectors.sixfold --bits 4",
    ),
    "sixfold index search": (
        "Which of them are nearest to mine?",
        "sixfold index search vectors.sixfold queries.npy -k 5",
    ),
    "sixfold index info": (
        "What is in this index?",
        "sixfold index info vectors.sixfold",
    ),
    "sixfold eval distortion": (
        "How large are the errors of the quantizers, beside theory and the papers?",
        "sixfold eval distortion --dims 128 --bits 2,3,4",
    ),
    "sixfold eval perplexity": (
        "What does compression change in my model's predictions, and what do other caches?",
        f"sixfold eval perplexity {SMOLLM} --file book.txt --bits 4,2 --against fp8,q4_0",
    ),
    "sixfold eval niah": (
        "Does my model still find facts that are hidden in a long text?",
        f"sixfold eval niah {SMOLLM} --lengths 2048,4096 --plot needles.png",
    ),
    "sixfold eval retrieval": (
        "The same for harder questions: several keys, several values, chains of variables.",
        f"sixfold eval retrieval {SMOLLM} --length 2048",
    ),
    "sixfold eval sensitivity": (
        "Which layers of my model suffer most from compression?",
        f"sixfold eval sensitivity {SMOLLM} --file book.txt --bits 4",
    ),
    "sixfold eval longbench": (
        "How many points does my model lose on LongBench-E, from a copy of its data?",
        f"sixfold eval longbench LONGBENCH --model {SMOLLM} --questions 20",
    ),
}


def commands(group: Any = None, name: str = "sixfold") -> Iterator[tuple[str, Any]]:
    """Every command that can be typed, by its whole name."""
    group = group or cast(Any, typer.main.get_command(app))
    for word, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, f"{name} {word}")
        else:
            yield f"{name} {word}", one


def section(name: str, command: Any) -> str:
    """What a command answers and does, a line to try, and a table of what it takes."""
    question, example = EXAMPLES[name]
    does = " ".join(command.help.split())
    lines = [f"## {name}", "", question, "", "```sh", example, "```", "", does, ""]
    lines += ["| option | default | meaning |", "| --- | --- | --- |"]
    for one in _taken(command):
        lines.append(f"| {_typed(one)} | {_default(one)} | {_cell(one.help or '')} |")
    return "\n".join(lines)


def rendered() -> str:
    """The page with the sections replaced."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    sections = "\n\n".join(section(*one) for one in commands())
    return f"{before}{BEGIN}\n\n{sections}\n\n{END}{after}"


def _taken(command: Any) -> list[Any]:
    return [one for one in command.params if not one.hidden and "--help" not in one.opts]


def _typed(one: Any) -> str:
    if one.param_type_name == "argument":
        name = (one.metavar or one.name).strip("[]").upper()
        return f"`{name}`" if one.required else f"`{name}`, may be left out"
    return ", ".join(f"`{option}`" for option in one.opts)


def _default(one: Any) -> str:
    if one.required:
        return "must be given"
    # What typer has for an option without a default depends on its version.
    if not isinstance(one.default, str | int | float) or one.default is False or one.default == "":
        return ""
    return f"`{one.default}`"


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|")


def main() -> None:
    """Rewrite the page in place."""
    PAGE.write_text(rendered(), encoding="utf-8")


if __name__ == "__main__":
    main()
