"""Files of released versions are read, and mean what they meant."""

import re
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sixfold import TurboQuantCache
from sixfold.codebooks import lloyd_max
from sixfold.integrations.transformers.storage import KIND
from sixfold.io import FORMAT_VERSION, open_container
from sixfold.packing import (
    encode_scale,
    from_pages,
    n_symbols,
    pack,
    symbol_bits,
    to_pages,
    unpack,
)
from sixfold.rotation import Rotation
from sixfold.trellis import STATES, TRELLIS_BITS, codewords, pack_path, unpack_path
from tests.golden import make, reader

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"


every_version = pytest.mark.parametrize("golden", make.GOLDEN, ids=lambda x: f"v{x.version}")


def stored(golden: make.Golden) -> dict[str, Tensor]:
    return load_file(golden.contents)


def test_the_version_that_is_written_has_a_file() -> None:
    assert make.GOLDEN[-1].version == FORMAT_VERSION


@every_version
def test_golden_file_decodes_to_what_it_did(golden: make.Golden) -> None:
    # In the dtype of the file: to another one tokens are converted.
    model = make.model(golden).bfloat16()
    cache = TurboQuantCache.load(golden.cache, model, check_weights=False)
    found = make.contents(cache)
    assert found.keys() == stored(golden).keys()
    for name, expected in stored(golden).items():
        assert found[name].dtype == expected.dtype
        torch.testing.assert_close(found[name], expected, rtol=2**-7, atol=1e-6)
    assert cache.get_seq_length() == make.TOKENS
    _, keys, values = make.tokens(2, golden.dim)
    assert torch.equal(cache.layers[2].keys, keys)
    assert torch.equal(cache.layers[2].values, values)


@every_version
def test_the_same_inputs_still_give_the_golden_bytes(golden: make.Golden) -> None:
    with open_container(golden.cache, KIND) as container:
        expected, description = container.read(), container.description
    layers = description["layers"]
    for index, layer in enumerate(make.filled(golden).compressed_layers):
        store, prefix = layer.store, f"layers.{index}."
        assert store is not None
        assert store.prefix is not None
        # The map is a sum in float32, whose order is no part of the format; the codes are.
        mean, scale = store.prefix.key_map.mean, store.prefix.key_map.scale
        torch.testing.assert_close(mean, expected[prefix + "key_map.mean"])
        torch.testing.assert_close(scale, expected[prefix + "key_map.scale"])
        (run,) = store.history.runs
        for name, tensor in run.slab.pool._asdict().items():
            assert torch.equal(tensor[run.slots], expected[prefix + name]), name
        assert run.lengths.tolist() == layers[index]["page_lengths"]


@every_version
def test_a_reader_written_from_the_document_agrees(golden: make.Golden) -> None:
    description, tensors = reader.read_file(golden.cache)
    for index, layer in enumerate(description["layers"][:2]):
        prefix = f"layers.{index}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for side in ("key", "value"):
            found = reader.history(layer, own, side)
            expected = stored(golden)[f"{index}.{side}s"].float().numpy()
            np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("dim", "bits"), [(8, 1), (8, 4), (128, 2), (33, 3)])
def test_levels_are_what_the_document_says(dim: int, bits: int) -> None:
    np.testing.assert_allclose(reader.levels(dim, bits), lloyd_max(dim, bits), atol=2e-4)


def test_the_rotation_is_what_the_document_says() -> None:
    x = torch.eye(16)
    rotated = Rotation(16, "hadamard", 5).rotate(x).numpy().T
    np.testing.assert_allclose(reader.rotation(16, 5), rotated, atol=1e-6)


# ---------------------------------------------------------------- the worked example


def example(heading: str) -> list[list[str]]:
    """The lines of the fenced block of docs/format.md that begins with `heading`, as words."""
    block = re.search(rf"```text\n({heading}.*?)```", FORMAT.read_text(), re.DOTALL)
    assert block is not None
    return [line.split() for line in block[1].splitlines()]


def check_planes(lines: list[list[str]], dim: int, bits: float) -> None:
    symbols = torch.tensor([int(word) for word in lines[0][1:]], dtype=torch.uint8)
    expected = [int(word, 16) for line in lines[1:] for word in line[2:]]
    assert len(symbols) == n_symbols(dim, bits)
    row = pack(symbols, symbol_bits(bits))
    assert row.tolist() == expected
    assert torch.equal(unpack(row, len(symbols), symbol_bits(bits)), symbols)


