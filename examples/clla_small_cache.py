"""Generate with a cache of 4-bit latents shared by pairs of layers, and count its bytes: `uv run python FILE`."""

import torch

from tenfold.clla import CLLACache, CLLAConfig, CLLAForCausalLM, bytes_per_token, rung

config = CLLAConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=4,
    latent_dim=64,
    rope_dim=8,
    pad_token_id=0,
)
model = CLLAForCausalLM(config).eval()  # fresh weights: what it writes means nothing
tokens = torch.tensor([list(b"A latent is all that is kept of a token. ") * 10])
cache = CLLACache(config, max_length=tokens.shape[1] + 32)
written = model.generate(tokens, past_key_values=cache, max_new_tokens=32, do_sample=False)

mha = bytes_per_token(rung(config, "MHA", cache_bits=16))
print(f"{written.shape[1]} tokens; the cache has room for {cache.get_max_length()} in {cache.nbytes()} bytes")
print(f"{bytes_per_token(config)} bytes per token, {bytes_per_token(config) / mha:.2%} of MHA's {mha} in bfloat16")
