"""Begin training with an induction circuit in place instead of waiting for one to form.

Retrieval rests on induction: a head of the first layer marks every position with the token
before it, and a head of the second looks for the mark that equals the present token and copies
what stands there.  A small model on two cores takes millions of tokens to stumble upon this, so
the initial weights are built to do it roughly; training then refines or replaces them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

SHARED_NORM = 0.7  # of the component all embeddings share, which attention by position needs
POSITION_GAINS = (3.0, 0.8)  # how sharply the two key/value groups of layer 0 pick a position
OFFSETS = (1, 4)  # how far back they look: at the token before, and at a bag of recent ones
FREQUENCIES = (slice(0, 10), slice(2, 14))  # rotary pairs they use: fast is sharp
MARK_SCALES = (0.1, 0.025)  # how loudly each head writes what it saw
MATCH_GAIN = 2.5
MATCH_BOOST = 3.0  # of queries over keys: embeddings lie in more dimensions than marks
SLOW_PAIRS = slice(10, 32)  # rotary pairs that hardly turn, so that content can be compared
COPY_SCALE = 1.0
NOISE_STD = 0.02
LOGIT_GAIN = 1.5


@torch.no_grad()
def start_with_induction(model: LlamaForCausalLM) -> None:
    """Write the circuit into the first two layers and noise everywhere else."""
    embeddings = model.model.embed_tokens.weight
    hidden = embeddings.shape[1]
    shared = nn.functional.normalize(torch.randn(hidden), dim=0)
    embeddings.copy_(torch.randn(embeddings.shape) / math.sqrt(hidden) + SHARED_NORM * shared)
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            nn.init.normal_(getattr(attention, name).weight, std=NOISE_STD)
        nn.init.normal_(attention.o_proj.weight, std=NOISE_STD / 4)
    model.model.norm.weight.fill_(LOGIT_GAIN)
    marks = nn.init.orthogonal_(torch.empty(hidden, hidden))[:, :128].T
    seen = mark_neighbours(model.model.layers[0].self_attn, shared, marks)
    copy_after_match(model.model.layers[1].self_attn, seen, marks)


def rotate(vector: Tensor, offset: int, base: float) -> Tensor:
    """Turn a query as if it stood ``offset`` positions further on (rotary, halves layout)."""
    half = len(vector) // 2
    angle = offset * base ** (-torch.arange(half) / half)
    first, second = vector[:half], vector[half:]
    return torch.cat(
        [
            first * angle.cos() - second * angle.sin(),
            first * angle.sin() + second * angle.cos(),
        ]
    )


def pair_indices(pairs: slice, dim: int) -> Tensor:
    """Return the two dimensions of every rotary pair in a slice."""
    first = torch.arange(dim // 2)[pairs]
    return torch.cat([first, first + dim // 2])


def mark_neighbours(attention: Any, shared: Tensor, marks: Tensor) -> Tensor:
    """Make layer 0 attend by position and write what it sees; return its value weights."""
    dim, groups = attention.head_dim, attention.num_key_value_groups
    base = attention.config.rope_parameters["rope_theta"]
    values = nn.init.orthogonal_(attention.v_proj.weight)
    for group, offset in enumerate(OFFSETS):
        key = torch.zeros(dim)
        key[pair_indices(FREQUENCIES[group], dim)] = 1.0
        key = POSITION_GAINS[group] * nn.functional.normalize(key, dim=0)
        rows = slice(group * dim, (group + 1) * dim)
        attention.k_proj.weight[rows] += torch.outer(key, shared)
        query = torch.outer(rotate(key, -offset, base), shared)
        for head in range(group * groups, (group + 1) * groups):
            rows_of_head = slice(head * dim, (head + 1) * dim)
            attention.q_proj.weight[rows_of_head] += query
            attention.o_proj.weight[:, rows_of_head] += MARK_SCALES[group] * marks[rows].T
    return values


def copy_after_match(attention: Any, seen: Tensor, marks: Tensor) -> None:
    """Make layer 1 look for the mark that equals the present token, and copy from there."""
    dim, groups = attention.head_dim, attention.num_key_value_groups
    copied = nn.init.orthogonal_(attention.v_proj.weight)
    slow = pair_indices(SLOW_PAIRS, dim)
    for head in range(attention.config.num_attention_heads):
        group = head // groups
        rows, of_head = slice(group * dim, (group + 1) * dim), slice(head * dim, (head + 1) * dim)
        if head % groups == 0:
            attention.k_proj.weight[rows][slow] += MATCH_GAIN * marks[: len(slow)]
        attention.q_proj.weight[of_head][slow] += MATCH_GAIN * MATCH_BOOST * seen[: len(slow)]
        attention.o_proj.weight[:, of_head] += COPY_SCALE * copied[rows].T
