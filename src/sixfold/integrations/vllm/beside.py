"""What is kept uncompressed beside the blocks: how much of it, and where it is taken from."""

from dataclasses import dataclass
from typing import Any, Self

from sixfold.integrations.vllm.names import Options
from sixfold.integrations.vllm.raw_pages import page_rows, sink_rows
from sixfold.packing import PAGE_TOKENS

# Last full pages on a GPU, where memory is taken whether or not it is used. Requests without read
# these tokens as codes.
MOST_FULL_PAGES = 256
# Scratch of one call that attends prompts, unless one request alone needs more.
SCRATCH_TOKENS = 16_384


@dataclass(frozen=True)
class Beside:
    """Rows of each layer.

    Attributes:
        rows: Of pages.
        full: Most of them that full pages have; the others are for open pages.
        sink_rows: Of first tokens.
        sink_tokens: How many these are.
    """

    rows: int
    full: int
    sink_rows: int
    sink_tokens: int

    @classmethod
    def of(cls, vllm_config: Any, options: Options, *, gpu: bool) -> Self:
        """What requests that run at once may need.

        On a CPU a row takes memory when it is used, and there are twice as many as can be needed:
        what requests leave behind may stay. On a GPU every row takes it from the blocks: there is
        an open page for each request, another for each that may begin one in the step that fills
        one, and full pages for some.
        """
        scheduler = vllm_config.scheduler_config
        requests, recent = scheduler.max_num_seqs, options.recent_window > 0
        if not gpu:
            rows = page_rows(requests, recent=recent)
            sinks = sink_rows(requests) if options.sink_tokens else 0
            return cls(rows, rows if recent else 0, sinks, options.sink_tokens)
        full = min(requests, MOST_FULL_PAGES) if recent else 0
        # Prompts in pieces fill a page and begin one. What a step has room for cuts one of them;
        # the others are cut where the user says.
        piece = getattr(scheduler, "long_prefill_token_threshold", 0) or PAGE_TOKENS
        chunks = -(-scheduler.max_num_batched_tokens // min(piece, PAGE_TOKENS))
        chunks = min(requests, chunks)
        sinks = requests if options.sink_tokens else 0
        return cls(requests + chunks + full, full, sinks, options.sink_tokens)


def scratch_blocks(vllm_config: Any) -> int:
    """Blocks of 64 tokens that attending prompts needs at most, one request's at the least."""
    longest: int = -(-vllm_config.model_config.max_model_len // PAGE_TOKENS)
    return max(SCRATCH_TOKENS // PAGE_TOKENS, longest)
