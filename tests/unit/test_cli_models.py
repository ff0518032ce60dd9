"""Commands that run a model, on a tiny random one."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForMaskedLM, Cache, DynamicCache, PreTrainedModel
from typer.testing import CliRunner, Result

from sixfold.cli import demo as demo_command
from sixfold.cli import generate as generate_command
from sixfold.cli.app import app
from sixfold.eval.embedded import haystack
from sixfold.eval.peers import PEERS
from tests.tiny import tiny_model, tiny_tokenizer


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def assert_png(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_generate_streams_what_the_model_says(model_dir: Path, tmp_path: Path) -> None:
    prompt = haystack()[:800]
    (tmp_path / "prompt.txt").write_text(prompt)
    options = ("--bits", 8, "--max-new-tokens", 5, "--compare", "--json", tmp_path / "out.json")
    result = run("generate", model_dir, "--file", tmp_path / "prompt.txt", *options)
    eight, plain = read(tmp_path / "out.json")["runs"]
    assert eight["text"].strip() in result.stdout
    assert (eight["new_tokens"], plain["new_tokens"]) == (5, 5)
    ids = tiny_tokenizer()(prompt, return_tensors="pt")["input_ids"]
    model: Any = tiny_model()
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert plain["text"] == tiny_tokenizer().decode(expected[0, ids.shape[1] :])
    assert plain["tokens_in_cache"] == ids.shape[1] + 4
    # 16-bit bytes over those of a float32 cache.
    assert plain["compression_ratio"] == 0.5
    assert eight["nbytes"] < plain["nbytes"]
    assert eight["tokens_per_second"] > 0


def test_generate_labels_what_it_compares(model_dir: Path) -> None:
    options = ("--prompt", haystack()[:300], "--max-new-tokens", 3, "--compare")
    said = run("generate", model_dir, *options).stdout
    assert said.index("--- 4 bits") < said.index("--- uncompressed") < said.index("tokens held")
    assert "at 32,768 tokens" in said


def test_generate_asks_about_a_document(model_dir: Path, tmp_path: Path) -> None:
    document, question = haystack()[:300], "Who?"
    (tmp_path / "text.txt").write_text(document)
    options = ("--file", tmp_path / "text.txt", "--prompt", question, "--max-new-tokens", 1)
    run("generate", model_dir, *options, "--json", tmp_path / "out.json")
    (one,) = read(tmp_path / "out.json")["runs"]
    tokens = tiny_tokenizer()(f"{document}\n\n{question}")["input_ids"]
    assert one["prompt_tokens"] == len(tokens)
    assert one["long_ratio"] > one["compression_ratio"]


def test_generate_samples(model_dir: Path, tmp_path: Path) -> None:
    """Of a random model, whose probabilities are nearly equal: seeds give other texts."""
    texts = []
    for seed in (0, 1, 0):
        options = ("--temperature", 1, "--seed", seed, "--max-new-tokens", 8, "--dtype", "float32")
        files = ("--device", "cpu", "--json", tmp_path / "out.json")
        run("generate", model_dir, "--prompt", "Once", *options, *files)
        texts.append(read(tmp_path / "out.json")["runs"][0]["text"])
    assert texts[0] == texts[2] != texts[1]


def test_generate_says_that_it_reads_until_the_first_token(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    @contextmanager
    def waiting(words: str) -> Iterator[Callable[[], None]]:
        said.append(words)
        yield lambda: said.append("stopped")
        said.append("done")

    monkeypatch.setattr(generate_command, "waiting", waiting)
    prompt = haystack()[:300]
    run("generate", model_dir, "--prompt", prompt, "--max-new-tokens", 3)
    count = len(tiny_tokenizer()(prompt)["input_ids"])
    assert said == [f"reading {count} tokens", "stopped", "done"]


def test_generate_without_a_chat_template(model_dir: Path) -> None:
    arguments = ["generate", str(model_dir), "--prompt", "x", "--chat"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, "has no chat template" in result.stderr) == (2, True)


def test_generate_applies_the_chat_template(model_dir: Path, tmp_path: Path) -> None:
    folder, template = (
        tmp_path / "model",
        "{% for one in messages %}<{{ one['content'] }}>{% endfor %}",
    )
    shutil.copytree(model_dir, folder)
    (folder / "chat_template.jinja").write_text(template)
    options = (
        "--prompt",
        "Hello",
        "--chat",
        "--max-new-tokens",
        1,
        "--json",
        tmp_path / "out.json",
    )
    run("generate", folder, *options)
    (one,) = read(tmp_path / "out.json")["runs"]
    assert one["prompt_tokens"] == len(tiny_tokenizer()("<Hello>")["input_ids"])
    with_it = run("generate", folder, *options[:-2])
    without = run("generate", folder, *options[:2], *options[3:-2])
    assert "which --chat applies" not in with_it.output
    assert "which --chat applies" in without.output


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    """The message ended where a list began."""
    tiny_model().save_pretrained(tmp_path)
    arguments = ["generate", str(tmp_path), "--prompt", "hi"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.endswith("expected tokenizer.json\n")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "cannot read the tokenizer of" in result.stderr
    assert not result.stderr.rstrip().endswith(":")


@pytest.mark.parametrize("command", ["generate", "plan"])
def test_an_encoder_is_refused(command: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=384, intermediate_size=32, **sizes)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    options = ["--prompt", "hi"] if command == "generate" else []
    result = CliRunner().invoke(app, [command, str(tmp_path), *options])
    assert result.exit_code == 2
    assert "BertConfig is not a decoder" in result.stderr


def test_eval_perplexity_says_what_few_windows_are_worth(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(haystack()[:1500])
    options = ("--bits", 4, "--window", 256, "--file", tmp_path / "text.txt")
    said = run("eval", "perplexity", model_dir, *options, "--json", tmp_path / "out.json").stdout
    windows = read(tmp_path / "out.json")["rows"]["4"]["windows"]
    assert f"The text holds {windows} of the 8 windows" in said
    assert "Intervals of fewer than 4 windows say little" in said


def test_eval_perplexity_that_is_stopped(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def uncompressed(model: PreTrainedModel) -> Cache:
        made.append(model)
        if len(made) == 2:
            raise KeyboardInterrupt
        return DynamicCache(config=model.config)

    monkeypatch.setattr("sixfold.eval.perplexity.uncompressed", uncompressed)
    options = ("--bits", 4, "--window", 256, "--windows", 2, "--json", tmp_path / "out.json")
    result = CliRunner().invoke(app, [str(x) for x in ("eval", "perplexity", model_dir, *options)])
    assert result.exit_code == 130
    assert "Stopped after 1 of 2 windows." in result.stdout
    assert read(tmp_path / "out.json")["rows"]["4"]["windows"] == 1


def test_eval_perplexity_shows_bits_of_long_contexts(model_dir: Path, tmp_path: Path) -> None:
    options = ("--bits", 4, "--window", 256, "--windows", 1, "--against", "q4_0")
    said = run("eval", "perplexity", model_dir, *options, "--json", tmp_path / "out.json").stdout
    rows = read(tmp_path / "out.json")["rows"]
    assert rows["4"]["bits_long"] < 4.7 < rows["4"]["bits_per_value"]
    assert rows["q4_0"]["bits_long"] == pytest.approx(4.5)
    assert f"{rows['4']['bits_long']:.2f} ({rows['4']['bits_per_value']:.2f})" in said


def test_generate_gives_json_alone_on_standard_output(model_dir: Path) -> None:
    result = run("generate", model_dir, "--prompt", "Once", "--max-new-tokens", 1, "--json", "-")
    (one,) = json.loads(result.stdout)["runs"]
    assert one["tokens_per_second"] is None
    assert "tokens held" in result.stderr


def test_eval_perplexity(model_dir: Path, tmp_path: Path) -> None:
    options = ("--bits", "8,2", "--window", 256, "--windows", 2, "--prefill", 150)
    files = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    result = run("eval", "perplexity", model_dir, *options, *files)
    rows = read(tmp_path / "out.json")["rows"]
    assert 0 < rows["8"]["kl"]["mean"] < rows["2"]["kl"]["mean"]
    assert rows["2"]["scored_tokens"] == 2 * 105
    assert f"{rows['2']['perplexity']:.3f}" in result.stdout
    assert_png(tmp_path / "out.png")


def test_eval_perplexity_draws_what_costs_nothing(model_dir: Path, tmp_path: Path) -> None:
    """All of so short a text is exact: a logarithm of its KL warned."""
    options = ("--bits", 4, "--window", 64, "--windows", 1, "--plot", tmp_path / "out.svg")
    run("eval", "perplexity", model_dir, *options, "--json", tmp_path / "out.json")
    assert read(tmp_path / "out.json")["rows"]["4"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert "<svg" in (tmp_path / "out.svg").read_text()


def test_eval_perplexity_sorts_peers_among_the_widths(model_dir: Path, tmp_path: Path) -> None:
    options = ("--bits", 8, "--window", 256, "--windows", 1, "--against", "vllm-3bit_nc,fp8")
    files = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    result = run("eval", "perplexity", model_dir, *options, *files)
    rows = read(tmp_path / "out.json")["rows"]
    held = [row["nbytes"] for row in rows.values()]
    assert set(rows) == {"8", "fp8", "vllm-3bit_nc"}
    assert held == sorted(held, reverse=True)
    assert rows["fp8"]["bits_per_value"] == pytest.approx(8, abs=0.01)
    lines = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    order = [name if name != "8" else "sixfold" for name in rows]
    assert [line for line in lines if line in order] == order
    assert_png(tmp_path / "out.png")


@pytest.mark.parametrize("command", ["perplexity", "niah"])
def test_an_unknown_peer_is_one_clear_error(command: str) -> None:
    result = CliRunner().invoke(app, ["eval", command, "--against", "fp8,fp9"])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("sixfold: there is no peer 'fp9'; expected 'all' or some of fp8, ")


def test_eval_help_names_every_peer() -> None:
    for command in ("perplexity", "niah"):
        output = "".join(run("eval", command, "--help").stdout.split()).replace("│", "")
        assert all(name in output for name in PEERS)


def test_eval_niah(model_dir: Path, tmp_path: Path) -> None:
    options = ("--bits", "4", "--lengths", "300,400", "--depths", "0,1", "--documents", 1)
    options += ("--against", "kivi-4")
    files = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    said = run("eval", "niah", model_dir, *options, *files).stdout
    rows = read(tmp_path / "out.json")["rows"]
    assert rows["4"]["bits_long"] < 4.7 < rows["4"]["bits_per_value"]
    assert f"{rows['4']['bits_long']:.2f} ({rows['4']['bits_per_value']:.2f})" in said
    assert rows["16"]["asked"] == rows["4"]["asked"] == rows["kivi-4"]["asked"] == 4
    assert rows["16"]["bits_per_value"] == 32 > rows["4"]["bits_per_value"]
    assert [cell["tokens"] for cell in rows["4"]["cells"]] == [300, 300, 400, 400]
    assert_png(tmp_path / "out.png")


def test_eval_sensitivity(model_dir: Path, tmp_path: Path) -> None:
    options = ("--bits", "8,2", "--window", 300, "--windows", 1)
    files = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    result = run("eval", "sensitivity", model_dir, *options, *files)
    rows = read(tmp_path / "out.json")["rows"]
    assert [(row["layer"], row["side"], row["bits"]) for row in rows[:3]] == [
        (0, "keys", 8),
        (0, "keys", 2),
        (0, "values", 8),
    ]
    assert f"{rows[1]['kl']['mean']:.5f}" in result.stdout
    assert_png(tmp_path / "out.png")


def test_eval_sensitivity_shows_its_floor(model_dir: Path, tmp_path: Path) -> None:
    """What rounding of the model's dtype costs looked like a sensitive layer."""
    options = ("--bits", 2, "--window", 300, "--windows", 1, "--json", tmp_path / "out.json")
    said = " ".join(run("eval", "sensitivity", model_dir, *options).stdout.split())
    rows = read(tmp_path / "out.json")["rows"]
    floor = {(row["layer"], row["side"]): row["kl"]["mean"] for row in rows if row["bits"] == 8}
    two = [row for row in rows if row["bits"] == 2]
    above = {(x["layer"], x["side"]): x["kl"]["mean"] - floor[x["layer"], x["side"]] for x in two}
    layer, side = max(above, key=lambda key: above[key])
    assert f"at 2 bits: {side} of layer {layer} ({above[layer, side]:.4f})" in said


