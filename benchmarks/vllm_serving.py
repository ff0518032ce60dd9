"""A compressed cache in vLLM beside its own: speed under load, and KL of the model served.

Run by the interpreter that has vLLM and sixfold (`make test-vllm` makes one):

    .venv-vllm/bin/python -m benchmarks.vllm_serving load --json out.json
    .venv-vllm/bin/python -m benchmarks.vllm_serving quality embedded hard PATH... --json out.json

    .venv-vllm/bin/python -m benchmarks.vllm_serving capacity --json out.json

Load is that of `vllm bench serve`, against `vllm serve`, contender after contender, several rounds.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import torch

from benchmarks.rows import Row, beside
from benchmarks.vllm_models import folder_of
from sixfold.eval import machine

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "src" / "sixfold" / "eval" / "embedded"
CONTENDERS = ("auto", "fp8", "SIXFOLD_4BIT", "SIXFOLD_3BIT")
CODED = ("SIXFOLD_4BIT:trellis", "SIXFOLD_3BIT:trellis")
# Attention has the shapes of Llama 3 8B, all else is small: what is measured is the cache.
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 16384,
}
BENCH = (
    "import argparse\n"
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "parser = argparse.ArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())\n"
)
DIMS = [64, 128, 256]


def options_of(contender: str) -> dict[str, Any]:
    """What vLLM is told: a backend, with a code after a colon, or a dtype of its own cache."""
    backend, _, code = contender.partition(":")
    if not backend.startswith("SIXFOLD"):
        return {"kv_cache_dtype": backend}
    options: dict[str, Any] = {"attention_backend": backend}
    return options | ({"additional_config": {"sixfold": {"code": code}}} if code else {})


def bytes_a_token(contender: str, dim: int) -> float:
    """Of a key and a value of one head, scales included."""
    from sixfold.integrations.vllm.names import WIDTHS, token_nbytes

    backend = contender.partition(":")[0]
    if backend in WIDTHS:
        return token_nbytes(WIDTHS[backend], dim, dim)
    return {"auto": 4.0, "fp8": 2.0}[contender] * dim


def bytes_of_model(contender: str, model: Path) -> float:
    """Of a token in all layers."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    of_layer = bytes_a_token(contender, dim) * config.get("num_key_value_heads", heads)
    return float(of_layer * config["num_hidden_layers"])


