"""Any sequence of operations on codes equals the same operations on a dense history."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.cache.state import expected_tensors, layer_state, restore_layer
from sixfold.errors import SixfoldError
from tests.layers import Shadow, Shape, oracle

MAX_BATCH = 4
seeds = st.integers(0, 2**16)
# Page ends and window edges are where mistakes live.
counts = st.sampled_from([1, 63, 64, 65, 128, 129]) | st.integers(1, 150)


class Operations(RuleBasedStateMachine):
    """Layers that share pages by forking, each beside its dense shadow."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[CompressedLayer, Shadow]] = []

    @initialize(
        key_bits=st.sampled_from([2.5, 3, 8]),
        value_bits=st.sampled_from([1, 3.5, 4]),
        sinks=st.sampled_from([0, 4, 70]),
        recent=st.sampled_from([0, 5, 64]),
        center=st.booleans(),
        sliding_window=st.sampled_from([None, None, 90, 200]),
        batch=st.integers(1, 3),
    )
    def start(
        self,
        key_bits: float,
        value_bits: float,
        sinks: int,
        recent: int,
        center: bool,
        sliding_window: int | None,
        batch: int,
    ) -> None:
        policy = CachePolicy(
            key_bits=key_bits,
            value_bits=value_bits,
            sink_tokens=sinks,
            recent_window=recent,
            center_keys=center,
        )
        shape = Shape(batch=batch)
        self.pairs.append(
            (shape.layer(policy, sliding_window), Shadow(shape, policy, sliding_window))
        )

    def pick(self, which: int) -> tuple[CompressedLayer, Shadow]:
        return self.pairs[which % len(self.pairs)]

    @rule(which=st.integers(0, 3), count=counts, seed=seeds)
    def append_and_attend(self, which: int, count: int, seed: int) -> None:
        layer, shadow = self.pick(which)
        query, keys, values = shadow.shape.tokens(count, seed)
        layer.append(keys, values)
        shadow.append(keys, values)
        out = layer.attend(query, scaling=shadow.shape.scaling)
        expected = oracle(
            query,
            shadow.keys,
            shadow.values,
            shadow.shape.scaling,
            sliding_window=shadow.sliding_window,
        )
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
        shadow.follow(layer, layer.record_past)

    @rule(which=st.integers(0, 3), count=st.integers(0, 130) | counts)
    def crop_from_the_end(self, which: int, count: int) -> None:
        self.crop(*self.pick(which), count)

    @rule(which=st.integers(0, 3), left=st.integers(0, 5) | counts)
    def crop_to_a_prefix(self, which: int, left: int) -> None:
        layer, shadow = self.pick(which)
        self.crop(layer, shadow, max(shadow.length - left, 0))

    def crop(self, layer: CompressedLayer, shadow: Shadow, count: int) -> None:
        needed = min(max(shadow.length - count, 0), (shadow.sliding_window or 1) - 1)
        if count < shadow.length and shadow.held - count < needed and layer.evicted:
            with pytest.raises(SixfoldError, match="let go of"):
                layer.crop(count)
        else:
            layer.crop(count)
            shadow.crop(count)

    @rule(which=st.integers(0, 3), data=st.data())
    def select(self, which: int, data: st.DataObject) -> None:
        layer, shadow = self.pick(which)
        row = st.integers(0, shadow.shape.batch - 1)
        rows = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=MAX_BATCH)))
        layer.select(rows)
        shadow.select(rows)

    @precondition(lambda self: len(self.pairs) < 3)
    @rule(which=st.integers(0, 3))
    def fork(self, which: int) -> None:
        layer, shadow = self.pick(which)
        self.pairs.append((layer.fork(), shadow.fork()))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(which=st.integers(0, 3))
    def drop(self, which: int) -> None:
        self.pairs.pop(which % len(self.pairs))

    @rule(which=st.integers(0, 3))
    def record_the_past(self, which: int) -> None:
        self.pick(which)[0].record_past = True

    @rule(which=st.integers(0, 3))
    def save_and_load(self, which: int) -> None:
        index = which % len(self.pairs)
        layer, shadow = self.pairs[index]
        description, tensors = layer_state(layer)
        specs = expected_tensors(description, layer.policy, layer.sliding_window)
        assert {name: spec.shape for name, spec in specs.items()} == {
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }
        held = {name: tensor.clone() for name, tensor in tensors.items()}
        restored = restore_layer(description, held, layer.policy, layer.sliding_window)
        restored.record_past = layer.record_past
        self.pairs[index] = (restored, shadow)

    @invariant()
    def holds_what_its_shadow_holds(self) -> None:
        for layer, shadow in self.pairs:
            keys, values = layer.dequantized()
            assert (layer.length, layer.held) == (shadow.length, shadow.held)
            assert torch.equal(keys, shadow.keys)
            assert torch.equal(values, shadow.values)


Operations.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestOperations = pytest.mark.usefixtures("unhooked", "exact_arithmetic")(Operations.TestCase)
