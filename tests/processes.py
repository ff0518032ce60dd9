"""Programs in processes of their own: shape checks and what torch compiles do not mix."""

import os
import subprocess
import sys
from pathlib import Path


def printed(code: str, **environment: str) -> list[str]:
    """The words that a program prints, run from the root without shape checks."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"JAXTYPING_DISABLE": "1"} | environment,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()
