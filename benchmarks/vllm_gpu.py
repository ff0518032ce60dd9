"""vLLM on a GPU, served from codes: is it right, how much fits, how fast is it? 15 minutes.

Run by the interpreter that has vllm and sixfold (`make bench-vllm-gpu`):

    python -m benchmarks.vllm_gpu --json vllm_gpu.json

Each part is a process of its own with a time limit, and the file is written after each: what fails
costs nothing but itself. It exits with an error if answers are wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from benchmarks.vllm_serving import EMBEDDED, ROOT, load, options_of, random_model
from sixfold.eval import machine

CONTENDERS = ("auto", "fp8", "SIXFOLD_4BIT")
# Of the embedded model, prompts in chunks of 64 tokens; what the CPU gives is in docs/vllm.md.
LARGEST_KL = {"SIXFOLD_8BIT": 0.001, "SIXFOLD_4BIT": 0.004}
MEMORY = 2**30
SCORE = """
import json, sys, torch
from vllm import LLM, SamplingParams
job = json.load(sys.stdin)
llm = LLM(
    model=job["model"],
    dtype="bfloat16",
    max_model_len=1024,
    max_num_batched_tokens=64,
    max_num_seqs=8,
    max_logprobs=-1,
    enable_prefix_caching=False,
    disable_log_stats=False,
    **job["options"],
)
text = llm.get_tokenizer().encode(open(job["text"]).read())
prompts = [text[700 * i : 700 * i + n] for i, n in enumerate(job["lengths"])]
asked = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=-1)
given = [{"prompt_token_ids": ids} for ids in prompts]
def table(output):
    rows = torch.empty(len(output.prompt_logprobs) - 1, len(output.prompt_logprobs[1]))
    for row, one in zip(rows, output.prompt_logprobs[1:]):
        row[torch.tensor(list(one))] = torch.tensor([x.logprob for x in one.values()])
    return rows
together = llm.generate(given, asked, use_tqdm=False)
alone = [llm.generate([one], asked, use_tqdm=False)[0] for one in given[-1:]]
cache = llm.llm_engine.vllm_config.cache_config
torch.save(
    {
        "together": [table(x) for x in together],
        "alone": [table(x) for x in alone],
        "tokens": cache.kv_cache_size_tokens,
        "answers": [llm.get_tokenizer().decode(x.outputs[0].token_ids) for x in together],
    },
    job["out"],
)
"""
THROUGHPUT = (
    "import sys\n"
    "from vllm.benchmarks.throughput import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())\n"
)
Row = dict[str, Any]


class Failed(Exception):
    """A part that went wrong; the others are run all the same."""


def run(code: str, arguments: list[str], limit: float, stdin: str = "", **env: str) -> str:
    """Python in a process of its own; what it printed.

    Raises:
        Failed: It took too long, or failed.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            input=stdin,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"it took more than {limit:.0f} s") from error
    if done.returncode:
        raise Failed((done.stdout + done.stderr)[-3000:])
    return done.stdout


def scores(contender: str, folder: Path, limit: float, runner: str, lengths: Sequence[int]) -> Any:
    """Log-probabilities of prompts, and how many tokens fit in `MEMORY`."""
    out = folder / "scores.pt"
    job = {
        "model": str(EMBEDDED),
        "text": str(ROOT / "src/sixfold/eval/haystack.txt"),
        "out": str(out),
        "lengths": lengths,
        "options": {**options_of(contender), "kv_cache_memory_bytes": MEMORY},
    }
    run(SCORE, [], limit, json.dumps(job), VLLM_USE_V2_MODEL_RUNNER=runner)
    return torch.load(out, weights_only=True)


def divergence(base: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Mean KL over all tokens."""
    parts = [
        (x.double().exp() * (x.double() - y.double())).sum(-1)
        for x, y in zip(base, other, strict=True)
    ]
    return float(torch.cat(parts).mean())


def quality(folder: Path, limit: float, smoke: bool) -> list[Row]:
    """KL to vLLM's own bfloat16, of a batch and of requests alone, by both of its runners."""
    lengths = [20, 200] if smoke else [20, 64, 130, 400]
    try:
        base = scores("auto", folder, limit, "0", lengths)
    except Failed as error:
        raise SystemExit(f"vLLM's own cache could not be served here: {error}") from error
    rows = [{"contender": "auto", "runner": "V1", "tokens": base["tokens"]}]
    cases = [("SIXFOLD_4BIT", "0")]
    # The second runner wants Triton's kernels.
    cases += [] if smoke else [("SIXFOLD_4BIT", "1"), ("SIXFOLD_8BIT", "0"), ("fp8", "0")]
    for contender, runner in cases:
        row: Row = {"contender": contender, "runner": f"V{int(runner) + 1}"}
        try:
            found = scores(contender, folder, limit, runner, lengths)
        except Failed as error:
            row["failed"] = str(error)
        else:
            row |= {
                "kl": divergence(base["together"], found["together"]),
                "batch_to_alone": divergence(found["together"][-1:], found["alone"]),
                "tokens": found["tokens"],
                "capacity": found["tokens"] / base["tokens"],
                "answers": found["answers"],
            }
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "answers"}), flush=True)
    return rows


