"""The layer and the experts function, against loops over tokens and transformers' own experts."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModel,
    DbrxConfig,
    GptOssConfig,
    GptOssForCausalLM,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    JetMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NllbMoeConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SwitchTransformersConfig,
)

from tenfold.hunyuan_moe import MoELayer, RecycleRouter, register_experts
from tenfold.hunyuan_moe.adapters.experts import chosen_routing
from tenfold.kernels import permute_tokens, unpermute_tokens


def layer(**options):
    torch.manual_seed(0)
    return MoELayer(**{"dim": 8, "ffn": 6, "experts": 4} | options).double()


def by_token(moe, x, routing):
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for expert, weight in zip(routing.expert[t], routing.weight[t], strict=True):
            if expert >= 0:
                gate, up = (moe.experts.gate_up_proj[expert] @ x[t]).chunk(2)
                out[t] += weight * (moe.experts.down_proj[expert] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("routing", ["recycle", "drop", "dropless"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_forward_and_gradients(routing, top_k):
    moe = layer(routing=routing, top_k=top_k, shared_experts=2)
    x = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    y, chosen = moe(x)
    expected = by_token(moe, x.flatten(0, 1), chosen).view_as(x) + moe.shared_mlp(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    parameters = [x, *moe.parameters()]
    ours = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True)
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert ours[-1].shape == moe.shared_mlp.down_proj.weight.shape
    assert ours[1].abs().max() > 0  # the router learns through the weights, of recycled tokens too


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_the_router_stays_in_float32(cast):
    torch.manual_seed(0)
    moe = MoELayer(8, 6, 4)
    before = moe.gate.wg.weight.clone()
    cast(moe)
    assert moe.experts.down_proj.dtype.itemsize == moe.shared_mlp.up_proj.weight.dtype.itemsize == 2
    assert moe.gate.wg.weight.dtype == torch.float32
    assert torch.equal(moe.gate.wg.weight, before)
    y, routing = moe(torch.randn(5, 8, dtype=moe.experts.down_proj.dtype))
    assert y.dtype == moe.experts.down_proj.dtype
    assert routing.weight.dtype == torch.float32
    assert moe.to("meta", torch.bfloat16).gate.wg.weight.device.type == "meta"
    assert moe.gate.wg.weight.dtype == torch.float32
    assert moe.double().gate.wg.weight.dtype == torch.float64


def test_no_tokens():
    moe = MoELayer(8, 6, 4)
    y, _ = moe(torch.randn(0, 8))
    assert y.shape == (0, 8)
    assert moe.statistics.load.tolist() == [0] * 4
    assert moe.statistics.recycled == moe.statistics.dropped == 0


def test_statistics():
    moe = layer(routing="recycle", shared_experts=0)
    torch.nn.init.zeros_(moe.gate.wg.weight)
    moe.gate.wg.weight.data[2, 0] = 1  # every token prefers expert 2
    y, routing = moe(torch.ones(20, 8, dtype=torch.float64))
    assert y.shape == (20, 8)
    assert moe.shared_mlp is None
    assert moe.statistics.load.tolist() == [5, 5, 5, 5]
    assert moe.statistics.recycled == 0.75
    assert moe.statistics.dropped == 0
    assert routing.balance_loss > 1
    moe.gate.routing = "drop"
    moe(torch.ones(20, 8, dtype=torch.float64))
    assert moe.statistics.load.tolist() == [0, 0, 5, 0]
    assert moe.statistics.dropped == 0.75
    moe.eval()(torch.ones(20, 8, dtype=torch.float64))
    assert moe.statistics.load.tolist() == [0, 0, 20, 0]


def test_the_same_seed_recycles_the_same_tokens():
    moe, x = MoELayer(8, 6, 16).double(), torch.randn(64, 8, dtype=torch.float64)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(moe(x)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_capacity():
    assert RecycleRouter(4, 16, capacity_factor=1.25).capacity(1000) == 79  # ⌈1.25 · 1000/16⌉
    assert RecycleRouter(4, 16, top_k=2).capacity(1000) == 125
    assert RecycleRouter(4, 16).capacity(3) == 1
    assert RecycleRouter(4, 16, routing="dropless").capacity(1000) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k: must be from 1 to the 4 experts, got 5"),
        ({"routing": "x"}, "routing: must be one of 'recycle', 'drop', 'dropless', got 'x'"),
        ({"capacity_factor": float("nan")}, "capacity_factor: must be at least 1"),
        ({"experts": 0}, "experts: must be at least 1, got 0"),
        ({"shared_experts": -1}, "shared_experts: must be at least 0, got -1"),
        ({"ffn": 0}, "ffn: must be at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_logits_that_are_nan():
    with pytest.raises(ValueError, match="logits: 2 of 3 tokens, the first at 0"):
        layer()(torch.tensor([[torch.nan] * 8, [0.0] * 8, [torch.inf] * 8], dtype=torch.float64))


SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
MODELS = {
    "Mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4)),
    "Qwen2-MoE": (Qwen2MoeForCausalLM, Qwen2MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=12)),
    "HunYuan-V1-MoE": (HunYuanMoEV1ForCausalLM, HunYuanMoEV1Config(**SIZES, num_experts=4, moe_topk=2)),
    "gpt-oss": (GptOssForCausalLM, GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_models_run_on_the_grouped_products(name):
    register_experts()
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model = kind(config).eval()
    tokens = torch.randint(1, 50, (2, 9))
    results = []
    for implementation in ("eager", "tenfold"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        out = model(tokens, labels=tokens)
        out.loss.backward()
        results.append((out.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_experts_of_other_processes_add_nothing():
    """Where experts are spread over processes, transformers marks the others' by `num_experts` and weight 0."""
    expert = torch.tensor([[0, 2], [2, 1], [2, 2]])
    weight = torch.tensor([[0.5, 0.0], [0.0, 1.0], [0.0, 0.0]])
    routing = chosen_routing(expert, weight, 2)
    rows, offsets = permute_tokens(torch.arange(3.0)[:, None], routing)
    assert offsets.tolist() == [0, 1, 2]
    assert rows[:2, 0].tolist() == [0, 1]
    assert routing.load.tolist() == [1, 1]
    assert unpermute_tokens(torch.full((6, 1), 2.0), routing)[:, 0].tolist() == [1, 2, 0]


