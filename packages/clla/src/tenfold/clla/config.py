"""The configuration of a CLLA model, which is every rung of the ladder from MHA to CLLA."""

from collections.abc import Sequence
from typing import Literal, get_args

from transformers import LlamaConfig

from .formats import BITS, Code, Format

Layout = Literal["adjacent", "trailing", "sandwich"]
Scales = Literal["token", "channel"]

_SIZES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings
    share_factor latent_dim rope_dim
""".split()  # noqa: SIM905


def sharing_layout(layout: Layout, layers: int, share_factor: int) -> list[int]:
    """For each layer the one whose cache it reads, with ⌈layers / share_factor⌉ caches in all.

    `adjacent` is CLA's: runs of `share_factor` layers from the first on; an odd last run is shorter. The other two
    are readings of layouts that arXiv 2410.14442 compares: `trailing` gives the first layers a cache of their own
    and lets all after them share the last one; `sandwich` keeps the last layer's own too and shares in the middle.
    """
    if share_factor < 1:
        raise ValueError(f"share_factor: must be at least 1, got {share_factor}")
    caches = -(-layers // share_factor)
    if layout == "adjacent":
        return [share_factor * (layer // share_factor) for layer in range(layers)]
    if layout == "trailing" or caches < 3:
        return [min(layer, caches - 1) for layer in range(layers)]
    return [*(min(layer, caches - 2) for layer in range(layers - 1)), layers - 1]


class CLLAConfig(LlamaConfig):
    """A Llama whose layers share caches of latents, or, with `attention="heads"`, of keys and values.

    The defaults are CLLA with a quantized cache. Known of the paper, second-hand, are `latent_dim` 512,
    `share_factor` 2 and 4 bits, trained in; the other defaults are this package's reconstruction, and each is an
    argument. `tenfold.clla.rung` gives the settings of MHA, MQA, GQA, CLA, MLA and CLLA.

    Args:
        attention: `latent`: keys and values come from a cached latent and a rotary key (MLA, CLLA); `heads`: they
            are cached themselves, `num_key_value_heads` of each (MHA, MQA, GQA, CLA).
        share_factor: layers per cache, in adjacent runs; the first of a run makes it, the others read it.
        producers: another layout: for each layer the one whose cache it reads, see `sharing_layout`.
        latent_dim: numbers of a latent, d_c.
        rope_dim: numbers of the rotary key, d_r, which all heads share.
        rope_key: `shared`: the producer makes one for all its readers; `own`: each layer makes and caches one;
            `none`: there is no rotary part, and no position but the causal order.
        rope_frequencies: radians per token of each of the `rope_dim / 2` pairs, where they are not what
            `rope_parameters` gives, whose type must be `default`; for converted models.
        share_up_projections: whether readers expand with the producer's up-projections instead of their own.
        latent_norm: whether the latent passes an RMSNorm.
        quantizer: `after_norm` or `before_norm`. Before it, the norm has no weight: the up-projections take it up.
        value_latent_dim: the last so many numbers of the latent make the values and the others the keys; None: all
            make both.
        query_dim: width of a query latent; None: queries come straight from the hidden state.
        cache_bits: 4, 8, or 16 for the model's own dtype.
        rope_bits: of the rotary key; by default `cache_bits`.
        cache_code: what 4 or 8 bits stand for: `symmetric` integers; `asymmetric` ones, with an offset beside each
            scale; or `float`: E2M1 (FP4) and E4M3 (FP8).
        rope_code: of the rotary key; by default `cache_code`. With `rope_bits` 8, `float` is serving stacks' FP8 key.
        cache_scales: `token`: a float16 scale for each token and group. `channel`: for each channel of the latent one
            step that is a parameter, trained with the model (LSQ) or set by `calibrate_steps`, of which the cache
            holds nothing. A trained model that is loaded with this for the first time has the steps that training
            begins with, which round normal numbers to 4 bits with 15 dB where 19 are possible: calibrate it. Rotary
            keys, which no norm keeps in range, have scales per token in both cases.
        group_size: numbers that share a scale; None is one scale per vector.
        kwargs: LlamaConfig's. `head_dim` is the width of a head's content part.

    Raises:
        ValueError: a value that is not accepted, or sizes that do not go together.
    """

    model_type = "clla"
    base_model_tp_plan = None  # Llama's plans name projections that are not here, and may cut a run in two
    base_model_pp_plan = None

    attention: str = "latent"
    share_factor: int = 2
    producers: list[int] | None = None
    latent_dim: int = 512
    rope_dim: int = 64
    rope_key: str = "shared"
    rope_frequencies: list[float] | None = None
    share_up_projections: bool = False
    latent_norm: bool = True
    quantizer: str = "after_norm"
    value_latent_dim: int | None = None
    query_dim: int | None = None
    cache_bits: int = 4
    rope_bits: int | None = None
    cache_code: str = "symmetric"
    rope_code: str | None = None
    cache_scales: str = "token"
    group_size: int | None = 128

    def __post_init__(self, **kwargs):
        for name in _SIZES:
            _size(name, getattr(self, name))
        for name in ("num_key_value_heads", "head_dim", "query_dim"):
            if getattr(self, name) is not None:
                _size(name, getattr(self, name))
        super().__post_init__(**kwargs)
        _one_of("attention", self.attention, ("latent", "heads"))
        _one_of("rope_key", self.rope_key, ("shared", "own", "none"))
        _one_of("quantizer", self.quantizer, ("after_norm", "before_norm"))
        for name, bits in (("cache_bits", self.cache_bits), ("rope_bits", self.rope_bits)):
            if bits is not None:
                _one_of(name, bits, BITS)
        for name, code in (("cache_code", self.cache_code), ("rope_code", self.rope_code)):
            if code is not None:
                _one_of(name, code, get_args(Code))
        _one_of("cache_scales", self.cache_scales, get_args(Scales))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} do not divide hidden_size {self.hidden_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} do not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.rotary_dim % 2:
            name = "rope_dim" if self.attention == "latent" else "head_dim"
            raise ValueError(f"{name}: must be even, the rotation turns pairs; got {self.rotary_dim}")
        if self.value_latent_dim is not None and not 0 < self.value_latent_dim < self.latent_dim:
            raise ValueError(
                f"value_latent_dim: must be between 0 and latent_dim {self.latent_dim}, got {self.value_latent_dim}"
            )
        if self.group_size is not None and (self.group_size < 2 or self.group_size % 2):
            raise ValueError(f"group_size: must be even and at least 2, or None, got {self.group_size}")
        if self.rope_frequencies is not None and len(self.rope_frequencies) != self.rotary_dim // 2:
            raise ValueError(
                f"rope_frequencies: expected {self.rotary_dim // 2}, one per pair, got {len(self.rope_frequencies)}"
            )
        if self.rope_frequencies is not None and self.rope_parameters["rope_type"] != "default":
            raise ValueError(
                "rope_frequencies: do not go with rope_parameters of another rope_type than 'default', got "
                f"{self.rope_parameters['rope_type']!r}"
            )
        _check_producers(self.cache_producers, self.num_hidden_layers)
        if self.cache_scales == "channel":
            for name, refused, why in (
                ("attention", "heads", "the steps are a latent's"),
                ("cache_code", "asymmetric", "a step has no offset"),
                ("quantizer", "before_norm", "the norm divides each token by another number"),
            ):
                if getattr(self, name) == refused:
                    raise ValueError(f"cache_scales: 'channel' does not go with {name} {refused!r}: {why}")

    @property
    def cache_producers(self) -> list[int]:
        """For each layer the one whose cache it reads."""
        if self.producers is not None:
            return self.producers
        return sharing_layout("adjacent", self.num_hidden_layers, self.share_factor)

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a query or key are rotated, 0 without a rotary part."""
        if self.attention == "heads":
            return self.head_dim
        return 0 if self.rope_key == "none" else self.rope_dim

    def cache_formats(self, layer: int) -> tuple[Format, ...]:
        """What `layer` caches: (latent, rotary key) or (keys, values), less what it does not have."""
        produces = self.cache_producers[layer] == layer
        if self.attention == "heads":
            each = Format(
                self.num_key_value_heads, self.head_dim, self.cache_bits, self.group_size, code=self.cache_code
            )
            return (each, each) if produces else ()
        before = self.rms_norm_eps if self.latent_norm and self.quantizer == "before_norm" else None
        scales = self.cache_scales == "token" or self.cache_bits == 16
        latent = Format(1, self.latent_dim, self.cache_bits, self.group_size, before, self.cache_code, scales)
        rope_code = self.rope_code or self.cache_code
        rope = Format(1, self.rope_dim, self.rope_bits or self.cache_bits, self.group_size, code=rope_code)
        formats = (latent,) if produces else ()
        return (*formats, rope) if self.rope_key == "own" or (produces and self.rope_key == "shared") else formats


def _size(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: must be {'at least 1' if isinstance(value, int) else 'an integer'}, got {value!r}")


def _one_of(name: str, value: object, accepted: Sequence) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def _check_producers(producers: list[int], layers: int) -> None:
    if len(producers) != layers:
        raise ValueError(f"producers: expected one per layer, {layers}, got {len(producers)}")
    for layer, producer in enumerate(producers):
        if not 0 <= producer <= layer or producers[producer] != producer:
            raise ValueError(
                f"producers: layer {layer} cannot read the cache of layer {producer}: that must come no later and "
                "read its own"
            )
