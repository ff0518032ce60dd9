"""What a platform gives for prompts: attention of uncompressed tokens in blocks of 64."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

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
