"""Run transformers' own generation tests with a compressed cache where they take a `DynamicCache`.

    python -m tools.transformers_tests CHECKOUT --json docs/results/transformers_tests.json

CHECKOUT is a clone of transformers at the version installed; its tests also need the packages
`parameterized`, `httpx` and `timeout-decorator`. Every test runs with the `DynamicCache` that
`generate` makes first: one that fails so, or never makes a cache, says nothing of Sixfold and is
left out.
"""

import argparse
import importlib
import json
import multiprocessing
import random
import sys
import unittest
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import Cache

from tools.substituted_cache import MODES, SETTINGS, Recorder, Setting, compared, dense, error

ARCHITECTURES = (
    "llama gemma gemma2 gemma3 qwen2 qwen3 mistral mixtral phi phi3 gpt2 gpt_neox gptj opt olmo2 "
    "olmo3 granite cohere cohere2 starcoder2 stablelm falcon gpt_oss qwen3_moe smollm3 glm4 "
    "nemotron exaone4 bloom falcon_h1 bamba qwen3_next"
).split()
# Two pages and 62 tokens: the third is full once two tokens more are held.
PROMPT = 190
# More than a page.
PADDING = 70
# OPT's tester has too few for them.
POSITIONS = 512
INITIALIZER_RANGE = 0.2
SECONDS = 300
# These ask for a static or quantized cache, or want a default one to be a `DynamicCache`.
OTHER_CACHES = (
    "test_generate_compile_model_forward_fullgraph",
    "test_generate_compilation_all_outputs",
    "test_static_cache_no_recompile_with_smaller_length",
    "test_generate_from_inputs_embeds_with_static_cache",
    "test_generate_with_quant_cache",
)
# What tests say where two runs choose different tokens. With a lossy cache they may, and `error`
# bounds by how much: one test has an exact cache beside ours, the others have drafts, which the
# first pass attends exactly where a decoding step reads codes.
SAID = "Generate outputs are not similar enough"
LOSSY = (
    "test_generate_with_static_cache",
    "test_assisted_decoding_matches_greedy_search_0_random",
    "test_assisted_decoding_matches_greedy_search_1_same",
    "test_prompt_lookup_decoding_matches_greedy_search",
)


def adapted(
    case: type[unittest.TestCase], setting: Setting, mode: str | None
) -> type[unittest.TestCase]:
    """`case`, with the prompts of `setting` and checks that know compressed caches."""

    class Adapted(case):  # type: ignore[valid-type,misc]
        def setUp(self) -> None:
            super().setUp()
            # At the testers' 0.02 attention hardly matters to what is generated.
            self.model_tester.initializer_range = INITIALIZER_RANGE
            if hasattr(self.model_tester, "num_experts"):
                # Between two experts the least error chooses the other one.
                self.model_tester.num_experts_per_tok = self.model_tester.num_experts
            if setting.long:
                lengthen(self.model_tester)

        def _check_past_key_values_for_generate(self, *args: Any, **kwargs: Any) -> None:
            # Some versions hand the cache over by name, and not all by the same.
            held = [dense(x) if isinstance(x, Cache) else x for x in args]
            named = {k: dense(x) if isinstance(x, Cache) else x for k, x in kwargs.items()}
            super()._check_past_key_values_for_generate(*held, **named)

        def _check_caches_are_equal(self, cache1: Cache, cache2: Cache) -> None:
            super()._check_caches_are_equal(dense(cache1), dense(cache2))

    if mode == "fused":
        # Attention on codes has no weights to give (docs/transformers.md): tests ask for none.
        Adapted.has_attentions = False
    Adapted.__name__ = Adapted.__qualname__ = case.__name__
    return Adapted


def lengthen(tester: Any) -> None:
    """Make the prompts of a model tester long, and pad every second one on the left."""
    tester.seq_length = PROMPT
    for name in ("max_position_embeddings", "n_positions"):
        if hasattr(tester, name):
            setattr(tester, name, max(POSITIONS, getattr(tester, name)))
    prepare = tester.prepare_config_and_inputs_for_common

    def padded() -> tuple[Any, dict[str, Any]]:
        config, inputs = prepare()
        mask = torch.ones_like(inputs["input_ids"])
        mask[1::2, :PADDING] = 0
        return config, {**inputs, "attention_mask": mask}

    tester.prepare_config_and_inputs_for_common = padded


def run(
    case: type[unittest.TestCase], test: str, recorder: Recorder, common: ModuleType
) -> tuple[str, str]:
    """Outcome and reason of one test."""
    transformers.set_seed(0)
    common.global_rng = random.Random(0)  # type: ignore[attr-defined]
    result = unittest.TestResult()
    with recorder.installed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted(case, recorder.setting, recorder.mode)(test).run(result)
    if result.skipped:
        return "skipped", result.skipped[0][1]
    for _, trace in [*result.failures, *result.errors]:
        return "failed", trace
    return "passed", ""


