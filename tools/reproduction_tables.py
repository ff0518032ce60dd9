"""The tables of docs/reproduction.md, a function for each section of its results."""

from collections.abc import Sequence
from typing import Any

Section = dict[str, Any]
MISSING = "-"
SCALES = {"norm": "norms", "unbiased": "unbiased", "prod-gaussian": "prod, Gaussian S"}
NAMES = {**SCALES, "prod": "prod, orthogonal S"}
CUTS = ("1", "2", "4", "8", "16", "64")


def mse(section: Section) -> str:
    """Algorithm 1."""
    head = ["dim", "bits", "paper", "exact, dim → ∞", "exact", "measured"]
    rows = [
        [
            *(f"{row['dim']:,}", str(row["bits"]), _significant(row["paper"])),
            *(_significant(row[key]) for key in ("limit", "exact", "measured")),
            *(_significant(row[key]) for key in ("lower_bound", "upper_bound")),
        ]
        for row in section["rows"]
    ]
    return _table([*head, "no quantizer below", "paper's bound"], rows)


def prod(section: Section) -> str:
    """Algorithm 2."""
    head = ["dim", "bits", "paper", "exact, dim → ∞", "Gaussian S, exact", "measured"]
    keys = ("exact", "gaussian_exact", "gaussian", "orthogonal_exact", "orthogonal", "upper_bound")
    rows = [
        [f"{row['dim']:,}", str(row["bits"]), *(_significant(row[key]) for key in ("paper", *keys))]
        for row in section["rows"]
    ]
    return _table([*head, "orthogonal S, exact", "measured", "paper's bound"], rows)


def bias(section: Section) -> str:
    """Mean estimates over what they estimate."""
    head = ["dim", "bits", "norms: paper", "norms: exact", *NAMES.values()]
    rows = []
    for row in section["rows"]:
        pairs = [(row["measured"][name], row["standard_error"][name]) for name in NAMES]
        cells = [f"{mean:.4f} ± {error:.4f}" for mean, error in pairs]
        paper = MISSING if row["paper"] is None else f"{row['paper']:.4f}"
        start = [f"{row['dim']:,}", str(row["bits"]), paper, f"{row['exact']:.4f}"]
        rows.append([*start, *cells])
    return _table(head, rows)


def crossover(section: Section) -> str:
    """All variants at equal bits, the best one in bold."""
    names = {"norm": "norms", "optimal": "optimal", **NAMES}
    rows = []
    for row in section["rows"]:
        least = min(row["error"].values())
        cells = [_bold(_significant(row["error"][n]), row["error"][n] == least) for n in names]
        rows.append([f"{row['dim']:,}", str(row["bits"]), *cells])
    return _table(["dim", "bits", *names.values()], rows)


def bits(section: Section) -> str:
    """What labels of 2.5 and 3.5 bits are made of."""
    rows = [
        [
            *(row["name"], f"{row['label']:g}", f"{row['codes']:g}", f"{row['stored']:g}"),
            _significant(row["nmse"]),
        ]
        for row in section["rows"]
    ]
    return _table(["", "label", "bits of codes", "with norms", "error"], rows)


def codebook(section: Section) -> str:
    """Right and wrong divisors."""
    keys = ("ours", "right", "wrong")
    rows = [
        [str(row["dim"]), str(row["bits"]), *(_significant(row[key]) for key in keys)]
        + [f"{row[f'{key}_gain']:.3f}" for key in ("right", "wrong")]
        for row in section["rows"]
    ]
    head = ["channels", "bits", "Sixfold", "Gaussian levels / √channels", "/ √128, as published"]
    return _table([*head, "logits × (right)", "logits × (published)"], rows)


def polar(section: Section) -> str:
    """PolarQuant."""
    rows = [
        [row["name"], f"{row['bits']:.3f}", f"{row['stored']:.3f}", _significant(row["nmse"])]
        for row in section["rows"]
    ]
    return _table(["", "bits", "stored here, padded", "error"], rows)


def qjl(section: Section) -> str:
    """QJL."""
    keys = ("gaussian_exact", "gaussian", "orthogonal_exact", "orthogonal")
    rows = [
        [str(row["projections"]), f"{row['bits']:g}", *(_significant(row[key]) for key in keys)]
        for row in section["rows"]
    ]
    head = ["signs", "bits", "Gaussian S, exact", "measured", "orthogonal S, exact", "measured"]
    return _table(head, rows)


def indexing(section: Section) -> str:
    """Seconds for 100,000 vectors."""
    dims = list(section["rows"][0]["seconds"])
    rows = [
        [row["name"], str(row["threads"] or MISSING)]
        + [_seconds(row["seconds"][dim]) for dim in dims]
        for row in section["rows"]
    ]
    return _table(["", "threads", *(f"d = {int(dim):,}" for dim in dims)], rows)


def recall(section: Section) -> str:
    """How often the nearest neighbour is among the best k."""
    head = ["vectors", "bits", "", "bytes a vector", *(f"1@{k}" for k in CUTS)]
    rows = [
        [row["data"], f"{row['bits']:g}", row["name"], f"{row['bytes']:g}"]
        + [f"{row['recall'][k]:.3f}" for k in CUTS]
        for row in section["rows"]
    ]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _significant(value: float | None) -> str:
    """Four significant digits."""
    return MISSING if value is None else f"{value:.4g}" if value >= 1e-3 else f"{value:.3e}"


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


TABLES = (mse, prod, bias, crossover, bits, codebook, polar, qjl, indexing, recall)
