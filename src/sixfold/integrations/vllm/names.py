"""What users of vLLM type: names of widths, and options beside them."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, get_args

from sixfold.arguments import choice, shown, whole
from sixfold.cache.code import page_code
from sixfold.cache.engine import page_nbytes
from sixfold.cache.policy import CachePolicy
from sixfold.errors import SixfoldError
from sixfold.kernels.types import CodeName
from sixfold.packing import PAGE_TOKENS, Bits

# vLLM groups layers by the class of their backend, so each width is one of its own.
WIDTHS: dict[str, Bits] = {
    "SIXFOLD_8BIT": 8,
    "SIXFOLD_4BIT": 4,
    "SIXFOLD_3_5BIT": 3.5,
    "SIXFOLD_3BIT": 3,
    "SIXFOLD_2_5BIT": 2.5,
    "SIXFOLD_2BIT": 2,
}
SECTION = "sixfold"
# A prompt waits until its pages are encoded, and a trellis takes longer (docs/vllm.md).
CODE: CodeName = "codebook"
# Minor versions of vLLM that the tests run with.
TESTED = ("0.32", "0.33")


def cache_dtype(name: str) -> str:
    """The value of ``--kv-cache-dtype`` that is the same as this backend."""
    return name.lower()


def policy(
    bits: Bits, key_dim: int, value_dim: int, sink_tokens: int = 0, code: CodeName = CODE
) -> CachePolicy:
    """How a layer of vLLM is coded: in as many bytes with one code as with the other.

    vLLM asks how large a block is before there are options. Heads of an odd multiple of 8
    coordinates, of which pages of a trellis are smaller, have a codebook in either case.
    """
    dims = key_dim, value_dim
    chosen, usual = (
        CachePolicy.spending(bits, [dims], sink_tokens=sink_tokens, recent_window=0, code=each)
        for each in (code, CODE)
    )
    same = page_nbytes(page_code(chosen, *dims)) == page_nbytes(page_code(usual, *dims))
    return chosen if same else usual


def token_nbytes(bits: Bits, key_dim: int, value_dim: int) -> int:
    """Bytes of a key and a value of one head in a block, scales included."""
    dims = key_dim, value_dim
    content, rest = divmod(page_nbytes(page_code(policy(bits, *dims), *dims)), PAGE_TOKENS)
    assert not rest, (bits, *dims)
    return content


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``--additional-config '{"sixfold": {...}}'`` may say.

    Attributes:
        key_map: A file that `sixfold.cache.KeyMaps.save` wrote, for the layers of this model. None:
            each layer fits its own to the first tokens that the engine sees.
        sink_tokens: First tokens of every sequence that are kept uncompressed beside their codes.
        recent_window: 64: so is the last full page of every running request. 0: it is not.
        code: See `sixfold.CachePolicy`.
    """

    key_map: str | None = None
    sink_tokens: int = 4
    recent_window: int = PAGE_TOKENS
    code: CodeName = CODE

    @classmethod
    def read(cls, additional_config: Any) -> Self:
        """The options in vLLM's configuration.

        Raises:
            SixfoldError: There are others, or one is of the wrong kind.
        """
        # vLLM allows its own classes there, for backends that define one.
        found = additional_config if isinstance(additional_config, Mapping) else {}
        known = [field.name for field in dataclasses.fields(cls)]
        for name in map(str, found):
            if name != SECTION and difflib.get_close_matches(SECTION, [name.lower()], 1, 0.75):
                raise SixfoldError(f'additional_config: got "{name}": did you mean "{SECTION}"?')
            # Others may call something "code".
            if name in known and name != "code":
                raise SixfoldError(
                    f'additional_config: "{name}" belongs one level deeper: '
                    f'{{"{SECTION}": {{"{name}": ...}}}}'
                )
        given = found.get(SECTION, {})
        if not isinstance(given, Mapping):
            raise SixfoldError(
                f'additional_config["{SECTION}"]: expected a mapping of {known}, got {shown(given)}'
            )
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1)
                raise SixfoldError(
                    f'additional_config["{SECTION}"]: expected some of {known}, got {shown(name)}'
                    f"{f': did you mean {close[0]}?' if close else ''}"
                )
        key_map = given.get("key_map")
        if not isinstance(key_map, str | None) or (
            key_map is not None and not Path(key_map).is_file()
        ):
            raise SixfoldError(
                f'additional_config["{SECTION}"]["key_map"]: expected a file that KeyMaps.save '
                f"wrote, got {shown(key_map)}"
            )
        sinks = whole(
            f'additional_config["{SECTION}"]["sink_tokens"]',
            given.get("sink_tokens", cls.sink_tokens),
            0,
            PAGE_TOKENS,
        )
        recent = given.get("recent_window", cls.recent_window)
        if recent not in (0, PAGE_TOKENS) or isinstance(recent, bool):
            raise SixfoldError(
                f'additional_config["{SECTION}"]["recent_window"]: expected 0 or {PAGE_TOKENS} '
                f"tokens, got {shown(recent)}"
            )
        code = choice(
            f'additional_config["{SECTION}"]["code"]',
            given.get("code", cls.code),
            get_args(CodeName),
        )
        return cls(key_map, sinks, recent, code)
