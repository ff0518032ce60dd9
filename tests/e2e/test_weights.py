"""A file belongs to weights: all of them, wherever they lie, and to nothing else."""

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.errors import FormatError
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.integrations.transformers.storage import KIND
from sixfold.integrations.transformers.weights import _first_numbers_digest, weights_digest
from sixfold.io import open_container, write_container
from tests.e2e.decoding import batch, forward
from tests.e2e.models import fresh_model
from tests.processes import printed

pytestmark = pytest.mark.usefixtures("unhooked")

PROMPT = batch((100, 80))


def model_and_file(folder: Path, name: str = "llama-64") -> tuple[PreTrainedModel, Path]:
    model = fresh_model(name)
    cache = TurboQuantCache.for_model(model)
    forward(model, cache, PROMPT, 0, PROMPT.prompt)
    cache.save(folder / "file")
    return model, folder / "file"


def last_number(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.v_proj.weight.data[-1, -1] += 1e-6


def in_the_middle(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[40, 33].neg_()


def swapped(model: PreTrainedModel) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight.data = attention.q_proj.weight.data.flip(0)


def buffer(model: PreTrainedModel) -> None:
    model.model.register_buffer("offset", torch.ones(3))


@pytest.mark.parametrize("change", [last_number, in_the_middle, swapped, buffer])
def test_any_change_is_noticed(change: Callable[[PreTrainedModel], None], tmp_path: Path) -> None:
    model, path = model_and_file(tmp_path)
    TurboQuantCache.load(path, model)
    change(model)
    with pytest.raises(FormatError, match="other weights"):
        TurboQuantCache.load(path, model)
    TurboQuantCache.load(path, model, check_weights=False)


class Adapted(nn.Module):
    """A layer with a low-rank adapter, as PEFT puts them into models."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.ones(2, base.in_features) / 50)
        self.disable_adapters = False

    @property
    def active_adapters(self) -> list[str]:
        return ["default"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        return y if self.disable_adapters else y + (x @ self.down.T).sum(-1, keepdim=True)


def test_adapters_are_noticed_and_whether_they_are_applied(tmp_path: Path) -> None:
    model, path = model_and_file(tmp_path)
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    with pytest.raises(FormatError, match=r"other weights.*adapters"):
        TurboQuantCache.load(path, model)
    cache = TurboQuantCache.for_model(model)
    forward(model, cache, PROMPT, 0, PROMPT.prompt)
    cache.save(path)
    TurboQuantCache.load(path, model)
    attention.q_proj.disable_adapters = True
    with pytest.raises(FormatError, match="other weights"):
        TurboQuantCache.load(path, model)


def test_all_that_a_weight_is_put_together_of_is_noticed(tmp_path: Path) -> None:
    """As torchao's quantized weights: subclasses that compute with tensors within."""
    model = fresh_model("llama-64")
    attention = model.model.layers[0].self_attn
    first = attention.k_proj.weight.detach()
    attention.k_proj.weight = nn.Parameter(TwoTensor(first, first.clone()), requires_grad=False)
    digest = weights_digest(model)
    assert digest == weights_digest(model)
    for part in (attention.k_proj.weight.a, attention.k_proj.weight.b):
        part[3, 5] += 1
        assert weights_digest(model) != digest
        part[3, 5] = first[3, 5] = part[3, 5] - 1
        digest = weights_digest(model)


def peft_model(make_config: Callable[[Any], Any]) -> Any:
    """A model that PEFT wraps, with two adapters of one kind."""
    library = pytest.importorskip("peft")
    config = make_config(library)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = library.get_peft_model(fresh_model("llama-64"), config).eval()
        wrapped.add_adapter("other", config)
    return wrapped


def lora(library: Any) -> Any:
    return library.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def prompt_tuning(library: Any) -> Any:
    return library.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")


def touch(model: Any, name: str) -> None:
    parameter = next(p for n, p in model.named_parameters() if name in n)
    parameter.data.view(-1)[-1] += 1e-3


PEFT_CHANGES: dict[str, Callable[[Any], object]] = {
    "switched": lambda model: model.set_adapter("other"),
    "merged": lambda model: model.base_model.merge_adapter(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "trained": lambda model: touch(model, "lora_B.default"),
}


@pytest.mark.parametrize("change", PEFT_CHANGES.values(), ids=PEFT_CHANGES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_what_peft_does_to_a_model_is_noticed(
    change: Callable[[Any], object], tmp_path: Path
) -> None:
    model = peft_model(lora)
    cache = TurboQuantCache.for_model(model)
    forward(model, cache, PROMPT, 0, PROMPT.prompt)
    cache.save(tmp_path / "file")
    TurboQuantCache.load(tmp_path / "file", model)
    change(model)
    with pytest.raises(FormatError, match="other weights"):
        TurboQuantCache.load(tmp_path / "file", model)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_learned_prompt_belongs_to_the_weights(tmp_path: Path) -> None:
    model = peft_model(prompt_tuning)
    cache = TurboQuantCache.for_model(model)
    model.generate(
        input_ids=PROMPT.ids[:1], **cache_argument(cache), max_new_tokens=2, do_sample=False
    )
    cache.save(tmp_path / "file")
    again = TurboQuantCache.load(tmp_path / "file", model)
    again.save(tmp_path / "again")
    TurboQuantCache.load(tmp_path / "again", model)
    with pytest.raises(FormatError, match="other weights"):
        TurboQuantCache.load(tmp_path / "file", model.get_base_model())
    model.set_adapter("other")
    with pytest.raises(FormatError, match="other weights"):
        TurboQuantCache.load(tmp_path / "file", model)
    model.set_adapter("default")
    TurboQuantCache.load(tmp_path / "file", model)
    touch(model.prompt_encoder, "default")
    with pytest.raises(FormatError, match="other weights"):
        TurboQuantCache.load(tmp_path / "file", model)


def test_the_dtype_is_noticed_first(tmp_path: Path) -> None:
    model, path = model_and_file(tmp_path)
    with pytest.raises(FormatError, match=r"torch\.float32.*torch\.bfloat16.*check_weights=False"):
        TurboQuantCache.load(path, model.bfloat16())
    converted = TurboQuantCache.load(path, model, check_weights=False)
    assert converted.compressed_layers[0].store.window.keys.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "digest",
    [_first_numbers_digest, lambda model: weights_digest(model, kind="all:")],
    ids=["first numbers", "all"],
)
def test_a_digest_of_an_earlier_kind_is_still_compared(
    digest: Callable[[Any], str], tmp_path: Path
) -> None:
    model, path = model_and_file(tmp_path)
    with open_container(path, KIND) as container:
        description, tensors = container.description, container.read()
    assert re.fullmatch("all-2:[0-9a-f]{64}", description["weights"])
    earlier: dict[str, Any] = {**description, "weights": digest(model)}
    del earlier["dtype"]
    write_container(path, KIND, earlier, tensors)
    TurboQuantCache.load(path, model)
    model.model.embed_tokens.weight.data[0, 0] += 1
    with pytest.raises(FormatError, match="other weights"):
        TurboQuantCache.load(path, model)


@pytest.mark.parametrize("weights", [3, "", "all:", "all-2:", "x" * 64, {}, []])
def test_a_digest_that_is_none(weights: Any, tmp_path: Path) -> None:
    model, path = model_and_file(tmp_path)
    with open_container(path, KIND) as container:
        description, tensors = container.description, container.read()
    write_container(path, KIND, {**description, "weights": weights}, tensors)
    with pytest.raises(FormatError, match="other weights"):
        TurboQuantCache.load(path, model)


def test_views_and_odd_sizes() -> None:
    """What bytes there are counts, not how they lie."""
    whole = torch.arange(41, dtype=torch.uint8)
    model, twin = nn.Module(), nn.Module()
    model.register_buffer("x", whole[3:40])
    twin.register_buffer("x", whole[3:40].clone())
    assert weights_digest(model) == weights_digest(twin)
    for position in range(37):
        changed = whole[3:40].clone()
        changed[position] += 1
        twin.register_buffer("x", changed)
        assert weights_digest(model) != weights_digest(twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("every", [2, 4, 8])
def test_signs(dtype: torch.dtype, every: int) -> None:
    """Changed by the even number, as when a model's rotary halves change places."""
    model, twin = nn.Module(), nn.Module()
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    model.register_buffer("x", weights)
    changed = weights.clone()
    changed[:, every - 1 :: every].neg_()
    twin.register_buffer("x", changed)
    assert weights_digest(model) != weights_digest(twin)


def test_blocks_that_change_places() -> None:
    model, twin = nn.Module(), nn.Module()
    blocks = torch.arange(4 * 2**19, dtype=torch.int32).view(2, -1).float()
    model.register_buffer("x", blocks)
    twin.register_buffer("x", blocks.flip(0))
    assert weights_digest(model) != weights_digest(twin)


# ---------------------------------------------------------------- offloaded weights


def offload(model: PreTrainedModel, folder: Path, where: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    if where == "memory":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, folder / "weights", execution_device="cpu")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloaded_weights_are_read(where: str, tmp_path: Path) -> None:
    model, path = model_and_file(tmp_path)
    digest = weights_digest(model)
    offload(model, tmp_path, where)
    assert model.device.type == "meta"
    assert weights_digest(model) == digest
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    cache = TurboQuantCache.load(path, model)
    assert {x.device.type for x in cache.tensors()} == {"cpu"}
    cache.save(path)
    plain = fresh_model("llama-64")
    again = TurboQuantCache.load(path, plain)
    assert again.get_seq_length() == PROMPT.prompt
    assert forward(plain, again, PROMPT, 100, 101).isfinite().all()


def test_weights_that_are_nowhere(tmp_path: Path) -> None:
    model, path = model_and_file(tmp_path)
    cache = TurboQuantCache.load(path, model)
    model.to("meta")
    with pytest.raises(FormatError, match=r"meta device.*check_weights=False"):
        TurboQuantCache.load(path, model)
    with pytest.warns(UserWarning, match="meta device"):
        cache.save(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TurboQuantCache.load(tmp_path / "again", fresh_model("llama-64"))


def test_the_warning_is_about_a_line_of_the_caller(tmp_path: Path) -> None:
    code = f"""
import warnings
from pathlib import Path
from tests.e2e.test_weights import TurboQuantCache, model_and_file
model, path = model_and_file(Path({str(tmp_path)!r}))
cache = TurboQuantCache.load(path, model)
model.to("meta")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    cache.save(path)
print(*{{x.filename for x in caught}})
"""
    assert printed(code) == ["<string>"]


class Packed(nn.Module):
    """A layer that keeps its weights where neither parameters nor buffers are."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # Newer versions of torch would have such tensors come from elsewhere.
            warnings.simplefilter("ignore")
            self.packed = (torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "packed"] = self.packed


class Scaled(nn.Module):
    """One that says in words of its own what else it keeps."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scales = weight

    def get_extra_state(self) -> Any:
        return {"scales": [self.scales], "bits": 4}


class Noted(Scaled):
    """What it keeps is a number, within something that holds itself."""

    def get_extra_state(self) -> Any:
        found: list[Any] = [float(self.scales[0])]
        found.append(found)
        return found


class Array(Scaled):
    """What it keeps is none of PyTorch's tensors."""

    def get_extra_state(self) -> Any:
        return self.scales.numpy()


class Written(Scaled):
    """It is written to a buffer, as some libraries do."""

    def get_extra_state(self) -> Any:
        return io.BytesIO(self.scales.numpy().tobytes())


class Sparse(Scaled):
    """Most of it is zero."""

    def get_extra_state(self) -> Any:
        return self.scales.diag().to_sparse()


@pytest.mark.parametrize(
    "value", [b"", io.BytesIO(), [], {}, None, "", np.zeros(0), torch.zeros(0)]
)
def test_extra_state_that_is_empty(value: Any) -> None:
    class Empty(nn.Module):
        def get_extra_state(self) -> Any:
            return value

    assert weights_digest(Empty()) == weights_digest(Empty())


A, B = [1], [2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, [2]], [[1], 2]),
        ([b"1"], [1]),
        ({1: 2}, [1, 2]),
        (["1", "2"], ["1, 2"]),
        ([A, A, B], [A, B, B]),
        ([torch.ones(1), [torch.zeros(1)]], [[torch.ones(1)], torch.zeros(1)]),
    ],
    ids=str,
)
def test_extra_state_that_is_put_together_otherwise(one: Any, other: Any) -> None:
    class Stateful(nn.Module):
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

        def get_extra_state(self) -> Any:
            return self.value

    assert weights_digest(Stateful(one)) == weights_digest(Stateful(one))
    assert weights_digest(Stateful(one)) != weights_digest(Stateful(other))


LAZY = [
    torch._neg_view(torch.ones(3)),
    torch.ones(3, dtype=torch.complex64).conj(),
]


@pytest.mark.parametrize("value", LAZY, ids=["negative", "conjugate"])
def test_extra_state_of_unusual_tensors(value: Tensor) -> None:
    class Lazy(nn.Module):
        def get_extra_state(self) -> Any:
            return value

    assert weights_digest(Lazy()) == weights_digest(Lazy())


def test_extra_state_of_many_numbers_that_is_shared() -> None:
    class Many(nn.Module):
        def get_extra_state(self) -> Any:
            shared: list[Any] = list(range(100_000))
            for _ in range(40):
                shared = [shared, shared]
            return shared

    assert weights_digest(Many()) == weights_digest(Many())


@pytest.mark.parametrize("kind", [Packed, Scaled, Noted, Array, Written, Sparse])
def test_weights_that_are_no_parameters_count(kind: type[nn.Module]) -> None:
    weight = torch.linspace(-5, 5, 64)
    model, same, other = kind(weight), kind(weight.clone()), kind(-weight)
    assert weights_digest(model) == weights_digest(same)
    assert weights_digest(model) != weights_digest(other)
