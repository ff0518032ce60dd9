"""The commands, and the one place where errors become a line and an exit code."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from sixfold import __version__
from sixfold.cli.bench import bench
from sixfold.cli.common import INTERRUPTED
from sixfold.cli.demo import demo
from sixfold.cli.doctor import doctor
from sixfold.cli.evaluation import app as evaluation
from sixfold.cli.generate import generate
from sixfold.cli.index import app as index
from sixfold.cli.plan import plan
from sixfold.errors import SixfoldError


class OneLineErrors(TyperGroup):
    """A group in which bad input and unreadable files end in one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            print("sixfold: interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError:
            # Whoever reads has enough, such as `head`: click ends without a word.
            raise
        except (SixfoldError, OSError) as error:
            print(f"sixfold: {' '.join(_words(error).split())}", file=sys.stderr)
            raise typer.Exit(2) from error


def _words(error: Exception) -> str:
    """What went wrong, without the number that the system gives it."""
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f": {str(error.filename)!r}"
        return f"{error.strerror}{named}"
    return str(error)


app = typer.Typer(
    cls=OneLineErrors,
    help="Compress the KV cache of a language model to 2-4 bits, and see what that costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, generate, plan, bench, doctor):
    app.command()(command)
app.add_typer(evaluation, name="eval")
app.add_typer(index, name="index")


def _show_version(wanted: bool) -> bool:
    if wanted:
        print(f"sixfold {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Compress the KV cache of a language model to 2-4 bits, and see what that costs."""
