"""`sixfold index`: vectors of a file, compressed and searched."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from sixfold.cli.common import JsonOption
from sixfold.cli.render import Output, human_bytes
from sixfold.errors import SixfoldError
from sixfold.index import Index
from sixfold.index.metric import Metric

app = typer.Typer(help="Build, search and describe an index of vectors.", no_args_is_help=True)

# Queries of which a terminal shows what they found.
SHOWN = 20
VectorsArgument = Annotated[Path, typer.Argument(help="A .npy file of vectors, [n, dim].")]
IndexArgument = Annotated[Path, typer.Argument(help="A file that `index build` wrote.")]


@app.command()
def build(
    vectors: VectorsArgument,
    out: Annotated[Path, typer.Argument(help="Where to write the index.")],
    bits: Annotated[int, typer.Option(help="1, 2, 3, 4 or 8 per coordinate.")] = 4,
    metric: Annotated[str, typer.Option(help="cosine, ip or l2.")] = "cosine",
    ids: Annotated[
        Path | None, typer.Option(help="A text file with an id a line; numbers from 0 otherwise.")
    ] = None,
    calibrate: Annotated[
        int, typer.Option(min=0, help="Fit the codes to so many of the vectors, say 2048.")
    ] = 0,
    lists: Annotated[
        int,
        typer.Option(min=0, help="Put vectors into so many lists, for searches with --probes."),
    ] = 0,
    json: JsonOption = None,
) -> None:
    """Compress the vectors of a file into an index."""
    output = Output(json)
    x = _vectors(vectors)
    index = Index(x.shape[1], bits, _metric(metric))
    if calibrate:
        chosen = np.random.default_rng(0).permutation(len(x))[:calibrate]
        index.calibrate(x[np.sort(chosen)])
    index.add(x, None if ids is None else ids.read_text(encoding="utf-8").splitlines())
    if lists:
        index.partition(lists)
    index.save(out)
    _describe(output, index, out)


@app.command()
def search(
    index: IndexArgument,
    queries: Annotated[Path, typer.Argument(help="A .npy file of queries, [n, dim].")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many to find for each.")] = 10,
    probes: Annotated[
        int | None, typer.Option(min=1, help="Lists to look at; all by default.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Find the nearest vectors of an index for each query of a file."""
    output = Output(json)
    scores, ids = Index.load(index).search(_vectors(queries), k, probes=probes)
    rows = [
        [str(number), *(f"{id} ({score:.4g})" for id, score in zip(found, own, strict=True))]
        for number, (found, own) in enumerate(zip(ids[:SHOWN], scores[:SHOWN], strict=True))
    ]
    output.table(f"{index}: ids and scores", ["query", *map(str, range(1, k + 1))], rows)
    if len(ids) > SHOWN:
        output.say(f"The first {SHOWN} of {len(ids):,} queries; --json has all of them.")
    finite = [[x if np.isfinite(x) else None for x in own] for own in scores.tolist()]
    output.json({"ids": ids.tolist(), "scores": finite})


@app.command()
def info(index: IndexArgument, json: JsonOption = None) -> None:
    """Say what an index holds."""
    _describe(Output(json), Index.load(index), index)


def _describe(output: Output, index: Index, path: Path) -> None:
    plain = 4 * len(index) * index.dim
    how = f"{index.bits} bits{', calibrated' if index.calibrated else ''}"
    how += f", in {index.lists:,} lists" if index.lists else ""
    output.say(
        f"{path}: {len(index):,} vectors of {index.dim} coordinates at {how}, by {index.metric}: "
        f"{human_bytes(path.stat().st_size)} in the file, {human_bytes(plain)} in float32."
    )
    output.json(
        {
            "vectors": len(index),
            "dim": index.dim,
            "bits": index.bits,
            "metric": index.metric,
            "calibrated": index.calibrated,
            "lists": index.lists,
            "nbytes": index.nbytes,
            "file_bytes": path.stat().st_size,
        }
    )


def _vectors(path: Path) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SixfoldError(f"{path} is no .npy file of numbers ({error})") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2:
        shape = list(found.shape) if isinstance(found, np.ndarray) else "several arrays"
        raise SixfoldError(f"{path}: expected vectors [n, dim], got {shape}")
    return found


def _metric(name: str) -> Metric:
    # `Index` says what it may be.
    return name  # type: ignore[return-value]
