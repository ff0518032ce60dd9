"""vLLM from codes beside its own cache, a second of each in turn, on machines that are not quiet.

    .venv-vllm/bin/python -m benchmarks.vllm_paired --json out.json

Every contender is a process that runs the same requests on one thread; all but one are stopped, and
every slice of time it is the next one's turn, so that a slow minute of the machine hits them alike.
Times are CPU seconds of the process. What a server adds is `benchmarks.vllm_serving load`.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import sleep

from benchmarks.rows import Row, beside
from benchmarks.vllm_serving import bytes_of_model, options_of, random_model
from sixfold.eval import machine

CONTENDERS = ("auto", "fp8", "SIXFOLD_4BIT")
WORK = """
import json, os, signal, sys, time
job = json.load(open(sys.argv[1]))
from vllm import LLM, SamplingParams
llm = LLM(
    model=job["model"],
    dtype="bfloat16",
    enforce_eager=True,
    max_model_len=8192,
    max_num_seqs=64,
    max_num_batched_tokens=job["step"],
    enable_prefix_caching=False,
    disable_log_stats=False,
    **job["options"],
)
engine = llm.llm_engine
def run(prompts, output):
    asked = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    for i, ids in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": ids}, asked)
    begin, first, last, sizes, after = time.process_time(), {}, {}, {}, 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.process_time() - begin
        for one in outputs:
            size = len(one.outputs[0].token_ids)
            after += (size - sizes.get(one.request_id, 0)) * (len(first) == len(prompts))
            sizes[one.request_id] = size
            if size:
                first.setdefault(one.request_id, now)
            if one.finished:
                last[one.request_id] = now
    preempted = sum(x.value for x in llm.get_metrics() if x.name == "vllm:num_preemptions")
    return {"first": first, "last": last, "after": after, "preemptions": preempted}
run([ids[:200] for ids in job["prompts"][:2]], 2)
open(job["out"] + ".ready", "w").close()
os.kill(os.getpid(), signal.SIGSTOP)
found = run(job["prompts"], job["output"])
with open(job["out"] + ".part", "w") as file:
    json.dump(found, file)
os.rename(job["out"] + ".part", job["out"])
"""


def prompts(streams: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """Random ones, of 0.4 to 1.6 times so many tokens."""
    draw = random.Random(0)
    lengths = [draw.randint(tokens * 4 // 10, tokens * 16 // 10) for _ in range(streams)]
    return [[draw.randrange(2, vocabulary) for _ in range(length)] for length in lengths]


def started(
    contender: str, model: Path, folder: Path, asked: argparse.Namespace, streams: int
) -> "subprocess.Popen[bytes]":
    """A process that stops itself before the first request."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    options = options_of(contender)
    if asked.memory:
        blocks = int(asked.memory * 2**20 // (64 * bytes_of_model(contender, model)))
        options |= {"num_gpu_blocks_override": blocks, "block_size": 64}
    job = {
        "model": str(model),
        "options": options,
        "prompts": prompts(streams, asked.tokens, vocabulary),
        "output": asked.output,
        "step": asked.step,
        "out": str(folder / contender),
    }
    file = folder / f"{contender}.job"
    file.write_text(json.dumps(job))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(asked.space),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with (folder / f"{contender}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", WORK, str(file)], env=environment, stdout=log, stderr=log
        )


def until(process: "subprocess.Popen[bytes]", file: Path, log: Path) -> None:
    """Wait for a file that the process makes.

    Raises:
        SystemExit: The process ended without it.
    """
    while not file.exists():
        if process.poll() is not None and not file.exists():
            raise SystemExit(f"vLLM failed:\n{log.read_text()[-3000:]}")
        sleep(0.05)


def measured(model: Path, streams: int, asked: argparse.Namespace) -> list[Row]:
    """All contenders in turn, until each has answered its requests."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for contender in asked.contenders:
                process = started(contender, model, folder, asked, streams)
                running[contender] = process
                until(process, folder / f"{contender}.ready", folder / f"{contender}.log")
            waiting = list(asked.contenders)
            while waiting:
                for contender in tuple(waiting):
                    process = running[contender]
                    process.send_signal(signal.SIGCONT)
                    sleep(asked.slice)
                    if (folder / contender).exists():
                        waiting.remove(contender)
                        continue
                    if process.poll() is not None:
                        until(process, folder / contender, folder / f"{contender}.log")
                    process.send_signal(signal.SIGSTOP)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
        return [
            row_of(json.loads((folder / contender).read_text()), contender, streams, asked)
            for contender in asked.contenders
        ]


def row_of(found: Row, contender: str, streams: int, asked: argparse.Namespace) -> Row:
    """Medians over requests; decoding is what is left when all have their first token."""
    first, last = found["first"], found["last"]
    prompts, end = max(first.values()), max(last.values())
    further = [(last[x] - first[x]) / (asked.output - 1) for x in first]
    return {
        "contender": contender,
        "streams": streams,
        "first_token_seconds": statistics.median(first.values()),
        "token_seconds": statistics.median(further),
        "prompts_seconds": prompts,
        "decode_tokens_per_second": found["after"] / (end - prompts),
        "output_tokens_per_second": streams * asked.output / end,
        "preemptions": found["preemptions"],
    }


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder; random weights without")
    parser.add_argument("--streams", type=lambda x: [*map(int, x.split(","))], default=[16, 64])
    parser.add_argument("--tokens", type=int, default=2500, help="0.4 to 1.6 times that")
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument(
        "--step", type=int, help="most tokens of a step; vLLM's own default without"
    )
    parser.add_argument("--memory", type=float, help="MiB of blocks; as many as needed without")
    parser.add_argument("--slice", type=float, default=1.0, help="seconds of a turn")
    parser.add_argument("--space", type=int, default=6, help="GiB of blocks, each")
    parser.add_argument("--contenders", type=lambda x: x.split(","), default=list(CONTENDERS))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model or random_model(Path(folder))
        for streams in asked.streams:
            found = measured(model, streams, asked)
            name = asked.model.name if asked.model else "random"
            rows += [{"model": name, "step": asked.step, **x} for x in found]
            print(*map(json.dumps, found), sep="\n", flush=True)
    kept = {k: v.name if isinstance(v, Path) else v for k, v in vars(asked).items() if k != "json"}
    if asked.json is not None:
        rows = beside(rows, asked.json, "model", "streams", "step")
        found_all = {"machine": machine.describe(), "asked": kept, "rows": rows}
        asked.json.write_text(json.dumps(found_all, indent=1) + "\n")


if __name__ == "__main__":
    main()
