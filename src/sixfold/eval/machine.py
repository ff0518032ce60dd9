"""What a measurement ran on: without it a speed means nothing."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_INTERESTING = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8")
_PACKAGES = ("sixfold", "torch", "transformers", "triton", "numpy")


def describe() -> dict[str, Any]:
    """Processor, instruction sets, threads, GPU and versions, as plain JSON values."""
    return {
        "processor": processor(),
        "instruction_sets": instruction_sets(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }


def one_line() -> str:
    """The machine in a few words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor() -> str:
    """The processor's own name for itself, or its architecture."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Vector instruction sets that matter to kernels, as far as the system reveals them."""
    flags = (_cpu_field("flags") or _cpu_field("Features")).split()
    return [name for name in (*_INTERESTING, "asimd", "sve") if name in flags]


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide how fast and how exact a run is."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() == name), "")
