"""Train a transformers Llama with 4-bit floating-point weights, and ask the law what it costs: `uv run python FILE`."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tenfold.fp_scaling import QuantRecipe, ScalingLaw, dequantize_, quantize_linears_

text = torch.tensor([list(b"Quantized weights round to a few numbers per block. " * 4)])
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)
for name in (None, "e4m3", "e2m1", "e1m1"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if name:
        quantize_linears_(model, QuantRecipe(name, block_size=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        loss = model(text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{name or 'float32'}: loss {loss.item():.3f}")
dequantize_(model)  # the plain model again, with the weights it was trained to

law, format = ScalingLaw.paper(), {"exponent_bits": 2, "mantissa_bits": 1, "block_size": 32}
print(f"A billion parameters in e2m1: more than {law.critical_tokens(params=1e9, **format):.2g} tokens would hurt.")
