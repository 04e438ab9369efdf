"""Training a CLLA language model, or any other rung of the ladder, with Lightning."""

from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from tenfold.core.lm import CausalLM

from .config import CLLAConfig
from .ladder import rung, with_parameters_of
from .model import CLLAForCausalLM

Rung = Literal["MHA", "GQA", "MQA", "CLA", "MLA", "CLLA"]


class CLLAModule(CausalLM):
    """Trains one rung of the ladder from MHA to CLLA; with fewer than 16 bits, on what the cache will give back.

    Args:
        vocab_size: tokens; that of the data.
        rung: `MHA`, `GQA`, `MQA`, `CLA`, `MLA` or `CLLA`.
        layers: decoder blocks.
        dim: width of the residual stream.
        heads: query heads.
        ffn: inner width of the feed-forward, of the MHA rung if `equal_parameters`.
        head_dim: width of a head's content; `dim / heads` by default.
        max_length: longest sequence in tokens.
        kv_heads: key and value heads of GQA (a quarter of the heads by default) and CLA (all by default).
        equal_parameters: give what the rung saves in attention back to the feed-forward, so that all rungs have the
            parameters of MHA.
        share_factor: layers that share a cache, in CLA and CLLA.
        latent_dim: numbers of a latent.
        rope_dim: numbers of the rotary key.
        rope_key: `shared`, `own` or `none`, see CLLAConfig.
        share_up_projections: whether readers expand with the producer's up-projections.
        quantizer: `after_norm` or `before_norm`.
        cache_bits: 4, 8 or 16.
        rope_bits: of the rotary key; `cache_bits` by default.
        group_size: numbers that share a scale; None is one scale per vector.
        quantize_from: the update from which on training sees the cache's bits; 16 bits before it.
        rope_theta: base of the rotary frequencies.
        attention: transformers' name of the attention over expanded keys: `sdpa` or `eager`.
        tie_embeddings: whether the head's weight is the embedding's.
        separate_documents: whether a token attends only its own document.
        init_std: standard deviation of the initial weights.
        lr: the highest learning rate.
        min_lr_ratio: the last learning rate, as a share of `lr`.
        warmup_steps: over which the learning rate rises.
        weight_decay: of AdamW.
        betas: of AdamW.

    Example:
        >>> module = CLLAModule(vocab_size=2048, rung="CLLA", dim=128, heads=4, latent_dim=32, rope_dim=8)
        >>> Trainer(max_steps=600).fit(module, TextDataModule(vocab_size=2048))
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        rung: Rung = "CLLA",
        layers: int = 6,
        dim: int = 128,
        heads: int = 4,
        ffn: int = 344,
        head_dim: int | None = None,
        max_length: int = 512,
        kv_heads: int | None = None,
        equal_parameters: bool = False,
        share_factor: int = 2,
        latent_dim: int = 32,
        rope_dim: int = 8,
        rope_key: Literal["shared", "own", "none"] = "shared",
        share_up_projections: bool = False,
        quantizer: Literal["after_norm", "before_norm"] = "after_norm",
        cache_bits: Literal[4, 8, 16] = 4,
        rope_bits: Literal[4, 8, 16] | None = None,
        group_size: int | None = 128,
        quantize_from: int = 0,
        rope_theta: float = 10_000.0,
        attention: str = "sdpa",
        tie_embeddings: bool = False,
        separate_documents: bool = False,
        init_std: float = 0.02,
        lr: float = 3e-3,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            layers=layers,
            dim=dim,
            heads=heads,
            ffn=ffn,
            max_length=max_length,
            attention=attention,
            tie_embeddings=tie_embeddings,
            separate_documents=separate_documents,
            init_std=init_std,
            lr=lr,
            min_lr_ratio=min_lr_ratio,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            betas=betas,
        )
        self.save_hyperparameters()
        if quantize_from < 0:
            raise ValueError(f"quantize_from: must not be negative, got {quantize_from}")
        self.config()  # what does not go together shows now, not when training begins

    def config(self) -> CLLAConfig:
        """The model's configuration."""
        h = self.hparams
        base = CLLAConfig(
            vocab_size=h.vocab_size,
            hidden_size=h.dim,
            intermediate_size=h.ffn,
            num_hidden_layers=h.layers,
            num_attention_heads=h.heads,
            head_dim=h.head_dim,
            max_position_embeddings=h.max_length,
            rope_parameters={"rope_type": "default", "rope_theta": h.rope_theta},
            tie_word_embeddings=h.tie_embeddings,
            initializer_range=h.init_std,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation=h.attention,
            share_factor=h.share_factor,
            latent_dim=h.latent_dim,
            rope_dim=h.rope_dim,
            rope_key=h.rope_key,
            share_up_projections=h.share_up_projections,
            quantizer=h.quantizer,
            cache_bits=h.cache_bits,
            rope_bits=h.rope_bits,
            group_size=h.group_size,
        )
        config = rung(base, h.rung, kv_heads=h.kv_heads)
        return with_parameters_of(config, rung(base, "MHA")) if h.equal_parameters else config

    def build(self) -> PreTrainedModel:
        """The model to train, with fresh weights."""
        return CLLAForCausalLM(self.config())

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Train in the model's own dtype until `quantize_from`; a function of the update, so that resuming agrees."""
        h, quantized = self.hparams, self.global_step >= self.hparams.quantize_from
        self.lm.config.cache_bits = h.cache_bits if quantized else 16
        self.lm.config.rope_bits = h.rope_bits if quantized else 16
