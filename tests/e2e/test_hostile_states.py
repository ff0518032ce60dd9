"""What a file holds beside keys and values is of the model's shape, or the file is refused."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.errors import FormatError
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.integrations.transformers.storage import KIND
from sixfold.io import DTYPE_NAMES, open_container, write_container
from tests.e2e.models import ARCHITECTURES, fresh_model
from tools.sweep_architectures import architectures, build

pytestmark = [
    pytest.mark.usefixtures("unhooked"),
    pytest.mark.filterwarnings("ignore:.*dequantized for it:UserWarning"),
]

HYBRID = ("Qwen3NextForCausalLM", "FalconH1ForCausalLM", "Zamba2ForCausalLM", "lfm2")
INDEXED = ("DeepseekV32ForCausalLM",)
CROSS = ("MllamaForCausalLM",)
Change = Callable[[Tensor], Tensor]


def shorter(axis: int) -> Change:
    return lambda x: x.narrow(axis, 0, x.shape[axis] - 1)


def longer(axis: int) -> Change:
    return lambda x: torch.cat([x, x.narrow(axis, 0, 1)], axis)


class File:
    """A cache of a tiny model, of which a changed file is written with a right digest."""

    def __init__(self, name: str, path: Path) -> None:
        self.model: PreTrainedModel = (
            fresh_model(name) if name in ARCHITECTURES else build(architectures()[name], name, 1.5)
        )
        self.path = path
        ids = torch.randint(3, 90, (2, 90), generator=torch.Generator().manual_seed(0))
        image = torch.randn(2, 7, self.model.config.hidden_size)
        seen: dict[str, Any] = {"cross_attention_states": image} if name in CROSS else {}
        self.cache = TurboQuantCache.for_model(self.model, bits=8)
        self.next = ids[:, 80:]
        with torch.no_grad():
            self.model(ids[:, :80], **cache_argument(self.cache), **seen)
        self.cache.save(path)
        with open_container(path, KIND) as container:
            self.description, self.tensors = container.description, container.read()

    def load(self) -> TurboQuantCache:
        return TurboQuantCache.load(self.path, self.model)

    def change(self, kinds: Sequence[str], change: Change | None, everywhere: bool) -> None:
        """Write the file with other tensors of these kinds, or without, in one layer or in all."""
        description, tensors = copy.deepcopy(self.description), dict(self.tensors)
        changed = [i for i in range(len(self.cache.layers)) if self._names(i, kinds)]
        assert changed
        for index in changed if everywhere else changed[:1]:
            held = description["layers"][index]["tensors"]
            for name in self._names(index, kinds):
                path = f"layers.{index}.{name}"
                if change is None:
                    del tensors[path], held[name]
                else:
                    tensors[path] = change(tensors[path]).contiguous()
                    held[name] = [list(tensors[path].shape), DTYPE_NAMES[tensors[path].dtype]]
        write_container(self.path, KIND, description, tensors)

    def _names(self, index: int, kinds: Sequence[str]) -> list[str]:
        held = self.description["layers"][index].get("tensors", {})
        return [name for name in held if name.partition(".")[0] in kinds]

    def refused(
        self,
        kinds: Sequence[str],
        change: Change | None,
        everywhere: bool,
        reason: str = r"layer \d: ",
    ) -> None:
        self.change(kinds, change, everywhere)
        with pytest.raises(FormatError, match=reason):
            self.load()


@pytest.mark.parametrize("everywhere", [False, True], ids=["one layer", "all layers"])
@pytest.mark.parametrize("name", HYBRID)
def test_states(name: str, everywhere: bool, tmp_path: Path) -> None:
    file = File(name, tmp_path / "file")
    for change in (None, shorter(1), longer(1), shorter(2), longer(2)):
        file.refused(["conv_states"], change, everywhere)
    if name == "lfm2":
        return
    file.refused(["recurrent_states"], None, everywhere)
    if not everywhere:
        file.refused(["recurrent_states"], Tensor.double, everywhere)
        for axis in (1, 2, 3):
            file.refused(["recurrent_states"], shorter(axis), everywhere)


@pytest.mark.parametrize("everywhere", [False, True], ids=["one layer", "all layers"])
def test_the_keys_of_an_indexer(everywhere: bool, tmp_path: Path) -> None:
    file = File(*INDEXED, tmp_path / "file")
    for change in (None, shorter(1), longer(1)):
        file.refused(["indexer_keys"], change, everywhere)
    if not everywhere:
        file.refused(["indexer_keys"], shorter(2), everywhere)


def test_the_keys_of_an_image(tmp_path: Path) -> None:
    file = File(*CROSS, tmp_path / "file")
    (index,) = [i for i, x in enumerate(file.description["layers"]) if "parts" in x]
    for axis in (1, 3):
        for change in (shorter(axis), longer(axis)):
            file.refused(["keys", "values"], change, True, "KV heads, key and value dim")
    for length in (0, 3, 10**9):
        description = copy.deepcopy(file.description)
        description["layers"][index]["length"] = length
        write_container(file.path, KIND, description, file.tensors)
        with pytest.raises(FormatError, match=f"holds 7 keys and says {length}"):
            file.load()


@pytest.mark.parametrize("name", [*HYBRID, *INDEXED, *CROSS, "InklingForCausalLM"])
@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded past"])
def test_what_was_saved_continues_as_before(name: str, recorded: bool, tmp_path: Path) -> None:
    file = File(name, tmp_path / "file")
    with torch.no_grad():
        if recorded:
            file.cache.activate_past_recording()
            file.model(file.next[:, :2], **cache_argument(file.cache))
            file.cache.save(file.path)
        ids = file.next[:, 2:3]
        logits = [file.model(ids, **cache_argument(c)).logits for c in (file.load(), file.cache)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
