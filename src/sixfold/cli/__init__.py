"""The `sixfold` command."""

import sys

_NEEDED = {"matplotlib", "rich", "tokenizers", "transformers", "typer"}


def main() -> None:
    """Run the command line, or say in one line what it needs to run."""
    try:
        from sixfold.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        sys.exit(f"sixfold: the command line needs {error.name}: pip install 'sixfold[cli]'")
    app()
