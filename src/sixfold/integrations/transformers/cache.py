"""`TurboQuantCache`: a transformers cache whose attention layers hold codes."""

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Self, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from sixfold._surroundings import ordinary_tensors, outside_inference_mode, untraced
from sixfold.arguments import device as checked_device
from sixfold.arguments import flag, float_dtype, whole
from sixfold.arguments import path as checked_path
from sixfold.arguments import rows as checked_rows
from sixfold.cache import CachePolicy, KeyMaps
from sixfold.cache.dense import check_tokens
from sixfold.cache.policy import FIT_TOKENS, SPLITS
from sixfold.errors import FormatError, OutOfRangeError
from sixfold.integrations.transformers.attention import NAME, NO_WEIGHTS, untraced_growth
from sixfold.integrations.transformers.combined import forget_states
from sixfold.integrations.transformers.config import (
    check_decoder,
    coded_dims,
    decoder_config,
    fusable_layers,
    layer_types,
)
from sixfold.integrations.transformers.convert import convert_layers
from sixfold.integrations.transformers.counted import CountedCache
from sixfold.integrations.transformers.devices import execution_device, layer_devices
from sixfold.integrations.transformers.layer import MOST_REPEATS, TurboQuantLayer, forked
from sixfold.integrations.transformers.layers import (
    CrossAttentionLayer,
    cache_layer,
    check_crop,
    check_dtype,
    follow,
    layer_policies,
    layer_tensors,
    move_layer,
    repeat_sequences,
    select_sequences,
    sequences,
    static_layer,
    uncompressed_bytes,
)
from sixfold.integrations.transformers.maps import check_maps, maps_in_use, pin
from sixfold.integrations.transformers.model_layers import model_layers
from sixfold.integrations.transformers.options import CacheOptions
from sixfold.integrations.transformers.passes import ForwardPass, common_length, grows, longest
from sixfold.integrations.transformers.static import StaticTurboQuantLayer
from sixfold.integrations.transformers.storage import (
    fill,
    load_layers,
    save_cache,
)
from sixfold.integrations.transformers.summary import summary
from sixfold.integrations.transformers.wrappers import learned_prompt, unwrapped
from sixfold.kernels._dispatch import slow_kernels
from sixfold.kernels.types import CodeName
from sixfold.packing import Bits, check_bits


