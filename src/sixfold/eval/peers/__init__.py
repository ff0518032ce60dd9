"""Other quantized caches, by name: what they would read back, and the bytes they would hold.

Each imitates the arithmetic of its original, quantization and dequantization, in plain PyTorch, so
that it can stand in one table with Sixfold on any machine.
"""

from collections.abc import Sequence

from transformers import Cache, PreTrainedModel

from sixfold.errors import SixfoldError
from sixfold.eval.caches import MakeCache
from sixfold.eval.peers.cache import PeerCache
from sixfold.eval.peers.fp8 import Fp8
from sixfold.eval.peers.kivi import KiviKeys, KiviValues
from sixfold.eval.peers.llama_cpp import LlamaCpp
from sixfold.eval.peers.qjl import QJLKeys
from sixfold.eval.peers.quantized_cache import HQQ, Quanto
from sixfold.eval.peers.quantizers import PaperMSE, PaperProd, PaperTurboQuant, Polar
from sixfold.eval.peers.scheme import Scheme
from sixfold.eval.peers.vllm import VllmFp8Keys, VllmKeys, VllmValues

ALL = "all"
"""The name that stands for every peer."""

PEERS: dict[str, tuple[Scheme, Scheme]] = {
    "fp8": (Fp8(), Fp8()),
    "quanto-4": (Quanto(4), Quanto(4)),
    "quanto-2": (Quanto(2), Quanto(2)),
    "hqq-4": (HQQ(4), HQQ(4)),
    "hqq-2": (HQQ(2), HQQ(2)),
    "kivi-4": (KiviKeys(4), KiviValues(4)),
    "kivi-2": (KiviKeys(2), KiviValues(2)),
    "q8_0": (LlamaCpp("q8_0"), LlamaCpp("q8_0")),
    "q4_0": (LlamaCpp("q4_0"), LlamaCpp("q4_0")),
    "q8_0-rotated": (LlamaCpp("q8_0", -1), LlamaCpp("q8_0", 64)),
    "q4_0-rotated": (LlamaCpp("q4_0", -1), LlamaCpp("q4_0", 64)),
    "vllm-k8v4": (VllmFp8Keys(), VllmValues(4)),
    "vllm-4bit_nc": (VllmKeys(4), VllmValues(4)),
    "vllm-k3v4_nc": (VllmKeys(3), VllmValues(4)),
    "vllm-3bit_nc": (VllmKeys(3), VllmValues(3)),
    "turboquant-3.5": (PaperTurboQuant(3), PaperTurboQuant(3)),
    "turboquant-2.5": (PaperTurboQuant(2), PaperTurboQuant(2)),
    "turboquant-prod-4": (PaperProd(4), PaperMSE(4)),
    "turboquant-prod-3": (PaperProd(3), PaperMSE(3)),
    "polarquant": (Polar(), Polar()),
    "qjl": (QJLKeys(), KiviValues(2)),
}
"""Keys and values of every peer."""


def peer_caches(names: Sequence[str]) -> dict[str, MakeCache]:
    """What makes the caches of these peers; `all` stands for every one.

    Raises:
        SixfoldError: There is no peer of such a name.
    """
    chosen = list(PEERS) if ALL in names else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in PEERS]
    if unknown:
        raise SixfoldError(
            f"there is no peer {', '.join(map(repr, unknown))}; expected {ALL!r} or some of "
            f"{', '.join(PEERS)}"
        )
    return {name: _maker(*PEERS[name]) for name in chosen}


def _maker(keys: Scheme, values: Scheme) -> MakeCache:
    def make(model: PreTrainedModel) -> Cache:
        return PeerCache(model.config, keys, values)

    return make
