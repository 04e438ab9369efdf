"""Training a Hunyuan-Large language model with Lightning."""

import re
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tenfold.core.lm import CausalLM
from tenfold.core.training import NonFiniteError

from ..learning_rates import PAPERS_RATIO, expert_parameter_groups, three_phase
from .checkpoint import read_weights
from .config import HunyuanLargeConfig
from .modeling import HunyuanLargeForCausalLM

# What the configuration calls the module's arguments.
ARGUMENTS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "max_length",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
    "attn_implementation": "attention",
    "num_experts": "experts",
    "moe_topk": "top_k",
    "num_shared_expert": "shared_experts",
    "routing": "routing",
    "capacity_factor": "capacity_factor",
    "router_aux_loss_coef": "balance",
    "cla_share_factor": "share_factor",
    "use_qk_norm": "qk_norm",
}


class HunyuanLarge(CausalLM):
    """Trains a model of the paper's architecture with its schedule, and its learning rates by expert.

    The loss is the language model's plus `balance` times the balance loss. Beside `train/loss`, the language model's
    alone, each step logs `moe/balance` and, over all layers, `moe/recycled` and `moe/dropped` (shares of the
    assignments) and `moe/load_max` (the fullest expert in units of the mean load). Validation is dropless.

    Args:
        experts: specialized experts of a layer.
        top_k: of them, those that a token uses.
        shared_experts: those that every token uses.
        routing: `recycle`, `drop` or `dropless`, in training.
        capacity_factor: an expert's capacity in units of the mean load.
        balance: weight of the balance loss; not published.
        share_factor: layers that share keys and values; 1 for none (no CLA).
        qk_norm: whether queries and keys are normalized.
        rope_theta: base of the rotary frequencies.
        rope_alpha: raises the base to rope_theta · alpha^(d/(d-2)), as in the released models.
        expert_lr_ratio: learning rate of the specialized experts, relative to `lr`.
        anneal_share: of the steps, the last ones, over which the rate falls to `lr · min_lr_ratio`.
        decay_ratio: where the decay before it ends, relative to `lr`; not published.
        tie_embeddings: whether the head's weight is the embedding's.
        others: sizes and optimizer, as `CausalLM` takes them; `ffn` is an expert's inner width. `init_from` is a folder
            in the released layout, of which each process reads its share.
    """

    may_change: ClassVar[tuple[str, ...]] = (*CausalLM.may_change, "expert_lr_ratio", "anneal_share", "decay_ratio")

    def __init__(
        self,
        *,
        experts: int = 16,
        top_k: int = 1,
        shared_experts: int = 1,
        routing: Literal["recycle", "drop", "dropless"] = "recycle",
        capacity_factor: float = 1.0,
        balance: float = 0.01,
        share_factor: int = 2,
        qk_norm: bool = True,
        rope_theta: float = 10_000.0,
        rope_alpha: float | None = None,
        expert_lr_ratio: float = PAPERS_RATIO,
        anneal_share: float = 0.05,
        decay_ratio: float = 0.3,
        tie_embeddings: bool = True,
        **others,
    ) -> None:
        super().__init__(tie_embeddings=tie_embeddings, **others)
        for name, value in {
            "expert_lr_ratio": expert_lr_ratio,
            "rope_theta": rope_theta,
            "rope_alpha": rope_alpha,
        }.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be positive, got {value}")
        h = self.hparams
        if not 0 <= h.init_std <= 1:
            raise ValueError(f"init_std: must be from 0 to 1, got {h.init_std}")
        if not h.min_lr_ratio <= decay_ratio <= 1:
            raise ValueError(f"decay_ratio: must be from min_lr_ratio {h.min_lr_ratio} to 1, got {decay_ratio}")
        self.config()  # what does not go together shows now, not when training begins

    def config(self) -> HunyuanLargeConfig:
        """The model's configuration.

        Raises:
            ValueError: a value that is not accepted, in the words of this class.
        """
        h = self.hparams
        given = {name: h[ours] for name, ours in ARGUMENTS.items()}
        given["num_key_value_heads"] = self.llama_config().num_key_value_heads  # whose checks of sizes hold here too
        rope = {"rope_type": "default", "rope_theta": h.rope_theta}
        if h.rope_alpha is not None:
            rope |= {"rope_type": "dynamic", "alpha": h.rope_alpha, "factor": 1.0}
        try:
            return HunyuanLargeConfig(
                **given, rope_parameters=rope, use_cla=h.share_factor > 1, bos_token_id=0, eos_token_id=0
            )
        except ValueError as error:
            ours = {**ARGUMENTS, "head_dim": "dim / heads"}
            told = re.sub(r"\w+", lambda word: ours.get(word[0], word[0]), str(error))
            raise ValueError(told) from error

    def build(self) -> PreTrainedModel:
        """The model to train, with fresh weights."""
        return HunyuanLargeForCausalLM(self.config())

    def configure_model(self) -> None:
        """Build the model, once, and listen for its balance loss."""
        if self.lm is not None:
            return
        super().configure_model()
        self.lm.base_model.register_forward_hook(self._keep_balance)

    def read_weights(self, folder: Path) -> None:
        """Fill the model from a folder in the released layout, of which each process reads its share."""
        read_weights(self.lm, folder)

    def _keep_balance(self, model: torch.nn.Module, inputs: tuple, output) -> None:
        self._balance = output.balance_loss

    def on_fit_start(self) -> None:
        """Give each process random numbers of its own: by default all would recycle to the same places.

        A resumed training restores each process's own state afterwards.
        """
        if self.trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """The loss of a batch, balance included, and what the routers did."""
        try:
            loss = super().training_step(batch, batch_index)
        except ValueError as error:
            if not str(error).startswith("logits:"):
                raise
            # A router sees it first that the weights have become too large, before there is a loss.
            raise NonFiniteError(f"step {self.global_step}: the routers' {error}") from error
        statistics = [layer.mlp.statistics for layer in self.lm.base_model.layers]
        load = torch.stack([s.load for s in statistics]).float()
        self.log_dict(
            {
                "moe/balance": self._balance,
                "moe/load_max": (load.max(1).values / load.mean(1)).max(),
                "moe/recycled": torch.stack([s.recycled for s in statistics]).mean(),
                "moe/dropped": torch.stack([s.dropped for s in statistics]).mean(),
            }
        )
        return loss + self.hparams.balance * self._balance

    def configure_optimizers(self) -> dict:
        """AdamW with the experts' own learning rate, and the three phases."""
        h = self.hparams
        groups = expert_parameter_groups(self.lm, h.lr, ratio=h.expert_lr_ratio, weight_decay=h.weight_decay)
        optimizer = self.adamw(groups)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = three_phase(
            optimizer,
            warmup_steps=min(h.warmup_steps, int((1 - h.anneal_share) * steps)),  # a trial run may be shorter
            total_steps=steps,
            anneal_share=h.anneal_share,
            decay_ratio=h.decay_ratio,
            min_ratio=h.min_lr_ratio,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
