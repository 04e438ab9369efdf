"""Loading from the released checkpoint's layout: names and config.json as the released code and files have them."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from tenfold.core.training.sharding import fill, shard
from tenfold.hunyuan_moe import HunyuanLargeConfig, HunyuanLargeForCausalLM, register
from tenfold.hunyuan_moe.model.checkpoint import read_weights

# The released config.json's words, with small sizes.
CONFIG = {
    "architectures": ["HunYuanForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_head_dim": 8,
    "auto_map": {
        "AutoConfig": "configuration_hunyuan.HunYuanConfig",
        "AutoModelForCausalLM": "modeling_hunyuan.HunYuanForCausalLM",
    },
    "bos_token_id": 1,
    "capacity_factor": 1.0,
    "cla_share_factor": 2,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "hunyuan",
    "moe_drop_tokens": False,
    "moe_random_routing_dropped_token": False,
    "moe_topk": 1,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_shared_expert": 1,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"alpha": 100000.0, "factor": 1.0, "type": "dynamic"},
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_cla": True,
    "use_mixed_mlp_moe": True,
    "use_qk_norm": True,
    "vocab_size": 97,
}


def tensors():
    """Random ones, named as in the released code."""
    shapes = {"model.embed_tokens.weight": (97, 32), "model.norm.weight": (32,)}
    for layer in range(4):
        at = f"model.layers.{layer}."
        attention = {"q_proj": (32, 32), "o_proj": (32, 32), "query_layernorm": (8,), "key_layernorm": (8,)}
        if layer % 2 == 0:
            attention |= {"k_proj": (16, 32), "v_proj": (16, 32)}
        shapes |= {f"{at}self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{at}{name}.weight": (32,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{at}mlp.gate.wg.weight"] = (4, 32)
        for expert in ("shared_mlp", *(f"experts.{e}" for e in range(4))):
            shapes |= {f"{at}mlp.{expert}.{name}_proj.weight": (24, 32) for name in ("gate", "up")}
            shapes[f"{at}mlp.{expert}.down_proj.weight"] = (32, 24)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def write(folder, state, shards=3):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names, where = sorted(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]  # an expert's matrices lie in different files
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(x.numel() * x.element_size() for x in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, tensors())
    return tmp_path


def test_every_tensor_arrives(folder):
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is HunyuanLargeForCausalLM
    state, ours = tensors(), model.state_dict()
    for layer in range(4):
        at = f"model.layers.{layer}.mlp.experts."
        for e in range(4):
            expected = torch.cat([state.pop(f"{at}{e}.{name}_proj.weight") for name in ("gate", "up")])
            assert torch.equal(ours[f"{at}gate_up_proj"][e], expected)
            assert torch.equal(ours[f"{at}down_proj"][e], state.pop(f"{at}{e}.down_proj.weight"))
    for name, weight in state.items():
        assert torch.equal(ours[name], weight), name
    assert ours["lm_head.weight"].data_ptr() == ours["model.embed_tokens.weight"].data_ptr()
    frequencies = 1 / (1e4 * 1e5 ** (8 / 6)) ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, frequencies)
    assert model.config.head_dim == 8
    assert model(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_saving_writes_the_released_layout(folder, tmp_path):
    model = HunyuanLargeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").is_file()
    found = {}
    for file in (tmp_path / "again").glob("*.safetensors"):
        found |= load_file(file)
    state = tensors()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], weight) for name, weight in state.items())


def test_a_tied_head_may_be_there(folder):
    state = tensors()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    write(folder, state)
    HunyuanLargeForCausalLM.from_pretrained(folder)
    state["lm_head.weight"][96, 31] += 1
    write(folder, state)
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head\.weight is not model\.embed_tok"):
        HunyuanLargeForCausalLM.from_pretrained(folder)


def test_an_untied_folder_does_not_lose_its_head(folder):
    state = tensors()
    state["lm_head.weight"] = torch.randn(97, 32)
    write(folder, state)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="its tie_word_embeddings is False, the model's True"):
        read_weights(HunyuanLargeForCausalLM(HunyuanLargeConfig.from_dict(copy.deepcopy(CONFIG))), folder)
    model = HunyuanLargeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


def test_loading_changes_the_config(folder):
    changes = {"routing": "dropless", "router_aux_loss_coef": 0.5, "output_hidden_states": True}
    model = HunyuanLargeForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes)
    assert [getattr(model.config, name) for name in changes] == [*changes.values()]
    assert model.model.layers[0].mlp.gate.routing == "dropless"
    assert len(model(torch.ones(1, 4, dtype=torch.long)).hidden_states) == 5
    with pytest.raises(ValueError, match=r"not the model's: model\.layers\.2"):
        HunyuanLargeForCausalLM.from_pretrained(folder, num_hidden_layers=2)
    (folder / "inner").mkdir()
    for file in [*folder.iterdir()]:
        if file.is_file():
            file.rename(folder / "inner" / file.name)
    model = HunyuanLargeForCausalLM.from_pretrained(folder, subfolder="inner", routing="drop")
    assert model.config.routing == "drop"


def test_all_that_is_wrong_in_one_error(folder):
    state = tensors()
    del state["model.layers.1.mlp.experts.3.up_proj.weight"], state["model.layers.2.self_attn.k_proj.weight"]
    state["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, 32)
    state["model.layers.0.mlp.gate.wg.weight"] = torch.zeros(5, 32)
    write(folder, state)
    with pytest.raises(ValueError, match="not those of the config") as error:
        HunyuanLargeForCausalLM.from_pretrained(folder)
    assert str(error.value).endswith(
        "2 missing: model.layers.1.mlp.experts.3.up_proj.weight, model.layers.2.self_attn.k_proj.weight; "
        "1 not the model's: model.layers.1.self_attn.k_proj.weight; "
        "1 misshapen: model.layers.0.mlp.gate.wg.weight is 5 × 32, not 4 × 32"
    )


def test_the_tail_of_a_long_list_is_counted(folder):
    state = {name: x for name, x in tensors().items() if ".mlp.experts." not in name}
    write(folder, state)
    with pytest.raises(ValueError, match=r"48 missing: (\S+, ){7}\S+ and 40 more$"):
        HunyuanLargeForCausalLM.from_pretrained(folder)


def test_damaged_and_missing_files(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors: damaged, or not a safetensors file"):
        HunyuanLargeForCausalLM.from_pretrained(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"names files that are not there: model-00002-of-00003\.safetensors"):
        HunyuanLargeForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="not an index of safetensors files"):
        HunyuanLargeForCausalLM.from_pretrained(folder)


@pytest.fixture(params=range(3))
def one_of_three(request):
    """The mesh of three processes, two of them imagined."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=3)
    yield init_device_mesh("cpu", (3,))
    dist.destroy_process_group()


