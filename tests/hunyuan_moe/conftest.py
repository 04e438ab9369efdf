import pytest
import torch

from tenfold.hunyuan_moe import HunyuanLargeConfig, HunyuanLargeForCausalLM


@pytest.fixture
def tiny():
    """A config of four layers, two runs of two, that takes changes."""

    def config(**changes):
        sizes = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 4,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            "initializer_range": 0.2,
        }
        return HunyuanLargeConfig(**{**sizes, **changes})

    return config


@pytest.fixture
def build(tiny):
    """A model in evaluation mode whose norms' weights are not 1."""

    def make(dtype=torch.float64, **changes):
        torch.manual_seed(0)
        model = HunyuanLargeForCausalLM(tiny(**changes)).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight.uniform_(0.5, 1.5)
        return model.to(dtype)

    return make


@pytest.fixture
def tokens():
    return torch.randint(1, 97, (2, 13), generator=torch.Generator().manual_seed(1))