def test_compiles_without_graph_breaks():
    moe, x = MoELayer(8, 6, 4), torch.randn(24, 8)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    results = []
    for layer in (moe, compiled):
        torch.manual_seed(1)
        moe.zero_grad()
        y, routing = layer(x)
        (y.square().sum() + routing.balance_loss).backward()
        results.append([y, *(p.grad for p in moe.parameters())])
        assert moe.statistics.load.tolist() == [6, 6, 6, 6]
    torch.testing.assert_close(*results)


SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize(
    "config",
    [
        JetMoeConfig(**SMALL, num_key_value_heads=1, kv_channels=8, num_local_experts=2),
        SwitchTransformersConfig(
            vocab_size=20,
            d_model=16,
            d_kv=8,
            d_ff=8,
            num_layers=2,
            num_heads=2,
            num_experts=2,
            num_sparse_encoder_layers=1,
        ),
        DbrxConfig(vocab_size=20, d_model=16, n_heads=2, n_layers=1, max_seq_len=32),
        Llama4TextConfig(**SMALL, num_key_value_heads=1, intermediate_size_mlp=8, num_local_experts=2),
        NllbMoeConfig(vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, num_experts=2),
    ],
    ids=lambda config: config.model_type,
)
def test_experts_that_cannot_be_replaced_are_refused(config):
    """Transformers takes the name and goes on with its own experts."""
    register_experts()
    with pytest.raises(ValueError, match="does not go through transformers' experts functions, so 'tenfold' would do"):
        AutoModel.from_config(config, experts_implementation="tenfold")
    assert AutoModel.from_config(LlamaConfig(**SMALL), experts_implementation="tenfold") is not None
