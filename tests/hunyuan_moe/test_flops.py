"""The count of operations against torch's, on real models, and against sums by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tenfold.hunyuan_moe import HunyuanLargeConfig, HunyuanLargeForCausalLM, count_parameters, flops_per_token

SIZES = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 4}


def forward(x_shape, *weight_shapes):
    return sum(2 * x_shape[0] * shape[1] * shape[2] for shape in weight_shapes)  # each row by one expert's matrices


# torch does not know the op by which the experts are computed.
EXPERTS = {
    torch.ops.tenfold.grouped_swiglu: lambda x, gate_up, down, *_, **__: forward(x, gate_up, down),
    torch.ops.tenfold.grouped_swiglu_backward: lambda grad, x, gate_up, down, *_, **__: 2 * forward(x, gate_up, down),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 4, "num_experts": 4, "num_key_value_heads": 2},
        {"num_hidden_layers": 3, "num_experts": 4, "num_key_value_heads": 1, "moe_topk": 2, "num_shared_expert": 2},
        {"num_hidden_layers": 2, "num_experts": 8, "num_key_value_heads": 4, "num_shared_expert": 0, "use_cla": False},
        {"num_hidden_layers": 2, "num_experts": 2, "num_key_value_heads": 2, "head_dim": 10},
        {"num_hidden_layers": 2, "num_experts": 2, "num_key_value_heads": 2, "tie_word_embeddings": False},
    ],
)
@pytest.mark.parametrize("routing", ["recycle", "dropless"])
def test_the_count_is_torchs(changes, routing):
    config = HunyuanLargeConfig(**SIZES, **changes, routing=routing, attn_implementation="eager")
    model = HunyuanLargeForCausalLM(config).train()
    tokens = torch.randint(40, (2, 16))
    with FlopCounterMode(display=False, custom_mapping=EXPERTS) as counter:
        model(tokens, labels=tokens).loss.backward()
    assert flops_per_token(config, 16).total * tokens.numel() == counter.get_total_flops()


def test_the_released_model():
    """Six operations for each activated parameter but the norms, and the context beside them."""
    config = HunyuanLargeConfig()
    flops = flops_per_token(config, 4096)
    norms = 64 * 2 * 6400 + 6400 + 96 * 80 + 32 * 80  # pre-norms, final norm, key and query norms
    assert flops.total - flops.attention == pytest.approx(6 * (count_parameters(config).activated - norms), rel=1e-7)
    assert flops.attention == 12 * 64 * 80 * 80 * 4096
    assert flops_per_token(config, 8192).attention == 2 * flops.attention
    with pytest.raises(ValueError, match="length: must be at least 1, got 0"):
        flops_per_token(config, 0)