def test_eval_retrieval(model_dir: Path, tmp_path: Path) -> None:
    options = ("--bits", 4, "--length", 300, "--documents", 1, "--tasks", "multikey,variables")
    files = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    result = run("eval", "retrieval", model_dir, *options, *files, "--against", "fp8")
    rows = read(tmp_path / "out.json")["rows"]
    assert list(rows) == ["multikey", "variables"]
    assert list(rows["variables"]) == ["16", "4", "fp8"]
    assert rows["variables"]["fp8"]["asked"] == 1
    assert "0/1 (0%)" in result.stdout
    assert "of 32,768 tokens" in " ".join(result.stdout.split())
    assert_png(tmp_path / "out.png")


def test_eval_longbench(model_dir: Path, tmp_path: Path) -> None:
    row = {"context": haystack()[:400], "input": "", "answers": ["1"], "length": 80}
    (tmp_path / "passage_count_e.jsonl").write_text(json.dumps(row))
    options = ("--model", model_dir, "--bits", 4, "--max-tokens", 150, "--against", "q4_0")
    files = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    result = run("eval", "longbench", tmp_path, *options, *files)
    document = read(tmp_path / "out.json")
    assert list(document["rows"]["passage_count"]) == ["16", "4", "q4_0"]
    assert document["mean"]["4"] == document["rows"]["passage_count"]["4"]["score"]
    assert "passage_count" in result.stdout
    assert "Points: by each dataset's own metric" in result.stdout
    assert_png(tmp_path / "out.png")


