"""Cog in the architectures that are used most, built small: it works, saved and loaded too, or is refused."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from tenfold.cog_attention import keep_softmax, register

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
PAIR = {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
PAIR |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0}
CAUSAL = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "phi", "phi3", "stablelm", "starcoder2", "cohere", "olmo", "granite", "smollm3"),
        GROUPED,
    ),
    **dict.fromkeys(("qwen3", "gemma3_text"), GROUPED | {"head_dim": 8}),
    "mixtral": GROUPED | {"num_local_experts": 2},
    "gpt_neox": SIZES,
    "opt": SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "gptj": {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
    "gpt2": {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "attn_pdrop": 0.0},
}
OTHERS = {"bert": SIZES, "vit": SIZES | {"image_size": 32, "patch_size": 8}, "bart": PAIR, "whisper": PAIR}
REFUSED = {  # when built or in the first forward: what Cog would leave out
    "gemma2": (GROUPED | {"head_dim": 8}, "softcap"),
    "t5": ({"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}, "position_bias"),
    "gpt_oss": (GROUPED | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux|does not call"),
    "bloom": ({"vocab_size": 50, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "BloomModel does not call"),
    "falcon": ({"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}, "Falcon"),
    "mpt": ({"vocab_size": 50, "d_model": 32, "n_heads": 4, "n_layers": 1}, "MptModel does not call"),
}
TOKENS = torch.arange(1, 11)[None]


def build(kind, settings, attention="cog", auto=AutoModelForCausalLM):
    register()
    torch.manual_seed(0)
    return auto.from_config(CONFIG_MAPPING[kind](**settings), attn_implementation=attention).eval()


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_language_model_runs_saves_and_trains(kind, tmp_path):
    model = build(kind, CAUSAL[kind])
    model.save_pretrained(tmp_path)  # before any forward
    with torch.no_grad():
        logits = model(TOKENS).logits
        assert not torch.allclose(logits, build(kind, CAUSAL[kind], "sdpa")(TOKENS).logits, atol=1e-4)
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, logits)
        last = TOKENS.clone()
        last[:, -1] = 3
        torch.testing.assert_close(model(last).logits[:, :-1], logits[:, :-1])
    whole = model.generate(TOKENS, max_new_tokens=4, do_sample=False, attention_mask=TOKENS > 0, use_cache=False)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=4, do_sample=False, attention_mask=TOKENS > 0), whole)
    keep_softmax(model)
    model.train()(TOKENS, labels=TOKENS, num_items_in_batch=9).loss.backward()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_run(kind):
    inputs = {
        "bert": {"input_ids": TOKENS},
        "vit": {"pixel_values": torch.zeros(1, 3, 32, 32)},
        "bart": {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
        "whisper": {"input_features": torch.zeros(1, 80, 3000), "decoder_input_ids": TOKENS},
    }[kind]
    with torch.no_grad():
        ours, theirs = (
            build(kind, OTHERS[kind], attention, AutoModel)(**inputs).last_hidden_state for attention in ("cog", "sdpa")
        )
    assert ours.isfinite().all()
    assert not torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_left_out_is_refused(kind):
    settings, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        build(kind, settings, auto=AutoModel)(TOKENS, **({"decoder_input_ids": TOKENS} if kind == "t5" else {}))
