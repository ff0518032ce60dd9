"""What a platform gives for prompts: attention of uncompressed tokens in blocks of 64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol, Self

import numpy as np
from torch import Tensor

from sixfold.cache.step import Step
from sixfold.cache.transfer import to_device
from sixfold.kernels.types import Softmax


@dataclass(frozen=True)
class Batch:
    """Requests of one call.

    Attributes:
        starts: Where each request's queries start, and the end: int32.
        lengths: Tokens of each in the scratch: int32.
        table: The scratch blocks of each: int32 [requests, blocks].
        schedule: How the kernel divides the work.
        longest: Most queries, and most tokens in the scratch, of any request.
    """

    starts: Tensor
    lengths: Tensor
    table: Tensor
    schedule: Tensor | None
    longest: tuple[int, int]


class AttendPacked(Protocol):
    """Ragged, causal attention of tokens that are all in hand."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        starts: Tensor,
        longest: int,
        softmax: Softmax,
    ) -> None:
        """Attention of requests over their own new tokens.

        Args:
            query: Queries of all requests, [tokens, heads, dim].
            keys: Their keys, [tokens, kv_heads, dim].
            values: Their values.
            out: Where the output goes, [tokens, heads, dim].
            starts: Where each request starts, and the end: int32.
            longest: Most tokens of any request.
            softmax: What makes weights of logits.
        """


class Kernel(Protocol):
    """Paged, ragged, causal attention, and the memory that it reads.

    Attributes:
        worth_decoding: From so many new tokens on it is faster to decode the context once and
            attend it uncompressed than to attend the codes.
    """

    worth_decoding: int

    def memory(self, blocks: int) -> tuple[Tensor, Tensor]:
        """Keys and values of so many scratch blocks, as this kernel reads them."""

    def schedule(self, starts: Tensor, lengths: Tensor, window: int | None) -> Tensor | None:
        """See `Batch`."""

    def write(
        self, keys: Tensor, values: Tensor, memory: tuple[Tensor, Tensor], places: Tensor
    ) -> None:
        """Write tokens [tokens, kv_heads, dim] to these places, counted in tokens."""

    def attend(
        self,
        query: Tensor,
        memory: tuple[Tensor, Tensor],
        out: Tensor,
        batch: Batch,
        softmax: Softmax,
    ) -> None:
        """Attention of the last tokens of each request over all of its tokens.

        Args:
            query: Their queries, [tokens, heads, dim].
            memory: As `memory` made it.
            out: Where the output goes, [tokens, heads, dim].
            batch: Whose they are.
            softmax: What makes weights of logits.
        """

    @property
    def attend_packed(self) -> AttendPacked | None:
        """Prompts without context need no scratch where there is one."""


@dataclass(frozen=True)
class FirstChunks:
    """Requests that have no context: all they attend is in hand.

    Attributes:
        call: What attends.
        tokens: Where their new tokens are among all of the step: a slice where they lie together.
        starts: Where each request's start among theirs, and the end: int32.
        longest: Most tokens of any request.
    """

    call: AttendPacked
    tokens: slice | Tensor
    starts: Tensor
    longest: int

    @classmethod
    def of(cls, call: AttendPacked, step: Step, which: list[int]) -> Self:
        """Those of a step that are these."""
        counts = [step.new[b] for b in which]
        tokens = np.concatenate([np.arange(step.spans[b].start, step.spans[b].stop) for b in which])
        starts = np.array(list(accumulate(counts, initial=0)), dtype=np.int32)
        on = partial(to_device, device=step.slots.device)
        return cls(call, together(tokens, on), on(starts), max(counts))

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, softmax: Softmax, out: Tensor
    ) -> None:
        """Write their attention to `out`, of packed tokens of the whole step."""
        own, own_keys, own_values = (x[self.tokens] for x in (query, keys, values))
        with part_of(out, self.tokens) as target:
            self.call(own, own_keys, own_values, target, self.starts, self.longest, softmax)


@contextmanager
def part_of(out: Tensor, tokens: slice | Tensor) -> Iterator[Tensor]:
    """These tokens of `out`, to be written."""
    part = out[tokens]
    yield part
    if not isinstance(tokens, slice):
        out[tokens] = part


def together(tokens: np.ndarray, on: Callable[[np.ndarray], Tensor]) -> slice | Tensor:
    """Consecutive tokens as a slice, others as a table on the device."""
    first, count = int(tokens[0]), len(tokens)
    if int(tokens[-1]) == first + count - 1:
        return slice(first, first + count)
    return on(tokens)
