"""What a key map depends on, and what depends on nothing but the map."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sixfold.cache import CachePolicy, CompressedLayer, KeyMaps
from sixfold.cache.state import layer_state
from sixfold.kernels.types import KeyMap
from tests.layers import Shape

SHAPE = Shape()
TOKENS = 300
chunks = st.lists(st.sampled_from([1, 2, 48, 63, 64, 65, 128]) | st.integers(1, 200), max_size=9)
paddings = st.tuples(st.just(0), st.sampled_from([0, 0, 5, 40, 60]))
policies = st.builds(
    CachePolicy,
    key_bits=st.sampled_from([2.5, 3, 8]),
    value_bits=st.sampled_from([1, 4]),
    sink_tokens=st.sampled_from([0, 4]),
    recent_window=st.sampled_from([0, 5, 64]),
)


def ends(sizes: list[int]) -> list[int]:
    """Where the chunks end that have these sizes; one more takes the rest."""
    return [n for n in itertools.accumulate(sizes) if n < TOKENS] + [TOKENS]


def filled(
    stops: list[int],
    policy: CachePolicy,
    padding: tuple[int, int],
    key_map: KeyMap | None = None,
    seed: int = 0,
) -> CompressedLayer:
    query, keys, values = SHAPE.tokens(TOKENS, seed)
    layer = CompressedLayer(keys, values, policy, None, key_map)
    visible = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    visible &= torch.arange(TOKENS) >= torch.tensor(padding)[:, None, None, None]
    for start, stop in itertools.pairwise([0, *stops]):
        layer.append(keys[:, :, start:stop], values[:, :, start:stop])
        mask = visible[:, :, start:stop, :stop]
        layer.attend(query[:, :, start:stop], scaling=SHAPE.scaling, mask=mask)
    return layer


def assert_same(one: CompressedLayer, other: CompressedLayer) -> None:
    expected, found = layer_state(one)[1], layer_state(other)[1]
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        assert torch.equal(x, found[name]), name


def pinned_map(seed: int) -> KeyMap:
    layer = filled([TOKENS], CachePolicy(), (0, 0), seed=seed)
    assert layer.prefix is not None
    return KeyMaps.of({0: layer.prefix.key_map})[0]


@given(sizes=chunks, policy=policies, padding=paddings)
def test_given_the_map_nothing_depends_on_the_chunks(
    sizes: list[int], policy: CachePolicy, padding: tuple[int, int]
) -> None:
    """Codes, scales, sinks and window, bit for bit, of padded sequences too."""
    key_map = pinned_map(seed=1)
    in_one_piece = filled([TOKENS], policy, padding, key_map)
    assert_same(filled(ends(sizes), policy, padding, key_map), in_one_piece)


@given(sizes=chunks, policy=policies, padding=paddings)
def test_a_map_depends_on_the_tokens_before_its_first_page(
    sizes: list[int], policy: CachePolicy, padding: tuple[int, int]
) -> None:
    """However the tokens come in after the chunk that completes the first page."""
    stops = ends(sizes)
    needed = [policy.recent_window + 64, max(padding) + policy.sink_tokens + 16]
    first = next(n for n in stops if n >= max(needed))
    before = [n for n in stops if n <= first]
    others = before if first == TOKENS else [*before, TOKENS]
    assert_same(filled(stops, policy, padding), filled(others, policy, padding))


@pytest.mark.parametrize("stops", [[150, TOKENS], [48, 150, TOKENS]])
def test_a_map_fitted_to_fewer_tokens_is_another(stops: list[int]) -> None:
    """What does not hold, and the documents say so: the chunks before the first page matter."""
    maps = [filled(x, CachePolicy(), (0, 0)).prefix for x in (stops, [TOKENS])]
    assert maps[0] is not None
    assert maps[1] is not None
    assert not torch.equal(maps[0].key_map.mean, maps[1].key_map.mean)


@given(sizes=chunks, policy=policies)
def test_a_pinned_map_of_the_same_sequence_reproduces_its_codes(
    sizes: list[int], policy: CachePolicy
) -> None:
    fitted = filled(ends(sizes), policy, (0, 0))
    assert fitted.prefix is not None
    for row in range(SHAPE.batch):
        key_map = KeyMaps.of({0: fitted.prefix.key_map.select(torch.tensor([row]))})[0]
        found = layer_state(filled([TOKENS], policy, (0, 0), key_map))[1]
        for name, x in layer_state(fitted)[1].items():
            assert torch.equal(x[row], found[name][row]), name
