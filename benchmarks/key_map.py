"""What centring and equalizing keys is worth: ``python -m benchmarks.key_map --json FILE``.

The embedded model, plain and with outlier channels (the same function), is read through caches
without full-precision windows; mean KL to the uncompressed model in nats, by variant of the map.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hard import with_outlier_channels
from sixfold.cache import affine
from sixfold.eval import machine
from sixfold.eval.caches import compressed
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.eval.perplexity import compare_caches, windows_of

BITS = (4, 3, 2)
SHIPPED = "shipped: beyond x1.4 of the median"


def full(power: float) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Every channel scaled by (σ_q/σ_k)^(power/2)."""

    def scale(key_energy: Tensor, query_energy: Tensor | None) -> Tensor:
        assert query_energy is not None
        ratio = 0.25 * torch.log(query_energy.clamp(min=1e-20) / key_energy.clamp(min=1e-20))
        return torch.exp(power * (ratio - ratio.mean(-1, keepdim=True)))

    return scale


VARIANTS: dict[str, Callable[[Tensor, Tensor | None], Tensor] | float] = {
    "none": full(0.0),
    "full (σ_q/σ_k)^½": full(1.0),
    "damped (σ_q/σ_k)^¼": full(0.5),
    SHIPPED: affine.DEAD_ZONE,
    "beyond x2 of the median": math.log(2),
    "beyond x4 of the median": math.log(4),
}


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Let caches made inside the block equalize as `name` says."""
    choice, scale, zone = VARIANTS[name], affine.equalizing_scale, affine.DEAD_ZONE
    try:
        if isinstance(choice, float):
            affine.DEAD_ZONE = choice
        else:
            affine.equalizing_scale = choice  # type: ignore[assignment]
        yield
    finally:
        affine.equalizing_scale, affine.DEAD_ZONE = scale, zone


def main() -> None:
    """Measure every variant on both models; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, help="text; default: the package's own prose")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    plain, tokenizer = load_embedded()
    text = arguments.file.read_text(encoding="utf-8") if arguments.file else haystack()
    windows = windows_of(tokenizer, text, arguments.tokens, arguments.windows)
    options: dict[str, Any] = {"sink_tokens": 0, "recent_window": 0, "code": "codebook"}
    caches = {f"{bits}": compressed(bits, **options) for bits in BITS}
    caches |= {f"{bits} uncentred": compressed(bits, center_keys=False, **options) for bits in BITS}
    rows = []
    for label, model in (("plain", plain), ("outliers", with_outlier_channels(plain))):
        for name in VARIANTS:
            with variant(name):
                found = compare_caches(model, windows, caches, prefill=arguments.tokens // 2)
            kl = {bits: result.kl.mean for bits, result in found.items()}
            error = {bits: result.kl.standard_error for bits, result in found.items()}
            rows.append({"model": label, "variant": name, "kl": kl, "standard_error": error})
            print(label, name, {bits: round(value, 5) for bits, value in kl.items()}, flush=True)
    if arguments.json:
        document = {"machine": machine.describe(), "windows": list(windows.shape), "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