def cases(architecture: str) -> tuple[type[unittest.TestCase], list[str], ModuleType]:
    """An architecture's test class, its generation tests, and the module of random numbers."""
    module = importlib.import_module(f"tests.models.{architecture}.test_modeling_{architecture}")
    mixin = importlib.import_module("tests.generation.test_utils").GenerationTesterMixin
    case = next(
        x
        for x in vars(module).values()
        if isinstance(x, type) and issubclass(x, mixin) and issubclass(x, unittest.TestCase)
    )
    names = [name for name in vars(mixin) if name.startswith("test_") and vars(mixin)[name]]
    common = importlib.import_module("tests.test_modeling_common")
    names = [name for name in names if callable(getattr(case, name, None))]
    return case, [name for name in names if name not in OTHER_CACHES], common


def check(architecture: str) -> Iterator[dict[str, Any]]:
    """A row for every setting, mode and test of one architecture."""
    case, tests, common = cases(architecture)
    for test in tests:
        for name, setting in SETTINGS.items():
            row = {"architecture": architecture, "test": test, "setting": name}
            theirs = Recorder(setting, None)
            outcome, reason = run(case, test, theirs, common)
            if outcome != "passed" or not theirs.caches:
                if outcome != "skipped":
                    outcome = "fails without" if theirs.caches else "no cache"
                yield from ({**row, "mode": m, "outcome": outcome, "reason": reason} for m in MODES)
                continue
            for mode in MODES:
                row["mode"] = mode
                ours = Recorder(setting, mode)
                outcome, reason = run(case, test, ours, common)
                found = {"coded": ours.coded, "error": error(ours, theirs)}
                lossy = not setting.exact and test in LOSSY and SAID in reason
                if outcome == "passed" or lossy:
                    outcome, reason = compared(ours, theirs)
                    outcome = "lossy" if lossy and outcome == "passed" else outcome
                yield {**row, "outcome": outcome, "reason": reason, **found}


def suite(checkout: Path, architectures: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of all architectures, each run in a process of its own."""
    context = multiprocessing.get_context("fork")
    for architecture in architectures:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, checkout, architecture))
        process.start()
        sender.close()
        rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        try:
            while receiver.poll(SECONDS):
                row = receiver.recv()
                rows[row["setting"], row["mode"], row["test"]] = row
        except EOFError:
            # It has no more to say.
            process.join()
        process.kill()
        process.join()
        yield from rows.values()
        if process.exitcode:
            row = {"architecture": architecture, "test": "all", "outcome": "failed"}
            row["reason"] = f"the process died, or said nothing for {SECONDS} s"
            yield from ({**row, "setting": s, "mode": m} for s in SETTINGS for m in MODES)


def _work(sender: Any, checkout: Path, architecture: str) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(checkout))
    transformers.logging.set_verbosity_error()
    for row in check(architecture):
        sender.send(row)


def counts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many tests of each architecture, setting and mode came out how."""
    found: dict[tuple[str, ...], Counter[str]] = {}
    worst: dict[tuple[str, ...], float] = {}
    names = "architecture", "setting", "mode"
    for row in rows:
        key = tuple(row[name] for name in names)
        count = found.setdefault(key, Counter())
        count[row["outcome"]] += 1
        count["on codes"] += row["outcome"] == "passed" and row.get("coded", False)
        worst[key] = max(worst.get(key, 0.0), row.get("error", 0.0))
    return [
        {**dict(zip(names, k, strict=True)), "error": worst[k], "counts": dict(c)}
        for k, c in found.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tests, print counts and failures, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="a clone of transformers")
    parser.add_argument("--only", help="architectures, separated by commas")
    parser.add_argument("--json", type=Path, help="file to write the counts to")
    options = parser.parse_args(arguments)
    if not (options.checkout / "tests/generation/test_utils.py").is_file():
        parser.error(f"{options.checkout} holds no tests/generation/test_utils.py of transformers")
    rows = []
    chosen = options.only.split(",") if options.only else ARCHITECTURES
    for row in suite(options.checkout.resolve(), chosen):
        rows.append(row)
        if row["outcome"] in ("failed", "fails without"):
            print(*(row[k] for k in ("architecture", "setting", "mode", "test", "outcome")))
            print(row["reason"], flush=True)
    counted = counts(rows)
    for line in counted:
        print(*(line[k] for k in ("architecture", "setting", "mode", "error", "counts")))
    if options.json:
        document = {"transformers": transformers.__version__, "rows": counted}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if any(row["outcome"] == "failed" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
