"""What the ops are tested with: error budget, inputs, poisoned memory, ahead-of-time compilation."""

from .aot import Compiled, Launch, compile_ahead, compile_launch, recorded_launches, shared_limit
from .budget import assert_same_bits, assert_within_budget, check_op
from .inputs import (
    bit_patterns,
    cog_inputs,
    grouped_inputs,
    latent_inputs,
    lay_out,
    logprob_inputs,
    routing_logits,
    swiglu_inputs,
    with_margin,
)
from .memory import peak_memory
from .poison import poisoned_scratch

__all__ = [
    "Compiled",
    "Launch",
    "assert_same_bits",
    "assert_within_budget",
    "bit_patterns",
    "check_op",
    "cog_inputs",
    "compile_ahead",
    "compile_launch",
    "grouped_inputs",
    "latent_inputs",
    "lay_out",
    "logprob_inputs",
    "peak_memory",
    "poisoned_scratch",
    "recorded_launches",
    "routing_logits",
    "shared_limit",
    "swiglu_inputs",
    "with_margin",
]