def test_a_process_reads_its_share(folder, one_of_three):
    """Of 48 rows of gates and ups, a third that ends among the gates, one with some of both, and one of ups."""
    whole = HunyuanLargeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.device("meta"):
        model = HunyuanLargeForCausalLM(whole.config)
    shard(model, model.model.layers, one_of_three)
    fill(model, model, one_of_three, device=torch.device("cpu"), seed=0)
    read_weights(model, folder)
    shares = dict(model.named_parameters())
    assert shares["model.layers.0.mlp.experts.gate_up_proj"].to_local().shape == (4, 16, 32)
    assert shares["model.norm.weight"].to_local().shape == ((10,) if one_of_three.get_rank() == 2 else (11,))
    for name, weight in whole.named_parameters():
        share, rank = shares[name], one_of_three.get_rank()
        (placement,) = share.placements
        chunks = (*weight.chunk(3, placement.dim), weight[:0])  # four rows are for two of three processes
        assert torch.equal(share.to_local(), chunks[rank]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": 2, "attention_head_dim": 16, "num_key_value_heads": 1},
            "num_attention_heads is 4, the",
        ),
        ({"rope_theta": 5e4}, r"rotary base is 4\.64159e\+10, the model's 2\.32079e\+11"),
        ({"vocab_size": 98}, "1 misshapen: model.embed_tokens.weight is 97 × 32, not 98 × 32"),
    ],
)
def test_weights_that_mean_something_else(folder, changes, message):
    model = HunyuanLargeForCausalLM(HunyuanLargeConfig.from_dict(copy.deepcopy(CONFIG) | changes))
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(ValueError, match=message):
        read_weights(model, folder)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_no_weights(tmp_path):
    with pytest.raises(ValueError, match=r"there is no model\.safetensors, nor an index of several"):
        read_weights(HunyuanLargeForCausalLM(HunyuanLargeConfig.from_dict(CONFIG)), tmp_path)


def test_the_released_words_make_the_papers_model():
    """The Pretrain model's sizes in the released words are the package's defaults."""
    released = CONFIG | {
        "attention_head_dim": 80,
        "hidden_size": 6400,
        "intermediate_size": 18304,
        "max_position_embeddings": 262144,
        "num_attention_heads": 80,
        "num_experts": 16,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128512,
    }
    config, default = HunyuanLargeConfig.from_dict(released), HunyuanLargeConfig()
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_experts",
        "moe_topk",
        "num_shared_expert",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "use_cla",
        "cla_share_factor",
        "use_qk_norm",
        "capacity_factor",
        "initializer_range",
        "kv_sharing_modes",
    ):
        assert getattr(config, name) == getattr(default, name), name
    for name in ("rope_type", "rope_theta", "alpha"):
        assert config.rope_parameters[name] == default.rope_parameters[name]