def test_eval_distortion(tmp_path: Path) -> None:
    files = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    result = run("eval", "distortion", "--dims", 32, "--bits", "1,2", "--vectors", 64, *files)
    rows = read(tmp_path / "out.json")["rows"]
    assert [row["bits"] for row in rows] == [1] * 5 + [2] * 5
    assert "prod-gaussian" in result.stdout
    assert "Bias: by how much they are too large" in " ".join(result.stdout.split())
    assert_png(tmp_path / "out.png")


def test_demo_measures_every_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str) -> tuple[Any, Any]:
        loaded.append(name)
        return tiny_model(), tiny_tokenizer()

    monkeypatch.setattr(demo_command, "load_model", load)
    monkeypatch.setattr(demo_command, "NEEDLES", 2)
    monkeypatch.setattr(demo_command, "WINDOW", 256)
    monkeypatch.setattr(demo_command, "PREFILL", 150)
    options = ("--bits", "4,2.5", "--context", 300, "--documents", 1, "--windows", 1)
    files = ("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    result = run("demo", *options, *files)
    assert loaded == ["embedded"]
    document = read(tmp_path / "out.json")
    plain, four, low = document["rows"]
    assert [row["bits"] for row in document["rows"]] == [16, 4, 2.5]
    assert [row["needles_asked"] for row in document["rows"]] == [2, 2, 2]
    assert plain["kl"] == 0 < four["kl"] < low["kl"]
    assert plain["nbytes"] > four["nbytes"] > low["nbytes"]
    assert four["compression_ratio"] == pytest.approx(plain["nbytes"] / four["nbytes"])
    assert document["perplexity_windows"] == [1, 256]
    assert "Limits:" in result.stdout
    assert_png(tmp_path / "out.png")