def wrong(rows: list[Row]) -> list[str]:
    """What of `quality` is not as it should be."""
    found = []
    for row in rows:
        most = LARGEST_KL.get(row["contender"])
        if most is None:
            continue
        name = f"{row['contender']} ({row['runner']})"
        if "failed" in row:
            found.append(f"{name} did not run")
        elif not all(row[measure] < most for measure in ("kl", "batch_to_alone")):
            found.append(f"{name}: KL {row['kl']:.4f}, batch to alone {row['batch_to_alone']:.4f}")
    return found


def throughput(model: Path, contender: str, limit: float, smoke: bool) -> Row:
    """`vllm bench throughput`: many prompts at once, offline."""
    length, output, prompts = (200, 8, 4) if smoke else (2048, 128, 256)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        arguments = ["--model", str(model), "--dtype", "bfloat16", "--max-model-len", "4096"]
        arguments += ["--dataset-name", "random", "--random-input-len", str(length)]
        arguments += ["--random-output-len", str(output), "--num-prompts", str(prompts)]
        arguments += ["--max-num-seqs", "256", "--output-json", str(out)]
        for name, value in options_of(contender).items():
            arguments += [f"--{name.replace('_', '-')}", value]
        arguments += ["--enforce-eager"] if smoke else []
        run(THROUGHPUT, arguments, limit)
        found = json.loads(out.read_text())
    return {
        "contender": contender,
        "requests_per_second": found["requests_per_second"],
        "tokens_per_second": found["tokens_per_second"],
    }


def serving(model: Path, contender: str, smoke: bool) -> Row:
    """`vllm bench serve` against `vllm serve`."""
    streams, tokens, output = (2, 200, 8) if smoke else (64, 2500, 128)
    asked = argparse.Namespace(
        model=None,
        memory=None,
        threads=1,
        tokens=tokens,
        output=output,
        requests=2,
        graphs=not smoke,
    )
    try:
        return load(model, contender, streams, asked)
    except SystemExit as error:
        raise Failed(str(error)) from error


def attempt(found: dict[str, Any], name: str, contender: str, make: Any) -> None:
    """Add a row, or why there is none."""
    try:
        row = make()
    except Failed as error:
        row = {"contender": contender, "failed": str(error)}
    found.setdefault(name, []).append(row)
    print(name, json.dumps(row), flush=True)


def needs() -> str | None:
    """Why it cannot be run here."""
    if not torch.cuda.is_available():
        return "no GPU here: torch.cuda.is_available() is false"
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        return f"no vLLM here ({error}): pip install vllm"
    if not entry_points(group="vllm.general_plugins", name="sixfold"):
        return "vLLM does not find Sixfold's plugin here: pip install sixfold"
    return None


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=13, help="nothing is begun after that")
    parser.add_argument("--smoke", action="store_true", help="small, on a CPU: does it run?")
    return parser.parse_args()


def main() -> None:
    """Measure, and write what was found."""
    asked = _parsed()
    missing = None if asked.smoke else needs()
    if missing:
        raise SystemExit(f"benchmarks.vllm_gpu: {missing}")
    last: float = monotonic() + 60 * asked.minutes
    found: dict[str, Any] = {"machine": machine.describe()}
    if not asked.smoke:
        found["gpu"] = torch.cuda.get_device_name()
    contenders = ("auto", "SIXFOLD_4BIT") if asked.smoke else CONTENDERS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["quality"] = quality(folder, 900 if asked.smoke else 300, asked.smoke)
        found["wrong"] = wrong(found["quality"])
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
        model, limit = random_model(folder), 900 if asked.smoke else 240
        parts: list[tuple[str, Any]] = [
            ("serve", lambda one: serving(model, one, asked.smoke)),
            ("throughput", lambda one: throughput(model, one, limit, asked.smoke)),
            ("throughput", lambda one: throughput(model, one, limit, asked.smoke)),
        ]
        for part, make in parts[:2] if asked.smoke else parts:
            for contender in contenders:
                if monotonic() < last:
                    attempt(found, part, contender, lambda c=contender, m=make: m(c))
                    asked.json.write_text(json.dumps(found, indent=1) + "\n")
    if found["wrong"]:
        raise SystemExit("answers are wrong: " + "; ".join(found["wrong"]))


if __name__ == "__main__":
    main()
