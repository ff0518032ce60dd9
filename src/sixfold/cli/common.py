"""Options and inputs that several commands share."""

import hashlib
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sixfold.arguments import device as checked_device
from sixfold.errors import SixfoldError
from sixfold.eval import embedded
from sixfold.eval.checkpoint import Checkpoint
from sixfold.eval.machine import versions
from sixfold.integrations.transformers.weights import weights_digest
from sixfold.packing import BITS, check_bits

T = TypeVar("T")


class Dtype(StrEnum):
    """Floating-point types that weights may be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def torch(self) -> torch.dtype:
        """The same as PyTorch names it."""
        found: torch.dtype = getattr(torch, self.value)
        return found


UNCOMPRESSED_BITS = 16
# What shells give a command that Ctrl-C has ended.
INTERRUPTED = 130
PICTURES = (".png", ".svg", ".pdf")

_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def _in_a_folder(path: Path | None) -> Path | None:
    """Refuse an output path before the work is done rather than after.

    Raises:
        SixfoldError: Its folder does not exist, or no file can be written there.
    """
    if path is None or path == Path("-"):
        return path
    if not path.absolute().parent.is_dir():
        raise SixfoldError(f"cannot write {path}: the folder {path.parent} does not exist")
    new = not path.exists()
    if new or path.is_file():
        try:
            path.open("ab").close()
        except OSError as error:
            raise SixfoldError(f"cannot write {path}: {error.strerror}") from error
    if new:
        path.unlink()
    return path


def _a_picture(path: Path | None) -> Path | None:
    if path is not None and path.suffix not in PICTURES:
        raise SixfoldError(f"cannot draw {path}: its name must end in {', '.join(PICTURES)}")
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise SixfoldError(f"cannot draw {path} without matplotlib: pip install 'sixfold[cli]'")
    return _in_a_folder(path)


JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        dir_okay=False,
        callback=_in_a_folder,
        help="Write the results as JSON; - for standard output.",
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE.png",
        dir_okay=False,
        callback=_a_picture,
        help="Draw a picture: .png, .svg or .pdf.",
    ),
]
ResumeOption = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="FILE",
        dir_okay=False,
        callback=_in_a_folder,
        help="Keep what is measured in FILE as it comes, and go on from there if it is begun.",
    ),
]
BitsOption = Annotated[
    str, typer.Option("--bits", help="Bits per value, separated by commas: 1 to 8, 2.5 or 3.5.")
]
ModelArgument = Annotated[
    str, typer.Argument(help="A local directory, a hub name, or `embedded`.", metavar="MODEL")
]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Of the weights; as they were saved by default.")
]
TextOption = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="A text of your own (UTF-8).")
]


def parse_list(text: str, convert: Callable[[str], T], what: str) -> list[T]:
    """Read values separated by commas.

    Raises:
        SixfoldError: Nothing is there, or something that is not a number.
    """
    try:
        values = [convert(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise SixfoldError(f"{what}: expected numbers separated by commas, got {text!r}") from error
    if not values:
        raise SixfoldError(f"{what}: expected at least one number, got {text!r}")
    return values


def parse_bits(text: str) -> list[float]:
    """Read bit widths separated by commas, and check each."""
    widths = parse_list(text, float, "--bits")
    for bits in widths:
        if bits == UNCOMPRESSED_BITS:
            raise SixfoldError(
                "--bits: 16 is the uncompressed cache, which is always shown; expected any of "
                f"{', '.join(map(str, BITS))}"
            )
        check_bits(bits)
    return widths


def parse_size(text: str) -> int:
    """Read a number of bytes: 80GB is 80·10⁹ and 80GiB is 80·2³⁰.

    Raises:
        SixfoldError: The text is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise SixfoldError(f"expected a size such as 80GB or 512MiB, got {text!r}")
    number, unit, binary = found.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (_UNITS[unit.upper()] if unit else 0))


def read_text(path: Path | None) -> str:
    """The user's text, or the haystack inside the package.

    Raises:
        SixfoldError: The file is not UTF-8 text.
    """
    if path is None:
        return embedded.haystack()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SixfoldError(f"{path} is not UTF-8 text: {error.reason}") from error


def checkpoint(
    path: Path | None, command: str, options: Mapping[str, Any], model: PreTrainedModel, text: str
) -> Checkpoint:
    """What `path` holds of a measurement: of this command, its options, weights and text.

    Raises:
        SixfoldError: It holds something else.
    """
    if path is None:
        return Checkpoint()
    # A file that moves is the same text, and a picture can be drawn afterwards.
    places = {"model_name", "file", "folder", "json", "plot_file", "resume"}
    asked = {name: value for name, value in options.items() if name not in places}
    read = {"weights": weights_digest(model), "text": hashlib.sha256(text.encode()).hexdigest()}
    about = {"command": command, "sixfold": versions().get("sixfold")}
    return Checkpoint(path, {**about, **asked, **read})


def load_model(
    name: str, dtype: torch.dtype | None = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        name: A directory, the name of a model on a hub, or that of the embedded model.
        dtype: Of the weights; without one that in which they were saved (the embedded model's:
            bfloat16).
        device: Such as "cpu" or "cuda:1"; without one the GPU, if there is one.

    Raises:
        SixfoldError: There is no such model or device, or it is not a language model.
    """
    quiet()
    place = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name == embedded.NAME:
        model, tokenizer = embedded.load_embedded(dtype or torch.bfloat16)
    else:
        with unreadable("the model", name):
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto").eval()
        _check_tokenizer(Path(name))
        with unreadable("the tokenizer of", name):
            tokenizer = AutoTokenizer.from_pretrained(name)
    # As a plain module: transformers wraps `to` in a type that hides its argument.
    module: torch.nn.Module = model
    module.to(place)
    return model, tokenizer


def _check_tokenizer(folder: Path) -> None:
    """Say what is missing; transformers says what it could convert if it were there.

    Raises:
        SixfoldError: The folder has none of the files that a tokenizer is read from.
    """
    names = ("*token*", "vocab*", "*.model")
    if folder.is_dir() and not any(next(folder.glob(name), None) for name in names):
        raise SixfoldError(f"there is no tokenizer in {str(folder)!r}: expected tokenizer.json")


@contextmanager
def unreadable(what: str, name: str) -> Iterator[None]:
    """Turn what transformers raises for a missing or foreign model into one sentence.

    Raises:
        SixfoldError: The block failed to read `name`.
    """
    if name.startswith(("/", ".", "~")) and not Path(name).exists():
        raise SixfoldError(f"cannot read {what} {name!r}: there is no such file or directory")
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason, *more = str(error).strip().splitlines() or [type(error).__name__]
        # A first line that announces others says nothing by itself.
        reason = " ".join([reason, *more]) if reason.rstrip().endswith(":") else reason
        raise SixfoldError(f"cannot read {what} {name!r}: {reason}") from error


def quiet() -> None:
    """Keep the progress bars, retries and advice of the libraries out of the tables."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
