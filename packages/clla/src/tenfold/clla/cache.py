"""A cache of latents that transformers' `generate` can use: packed codes, scales in step, readers hold nothing."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

from .config import CLLAConfig
from .formats import Format, Stored, parts

PAGE = 64  # tokens: buffers are whole pages long


class Stream:
    """The stored vectors of every token so far, in buffers that grow by a sixteenth: codes and scales, or values.

    A buffer that doubled would waste up to half of what the cache saves; by a sixteenth, each token is copied
    some sixteen times in all, and that at a quarter of its size.
    """

    def __init__(self, format: Format, max_length: int | None = None):
        self.format, self.max_length = format, max_length
        self.length = 0
        self.buffers: tuple[Tensor, ...] = ()
        self.device: torch.device | None = None  # where it is used; offloaded buffers lie elsewhere

    def append(self, x: Tensor) -> Stored:
        """Store `x`, `(B, heads, T, width)`, after what is there; all of it, as it lies. No gradient passes."""
        return self.write(self.pack(x))

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """What `write` would store of `x`; refused here, if at all."""
        new = parts(self.format.pack(x.detach()))
        self._check(x, new)
        return new

    def write(self, new: tuple[Tensor, ...]) -> Stored:
        """Store what `pack` made."""
        device = new[0].device
        if self.buffers and self.buffers[0].device != device:
            self.move(device)
        end = self.length + new[0].shape[2]
        self._reserve(end, new)
        for buffer, part in zip(self.buffers, new, strict=True):
            buffer[:, :, self.length : end] = part
        self.length, self.device = end, device
        return self.read()

    def read(self) -> Stored:
        """Views of what is stored."""
        return self.format.stored(tuple(buffer[:, :, : self.length] for buffer in self.buffers))

    def take(self, rows: Tensor) -> None:
        """Replace the batch by its `rows`."""
        self.buffers = tuple(buffer.index_select(0, rows.to(buffer.device)) for buffer in self.buffers)

    def move(self, device: torch.device | str) -> None:
        """Put the buffers on `device`."""
        self.buffers = tuple(buffer.to(device, non_blocking=True) for buffer in self.buffers)

    def load(self, saved: tuple[Tensor, ...]) -> None:
        """Take over what `parts(read())` gave."""
        self.buffers, self.length = (), 0
        if saved:
            self._reserve(saved[0].shape[2], saved)
            for buffer, part in zip(self.buffers, saved, strict=True):
                buffer[:, :, : part.shape[2]] = part
            self.length, self.device = saved[0].shape[2], saved[0].device

    def _reserve(self, length: int, like: tuple[Tensor, ...]) -> None:
        capacity = self.buffers[0].shape[2] if self.buffers else 0
        if length <= capacity:
            return
        if self.max_length is None:
            capacity = -(-max(length, capacity + capacity // 16) // PAGE) * PAGE
        else:
            capacity = self.max_length
        old, self.buffers = self.buffers, ()
        for i, part in enumerate(like):
            grown = part.new_zeros((*part.shape[:2], capacity, part.shape[3]))
            if old:
                grown[:, :, : self.length] = old[i][:, :, : self.length]
            self.buffers += (grown,)

    def _check(self, x: Tensor, new: tuple[Tensor, ...]) -> None:
        B, heads, T, width = x.shape
        if (heads, width) != (self.format.heads, self.format.width):
            raise ValueError(
                f"past_key_values: made for {self.format.heads} vectors of {self.format.width} per token, got "
                f"{heads} of {width}; it belongs to another config"
            )
        if self.buffers and self.buffers[0].shape[0] != B:
            raise ValueError(f"past_key_values: holds {self.buffers[0].shape[0]} sequences, got {B}")
        if self.buffers and self.buffers[0].dtype != new[0].dtype:
            raise ValueError(f"past_key_values: holds {self.buffers[0].dtype}, got {new[0].dtype}")
        if self.max_length is not None and self.length + T > self.max_length:
            raise ValueError(f"past_key_values: made for {self.max_length} tokens, got {self.length + T}")


class CLLALayer(CacheLayerMixin):
    """One layer's streams: latent and rotary key, or keys and values; one of them alone, where there is only one."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False  # the sizes are the config's, not the caller's

    def __init__(self, formats: tuple[Format, ...], max_length: int | None = None):
        super().__init__()
        self.streams = tuple(Stream(format, max_length) for format in formats)
        self.max_length = max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None) -> None:
        """Nothing to do: a stream makes its buffers when it gets the first tokens."""

    def update(
        self, key_states: Tensor, value_states: Tensor | None = None, *args, **kwargs
    ) -> tuple[Stored, Stored | None]:
        """Append new vectors `(B, heads, T, width)` and return all that is stored, packed as it lies.

        Raises:
            ValueError: they do not belong to this layer, or there is no room; nothing is changed.
        """
        vectors = [x for x in (key_states, value_states) if x is not None]
        if len(vectors) != len(self.streams):
            raise ValueError(
                f"past_key_values: a layer stores {len(self.streams)} kinds of vectors, got {len(vectors)}; it belongs "
                "to another config"
            )
        if len({(len(x), x.shape[2]) for x in vectors}) > 1:
            shapes = " and ".join(str(tuple(x.shape)) for x in vectors)
            raise ValueError(f"past_key_values: expected as many sequences and tokens of each kind, got {shapes}")
        packed = [stream.pack(x) for stream, x in zip(self.streams, vectors, strict=True)]
        stored = [stream.write(new) for stream, new in zip(self.streams, packed, strict=True)]
        self.is_initialized = True
        return stored[0], (stored[1] if len(stored) > 1 else None)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next `query_length` queries can see, and the first one's position."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.streams[0].length

    def get_max_length(self) -> int:
        """The limit given, or -1."""
        return -1 if self.max_length is None else self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; the number is negative, as everywhere in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: must not be positive, got {tokens_to_remove}; -1 removes one token")
        for stream in self.streams:
            stream.length = max(0, stream.length + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything and free the buffers."""
        for stream in self.streams:
            stream.load(())
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row `beam_idx[i]` was."""
        for stream in self.streams:
            stream.take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        for stream in self.streams:
            if stream.buffers:
                stream.take(torch.arange(stream.buffers[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; a bool mask is understood too."""
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def offload(self) -> None:
        """Move the buffers to the CPU."""
        for stream in self.streams:
            stream.move("cpu")

    def prefetch(self) -> None:
        """Move the buffers back."""
        for stream in self.streams:
            if stream.device is not None:
                stream.move(stream.device)


class CLLACache(Cache):
    """The cache of a CLLA model: `model(tokens, past_key_values=CLLACache(model.config))`; `generate` makes its own.

    Every token is packed once, when it is written, and never again: neither cropping, beams nor saving round twice.
    Layers that read another's cache hold nothing.

    Args:
        config: of the model.
        max_length: tokens to make room for at once. By default the buffers grow, and are up to a sixteenth and
            63 tokens longer than what they hold.
        offloading: keep the layers on the CPU, and on the accelerator only the run that is being computed.

    Example:
        >>> cache = CLLACache(model.config)
        >>> model(prompt, past_key_values=cache)
        >>> cache.nbytes()  # of storage, slack included
    """

    def __init__(self, config: CLLAConfig, *, max_length: int | None = None, offloading: bool = False):
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: must be at least 1, got {max_length}")
        if offloading and not torch.accelerator.is_available():
            raise ValueError("offloading: there is no accelerator to spare, the cache is on the CPU anyway")
        formats = [config.cache_formats(layer) for layer in range(config.num_hidden_layers)]
        super().__init__(layers=[CLLALayer(f, max_length) if f else DummyLayer() for f in formats])
        self.formats, self.producers = formats, list(config.cache_producers)
        self.offloading = offloading
        if offloading:
            self.only_non_sliding = True
            self.prefetch_stream = torch.Stream()

    def check(self, config: CLLAConfig) -> None:
        """That this cache was made for a model like `config`.

        Raises:
            ValueError: it was not.
        """
        formats = [config.cache_formats(layer) for layer in range(config.num_hidden_layers)]
        if formats != self.formats or list(config.cache_producers) != self.producers:
            raise ValueError("past_key_values: made for another config: layers, sharing, sizes, bits or codes differ")

    def nbytes(self) -> int:
        """Bytes of all storage: codes, scales and slack."""
        return sum(buffer.untyped_storage().nbytes() for _, stream in self._streams() for buffer in stream.buffers)

    def state_dict(self) -> dict[str, Any]:
        """The codes and scales, less the slack, as tensors that `torch.save` and `weights_only=True` can take."""
        return {
            f"{name}.{kind}": part.clone()
            for name, stream in self._streams()
            if stream.buffers
            for kind, part in zip(stream.format.names, parts(stream.read()), strict=True)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of a cache for the same config gave, and `max_length` has room for.

        Compared are which layers cache, sizes, codes, bits and groups of numbers that share a scale; a model with
        the same of these and other weights, or another place of its norm, makes a state that looks alike.

        Raises:
            ValueError: it is another config's, or too long; nothing is changed.
        """
        expected = {}
        for name, stream in self._streams():
            like = parts(stream.format.pack(torch.zeros(1, stream.format.heads, 1, stream.format.width)))
            for kind, part in zip(stream.format.names, like, strict=True):
                expected[f"{name}.{kind}"] = _kind(kind, part)
        found = {name: _kind(name, part) for name, part in state.items()}
        if state and (found != expected or len({(part.shape[0], part.shape[2]) for part in state.values()}) != 1):
            raise ValueError("state: saved from a cache of another config, or not whole")
        length, limit = max((part.shape[2] for part in state.values()), default=0), self.layers[0].max_length
        if limit is not None and length > limit:
            raise ValueError(f"state: has {length} tokens, but this cache was made for {limit}")
        for name, stream in self._streams():
            stream.load(tuple(state[f"{name}.{kind}"] for kind in stream.format.names) if state else ())

    def _streams(self):
        for index, layer in enumerate(self.layers):
            for number, stream in enumerate(getattr(layer, "streams", ())):
                yield f"layers.{index}.{number}", stream


def _kind(name: str, part: object) -> tuple | None:
    """What of a stored tensor `(B, heads, T, ·)` is the format's; numbers in 16 bits may be of any floating dtype."""
    if not isinstance(part, Tensor) or part.dim() != 4:
        return None
    any_dtype = name.endswith("numbers") and part.is_floating_point()
    return part.shape[1], part.shape[3], None if any_dtype else part.dtype
