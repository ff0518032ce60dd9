"""The key map of an engine's layer: fitted again until enough was seen, and to what is its own."""

from typing import Any

import pytest
import torch

from sixfold.cache.engine import EngineLayer
from sixfold.kernels.types import KeyMap
from sixfold.packing import PAGE_TOKENS
from tests.engine import Engine, check_codes, engine_layer, exact, relative, request


def test_the_map_is_fitted_again_until_enough_was_seen() -> None:
    """At the first page, and whenever twice as many are full; codes are those of the last map."""
    layer = engine_layer(bits=4)
    engine, one = Engine(layer), request(1300, 3)
    engine.start(one)
    engine.step([(one, PAGE_TOKENS - 1)])
    assert layer.key_map is None
    fitted: dict[int, KeyMap] = {}
    while one.done < one.tokens:
        # Rows as a request decodes, and now and then a chunk of some pages.
        engine.step([(one, min(150 if one.done % 256 == 255 else 1, one.tokens - one.done))])
        pages = one.done // PAGE_TOKENS
        if not fitted or layer.key_map is not [*fitted.values()][-1]:
            fitted[pages] = layer.key_map
            mean = one.keys[: pages * PAGE_TOKENS].mean(0)
            torch.testing.assert_close(layer.key_map.mean[0], mean, rtol=1e-4, atol=1e-4)
            check_codes(engine, [one])
    assert [*fitted] == [1, 2, 6, 14, 18]
    assert layer.key_map is fitted[18]
    check_codes(engine, [one])


def test_blocks_that_were_given_away_are_not_written_again() -> None:
    """To another sequence, whose page is coded there, or to another layer (`forget`)."""
    layer = engine_layer(bits=4)
    engine, first, second, third = Engine(layer), *(request(256, seed) for seed in (1, 2, 3))
    for one in (first, second, third):
        engine.start(one)
    engine.step([(first, 64)])
    engine.step([(second, 64)])
    lent, again = first.blocks[0], second.blocks[0]
    engine.free += [again]
    layer.forget([lent])
    for x in engine.pool:
        x[lent].view(torch.uint8).fill_(0x55)
    engine.step([(third, 64)])
    assert third.blocks == [again]
    old = layer.key_map
    engine.step([(third, 192)])
    assert layer.key_map is not old
    check_codes(engine, [third])
    for x in engine.pool:
        assert (x[lent].view(torch.uint8) == 0x55).all()


def test_the_map_is_fitted_to_pages_whose_blocks_were_used_again() -> None:
    """An engine that gives its only block to one greeting after another."""
    layer = engine_layer(bits=4)
    engine, greetings = Engine(layer, blocks=1), [request(64, seed) for seed in range(20)]
    fitted: dict[int, KeyMap] = {}
    for i, one in enumerate(greetings):
        engine.start(one)
        engine.step([(one, 64)])
        check_codes(engine, [one])
        engine.stop(one)
        assert layer.key_map is not None
        if not fitted or layer.key_map is not [*fitted.values()][-1]:
            fitted[i + 1] = layer.key_map
            mean = torch.cat([x.keys for x in greetings[: i + 1]]).mean(0)
            torch.testing.assert_close(layer.key_map.mean[0], mean, rtol=1e-4, atol=1e-4)
    assert [*fitted] == [1, 2, 4, 8, 16]
    assert not layer.learning


class Failing:
    """A code whose memory cannot be written to, from some call on."""

    def __init__(self, layer: EngineLayer, works: int) -> None:
        self.code, self.works = layer.code, works
        layer.code = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.code, name)

    def store(self, *given: Any) -> None:
        if not self.works:
            raise MemoryError
        self.works -= 1
        self.code.store(*given)


@pytest.mark.parametrize("works", [0, 1])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("pages", [1, 5])
def test_a_step_that_failed_while_its_pages_were_coded(
    works: int, repeated: bool, pages: int
) -> None:
    """Whether it is repeated or given up, the pages before are read by the map they have."""
    layer = engine_layer()
    engine, one, other = Engine(layer), request(500, 1), request(500, 2)
    engine.start(one)
    engine.step([(one, PAGE_TOKENS)])
    before = layer.key_map
    failing = Failing(layer, works)
    engine.start(other)
    with pytest.raises(MemoryError):
        engine.step([(other, pages * PAGE_TOKENS)])
    failing.works = 1000
    if repeated:
        (out,) = engine.step([(other, pages * PAGE_TOKENS)])
        assert relative(out, exact(other)[: len(out)]) < 0.02
    else:
        engine.stop(other)
    (out,) = engine.step([(one, 100)])
    assert layer.key_map is not before
    check_codes(engine, [one] + [other] * repeated)
    assert relative(out, exact(one)[64:164]) < 0.02


def test_a_first_page_that_failed_to_be_coded() -> None:
    layer, one, other = engine_layer(), request(500, 1), request(64, 2)
    engine, failing = Engine(layer), Failing(layer, 0)
    engine.start(one)
    with pytest.raises(MemoryError):
        engine.step([(one, 5 * PAGE_TOKENS)])
    engine.stop(one)
    failing.works = 1000
    engine.start(other)
    engine.step([(other, 64)])
    check_codes(engine, [other])


@pytest.mark.parametrize("tokens", [10, 70])
def test_a_layer_that_is_told_to_settle(tokens: int) -> None:
    """Keeps the map it has, or the first."""
    layer = engine_layer(bits=4)
    engine, one = Engine(layer), request(400, 3)
    engine.start(one)
    engine.step([(one, tokens)])
    layer.settle()
    engine.step([(one, 80)])
    fitted = layer.key_map
    engine.step([(one, 200)])
    assert fitted is not None
    assert layer.key_map is fitted
    assert not layer.learning
    check_codes(engine, [one])


def test_a_layer_whose_blocks_others_write_to_keeps_its_first_map() -> None:
    layer = engine_layer(bits=4, refit=False)
    engine, one = Engine(layer), request(400, 3)
    engine.start(one)
    engine.step([(one, 70)])
    fitted = layer.key_map
    engine.step([(one, 300)])
    assert fitted is not None
    assert layer.key_map is fitted
    check_codes(engine, [one])


def test_what_was_asked_before_all_sequences_of_now_began_does_not_count() -> None:
    """An engine warms up with sequences of a few tokens, as many as it can run at once."""
    maps = []
    for warmed in (False, True):
        layer = engine_layer(bits=4)
        engine, one = Engine(layer), request(100, 3)
        if warmed:
            dummy = [request(3, seed) for seed in range(4)]
            for other in dummy:
                other.query[:, :, :8] *= 1000
                engine.start(other)
            engine.step([(other, 2) for other in dummy])
            engine.step([(other, 1) for other in dummy])
            for other in dummy:
                engine.stop(other)
        engine.start(one)
        engine.step([(one, 50)])
        engine.step([(one, 50)])
        assert layer.key_map is not None
        maps.append(layer.key_map)
    torch.testing.assert_close(*(x.scale for x in maps), rtol=0, atol=0)
