"""Nearest neighbours: how often the vector of largest inner product is among the best k found."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.reproduction import faiss_peer
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.eval.perplexity import windows_of
from sixfold.packing import Bits
from sixfold.quantizers import TurboQuantMSE, TurboQuantProd

CUTS = (1, 2, 4, 8, 16, 32, 64)
WIDTHS: tuple[Bits, ...] = (2, 4)
# Product quantizers of more dimensions train for minutes.
LARGEST_PRODUCT = 200

Vectors = tuple[Float[Tensor, "base dim"], Float[Tensor, "queries dim"]]


def hidden_states() -> Vectors:
    """Last hidden states of the embedded model over its own text, one in thirty-two a query."""
    model, tokenizer = load_embedded()
    windows = windows_of(tokenizer, haystack(), 512, 64)
    with torch.no_grad():
        states = model.base_model(windows).last_hidden_state.flatten(0, 1)
    states = torch.nn.functional.normalize(states, dim=1)
    asked = torch.arange(len(states)) % 32 == 0
    return states[~asked], states[asked]


def synthetic(dim: int, base: int, queries: int) -> Vectors:
    """Unit vectors around a common mean, with variances that fall as 1/i, as embeddings' do."""
    random = torch.Generator().manual_seed(dim)
    x = torch.randn(base + queries, dim, generator=random)
    x *= torch.arange(1, dim + 1).rsqrt()
    x[:, torch.randperm(dim, generator=random)[:8]] += 0.5
    x = torch.nn.functional.normalize(x, dim=1)
    return x[:base], x[base:]


DATA: dict[str, Callable[[], Vectors]] = {
    "hidden states, d = 256": hidden_states,
    "synthetic, d = 200": lambda: synthetic(200, 20_000, 200),
    "synthetic, d = 1536": lambda: synthetic(1536, 5_000, 200),
}


def recall(data: dict[str, Callable[[], Vectors]] | None = None) -> dict[str, Any]:
    """Recall of every contender on every collection of vectors."""
    rows = []
    for name, load in (DATA if data is None else data).items():
        base, queries = load()
        best = (queries @ base.mT).argmax(1)
        for bits in WIDTHS:
            for contender, (nbytes, found) in _search_all(base, queries, bits).items():
                shares = {str(k): _share(found[:, :k], best) for k in CUTS}
                row = {"data": name, "bits": bits, "name": contender, "bytes": nbytes}
                rows.append({**row, "base": len(base), "queries": len(queries), "recall": shares})
    return {"rows": rows}


def _share(found: Int[Tensor, "queries k"], best: Int[Tensor, " queries"]) -> float:
    return float((found == best[:, None]).any(1).float().mean())


def _search_all(base: Tensor, queries: Tensor, bits: Bits) -> dict[str, tuple[float, Tensor]]:
    """Bytes a vector and the best found, by contender."""
    dim = base.shape[1]
    quantizers: dict[str, Any] = {
        "Sixfold, norms (the paper's mse)": TurboQuantMSE(dim, bits, scale="norm"),
        "Sixfold, unbiased": TurboQuantMSE(dim, bits, scale="unbiased"),
        "Sixfold, prod": TurboQuantProd(dim, bits),
        "Sixfold, prod with the paper's Gaussian S": TurboQuantProd(dim, bits, "gaussian"),
    }
    found = {name: _search(one, base, queries) for name, one in quantizers.items()}
    centred = base - base.mean(0)
    # The mean's inner product is the same for every vector and changes no order.
    name = "Sixfold, unbiased, mean removed"
    found[name] = _search(quantizers["Sixfold, unbiased"], centred, queries)
    indexes = faiss_peer.indexes(dim, int(bits), trained=dim <= LARGEST_PRODUCT)
    for name, make in indexes.items():
        index = make()
        index.train(base.numpy())
        index.add(base.numpy())
        found[name] = index.sa_code_size(), faiss_peer.search(index, queries, max(CUTS))
    return found


def _search(quantizer: Any, base: Tensor, queries: Tensor) -> tuple[float, Tensor]:
    codes = quantizer.encode(base)
    scores = quantizer.scores(queries, codes)
    return codes.nbytes / len(base), scores.topk(max(CUTS)).indices
