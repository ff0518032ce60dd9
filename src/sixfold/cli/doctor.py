"""`sixfold doctor`: what runs here, and why not something faster."""

import os
from dataclasses import asdict, dataclass

import torch

from sixfold.cli.common import JsonOption
from sixfold.cli.render import Output
from sixfold.eval import machine
from sixfold.kernels._dispatch import (
    ENVIRONMENT_VARIABLE,
    available_backends,
    implementation,
    missing_backends,
)

OPERATIONS = ("rotate", "encode", "decode", "scores", "attention")


@dataclass(frozen=True, slots=True)
class Operation:
    """Which backends of one operation there are, and which one runs on this device."""

    operation: str
    selected: str
    available: tuple[str, ...]
    missing: dict[str, str]


def doctor(json: JsonOption = None) -> None:
    """Versions, device, instruction sets, and the backend of every operation."""
    output = Output(json)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = machine.describe()
    operations = [_operation(name, device) for name in OPERATIONS]
    found = [[name.replace("_", " "), _words(value)] for name, value in facts.items()]
    output.table("This machine", ["", "found"], found, align="left")
    output.table(
        f"Kernels on {device.type}",
        ["operation", "runs", "available"],
        [[one.operation, one.selected, ", ".join(one.available)] for one in operations],
        align="left",
    )
    for line in _advice(operations, device):
        output.say(line)
    output.json({"machine": facts, "device": device.type, "operations": [*map(asdict, operations)]})


def _operation(name: str, device: torch.device) -> Operation:
    selected = implementation(name, device).__name__.rpartition(".")[2]
    return Operation(name, selected, available_backends(name), missing_backends(name))


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none recognised"
    return "none" if value is None else str(value)


def _advice(operations: list[Operation], device: torch.device) -> list[str]:
    """Why the fastest backend for this device does not run, in whole sentences."""
    fastest = "triton" if device.type == "cuda" else "cpu"
    if override := os.environ.get(ENVIRONMENT_VARIABLE):
        return [f"{ENVIRONMENT_VARIABLE}={override} overrides the choice of backend."]
    slow = [one for one in operations if one.selected != fastest]
    if not slow:
        return [f"Every operation runs on its fastest backend for {device.type}, {fastest}."]
    reasons = {one.missing.get(fastest, "not chosen") for one in slow}
    names = ", ".join(one.operation for one in slow)
    return [
        f"The {fastest} backend of {names} does not run: {'; '.join(sorted(reasons))}. The plain "
        "PyTorch reference runs instead: the same results, slower than uncompressed attention."
    ]
