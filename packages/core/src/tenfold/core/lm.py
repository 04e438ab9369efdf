"""Language models: transformers' own Llama from a small config, and the Lightning module that trains one."""

import math
from dataclasses import fields
from pathlib import Path
from typing import ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from tenfold.kernels import linear_logprob

from .data.tokenizer import load_tokenizer
from .training.schedules import warmup_cosine
from .training.sharding import fill, shard, sharding_mesh
from .weights import read_weights

# What transformers calls the cache, in its models' arguments and outputs: from 5.24 on `cache`, which it still takes
# under the old name.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def llama_config(
    *,
    vocab_size: int,
    layers: int,
    dim: int,
    heads: int,
    ffn: int,
    max_length: int,
    kv_heads: int | None = None,
    attention: str = "sdpa",
    tie_embeddings: bool = False,
    **extra,
) -> LlamaConfig:
    """A Llama as transformers describes it, in few words.

    Args:
        vocab_size: tokens.
        layers: decoder blocks.
        dim: width of the residual stream.
        heads: query heads, each of `dim / heads`.
        ffn: inner width of the SwiGLU feed-forward.
        max_length: longest sequence in tokens.
        kv_heads: key and value heads; `heads` by default.
        attention: a name that transformers knows or that was registered ("sdpa", "eager", "cog").
        tie_embeddings: whether the head's weight is the embedding's.
        extra: passed to `LlamaConfig`; token 0, the separator of `tenfold.core.data`, begins and ends a text
            by default.

    Raises:
        ValueError: a size below 1, heads that do not divide `dim`, or kv_heads that do not divide heads.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = {"vocab_size": vocab_size, "layers": layers, "dim": dim, "heads": heads, "kv_heads": kv_heads, "ffn": ffn}
    for name, value in {**sizes, "max_length": max_length}.items():
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if dim % heads:
        raise ValueError(f"heads: {heads} do not divide dim {dim}")
    if heads % kv_heads:
        raise ValueError(f"kv_heads: {kv_heads} do not divide heads {heads}")
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=tie_embeddings,
        attn_implementation=attention,
        **{"bos_token_id": 0, "eos_token_id": 0, **extra},
    )


class CausalLM(LightningModule):
    """Trains a causal language model on the batches of `TextDataModule`.

    The loss is the mean of -log p(token | those before it) over a batch, in nats, computed without the matrix
    of logits; `val/bits_per_byte` is Σ -log₂ p over the validation set ÷ its UTF-8 bytes, which does not
    depend on the tokenizer. AdamW decays the weights of linear layers, the head's included unless it is tied;
    it does not decay embeddings, norms, biases and other vectors. The learning rate rises linearly over
    `warmup_steps` and falls on a cosine to `lr · min_lr_ratio` at the end of training.

    A subclass that overrides `build` trains any other transformers model whose logits are its output
    embedding times its last hidden state; its own constructor takes `**others` for the arguments below, which
    the command line and the saved hyperparameters then show too. After `configure_model`, which Trainer calls,
    the model is at `lm`, and `module.lm.save_pretrained(folder)` writes it for
    `AutoModelForCausalLM.from_pretrained`.

    Args:
        vocab_size: tokens; that of the data.
        layers: decoder blocks.
        dim: width of the residual stream.
        heads: query heads.
        ffn: inner width of the feed-forward.
        max_length: longest sequence in tokens.
        kv_heads: key and value heads; `heads` by default.
        attention: transformers' name of the attention.
        tie_embeddings: whether the head's weight is the embedding's.
        separate_documents: whether a token attends only its own document, which the separator, token 0, begins.
        init_std: standard deviation of the initial weights.
        lr: the highest learning rate.
        min_lr_ratio: the last learning rate, as a share of `lr`.
        warmup_steps: over which the learning rate rises.
        weight_decay: of AdamW.
        betas: of AdamW.
        shard_size: under `ModelParallelStrategy`, processes that share one copy of the weights; by default all of them.
        init_from: a folder with the weights to begin with, of a model of the same architecture, as `tenfold export` and
            `save_pretrained` write it. Once there is a checkpoint it is not needed any more.

    Example:
        >>> module = CausalLM(vocab_size=2048, layers=4, dim=128, heads=4, ffn=344)
        >>> Trainer(max_steps=600).fit(module, TextDataModule(vocab_size=2048))
    """

    # What optimizer and schedule alone depend on, and where weights lie: arguments that a resumed run may change.
    may_change: ClassVar[tuple[str, ...]] = (
        "lr",
        "min_lr_ratio",
        "warmup_steps",
        "weight_decay",
        "betas",
        "shard_size",
    )

    def __init__(
        self,
        *,
        vocab_size: int,
        layers: int = 6,
        dim: int = 128,
        heads: int = 4,
        ffn: int = 344,
        max_length: int = 512,
        kv_heads: int | None = None,
        attention: str = "sdpa",
        tie_embeddings: bool = False,
        separate_documents: bool = False,
        init_std: float = 0.02,
        lr: float = 3e-3,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        shard_size: int | None = None,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, low, high in (
            ("lr", lr, 0, math.inf),
            ("min_lr_ratio", min_lr_ratio, 0, 1),
            ("warmup_steps", warmup_steps, 0, math.inf),
            ("weight_decay", weight_decay, 0, math.inf),
        ):
            if not low <= value <= high:
                accepted = f"from {low} to {high}" if high < math.inf else f"at least {low}"
                raise ValueError(f"{name}: must be {accepted}, got {value}")
        if shard_size is not None and shard_size < 1:
            raise ValueError(f"shard_size: must be positive, got {shard_size}")
        self.save_hyperparameters()
        self.lm: PreTrainedModel | None = None
        self._absent: RemovableHandle | None = None

    def build(self) -> PreTrainedModel:
        """The model to train, with fresh weights: a Llama of the constructor's sizes."""
        return LlamaForCausalLM(self.llama_config())

    def llama_config(self, **changes) -> LlamaConfig:
        """A config of the constructor's sizes; `changes` are arguments of the function of the same name."""
        h = self.hparams
        sizes = {
            "vocab_size": h.vocab_size,
            "layers": h.layers,
            "dim": h.dim,
            "heads": h.heads,
            "ffn": h.ffn,
            "max_length": h.max_length,
            "kv_heads": h.kv_heads,
            "attention": h.attention,
            "tie_embeddings": h.tie_embeddings,
            "initializer_range": h.init_std,
        }
        return llama_config(**sizes | changes)

    def setup(self, stage: str) -> None:
        """Refuse data that the model has no token or no position for, and a `shard_size` that nothing goes by."""
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        if stage == "fit" and self.hparams.shard_size is not None and not sharded:
            raise ValueError("shard_size: needs trainer.strategy to be ModelParallelStrategy, nothing else shards")
        data = getattr(self.trainer, "datamodule", None)
        for name, offered, taken in (("vocab_size", "vocab_size", "vocab_size"), ("length", "length", "max_length")):
            given, limit = getattr(data, offered, None), self.hparams[taken]
            if given is not None and given > limit:
                raise ValueError(f"data.{name}: {given} is more than the model's {taken}, {limit}")
        tokenizer, begin = getattr(data, "tokenizer", None), Path(self.hparams.init_from or "", "tokenizer.json")
        if self.hparams.separate_documents and getattr(tokenizer, "separator", 0) != 0:
            raise ValueError("separate_documents: needs a tokenizer whose token 0 is <|endoftext|>")
        begins = stage == "fit" and self.hparams.init_from and tokenizer and begin.is_file()
        if begins and load_tokenizer(begin).fingerprint != tokenizer.fingerprint:
            raise ValueError(f"data.tokenizer: not that of init_from, {begin}, whose tokens have other meanings")

    def configure_model(self) -> None:
        """Build the model, once; under Trainer, in the dtype and on the device that its strategy wants.

        Under Lightning's `ModelParallelStrategy`, each layer is sharded over the processes (FSDP2) before it has any
        memory: a process only ever holds its share. Then weights are read from `init_from`.

        Raises:
            ValueError: a `shard_size` that does not divide the processes, or weights of another model.
        """
        if self.lm is not None:
            return
        self._build()
        if self.hparams.init_from is None:
            return
        if Path(self.hparams.init_from).is_dir():
            self.read_weights(Path(self.hparams.init_from))
        else:  # nor is it needed if a checkpoint follows, which shows later
            self._absent = self.lm.base_model.register_forward_pre_hook(self._refuse)

    def read_weights(self, folder: Path) -> None:
        """Fill the model, which may be sharded, from `init_from`."""
        read_weights(self.lm, folder)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """The checkpoint has what `init_from` was for."""
        if self._absent is not None:
            self._absent.remove()

    def _refuse(self, model: nn.Module, inputs: tuple) -> None:
        raise FileNotFoundError(f"init_from: there is no folder {self.hparams.init_from}")

    def _build(self) -> None:
        if self.device_mesh is None:
            self.lm = self.build()
            return
        mesh = sharding_mesh(self.device_mesh, self.hparams.shard_size)
        with torch.device("meta"):
            self.lm = self.build()
        shard(self, self.lm.base_model.layers, mesh)  # not `lm`: the head's weight is used outside of its forward
        strategy = self.trainer.strategy
        fill(self, self.lm, mesh, device=strategy.root_device, seed=strategy.broadcast(torch.initial_seed()))

    def forward(self, tokens: Tensor) -> Tensor:
        """Log-probabilities `(B, T)` of `tokens` `(B, T + 1)`, each but the first given those before it."""
        inputs = tokens[:, :-1]
        positions = _positions_in_documents(inputs) if self.hparams.separate_documents else None
        hidden = self.lm.base_model(input_ids=inputs, position_ids=positions, use_cache=False).last_hidden_state
        head = self.lm.get_output_embeddings()
        return linear_logprob(hidden, head.weight, tokens[:, 1:], bias=getattr(head, "bias", None))

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """The loss of a batch, logged as `train/loss`."""
        loss = -self(batch["tokens"]).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Empty the sums."""
        self.nats = torch.zeros((), device=self.device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=self.device)  # tokens, bytes

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Add a batch to the sums; rows of 0 bytes are padding."""
        logp = self(batch["tokens"])[batch["bytes"] > 0]
        self.nats -= logp.sum()
        self.counts[0] += logp.numel()
        self.counts[1] += batch["bytes"].sum()

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` and `val/bits_per_byte`, over all devices."""
        nats = self.trainer.strategy.reduce(self.nats, reduce_op="sum")
        tokens, size = self.trainer.strategy.reduce(self.counts, reduce_op="sum")
        values = {"val/loss": nats / tokens, "val/bits_per_byte": nats / (math.log(2) * size)}
        self.log_dict(values, prog_bar=True, sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> list[Tensor]:
        """The log-probabilities of each row's real targets, in float32 on the CPU."""
        logp = self(batch["tokens"]).float().cpu()
        return [row[:count] for row, count in zip(logp, batch["targets"].tolist(), strict=True)]

    def adamw(self, groups: list[dict], **options) -> torch.optim.AdamW:
        """The optimizer; fused, but for mixed precision, where Lightning clips no gradients before a fused step."""
        fused = not str(self.trainer.precision).endswith("mixed")
        return torch.optim.AdamW(groups, betas=self.hparams.betas, fused=fused, **options)

    def configure_optimizers(self) -> dict:
        """AdamW in two groups, and the schedule, stepped after each update."""
        embeddings = {id(p) for m in self.lm.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        decayed, others = [], []
        for parameter in self.lm.parameters():
            group = decayed if parameter.dim() > 1 and id(parameter) not in embeddings else others
            group.append(parameter)
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        h = self.hparams
        optimizer = self.adamw(groups, lr=h.lr, weight_decay=h.weight_decay)
        schedule = warmup_cosine(
            optimizer,
            warmup_steps=h.warmup_steps,
            total_steps=int(self.trainer.estimated_stepping_batches),
            min_ratio=h.min_lr_ratio,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _positions_in_documents(tokens: Tensor) -> Tensor:
    """Positions `(B, T)` that begin anew at each separator, by which transformers masks packed documents apart."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    starts = positions.where(tokens == 0, 0).cummax(dim=1).values
    return positions - starts
