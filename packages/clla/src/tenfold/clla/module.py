"""Training a CLLA language model, or any other rung of the ladder, with Lightning."""

import re
from typing import Literal

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.core.lm import CausalLM

from .config import CLLAConfig, Scales
from .formats import Code
from .ladder import rung, with_parameters_of
from .model import CLLAForCausalLM

Rung = Literal["MHA", "GQA", "MQA", "CLA", "MLA", "CLLA"]

# What the configuration calls the module's arguments, where it calls them otherwise.
ARGUMENTS = {
    "hidden_size": "dim",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "max_length",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
    "attn_implementation": "attention",
}
_SAME = """
    vocab_size head_dim share_factor latent_dim rope_dim rope_key share_up_projections quantizer cache_bits rope_bits
    cache_code rope_code cache_scales group_size
""".split()  # noqa: SIM905


class CLLAModule(CausalLM):
    """Trains one rung of the ladder from MHA to CLLA; with fewer than 16 bits, on what the cache will give back.

    Args:
        rung: `MHA`, `GQA`, `MQA`, `CLA`, `MLA` or `CLLA`.
        equal_parameters: give what the rung saves in attention back to the feed-forward, so that all rungs have the
            parameters of MHA with the feed-forward `ffn`.
        kv_heads: key and value heads of GQA (a quarter of the heads by default) and CLA (all by default).
        head_dim: width of a head's content; `dim / heads` by default.
        share_factor: layers that share a cache, in CLA and CLLA.
        latent_dim: numbers of a latent.
        rope_dim: numbers of the rotary key.
        rope_key: `shared`, `own` or `none`, see CLLAConfig.
        share_up_projections: whether readers expand with the producer's up-projections.
        quantizer: `after_norm` or `before_norm`.
        cache_bits: 4, 8 or 16.
        rope_bits: of the rotary key; `cache_bits` by default.
        cache_code: what 4 or 8 bits stand for: `symmetric` or `asymmetric` integers, or `float` (FP4 E2M1, FP8 E4M3).
        rope_code: of the rotary key; `cache_code` by default.
        cache_scales: `token`, stored with the codes, or `channel`: a trained step per channel of the latent, which
            the cache does not hold; see CLLAConfig.
        group_size: numbers that share a scale; None is one scale per vector.
        quantize_from: the update from which on training sees the cache's bits; 16 bits before it, when steps per
            channel stay as they are.
        rope_theta: base of the rotary frequencies.
        others: sizes and optimizer, as `CausalLM` takes them.

    Example:
        >>> module = CLLAModule(vocab_size=2048, rung="CLLA", dim=128, heads=4, latent_dim=32, rope_dim=8)
        >>> Trainer(max_steps=600).fit(module, TextDataModule(vocab_size=2048))
    """

    def __init__(
        self,
        *,
        rung: Rung = "CLLA",
        equal_parameters: bool = False,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        share_factor: int = 2,
        latent_dim: int = 32,
        rope_dim: int = 8,
        rope_key: Literal["shared", "own", "none"] = "shared",
        share_up_projections: bool = False,
        quantizer: Literal["after_norm", "before_norm"] = "after_norm",
        cache_bits: Literal[4, 8, 16] = 4,
        rope_bits: Literal[4, 8, 16] | None = None,
        cache_code: Code = "symmetric",
        rope_code: Code | None = None,
        cache_scales: Scales = "token",
        group_size: int | None = 128,
        quantize_from: int = 0,
        rope_theta: float = 10_000.0,
        **others,
    ) -> None:
        if quantize_from < 0:
            raise ValueError(f"quantize_from: must not be negative, got {quantize_from}")
        super().__init__(kv_heads=kv_heads, **others)
        self.config()  # what does not go together shows now, not when training begins

    def config(self) -> CLLAConfig:
        """The model's configuration.

        Raises:
            ValueError: a value that is not accepted, in the words of this class.
        """
        h = self.hparams
        given = {name: h[name] for name in _SAME} | {name: h[ours] for name, ours in ARGUMENTS.items()}
        rope = {"rope_type": "default", "rope_theta": h.rope_theta}
        try:
            base = CLLAConfig(**given, rope_parameters=rope, bos_token_id=0, eos_token_id=0)
            config = rung(base, h.rung, kv_heads=h.kv_heads)
            return with_parameters_of(config, rung(base, "MHA")) if h.equal_parameters else config
        except (ValueError, StrictDataclassError) as error:
            told = re.sub(r"\w+", lambda word: ARGUMENTS.get(word[0], word[0]), " ".join(str(error).split()))
            raise ValueError(told) from error

    def configure_model(self) -> None:
        """As CausalLM's; layers that are sharded cannot lend each other weights.

        Raises:
            ValueError: `share_up_projections` under ModelParallelStrategy.
        """
        if self.lm is None and self.device_mesh is not None and self.hparams.share_up_projections:
            raise ValueError("share_up_projections: ModelParallelStrategy puts a layer's weights away after its pass")
        super().configure_model()

    def build(self) -> PreTrainedModel:
        """The model to train, with fresh weights."""
        return CLLAForCausalLM(self.config())

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Train in the model's own dtype until `quantize_from`; a function of the update, so that resuming agrees."""
        h, quantized = self.hparams, self.global_step >= self.hparams.quantize_from
        self.lm.config.cache_bits = h.cache_bits if quantized else 16
        self.lm.config.rope_bits = h.rope_bits if quantized else 16