class TurboQuantCache(CountedCache):
    """A key-value cache that holds 2-4 bits a value instead of 16.

    ``TurboQuantCache.for_model(model, bits=4)`` attends on the codes. The plain constructor works
    with any attention implementation by handing out dequantized tensors, one layer at a time.
    Layers that are not softmax attention (linear attention, convolutions) stay as they are.

    Args:
        config: The model's config.
        bits: Bits a coordinate of keys and values: 1 to 8, 2.5 or 3.5. 3.5 are spent as 4 on keys
            and 3 on values, 2.5 as 3 and 2, where that takes no more bytes (docs/recipe.md).
        key_bits: Bits of the keys. Values then have `bits`, if not told otherwise.
        value_bits: Bits of the values. Keys then have `bits`, if not told otherwise.
        sink_tokens: First tokens of every sequence kept in the model's dtype.
        recent_window: Last tokens kept in the model's dtype (and up to 63 more, until a page of
            64 is full).
        center_keys: Subtract the mean key of every head; exact, estimated online.
        equalize_keys: Scale key channels to the queries they meet; exact, estimated online.
        fit_tokens: Tokens that key maps are fitted to, at least: a cache with fewer holds them in
            the model's dtype, and compresses all when it has as many. 0 compresses sooner, from
            128 tokens on, and loses more ever after; maps that were given (`key_map`) wait for
            nothing.
        skip_layers: Layers kept uncompressed; negative numbers count from the last.
        per_layer: `CachePolicy` fields that differ for some layers, such as
            ``{0: {"key_bits": 8}}``.
        seed: Seed of the rotation.
        code: `"codebook"` loses about twice as much as `"trellis"` in the same bits and is encoded
            faster; see `CachePolicy`.
        key_map: Maps of every compressed layer for all sequences (docs/key_map.md): nothing is
            estimated then, and `center_keys` and `equalize_keys` mean nothing.

    Raises:
        UnsupportedModelError: The model has no key-value cache that can be compressed.
        ShapeError: `key_map` is for another model.
        SixfoldError: An option is out of range.

    Source: arXiv:2504.19874; centring and equalization: docs/format.md and cache/affine.py.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        bits: Bits = 4,
        *,
        key_bits: Bits | None = None,
        value_bits: Bits | None = None,
        sink_tokens: int = 4,
        recent_window: int = 64,
        center_keys: bool = True,
        equalize_keys: bool = True,
        fit_tokens: int = FIT_TOKENS,
        skip_layers: Sequence[int] = (),
        per_layer: Mapping[int, Mapping[str, Any]] | None = None,
        seed: int = 0,
        code: CodeName = "trellis",
        key_map: KeyMaps | None = None,
    ) -> None:
        bits = check_bits(bits)
        policy = CachePolicy.spending(
            bits,
            coded_dims(config) if any(bits in split for split in SPLITS.values()) else (),
            key_bits=key_bits,
            value_bits=value_bits,
            sink_tokens=sink_tokens,
            recent_window=recent_window,
            center_keys=center_keys,
            equalize_keys=equalize_keys,
            fit_tokens=fit_tokens,
            seed=seed,
            code=code,
        )
        self.config = config
        self._model: weakref.ref[PreTrainedModel] | None = None
        self._prompt: weakref.ref[torch.nn.Module] | None = None
        # Whether attention shows no queries: in a graph, or by a model's own code.
        self._blind = False
        types, kwargs = layer_types(config)
        per_layer = {} if per_layer is None else per_layer
        policies = layer_policies(len(types), policy, skip_layers, per_layer)
        super().__init__(
            layers=[cache_layer(*layer) for layer in zip(types, kwargs, policies, strict=True)]
        )
        growing = [index for index, layer in enumerate(self.layers) if grows(layer)]
        self._pass = ForwardPass(growing)
        pin(self.layers, key_map)

    @classmethod
    def for_model(
        cls, model: torch.nn.Module, bits: Bits = 4, **options: Unpack[CacheOptions]
    ) -> Self:
        """A cache whose attention runs on the codes.

        Switches `model` to ``attn_implementation="sixfold"``, which computes exact attention for
        any other cache. Layers whose attention computes with cached tensors itself (Falcon,
        multi-head latent attention, layers whose keys other layers share) get them dequantized;
        then `fused` is False and a warning says so.

        Args:
            model: A decoder-only model, on its own or wrapped by PEFT, `torch.compile`, Accelerate
                or data parallelism.
            bits: Bits a coordinate.
            options: Any argument of `TurboQuantCache`.

        Raises:
            UnsupportedModelError: The model has no key-value cache that can be compressed.
        """
        prompt, model = learned_prompt(model), unwrapped(model)
        check_decoder(model)
        cache = cls(model.config, bits, **options)
        check_maps(cache.layers, model)
        fusable = fusable_layers(model, len(cache))
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, TurboQuantLayer):
                layer.fused = index in fusable
        fused = any(layer.fused for layer in cache.compressed_layers)
        if fused and model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        cache._warn_of(model)
        cache._model = weakref.ref(model)
        cache._prompt = None if prompt is None else weakref.ref(prompt)
        return cache

    @classmethod
    @outside_inference_mode
    def from_cache(
        cls,
        source: Cache,
        model: torch.nn.Module,
        bits: Bits = 4,
        *,
        attention_mask: Tensor | None = None,
        **options: Unpack[CacheOptions],
    ) -> Self:
        """Compress what a `DynamicCache` holds, whatever attention has filled it.

        The queries are no longer known, so key channels are equalized by the keys alone: a cache
        that is filled through `for_model` is as small and a little more faithful. `source` stays
        as it is; drop it to free its memory.

        Args:
            source: A `DynamicCache` that `model` has filled, sliding layers and states included.
            model: The model; see `for_model`.
            bits: Bits a coordinate.
            attention_mask: The mask of the prefill [batch, tokens]: needed where sequences are
                padded on the left, so that the padding is not taken for tokens.
            options: Any argument of `TurboQuantCache`.

        A forward pass that was interrupted before it reached an attention layer leaves no trace
        in the convolution and recurrent states of `source`: prefill it again after an error.

        Raises:
            UnsupportedModelError: The model has no key-value cache that can be compressed.
            SixfoldError: `source` is another kind of cache, or another model's, or the mask is not
                one of its tokens.
        """
        cache = cls.for_model(model, bits, **options)
        shapes = [layer.shape for layer in model_layers(cache.config, unwrapped(model))]
        cache.layers = convert_layers(source, cache.layers, shapes, attention_mask)
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Add tokens to a layer.

        Args:
            key_states: Keys [batch, kv_heads, tokens, key_dim].
            value_states: Values [batch, kv_heads, tokens, value_dim].
            layer_idx: The layer. Every layer gets its tokens before any gets the next ones.
            args: Ignored.
            kwargs: Ignored.

        Returns:
            All keys and values, dequantized; or twice what attention on codes takes for them.

        Raises:
            SixfoldError: The layer holds another number of tokens than others did before: a
                forward pass was interrupted. Nothing is added; see `recover`.
            ShapeError: Batch, heads, dims or dtype differ from the tokens held.
        """
        if torch.compiler.is_compiling():
            return self._update_traced(key_states, value_states, layer_idx)
        check_tokens(key_states, value_states)
        layer_idx = self._number(layer_idx)
        layer: Any = self.layers[layer_idx]
        # Most are: to ask an abstract class what it has instances of takes time.
        usual = type(layer) is TurboQuantLayer
        ours = usual or isinstance(layer, TurboQuantLayer)
        if not ours:
            check_dtype(layer, key_states)
            follow(layer, key_states.device)
        self._pass.enter(self.layers, layer_idx, key_states.shape[2])
        if ours and not layer.fused:
            self._let_wait(layer)
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._pass.leave(layer_idx)
        if not usual and isinstance(layer, CrossAttentionLayer):
            before = self._pass.before
            layer.arrived(self._text if before is None else before, key_states.shape[2])
        return updated

    def _let_wait(self, layer: TurboQuantLayer) -> None:
        """Let a layer that hands out dense keys wait for their queries, and no other beside it."""
        before = self._pass.waiting
        if before is not None and before.settle():
            # What one layer waited for in vain the next ones need not wait for.
            self._blind = True
        if not layer.mapped:
            self._pass.waiting = layer
            kind = decoder_config(self.config)._attn_implementation
            layer.watched = not self._blind and kind != "eager"

    def _update_traced(self, keys: Tensor, values: Tensor, index: int) -> tuple[Any, Any]:
        layer = self.layers[index]
        if isinstance(layer, StaticTurboQuantLayer):
            if index == self._pass.first:
                last: Any = self.layers[self._pass.last]
                torch._assert_async(
                    layer.get_seq_length() <= last.get_seq_length(),
                    "a step of the static cache was interrupted between layers, or left some out: "
                    "make it again, with .static(max_tokens), from the cache that it was made of",
                )
            return layer.update(keys, values)
        # A growing layer is Python's business: the graph is interrupted.
        updated: tuple[Any, Any] = _update_untraced(self, keys, values, index)
        return updated

    def recover(self, tokens: int | None = None) -> int:
        """Forget what an interrupted forward pass has added.

        An exception (an interrupt, a lack of memory) between two layers leaves some layers with
        tokens that others lack, and the cache refuses further tokens. This cuts all layers to the
        tokens that every one has. A cache whose first forward pass was interrupted becomes empty.

        Args:
            tokens: How many tokens a sequence the cache held before that pass: then it holds as
                many again, and the pass can be repeated. Without it a pass counts as finished once
                its last layer has got its tokens (repeated it adds them again), and one that left
                out the last layers of a new cache (early exit) as interrupted.

        Returns:
            The tokens a sequence that are left.

        Raises:
            OutOfRangeError: Fewer than `tokens` are left. Nothing is changed.
            SixfoldError: A layer cannot go back (a sliding window has let go of tokens, a state has
                replaced the one before): `reset`, and prefill again. Nothing is changed.
        """
        self._refuse_static()
        self._pass.check_finished(shortening=True)
        tokens = None if tokens is None else whole("tokens", tokens)
        length = common_length(self._growing, begun=bool(tokens))
        before = length if tokens is None else tokens
        if before > length:
            raise OutOfRangeError(
                f"tokens must be at most the {length} that every layer holds, got {before}: pass "
                "what cache.get_seq_length() was before the forward pass that was interrupted."
            )
        if not before:
            self.reset()
            return 0
        self._cut_to(length)
        if before < length:
            self.crop(before - length)
        return before

    def _cut_to(self, length: int) -> None:
        """Take from every layer what it holds beyond `length` tokens, which every one has."""
        self._check_carried("recover")
        ahead = [(x, surplus) for x in self._growing if (surplus := longest(x) - length) > 0]
        for layer, surplus in ahead:
            check_crop(layer, -surplus)
        self._check_states()
        with self._pass.through_all("recover", shortens=not self._has_states):
            for layer, surplus in ahead:
                layer.crop(-surplus)
            self._keep_text(length)
        self._pass.restart()

    @property
    def _text(self) -> int:
        """Tokens of the text that every layer can have seen."""
        return common_length(self._growing)

    @property
    def _growing(self) -> list[Any]:
        return [self.layers[i] for i in self._pass.growing]

    def _keep_text(self, tokens: int) -> None:
        for layer in self.layers:
            if isinstance(layer, CrossAttentionLayer):
                layer.keep_text(tokens)

    def reset(self) -> None:
        """Forget every token, and with it how many sequences there were."""
        self._refuse_static()
        self._pass.unfinished, self._pass.shortens = "reset", False
        for layer in self.layers:
            forget_states(layer)
        super().reset()  # type: ignore[no-untyped-call]
        self._pass.restart()

    @property
    def compressed_layers(self) -> list[TurboQuantLayer]:
        """The layers that hold codes."""
        return [layer for layer in self.layers if isinstance(layer, TurboQuantLayer)]

    @property
    def fused(self) -> bool:
        """Whether attention runs on the codes."""
        return all(layer.fused for layer in self.compressed_layers)

    def _warn_of(self, model: PreTrainedModel) -> None:
        """Say once what a user of `for_model` may not expect."""
        held = len(self.compressed_layers)
        dense = sum(not layer.fused for layer in self.compressed_layers)
        name = type(model).__name__
        if dense:
            which = "its attention" if dense == held else f"attention in {dense} of {held} layers"
            warnings.warn(
                f"{name}: {which} computes with cached keys and values itself, so they are "
                "dequantized for it at every step: as small in memory, but slower than attention "
                "on codes.",
                stacklevel=3,
            )
        if getattr(model.config, "output_attentions", False) and dense < held:
            warnings.warn(NO_WEIGHTS, stacklevel=3)
        if (slow := slow_kernels(model.device)) is not None:
            warnings.warn(slow, RuntimeWarning, stacklevel=3)

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have no attention; transformers makes its masks for the others."""
        attention = (TurboQuantLayer, DynamicLayer)
        return [
            isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, attention)
            for layer in self.layers
        ]

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and sliding window of every layer, dequantized, as of a `DynamicCache`."""
        for index, layer in enumerate(self.layers):
            window = getattr(layer, "sliding_window", None)
            yield *self[index], None if window is None else torch.tensor(window, device="cpu")

    def __getitem__(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of one layer, dequantized; None where there are none."""
        held = self.layers[self._number(layer)]
        if isinstance(held, TurboQuantLayer):
            return held.dense()
        keys, values = getattr(held, "keys", None), getattr(held, "values", None)
        # Copies: forks share what is held.
        return keys if keys is None else keys.clone(), values if values is None else values.clone()

    def __repr__(self) -> str:
        """Widths, layers, tokens and bytes, and how much smaller that is."""
        return summary(self)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held: codes, scales, windows, maps, tables, slack; each once.

        A pinned key map is held once for all sequences; caches that share it count it each.
        """
        storages = [x.untyped_storage() for x in self.tensors()]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    @property
    def uncompressed_nbytes(self) -> int:
        """Bytes the same tokens take in a 16-bit cache."""
        return sum(uncompressed_bytes(layer) for layer in self.layers)

    @property
    def compression_ratio(self) -> float:
        """16-bit bytes of the same tokens ÷ bytes held; 1 while empty."""
        return self.uncompressed_nbytes / self.nbytes if self.nbytes else 1.0

    def key_maps(self) -> KeyMaps:
        """The key maps in use, one a layer, to pin with `key_map` or keep in a file.

        Given ones as they are, fitted ones averaged over the sequences of the batch
        (`KeyMaps.of`): `fork` the cache and `batch_select_indices` some of them to choose.

        Raises:
            SixfoldError: A layer has no map yet.
        """
        return KeyMaps.of(maps_in_use(self.layers))

    def tensors(self) -> list[Tensor]:
        """Every tensor held by any layer."""
        return [x for layer in self.layers for x in layer_tensors(layer)]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens in every layer, or in none.

        An image goes with the tokens that brought it. One that `from_cache` has taken over counts
        as the first token's.

        Raises:
            SixfoldError: The number is positive, a sliding window or a convolution has moved on, a
                layer's recurrent state cannot be taken back, or a forward pass that was interrupted
                has changed states.
        """
        tokens_to_remove = whole("tokens_to_remove", tokens_to_remove, -(2**63))
        self._check_carried("crop")
        for layer in self.layers:
            check_crop(layer, tokens_to_remove)
        self._check_states()
        with self._pass.through_all("crop", shortens=not self._has_states):
            super().crop(tokens_to_remove)
            self._keep_text(self._text)
        self._pass.restart()

    @outside_inference_mode
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams; in every layer, or in none.

        Raises:
            SixfoldError: `beam_idx` are no numbers of sequences held.
        """
        rows: Any = self._rows("beam_idx", beam_idx)
        with self._through_all("reorder_cache"):
            super().reorder_cache(rows)

    @outside_inference_mode
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch; in every layer, or in none.

        Raises:
            SixfoldError: `indices` are no numbers of sequences held, nor a mask over them.
        """
        rows = self._rows("indices", indices)
        with self._through_all("batch_select_indices"):
            for layer in self.layers:
                select_sequences(layer, rows)

    @outside_inference_mode
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence; in every layer, or in none.

        Raises:
            SixfoldError: `repeats` is not a positive whole number.
        """
        repeats = whole("repeats", repeats, 1, MOST_REPEATS)
        with self._through_all("batch_repeat_interleave"):
            for layer in self.layers:
                repeat_sequences(layer, repeats)

    def _rows(self, name: str, value: Any) -> Tensor:
        batch = next(filter(None, map(sequences, self.layers)), None)
        # A cache without tokens has no sequences that could be missed.
        return value if batch is None else checked_rows(name, value, batch)

    @outside_inference_mode
    def fork(self) -> Self:
        """A cache that continues from the same tokens; pages are shared, not copied.

        Different forks may be used in different threads at the same time. One cache, and that
        includes forking it, is for one thread at a time.
        """
        self._check_carried("fork")
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.layers = [forked(layer) for layer in self.layers]
        twin._pass = self._pass.copy(self.layers)
        return twin

    @untraced
    def static(self, max_tokens: int) -> "TurboQuantCache":
        """The same tokens in memory that never moves: for `torch.compile` and CUDA graphs.

        The copy decodes one token of every sequence a step, up to `max_tokens` of them, all that is
        held included, and can do nothing else. Its steps wait for nothing on the device; pass the
        model `position_ids`, lest it ask for the length.

        Args:
            max_tokens: Tokens a sequence to make room for.

        Raises:
            SixfoldError: A layer has not compressed a page yet, is not attended on its codes, or
                holds more tokens than that; or a forward pass was interrupted: see `recover`.
        """
        self._pass.check_complete(self.layers)
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        max_tokens = whole("max_tokens", max_tokens)
        # What inference mode makes cannot be changed outside of it.
        with ordinary_tensors(), torch.no_grad():
            twin.layers = [static_layer(layer, max_tokens) for layer in self.layers]
        twin._pass = ForwardPass(self._pass.growing)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A fork: what transformers' guides do with `copy.deepcopy` to reuse a prefix."""
        return self.fork()

    @untraced
    def save(self, path: str | PathLike[str]) -> None:
        """Write the cache to a file that `load` reads (docs/format.md); nothing is pickled.

        Args:
            path: Where to. An existing file is replaced in one step, once the new one is whole.

        Raises:
            FormatError: A layer is of a kind that cannot be stored, or holds numbers that no reader
                would take, such as NaN.
            SixfoldError: A forward pass was interrupted: see `recover`.
            OSError: The file cannot be written.
        """
        path = checked_path(path)
        self._check_carried("save")
        self._pass.check_complete(self.layers)
        self._refuse_static()
        model = self._model() if self._model else None
        prompt = self._prompt() if self._prompt else None
        save_cache(self.layers, self.config, model, path, prompt)

    @classmethod
    @untraced
    @outside_inference_mode
    def load(
        cls,
        path: str | PathLike[str],
        model: torch.nn.Module,
        *,
        check_weights: bool = True,
        key_map: KeyMaps | None = None,
    ) -> Self:
        """Read a cache that `save` wrote, for attention on its codes by `model`.

        Args:
            path: The file.
            model: The model that filled the cache; tokens become of its dtype.
            check_weights: Refuse a model of the same shape with other weights or adapters. Every
                byte of them is read: 0.3 s for 135 million weights, 1.5 s for 1.5 billion in
                bfloat16, measured on a CPU.
            key_map: As for a new cache, of layers that hold no codes yet, and of all after a
                `reset`. What has been coded keeps the map it was coded with.

        Raises:
            FormatError: Not such a file, another model's, cut short, or damaged; or it holds
                numbers that no cache holds (docs/format.md, section 8).
            OSError: The file cannot be read.
        """
        given, path, model = model, checked_path(path), unwrapped(model)
        flag("check_weights", check_weights)
        policies, layers, tensors = load_layers(path, model, check_weights, learned_prompt(given))
        fields = {index: p.to_dict() for index, p in enumerate(policies) if p is not None}
        skipped = [index for index, p in enumerate(policies) if p is None]
        cache = cls.for_model(given, per_layer=fields, skip_layers=skipped, key_map=key_map)
        for index, (layer, description) in enumerate(zip(cache.layers, layers, strict=True)):
            prefix = f"layers.{index}."
            held = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            try:
                fill(layer, description, held)
            except FormatError as error:
                raise FormatError(f"{path}, layer {index}: {error}") from error
        devices = layer_devices(model)
        for index, layer in enumerate(cache.layers):
            move_layer(layer, devices.get(index, execution_device(model)), model.dtype)
        return cache

    @outside_inference_mode
    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Self:
        """Move everything held to `device`, and convert what is not compressed to `dtype`.

        Attention layers follow their model by themselves: one that gets tokens on another device
        moves. Convolution and recurrent states do not: bring them back where their model is.

        Args:
            device: Where to; by default every layer stays where it is.
            dtype: Of keys and values in full precision; by default they stay as they are.
            non_blocking: Ignored; hosts pass it.
        """
        target = None if device is None else checked_device(device)
        if dtype is not None:
            dtype = float_dtype(dtype)
        for layer in self.layers:
            move_layer(layer, target, dtype)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own_states()

    def __getstate__(self) -> dict[str, Any]:
        self._check_carried("a copy")
        # A model is not part of its cache; without one, `save` writes no digest of its weights.
        # Nor can states that it has read be told from its copies.
        own = {"_model": None, "_prompt": None, "_pass": self._pass.copy(self.layers)}
        return {**self.__dict__, **own}


@untraced_growth
def _update_untraced(cache: TurboQuantCache, *args: Any) -> Any:
    cache._blind = True
    return cache.update(*args)
