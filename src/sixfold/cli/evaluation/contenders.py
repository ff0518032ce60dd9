"""The caches that stand in one table: Sixfold at some widths, and peers by name."""

from collections.abc import Sequence
from typing import Annotated

import typer

from sixfold.cli.common import parse_list
from sixfold.eval.caches import MakeCache, compressed, dequantizing, uncompressed
from sixfold.eval.peers import ALL, PEERS, peer_caches

UNCOMPRESSED = "16"
"""What the tables call the uncompressed cache."""

AgainstOption = Annotated[
    str,
    typer.Option(
        "--against",
        metavar="NAMES",
        help=f"Peers to simulate beside it, separated by commas: {ALL}, or any of "
        f"{', '.join(PEERS)}.",
    ),
]


def contenders(
    widths: Sequence[float], against: str, *, fused: bool = True
) -> dict[str, MakeCache]:
    """Sixfold's caches by their width, then the peers.

    Args:
        widths: Bits a value.
        against: Names of peers, separated by commas.
        fused: Whether Sixfold's attention runs on the codes, or on dequantized tensors.

    Raises:
        SixfoldError: There is no peer of such a name.
    """
    make = compressed if fused else dequantizing
    caches = {f"{width:g}": make(width) for width in widths}
    names = parse_list(against, str, "--against") if against.strip() else []
    return caches | peer_caches(names)


def with_uncompressed(caches: dict[str, MakeCache]) -> dict[str, MakeCache]:
    """The same caches after the one that transformers itself would use."""
    return {UNCOMPRESSED: uncompressed, **caches}


def label(name: str) -> str:
    """What a row is called in tables and pictures."""
    if name == UNCOMPRESSED:
        return "uncompressed"
    return name if name in PEERS else f"sixfold {name}"