def random_model(folder: Path) -> Path:
    """A Llama of `SHAPE` with random weights."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = folder / "llama"
    tokens = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
    made: Any = LlamaForCausalLM(LlamaConfig.from_dict({**SHAPE, **tokens}))
    made.to(torch.bfloat16).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / file, path)
    return path


@contextlib.contextmanager
def server(
    model: Path, contender: str, threads: int, blocks: int | None, graphs: bool = False
) -> Iterator[str]:
    """`vllm serve`; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "model", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "bfloat16"]
    command += [] if graphs else ["--enforce-eager"]
    command += ["--max-model-len", "8192", "--max-num-seqs", "64", "--block-size", "64"]
    command += ["--no-enable-prefix-caching"]
    for name, value in options_of(contender).items():
        text = value if isinstance(value, str) else json.dumps(value)
        command += [f"--{name.replace('_', '-')}", text]
    if blocks is not None:
        command += ["--num-gpu-blocks-override", str(blocks)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "6",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            if not _healthy(address, process):
                log.seek(0)
                raise SystemExit(f"{contender}: vLLM did not start:\n{log.read()[-3000:]}")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(address: str, process: "subprocess.Popen[bytes]") -> bool:
    for _ in range(180):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
        except (urllib.error.URLError, OSError):
            if process.poll() is not None:
                return False
            sleep(1)
        else:
            return True
    return False


def load(model: Path, contender: str, streams: int, arguments: argparse.Namespace) -> Row:
    """One round of `vllm bench serve`, with as many requests as streams."""
    blocks = None
    if arguments.memory:
        blocks = int(arguments.memory * 2**20 // (64 * bytes_of_model(contender, model)))
    with server(model, contender, arguments.threads, blocks, arguments.graphs) as address:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", BENCH, "--backend", "openai", "--base-url", address]
            command += ["--model", "model", "--tokenizer", str(model), "--dataset-name", "random"]
            command += ["--random-input-len", str(arguments.tokens), "--random-range-ratio", "0.6"]
            command += ["--random-output-len", str(arguments.output), "--ignore-eos"]
            command += ["--num-prompts", str(streams * arguments.requests)]
            command += ["--max-concurrency", str(streams), "--save-result", "--seed", "0"]
            command += ["--result-dir", folder, "--result-filename", "result.json"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"vllm bench serve failed:\n{done.stderr[-3000:]}")
            found = json.loads((Path(folder) / "result.json").read_text())
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as response:
            metrics = response.read().decode()
    preempted = [x for x in metrics.splitlines() if x.startswith("vllm:num_preemptions_total")]
    return {
        "model": arguments.model.name if arguments.model else "random",
        **{name: getattr(arguments, name) for name in ("threads", "tokens", "output", "memory")},
        "streams": streams,
        "contender": contender,
        "blocks": blocks,
        "completed": found["completed"],
        "output_tokens_per_second": found["output_throughput"],
        "total_tokens_per_second": found["total_token_throughput"],
        "first_token_ms": found["median_ttft_ms"],
        "token_ms": found["median_tpot_ms"],
        "preemptions": sum(float(x.split()[-1]) for x in preempted),
    }


def loads(arguments: argparse.Namespace) -> list[Row]:
    """All contenders, alternating; medians over rounds."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or random_model(Path(folder))
        for streams in arguments.streams:
            rounds: dict[str, list[Row]] = {name: [] for name in arguments.contenders}
            for _ in range(arguments.rounds):
                for name in arguments.contenders:
                    rounds[name].append(load(model, name, streams, arguments))
                    print(json.dumps(rounds[name][-1]), flush=True)
            rows += [_median(found) for found in rounds.values()]
    return rows


def _median(rounds: list[Row]) -> Row:
    numbers = [key for key, value in rounds[0].items() if isinstance(value, float)]
    numbers = [key for key in numbers if key != "memory"]
    medians = {key: statistics.median(row[key] for row in rounds) for key in numbers}
    speeds = [row["output_tokens_per_second"] for row in rounds]
    spread = {"rounds": len(rounds), "slowest": min(speeds), "fastest": max(speeds)}
    return {**rounds[0], **medians, **spread}


SCORE = """
import json, sys, torch
from vllm import LLM, SamplingParams
job = json.load(sys.stdin)
llm = LLM(
    model=job["model"],
    dtype="bfloat16",
    enforce_eager=True,
    max_model_len=job["window"] + 8,
    max_num_batched_tokens=job["chunk"],
    max_num_seqs=4,
    enable_prefix_caching=False,
    **job["options"],
)
ids = llm.get_tokenizer().encode(open(job["text"]).read())
worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
model, found = worker.model_runner.model, []
inner = model.compute_logits
def kept(hidden, *rest):
    logits = inner(hidden, *rest)
    if len(hidden) > 1:
        found.append(logits.float().log_softmax(-1))
    return logits
model.compute_logits = kept
windows = []
for i in range(job["windows"]):
    found.clear()
    prompt = {"prompt_token_ids": ids[i * job["window"] : (i + 1) * job["window"]]}
    one = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    llm.generate([prompt], one, use_tqdm=False)
    windows.append(torch.cat(found)[job["window"] - 1 - job["scored"] : job["window"] - 1])
torch.save(torch.stack(windows), job["out"])
"""


def qualities(arguments: argparse.Namespace) -> list[Row]:
    """KL of what is served to what vLLM serves in bfloat16, prompts in chunks."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            model = str(folder_of(name, Path(folder)))
            base = _scores(model, "auto", 64, Path(folder), arguments)
            for contender in arguments.contenders:
                if contender == "auto":
                    continue
                for chunk in arguments.chunks:
                    found = _scores(model, contender, chunk, Path(folder), arguments)
                    row = _row(model, contender, chunk, base, found)
                    rows.append({**row, "text": arguments.text.stem})
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def _row(model: str, contender: str, chunk: int, base: torch.Tensor, found: torch.Tensor) -> Row:
    divergence = (base.exp() * (base - found)).sum(-1).mean(1)
    error = float(divergence.std() / len(divergence) ** 0.5) if len(divergence) > 1 else None
    return {
        "model": Path(model).name,
        "contender": contender,
        "chunk": chunk,
        "windows": len(divergence),
        "kl": float(divergence.mean()),
        "standard_error": error,
        "same_top_token": float((base.argmax(-1) == found.argmax(-1)).float().mean()),
    }


def _scores(
    model: str, contender: str, chunk: int, folder: Path, arguments: argparse.Namespace
) -> torch.Tensor:
    out = folder / "scores.pt"
    job = {
        "model": model,
        "options": {} if contender == "auto" else options_of(contender),
        "chunk": chunk,
        "text": str(arguments.text),
        "window": arguments.window,
        "windows": arguments.windows,
        "scored": arguments.window // 3,
        "out": str(out),
    }
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCORE],
        input=json.dumps(job),
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{contender} on {model} failed:\n{done.stderr[-3000:]}")
    found: torch.Tensor = torch.load(out, weights_only=True)
    return found


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("load")
    one.add_argument("--model", type=Path, help="a folder; random weights without")
    one.add_argument("--streams", type=lambda x: [*map(int, x.split(","))], default=[16, 64])
    one.add_argument("--tokens", type=int, default=2500, help="of a prompt: 0.4 to 1.6 times that")
    one.add_argument("--output", type=int, default=64)
    one.add_argument("--requests", type=int, default=1, help="of each stream")
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--memory", type=float, help="MiB of blocks; as many as needed without")
    one.add_argument("--graphs", action="store_true", help="compiled, with CUDA graphs")
    two = kinds.add_parser("quality")
    two.add_argument("models", nargs="+", help="embedded, hard, or the folder of another")
    two.add_argument("--text", type=Path, default=ROOT / "src/sixfold/eval/haystack.txt")
    two.add_argument("--window", type=int, default=768)
    two.add_argument("--windows", type=int, default=1)
    two.add_argument("--chunks", type=lambda x: [*map(int, x.split(","))], default=[64, 48])
    three = kinds.add_parser("capacity")
    three.add_argument("--json", type=Path, required=True)
    for kind in (one, two):
        kind.add_argument("--json", type=Path)
        names = CONTENDERS if kind is one else (*CONTENDERS, *CODED)
        kind.add_argument("--contenders", type=lambda x: x.split(","), default=list(names))
    return parser.parse_args()


def capacities() -> list[Row]:
    """Bytes a token; that vLLM's capacity is their ratio to one block is a test."""
    from sixfold.integrations.vllm.names import WIDTHS

    return [
        {"contender": name, "bytes": [bytes_a_token(name, dim) for dim in DIMS]}
        for name in ("fp8", *WIDTHS)
    ]


def main() -> None:
    """Measure, and write what was found."""
    arguments = _parsed()
    if arguments.kind == "capacity":
        found = {"dims": DIMS, "rows": capacities()}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        return
    rows = loads(arguments) if arguments.kind == "load" else qualities(arguments)
    asked = {k: v.name if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    asked = {k: v for k, v in asked.items() if k not in ("json", "text", "models", "windows")}
    if arguments.json is not None:
        same = ("model", "threads", "streams", "memory") if arguments.kind == "load" else ("model",)
        rows = beside(rows, arguments.json, *same)
        found = {"machine": machine.describe(), "asked": asked, "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
