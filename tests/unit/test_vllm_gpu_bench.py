"""The benchmark of vLLM on a GPU, where there is none."""

from pathlib import Path

import pytest
import torch

from benchmarks import vllm_gpu

MEASURES = ("kl", "batch_to_alone")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["vllm_gpu", "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match="no GPU here"):
        vllm_gpu.main()
    assert not list(tmp_path.iterdir())


def test_wrong_answers_are_told_from_right_ones() -> None:
    nan = float("nan")
    right = {"contender": "SIXFOLD_4BIT", "runner": "V1", "kl": 0.002, "batch_to_alone": 0.001}
    assert vllm_gpu.wrong([right, {"contender": "auto"}, {"contender": "fp8", "kl": 1.0}]) == []
    for change in (
        {"kl": 0.5},
        {"kl": nan},
        {"batch_to_alone": nan},
        {"batch_to_alone": 0.1},
        {"failed": "x"},
    ):
        assert len(vllm_gpu.wrong([{**right, **change}])) == 1


def test_a_part_that_fails_costs_nothing_but_itself() -> None:
    found: dict[str, list[dict[str, object]]] = {}
    for code in ("raise SystemExit('no memory')", "import time; time.sleep(60)", "pass"):
        vllm_gpu.attempt(
            found, "part", "auto", lambda code=code: {"said": vllm_gpu.run(code, [], 5)}
        )
    failed, late, right = found["part"]
    assert "no memory" in str(failed["failed"])
    assert "more than 5 s" in str(late["failed"])
    assert right == {"said": ""}


def test_divergence_is_that_of_all_tokens() -> None:
    uniform, sure = torch.zeros(2, 2).log_softmax(-1), torch.tensor([[0.0, -1e9]])
    assert vllm_gpu.divergence([uniform], [uniform]) == 0
    mixed = vllm_gpu.divergence([sure, uniform], [uniform[:1], uniform])
    assert mixed == pytest.approx(float(torch.tensor(2.0).log()) / 3)
