import pytest
import torch
from transformers.utils import logging

from tenfold.clla import CLLAConfig, CLLAForCausalLM, rung

logging.disable_progress_bar()

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,  # an odd number: the last run is shorter
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "latent_dim": 24,
    "rope_dim": 6,
    "group_size": 8,
    "initializer_range": 0.3,  # so that attention looks at something
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": None,
}


@pytest.fixture
def sizes():
    return dict(SIZES)


@pytest.fixture
def build():
    """Small rungs of the ladder in float64, where no rounding flips a code."""

    def build(name="CLLA", *, seed=0, **changes):
        torch.manual_seed(seed)
        return CLLAForCausalLM(rung(CLLAConfig(**SIZES), name, **changes)).double().eval()

    return build


@pytest.fixture
def tokens():
    return torch.randint(1, 97, (2, 13), generator=torch.Generator().manual_seed(1))
