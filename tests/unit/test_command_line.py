"""docs/command_line.md is what the commands say of themselves, and its examples are theirs."""

import shlex
from typing import Any

import pytest

from tools import command_line


def test_the_page_of_commands_is_what_the_commands_say() -> None:
    command = "python -m tools.command_line"
    assert command_line.rendered() == command_line.PAGE.read_text(encoding="utf-8"), command


@pytest.mark.parametrize(("name", "command"), list(command_line.commands()))
def test_the_line_to_try_is_one_that_the_command_takes(name: str, command: Any) -> None:
    words = shlex.split(command_line.EXAMPLES[name][1])
    typed = name.split()
    assert words[: len(typed)] == typed
    command.make_context(name, words[len(typed) :])
