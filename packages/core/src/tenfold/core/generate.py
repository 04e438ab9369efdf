"""`tenfold generate`: a run's language model goes on with a text."""

from pathlib import Path

import torch
from transformers import GenerationConfig, TextStreamer, set_seed

from .errors import UserError
from .export import transformers_tokenizer
from .lm import CausalLM
from .trained import open_run


def generate(
    run: Path,
    prompt: str = "",
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Write a text as a run's language model goes on with it, word by word.

    Args:
        run: the run's folder, as `tenfold fit` says it.
        prompt: how the text begins; without one the model begins a document.
        max_new_tokens: at most so many; by default 100, or what the model's longest text has room for. The model may
            end the document before.
        temperature: of the sampling; 0 takes the most likely token.
        top_k: tokens to sample from, the most likely ones; 0 for all.
        top_p: sample from the most likely tokens that together have this probability.
        seed: of the sampling.
    """
    for name, value, accepted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens is None or max_new_tokens >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
        ("seed", seed, 0 <= seed < 2**32),
    ):
        if not accepted:
            raise UserError(f"{name}: {value} is out of range")
    trained = open_run(run)
    if not isinstance(trained.module, CausalLM) or trained.tokenizer is None:
        raise UserError(f"run: {run} is of {type(trained.module).__name__}, not of a language model with a tokenizer")
    lm, tokenizer = trained.module.lm, trained.tokenizer
    tokens = [tokenizer.separator, *tokenizer.encode(prompt)]
    room = trained.module.hparams.max_length - len(tokens)
    if room < (max_new_tokens or 1):
        longest = trained.module.hparams.max_length
        raise UserError(
            f"{'prompt' if room < 1 else 'max_new_tokens'}: the model's longest text is {longest} tokens, "
            f"the prompt has {len(tokens)}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature else {}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens or min(100, room),
        do_sample=temperature > 0,
        bos_token_id=tokenizer.separator,
        eos_token_id=tokenizer.separator,
        pad_token_id=tokenizer.separator,
        suppress_tokens=list(range(tokenizer.vocab_size, lm.config.vocab_size)) or None,  # which stand for no text
        **sampling,
    )
    set_seed(seed)
    print(prompt, end="", flush=True)
    streamer = TextStreamer(
        transformers_tokenizer(tokenizer),
        skip_prompt=True,
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    inputs = torch.tensor([tokens], device=device)
    lm.to(device).generate(
        inputs, attention_mask=torch.ones_like(inputs), generation_config=settings, streamer=streamer
    )
