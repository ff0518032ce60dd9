"""Print the lines of every source file, so that a change that adds many is seen."""

import subprocess
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def source_files() -> list[Path]:
    """Every Python file of the project that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [Path(name) for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def main() -> None:
    """Print one line a folder: its total, then each file with its own count."""
    folders: dict[Path, dict[str, int]] = defaultdict(dict)
    for path in source_files():
        folders[path.parent][path.name] = len((ROOT / path).read_text().splitlines())
    for folder, counts in sorted(folders.items()):
        files = "  ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        print(f"{sum(counts.values()):6}  {folder}: {files}")
    print(f"{sum(sum(counts.values()) for counts in folders.values()):6}  lines in all")


if __name__ == "__main__":
    main()
