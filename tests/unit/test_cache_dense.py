"""Raw tokens that grow in place: what was written once is never written again."""

import copy
import threading

import pytest
import torch
from torch import Tensor

from sixfold.cache.dense import GROWTH, DenseTokens
from tests.layers import Shape, filled
from tests.vectors import gaussian


def tokens(count: int, seed: int = 0) -> DenseTokens:
    keys, values = (gaussian(2 * count, 8, seed + side).view(1, 2, count, 8) for side in (0, 1))
    return DenseTokens(keys, values)


def joined(*parts: DenseTokens) -> tuple[Tensor, Tensor]:
    return torch.cat([x.keys for x in parts], 2), torch.cat([x.values for x in parts], 2)


def assert_holds(got: DenseTokens, *parts: DenseTokens) -> None:
    keys, values = joined(*parts)
    assert torch.equal(got.keys, keys)
    assert torch.equal(got.values, values)


@torch.no_grad()
def test_tokens_are_added_in_place_while_there_is_room() -> None:
    parts = [tokens(5), *(tokens(1, seed) for seed in range(1, 2 * GROWTH))]
    held, addresses = parts[0], set()
    for part in parts[1:]:
        held = held.append(part)
        addresses.add(held.keys.data_ptr())
    assert_holds(held, *parts)
    assert len(addresses) <= 3
    assert held.room is not None
    assert held.room.keys.shape[2] - held.tokens < GROWTH


@torch.no_grad()
def test_what_was_handed_out_stays() -> None:
    start = tokens(3).append(tokens(1, 1))
    kept, copy = start, start.keys.clone()
    for seed in range(2, 40):
        start = start.append(tokens(1, seed))
    assert torch.equal(kept.keys, copy)


@torch.no_grad()
def test_the_first_of_two_forks_grows_in_place_and_the_other_copies() -> None:
    base = tokens(3).append(tokens(1, 1))
    one, other = base.append(tokens(1, 2)), base.append(tokens(1, 3))
    assert one.room is base.room
    assert other.room is not base.room
    assert_holds(one, tokens(3), tokens(1, 1), tokens(1, 2))
    assert_holds(other, tokens(3), tokens(1, 1), tokens(1, 3))


@torch.no_grad()
def test_cropped_tokens_do_not_overwrite_those_of_a_fork() -> None:
    whole = tokens(3).append(tokens(4, 1))
    cropped = whole.slice(0, 5)
    assert_holds(cropped.append(tokens(1, 9)), tokens(3), tokens(4, 1).slice(0, 2), tokens(1, 9))
    assert_holds(whole, tokens(3), tokens(4, 1))


@torch.no_grad()
def test_forgotten_tokens_leave_the_others() -> None:
    held = tokens(10).append(tokens(1, 1))
    for seed in range(2, 30):
        held = held.without_first(1).append(tokens(1, seed))
    assert_holds(held, *(tokens(1, seed) for seed in range(19, 30)))


def test_threads_that_grow_one_window_get_their_own_tokens() -> None:
    with torch.no_grad():
        base = tokens(3).append(tokens(1, 1))
    found: dict[int, DenseTokens] = {}
    together = threading.Barrier(4)

    @torch.no_grad()
    def grow(number: int) -> None:
        together.wait()
        held = base
        for step in range(30):
            held = held.append(tokens(1, 100 * number + step))
        found[number] = held

    threads = [threading.Thread(target=grow, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, held in found.items():
        new = [tokens(1, 100 * number + step) for step in range(30)]
        assert_holds(held, tokens(3), tokens(1, 1), *new)


def test_a_graph_that_somebody_holds_is_not_spoiled() -> None:
    """With gradients enabled nothing is written in place: a backward pass may need what was."""
    layer, shape = filled(100), Shape()
    query, keys, values = shape.tokens(1, 1)
    layer.append(keys, values)
    asked = query.requires_grad_()
    out = layer.attend(asked, scaling=shape.scaling)
    later = shape.tokens(1, 2)
    layer.append(*later[1:])
    layer.attend(later[0], scaling=shape.scaling)
    out.sum().backward()
    assert asked.grad is not None


@torch.no_grad()
def test_a_step_joins_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = filled(300), Shape()
    step = [shape.tokens(1, seed) for seed in range(20)]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a step copied what is held")

    monkeypatch.setattr(torch, "cat", refuse)
    monkeypatch.setattr(torch, "stack", refuse)
    for query, keys, values in step:
        layer.append(keys, values)
        layer.attend(query, scaling=shape.scaling)
        if (layer.window.tokens + 1) % 64 == 0:
            break


def test_growth_spoils_no_graph_of_what_was_handed_out() -> None:
    with torch.no_grad():
        held = tokens(3).append(tokens(1, 1))
    weight = torch.ones_like(held.keys).requires_grad_()
    loss = (held.keys * weight).sum()
    with torch.no_grad():
        held.append(tokens(1, 2))
    loss.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, held.keys)


@torch.no_grad()
def test_what_a_window_left_behind_is_let_go() -> None:
    held = tokens(10).append(tokens(5000, 1)).without_first(4947)
    assert sum(x.untyped_storage().nbytes() for x in (held.keys, held.values)) < 8 * 80 * 2 * 4 * 2


def test_tokens_of_inference_mode_grow_outside_of_it() -> None:
    with torch.inference_mode():
        held = copy.deepcopy(tokens(3).append(tokens(1, 1)))
    with torch.no_grad():
        assert_holds(held.append(tokens(1, 2)), tokens(3), tokens(1, 1), tokens(1, 2))