def test_the_rows_of_the_worked_example() -> None:
    check_planes(example(r"symbols +7"), 8, 3)
    check_planes(example(r"symbols +31"), 5, 2.5)


def test_the_trellis_row_of_the_worked_example() -> None:
    row, states, levels = (line[1:] for line in example("row "))
    packed = torch.tensor([int(word, 16) for word in row], dtype=torch.uint8)
    path = unpack_path(packed, 5, 2.5, 256)
    assert path.tolist() == [int(word) for word in states]
    assert torch.equal(pack_path(path, 2.5), packed)
    found = codewords(256, 2.5)[path].tolist()
    assert found == pytest.approx([float(word) for word in levels], abs=5e-5)


def test_the_codebooks_of_the_trellis_are_those_of_the_document() -> None:
    for states in STATES:
        (line,) = re.findall(rf"^\| {states} \| (.*) \|$", FORMAT.read_text(), re.MULTILINE)
        for bits, cell in zip(TRELLIS_BITS, line.split(" | "), strict=True):
            multiplier, spread = map(float, cell.split(", "))
            steps = np.arange(1, 2 * states, 2) * int(multiplier) % (2 * states)
            normal = NormalDist(0, spread)
            expected = [normal.inv_cdf(step / (2 * states)) for step in steps.tolist()]
            np.testing.assert_allclose(codewords(states, bits), expected, atol=1e-6)


@pytest.mark.parametrize("side", ["key", "value"])
def test_the_pages_of_the_worked_example(side: str) -> None:
    row = torch.tensor([0x07, 0x07, 0x02, 0x02, 0x03, 0x00, 0x03, 0x00], dtype=torch.uint8)
    rows = torch.zeros(64, 8, dtype=torch.uint8)
    rows[17] = row
    lines = {line[0]: [int(word) for word in line[2:]] for line in example("key page")}
    expected = torch.zeros(512, dtype=torch.uint8)
    expected[lines[side]] = row
    assert torch.equal(to_pages(rows, 8, 3, side), expected)
    assert torch.equal(from_pages(expected, 8, 3, side), rows)
    found = reader.symbols(expected.numpy(), 8, 3, side)
    assert found[17].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert found.sum() == 28


def test_a_whole_page_of_four_dims_by_hand() -> None:
    # Token t has symbols t % 8, 0, 7, t // 16 at three bits.
    tokens = torch.arange(64)
    columns = [tokens % 8, torch.zeros(64), torch.full((64,), 7), tokens // 16]
    rows = pack(torch.stack(columns, -1).to(torch.uint8), 3)
    expected_keys, expected_values = bytearray(512), bytearray(512)
    for t in range(64):
        high = [t % 8 >> 1, 0, 3, t // 16 >> 1]
        low = [t % 8 & 1, 0, 1, t // 16 & 1]
        for k in range(4):
            for start, part in ((0, high), (256, low)):
                expected_keys[start + 4 * t + k] = part[k]
                expected_values[start + 16 * (t // 4) + 4 * k + t % 4] = part[k]
    assert to_pages(rows, 4, 3, "key").tolist() == list(expected_keys)
    assert to_pages(rows, 4, 3, "value").tolist() == list(expected_values)
    assert bytes(expected_keys[:12]).hex(" ") == "00 00 03 00 00 00 03 00 01 00 03 00"
    assert bytes(expected_values[:16]).hex(" ") == "00 00 01 01 00 00 00 00 03 03 03 03 00 00 00 00"


def test_the_scales_of_the_document() -> None:
    (row,) = re.findall(r"^\| bytes \| (.*) \|$", FORMAT.read_text(), re.MULTILINE)
    expected = [bytes.fromhex(cell) for cell in re.findall(r"`([0-9a-f ]+)`", row)]
    scales = encode_scale(torch.tensor([0, 1.5, 65504, 100_000, 1e-9, 1e12, torch.nan]))
    assert [scale.numpy().tobytes() for scale in scales] == expected
    decoded = reader.scale(scales.numpy())[:6]
    np.testing.assert_array_equal(decoded[:4], [0, 1.5, 65504, 99968])
    np.testing.assert_allclose(decoded[4:], [1.0041e-9, 9.964e11], rtol=1e-4)
